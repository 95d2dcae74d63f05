"""The `irasim` command."""

from __future__ import annotations

import argparse
import csv
import inspect
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import numpy as np

from . import IRASimPipeline, IRASimTransformer3DModel, __version__, embedded_checkpoint

SCHEDULERS = {
    "pndm": "PNDMScheduler",
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "unipc": "UniPCMultistepScheduler",
    "lcm": "LCMScheduler",
    "flow-euler": "FlowMatchEulerDiscreteScheduler",
}
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp"}


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: Arguments; None takes those of the process.

    Returns:
        Exit status: 0, or 2 after bad input, which is said in one line.
    """
    arguments = _parser().parse_args(argv)
    arguments.argv = sys.argv[1:] if argv is None else argv
    try:
        arguments.run(arguments)
    except (ValueError, OSError) as error:
        print(f"irasim: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="irasim", description="Robot world models after IRASim.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="command")
    generate = commands.add_parser(
        "generate",
        help="predict the video of given actions",
        description="Predict the video of given actions. Without arguments: the embedded Push-T model on its held-out clip.",
    )
    generate.set_defaults(run=run_generate)
    _add_sampling(generate, dtype="float32")
    add = generate.add_argument
    add("--actions", type=Path, help=".npy, .csv or .json of actions (n, A), in the units of the model's action space")
    add("--output", type=Path, default=Path("irasim.mp4"), help="mp4 to write, and a .png strip beside it")

    play = commands.add_parser(
        "play",
        help="drive the robot with the keyboard",
        description="Drive the robot with the keyboard, in a terminal, and save the video and the actions. Without arguments: "
        "the embedded Push-T model from the first frames of its held-out clip.",
    )
    play.set_defaults(run=run_play)
    _add_sampling(play, dtype="auto")
    add = play.add_argument
    add("--start", type=float, nargs="+", metavar="VALUE", help="action to go on from, where actions are absolute")
    add("--speed", type=float, default=0.5, help="of a held key, in normalised actions a frame (default: %(default)s)")
    add(
        "--chunk",
        type=int,
        default=2,
        help="frames predicted together: more are faster, and answer later (%(default)s)",
    )
    add("--script", help="drive by this instead of keys, without a terminal: 'right*10 hold*5 up+right*10'")
    add("--output", type=Path, default=Path("drive.mp4"), help="mp4 to write, and a .npy of the actions (%(default)s)")

    convert = commands.add_parser(
        "convert",
        help="turn pretrained weights into a pipeline folder",
        description="Turn pretrained weights into a pipeline folder: released IRASim checkpoints as they are, Open-Sora "
        "(STDiT3) and Latte to start training from. No code in a file is run.",
    )
    convert.set_defaults(run=run_convert)
    add = convert.add_argument
    add("--source", choices=("irasim", "opensora", "latte"), default="irasim", help="default: %(default)s")
    add("--checkpoint", type=Path, required=True, help=".pt file of the release; safetensors file or folder")
    add("--dataset", choices=("rt1", "bridge", "languagetable"), help="data set of a released IRASim checkpoint")
    add("--weights", choices=("ema", "model"), default="ema", help="of a released checkpoint (default: %(default)s)")
    add("--final-frame-ada", action="store_true", help="a released checkpoint whose final layer sees the actions")
    add("--vae", required=True, help="SDXL autoencoder: folder or Hub id; append ':<subfolder>' where it has one")
    add("--config", nargs="*", default=[], metavar="KEY=VALUE", help="config entries, values in JSON: action_dim=7")
    add("--output", type=Path, required=True, help="pipeline folder to write")

    data = commands.add_parser(
        "data",
        help="write clips as a LeRobotDataset, or publish them",
        description="Write clips of any form that train.py reads as a LeRobotDataset v3.0 with a card, and publish it where "
        "asked. The same command run again goes on.",
    )
    data.set_defaults(run=run_data)
    add = data.add_argument
    _add_dataset(data, "train")
    add("--skip-broken", action="store_true", help="leave out episodes that cannot be read, and name them")
    add("--robot-type", default="unknown", help="name of the robot")
    add("--output", type=Path, required=True, help="folder to write")
    add("--push-to-hub", metavar="ORG/NAME", help="publish the folder as this data set")
    _add_evaluate(commands)
    return parser


def _add_sampling(command: argparse.ArgumentParser, dtype: str) -> None:
    add = command.add_argument
    add("--model", default=str(embedded_checkpoint()), help="pipeline folder or Hub id (default: the embedded Push-T)")
    add("--frames", type=Path, help="image or video that starts with the history; later frames serve as truth")
    add("--history", type=int, help="history frames taken from a video (default: as many as the model takes)")
    add("--steps", type=int, help="denoising steps of each window (default: the model's)")
    add("--scheduler", choices=SCHEDULERS, help="sampler (default: the model's)")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--device", default="auto", help="cpu, cuda, ... (default: cuda where there is one)")
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default=dtype,
        help="auto: bfloat16 where the device multiplies in it, else float32 (default: %(default)s)",
    )
    add("--resize", action="store_true", help="resize frames of another size to the model's")


def _add_dataset(command: argparse.ArgumentParser, split: str | None) -> None:
    add = command.add_argument
    add("--dataset", required=True, help="LeRobotDataset, IRASim-format or `datasets` folder, or Hub id")
    add("--cameras", nargs="*", default=[], help="cameras, stacked into one picture; left,right makes a row")
    default = split or "test, or all episodes of a LeRobotDataset without one"
    add("--split", default=split, help=f"split of the data, or a part of one as train[90%%:] (default: {default})")
    add("--fps", type=float, help="frames a second, where the data do not record them")
    add("--action-column", default="actions", help="of `datasets` data (default: %(default)s)")
    add("--state-columns", nargs="*", default=[], help="of `datasets` data")


def _add_evaluate(commands: Any) -> None:
    from .actions import DERIVATIONS
    from .evaluation import PROTOCOLS, PUBLISHED_DATASETS

    evaluate = commands.add_parser(
        "evaluate",
        help="score predictions of recorded clips, and whether the model obeys its actions",
        description="Score a model, or predictions in a folder, on recorded clips by a named protocol: the paper's figures, "
        "obedience to actions, plots. The same command again goes on where it was stopped; under `accelerate launch -m "
        "irasim_diffusers.cli evaluate` several processes share the clips.",
    )
    evaluate.set_defaults(run=run_evaluate)
    _add_dataset(evaluate, None)
    add = evaluate.add_argument
    add(
        "--model",
        help="pipeline folder or Hub id (default: the embedded Push-T); with --predictions, for its autoencoder",
    )
    add("--predictions", type=Path, help="score this folder's <clip>.npz or <clip>.mp4 instead of a model")
    add("--protocol", choices=PROTOCOLS, default="irasim-short", help="default: %(default)s")
    add("--num-clips", type=int, help="clips to score, spread evenly over the data (default: all)")
    add("--output", type=Path, default=Path("irasim-evaluation"), help="folder to write (default: %(default)s)")
    add(
        "--save-predictions",
        type=Path,
        help="folder for the predictions, as --predictions reads",
    )
    add("--save-truth", type=Path, help="the same for what truly happened, for a preference study")
    add("--published", choices=PUBLISHED_DATASETS, help="the paper's figures on this data set, beside")
    add(
        "--faithfulness-clips",
        type=int,
        default=200,
        help="clips with changed actions; 0: none (default: %(default)s)",
    )
    add("--ways", type=int, default=4, help="futures that identification chooses from (default: %(default)s)")
    add(
        "--lpips", nargs="?", const="", metavar="ALEXNET", help="LPIPS; AlexNet's file or org/name:file, or downloaded"
    )
    add("--inception", metavar="WEIGHTS", help="FID; pytorch-fid's weights, a file or org/name:file")
    add("--i3d", metavar="FILE", help="FVD; StyleGAN-V's i3d_torchscript.pt. Loading it runs code of the file")
    add("--steps", type=int, help="denoising steps of each window (default: the model's)")
    add("--scheduler", choices=SCHEDULERS, help="sampler (default: the model's)")
    add("--seed", type=int, default=0, help="default: %(default)s")
    add("--batch-size", type=int, default=8, help="windows predicted together (default: %(default)s)")
    add("--device", default="auto", help="cpu, cuda, ... (default: cuda where there is one)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="default: %(default)s")
    add(
        "--resize",
        action="store_true",
        help="resize frames for a model of another size, and predictions to the truth's",
    )
    add("--skip-broken", action="store_true", help="skip episodes that cannot be read, and list them in the report")
    add(
        "--height",
        type=int,
        help="with --width: size to which the data are brought, as the paper brings Bridge to 256x320",
    )
    add("--width", type=int, help="see --height")
    add("--action-derivation", choices=DERIVATIONS, default="recorded", help="as the model was trained (%(default)s)")
    add("--state-key", help="the state that actions are derived from")
    add("--frame-skip", type=int, default=1, help="keep every frame of that number (default: %(default)s)")
    add("--action-composition", choices=DERIVATIONS[1:], help="how recorded actions compose over skipped frames")
    add("--pad-actions-to", type=int, help="components after padding with zeros")


def run_data(arguments: argparse.Namespace) -> None:
    """`irasim data`: read any form, write one, with a card, and publish it."""
    from huggingface_hub import HfApi
    from tqdm.auto import tqdm

    from .data import publish_lerobot, write_dataset_card, write_lerobot

    output: Path = arguments.output
    if output.exists() and not output.is_dir():
        raise ValueError(f"--output must be a folder, got the file {str(output)!r}.")
    source = _open_dataset(arguments)
    if arguments.push_to_hub:  # before hours of work
        HfApi().create_repo(arguments.push_to_hub, repo_type="dataset", exist_ok=True)
    skipped: list[str] = []
    with tqdm(total=len(source), desc="writing clips", unit="episode") as bar:

        def on_episode(_: int, error: str | None) -> None:
            bar.update()
            if error is not None:
                skipped.append(error)
                bar.write(f"skipped: {error}")

        folder = write_lerobot(
            source,
            output,
            robot_type=arguments.robot_type,
            skip_broken=arguments.skip_broken,
            on_episode=on_episode,
        )
    tiled = sum(len(row) for row in source.cameras) > 1
    names = "; ".join(", ".join(row) for row in source.cameras)
    write_dataset_card(
        folder, arguments.push_to_hub or output.name, f", the cameras tiled by rows: {names}" if tiled else ""
    )
    print(f"{len(folder)} episodes written to {output}, {len(skipped)} skipped")
    if arguments.push_to_hub:
        publish_lerobot(folder, arguments.push_to_hub)
        print(f"published as {arguments.push_to_hub}")


def _open_dataset(arguments: argparse.Namespace) -> Any:
    from .data import open_dataset

    return open_dataset(
        arguments.dataset,
        arguments.cameras or None,
        split=arguments.split,
        fps=arguments.fps,
        action_column=arguments.action_column,
        state_columns=arguments.state_columns,
    )


def run_evaluate(arguments: argparse.Namespace) -> None:
    """`irasim evaluate`: open data and model, evaluate, print what a reader wants first."""
    from datetime import timedelta

    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    from .data import PreparedEpisodes
    from .evaluation import PROTOCOLS, Evaluation, evaluate

    start = time.perf_counter()
    if arguments.output.exists() and not arguments.output.is_dir():
        raise ValueError(f"--output must be a folder, got the file {str(arguments.output)!r}.")
    for flag, value in (("batch-size", arguments.batch_size), ("num-clips", arguments.num_clips)):
        if value is not None and value < 1:
            raise ValueError(f"--{flag} must be at least 1, got {value}.")
    if (arguments.height is None) != (arguments.width is None):
        raise ValueError("--height and --width go together.")
    kwargs = InitProcessGroupKwargs(timeout=timedelta(days=1))  # one process may predict for long
    accelerator = Accelerator(cpu=arguments.device == "cpu", kwargs_handlers=[kwargs])
    if arguments.device == "auto":
        arguments.device = str(accelerator.device)
    source = _open_dataset(arguments)
    dataset = PreparedEpisodes(
        source,
        arguments.action_derivation,
        arguments.state_key,
        arguments.frame_skip,
        arguments.action_composition,
        arguments.pad_actions_to,
        (arguments.height, arguments.width) if arguments.height else None,
    )
    predictor, encode, setting = _load_predictor(arguments, dataset)
    networks = {name: getattr(arguments, name) for name in ("lpips", "inception", "i3d")}
    split = getattr(source, "split", arguments.split or "test") or "all episodes"
    report = evaluate(
        Evaluation(
            dataset,
            PROTOCOLS[arguments.protocol],
            predictor,
            arguments.output,
            num_clips=arguments.num_clips,
            batch_size=arguments.batch_size,
            seed=arguments.seed,
            encode=encode,
            backbones=_load_backbones(arguments),
            faithfulness_clips=arguments.faithfulness_clips,
            ways=arguments.ways,
            skip_broken=arguments.skip_broken,
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


def _load_predictor(arguments: argparse.Namespace, dataset: Any) -> tuple[Any, Any, dict[str, Any]]:
    """What predicts, what encodes for latent L2, and what the report says of both."""
    from .evaluation import FolderPredictor, PipelinePredictor

    name, predictions = arguments.model, arguments.predictions
    if predictions is not None:
        folder = FolderPredictor(predictions, arguments.resize)
        if name is None:
            return folder, None, {"predictions": str(predictions)}
    arguments.model = name or str(embedded_checkpoint())
    pipeline = _load_pipeline(arguments)
    pipeline.set_progress_bar_config(disable=True)
    predictor = PipelinePredictor(pipeline, arguments.steps, arguments.seed, arguments.resize, arguments.batch_size)
    encode = None if pipeline.vae is None else predictor.encode
    if predictions is not None:
        if encode is None:
            raise ValueError(f"--model is for its autoencoder here, and {name!r} has none: leave it out.")
        folder.autoencoder = predictor.autoencoder
        setting = {"autoencoder": name, "weights": predictor.autoencoder, "dtype": arguments.dtype}
        return folder, encode, setting | {"predictions": str(predictions)}
    predictor.check_dataset(dataset)
    setting = predictor.setting | {"dtype": arguments.dtype}
    return predictor, encode, {"model": name or "the embedded Push-T model"} | setting


def _load_backbones(arguments: argparse.Namespace) -> Any:
    from .evaluation import Backbones
    from .metrics import load_i3d, load_inception, load_lpips

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
    psnr, last, gain = report["metrics"]["psnr"], report["last_frame"]["psnr"], report["gain_over_last_frame"]
    print(
        f"{report['protocol']['name']}, {report['n']} clips: PSNR {psnr['mean']:.2f} dB [{psnr['low']:.2f}, {psnr['high']:.2f}] "
        f"(repeating the last seen frame: {last['mean']:.2f} dB; PSNR of clips gains {gain['mean']:.2f} dB over it), SSIM "
        f"{report['metrics']['ssim']['mean']:.3f}"
    )
    if "faithfulness" in report:
        print(report["faithfulness"]["verdict"]["text"])


def run_generate(arguments: argparse.Namespace) -> None:
    """`irasim generate`: check everything, predict, write video and strip, print the figures."""
    start = time.perf_counter()
    strip_path = arguments.output.with_suffix(".png")
    _check_output(arguments.output, ".mp4")
    _check_output(strip_path, ".png")
    if arguments.frames is not None and arguments.actions is None:
        raise ValueError("--actions is wanted beside --frames: a .npy, .csv or .json file of actions, a row a frame.")
    example = embedded_checkpoint()
    video = read_frames(arguments.frames or example / "example.mp4")
    actions = read_actions(arguments.actions or example / "example_actions.csv")
    pipeline = _load_pipeline(arguments)
    history = _history_length(arguments, pipeline, len(video))
    # frames after the history are the truth of these actions only if frames and actions come from one recording
    truth = video[history:][: len(actions)] if (arguments.frames is None) == (arguments.actions is None) else video[:0]

    import torch

    evaluations = 0

    def count(*_: object) -> None:
        nonlocal evaluations
        evaluations += 1

    pipeline.transformer.register_forward_hook(count)
    sampling_start = time.perf_counter()
    frames = pipeline(
        video[:history],
        actions,
        num_inference_steps=arguments.steps,
        generator=torch.Generator().manual_seed(arguments.seed),
        resize=arguments.resize,
        output_type="np",
    ).frames[0]
    sampling = time.perf_counter() - sampling_start
    prediction = (frames * 255).round().astype(np.uint8)
    seen = video[:history]
    if seen.shape[1:] != prediction.shape[1:]:
        seen, truth = prediction[:0], truth[:0]  # resized: the truth is of another size
    fps = _frame_rate(arguments.frames) or pipeline.transformer.config.fps or 10.0
    _write_outputs(arguments.output, strip_path, seen, prediction, truth, fps)

    if len(truth):
        from .metrics import psnr

        compared = prediction[: len(truth)]
        last = np.broadcast_to(seen[-1:], truth.shape)
        print(
            f"PSNR {psnr(compared / 255.0, truth / 255.0):.2f} dB over {len(truth)} frames against the raw true frames "
            f"(repeating the last seen frame: {psnr(last / 255.0, truth / 255.0):.2f} dB)"
        )
    print(
        f"{len(prediction)} frames in {sampling:.1f} s, {len(prediction) / sampling:.1f} frames/s, {evaluations} network "
        f"evaluations with {type(pipeline.scheduler).__name__}; {time.perf_counter() - start:.1f} s with loading"
    )
    print(f"wrote {arguments.output} and {strip_path}")


def run_play(arguments: argparse.Namespace) -> None:
    """`irasim play`: check everything, drive by keys or a script, save what was driven however it ended."""
    from . import DrivingSession, Steering
    from .play import check_terminal, follow, play

    if arguments.script is None:
        check_terminal()
    _check_output(arguments.output, ".mp4")
    _check_output(arguments.output.with_suffix(".npy"), ".npy")
    if not 0 < arguments.speed < float("inf"):
        raise ValueError(f"--speed must be positive, got {arguments.speed}.")
    example = embedded_checkpoint()
    video, start = read_frames(arguments.frames or example / "example.mp4"), arguments.start
    if arguments.frames is None and start is None:
        start = read_actions(example / "example_actions.csv")[0]
    pipeline = _load_pipeline(arguments)
    pipeline.set_progress_bar_config(disable=True)
    config = pipeline.transformer.config
    if start is not None and len(start) != config.action_dim:
        raise ValueError(
            f"--start must have {config.action_dim} values, one a component of the action, got {len(start)}."
        )
    history = video[: _history_length(arguments, pipeline, len(video))]
    session = DrivingSession(
        pipeline,
        history,
        Steering(config, arguments.speed, start),
        arguments.seed,
        num_inference_steps=arguments.steps,
        resize=arguments.resize,
    )
    if not 1 <= arguments.chunk <= session.longest_step:
        raise ValueError(f"--chunk must be in [1, {session.longest_step}], got {arguments.chunk}.")
    try:
        if arguments.script is None:
            rate = play(session, arguments.chunk)
        else:
            rate = follow(session, arguments.script, arguments.chunk)
    finally:
        if len(session):
            wrote = session.save(arguments.output)
    if len(session):
        print(f"{len(session)} frames, {rate:.1f} frames/s; wrote {' and '.join(map(str, wrote))}")
    else:
        print("nothing was driven, nothing was written")


def run_convert(arguments: argparse.Namespace) -> None:
    """`irasim convert`: read, check every tensor, write a complete pipeline, print what mapped to what."""
    output: Path = arguments.output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"--output must be a new or empty folder, got {str(output)!r}.")
    from diffusers import AutoencoderKL, PNDMScheduler
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    from .conversion import ConversionReport, load_latte, load_opensora, load_released_irasim
    from .files import temporary_folder
    from .models import noise_process

    report, config = ConversionReport(), dict(_read_setting(text) for text in arguments.config)
    if arguments.source == "opensora" and "fps" not in config:
        raise ValueError("--config fps=<frames a second of your clips> is wanted for Open-Sora, which embeds it.")
    if arguments.source == "irasim" and arguments.dataset is None:
        raise ValueError("--dataset is wanted for a released IRASim checkpoint: rt1, bridge or languagetable.")
    path, _, subfolder = arguments.vae.partition(":")
    try:
        vae = AutoencoderKL.from_pretrained(path, subfolder=subfolder or None)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"--vae must be an AutoencoderKL, a folder or Hub id, got {arguments.vae!r}: {error}"
        ) from error
    loaders: dict[str, Callable[..., IRASimTransformer3DModel]] = {
        "irasim": load_released_irasim,
        "opensora": load_opensora,
        "latte": load_latte,
    }
    released = {name: getattr(arguments, name) for name in ("dataset", "weights", "final_frame_ada")}
    options = released if arguments.source == "irasim" else {}
    try:
        transformer = loaders[arguments.source](arguments.checkpoint, report=report, **options, **config)
    except (TypeError, ZeroDivisionError, RuntimeError) as error:  # what layers make of values they cannot have
        raise ValueError(f"--config must make a model, got {' '.join(arguments.config)!r}: {error}") from error
    if vae.config.latent_channels != transformer.config.in_channels:
        raise ValueError(
            f"--vae must have {transformer.config.in_channels} latent channels, as the weights, got {arguments.vae!r} with "
            f"{vae.config.latent_channels}."
        )
    scheduler: SchedulerMixin
    if transformer.config.prediction_type == "flow_prediction":
        scheduler = noise_process(transformer.config)
    else:  # as the release samples: with the Runge-Kutta warm-up, 59 network evaluations at 50 steps
        names = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
        process = {name: transformer.config[name] for name in names}
        scheduler = PNDMScheduler(**process, timestep_spacing="linspace")
    with temporary_folder(output) as partial:
        IRASimPipeline(vae, transformer, scheduler).save_pretrained(partial)
    print(report)
    print(f"{len(report.mapped)} tensors mapped, {len(report.dropped)} dropped; wrote {output}")


def _read_setting(text: str) -> tuple[str, Any]:
    name, separator, value = text.partition("=")
    known = inspect.signature(IRASimTransformer3DModel.__init__).parameters
    if not separator or name not in known or name == "self":
        raise ValueError(f"--config must be KEY=VALUE with a key of the model's config, got {text!r}.")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        kind = known[name].annotation
        if str not in (kind, *get_args(kind)):
            wanted = getattr(kind, "__name__", kind)
            raise ValueError(f"--config {name} must be {wanted} in JSON, got {value!r}.") from None
        return name, value


def read_frames(path: Path) -> np.ndarray:
    """Frames (T, H, W, 3), uint8 RGB, of a video, or of an image as a video of one frame.

    Raises:
        ValueError: If the file is missing, unreadable, or not RGB.
    """
    if not path.is_file():
        raise ValueError(f"--frames must be an image or video file, got {str(path)!r}, which does not exist.")
    if path.suffix.lower() not in IMAGE_SUFFIXES:
        from .data import read_video

        try:
            return read_video(path)
        except ValueError as error:
            raise ValueError(f"--frames must be a readable image or video: {error}") from error
    import PIL.Image

    try:
        with PIL.Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError) as error:
        raise ValueError(f"--frames must be a readable image, got {str(path)!r}: {error}.") from error
    if image.mode != "RGB":
        raise ValueError(
            f"--frames must be an RGB image, got mode {image.mode} in {str(path)!r}: convert it, "
            "`Image.open(path).convert('RGB').save(path)`."
        )
    return np.asarray(image)[None]


def read_actions(path: Path) -> np.ndarray:
    """Actions (n, A), float64, from a .npy, .csv (a header is skipped) or .json file (a list, or `{"actions": list}`).

    Raises:
        ValueError: If the file is missing, of another kind, or holds no table of numbers.
    """
    readers = {".npy": _read_npy, ".csv": _read_csv, ".json": _read_json}
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise ValueError(f"--actions must be a .npy, .csv or .json file, got {str(path)!r}.")
    if not path.is_file():
        raise ValueError(f"--actions must be a file, got {str(path)!r}, which does not exist.")
    try:
        actions = np.asarray(reader(path), dtype=np.float64)
    except (ValueError, TypeError, KeyError, EOFError) as error:
        raise ValueError(f"--actions must be a table of numbers, a row a frame, in {str(path)!r}: {error}.") from error
    if actions.ndim != 2:
        raise ValueError(f"--actions must be (n, A), a row a frame, got {actions.shape} in {str(path)!r}.")
    return actions


def _read_npy(path: Path) -> np.ndarray:
    return np.load(path, allow_pickle=False)


def _read_csv(path: Path) -> list[list[float]]:
    with path.open(newline="", encoding="utf-8-sig") as file:  # spreadsheets begin with a byte-order mark
        rows = [row for row in csv.reader(file) if row]
    if rows and (not _is_number(rows[0][0]) or _is_numbered_header(rows)):
        rows = rows[1:]
    return [[float(value) for value in row] for row in rows]


def _is_numbered_header(rows: list[list[str]]) -> bool:
    """Whether the first row is 0, 1, ..., A - 1, the header that pandas writes for columns without names.

    A single column counts only if no other row is an integer, since its first action may be 0.
    """
    if rows[0] != [str(column) for column in range(len(rows[0]))]:
        return False
    return len(rows[0]) > 1 or not any(row[0].strip().lstrip("+-").isdigit() for row in rows[1:])


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _read_json(path: Path) -> list:
    content = json.loads(path.read_text(encoding="utf-8-sig"))
    return content["actions"] if isinstance(content, dict) else content


def _check_output(path: Path, suffix: str) -> None:
    if path.is_dir():
        raise ValueError(f"--output must be a file, got the directory {str(path)!r}: add a file name ending in .mp4.")
    if path.suffix.lower() != suffix:
        raise ValueError(f"--output must end in .mp4, got {str(path)!r}.")
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    try:
        tempfile.TemporaryFile(dir=folder).close()  # permissions alone do not tell: some file systems refuse root too
    except OSError as error:
        raise ValueError(
            f"--output must be writable, got {str(path)!r}: {error.strerror} in {str(folder)!r}; choose another folder."
        ) from error


def _load_pipeline(arguments: argparse.Namespace) -> IRASimPipeline:
    import diffusers
    import torch

    from .devices import default_device, fast_dtype

    if arguments.steps is not None and arguments.steps < 1:
        raise ValueError(f"--steps must be at least 1, got {arguments.steps}.")
    device = default_device() if arguments.device == "auto" else arguments.device
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device must be a device of this machine, got {device!r}: {error}") from error
    dtype = fast_dtype(device) if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
    if dtype == torch.float16:  # in which SDXL's autoencoder overflows
        dtype = {"default": dtype, "vae": torch.float32}
    try:
        pipeline = IRASimPipeline.from_pretrained(arguments.model, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ValueError(f"--model must be a pipeline folder or Hub id, got {arguments.model!r}: {error}") from error
    if arguments.scheduler:
        kind = pipeline.transformer.config.prediction_type
        changes: dict[str, Any] = (
            {"prediction_type": "v_prediction"} if kind == "sample" else {}
        )  # which all of them take
        scheduler_class = getattr(diffusers, SCHEDULERS[arguments.scheduler])
        if "clip_sample" in inspect.signature(scheduler_class.__init__).parameters:  # PNDM's config does not say
            changes["clip_sample"] = False
        pipeline.scheduler = scheduler_class.from_config(pipeline.scheduler.config, **changes)
        try:
            pipeline.check_scheduler()
        except ValueError as error:
            raise ValueError(f"--scheduler {arguments.scheduler} does not fit the model: {error}") from error
    return pipeline.to(device)


def _history_length(arguments: argparse.Namespace, pipeline: IRASimPipeline, num_frames: int) -> int:
    wanted = arguments.history
    if wanted is None:
        wanted = pipeline.transformer.config.num_history_frames
    if wanted < 1:
        raise ValueError(f"--history must be at least 1, got {wanted}: the model starts from seen frames.")
    most = pipeline.transformer.config.num_history_frames
    if wanted > most:
        raise ValueError(f"--history must be at most {most} for this model, got {wanted}.")
    is_image = arguments.frames is not None and arguments.frames.suffix.lower() in IMAGE_SUFFIXES
    if is_image and arguments.history is None:
        return 1
    if num_frames < wanted:
        raise ValueError(
            f"--frames must hold at least the history of {wanted} frames, got {num_frames}: give a longer video, or "
            f"--history {num_frames}."
        )
    return wanted


def _frame_rate(path: Path | None) -> float | None:
    """Frames a second of the user's video, where there is one that tells."""
    if path is None or path.suffix.lower() in IMAGE_SUFFIXES:
        return None
    import av

    with av.open(str(path)) as container:
        return float(container.streams.video[0].average_rate or 0) or None


def _write_outputs(
    video_path: Path, strip_path: Path, seen: np.ndarray, prediction: np.ndarray, truth: np.ndarray, fps: float
) -> None:
    from .data import write_video
    from .files import temporary_path
    from .pictures import film_strip

    rows = {"prediction": np.concatenate([seen, prediction])}
    if len(truth):
        full = np.concatenate([seen, truth])
        missing = len(rows["prediction"]) - len(full)
        rows = {"truth": np.concatenate([full, np.repeat(full[-1:], missing, axis=0)]) if missing else full} | rows
    scale = max(1, 288 // prediction.shape[1])
    large = [frames.repeat(scale, axis=1).repeat(scale, axis=2) for frames in rows.values()]
    strip = film_strip(rows, len(seen))
    with temporary_path(strip_path) as partial:
        strip.save(partial)
        write_video(video_path, np.concatenate(large, axis=2), fps)


if __name__ == "__main__":
    sys.exit(main())
