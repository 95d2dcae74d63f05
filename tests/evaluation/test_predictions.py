"""World models as predictors, and files of saved predictions."""

import zipfile

import numpy as np
import pytest
import torch
from convolutional import ConvolutionalModel
from diffusers import DDIMScheduler
from test_protocols import clip_data
from tiny_models import tiny_pipeline

from irasim_diffusers import IRASimPipeline
from irasim_diffusers.evaluation import Clip, ClipData, FolderPredictor, PipelinePredictor, WorldModelPredictor
from irasim_diffusers.models import noise_process


def test_convolutional_baseline_is_a_world_model(tmp_path):
    """Frames from `start`, `advance` and `decode` match those of the pipeline's call."""
    torch.manual_seed(0)
    network = ConvolutionalModel(channels=8).eval()
    torch.nn.init.normal_(network.out.weight, std=0.02)
    scheduler = DDIMScheduler.from_config(noise_process(network.config).config, timestep_spacing="trailing")
    baseline = IRASimPipeline(None, network, scheduler, num_inference_steps=1)
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (2, 17, 96, 96, 3), dtype=np.uint8)
    actions = rng.uniform(0, 512, (2, 15, 2)).astype(np.float32)
    clips = [ClipData(Clip(f"{k}", k, 0, 2, 15), k, frames[k], actions[k], actions[k, 0]) for k in range(2)]
    predictor = WorldModelPredictor(baseline)
    expected = baseline(frames[:, :2], actions, output_type="np").frames
    for found, prediction in zip(predictor.predict(clips), expected, strict=True):
        assert (found.latents, found.network_evaluations) == (None, None)
        assert abs(found.frames.astype(int) - np.rint(prediction * 255)).max() <= 1
    futures = predictor.futures(clips[0], actions)
    np.testing.assert_allclose(futures[0].permute(0, 2, 3, 1), expected[0], atol=1e-5)
    assert np.array_equal(predictor.hold(clips[1]), actions[1, 0])
    small = ClipData(clips[0].clip, 0, frames[0, :, :48, :48], actions[0], actions[0, 0])
    with pytest.raises(ValueError, match=r"frames must be 96x96 .* got 48x48: pass resize=True"):
        predictor.predict([small])
    (resized,) = WorldModelPredictor(baseline, resize=True).predict([small])
    assert resized.frames.shape == (15, 48, 48, 3)


@pytest.mark.parametrize("length", [4, 7])
def test_pipeline_rollout_matches_pipeline_call(length):
    """The last chunk is shorter than the others."""
    pipeline = tiny_pipeline(num_inference_steps=2)
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (length + 2, 8, 12, 3), dtype=np.uint8)
    actions = rng.normal(size=(length, 3))
    data = ClipData(Clip("a", 0, 0, 2, length), 3, frames, actions, actions[0])
    (found,) = PipelinePredictor(pipeline, seed=5).predict([data])
    generator = [torch.Generator().manual_seed(8)]
    latents = pipeline(frames[:2], actions, generator=generator, output_type="latent").frames
    torch.testing.assert_close(found.latents, latents[0])
    assert found.network_evaluations == 3  # PNDM repeats one of the two steps


def write_npz(path, **members):
    """Write an npz file of array headers (shape, type), each followed by a given number of zero bytes."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, (shape, kind, size) in members.items():
            with file.open(f"{name}.npy", "w", force_zip64=True) as member:
                header = {"descr": kind, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(member, header)
                member.write(bytes(size))


FRAMES = ((15, 8, 12, 3), "|u1", 15 * 8 * 12 * 3)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            {"frames": ((10**12, 8, 12, 3), "|u1", 0)},
            r"must contain the 15 predicted frames .* got \(1000000000000, 8",
        ),
        ({"frames": ((15, 10**6, 10**6, 3), "|u1", 0)}, r"must contain the 15 predicted frames .* got \(15, 1000000"),
        ({"frames": ((15, 0, 12, 3), "|u1", 0)}, r"got \(15, 0, 12, 3\), uint8; sides must have 1 to \d+ pixels"),
        ({"frames": ((15, 8, 12, 3), "|O", 9)}, "must contain the 15 predicted frames .* got .*object"),
        ({"frames": ((15, 8, 12, 3), "|u1", 9)}, "must be an npz file with undamaged arrays"),
        ({"frames": FRAMES, "latents": ((4, 15, 10**6, 10**6), "<f4", 0)}, "`latents` in .* must be floating-point"),
        ({"frames": FRAMES, "latents": ((4, 15, 4, 6), "<c8", 8)}, "`latents` in .* must be floating-point"),
        ({"frames": FRAMES, "autoencoder": ((10**9,), "<U16", 0)}, "`autoencoder` in .* must be text"),
    ],
)
def test_headers_of_predictions_are_checked_before_the_values(tmp_path, members, message):
    """A file of a few kilobytes must not allocate terabytes."""
    write_npz(tmp_path / "a.npz", **members)
    data = clip_data((8, 12))
    with pytest.raises(ValueError, match=message):
        FolderPredictor(tmp_path, resize=True).predict([data])


def test_latents_must_be_finite(tmp_path):
    data = clip_data((8, 12))
    np.savez(tmp_path / "a.npz", frames=data.truth, latents=np.full((4, 15, 4, 6), np.nan, np.float32))
    with pytest.raises(ValueError, match=r"`latents` in .*a.npz' must be finite, got NaN"):
        FolderPredictor(tmp_path).predict([data])
