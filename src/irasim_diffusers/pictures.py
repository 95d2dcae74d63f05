"""Resize frames and draw film strips."""

from __future__ import annotations

import numpy as np
import PIL.Image
import PIL.ImageDraw
import torch

FRAMES_AT_ONCE = 64
"""Maximum number of frames that are resized at a time; float32 pixels need four times the memory of uint8."""


def resize(frames: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
    """Resize frames with antialiased bilinear interpolation.

    Args:
        frames: Frames (..., C, H, W), floating point in any range, or uint8.
        size: Height and width.

    Returns:
        Frames (..., C, *size) of the same type. Frames that already have this size are returned unchanged.
    """
    if tuple(frames.shape[-2:]) == tuple(size):
        return frames
    parts = []
    for part in frames.reshape(-1, *frames.shape[-3:]).split(FRAMES_AT_ONCE):
        pixels = part if part.is_floating_point() else part.float()
        resized = torch.nn.functional.interpolate(pixels, size=tuple(size), mode="bilinear", antialias=True)
        parts.append(resized if part.is_floating_point() else resized.round().clamp(0, 255).to(part.dtype))
    return torch.cat(parts).reshape(*frames.shape[:-2], *size)


def resize_video(frames: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """Resize a video (T, H, W, 3), uint8, to (height, width) with antialiased bilinear interpolation."""
    resized = resize(torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 3, 1, 2), size)
    return resized.permute(0, 2, 3, 1).contiguous().numpy()


def film_strip(rows: dict[str, np.ndarray], num_seen: int, columns: int = 10) -> PIL.Image.Image:
    """Draw evenly spaced frames of videos from the last history frame on, one labeled row per video.

    Args:
        rows: Videos (T, H, W, 3), uint8, by name. All must have the same shape.
        num_seen: Number of history frames at the start of each video; the last of them is drawn with the label "history".
        columns: Maximum number of frames per row.
    """
    length = len(next(iter(rows.values())))
    chosen = np.unique(np.linspace(max(num_seen - 1, 0), length - 1, columns).round().astype(int))
    pictures = np.concatenate([np.concatenate(list(frames[chosen]), axis=1) for frames in rows.values()])
    height, margin = pictures.shape[0] // len(rows), 14
    strip = PIL.Image.new("RGB", (pictures.shape[1], pictures.shape[0] + margin * (len(rows) + 1)), "white")
    draw = PIL.ImageDraw.Draw(strip)
    width = pictures.shape[1] // len(chosen)
    for row, name in enumerate(rows):
        top = margin * (row + 1) + height * row
        draw.text((2, top - margin + 1), name, fill="black")
        strip.paste(PIL.Image.fromarray(pictures[height * row : height * (row + 1)]), (0, top))
    for column, frame in enumerate(chosen):
        label = "history" if frame < num_seen else f"+{frame - num_seen + 1}"
        draw.text((column * width + 2, strip.height - margin + 1), label, fill="black")
    return strip
