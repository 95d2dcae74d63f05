"""Train a convolutional next-frame baseline for Push-T on two history frames and an action map.

    python examples/pusht/convolutional.py --dataset data/pusht-train --output_dir runs/pusht-convolutional --max_minutes 30

The baseline is a residual network without attention at a quarter of the frame resolution. Like the transformer in
`train.py`, it is trained on recorded clips and on its own rollouts, with the squared error. `evaluate.py`
reports the same metrics for both. The same command resumes from the last checkpoint.
"""

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from simulator import ARENA
from torch import nn
from torch.nn import functional
from tqdm import tqdm
from transformers import HfArgumentParser

from irasim_diffusers.action_space import ActionSpace
from irasim_diffusers.data import LatentClips, PreparedEpisodes, cache_latents, open_dataset
from irasim_diffusers.devices import fast_dtype
from irasim_diffusers.files import temporary_path, write_text
from irasim_diffusers.json_files import read_json_object
from irasim_diffusers.pipelines import stack_frames
from irasim_diffusers.rollout import RolloutState
from irasim_diffusers.training import check_ranges, run_script

HISTORY = 2  # history frames
OCTAVES = 6  # frequencies of the action map
WEIGHTS = "convolutional.safetensors"


@dataclass
class BaselineArguments:
    dataset: str = field(metadata={"help": "LeRobotDataset folder made by collect.py"})
    output_dir: Path = field(metadata={"help": "folder for the model and its checkpoint"})
    max_minutes: float = field(default=30.0, metadata={"help": "training time in minutes"})
    batch_size: int = field(default=16, metadata={"help": "batch size"})
    learning_rate: float = field(default=1e-3, metadata={"help": "learning rate"})
    width: int = field(default=64, metadata={"help": "channels at a quarter of the resolution"})
    rollout_chunks: int = field(
        default=5, metadata={"help": "maximum number of frames that the model predicts before the frame of the loss"}
    )
    rollout_start: float = field(
        default=0.35,
        metadata={
            "help": "fraction of the training time after which the model also continues from its own predictions"
        },
    )
    cache_dir: Path | None = field(
        default=None, metadata={"help": "folder of the frame cache (default: output_dir/latents)"}
    )
    seed: int = field(default=0, metadata={"help": "random seed"})


class Residual(nn.Module):
    """Two 3x3 convolutions with a residual connection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, width)
        self.first = nn.Conv2d(width, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        nn.init.zeros_(self.second.weight)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Apply the block to (B, C, H, W)."""
        hidden = self.first(functional.silu(self.norm(hidden_states)))
        return hidden_states + self.second(functional.silu(hidden))


