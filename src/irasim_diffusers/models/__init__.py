"""Models: the IRASim transformer, the U-Net baseline and the proprioception model."""

from typing import TypeAlias

from diffusers.pipelines.pipeline_loading_utils import ALL_IMPORTABLE_CLASSES, LOADABLE_CLASSES

from .noise_process import noise_process
from .proprioception import ProprioceptionModel
from .public_config import public_config
from .transformer_irasim import ACTION_ENCODER, PRESETS, IRASimTransformer3DModel
from .unet_trajectory import UNET_PRESETS, UNetTrajectoryModel

Denoiser: TypeAlias = IRASimTransformer3DModel | UNetTrajectoryModel
"""A network that predicts the frames of a window; any model with the same config and `forward` can replace it."""

# With this entry, model_index.json names the package instead of a module path, so that pipelines load from folders and the Hub.
LOADABLE_CLASSES.setdefault(
    "irasim_diffusers",
    {
        "IRASimTransformer3DModel": ["save_pretrained", "from_pretrained"],
        "ProprioceptionModel": ["save_pretrained", "from_pretrained"],
        "UNetTrajectoryModel": ["save_pretrained", "from_pretrained"],
    },
)
ALL_IMPORTABLE_CLASSES.update(LOADABLE_CLASSES["irasim_diffusers"])

__all__ = [
    "ACTION_ENCODER",
    "PRESETS",
    "UNET_PRESETS",
    "Denoiser",
    "IRASimTransformer3DModel",
    "ProprioceptionModel",
    "UNetTrajectoryModel",
    "noise_process",
    "public_config",
]
