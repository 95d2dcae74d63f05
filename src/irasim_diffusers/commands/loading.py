"""Models named on the command line, loaded without output and with checked weights."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from ..hub import missing_reason

if TYPE_CHECKING:
    from ..latents import Autoencoder
    from ..rewards import FrameRegressor


def load_checked(flag: str, wanted: str, name: str, load: Callable[..., Any], remedy: str = "", **options: Any) -> Any:
    """Load a model or a pipeline without output, and check its weights.

    Args:
        flag: Flag to name in errors.
        wanted: Expected value, for errors.
        name: Folder or Hub id.
        load: Function that loads it, such as `IRASimPipeline.from_pretrained`.
        remedy: See `check_weights`.
        options: Options of `load`.

    Raises:
        ValueError: If the model or pipeline cannot be loaded, or its weights are invalid.
    """
    try:
        with quiet_loading() as messages:
            loaded = load(name, **options)
        check_weights(getattr(loaded, "components", {flag.removeprefix("--"): loaded}), messages, remedy)
    except Exception as error:  # the loaders raise errors of many types for damaged files
        reason = missing_reason(name, error) or error
        raise ValueError(f"{flag} must be {wanted}, got {name!r}: {reason}") from error
    return loaded


def load_vae(name: str) -> Autoencoder:
    """Load the autoencoder of `--vae`: a folder or Hub id, optionally with `:<subfolder>`.

    Raises:
        ValueError: If the autoencoder cannot be loaded, or its weights are invalid.
    """
    from ..latents import AUTOENCODER, load_any_autoencoder
    from ..training.pretrained import split_subfolder

    folder, subfolder = split_subfolder(name, "--vae")
    return load_checked("--vae", AUTOENCODER, folder, load_any_autoencoder, subfolder=subfolder)


def load_reward(name: str, device: Any) -> FrameRegressor:
    """Load the reward model of `--reward`.

    Raises:
        ValueError: If the reward model cannot be loaded, or its weights are invalid.
    """
    from ..rewards import FrameRegressor

    return load_checked("--reward", "a FrameRegressor", name, FrameRegressor.from_pretrained).eval().to(device)


@contextmanager
def quiet_loading() -> Iterator[list[str]]:
    """Collect the log messages of diffusers; disable its output, warnings and progress bar.

    This keeps the output clean until all checks have passed.
    """
    from diffusers.utils import logging as diffusers_logging

    messages: list[str] = []
    collector = logging.Handler()
    collector.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    logger, shown = logging.getLogger("diffusers"), diffusers_logging.is_progress_bar_enabled()
    handlers, logger.handlers = logger.handlers, [collector]
    diffusers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield messages
    finally:
        logger.handlers = handlers
        if shown:
            diffusers_logging.enable_progress_bar()


def check_weights(components: Mapping[str, Any], messages: list[str], remedy: str = "") -> None:
    """Check the weights of loaded models.

    Args:
        components: Components of a pipeline by name.
        messages: Messages of `quiet_loading`.
        remedy: Further remedy for weights that are not finite.

    Raises:
        ValueError: If weights are missing, unknown to the model, NaN (after a training that diverged) or infinite.
    """
    import torch

    from ..safe_load import find_nonfinite_weight

    for message in messages:
        if "were not used" in message:
            raise ValueError(f"the config does not match the weights: {message}")
    for name, component in components.items():
        if isinstance(component, torch.nn.Module):
            for key, weight in component.state_dict().items():
                if weight.is_meta:
                    raise ValueError(f"the weights file does not contain {name}.{key}.")
            if (found := find_nonfinite_weight(component)) is not None:
                raise ValueError(
                    f"weights must be finite, got NaN or infinity in {name}.{found}: use an earlier checkpoint{remedy}."
                )
