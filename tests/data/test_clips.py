import numpy as np
import pytest
import torch
from conftest import tiny_vae
from test_lerobot import write_folder

from irasim_diffusers.data import LatentClips, LeRobotFolder, cache_latents, standardised_states


@pytest.fixture
def dataset(tmp_path):
    episodes = write_folder(tmp_path / "set", lengths=(5, 9, 7))
    return LeRobotFolder(tmp_path / "set"), episodes


def encode(vae, episode):
    pixels = torch.from_numpy(episode.frames).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        return vae.encode(pixels).latent_dist.mode()


def test_windows_hold_the_latents_and_the_actions_between_their_frames(dataset, tmp_path):
    folder, episodes = dataset
    vae = tiny_vae()
    clips = LatentClips(cache_latents(folder, vae, tmp_path / "cache"), sample_frames=6)
    assert clips.windows == [(1, 0), (1, 1), (1, 2), (1, 3), (2, 0), (2, 1)]
    item = clips[2]
    expected = encode(vae, episodes[1])[2:8].transpose(0, 1)
    torch.testing.assert_close(item["latents"], expected, rtol=2e-3, atol=2e-3)
    assert torch.equal(item["actions"], torch.from_numpy(episodes[1].actions[2:7]))
    assert len(LatentClips(cache_latents(folder, vae, tmp_path / "cache"), sample_frames=4, stride=3)) == 1 + 2 + 2


def test_latents_are_encoded_once_for_a_data_set_and_autoencoder(dataset, tmp_path):
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


def test_incomplete_and_short_sets_are_refused(dataset, tmp_path):
    folder, _ = dataset
    cache = cache_latents(folder, tiny_vae(), tmp_path / "cache")
    with pytest.raises(ValueError, match=r"no episode .* as long as a window of 10 frames"):
        LatentClips(cache, sample_frames=10)
    (cache / "manifest.json").unlink()
    with pytest.raises(ValueError, match="no complete set of latents"):
        LatentClips(cache)


def test_states_go_with_their_windows(dataset, tmp_path):
    folder, episodes = dataset
    (states,) = standardised_states([folder], ["observation.state"], angles=["b"])
    pooled = torch.cat(list(states.values()))
    torch.testing.assert_close(pooled.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(pooled.std(0, correction=0), torch.ones(3))
    raw = np.concatenate([episode.states["observation.state"] for episode in episodes])
    for column, expected in enumerate((raw[:, 0], np.cos(raw[:, 1]), np.sin(raw[:, 1]))):
        assert np.corrcoef(pooled[:, column], expected)[0, 1] > 0.9999
    clips = LatentClips(cache_latents(folder, tiny_vae(), tmp_path / "cache"), sample_frames=6, states=states)
    assert torch.equal(clips[5]["states"], states[2][1:7])


@pytest.mark.parametrize(
    ("keys", "angles", "message"),
    [
        (["observation.pose"], [], "no vector feature 'observation.pose'"),
        (["action"], ["yaw"], r"no components \['yaw'\]"),
    ],
)
def test_unknown_states_are_refused(dataset, keys, angles, message):
    with pytest.raises(ValueError, match=message):
        standardised_states([dataset[0]], keys, angles)
