"""The pipeline with the baselines' U-Net instead of the transformer."""

import numpy as np
import pytest
import torch
from diffusers import AutoModel, DDIMScheduler
from tiny_models import tiny_unet, tiny_vae

from irasim_diffusers import IRASimPipeline, UNetTrajectoryModel
from irasim_diffusers.models import noise_process
from irasim_diffusers.pipelines.model_card import write_model_card


def make_pipeline(vae, **changes):
    unet = tiny_unet(**changes)
    scheduler = noise_process(unet.config)
    if unet.config.prediction_type != "flow_prediction":
        process = {name: value for name, value in scheduler.config.items() if name[0] != "_"}
        scheduler = DDIMScheduler.from_config(process)
    pipeline = IRASimPipeline(vae, unet, scheduler, num_inference_steps=2)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(params=["LVDM", "VDM"])
def pipeline(request):
    """LVDM predicts latents and VDM pixels, without an autoencoder; frames have 8x12 pixels in both."""
    if request.param == "LVDM":
        return make_pipeline(tiny_vae())
    return make_pipeline(None, in_channels=3, sample_height=8, sample_width=12)


def generate(pipeline, frames, actions):
    return pipeline(frames, actions, generator=torch.Generator().manual_seed(0), output_type="pt").frames


def test_saved_pipeline_predicts_the_same(pipeline, frames, actions, tmp_path):
    video = generate(pipeline, frames, actions)
    assert video.shape == (1, 7, 3, 8, 12)  # three windows of three, the last one padded
    assert not torch.equal(generate(pipeline, frames, actions + 1), video)
    pipeline.save_pretrained(tmp_path)
    loaded = IRASimPipeline.from_pretrained(tmp_path)
    assert type(loaded.transformer) is UNetTrajectoryModel
    assert (loaded.vae is None) == (pipeline.vae is None)
    assert torch.equal(generate(loaded, frames, actions), video)
    assert type(AutoModel.from_pretrained(str(tmp_path), subfolder="transformer")) is UNetTrajectoryModel


def test_stream_with_and_without_guidance(pipeline, frames, actions):
    videos = []
    for guidance_scale in (1.0, 2.0):
        generator = torch.Generator().manual_seed(0)
        stream = pipeline.stream(frames, actions, guidance_scale=guidance_scale, generator=generator, output_type="pt")
        videos.append(torch.stack(list(stream)))
    assert videos[0].shape == (7, 3, 8, 12)
    assert not torch.allclose(*videos)


def test_unsupported_arguments_raise(pipeline, frames, actions):
    with pytest.raises(ValueError, match="must contain 2 history frames for Video-Ada and the U-Net, got 1"):
        pipeline(frames[:1], actions)
    with pytest.raises(ValueError, match=r"`chunk_length` must be an integer in \[3, 3\] for this checkpoint, got 2"):
        pipeline.stream(frames, actions, chunk_length=2)
    with pytest.raises(ValueError, match="`frames` must be 8x12"):
        pipeline(frames[:, :, :10], actions)


def test_latents_of_pixel_space_are_pixels(frames):
    pipeline = make_pipeline(None, in_channels=3, sample_height=8, sample_width=12)
    latents = pipeline.encode_history(pipeline.preprocess_frames(frames))
    assert latents.shape == (1, 3, 2, 8, 12)
    decoded = pipeline.video_processor.postprocess_video(pipeline.decode_latents(latents), "np")
    np.testing.assert_allclose(decoded[0], frames / 255, atol=1e-6)


@pytest.mark.parametrize(
    "changes",
    [
        {"prediction_type": "v_prediction"},
        {"prediction_type": "sample"},
        {"prediction_type": "flow_prediction"},
        {"relative_latents": True},
    ],
)
def test_every_objective(frames, actions, changes):
    plain, other = make_pipeline(tiny_vae()), make_pipeline(tiny_vae(), **changes)
    videos = [generate(pipeline, frames, actions) for pipeline in (plain, other)]
    assert torch.isfinite(videos[1]).all()
    assert not torch.allclose(*videos)


def test_card_describes_the_model(pipeline):
    text = write_model_card(pipeline, "lab/baseline").text
    assert "the U-Net of [Video Diffusion Models]" in text
    assert "U-Net of 8-16 channels, 2 heads; 0.0" in text
    assert "from 2 frames of 8x12 pixels (height x width)" in text
    assert "5 frames, 2 of them history" in text
    assert 'frames = [load_image(f"frame-{k}.png") for k in range(2)]' in text
    assert "pipe(frames, actions)" in text
    assert ("none; the model predicts pixels" in text) == (pipeline.vae is None)
