"""Decode pictures to upright 8-bit RGB."""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO

import numpy as np
import PIL.Image
import PIL.ImageOps

MODES = ("RGB", "RGBA", "RGBX", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr")
"""Pillow's modes of pictures with at most 8 bits per channel."""


def read_picture(source: str | os.PathLike | BinaryIO, name: str | None = None) -> np.ndarray:
    """Decode a picture with its EXIF orientation applied. An alpha channel is dropped.

    Args:
        source: The picture file, or an open one.
        name: Name in error messages (default: the path).

    Returns:
        Pixels (H, W, 3), uint8 RGB.

    Raises:
        ValueError: If the file is missing, is not a picture, is damaged, or has more than 8 bits per channel, such as depth.
    """
    name = repr(os.fspath(source) if isinstance(source, str | Path) else "") if name is None else name
    try:
        with PIL.Image.open(source) as image:
            image.load()
            mode = image.mode
            if mode not in MODES:
                raise ValueError(
                    f"picture {name} has the mode {mode!r}, for example depth: 8-bit RGB or grey is required. Scale it to 8 bits "
                    "by a range of your choice, or choose another camera."
                )
            return np.asarray(PIL.ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read picture {name}: {error}") from error
