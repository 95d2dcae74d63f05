"""Tiny models with random weights."""

import torch
from diffusers import AutoencoderKL, PNDMScheduler

from irasim_diffusers import IRASimPipeline, IRASimTransformer3DModel, UNetTrajectoryModel
from irasim_diffusers.models import noise_process

# most sizes differ, so that tests detect transposed axes: latents 4x6, frames 8x12, window 5 = 2 + 3, 3 action components
TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "sample_height": 4,
    "sample_width": 6,
    "sample_frames": 5,
    "num_history_frames": 2,
    "action_dim": 3,
    "action_scale": [0.5, 2.0, 1.0],
    "action_offset": [1.0, 0.0, -1.0],
}


# config entries of each variant of IRASimTransformer3DModel, in addition to TINY
ARCHITECTURES = {
    "Frame-Ada": {},
    "Video-Ada": {"conditioning": "video"},
    "Open-Sora": {
        "norm_type": "ada_norm_single",
        "qk_norm": "rms_norm",
        "temporal_position": "rope",
        "spatial_position": "area",
        "history_timestep": "zero",
        "use_fps": True,
        "fps": 3.0,
        "prediction_type": "flow_prediction",
    },
    "Latte": {"norm_type": "ada_norm_single", "spatial_position": "fixed"},
    "Language-Table": {"conditioning": "video", "action_activation": None},
    "Push-T": {
        "spatial_position": "rope",
        "ff_conv": True,
        "activation_fn": "gelu",
        "target_extent": [-2.0, -1.0, 1.0, 3.0],
        "action_space": "absolute",
        "relative_latents": True,
        "scale_noisy_latents": True,
        "prediction_type": "sample",
    },
}
ARCHITECTURES["Moving layers"] = ARCHITECTURES["Push-T"] | {"moving_layers": 2}


def tiny_transformer(**changes) -> IRASimTransformer3DModel:
    """Create a tiny transformer with random weights, including those that are zero-initialized."""
    torch.manual_seed(0)
    model = IRASimTransformer3DModel(**TINY | changes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def tiny_unet(**changes) -> UNetTrajectoryModel:
    """Create a tiny U-Net with two resolutions and random weights."""
    torch.manual_seed(0)
    sizes = {"block_out_channels": [8, 16], "attention_head_dim": 4, "condition_dim": 20}
    shared = {name: value for name, value in TINY.items() if name != "num_layers"}
    model = UNetTrajectoryModel(**shared | sizes | changes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def tiny_vae() -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        latent_channels=4,
        scaling_factor=0.7,
        shift_factor=0.2,
        mid_block_add_attention=False,
    ).eval()


def tiny_pipeline(num_inference_steps=50, **changes) -> IRASimPipeline:
    transformer = tiny_transformer(**changes)
    scheduler = noise_process(transformer.config)
    if transformer.config.prediction_type != "flow_prediction":
        scheduler = PNDMScheduler.from_config(scheduler.config, skip_prk_steps=True, steps_offset=1)
    pipeline = IRASimPipeline(tiny_vae(), transformer, scheduler, num_inference_steps)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def without_moving_layers(pipeline: IRASimPipeline) -> IRASimPipeline:
    """Replace the transformer of a pipeline by one without moving layers, with the same other weights."""
    weights = pipeline.transformer.state_dict()
    transformer = IRASimTransformer3DModel.from_config(pipeline.transformer.config, moving_layers=0)
    transformer.load_state_dict({name: weights[name] for name in transformer.state_dict()})
    pipeline.register_modules(transformer=transformer.eval())
    return pipeline
