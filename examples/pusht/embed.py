"""Embed a trained Push-T pipeline in the package, with one held-out clip.

    python examples/pusht/embed.py --model runs/pusht --dataset data/pusht-test --episode 3 --start 20

Weights are stored in bfloat16. The clip consists of a lossless video of the history frames and `--num_actions` further
frames, the actions, and a film strip and an animation of the prediction. `starts.png` contains the first frames of
up to `--num_starts` episodes, from which environments start. The folders `proprioception` and `reward`
(`train_proprioception.py`, `train_reward.py`) are copied if the trained model contains them; otherwise, the embedded
ones are kept. The package is changed only after all files have been written.
"""

import json
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import PIL.Image
import torch
from transformers import HfArgumentParser

from irasim_diffusers import IRASimPipeline, embedded_checkpoint
from irasim_diffusers.commands import load_checked
from irasim_diffusers.data import LeRobotFolder, write_video
from irasim_diffusers.pictures import film_strip
from irasim_diffusers.training import check_ranges, run_script

PREFIX = ".embed-"


@dataclass
class EmbedArguments:
    model: str = field(metadata={"help": "pipeline folder to embed"})
    dataset: str = field(metadata={"help": "held-out LeRobotDataset folder"})
    episode: int = field(default=0, metadata={"help": "episode of the clip"})
    start: int = field(default=20, metadata={"help": "first frame of the clip"})
    num_actions: int = field(default=60, metadata={"help": "number of actions of the clip"})
    num_starts: int = field(
        default=64, metadata={"help": "maximum number of episodes whose first frames are stored in starts.png"}
    )


def check_arguments(arguments: EmbedArguments, dataset: LeRobotFolder, num_history_frames: int) -> None:
    """Check the arguments against the dataset before anything is written.

    Raises:
        ValueError: If a value is out of range.
    """
    check_ranges(arguments, not_negative=("start",), at_least_1=("num_actions", "num_starts"))
    if not 0 <= arguments.episode < len(dataset):
        raise ValueError(f"`episode` must be in 0..{len(dataset) - 1}, got {arguments.episode}.")
    length, needed = len(dataset.vectors(arguments.episode)["action"]), num_history_frames + arguments.num_actions
    if arguments.start + needed > length:
        raise ValueError(
            f"`start` plus {needed} frames must be at most {length}, the length of episode {arguments.episode}, got "
            f"{arguments.start + needed}: use an earlier start or a smaller `num_actions`."
        )


def save_model(arguments: EmbedArguments, pipeline: IRASimPipeline, target: Path) -> None:
    """Replace the model in a copy of the embedded checkpoint."""
    shutil.rmtree(target / "vae", ignore_errors=True)  # autoencoder of a previously embedded model
    pipeline.save_pretrained(target)
    for name in ("proprioception", "reward"):
        if (Path(arguments.model) / name).is_dir():
            shutil.copytree(Path(arguments.model) / name, target / name, dirs_exist_ok=True)
    # remove the local paths of the weights from the published configs
    for path in [target / "model_index.json", *target.glob("*/config.json")]:
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save_clip(arguments: EmbedArguments, dataset: LeRobotFolder, target: Path) -> None:
    """Write start frames, a held-out clip, its actions, and pictures of its prediction.

    The prediction uses the stored bfloat16 weights.
    """
    starts = [dataset.window(number, 0, 1).frames[0] for number in range(min(arguments.num_starts, len(dataset)))]
    PIL.Image.fromarray(np.concatenate(starts)).save(target / "starts.png", optimize=True)
    pipeline = IRASimPipeline.from_pretrained(target)
    history = pipeline.transformer.config.num_history_frames
    clip = dataset.window(arguments.episode, arguments.start, history + arguments.num_actions)
    actions = clip.actions[history - 1 : -1]  # the first one leads to the first predicted frame
    write_video(target / "example.mp4", clip.frames, dataset.fps, lossless=True)
    names = ",".join(pipeline.action_space.names)
    np.savetxt(target / "example_actions.csv", actions, delimiter=",", header=names, comments="", fmt="%.3f")
    generator = torch.Generator().manual_seed(0)
    predicted = pipeline(clip.frames[:history], actions, generator=generator, output_type="np").frames[0]
    prediction = np.concatenate([clip.frames[:history], (predicted * 255).round().astype(np.uint8)])
    film_strip({"truth": clip.frames, "prediction": prediction}, history).save(target / "example.png")
    first, *others = [PIL.Image.fromarray(pair) for pair in np.concatenate([clip.frames, prediction], axis=2)]
    first.save(target / "example.gif", save_all=True, append_images=others, duration=1000 / dataset.fps, loop=0)


def main() -> None:
    (arguments,) = HfArgumentParser(EmbedArguments).parse_args_into_dataclasses()
    target = embedded_checkpoint()
    dataset = LeRobotFolder(Path(arguments.dataset))
    pipeline = load_checked(
        "`model`", "a pipeline folder", arguments.model, IRASimPipeline.from_pretrained, dtype=torch.bfloat16
    )
    check_arguments(arguments, dataset, pipeline.transformer.config.num_history_frames)
    for leftover in target.parent.glob(PREFIX + "*"):  # of a killed run
        shutil.rmtree(leftover)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=PREFIX) as folder:  # on the disk of the target
        new = Path(folder) / "new"
        shutil.copytree(target, new)
        save_model(arguments, pipeline, new)
        save_clip(arguments, dataset, new)
        old = target.rename(Path(folder) / "old")
        try:
            new.rename(target)
        except BaseException:
            old.rename(target)
            raise
    print(f"embedded in {target}:")
    for path in sorted(target.rglob("*")):
        if path.is_file():
            print(f"{path.stat().st_size / 1e6:8.3f} MB  {path.relative_to(target)}")


if __name__ == "__main__":
    run_script(main)
