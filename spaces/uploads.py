"""Uploaded files, and images as data URLs."""

from __future__ import annotations

import base64
import binascii
from io import BytesIO
from pathlib import Path
from typing import Any

import PIL.Image
from gradio.utils import get_upload_folder

DATA_URL_PREFIX = "data:image/webp;base64,"


def uploaded_path(upload: Any) -> Path:
    """Return the file of an upload, `{"path": ...}`.

    Raises:
        ValueError: If it is not in Gradio's upload folder, or was deleted.
    """
    path = upload.get("path") if isinstance(upload, dict) else None
    folder = Path(get_upload_folder()).resolve()
    if not isinstance(path, str) or "\0" in path or not (found := Path(path).resolve()).is_relative_to(folder):
        raise ValueError(f"`frames` must be the name of an example or an uploaded image, got {upload!r:.200}.")
    if not found.is_file():
        raise ValueError("`frames` must be an existing upload: the image was deleted; upload it again.")
    return found


def data_url(picture: PIL.Image.Image, **options: Any) -> str:
    """Encode an image as a WebP data URL; lossless unless `options` change this."""
    buffer = BytesIO()
    picture.save(buffer, "WEBP", **{"lossless": True, "method": 0} | options)
    return DATA_URL_PREFIX + base64.b64encode(buffer.getvalue()).decode()


def read_data_url(url: Any, size: tuple[int, int]) -> PIL.Image.Image:
    """Decode a data URL from `data_url`.

    Args:
        url: A value from a browser.
        size: Expected height and width; other images are not decoded.

    Raises:
        ValueError: If the value is not a data URL of a WebP image of this size.
    """
    if isinstance(url, str) and url.startswith(DATA_URL_PREFIX):
        try:
            content = base64.b64decode(url.removeprefix(DATA_URL_PREFIX), validate=True)
            with PIL.Image.open(BytesIO(content), formats=["WEBP"]) as image:
                if image.size == size[::-1]:
                    return image.convert("RGB")
        except (binascii.Error, OSError, SyntaxError, ValueError):
            pass
    raise ValueError(f"`frames` must be WebP data URLs of {size[1]}x{size[0]} pixels, as `step` returns them.")
