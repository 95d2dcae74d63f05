"""Output of the pipeline."""

from dataclasses import dataclass

import numpy as np
import PIL.Image
import torch
from diffusers.utils import BaseOutput


@dataclass
class IRASimPipelineOutput(BaseOutput):
    """Output of `IRASimPipeline`.

    Args:
        frames: Predicted frames of each trajectory, without the history: a list of lists of PIL images, an array
            (B, n, H, W, 3) or a tensor (B, n, 3, H, W) in [0, 1], or scaled latents (B, C, n, h, w).
    """

    frames: list[list[PIL.Image.Image]] | np.ndarray | torch.Tensor
