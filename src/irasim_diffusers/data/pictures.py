"""Decode images to 8-bit RGB with the EXIF orientation applied, and stack them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np
import PIL.Image
import PIL.ImageOps

MODES = ("RGB", "RGBA", "RGBX", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr")
"""Accepted Pillow modes, all with at most 8 bits per channel."""
MAX_PIXELS = 64_000_000
"""Maximum number of pixels of an image. Pillow uses several bytes per pixel."""


def read_picture(
    source: str | os.PathLike | BinaryIO,
    name: str | None = None,
    *,
    formats: tuple[str, ...] | None = None,
    max_pixels: int = MAX_PIXELS,
) -> np.ndarray:
    """Decode an image with its EXIF orientation applied. An alpha channel is dropped.

    Args:
        source: Path of the image, or an open binary file.
        name: Name in error messages (default: the path, or "in the open file" for an open file).
        formats: Pillow formats that are accepted; None for all.
        max_pixels: Maximum number of pixels, checked before decoding.

    Returns:
        Pixels (H, W, 3), uint8 RGB.

    Raises:
        ValueError: If the file is missing or damaged, is not an image of `formats`, has too many pixels, is animated, or has a mode
            that is not in `MODES`, such as depth with 16 bits.
    """
    if name is None:
        name = repr(os.fspath(source)) if isinstance(source, str | os.PathLike) else "in the open file"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)  # `_problem` has a lower limit
            with PIL.Image.open(source, formats=formats) as image:
                problem = _problem(image, max_pixels)
                if problem is None:
                    return np.array(PIL.ImageOps.exif_transpose(image).convert("RGB"))
    except PIL.UnidentifiedImageError as error:
        raise ValueError(f"cannot read image {name}: its format is unknown or not accepted.") from error
    except Exception as error:  # Pillow raises errors of many types for damaged files
        raise ValueError(f"cannot read image {name}: {str(error) or type(error).__name__}") from error
    raise ValueError(f"image {name} {problem}")


def _problem(image: PIL.Image.Image, max_pixels: int) -> str | None:
    """Return why an open image cannot be used, or None."""
    if image.width * image.height > max_pixels:
        size = f"{image.width}x{image.height}"
        return f"must have at most {max_pixels / 1e6:g} million pixels, got {size}: resize it."
    if image.mode not in MODES:
        return f"has mode {image.mode!r}; 8-bit RGB or grayscale is required: convert depth to 8 bits, or select another camera."
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":  # phone photos may contain a preview as a second image
        return f"is animated ({frames} frames): convert it to a video, or save one frame."
    return None


def stack_pictures(frames: Sequence[np.ndarray], name: str, first: int) -> np.ndarray:
    """Stack frames (H, W, 3) of a video or a list of images.

    Args:
        frames: The frames.
        name: Name of the video or the images, for the message.
        first: Index of the first frame in the episode or video, for the message.

    Raises:
        ValueError: If the frames differ in size.
    """
    for number, frame in enumerate(frames, first):
        if frame.shape != frames[0].shape:
            size, other = ("x".join(map(str, each.shape[:2])) for each in (frames[0], frame))
            raise ValueError(
                f"frames of {name} must have one size, got {size} and, at frame {number}, {other} (height x width): remove the "
                "episode, or resize its frames."
            )
    return np.stack(frames)
