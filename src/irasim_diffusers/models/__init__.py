"""Networks."""

from .noise_process import noise_process
from .proprioception import ProprioceptionModel
from .transformer_irasim import PRESETS, IRASimTransformer3DModel
from .unet_trajectory import UNET_PRESETS, UNetTrajectoryModel

__all__ = [
    "PRESETS",
    "UNET_PRESETS",
    "IRASimTransformer3DModel",
    "ProprioceptionModel",
    "UNetTrajectoryModel",
    "noise_process",
]
