"""Pictures that visitors bring: checked before they are decoded, cut to the model's size."""

from __future__ import annotations

import base64
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import PIL.ImageOps
from gradio.utils import get_upload_folder

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
MOST_BYTES = 10_000_000
MOST_PIXELS = 25_000_000


def read_picture(upload: Any, size: tuple[int, int]) -> np.ndarray:
    """The picture (1, H, W, 3), uint8, of an upload, its middle cut to the shape of `size` (height, width).

    Args:
        upload: What Gradio makes of an uploaded file, `{"path": ...}`. Other files of the machine are refused.
        size: Height and width of the model's frames.

    Raises:
        ValueError: If it is no upload, too large, or no whole picture of a known format.
    """
    path = _uploaded_path(upload)
    if path.stat().st_size > MOST_BYTES:
        raise ValueError(
            f"the picture must have at most {MOST_BYTES // 10**6} MB, got {path.stat().st_size / 1e6:.0f} MB."
        )
    wanted = f"the file must be a whole picture, {', '.join(FORMATS)}"
    try:
        with PIL.Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:  # known before a pixel is decoded
                raise ValueError(
                    f"the picture must have at most {MOST_PIXELS // 10**6} million pixels, got {image.width}x{image.height}."
                )
            upright = PIL.ImageOps.exif_transpose(image).convert("RGB")
    except PIL.Image.DecompressionBombError as error:
        raise ValueError(f"the picture must have at most {MOST_PIXELS // 10**6} million pixels: {error}") from error
    except (OSError, SyntaxError) as error:
        raise ValueError(f"{wanted}: {str(error).replace(str(path), 'it')}.") from error
    height, width = size
    return np.asarray(PIL.ImageOps.fit(upright, (width, height), PIL.Image.Resampling.LANCZOS))[None]


def _uploaded_path(upload: Any) -> Path:
    path = upload.get("path") if isinstance(upload, dict) else None
    folder = Path(get_upload_folder()).resolve()
    if not isinstance(path, str) or "\0" in path or not (found := Path(path).resolve()).is_relative_to(folder):
        raise ValueError("`frames` must be the name of an example or an uploaded picture, got neither.")
    if not found.is_file():
        raise ValueError("`frames` must be an uploaded picture, got one that is gone: upload it again.")
    return found


def data_url(picture: PIL.Image.Image, **options: Any) -> str:
    """The picture as WebP in a data URL, which needs no second request: lossless unless `options` say otherwise."""
    buffer = BytesIO()
    picture.save(buffer, "WEBP", **{"lossless": True, "method": 0} | options)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
