"""`irasim evaluate`: score predictions of recorded clips."""

from __future__ import annotations

import argparse
import shlex
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from .. import __version__, embedded_checkpoint
from .dataset import add_dataset_flags, frame_size, open_dataset
from .files import check_flag_ranges, check_name, check_output_folder
from .sampling import add_sampling_flags, check_sampling_flags, load_pipeline

NETWORKS = ("lpips", "inception", "i3d")
PREPARED = ("height", "width", "frame_skip", "action_derivation", "action_composition", "state_key", "pad_actions_to")
"""Fields of `EpisodeArguments` that `PreparedEpisodes` reads."""
LIMITS = {
    "batch_size": (1, None),
    "num_clips": (1, None),
    "frame_skip": (1, None),
    "pad_actions_to": (1, 1024),
    "faithfulness_clips": (0, None),
    "ways": (2, None),
}
"""Lowest and highest value of each flag; the highest bounds the memory that a flag can request."""


def add_parser(subparsers: Any) -> None:
    """Add `evaluate` to the subparsers of `irasim`."""
    parser = subparsers.add_parser(
        "evaluate",
        help="score predictions of recorded clips, and how well the model follows its actions",
        description="Score a model, or predictions in a folder, on recorded clips with a named protocol. The report "
        "contains the paper's metrics, action faithfulness and plots. Run the same command again to resume. Under `accelerate "
        "launch -m irasim_diffusers.cli evaluate`, several processes share the clips.",
    )
    parser.set_defaults(run=run)
    add_dataset_flags(parser, None, *PREPARED, "skip_broken")
    add_sampling_flags(parser, dtype="float32")
    add = parser.add_argument
    add(
        "--model",
        help="pipeline folder or Hub id (default: the embedded Push-T model); with --predictions, only the autoencoder of a given "
        "model is used",
    )
    add("--predictions", type=Path, help="score the files <clip>.npz or <clip>.mp4 in this folder instead of a model")
    add(
        "--protocol",
        default="irasim-short",
        help="irasim-short, irasim-short-release, irasim-long (no FID, FVD or faithfulness) or robonet (default: %(default)s)",
    )
    add("--num-clips", type=int, help="maximum number of clips to score, spread evenly over the data (default: all)")
    add("--output", type=Path, default=Path("irasim-evaluation"), help="folder to write (default: %(default)s)")
    add("--save-predictions", type=Path, help="folder for the predictions, in the format of --predictions")
    add("--save-truth", type=Path, help="folder for the true frames in the same format, for a preference study")
    add(
        "--published", help="also list the paper's results on rt1, bridge or languagetable (protocol robonet: robonet)"
    )
    add(
        "--faithfulness-clips",
        type=int,
        default=200,
        help="maximum number of clips on which action faithfulness is measured, except with --predictions and irasim-long; 0 or 1 "
        "disables it (default: %(default)s)",
    )
    add("--ways", type=int, default=4, help="number of alternatives in the identification test (default: %(default)s)")
    add(
        "--lpips",
        nargs="?",
        const="",
        metavar="ALEXNET",
        help="compute LPIPS, with AlexNet weights from a file or org/name:file (downloaded if omitted)",
    )
    add("--inception", metavar="WEIGHTS", help="compute FID with pytorch-fid's weights, a file or org/name:file")
    add(
        "--i3d",
        metavar="FILE",
        help="compute FVD with StyleGAN-V's i3d_torchscript.pt; loading this file executes code in it",
    )
    add("--batch-size", type=int, default=8, help="number of clips per batch (default: %(default)s)")
    add(
        "--resize",
        action="store_true",
        help="resize frames to the model's size, and predictions to the size of the true frames",
    )


def run(arguments: argparse.Namespace) -> None:
    """Open data and model, evaluate, and print the main results."""
    start = time.perf_counter()
    protocol = _check_flags(arguments)

    import torch
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    from ..evaluation import Evaluation, evaluate

    kwargs = InitProcessGroupKwargs(timeout=timedelta(days=1))  # processes may wait hours for the slowest one
    on_cpu = arguments.device == "cpu" or not torch.accelerator.is_available()
    accelerator = Accelerator(cpu=on_cpu, kwargs_handlers=[kwargs])
    if arguments.device == "auto":
        arguments.device = str(accelerator.device)
    dataset, split = _open_prepared(arguments)
    predictor, encode, setting = _load_predictor(arguments, dataset)
    networks = {name: getattr(arguments, name) for name in NETWORKS}
    report = evaluate(
        Evaluation(
            dataset,
            protocol,
            predictor,
            arguments.output,
            num_clips=arguments.num_clips,
            batch_size=arguments.batch_size,
            seed=arguments.seed,
            encode=encode,
            backbones=_load_backbones(arguments),
            faithfulness_clips=arguments.faithfulness_clips,
            skip_broken=arguments.skip_broken,
            ways=arguments.ways,
            save_predictions=arguments.save_predictions,
            save_truth=arguments.save_truth,
            published=arguments.published,
            setting={"dataset": arguments.dataset, "split": split} | setting | networks,
            unchecked={"command": shlex.join(["irasim", *arguments.argv]), "versions": _versions()},
        )
    )
    if accelerator.is_main_process:
        _print_report(report)
        print(f"{time.perf_counter() - start:.0f} s; wrote {arguments.output / 'report.md'}")


