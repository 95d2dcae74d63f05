"""Where uploads are, and pictures as addresses."""

from __future__ import annotations

import base64
from io import BytesIO
from pathlib import Path
from typing import Any

import PIL.Image
from gradio.utils import get_upload_folder


def uploaded_path(upload: Any) -> Path:
    """The file that Gradio made of an upload, `{"path": ...}`.

    Raises:
        ValueError: If it is another file of the machine, or gone.
    """
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
