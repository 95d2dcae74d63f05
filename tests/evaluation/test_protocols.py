"""Clips and scores of the evaluation protocols."""

import numpy as np
import pytest
import torch

from irasim_diffusers.evaluation import (
    PROTOCOLS,
    Backbones,
    Clip,
    ClipData,
    EvaluationProtocol,
    Prediction,
    features_of_clip,
    find_clips,
    published_figures,
    score_clip,
)
from irasim_diffusers.evaluation.scores import through_mp4
from irasim_diffusers.metrics import frame_psnr, gray


def clip_data(size=(16, 32), length=15):
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (length + 1, size[0] // 4, size[1] // 4, 3), dtype=np.uint8)
    frames = coarse.repeat(4, axis=1).repeat(4, axis=2)
    return ClipData(Clip("a", 0, 0, 1, length), 0, frames, np.zeros((length, 3)), np.zeros(3))


def test_release_protocol_scores_gray_frames_after_mp4():
    data = clip_data()
    prediction = np.clip(data.truth.astype(int) + 20, 0, 255).astype(np.uint8)
    for attempt in range(5):  # x264 is not deterministic
        found = score_clip(data, Prediction(prediction), PROTOCOLS["irasim-short-release"])
        pair = [gray(through_mp4(data.history, video)) / 255 for video in (prediction, data.truth)]
        assert pair[0].shape == (15, 16, 32, 1)
        if attempt == 4 or np.allclose(found["psnr"], frame_psnr(*pair)):
            break
    np.testing.assert_allclose(found["psnr"], frame_psnr(*pair))
    plain = score_clip(data, Prediction(prediction), PROTOCOLS["irasim-short"])
    assert not np.allclose(found["psnr"], plain["psnr"], atol=0.05)
    assert found["clip_psnr"] == plain["clip_psnr"]
    with pytest.raises(ValueError, match="sides divisible by 16 for irasim-short-release, got 16x24"):
        score_clip(clip_data((16, 24)), Prediction(prediction[:, :, :24]), PROTOCOLS["irasim-short-release"])


def test_predictions_without_latents_are_encoded():
    data = clip_data()

    def encode(frames):
        return torch.from_numpy(frames.copy()).permute(3, 0, 1, 2) / 255

    def network(prediction, truth):
        return (prediction - truth).square().mean(dim=(1, 2, 3), keepdim=True)

    found = score_clip(data, Prediction(data.truth[::-1]), PROTOCOLS["irasim-short"], encode, Backbones(lpips=network))
    error = np.square((data.truth[::-1].astype(float) - data.truth) / 255)
    assert found["latent_l2"] == pytest.approx(error.mean(), rel=1e-5)
    np.testing.assert_allclose(found["lpips"], 4 * error.mean(axis=(1, 2, 3)), rtol=1e-5)


def test_release_protocol_mirrors_true_videos_only():
    data, video = clip_data(), clip_data().truth[::-1]
    backbones = Backbones(
        inception=lambda frames: frames.mean(axis=(1, 2)), i3d=lambda frames: frames.mean(axis=(0, 1, 3))
    )
    plain = features_of_clip(data, Prediction(video), PROTOCOLS["irasim-short"], backbones)
    assert {name: value.shape for name, value in plain.items()} == {
        "fid_prediction": (15, 3),
        "fid_truth": (15, 3),
        "fvd_prediction": (1, 32),
        "fvd_truth": (1, 32),
    }
    released = features_of_clip(data, Prediction(video), PROTOCOLS["irasim-short-release"], backbones)
    assert np.array_equal(released["fvd_truth"], [plain["fvd_truth"][0], plain["fvd_truth"][0, ::-1]])
    assert np.array_equal(released["fvd_prediction"], plain["fvd_prediction"])


class Lengths:
    name, fps = "lengths", None

    def __init__(self, *lengths):
        self.lengths = lengths

    def __len__(self):
        return len(self.lengths)

    def vectors(self, number):
        return {"action": np.zeros((self.lengths[number], 2))}


class Damaged(Lengths):
    def vectors(self, number):
        raise ValueError("the file is damaged")


def starts(clips):
    return [(clip.episode, clip.start, clip.history, clip.predicted) for clip in clips]


def test_clips_of_each_protocol():
    dataset = Lengths(33, 15, 1, 24)
    assert starts(find_clips(dataset, PROTOCOLS["irasim-short"])) == [(0, 0, 1, 15), (0, 16, 1, 15), (3, 0, 1, 15)]
    assert starts(find_clips(dataset, PROTOCOLS["irasim-long"])) == [(0, 0, 1, 32), (1, 0, 1, 14), (3, 0, 1, 23)]
    robonet = [(0, 0, 2, 10), (0, 12, 2, 10), (1, 0, 2, 10), (3, 0, 2, 10), (3, 12, 2, 10)]
    assert starts(find_clips(dataset, PROTOCOLS["robonet"])) == robonet
    assert starts(find_clips(dataset, PROTOCOLS["robonet"], 3)) == robonet[::2]
    with pytest.raises(
        ValueError, match=r"no episode of 'lengths' is as long as a clip of irasim-short \(1 history frame"
    ):
        find_clips(Lengths(15, 3), PROTOCOLS["irasim-short"])
    with pytest.raises(ValueError, match="no episode of 'lengths' can be read: the file is damaged"):
        find_clips(Damaged(33, 33), PROTOCOLS["irasim-short"], broken={})
    with pytest.raises(ValueError, match="`num_clips` must be at least 1, got 0"):
        find_clips(dataset, PROTOCOLS["irasim-short"], 0)


def test_published_figures():
    assert published_figures(PROTOCOLS["irasim-short"], "bridge")["IRASim Frame-Ada"]["fvd"] == 20.91
    assert published_figures(PROTOCOLS["irasim-long"], "rt1")["LVDM"] == {"latent_l2": 0.2567, "psnr": 23.573}
    with pytest.raises(ValueError, match=r"`published` must be one of \['robonet'\] for the protocol robonet"):
        published_figures(PROTOCOLS["robonet"], "rt1")
    with pytest.raises(ValueError, match="`published` must be omitted for the protocol own, got 'rt1'"):
        published_figures(EvaluationProtocol("own", "own clips"), "rt1")