class ConvolutionalModel(nn.Module):
    """Convolutional network that predicts the change from the last history frame to the next frame.

    A `WorldModel` of `irasim_diffusers.rollout`: its latents are frames in [-1, 1].

    Args:
        width: Channels at a quarter of the resolution.
    """

    frame_size = (96, 96)
    fps = 10.0
    max_chunk = 15

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3 * 16, width, 3, padding=1)
        self.stem = nn.Sequential(Residual(width), Residual(width))
        self.action = nn.Conv2d(2 * (1 + 2 * OCTAVES), width, 1)
        self.join = nn.Conv2d((HISTORY + 1) * width, width, 3, padding=1)
        self.body = nn.Sequential(*(Residual(width) for _ in range(6)))
        self.out = nn.Conv2d(width, 3 * 16, 3, padding=1)
        nn.init.zeros_(self.out.weight)

    def forward(self, history: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """Predict the next frame (B, 3, H, W) from a history (B, 3, 2, H, W) in [-1, 1] and an action (B, 2)."""
        frames = functional.pixel_unshuffle(history.transpose(1, 2).flatten(0, 1), 4)
        rows, columns = frames.shape[-2:]
        features = self.stem(self.patch(frames)).unflatten(0, (-1, HISTORY)).flatten(1, 2)  # (B, 2 width, h, w)
        across, down = ((torch.arange(size, device=action.device) + 0.5) / size for size in (columns, rows))
        centers = torch.stack(torch.meshgrid(across, down, indexing="xy"))  # (2, h, w)
        offset = 4 * (centers - (action / ARENA)[:, :, None, None])  # (B, 2, h, w)
        waves = [
            wave(offset * 2**octave * math.pi / 4) for octave in range(OCTAVES) for wave in (torch.sin, torch.cos)
        ]
        hidden = self.join(torch.cat([features, self.action(torch.cat([offset, *waves], dim=1))], dim=1))
        change = functional.pixel_shuffle(self.out(self.body(hidden)), 4)
        return history[:, :, -1] + change

    @property
    def action_space(self) -> ActionSpace:
        """Targets of the pusher in arena units."""
        return ActionSpace.from_config(
            {"action_dim": 2, "action_space": "absolute", "action_low": 0.0, "action_high": float(ARENA)}
        )

    def start(self, frames: Any, seeds: Sequence[int]) -> RolloutState:
        """Start one rollout per seed from histories in any format that the pipeline accepts.

        The prediction is deterministic.
        """
        history = 2 * stack_frames(frames).transpose(1, 2) - 1
        return RolloutState.first(last_two(history).expand(len(seeds), -1, -1, -1, -1), seeds)

    def advance(
        self, state: RolloutState, actions: torch.Tensor, **sampling: Any
    ) -> tuple[RolloutState, torch.Tensor]:
        """Predict frames (B, 3, n, H, W) in [-1, 1] for actions (B, n, 2), and the state after them."""
        future = self.roll(state.latents, actions)
        return state.append(future, HISTORY), future

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Convert frames (B, 3, n, H, W) in [-1, 1] to (B, n, 3, H, W) in [0, 1]."""
        return latents.transpose(1, 2) / 2 + 0.5

    def roll(self, history: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
        """Predict frames (B, 3, n, H, W) for actions (B, n, 2), one after another."""
        frames = []
        for action in actions.unbind(1):
            frame = self(history, action).clamp(-1, 1)
            frames.append(frame)
            history = torch.cat([history[:, :, 1:], frame[:, :, None]], dim=2)
        return torch.stack(frames, dim=2)

    @torch.no_grad()
    def predict(self, frames: np.ndarray, actions: np.ndarray) -> np.ndarray:
        """Predict frames (B, n, H, W, 3) in [0, 1].

        Args:
            frames: History (h, H, W, 3) or (B, h, H, W, 3), uint8.
            actions: Actions (B, n, 2) in arena units.
        """
        frames = frames if frames.ndim == 5 else frames[None]
        history = torch.from_numpy(np.ascontiguousarray(frames)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        history = last_two(history).expand(len(actions), -1, -1, -1, -1)
        return (self.roll(history, torch.from_numpy(actions).float()) / 2 + 0.5).permute(0, 2, 3, 4, 1).numpy()


def last_two(history: torch.Tensor) -> torch.Tensor:
    """Return the last two frames (B, 3, 2, H, W) of a history (B, 3, h, H, W); a single frame is repeated."""
    return history[:, :, [-min(HISTORY, history.shape[2]), -1]]


def load(folder: Path) -> ConvolutionalModel:
    """Load a trained baseline."""
    model = ConvolutionalModel(read_json_object(folder / "config.json")["width"])
    model.load_state_dict(load_file(folder / WEIGHTS))
    return model.eval()


def loss_of(model: ConvolutionalModel, clip: dict[str, torch.Tensor], rng: np.random.Generator, chunks: int) -> Any:
    """Return the mean squared error of the frame that follows `chunks` predicted frames.

    30 % of the clips keep their true history.
    """
    latents, actions = clip["latents"], clip["actions"][:, HISTORY - 1 :]
    history = latents[:, :, :HISTORY]
    if chunks:
        with torch.no_grad():
            history = torch.cat([history, model.roll(history, actions[:, :chunks])], dim=2)[:, :, -HISTORY:]
        torch.clear_autocast_cache()  # before torch 2.11 the cache keeps weights that were cast without gradient
        true_history = torch.from_numpy(rng.random(len(latents)) < 0.3).view(-1, 1, 1, 1, 1)
        history = torch.where(true_history, latents[:, :, chunks : chunks + HISTORY], history)
    return (model(history, actions[:, chunks]) - latents[:, :, HISTORY + chunks]).square().mean()


class Training:
    """A model with its optimizer, averaged weights and progress; `save` and `resume` keep all of it."""

    def __init__(self, arguments: BaselineArguments) -> None:
        self.arguments, self.path = arguments, arguments.output_dir / "checkpoint.pt"
        torch.manual_seed(arguments.seed)
        self.model = ConvolutionalModel(arguments.width)
        average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.99)
        self.average = torch.optim.swa_utils.AveragedModel(self.model, multi_avg_fn=average)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), arguments.learning_rate, betas=(0.9, 0.99), weight_decay=0.0
        )
        self.step, self.seconds = 0, 0.0

    def settings(self) -> dict[str, Any]:
        """Return the arguments, which must not change in a resumed run, as JSON values."""
        return json.loads(json.dumps(asdict(self.arguments), default=str))

    def save(self) -> None:
        """Write the state from which a run resumes."""
        state = {name: getattr(self, name).state_dict() for name in ("model", "average", "optimizer")}
        with temporary_path(self.path) as partial:
            torch.save(state | {"step": self.step, "seconds": self.seconds, "settings": self.settings()}, partial)

    def resume(self) -> None:
        """Restore the last checkpoint, if one exists.

        Raises:
            ValueError: If its settings differ.
        """
        if not self.path.is_file():
            return
        state = torch.load(self.path, weights_only=True)
        if state["settings"] != self.settings():
            raise ValueError(
                f"{str(self.path.parent)!r} contains a run with other settings: {state['settings']}; choose a new folder."
            )
        for name in ("model", "average", "optimizer"):
            getattr(self, name).load_state_dict(state[name])
        self.step, self.seconds = state["step"], state["seconds"]

    def run(self, clips: LatentClips) -> None:
        """Train for `max_minutes`, and save a checkpoint every minute."""
        limit = 60 * self.arguments.max_minutes
        saved = time.perf_counter()
        start = saved - self.seconds
        with tqdm(total=round(limit), initial=round(self.seconds), unit="s") as bar:
            while self.seconds < limit:
                loss = self.update(clips, self.seconds / limit)
                self.seconds = time.perf_counter() - start
                bar.update(round(self.seconds) - bar.n)
                bar.set_postfix(step=self.step, loss=f"{loss:.5f}")
                if time.perf_counter() - saved > 60:
                    self.save()
                    saved = time.perf_counter()
        self.save()

    def update(self, clips: LatentClips, share: float) -> float:
        """Make one step after the given share of the training time; return the loss.

        Raises:
            FloatingPointError: If the loss is not finite.
        """
        arguments, rng = self.arguments, np.random.default_rng([self.arguments.seed, self.step])
        rate = arguments.learning_rate * min(1, (self.step + 1) / 50) * (1 + math.cos(math.pi * share)) / 2
        self.optimizer.param_groups[0]["lr"] = rate
        chunks = int(rng.integers(arguments.rollout_chunks + 1)) if share >= arguments.rollout_start else 0
        batch = torch.utils.data.default_collate(
            [clips[int(k)] for k in rng.integers(len(clips), size=arguments.batch_size)]
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=fast_dtype("cpu") == torch.bfloat16):
            loss = loss_of(self.model, batch, rng, chunks)
        if not math.isfinite(loss.item()):
            raise FloatingPointError(f"the loss is {loss.item()} at step {self.step}: use a lower `learning_rate`.")
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.average.update_parameters(self.model)
        self.step += 1
        return loss.item()


def main() -> None:
    (arguments,) = HfArgumentParser(BaselineArguments).parse_args_into_dataclasses()
    check_ranges(
        arguments,
        not_negative=("rollout_chunks", "seed"),
        at_least_1=("batch_size", "width"),
        positive=("max_minutes", "learning_rate"),
        fractions=("rollout_start",),
    )
    output, training = arguments.output_dir, Training(arguments)
    training.resume()
    episodes = PreparedEpisodes(open_dataset(arguments.dataset))  # as in train.py, to share its cache
    cache = cache_latents(episodes, None, arguments.cache_dir or output / "latents")
    training.run(LatentClips(cache, HISTORY + 1 + arguments.rollout_chunks))
    write_text(output / "config.json", json.dumps(training.settings() | {"steps": training.step}, indent=2))
    with temporary_path(output / WEIGHTS) as partial:
        save_file(training.average.module.state_dict(), partial)


if __name__ == "__main__":
    run_script(main)
