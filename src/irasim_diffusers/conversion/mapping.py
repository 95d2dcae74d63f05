"""Strict mapping of foreign tensors: every tensor must be mapped or explicitly dropped."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Any, TypeAlias, Union, get_args, get_origin

import torch

from ..models import IRASimTransformer3DModel
from ..models.transformer_irasim import ACTION_ENCODER, LIMITS

# The tensors of the model that a foreign tensor becomes, the reason why it is dropped, or None if it is unknown.
Conversion: TypeAlias = dict[str, torch.Tensor] | str | None
Converter: TypeAlias = Callable[[str, torch.Tensor, IRASimTransformer3DModel], Conversion]

MAX_NEW_ELEMENTS = 1 << 29
"""Maximum number of elements in parameters that a file may lack. The largest action encoder of the paper has 3e8."""
MAX_PROBLEMS = 100


@dataclass
class ConversionReport:
    """Result of a conversion for each tensor of a file."""

    mapped: dict[str, list[str]] = field(default_factory=dict)  # foreign key -> keys of the model
    dropped: dict[str, str] = field(default_factory=dict)  # foreign key -> reason

    def __str__(self) -> str:
        """One line for each tensor of the file."""
        lines = [f"{key} -> {', '.join(targets)}" for key, targets in self.mapped.items()]
        return "\n".join(lines + [f"{key}: dropped, {reason}" for key, reason in self.dropped.items()])


def require(state: dict[str, torch.Tensor], family: str, dimensions: dict[str, int]) -> None:
    """Check that the tensors from which the config is derived exist.

    Args:
        state: Weights of the file.
        family: Name of the model family, for the message.
        dimensions: Number of dimensions of each required tensor.

    Raises:
        ValueError: If a tensor is missing or has the wrong number of dimensions.
    """
    missing = [key for key, number in dimensions.items() if key not in state or state[key].ndim != number]
    if missing:
        raise ValueError(
            f"the file must contain {family} weights, got {len(state)} tensors in which {missing} are missing or have "
            "the wrong number of dimensions."
        )


def count(state: dict[str, torch.Tensor], prefix: str) -> int:
    """Return the number of blocks whose tensor names start with `prefix`."""
    return len({key.removeprefix(prefix).split(".")[0] for key in state if key.startswith(prefix)})


def head_dim(width: int, heads: Any) -> int:
    """Return the number of channels of an attention head.

    Raises:
        ValueError: If `heads` is not an integer in range, or does not divide `width`.
    """
    if type(heads) is not int or not 1 <= heads <= LIMITS["num_attention_heads"] or width % heads:
        raise ValueError(
            f"`num_attention_heads` must be an integer of at least 1 and at most {LIMITS['num_attention_heads']} that "
            f"divides the width {width} of the weights, got {heads!r}."
        )
    return width // heads


def check_config(config: dict[str, Any]) -> None:
    """Check names and types of config entries against the signature of the model.

    The model itself checks values, and the types of the entries in `LIMITS`.

    Raises:
        ValueError: If an entry is unknown or has a wrong type.
    """
    parameters = inspect.signature(IRASimTransformer3DModel.__init__, eval_str=True).parameters
    for name, value in config.items():
        if name not in parameters or name == "self":
            raise ValueError(f"`{name}` must be an entry of the config of IRASimTransformer3DModel.")
        kind = parameters[name].annotation
        if name not in LIMITS and not _matches(value, kind):
            wanted = kind.__name__ if isinstance(kind, type) else kind
            raise ValueError(f"`{name}` must be {wanted}, and numbers must be finite in float32, got {value!r:.100}.")


def _matches(value: Any, kind: Any) -> bool:
    """Return whether a value has a type; floats must be finite in float32, booleans are not numbers."""
    if get_origin(kind) in (Union, UnionType):
        return any(_matches(value, option) for option in get_args(kind))
    if get_origin(kind) is list:
        return isinstance(value, list | tuple) and all(_matches(entry, get_args(kind)[0]) for entry in value)
    if kind is float:
        return type(value) in (int, float) and abs(value) <= torch.finfo(torch.float32).max  # False for NaN
    return value is None if kind in (None, NoneType) else type(value) is kind


def computed(
    tensor: torch.Tensor, shape: tuple[int, ...], table: Callable[[], torch.Tensor], tolerance: float = 1e-4
) -> str | None:
    """Return why a fixed table can be dropped, or None if it differs from the computed one.

    Args:
        tensor: Table of the file.
        shape: Shape of the model's table. It is compared first, so that a large table is not computed unnecessarily.
        table: Returns the model's table.
        tolerance: Maximum absolute difference, raised to the machine epsilon of 16-bit tables.

    Returns:
        The reason, or None if the tables differ in shape or value, or `tensor` is not floating-point.
    """
    if tensor.shape != shape or not tensor.is_floating_point():
        return None
    tolerance = max(tolerance, torch.finfo(tensor.dtype).eps)  # 16-bit files contain rounded tables
    gap = float((tensor.float() - table()).abs().max())
    return f"computed here, differs by at most {gap:.1g}" if gap <= tolerance else None


def is_action(key: str) -> bool:
    """Return whether a parameter belongs to the action encoder, which other model families do not have."""
    return key.startswith(ACTION_ENCODER)


def zero_actions(model: IRASimTransformer3DModel) -> None:
    """Zero the last layer of the action encoder and the null action, so that actions have no effect."""
    encoder = getattr(model, "trajectory_embed", model.action_embed)
    for parameter in (encoder.linear_2.weight, encoder.linear_2.bias, model.null_action):
        torch.nn.init.zeros_(parameter)


def without_sigma(tensor: torch.Tensor, model: IRASimTransformer3DModel) -> torch.Tensor:
    """Return the rows for the mean of an output layer that predicts mean and variance.

    Rows are ordered by pixel of the patch, then by channel: first the channels of the mean, then of the variance. A tensor with
    another number of rows is returned unchanged.
    """
    channels = model.config.in_channels
    if tensor.shape[0] != 2 * channels * model.config.patch_size**2:
        return tensor  # `build` reports the wrong shape
    return tensor.unflatten(0, (-1, 2 * channels))[:, :channels].flatten(0, 1)


def build(
    config: dict[str, Any],
    state: dict[str, torch.Tensor],
    convert: Converter,
    report: ConversionReport | None,
    new: Callable[[str], bool] = lambda key: False,
) -> IRASimTransformer3DModel:
    """Build the model of a config with converted weights.

    Names, shapes and values are checked on a model without memory (device "meta") before the model is allocated.

    Args:
        config: Config of the model.
        state: Weights of the file.
        convert: Maps a name and a tensor of the file to names and tensors of the model.
        report: Filled with the mapping.
        new: Returns whether a parameter keeps its initial value because the file does not contain it.

    Returns:
        The model, float32.

    Raises:
        ValueError: If the config is invalid, if tensors are unknown, missing or not finite, or have the wrong shape (up to 100 are
            listed), or if the file lacks more than `MAX_NEW_ELEMENTS` elements.
    """
    check_config(config)
    with torch.device("meta"):
        outline = IRASimTransformer3DModel(**config)
    expected = {key: value.shape for key, value in outline.state_dict().items()}
    report = ConversionReport() if report is None else report
    converted, problems = _convert(state, expected, lambda key, tensor: convert(key, tensor, outline), report)
    problems += [
        f"missing tensor {key} {tuple(shape)}"
        for key, shape in expected.items()
        if key not in converted and not new(key)
    ]
    problems = problems or [
        f"{key}: NaN or infinite values in float32"
        for key, value in converted.items()
        if not bool(torch.isfinite(value.float()).all())
    ]
    if (added := sum(shape.numel() for key, shape in expected.items() if new(key))) > MAX_NEW_ELEMENTS:
        problems.append(f"the config asks for {added} new elements, more than {MAX_NEW_ELEMENTS}")
    if problems:
        more = len(problems) - MAX_PROBLEMS
        shown = problems[:MAX_PROBLEMS] + ([f"and {more} more"] if more > 0 else [])
        raise ValueError(f"the weights cannot be converted (problems: {len(problems)}):\n" + "\n".join(shown))
    model = IRASimTransformer3DModel(**config)
    model.load_state_dict(converted, strict=False)
    return model


def _convert(
    state: dict[str, torch.Tensor],
    expected: dict[str, torch.Size],
    convert: Callable[[str, torch.Tensor], Conversion],
    report: ConversionReport,
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Convert tensors; return them and a line for each unknown, ambiguous or wrongly shaped tensor."""
    converted: dict[str, torch.Tensor] = {}
    problems = []
    for key, tensor in state.items():
        result = convert(key, tensor)
        if isinstance(result, str):
            report.dropped[key] = result
            continue
        if result is None or not result.keys() <= expected.keys():
            problems.append(f"{key} {tuple(tensor.shape)}: unknown, or different from what the model computes")
            continue
        problems += [f"{key}: {target} is mapped twice" for target in result if target in converted]
        problems += [
            f"{key}: {tuple(value.shape)} where {target} is {tuple(expected[target])}"
            for target, value in result.items()
            if value.shape != expected[target]
        ]
        report.mapped[key] = list(result)
        converted |= result
    return converted, problems
