"""Pretrained models and autoencoders of a training run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import FrozenDict
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from ..conversion import scaled_latents
from ..hub import missing_reason
from ..latents import AUTOENCODER, Autoencoder, load_any_autoencoder
from ..models import IRASimTransformer3DModel
from ..models.transformer_irasim import check_config
from ..pipelines import IRASimPipeline
from ..safe_load import find_nonfinite_weight
from .arguments import RunArguments

SAME_LATENTS = 1e-4
"""Maximum relative squared difference of the latents of two autoencoders that are considered equal."""


def is_pipeline(name: str, revision: str | None = None) -> bool:
    """Return whether a pretrained model, a folder or Hub repository, is a pipeline.

    Raises:
        ValueError: If `name` is neither a folder nor a repository that can be accessed.
    """
    if Path(name).is_dir():
        return (Path(name) / "model_index.json").is_file()
    try:
        try:
            hf_hub_download(name, "model_index.json", revision=revision)
        except LocalEntryNotFoundError:  # offline: either the file or the whole repository is not in the cache
            snapshot_download(name, revision=revision, local_files_only=True)
            return False
        except EntryNotFoundError:
            return False
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError) as error:
        reason = missing_reason(name, error) or error
        raise ValueError(
            f"`pretrained_model_name_or_path` must be a folder or Hub id, got {name!r}: {reason}"
        ) from error
    return True


def load_vae(arguments: RunArguments) -> Autoencoder | None:
    """Load the frozen autoencoder: `vae`, or that of the pretrained pipeline; None without either.

    Raises:
        ValueError: If `vae` cannot be loaded, has other latents than the autoencoder of the pretrained pipeline, or is given for a
            pixel-space pipeline, or if the pretrained model cannot be accessed or its autoencoder is invalid.
        OSError: If the config of the pretrained pipeline is not found or damaged.
    """
    name, revision = arguments.pretrained_model_name_or_path, arguments.revision
    own = _pretrained_vae(name, revision) if name is not None and is_pipeline(name, revision) else None
    if arguments.vae is None:
        return own
    vae = load_autoencoder(arguments.vae)
    if name is not None and is_pipeline(name, revision):
        if own is None:
            raise ValueError(f"`vae` must be omitted for the pixel-space model {name!r}, got {arguments.vae!r}.")
        if not same_latents(own, vae):
            raise ValueError(
                f"`vae` must have the same latents as the autoencoder of {name!r}: omit it, or convert the model with "
                f"`irasim adapt --model {name} --vae {arguments.vae} --dataset <data> --output <folder>`."
            )
    return vae


def load_autoencoder(name: str, argument: str = "vae") -> Autoencoder:
    """Load a frozen autoencoder.

    Args:
        name: Folder or Hub id, optionally with `:<subfolder>`.
        argument: Name of the argument in an error message.

    Raises:
        ValueError: If it cannot be loaded.
    """
    folder, subfolder = split_subfolder(name, f"`{argument}`")
    try:
        return _frozen(load_any_autoencoder(folder, subfolder=subfolder))
    except Exception as error:  # the loaders raise errors of many types for damaged files
        reason = missing_reason(folder, error) or error
        raise ValueError(f"`{argument}` must be {AUTOENCODER}, got {name!r}: {reason}") from error


def split_subfolder(name: str, argument: str) -> tuple[str, str | None]:
    """Split `<folder or Hub id>:<subfolder>`; the subfolder is None if `name` has none.

    Raises:
        ValueError: If the name before the colon is empty, or is a local folder without this subfolder.
    """
    if ":" not in name or Path(name).is_dir():
        return name, None
    folder, _, subfolder = name.rpartition(":")
    if not folder or (Path(folder).is_dir() and not (subfolder and (Path(folder) / subfolder).is_dir())):
        reason = f"there is no subfolder {subfolder!r}" if folder else "the name before the colon is empty"
        raise ValueError(f"{argument} must be {AUTOENCODER}, got {name!r}: {reason}.")
    return folder, subfolder


def _pretrained_vae(name: str, revision: str | None) -> Autoencoder | None:
    """Load the frozen autoencoder of a pretrained pipeline; None for pixel space.

    Raises:
        ValueError: If it cannot be loaded.
        OSError: If the config of the pipeline is not found or damaged.
    """
    if IRASimPipeline.load_config(name, revision=revision)["vae"][1] is None:
        return None
    try:
        return _frozen(load_any_autoencoder(name, subfolder="vae", revision=revision))
    except Exception as error:  # the loaders raise errors of many types for damaged files
        raise ValueError(
            f"`pretrained_model_name_or_path` must be a pipeline with a valid autoencoder, got {name!r}: {error}"
        ) from error


def _frozen(vae: Autoencoder) -> Autoencoder:
    return vae.requires_grad_(False).eval().to(memory_format=torch.channels_last)


@torch.no_grad()
def same_latents(first: Autoencoder, second: Autoencoder) -> bool:
    """Return whether two autoencoders map images to the same scaled latents, tested with random images."""
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    one, other = scaled_latents(first, images), scaled_latents(second, images)
    return one.shape == other.shape and bool((one - other).square().mean() < SAME_LATENTS * one.square().mean())


def load_transformer(arguments: RunArguments) -> IRASimTransformer3DModel:
    """Load the pretrained transformer from a pipeline, or from a folder or repository of a transformer.

    Raises:
        ValueError: If it cannot be loaded, or weights are missing, unknown or not finite.
    """
    name: Any = arguments.pretrained_model_name_or_path
    try:
        model, info = IRASimTransformer3DModel.from_pretrained(
            name,
            subfolder="transformer" if is_pipeline(name, arguments.revision) else None,
            revision=arguments.revision,
            variant=arguments.variant,
            output_loading_info=True,
        )
        if different := sorted([*info["missing_keys"], *info["unexpected_keys"]]):
            raise ValueError(f"the config does not match the weights, for example {different[0]!r}.")
        if (found := find_nonfinite_weight(model)) is not None:
            raise ValueError(f"the weights contain NaN or infinity in {found!r}: use an earlier checkpoint.")
        return model
    except Exception as error:  # the loaders raise errors of many types for damaged files
        reason = missing_reason(name, error) or error
        raise ValueError(
            "`pretrained_model_name_or_path` must be the folder or Hub id of a pipeline or an IRASimTransformer3DModel, got "
            f"{name!r}: {reason}"
        ) from error


def update_config(model: IRASimTransformer3DModel, entries: Mapping[str, Any]) -> IRASimTransformer3DModel:
    """Change config entries of a model that do not affect its weights, and return the model.

    Raises:
        ValueError: If the new config is invalid.
    """
    check_config(FrozenDict(model.config | entries))
    model.register_to_config(**entries)
    return model
