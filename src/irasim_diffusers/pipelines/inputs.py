"""Coercion and checks of the pipeline's arguments before any computation; check of the prediction."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import FasterCacheConfig, FirstBlockCacheConfig, MagCacheConfig, PyramidAttentionBroadcastConfig
from safetensors import SafetensorError, safe_open
from torch import nn

from ..json_files import read_config
from ..latents import check_sizes
from ..pictures import resize as resize_frames
from ..safe_load import find_nonfinite_weight

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

FLOATING = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
"""Floating-point types in safetensors files."""


def stack_frames(frames: Any) -> torch.Tensor:
    """Convert history frames of any accepted form to one tensor.

    Args:
        frames: One frame, a history or a batch of histories: PIL images, arrays (..., H, W, 3), tensors (..., 3, H, W), or
            lists of these, uint8 or floats in [0, 1].

    Returns:
        Histories (B, h, 3, H, W), float32 in [0, 1].

    Raises:
        ValueError: If there are no frames, or frames have an unsupported type, are not RGB, differ in size, or are out of range.
    """
    pixels = _to_tensor(frames)
    if pixels.ndim not in (3, 4, 5) or pixels.shape[-3] != 3 or 0 in pixels.shape:
        raise ValueError(
            "`frames` must be at least one RGB image: one, a history (h, ...) or a batch of histories (B, h, ...), got shape "
            f"{tuple(pixels.shape)} (channels first): convert other images with `image.convert('RGB')`."
        )
    if not torch.isfinite(pixels).all() or pixels.min() < 0 or pixels.max() > 1:
        raise ValueError(
            f"`frames` must be uint8, or floats in [0, 1], got floats in [{pixels.min():g}, {pixels.max():g}]: divide "
            "8-bit values by 255, or convert them to uint8."
        )
    return pixels[(None,) * (5 - pixels.ndim)]


def _to_tensor(frames: Any) -> torch.Tensor:
    """Return frames as a float32 tensor (..., C, H, W); uint8 values are scaled to [0, 1]."""
    if isinstance(frames, PIL.Image.Image):
        if frames.mode != "RGB":
            raise ValueError(f"`frames` must be RGB, got an image of mode {frames.mode}: use `image.convert('RGB')`.")
        frames = np.asarray(frames)
    if isinstance(frames, list | tuple):
        parts = [_to_tensor(frame) for frame in frames]
        if len({part.shape for part in parts}) != 1:
            shapes = sorted({tuple(part.shape) for part in parts})
            raise ValueError(f"`frames` must contain at least one frame, all of one size, got shapes {shapes}.")
        return torch.stack(parts)
    if isinstance(frames, np.ndarray):
        if frames.ndim < 3:
            raise ValueError(
                f"`frames` must be arrays of at least 3 dimensions (H, W, 3), got an array {frames.shape}: convert it to RGB."
            )
        frames = torch.from_numpy(np.ascontiguousarray(np.moveaxis(frames, -1, -3)))
    if not torch.is_tensor(frames):
        raise ValueError(f"`frames` must be PIL images, arrays or tensors, got {type(frames).__name__}.")
    if frames.dtype == torch.uint8:
        return frames.float() / 255
    if not frames.is_floating_point():
        raise ValueError(f"`frames` must be uint8, or floats in [0, 1], got {frames.dtype}.")
    return frames.float()


def check_history(pixels: torch.Tensor, config: Any) -> None:
    """Check the number of history frames.

    Args:
        pixels: Histories (B, h, 3, H, W).
        config: The transformer's config.

    Raises:
        ValueError: If there are more frames than the checkpoint supports, or fewer for Video-Ada and the U-Net.
    """
    longest, given, is_exact = config.num_history_frames, pixels.shape[1], config.conditioning == "video"
    if given > longest:
        wanted = "one history frame" if longest == 1 else f"{'' if is_exact else '1 to '}{longest} history frames"
        raise ValueError(
            f"`frames` must contain {wanted} for this checkpoint, got {given}: pass the last {longest} (a list of lists is a "
            "batch)."
        )
    if is_exact and given != longest:
        raise ValueError(f"`frames` must contain {longest} history frames for Video-Ada and the U-Net, got {given}.")


def fit_frames(pixels: torch.Tensor, size: tuple[int, int], resize: bool) -> torch.Tensor:
    """Resize histories (B, h, 3, H, W) to a height and width, with antialiasing.

    Raises:
        ValueError: If the size differs and `resize` is False.
    """
    given = tuple(pixels.shape[-2:])
    if given == size:
        return pixels
    if not resize:
        raise ValueError(
            f"`frames` must be {size[0]}x{size[1]} (height x width) for this checkpoint, got {given[0]}x{given[1]}: pass "
            "resize=True (--resize on the command line) to resize them."
        )
    return resize_frames(pixels, size)


def repeat_rows(tensor: torch.Tensor, batch_size: int) -> torch.Tensor:
    """Repeat every row consecutively, so that there are `batch_size` rows."""
    return tensor.repeat_interleave(batch_size // len(tensor), dim=0)


def check_batch(num_histories: int, num_sequences: int, num_videos: int, generator: Any) -> int:
    """Return the number of videos of a call.

    Raises:
        ValueError: If the numbers of histories, action sequences and generators do not match, or a generator is not a
            `torch.Generator`.
    """
    if num_histories not in (1, num_sequences) and num_sequences != 1:
        raise ValueError(
            f"`frames` and `actions` must match: got {num_histories} histories and {num_sequences} action sequences; pass "
            "one history, one action sequence, or equal numbers of both."
        )
    batch_size = max(num_histories, num_sequences) * num_videos
    generators = generator if isinstance(generator, list) else [generator]
    if isinstance(generator, list) and len(generator) != batch_size:
        raise ValueError(
            f"`generator` must be one generator, or a list of {batch_size}, got a list of {len(generator)}."
        )
    if generator is not None and not all(isinstance(each, torch.Generator) for each in generators):
        found = {type(each).__name__ for each in generators}
        raise ValueError(
            f"`generator` must be a torch.Generator or a list of generators, got {', '.join(sorted(found))}: use "
            "`torch.Generator().manual_seed(seed)`."
        )
    return batch_size


def check_steps(num_inference_steps: Any, config: Any) -> None:
    """Check the number of denoising steps.

    Args:
        num_inference_steps: Number of denoising steps.
        config: The transformer's config.

    Raises:
        ValueError: If the number is not an integer in [1, `num_train_timesteps`].
    """
    most = config.num_train_timesteps
    if not _is_count(num_inference_steps) or num_inference_steps > most:
        raise ValueError(
            f"`num_inference_steps` must be an integer of at least 1 and at most {most}, the timesteps in training, got "
            f"{num_inference_steps!r}."
        )


def check_numbers(
    *, num_videos_per_trajectory: int, decode_chunk_size: int, guidance_scale: float, eta: float
) -> None:
    """Check the numeric arguments of a call.

    Args:
        num_videos_per_trajectory: Number of videos per trajectory.
        decode_chunk_size: Number of frames that are decoded at a time.
        guidance_scale: Any finite number.
        eta: A number in [0, 1].

    Raises:
        ValueError: If a count is not a positive integer, the guidance scale is not finite, or eta is not in [0, 1].
    """
    counts = {"num_videos_per_trajectory": num_videos_per_trajectory, "decode_chunk_size": decode_chunk_size}
    for name, count in counts.items():
        if not _is_count(count):
            raise ValueError(f"`{name}` must be an integer of at least 1, got {count}.")
    if not math.isfinite(guidance_scale):
        raise ValueError(f"`guidance_scale` must be finite, got {guidance_scale}.")
    if not 0 <= eta <= 1:
        raise ValueError(f"`eta` must be in [0, 1], got {eta}.")


def _is_count(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and int(value) >= 1


def check_prediction(latents: torch.Tensor) -> torch.Tensor:
    """Return predicted latents if all are finite.

    Raises:
        ValueError: If some values are NaN or infinite, which would become arbitrary pixels.
    """
    if not torch.isfinite(latents).all():
        raise ValueError(
            "the prediction contains NaN or infinite values: check the LoRA weights and their `lora_alpha`, or load the model "
            "in float32."
        )
    return latents


def check_outputs(output_type: str, requested: Sequence[str], available: Sequence[str]) -> None:
    """Check the output type and the names of the tensors that a callback receives.

    Raises:
        ValueError: If the output type or a name is unknown.
    """
    if output_type not in OUTPUT_TYPES:
        raise ValueError(f"`output_type` must be pil, np, pt or latent, got {output_type!r}.")
    unknown = set(requested) - set(available)
    if unknown:
        raise ValueError(f"`callback_on_step_end_tensor_inputs` must be among {available}, got {sorted(unknown)}.")


def check_latents(latents: Any, shape: tuple[int, ...]) -> None:
    """Check given initial noise; None is accepted.

    Raises:
        ValueError: If the noise is not a finite tensor of the given shape.
    """
    if latents is None:
        return
    if not torch.is_tensor(latents) or tuple(latents.shape) != shape:
        found = tuple(latents.shape) if hasattr(latents, "shape") else type(latents).__name__
        raise ValueError(f"`latents` must be a tensor {shape}, got {found}.")
    if not torch.isfinite(latents).all():
        raise ValueError("`latents` must be finite, got NaN or infinite values: draw them with `torch.randn`.")


def check_chunk(chunk_length: Any, config: Any, longest: float | None = None) -> int:
    """Return the number of actions per chunk.

    Args:
        chunk_length: Requested number.
        config: Config of the transformer.
        longest: Maximum number; None for the number of predicted frames of a window. Ignored for Video-Ada and the U-Net.

    Raises:
        ValueError: If the number is not an integer, is less than 1 or too large, or, for Video-Ada and the U-Net, differs from the
            number of predicted frames of a window.
    """
    window = config.sample_frames - config.num_history_frames
    fixed = config.conditioning == "video"
    shortest, longest = (window, window) if fixed else (1, window if longest is None else longest)
    if not isinstance(chunk_length, int | np.integer) or not shortest <= chunk_length <= longest:
        limits = "of at least 1" if longest == math.inf else f"in [{shortest}, {longest}] for this checkpoint"
        raise ValueError(f"`chunk_length` must be an integer {limits}, got {chunk_length}.")
    return int(chunk_length)


def check_fps(fps: float | None, config: Any) -> None:
    """Check the frames per second of a call against the checkpoint.

    Raises:
        ValueError: If the checkpoint embeds frames per second and the value of `fps` or the config is missing, not positive or not
            finite, or if the checkpoint does not embed them and `fps` is given.
    """
    embedded = config.get("use_fps")
    if fps is not None and not embedded:
        raise ValueError(f"`fps` must be None for this checkpoint, which does not embed frames per second, got {fps}.")
    rate = config.fps if fps is None else fps
    if embedded and (rate is None or not 0 < rate < float("inf")):
        raise ValueError(
            f"`fps` must be positive and finite, got {rate}: this model is conditioned on the frame rate. Pass `fps`, or set it in "
            "the config."
        )


def check_cache(transformer: Any, guidance_scale: float) -> None:
    """Check that the enabled cache supports the guidance scale, the model and context parallelism.

    Raises:
        ValueError: If the cache does not support them, or is a FasterCache without `is_guidance_distilled`.
    """
    cache = getattr(transformer, "_cache_config", None)
    if guidance_scale > 1 and isinstance(cache, PyramidAttentionBroadcastConfig | FasterCacheConfig):
        raise ValueError(
            f"`guidance_scale` must be at most 1 with {type(cache).__name__}, got {guidance_scale}: this cache has a single "
            "state for both network evaluations of a step; use the first-block cache."
        )
    if isinstance(cache, FasterCacheConfig) and not cache.is_guidance_distilled:
        raise ValueError(
            "`FasterCacheConfig` must have is_guidance_distilled=True, got False: otherwise it treats half of each batch as "
            "the evaluation without actions."
        )
    if isinstance(cache, FirstBlockCacheConfig | MagCacheConfig) and transformer.config.get("moving_layers"):
        raise ValueError(
            f"`{type(cache).__name__}` does not support models with `moving_layers`, whose masks are computed from the output of "
            "the first block: use another cache."
        )
    if isinstance(cache, FirstBlockCacheConfig) and transformer._parallel_config is not None:
        raise ValueError(
            "`FirstBlockCacheConfig` does not support context parallelism, because processes may skip different blocks: use "
            "another cache."
        )


def check_autoencoder(vae: Any, in_channels: int) -> None:
    """Check that a latent model has an autoencoder.

    Raises:
        ValueError: If `vae` is None and the model does not have the 3 channels of RGB frames.
    """
    if vae is None and in_channels != 3:
        raise ValueError(
            f"`vae` must be the autoencoder of this model, whose latents have {in_channels} channels, got None: only a model "
            "of RGB frames (3 channels) works without one."
        )


def check_finite_weights(module: Any, name: str) -> None:
    """Check that all weights of a module were loaded and are finite; see `find_nonfinite_weight`.

    Args:
        module: The module; anything else is accepted without a check.
        name: Name of the module for the error message.

    Raises:
        ValueError: If a weight is missing, NaN or infinite.
    """
    if not isinstance(module, nn.Module):
        return
    missing = next((key for key, weight in module.state_dict(keep_vars=True).items() if weight.is_meta), None)
    if missing is not None and not any(hasattr(part, "_hf_hook") for part in module.modules()):  # without offloading
        raise ValueError(f"the weights file does not contain {name}.{missing}: copy or train the model again.")
    key = find_nonfinite_weight(module)
    if key is not None:
        raise ValueError(
            f"`{name}` must have finite weights, got NaN or infinite values in {key!r}: the training diverged or the file "
            "is damaged; load an earlier checkpoint."
        )


def check_model_files(folder: Path) -> None:
    """Check the files of a pipeline's models before models are built or weights are converted.

    Args:
        folder: The folder of the pipeline; nothing is checked if it is not a local folder.

    Raises:
        ValueError: If a config is not a JSON object, the autoencoder has too many or too large layers, or the weights of a model
            that is not quantized are not floating-point.
    """
    for path in (folder / "model_index.json", folder / "scheduler" / "scheduler_config.json"):
        read_config(path)
    for name in ("vae", "transformer"):
        config = read_config(folder / name / "config.json")
        if name == "vae":
            check_sizes(config)
        if "quantization_config" not in config:
            for file in sorted((folder / name).glob("[!.]*.safetensors")):
                _check_types(file)


def _check_types(file: Path) -> None:
    """Check the types in the header of a safetensors file."""
    # diffusers reports damaged files
    with suppress(SafetensorError, OSError), safe_open(file, framework="pt") as tensors:
        for key in tensors.keys():  # noqa: SIM118 (not a dictionary)
            kind = tensors.get_slice(key).get_dtype()
            if kind not in FLOATING and not key.endswith("num_batches_tracked"):
                raise ValueError(
                    f"{str(file)!r} must contain floating-point weights, got {kind} for {key!r}: convert the model again."
                )
