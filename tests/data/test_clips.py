import json
import os
import time
import tracemalloc

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
from diffusers import AutoencoderKL
from fork_server import fork_server
from safetensors.torch import save_file
from test_lerobot import CAMERA, edit_table, write_folder
from tiny_models import tiny_vae

from irasim_diffusers.data import (
    LatentClips,
    LeRobotFolder,
    MixedClips,
    TableEpisodes,
    cache_latents,
    infer_action_space,
    latent_cache,
    standardised_states,
    write_video,
)

ENCODE_SLOWLY = """
import time
from tiny_models import tiny_vae
from irasim_diffusers.data import LeRobotFolder, cache_latents

vae = tiny_vae()
vae.encoder.register_forward_hook(lambda *_: time.sleep(0.5))
cache_latents(LeRobotFolder("set"), vae, "cache", episodes_per_file=1)
"""


@pytest.fixture
def dataset(tmp_path):
    episodes = write_folder(tmp_path / "set", lengths=(5, 9, 7))
    return LeRobotFolder(tmp_path / "set"), episodes


def encode(vae, episode):
    pixels = torch.from_numpy(episode.frames).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        return vae.encode(pixels).latent_dist.mode()


def test_windows_contain_latents_and_the_actions_between_frames(dataset, tmp_path):
    folder, episodes = dataset
    vae = tiny_vae()
    clips = LatentClips(cache_latents(folder, vae, tmp_path / "cache"), sample_frames=6, skip_short=True)
    assert list(clips.windows) == [(1, 0), (1, 1), (1, 2), (1, 3), (2, 0), (2, 1)]
    item = clips[2]
    expected = encode(vae, episodes[1])[2:8].transpose(0, 1)
    torch.testing.assert_close(item["latents"], expected, rtol=2e-3, atol=2e-3)
    assert torch.equal(item["actions"], torch.from_numpy(episodes[1].actions[2:7]))
    assert len(LatentClips(cache_latents(folder, vae, tmp_path / "cache"), sample_frames=4, stride=3)) == 1 + 2 + 2


@pytest.mark.parametrize("frame_skip", [1, 2])
def test_windows_that_change_are_drawn_more_often(tmp_path, frame_skip):
    still, moving = torch.zeros(20, 1, 2, 2), torch.zeros(300, 1, 2, 2)
    moving[200:] = torch.arange(100).view(-1, 1, 1, 1) / 10
    tensors = {"latents.0": still.half(), "latents.1": moving.half()}
    tensors |= {f"actions.{number}": torch.zeros(length, 1) for number, length in ((0, 20), (1, 300))}
    save_file(tensors, tmp_path / "latents-00000.safetensors")
    (tmp_path / "manifest.json").write_text("{}")
    clips = LatentClips(tmp_path, sample_frames=3, stride=3, frame_skip=frame_skip)
    frames = torch.stack([clips[index]["latents"] for index in range(len(clips))])
    expected = frames.diff(dim=2).abs().mean((1, 3, 4)).sum(1).double()
    np.testing.assert_allclose(clips.changes(), expected, atol=1e-4)

    share = (expected > 0).float().mean().item()
    mixed = MixedClips([clips], change_share=0.75)
    drawn = torch.stack([mixed[index]["latents"].diff(dim=1).abs().sum() > 0 for index in range(len(mixed))])
    assert len(mixed) == len(clips)
    assert abs(drawn.float().mean().item() - (0.75 + 0.25 * share)) < 0.06
    first = mixed._drawn.copy()
    mixed.set_epoch(1)
    assert not np.array_equal(mixed._drawn, first)
    mixed.set_epoch(0)
    assert np.array_equal(mixed._drawn, first)
    with pytest.raises(ValueError, match=r"`change_share` must be in \[0, 1\], got 1.5"):
        MixedClips([clips], change_share=1.5)


def test_changes_of_frames_do_not_overflow(tmp_path):
    frames = torch.tensor([0, 255, 0, 10], dtype=torch.uint8).view(4, 1, 1, 1)
    save_file({"latents.0": frames, "actions.0": torch.zeros(4, 1)}, tmp_path / "latents-0.safetensors")
    (tmp_path / "manifest.json").write_text("{}")
    assert LatentClips(tmp_path, sample_frames=3).changes().tolist() == [510, 265]


def test_still_clips_are_drawn_uniformly(tmp_path):
    save_file(
        {"latents.0": torch.zeros(30, 1, 2, 2).half(), "actions.0": torch.zeros(30, 1)},
        tmp_path / "latents-0.safetensors",
    )
    (tmp_path / "manifest.json").write_text("{}")
    mixed = MixedClips([LatentClips(tmp_path, sample_frames=2)], change_share=1.0)
    assert len(np.unique(mixed._drawn)) > 10


