"""`irasim convert`: convert pretrained weights to a pipeline."""

from __future__ import annotations

import argparse
import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from .files import check_name, check_output_folder, named_flags
from .loading import load_vae

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    from .. import IRASimTransformer3DModel
    from ..conversion import ConversionReport


RELEASED = ("dataset", "weights", "final_frame_ada")
"""Flags of released IRASim weights."""


def add_parser(subparsers: Any) -> None:
    """Add `convert` to the subparsers of `irasim`."""
    parser = subparsers.add_parser(
        "convert",
        help="convert pretrained weights to a pipeline",
        description="Convert pretrained weights to a pipeline folder. Released IRASim checkpoints keep their predictions; "
        "Open-Sora (STDiT3) and Latte weights are initial weights for training. No code in the files is executed.",
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add(
        "--source",
        choices=("irasim", "opensora", "latte"),
        default="irasim",
        help="origin of the weights (default: %(default)s)",
    )
    add("--checkpoint", type=Path, required=True, help="irasim: .pt file; opensora, latte: safetensors file or folder")
    add(
        "--dataset",
        choices=("rt1", "bridge", "languagetable"),
        help="irasim (required): dataset on which the released checkpoint was trained",
    )
    add(
        "--weights",
        choices=("ema", "model"),
        help="irasim: which weights of the released checkpoint to use (default: ema)",
    )
    add(
        "--final-frame-ada",
        action="store_true",
        help="irasim: the final layer of the released Frame-Ada checkpoint is also conditioned on actions",
    )
    add(
        "--vae",
        required=True,
        help="autoencoder, for released IRASim weights that of SDXL: folder or Hub id, optionally with ':<subfolder>'",
    )
    add(
        "--config",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="entries of the model's config with values in JSON, such as action_dim=7; opensora requires fps",
    )
    add("--output", type=Path, required=True, help="pipeline folder to write")


def run(arguments: argparse.Namespace) -> None:
    """Read the weights, check every tensor, write a complete pipeline, and print the mapping."""
    output: Path = arguments.output
    check_output_folder(output, empty=True)
    check_name("--checkpoint", arguments.checkpoint)
    check_name("--vae", arguments.vae)
    if not arguments.checkpoint.exists():
        raise ValueError(f"--checkpoint must be an existing file or folder, got {str(arguments.checkpoint)!r}.")
    config = dict(_read_setting(text) for text in arguments.config)
    if arguments.source == "opensora" and "fps" not in config:
        raise ValueError(
            "--source opensora requires --config fps=<frames per second>: the model is conditioned on the frame rate."
        )
    if arguments.source == "irasim" and arguments.dataset is None:
        raise ValueError("--source irasim requires --dataset: rt1, bridge or languagetable.")
    given = [name for name in RELEASED if getattr(arguments, name)]
    if arguments.source != "irasim" and given:
        flag = f"--{given[0].replace('_', '-')}"
        raise ValueError(
            f"{flag} must be omitted with --source {arguments.source}: only released IRASim weights use it."
        )

    from .. import IRASimPipeline
    from ..conversion import ConversionReport
    from ..files import temporary_folder

    vae, report = load_vae(arguments.vae), ConversionReport()
    transformer = _load_transformer(arguments, config, report)
    if vae.config.latent_channels != transformer.config.in_channels:
        raise ValueError(
            f"--vae must have {transformer.config.in_channels} latent channels to match the weights, got {arguments.vae!r} with "
            f"{vae.config.latent_channels}."
        )
    size, patch = (transformer.config.sample_height, transformer.config.sample_width), transformer.config.patch_size
    if any(side % patch for side in size):
        raise ValueError(
            f"--config sample_height and sample_width must be divisible by the patch size {patch}, got {size[0]} and {size[1]}."
        )
    with temporary_folder(output) as partial:
        IRASimPipeline(vae, transformer, _scheduler(transformer)).save_pretrained(partial)
    print(report)
    print(f"{len(report.mapped)} tensors mapped, {len(report.dropped)} dropped; wrote {output}")


def _load_transformer(
    arguments: argparse.Namespace, config: dict[str, Any], report: ConversionReport
) -> IRASimTransformer3DModel:
    import torch

    from ..conversion import load_latte, load_opensora, load_released_irasim

    loaders: dict[str, Callable[..., IRASimTransformer3DModel]] = {
        "irasim": load_released_irasim,
        "opensora": load_opensora,
        "latte": load_latte,
    }
    options = {name: getattr(arguments, name) for name in RELEASED if getattr(arguments, name)}
    try:
        with named_flags(path="--checkpoint", num_attention_heads="--config num_attention_heads"):
            return loaders[arguments.source](arguments.checkpoint, report=report, **options, **config)
    except (TypeError, ZeroDivisionError, RuntimeError) as error:  # raised by layers for invalid sizes
        if config and not isinstance(error, torch.OutOfMemoryError):
            raise ValueError(f"--config must define a model, got {' '.join(arguments.config)!r}: {error}") from error
        raise ValueError(f"--checkpoint {str(arguments.checkpoint)!r} cannot be loaded: {error}") from error


def _scheduler(transformer: IRASimTransformer3DModel) -> SchedulerMixin:
    from diffusers import PNDMScheduler

    from ..models import noise_process

    if transformer.config.prediction_type == "flow_prediction":
        return noise_process(transformer.config)
    # the scheduler of the release, with the Runge-Kutta warm-up: 59 network evaluations at 50 steps
    names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
    process = {name: transformer.config[name] for name in names}
    return PNDMScheduler(**process, timestep_spacing="linspace")


def _read_setting(text: str) -> tuple[str, Any]:
    from .. import IRASimTransformer3DModel

    name, separator, value = text.partition("=")
    known = inspect.signature(IRASimTransformer3DModel.__init__).parameters
    if not separator or name not in known or name == "self":
        raise ValueError(f"--config must be KEY=VALUE with a key of the model's config, got {text!r}.")
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        kind = known[name].annotation
        if str not in (kind, *get_args(kind)):
            wanted = getattr(kind, "__name__", kind)
            raise ValueError(f"--config {name} must be {wanted} in JSON, got {value[:100]!r}.") from None
        return name, value
