"""Metrics."""

from .frame import psnr

__all__ = ["psnr"]
