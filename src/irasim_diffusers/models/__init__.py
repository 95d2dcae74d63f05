"""Networks."""

from .noise_process import noise_process
from .transformer_irasim import PRESETS, IRASimTransformer3DModel
from .unet_trajectory import UNET_PRESETS, UNetTrajectoryModel

__all__ = ["PRESETS", "UNET_PRESETS", "IRASimTransformer3DModel", "UNetTrajectoryModel", "noise_process"]
