"""Networks."""

from .noise_process import noise_process
from .transformer_irasim import PRESETS, IRASimTransformer3DModel

__all__ = ["PRESETS", "IRASimTransformer3DModel", "noise_process"]
