"""Embed a trained Push-T pipeline in the package, with one held-out clip.

    python examples/pusht/embed.py --model runs/pusht --dataset data/pusht-test --episode 3 --start 20

Weights are stored in bfloat16. The clip contains the history frames, 60 more frames and their 60 actions, as a lossless video. Its
preview image is the output of `irasim generate`. `starts.png` contains the first frames of `--num_starts` episodes, from which
environments start. The folders `proprioception` of `train_proprioception.py` and `reward` of `train_reward.py` are copied if the
trained model has them, otherwise the embedded ones are kept.
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
from irasim_diffusers.cli import main as generate
from irasim_diffusers.data import LeRobotFolder, write_video
from irasim_diffusers.training import run_script


@dataclass
class EmbedArguments:
    model: str = field(metadata={"help": "pipeline folder to embed"})
    dataset: str = field(metadata={"help": "held-out LeRobotDataset folder"})
    episode: int = field(default=0, metadata={"help": "episode of the clip"})
    start: int = field(default=20, metadata={"help": "first frame of the clip"})
    num_actions: int = field(default=60, metadata={"help": "actions of the clip"})
    num_starts: int = field(default=64, metadata={"help": "first frames of episodes in starts.png"})


def main() -> None:
    (arguments,) = HfArgumentParser(EmbedArguments).parse_args_into_dataclasses()
    target = embedded_checkpoint()
    pipeline = IRASimPipeline.from_pretrained(arguments.model, dtype=torch.bfloat16)
    dataset = LeRobotFolder(Path(arguments.dataset))
    shutil.rmtree(target / "vae", ignore_errors=True)  # remove the autoencoder of a previously embedded model
    pipeline.save_pretrained(target)
    for name in ("proprioception", "reward"):
        if (Path(arguments.model) / name).is_dir():
            shutil.copytree(Path(arguments.model) / name, target / name, dirs_exist_ok=True)
    # remove the local paths of the weights from the published configs
    for path in [target / "model_index.json", *target.glob("*/config.json")]:
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    starts = [dataset.window(number, 0, 1).frames[0] for number in range(min(arguments.num_starts, len(dataset)))]
    PIL.Image.fromarray(np.concatenate(starts)).save(target / "starts.png", optimize=True)

    episode = dataset[arguments.episode]
    history = pipeline.transformer.config.num_history_frames
    first = arguments.start + history - 1  # this action leads to the first predicted frame
    frames = episode.frames[arguments.start : arguments.start + history + arguments.num_actions]
    actions = episode.actions[first : first + arguments.num_actions]
    write_video(target / "example.mp4", frames, dataset.fps, lossless=True)
    names = ",".join(pipeline.transformer.config.action_names)
    np.savetxt(target / "example_actions.csv", actions, delimiter=",", header=names, comments="", fmt="%.3f")
    with tempfile.TemporaryDirectory() as folder:
        generate(["generate", "--output", f"{folder}/example.mp4"])
        shutil.copy(f"{folder}/example.png", target / "example.png")
    for path in sorted(target.rglob("*")):
        if path.is_file():
            print(f"{path.stat().st_size / 1e6:8.3f} MB  {path.relative_to(target)}")


if __name__ == "__main__":
    run_script(main)