def test_windows_are_counted_but_not_stored(tmp_path):
    lengths = {0: 400_000, 7: 5, 3: 300_001}
    tensors = {f"latents.{number}": torch.zeros(length, 1, 1, 1).half() for number, length in lengths.items()}
    tensors |= {f"actions.{number}": torch.zeros(length, 1) for number, length in lengths.items()}
    save_file(tensors, tmp_path / "latents-00000.safetensors")
    (tmp_path / "manifest.json").write_text("{}")
    tracemalloc.start()
    clips = LatentClips(tmp_path, sample_frames=4, stride=3)
    mixed = MixedClips([clips, clips])
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 30 * len(mixed), "fewer than 30 bytes per window"
    expected = [(number, start) for number in (0, 3, 7) for start in range(0, lengths[number] - 3, 3)]
    assert list(clips.windows) == expected
    assert len(clips) == len(expected) == len(mixed) / 2
    assert clips[-1]["latents"].shape == (1, 4, 1, 1)
    with pytest.raises(IndexError):
        clips[len(clips)]


@pytest.mark.parametrize("latents", [(4, 2, 3), (4, 2, 4)])
def test_episodes_of_other_sizes_raise_immediately(latents, tmp_path):
    tensors = {"latents.0": torch.zeros(5, 4, 2, 3), "actions.0": torch.zeros(5, 3)}
    tensors |= {"latents.1": torch.zeros(6, *latents), "actions.1": torch.zeros(6, 3 if latents[2] == 4 else 2)}
    save_file(tensors, tmp_path / "latents-00000.safetensors")
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(
        ValueError,
        match=r"episodes 0 and 1 of .* have different shapes: latents \(4, 2, 3\) and \(4, 2, .\), 3 and . action",
    ):
        LatentClips(tmp_path, sample_frames=4)


class Recorded(LeRobotFolder):
    """Record which windows are read; the length of a whole episode is None."""

    def window(self, number, start, length=None):
        self.__dict__.setdefault("read", []).append((number, start, length))
        return super().window(number, start, length)


def test_long_episodes_are_encoded_in_parts(dataset, tmp_path, monkeypatch):
    whole = LatentClips(cache_latents(dataset[0], tiny_vae(), tmp_path / "whole", batch_size=2), 5).episodes
    monkeypatch.setattr(latent_cache, "FRAMES_AT_ONCE", 5)
    source = Recorded(tmp_path / "set")
    parts = LatentClips(cache_latents(source, tiny_vae(), tmp_path / "parts", batch_size=2), 5).episodes
    assert source.read == [(0, 0, 4), (0, 4, 1), (1, 0, 4), (1, 4, 4), (1, 8, 1), (2, 0, 4), (2, 4, 3)]
    for number, (latents, actions) in whole.items():
        assert torch.equal(parts[number][0], latents)
        assert torch.equal(parts[number][1], actions)


def test_latents_are_encoded_once_per_data_set_and_autoencoder(dataset, tmp_path):
    folder, _ = dataset
    vae = tiny_vae()
    calls = []
    vae.encoder.register_forward_hook(lambda *_: calls.append(1))
    first = cache_latents(folder, vae, tmp_path / "cache")
    count = len(calls)
    assert count > 0
    assert cache_latents(folder, vae, tmp_path / "cache") == first
    assert len(calls) == count
    torch.nn.init.normal_(vae.quant_conv.bias)
    assert cache_latents(folder, vae, tmp_path / "cache") != first
    assert len(calls) > count


def test_other_files_or_precision_change_the_cache(dataset, tmp_path):
    folder, episodes = dataset
    vae = tiny_vae()
    first = cache_latents(folder, vae, tmp_path / "cache")
    assert cache_latents(folder, vae, tmp_path / "cache", mixed_precision=True) != first
    video = tmp_path / "set/videos" / CAMERA / "chunk-000/file-001.mp4"
    write_video(video, 255 - episodes[2].frames[:, ::2, ::2], 10, lossless=True)
    assert cache_latents(LeRobotFolder(tmp_path / "set"), vae, tmp_path / "cache") != first


def test_manifest_contains_autoencoder_and_dtype(dataset, tmp_path):
    folder, _ = dataset
    tiny_vae().save_pretrained(tmp_path / "vae")
    named = cache_latents(folder, AutoencoderKL.from_pretrained(tmp_path / "vae"), tmp_path / "named")
    content = json.loads((named / "manifest.json").read_text())
    assert (content["autoencoder"], content["dtype"]) == (str(tmp_path / "vae"), "float16")
    unnamed = cache_latents(folder, tiny_vae(), tmp_path / "unnamed")
    assert json.loads((unnamed / "manifest.json").read_text())["autoencoder"] == "AutoencoderKL"
    assert unnamed.name == named.name, "the cache depends on the weights, not on their name"


def test_killed_encoding_resumes(dataset, tmp_path):
    folder, episodes = dataset
    encoder = fork_server().start("-c", ENCODE_SLOWLY, cwd=tmp_path)
    try:
        while not (finished := list(tmp_path.glob("cache/*/latents-*.safetensors"))):
            assert encoder.poll() is None, "the encoder ended before it was killed"
            time.sleep(0.02)
    finally:
        encoder.kill()
        encoder.wait()
    written = {path: path.stat().st_mtime_ns for path in finished}
    assert len(written) < 3
    dead, alive = (
        finished[0].with_name(f".latents-00002.{number}.partial.safetensors") for number in (encoder.pid, os.getppid())
    )
    for partial in (dead, alive):
        partial.write_bytes(b"half")
    vae = tiny_vae()
    encoded = []
    vae.encoder.register_forward_hook(lambda _, inputs, __: encoded.append(len(inputs[0])))
    clips = LatentClips(cache_latents(folder, vae, tmp_path / "cache", episodes_per_file=1), 5)
    assert encoded == [len(episode) for episode in episodes[len(written) :]]
    assert {path: path.stat().st_mtime_ns for path in finished} == written
    assert len(clips.episodes) == 3
    assert list(finished[0].parent.glob("*.partial*")) == [alive]


