"""Reading of every dataset format, broken episodes, and mixtures of datasets."""

import io
import json
import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from test_lerobot import CAMERA, edit_table, make_episode, write_folder
from test_release import write_release
from test_tables import make_table
from tiny_models import tiny_vae

from irasim_diffusers.actions import integrate_actions
from irasim_diffusers.data import (
    IRASimFolder,
    LatentClips,
    LeRobotFolder,
    MixedClips,
    PreparedEpisodes,
    TableEpisodes,
    action_normalisation,
    cache_latents,
    check_mixture,
    first_readable,
    open_dataset,
    read_frames,
    standardised_states,
    write_video,
)

SHARED = Path(os.environ.get("IRASIM_TEST_DATA", "/nonexistent"))
needs_clips = pytest.mark.skipif(not SHARED.is_dir(), reason="IRASIM_TEST_DATA is not a folder of robot clips")


def write_v21(root, episodes, cameras=("left", "right")):
    """Write a LeRobotDataset v2.1, with separate files per episode; camera 2 is the negative of camera 1."""
    vector = {"dtype": "float32", "shape": [3], "names": {"motors": ["x", "y", "grip"]}}
    info = {
        "codebase_version": "v2.1",
        "fps": 10,
        "chunks_size": 2,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": {key: {"dtype": "video", "shape": [10, 14, 3]} for key in cameras} | {"action": vector},
    }
    (root / "meta").mkdir(parents=True)
    (root / "meta" / "info.json").write_text(json.dumps(info))
    rows = [
        {"episode_index": number, "tasks": [episode.task], "length": len(episode)}
        for number, episode in enumerate(episodes)
    ]
    (root / "meta" / "episodes.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    for number, episode in enumerate(episodes):
        place = {"episode_chunk": number // 2, "episode_index": number}
        path = root / info["data_path"].format(**place)
        path.parent.mkdir(parents=True, exist_ok=True)
        table = {"action": list(episode.actions), "episode_index": [number] * len(episode)}
        pq.write_table(pa.table(table), path)
        for camera, frames in zip(cameras, (episode.frames, 255 - episode.frames), strict=True):
            write_video(root / info["video_path"].format(video_key=camera, **place), frames, 10, lossless=True)


def test_version_2_1_with_two_cameras(tmp_path):
    episodes = [make_episode(number, length) for number, length in enumerate((5, 9, 7))]
    write_v21(tmp_path, episodes)
    stacked = open_dataset(tmp_path, ["left", "right"])
    beside = open_dataset(tmp_path, ["right,left"])
    assert stacked.cameras == (("left",), ("right",))
    assert beside.cameras == (("right", "left"),)
    assert stacked.component_names("action") == ["x", "y", "grip"]
    for number, episode in enumerate(episodes):
        negative = 255 - episode.frames
        assert np.array_equal(stacked[number].frames, np.concatenate([episode.frames, negative], axis=1))
        assert np.array_equal(beside[number].frames, np.concatenate([negative, episode.frames], axis=2))
        assert np.array_equal(stacked[number].actions, episode.actions)
        assert stacked[number].task == episode.task
    with pytest.raises(ValueError, match=r"`cameras` must name one or more of \['left', 'right'\]"):
        open_dataset(tmp_path)


def test_videos_of_version_2_1_that_do_not_match_vectors_raise(tmp_path):
    episodes = [make_episode(number, length) for number, length in enumerate((5, 9, 7))]
    write_v21(tmp_path, episodes)
    video = tmp_path / "videos/chunk-000/left/episode_000001.mp4"
    longer = np.concatenate([episodes[1].frames, episodes[1].frames[:1]])
    write_video(video, longer, 10, lossless=True)
    with pytest.raises(ValueError, match=r"episode 1 of .*left/episode_000001\.mp4' continues after the 9 frames"):
        open_dataset(tmp_path, "left")[1]
    video.unlink()
    with pytest.raises(ValueError, match=r"episode 1 of .*left/episode_000001\.mp4"):
        open_dataset(tmp_path, "left")[1]
    assert np.array_equal(open_dataset(tmp_path, "right")[1].frames, 255 - episodes[1].frames)


def put_pictures_into_parquet(root, camera, files):
    """Move the frames of a camera from videos into the given Parquet files."""
    info = json.loads((root / "meta" / "info.json").read_text())
    info["features"][camera]["dtype"] = "image"
    (root / "meta" / "info.json").write_text(json.dumps(info | {"video_path": None}))
    (root / "videos").rename(root / "gone")

    def encoded(frame):
        file = io.BytesIO()
        PIL.Image.fromarray(frame).save(file, "png")
        return {"bytes": file.getvalue(), "path": "frame.png"}

    for name, part in files.items():
        pictures = [encoded(frame) for episode in part for frame in episode.frames]
        pq.write_table(pq.read_table(root / name).append_column(camera, [pictures]), root / name)


def test_pictures_inside_parquet(tmp_path):
    written = write_folder(tmp_path)
    names = [f"data/chunk-000/file-00{number}.parquet" for number in range(2)]
    put_pictures_into_parquet(tmp_path, CAMERA, {names[0]: written[:2], names[1]: written[2:]})
    for before, after in zip(written, open_dataset(tmp_path), strict=True):
        assert np.array_equal(after.frames, before.frames)

    def lose_picture(row):
        row[CAMERA] = None if row["index"] == 9 else row[CAMERA]

    edit_table(tmp_path / names[0], lose_picture)
    assert len(open_dataset(tmp_path)[0]) == 5
    with pytest.raises(ValueError, match=rf"episode 1 of .*file-000\.parquet' has no image '{CAMERA}' at frame 4"):
        open_dataset(tmp_path)[1]
    pq.write_table(pq.read_table(tmp_path / names[1]).drop_columns([CAMERA]), tmp_path / names[1])
    with pytest.raises(ValueError, match=r"episode 2 of .*file-001\.parquet' has no column '.*image"):
        open_dataset(tmp_path)[2]


def test_pictures_inside_parquet_of_version_2_1(tmp_path):
    episodes = [make_episode(number, length) for number, length in enumerate((5, 9, 7))]
    write_v21(tmp_path, episodes)
    names = [f"data/chunk-00{number // 2}/episode_00000{number}.parquet" for number in range(3)]
    put_pictures_into_parquet(tmp_path, "left", {name: [part] for name, part in zip(names, episodes, strict=True)})
    for before, after in zip(episodes, open_dataset(tmp_path, "left"), strict=True):
        assert np.array_equal(after.frames, before.frames)
        assert np.array_equal(after.actions, before.actions)


@pytest.mark.parametrize("codec", ["libsvtav1", "libx264"])
def test_part_of_a_video_matches_the_whole(codec, tmp_path):
    ramp = np.arange(40, dtype=np.uint8)[:, None, None, None] * 6 + np.zeros((40, 64, 64, 3), dtype=np.uint8)
    with av.open(str(tmp_path / "clip.mp4"), mode="w") as container:
        stream = container.add_stream(codec, rate=30, options={"g": "16", "crf": "20"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for frame in ramp:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    for start, count in ((0, 3), (15, 2), (16, 5), (37, 3)):
        frames = read_frames(tmp_path / "clip.mp4", start, count, 30)
        assert np.abs(frames.astype(int) - ramp[start : start + count]).max() <= 4
    with pytest.raises(ValueError, match=r"clip.mp4' ends early: 5 frames required from index 37, 3 found"):
        read_frames(tmp_path / "clip.mp4", 37, 5, 30)


def test_first_readable_episode_is_searched_among_the_first(tmp_path):
    write_release(tmp_path, "rt1")
    broken = [tmp_path / "annotation/train" / f"{number}.json" for number in (0, 1)]
    broken[0].write_text("{")
    broken[1].write_text("[]")
    data = open_dataset(tmp_path)
    assert len(first_readable(data, data.__getitem__)) == 6
    with pytest.raises(
        ValueError, match=r"none of the first 2 episodes .*0\.json'.* (is not valid JSON|is not JSON in UTF-8)"
    ):
        first_readable(data, data.vectors, attempts=2)
    for number in range(25):
        (tmp_path / "annotation/train" / f"{number}.json").write_text("{")
    with pytest.raises(
        ValueError, match=r"none of the first 20 episodes .*0\.json'.* (is not valid JSON|is not JSON in UTF-8)"
    ):
        open_dataset(tmp_path)


def sources_of_every_form(folder, form):
    """Write a dataset of the given format with two or three short episodes; return its source."""
    episodes = [make_episode(number, length) for number, length in enumerate((5, 9, 7))]
    if form == "v3.0":
        write_folder(folder)
        return LeRobotFolder(folder)
    if form == "v2.1":
        write_v21(folder, episodes)
        return LeRobotFolder(folder, ["left", "right"])
    if form == "pictures":
        write_v21(folder, episodes)
        names = [f"data/chunk-00{number // 2}/episode_00000{number}.parquet" for number in range(3)]
        put_pictures_into_parquet(folder, "left", {name: [part] for name, part in zip(names, episodes, strict=True)})
        return LeRobotFolder(folder, "left")
    if form == "release":
        write_release(folder, "droid", length=9)
        return IRASimFolder(folder, cameras=["0,1"], fps=5)
    folder.mkdir()
    table = make_table(folder, episodes)
    if form == "stream":
        return TableEpisodes(table.to_iterable_dataset(), "video", length=3, origin="here")
    return TableEpisodes(table, form.split()[1], state_columns=["state"])


@pytest.mark.parametrize("form", ["v3.0", "v2.1", "pictures", "release", "table video", "table pictures", "stream"])
def test_windows_match_the_whole_episode(form, tmp_path):
    source = sources_of_every_form(tmp_path / "set", form)
    resized = PreparedEpisodes(source, frame_size=(20, 28))
    skipping = PreparedEpisodes(source, frame_skip=2, composition="absolute")
    dense = PreparedEpisodes(source, frame_skip=2, composition="absolute", all_phases=True)
    for data in (source, resized, skipping, dense):
        for number in range(len(data)):
            whole = data[number]
            assert {key: len(value) for key, value in data.vectors(number).items()} == dict.fromkeys(
                ["action", *whole.states], len(whole)
            )
            for start in range(len(whole)):
                length = min(3, len(whole) - start)
                part, window = slice(start, start + length), data.window(number, start, length)
                assert np.array_equal(window.frames, whole.frames[part]), (number, start)
                assert np.array_equal(window.actions, whole.actions[part])
                assert window.task == whole.task
                assert window.states.keys() == whole.states.keys()
                assert all(np.array_equal(window.states[key], whole.states[key][part]) for key in whole.states)
    for start, length in ((-1, 2), (0, 0), (4, 50), (99, 1)):
        with pytest.raises(ValueError, match=rf"a window must be within .* `start` {start}, `length` {length}"):
            source.window(0, start, length)
        with pytest.raises(ValueError, match="a window must be within"):
            skipping.window(0, start, length)


def test_a_broken_link_is_not_suggested_for_itself(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ValueError, match=r"got '.*loop', which is not a folder\.$"):
        open_dataset(tmp_path / "loop")


def test_a_mistyped_folder_is_named(tmp_path, monkeypatch):
    (tmp_path / "data" / "pusht-train").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"which is not a folder \(did you mean '.*data/pusht-train'\?\)"):
        open_dataset(tmp_path / "data" / "pusht-trian")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"which is not a folder \(did you mean 'data/pusht-train'\?\), on the Hub"):
        open_dataset("data/pusht-trian")


def test_unknown_split_and_folder(tmp_path):
    write_release(tmp_path, "rt1")
    with pytest.raises(ValueError, match=r"`split` must be one of \['train'\] in .* got 'test'"):
        open_dataset(tmp_path, split="test")
    with pytest.raises(ValueError, match="contains no supported dataset"):
        open_dataset(tmp_path / "videos")
    with pytest.raises(ValueError, match="which is not a folder"):
        open_dataset(tmp_path / "nowhere")


@pytest.fixture
def mixture(tmp_path):
    """Datasets at 10 frames/s with one camera: three action components, and two padded to three."""
    write_folder(tmp_path / "lerobot")
    write_release(tmp_path / "planar", "planar")
    padded = PreparedEpisodes(open_dataset(tmp_path / "planar", fps=10), action_dim=3)
    return LeRobotFolder(tmp_path / "lerobot"), padded


def test_matching_data_sets_can_be_mixed(mixture):
    check_mixture(mixture)
    check_mixture(mixture[:1])


def test_different_data_sets_cannot_be_mixed(mixture, tmp_path):
    lerobot, _ = mixture
    write_v21(tmp_path / "two", [make_episode(0, 5)])
    write_folder(tmp_path / "renamed")
    info = json.loads((tmp_path / "renamed/meta/info.json").read_text())
    info["features"]["action"]["names"] = ["x", "z", "grip"]
    (tmp_path / "renamed/meta/info.json").write_text(json.dumps(info))
    left, right = (open_dataset(tmp_path / "two", cameras) for cameras in (["left,right"], ["right,left"]))
    for sources, message in [
        ([lerobot, lerobot, PreparedEpisodes(lerobot, "absolute", frame_skip=2)], "frames per second are 10 and 5"),
        ([left, right], r"cameras are \(\('left', 'right'\),\) and \(\('right', 'left'\),\)"),
        ([lerobot, left], "cameras are single and"),
        ([lerobot, LeRobotFolder(tmp_path / "renamed")], r"action components are \['x', 'y', 'grip'\] and \['x', 'z'"),
        ([lerobot, PreparedEpisodes(lerobot, composition="absolute")], "action derivations are recorded and absolute"),
    ]:
        with pytest.raises(ValueError, match=rf"{tmp_path}.* and .*{tmp_path}.* cannot be mixed: their {message}"):
            check_mixture(sources)


def break_action(root, episode):
    """Set the second action of an episode in the first file of `write_folder` to NaN."""
    path = root / "data" / "chunk-000" / "file-000.parquet"
    table = pq.read_table(path)
    actions = table["action"].to_pylist()
    actions[table["episode_index"].to_pylist().index(episode) + 1] = [float("nan")] * 3
    column = pa.FixedSizeListArray.from_arrays(pa.array(np.ravel(actions).astype(np.float32)), 3)
    pq.write_table(table.set_column(table.column_names.index("action"), "action", column), path)


def test_broken_episodes_are_skipped_and_listed(tmp_path):
    write_folder(tmp_path / "set")
    break_action(tmp_path / "set", 1)
    data = LeRobotFolder(tmp_path / "set")
    with pytest.raises(ValueError, match=r"episode 1 of .* 'action' must be finite in float32, got .* at frame 1"):
        cache_latents(data, tiny_vae(), tmp_path / "cache")
    folder = cache_latents(data, tiny_vae(), tmp_path / "cache", skip_broken=True)
    assert list(json.loads((folder / "manifest.json").read_text())["broken"]) == ["1"]
    clips = LatentClips(folder, 5)
    assert {number for number, _ in clips.windows} == {0, 2}
    derived = PreparedEpisodes(data, "absolute", "observation.state")  # works, although an episode is broken
    assert derived.vectors(0)["action"].shape == (5, 2)
    (states,) = standardised_states([data], ["observation.state"], numbers=[clips.episodes])
    assert set(states) == {0, 2}
    with pytest.raises(ValueError, match=r"1 episodes were skipped as broken, the first: episode 1 of"):
        cache_latents(data, tiny_vae(), tmp_path / "cache")


def test_every_kind_of_broken_episode_raises_or_is_skipped(tmp_path):
    root = tmp_path / "set"
    episodes = [make_episode(number, length) for number, length in enumerate((9, 8, 7, 9, 8, 3))]
    write_v21(root, episodes)
    (root / "videos/chunk-000/right/episode_000001.mp4").unlink()  # a missing camera
    truncated = root / "videos/chunk-001/left/episode_000002.mp4"
    truncated.write_bytes(truncated.read_bytes()[:-200])
    table = root / "data/chunk-001/episode_000003.parquet"
    pq.write_table(pq.read_table(table).slice(0, 8), table)  # fewer actions than frames

    def lose(row):
        row["action"] = [1.0, float("nan"), 2.0]

    edit_table(root / "data/chunk-002/episode_000004.parquet", lose)
    messages = {
        1: r"episode 1 of .*right/episode_000001\.mp4",
        2: r"episode 2 of .*cannot read .*left/episode_000002\.mp4",
        3: r"episode 3 of .* expected 9 frames, found 8 rows in .*episode_000003\.parquet",
        4: r"episode 4 of .* 'action' must be finite in float32, got \[1\.0, nan, 2\.0\]",
    }
    data = LeRobotFolder(root, ["left", "right"])
    for number, message in messages.items():
        for read in (lambda number: data[number], lambda number: data.window(number, 1, 2)):
            with pytest.raises(ValueError, match=message):
                read(number)
    with pytest.raises(ValueError, match=messages[1]):
        cache_latents(data, tiny_vae(), tmp_path / "cache")
    folder = cache_latents(data, tiny_vae(), tmp_path / "cache", skip_broken=True)
    broken = json.loads((folder / "manifest.json").read_text())["broken"]
    assert list(broken) == [str(number) for number in messages]
    for number, message in messages.items():
        assert re.search(message, broken[str(number)])
    with pytest.raises(
        ValueError,
        match=r"at least as long as a window of 5 frames, but 1 of \d are shorter, .* episode 5 with 3 frames",
    ):
        LatentClips(folder, 5)
    clips = LatentClips(folder, 5, skip_short=True)
    assert (list(clips.episodes), clips.short) == ([0], [5])


def test_no_readable_episode_raises(tmp_path):
    write_folder(tmp_path / "set")
    for episode in (0, 1):
        break_action(tmp_path / "set", episode)
    with pytest.raises(ValueError, match=r"no episode can be read: episode 0 of"):
        cache_latents(
            LeRobotFolder(tmp_path / "set", max_episodes=2), tiny_vae(), tmp_path / "cache", skip_broken=True
        )


def test_each_process_encodes_its_share(tmp_path):
    write_folder(tmp_path / "set")
    data, vae = LeRobotFolder(tmp_path / "set"), tiny_vae()
    encoded: list[int] = []
    vae.encoder.register_forward_hook(lambda _, inputs, __: encoded.append(len(inputs[0])))
    alone = LatentClips(cache_latents(data, vae, tmp_path / "alone", episodes_per_file=1), 5)
    assert sum(encoded) == 21
    encoded.clear()
    barrier = threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        folders = list(
            pool.map(
                lambda index: cache_latents(
                    *(data, vae, tmp_path / "together"),
                    episodes_per_file=1,
                    process_index=index,
                    num_processes=2,
                    wait_for_everyone=barrier.wait,
                ),
                range(2),
            )
        )
    assert folders[0] == folders[1]
    assert sum(encoded) == 21, "no episode was encoded twice"
    together = LatentClips(folders[0], 5)
    assert list(together.windows) == list(alone.windows)
    assert all(torch.equal(together[index]["latents"], alone[index]["latents"]) for index in range(len(alone)))


class Windows:
    """Dataset of windows whose actions are the index of the window plus `first`."""

    def __init__(self, first, size, width=2):
        self.first, self.size, self.width = first, size, width

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return {"actions": torch.full((self.width,), self.first + range(self.size)[index])}


def test_data_sets_are_mixed_by_weight():
    def drawn(mixed):
        return [int(mixed[index]["actions"][0]) for index in range(len(mixed))]

    mixed = MixedClips([Windows(0, 30), Windows(100, 10)], [1, 3])
    first = drawn(mixed)
    assert (len(first), sum(number >= 100 for number in first)) == (40, 30)
    assert {number for number in first if number >= 100} == set(range(100, 110))
    mixed.set_epoch(1)
    second = drawn(mixed)
    assert {number for number in first if number < 100} != {number for number in second if number < 100}
    mixed.set_epoch(0)
    assert drawn(mixed) == first
    assert sorted(drawn(MixedClips([Windows(0, 30), Windows(100, 10)]))) == [*range(30), *range(100, 110)]
    with pytest.raises(ValueError, match="`weights` must be 2 positive finite numbers"):
        MixedClips([Windows(0, 3), Windows(5, 1)], [1, 0])
    with pytest.raises(ValueError, match="`clips` must have windows of the same shapes"):
        MixedClips([Windows(0, 3), Windows(5, 1, width=7)])


def test_normalization_of_actions():
    actions = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([2.0, 0.01, 0.0]) + 5
    offset, scale = (torch.tensor(values) for values in action_normalisation(actions))
    seen = (actions - offset) * scale
    torch.testing.assert_close(seen.mean(0), torch.zeros(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(seen[:, :2].std(0, correction=0), torch.ones(2), atol=1e-3, rtol=0)
    assert scale[2] == 1
    offset, scale = (torch.tensor(values) for values in action_normalisation(actions, "quantile"))
    inside = (((actions - offset) * scale)[:, :2].abs() <= 1).float().mean(0)
    torch.testing.assert_close(inside, torch.full((2,), 0.98), atol=0.005, rtol=0)
    with pytest.raises(ValueError, match=r"`kind` \(--action_normalisation\) must be std or quantile"):
        action_normalisation(actions, "max")


def test_frames_are_resized(tmp_path):
    frames, *_ = write_release(tmp_path, "planar")
    resized = PreparedEpisodes(open_dataset(tmp_path), frame_size=(20, 28))[0].frames
    assert resized.shape == (6, 20, 28, 3)
    assert abs(resized.mean() - frames.mean()) < 2


def test_frames_at_another_rate_raise(tmp_path):
    write_video(tmp_path / "clip.mp4", np.zeros((8, 16, 16, 3), np.uint8), 20)
    with pytest.raises(ValueError, match=r"has no frame 2 at 10 frames/s"):
        read_frames(tmp_path / "clip.mp4", 0, 4, 10)


@needs_clips
def test_real_droid_clips():
    one, three = (open_dataset(SHARED / "droid", cameras, fps=5) for cameras in ("0", ["0", "1", "2"]))
    assert (len(one), len(open_dataset(SHARED / "droid", "0", split="val"))) == (7, 4)
    episode = three[0]
    assert episode.frames.shape[1:] == (576, 320, 3)
    assert np.array_equal(episode.frames[:, :192], one[0].frames)
    assert episode.actions.shape == (len(episode), 7)
    assert np.abs(episode.actions[:, :3]).max() < 0.3  # meters per step of 0.2 s
    back = integrate_actions(episode.states["state"][0], episode.actions[:-1], "relative_euler")
    np.testing.assert_allclose(back[:, :3], episode.states["state"][:, :3], atol=1e-4)


@needs_clips
def test_real_language_table_clip_and_its_latents():
    data = open_dataset(SHARED / "language_table", split="test", fps=10)
    episode = data[0]
    assert (len(episode), episode.actions.shape) == (18, (18, 2))
    latents = data.latents(0)
    assert latents.shape == (18, 4, 36, 64)
    assert 0.5 < latents.std() < 1.5  # recorded latents are already scaled
    assert torch.isfinite(latents).all()