def _check_flags(arguments: argparse.Namespace) -> Any:
    """Check the flags that need neither data nor model; return the protocol."""
    from ..actions import DERIVATIONS
    from ..evaluation import PROTOCOLS

    check_output_folder(arguments.output)
    for flag in ("save_predictions", "save_truth"):
        if getattr(arguments, flag) is not None:
            check_output_folder(getattr(arguments, flag), f"--{flag.replace('_', '-')}")
    if arguments.predictions is not None:
        check_name("--predictions", arguments.predictions)
    check_sampling_flags(arguments)
    for flag, known in (
        ("protocol", [*PROTOCOLS]),
        ("action_derivation", DERIVATIONS),
        ("action_composition", [None, *DERIVATIONS[1:]]),
    ):
        value = getattr(arguments, flag)
        if value not in known:
            names = ", ".join(name for name in known if name)
            raise ValueError(f"--{flag.replace('_', '-')} must be one of {names}, got {value!r}.")
    check_flag_ranges(arguments, LIMITS)
    frame_size(arguments)
    return PROTOCOLS[arguments.protocol]


def _open_prepared(arguments: argparse.Namespace) -> tuple[Any, str]:
    """Open the episodes with the requested actions, frame rate and frame size; also return their split."""
    from ..data import PreparedEpisodes

    source = open_dataset(arguments)
    dataset = PreparedEpisodes(
        source,
        arguments.action_derivation,
        arguments.state_key,
        arguments.frame_skip,
        arguments.action_composition,
        arguments.pad_actions_to,
        frame_size(arguments),
    )
    return dataset, getattr(source, "split", arguments.split or "test") or "all episodes"


def _load_predictor(arguments: argparse.Namespace, dataset: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Load the predictor, the encoder for latent L2, and their description for the report."""
    from ..evaluation import FolderPredictor, PipelinePredictor

    name, predictions = arguments.model, arguments.predictions
    if predictions is not None:
        folder = FolderPredictor(predictions, arguments.resize)
        if name is None:
            return folder, None, {"predictions": str(predictions)}
    arguments.model = str(embedded_checkpoint()) if name is None else name
    pipeline = load_pipeline(arguments)
    pipeline.set_progress_bar_config(disable=True)
    predictor = PipelinePredictor(pipeline, arguments.steps, arguments.seed, arguments.resize, arguments.batch_size)
    encode = None if pipeline.vae is None else predictor.encode
    dtype = str(pipeline.transformer.dtype).removeprefix("torch.")
    if predictions is not None:
        if encode is None:
            raise ValueError(
                f"--model provides the autoencoder for --predictions, but {name!r} has none: omit --model."
            )
        folder.autoencoder = predictor.autoencoder
        setting = {"autoencoder": name, "weights": predictor.autoencoder, "dtype": dtype}
        return folder, encode, setting | {"predictions": str(predictions)}
    predictor.check_dataset(dataset)
    setting = predictor.setting | {"dtype": dtype} | ({"lora": arguments.lora} if arguments.lora else {})
    return predictor, encode, {"model": name or "the embedded Push-T model"} | setting


def _load_backbones(arguments: argparse.Namespace) -> Any:
    from ..evaluation import Backbones
    from ..metrics import load_i3d, load_inception, load_lpips

    device = arguments.device
    return Backbones(
        None if arguments.lpips is None else load_lpips(arguments.lpips or None, device),
        None if arguments.inception is None else load_inception(arguments.inception, device),
        None if arguments.i3d is None else load_i3d(arguments.i3d, device),
        device,
    )


def _versions() -> dict[str, str]:
    import diffusers
    import torch

    return {"irasim_diffusers": __version__, "diffusers": diffusers.__version__, "torch": torch.__version__}


def _print_report(report: dict[str, Any]) -> None:
    psnr, last = report["metrics"]["psnr"], report["last_frame"]["psnr"]
    print(
        f"{report['protocol']['name']}, {report['n']} clips: PSNR {psnr['mean']:.2f} dB [{psnr['low']:.2f}, {psnr['high']:.2f}] "
        f"(last-frame baseline: {last['mean']:.2f} dB), SSIM "
        f"{report['metrics']['ssim']['mean']:.3f}"
    )
    if "faithfulness" in report:
        print(report["faithfulness"]["verdict"]["text"])