def test_incomplete_caches_and_short_episodes_raise(dataset, tmp_path):
    folder, _ = dataset
    cache = cache_latents(folder, tiny_vae(), tmp_path / "cache")
    with pytest.raises(ValueError, match=r"no episode .* as long as a window of 10 frames"):
        LatentClips(cache, sample_frames=10)
    with pytest.raises(
        ValueError,
        match=r"at least as long as a window of 8 frames, but 2 of \d are shorter, .* episode 0 with 5 frames",
    ):
        LatentClips(cache, sample_frames=8)
    clips = LatentClips(cache, sample_frames=8, skip_short=True)
    assert (clips.short, list(clips.episodes)) == ([0, 2], [1])
    assert len(clips.actions) == 8, "only the actions of the remaining episodes are kept"
    (cache / "manifest.json").unlink()
    with pytest.raises(ValueError, match="no complete latent cache"):
        LatentClips(cache)


def test_windows_have_their_states(dataset, tmp_path):
    folder, episodes = dataset
    (states,) = standardised_states([folder], ["observation.state"], angles=["b"])
    pooled = torch.cat(list(states.values()))
    torch.testing.assert_close(pooled.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(pooled.std(0, correction=0), torch.ones(3))
    raw = np.concatenate([episode.states["observation.state"] for episode in episodes])
    for column, expected in enumerate((raw[:, 0], np.cos(raw[:, 1]), np.sin(raw[:, 1]))):
        assert np.corrcoef(pooled[:, column], expected)[0, 1] > 0.9999
    cache = cache_latents(folder, tiny_vae(), tmp_path / "cache")
    clips = LatentClips(cache, sample_frames=6, states=states, skip_short=True)
    assert torch.equal(clips[5]["states"], states[2][1:7])


def test_constant_states_become_zero(dataset, tmp_path):
    for name in ("file-000", "file-001"):
        path = tmp_path / "set/data/chunk-000" / f"{name}.parquet"
        edit_table(path, lambda row: row["observation.state"].__setitem__(1, 1000.1))
    (states,) = standardised_states([dataset[0]], ["observation.state"])
    pooled = torch.cat(list(states.values()))
    assert pooled.dtype == torch.float32
    assert pooled[:, 1].abs().max() < 1e-3
    torch.testing.assert_close(pooled[:, 0].std(correction=0), torch.tensor(1.0))


def test_non_finite_states_raise(dataset, tmp_path):
    path = tmp_path / "set/data/chunk-000/file-000.parquet"
    edit_table(path, lambda row: row["observation.state"].__setitem__(0, [1.0, float("nan")][row["index"] == 13]))
    with pytest.raises(
        ValueError, match=r"episode 1 of .*'observation.state' must be finite in float32, got \[nan, .* at frame 8"
    ):
        standardised_states([dataset[0]], ["observation.state"])


@pytest.mark.parametrize(
    ("keys", "angles", "message"),
    [
        (["observation.pose"], [], r"`keys` \(--state_keys\) must be among .*, got 'observation.pose'"),
        (["action"], ["yaw"], r"`angles` \(--state_angles\) must be among .*, got \['yaw'\]"),
    ],
)
def test_unknown_states_raise(dataset, keys, angles, message):
    with pytest.raises(ValueError, match=message):
        standardised_states([dataset[0]], keys, angles)


def test_states_of_different_widths_raise():
    """The action space is not inferred from such episodes; the error is raised when the states are read."""

    def table(*widths):
        rows = [[[float(frame)] * width for frame in range(4)] for width in widths]
        columns = {"pictures": [[PIL.Image.new("RGB", (8, 8))] * 4] * len(rows), "actions": rows, "state": rows}
        numbers = datasets.List(datasets.List(datasets.Value("float32")))
        features = datasets.Features(pictures=datasets.List(datasets.Image()), actions=numbers, state=numbers)
        dataset = datasets.Dataset.from_dict(columns, features=features)
        return TableEpisodes(dataset, "pictures", state_columns=["state"])

    message = "states must have 2 components, as in episode 0 of .*, got 1 in episode 1: remove the episode"
    with pytest.raises(ValueError, match=message):
        standardised_states([table(2, 1)], ["state"], ["state.1"])
    message = "states must have the same number of components in all datasets, got 2 in .*, 1 in "
    with pytest.raises(ValueError, match=message):
        standardised_states([table(2), table(1)], ["state"])
    assert infer_action_space(table(2, 2)) == "absolute"
    assert infer_action_space(table(2, 1)) is None
