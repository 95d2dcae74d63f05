"""Train a compact diffusion policy for Push-T on expert demonstrations, and evaluate it in the simulator.

    python examples/pusht/train_policy.py --datasets data/pusht-expert --output_dir runs/policy

Only the expert's episodes of the datasets are used. Checkpoints are saved at several stages of the training, so that policies of
different quality can be compared: `checkpoint-250` and so on, each with weights averaged over steps (EMA). Each stage is evaluated
on the same held-out starts. The score of an episode is the largest IoU of block and goal, and the success rate is the fraction of
episodes whose coverage of the goal exceeds 95 %, as in gym-pusht. The same command resumes an interrupted training at its newest
stage, with the same result.
"""

import json
import math
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from collect import TASKS
from diffusers.training_utils import EMAModel
from diffusion_policy import SCALE, DiffusionPolicy
from simulator import Simulator, State
from torch.nn import functional
from tqdm import tqdm
from train_reward import augment, ious
from transformers import HfArgumentParser

from irasim_diffusers.data import LeRobotFolder
from irasim_diffusers.files import temporary_path
from irasim_diffusers.metrics import bootstrap
from irasim_diffusers.training import require_finite, run_script

SUCCESS = 0.95  # coverage of the goal
FIRST_SEED = 4_000_000  # of the evaluated episodes, far from the seeds of the datasets


@dataclass
class PolicyArguments:
    datasets: list[Path] = field(metadata={"help": "LeRobotDataset folders made by collect.py"})
    output_dir: Path = field(metadata={"help": "folder for the checkpoints and report.json"})
    max_demonstrations: int = field(default=200, metadata={"help": "maximum number of expert episodes"})
    stages: list[int] = field(
        default_factory=lambda: [100, 250, 500, 1000, 1500, 2000, 3000, 4000, 6000, 8000],
        metadata={"help": "increasing numbers of steps after which a checkpoint is saved; the last ends the training"},
    )
    batch_size: int = 64
    num_draws: int = field(default=4, metadata={"help": "noise levels per encoded frame: the encoder costs most"})
    learning_rate: float = 1e-3
    ema_decay: float = 0.995
    num_executed: int = field(default=8, metadata={"help": "executed targets of a chunk"})
    num_episodes: int = field(default=20, metadata={"help": "evaluated episodes per stage; 0 skips the evaluation"})
    max_episode_steps: int = 300
    seed: int = 0


def load_state(path: Path, setting: dict[str, Any]) -> dict[str, Any] | None:
    """Load the state from which a run resumes; None if there is none.

    Raises:
        ValueError: If the state is of a run with other settings.
    """
    if not path.is_file():
        return None
    state = torch.load(path, weights_only=True)
    if state["setting"] != setting:
        raise ValueError(
            f"`output_dir` {str(path.parent)!r} contains a run with other settings, {state['setting']}: use these, or choose a "
            "new folder."
        )
    return state


class Training:
    """A policy with its optimizer, averaged weights and progress; `save` and `resume` keep all of it.

    Args:
        arguments: Arguments of the script.
    """

    def __init__(self, arguments: PolicyArguments) -> None:
        self.arguments, self.path = arguments, arguments.output_dir / "training.pt"
        torch.manual_seed(arguments.seed)
        self.policy = DiffusionPolicy()
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=arguments.learning_rate, weight_decay=1e-4)
        self.average = EMAModel(self.policy.parameters(), decay=arguments.ema_decay, use_ema_warmup=True, power=0.75)
        self.step, self.minutes = 0, 0.0
        self.report: dict[str, dict] = {}

    def setting(self) -> dict[str, Any]:
        """Arguments that determine the result."""
        values = asdict(self.arguments)
        del values["output_dir"]
        return values | {"datasets": [str(path) for path in self.arguments.datasets]}

    def save(self) -> None:
        """Write the averaged weights of this stage, the report, and last the state from which a training resumes."""
        arguments = self.arguments
        self.average.store(self.policy.parameters())
        self.average.copy_to(self.policy.parameters())
        self.policy.eval().save_pretrained(arguments.output_dir / f"checkpoint-{self.step}")
        if arguments.num_episodes:
            self.report[str(self.step)] = evaluate(self.policy, arguments)
        self.average.restore(self.policy.parameters())
        self.policy.train()
        setting = self.setting() | {"command": " ".join(["python", *sys.argv]), "minutes": self.minutes}
        with temporary_path(arguments.output_dir / "report.json") as partial:
            partial.write_text(json.dumps(self.report | {"setting": setting}, indent=2), encoding="utf-8")
        state = {
            "setting": self.setting(),
            "step": self.step,
            "minutes": self.minutes,
            "report": self.report,
            "policy": self.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": self.average.state_dict(),
            "random": torch.get_rng_state(),
        }
        with temporary_path(self.path) as partial:
            torch.save(state, partial)

    def resume(self) -> None:
        """Restore the newest stage of an earlier run with the same settings.

        Raises:
            ValueError: If the folder contains a run with other settings.
        """
        state = load_state(self.path, self.setting())
        if state is None:
            return
        self.step, self.minutes, self.report = state["step"], state["minutes"], state["report"]
        self.policy.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average.load_state_dict(state["average"])
        torch.set_rng_state(state["random"])

    def update(self, frames: torch.Tensor, positions: torch.Tensor, chunks: torch.Tensor) -> float:
        """Make one step on a random batch of the demonstrations; return the loss."""
        arguments, policy = self.arguments, self.policy
        self.step += 1
        for group in self.optimizer.param_groups:  # cosine decay over the whole training, after a warm-up
            decay = 0.5 * (1 + math.cos(math.pi * self.step / arguments.stages[-1]))
            group["lr"] = arguments.learning_rate * min(1.0, self.step / 200) * (0.05 + 0.95 * decay)
        rows = torch.multinomial(sampling_weights(chunks), arguments.batch_size, replacement=True)
        observation = policy.encode(augment(frames[rows].float() / 255), positions[rows])
        clean = (chunks[rows] - positions[rows, None]) / SCALE
        observation, clean = (part.repeat_interleave(arguments.num_draws, dim=0) for part in (observation, clean))
        timesteps = torch.randint(policy.config.num_train_timesteps, (len(clean),))
        noisy = policy.scheduler().add_noise(clean, torch.randn_like(clean), timesteps)
        loss = functional.mse_loss(policy(noisy, timesteps, observation), clean)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"The loss is {loss.item()} at step {self.step}: use a smaller `learning_rate`.")
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        self.optimizer.step()
        self.average.step(policy.parameters())
        return loss.item()


def demonstrations(arguments: PolicyArguments, horizon: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Read frames (N, 3, H, W), uint8, pusher positions (N, 2) and the chunks of targets (N, n, 2) that follow.

    The last target is repeated after the end of an episode, because the expert waits there.

    Raises:
        ValueError: If there are no expert episodes.
    """
    frames: list[torch.Tensor] = []
    positions: list[torch.Tensor] = []
    chunks: list[torch.Tensor] = []
    for root in arguments.datasets:
        folder = LeRobotFolder(root)
        experts = [number for number, row in enumerate(folder.rows) if row["tasks"][0] == TASKS["expert"]]
        for number in tqdm(experts[: arguments.max_demonstrations - len(frames)], desc=str(root), unit="episode"):
            episode = folder[number]
            targets = np.concatenate([episode.actions, np.repeat(episode.actions[-1:], horizon - 1, axis=0)])
            windows = np.lib.stride_tricks.sliding_window_view(targets, horizon, axis=0)  # (T, 2, n)
            frames.append(torch.from_numpy(episode.frames).movedim(-1, 1))
            positions.append(torch.from_numpy(episode.states["observation.state"]).float())
            chunks.append(torch.from_numpy(windows.copy()).float().transpose(1, 2))
    if not frames:
        raise ValueError("`datasets` must hold expert episodes: collect some with `collect.py --expert 1`.")
    return torch.cat(frames), torch.cat(positions), torch.cat(chunks)


def sampling_weights(chunks: torch.Tensor) -> torch.Tensor:
    """Weights (N,) of chunks (N, n, 2): 0.1 while the expert waits at the goal, which is half of the frames; 1 otherwise."""
    return torch.where((chunks - chunks[:, :1]).abs().amax((1, 2)) > 1, 1.0, 0.1)


def evaluate(policy: DiffusionPolicy, arguments: PolicyArguments) -> dict[str, dict[str, float]]:
    """Run the policy in the simulator: largest IoU of an episode, final IoU, and success rate, with 95 % intervals."""
    simulators = [Simulator() for _ in range(arguments.num_episodes)]
    states = [simulator.reset(FIRST_SEED + number) for number, simulator in enumerate(simulators)]
    generator = torch.Generator().manual_seed(arguments.seed)
    values = [block_ious(states)]
    while len(values) <= arguments.max_episode_steps:
        observation = {
            "pixels": np.stack([simulator.frame() for simulator in simulators]),
            "agent_pos": np.stack([state.agent for state in states]),
        }
        chunks = policy.sample(observation, generator=generator)[:, 0].numpy()
        for step in range(arguments.num_executed):
            actions = zip(simulators, chunks[:, step], strict=True)
            states = [simulator.step(action) for simulator, action in actions]
            values.append(block_ious(states))
    values = values[: arguments.max_episode_steps + 1]
    found = np.stack(values, axis=1)  # (N, T)
    best = found.max(1)
    solved = 2 * best / (1 + best) > SUCCESS  # coverage of the goal, because block and goal have the same area
    rng = np.random.default_rng(arguments.seed)
    figures = {"max_iou": best, "final_iou": found[:, -1], "success": solved.astype(float)}
    return {name: bootstrap(figure, rng) for name, figure in figures.items()}


def block_ious(states: list[State]) -> np.ndarray:
    """IoU (N,) of the blocks with the goal."""
    return ious(np.stack([state.block for state in states]))


def check(arguments: PolicyArguments, horizon: int) -> None:
    """Raise ValueError if an argument is invalid."""
    require_finite(asdict(arguments))
    stages = arguments.stages
    if not stages or stages[0] < 1 or sorted(set(stages)) != stages:
        raise ValueError(f"`stages` must be increasing positive numbers of steps, got {stages}.")
    for name in ("max_demonstrations", "batch_size", "num_draws", "num_executed", "max_episode_steps"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"`{name}` must be at least 1, got {getattr(arguments, name)}.")
    if arguments.num_executed > horizon:
        raise ValueError(f"`num_executed` must be at most {horizon}, got {arguments.num_executed}.")


def main() -> None:
    (arguments,) = HfArgumentParser(PolicyArguments).parse_args_into_dataclasses()
    training = Training(arguments)
    check(arguments, training.policy.config.horizon)
    training.resume()
    earlier, started = training.minutes, time.perf_counter()
    bar = tqdm(total=arguments.stages[-1], initial=training.step, desc="training", unit="step")
    if training.step < arguments.stages[-1]:
        data = demonstrations(arguments, training.policy.config.horizon)
    while training.step < arguments.stages[-1]:
        loss = training.update(*data)
        bar.update()
        if training.step % 20 == 0:
            bar.set_postfix(loss=f"{loss:.4f}")
        if training.step in arguments.stages:
            training.minutes = earlier + (time.perf_counter() - started) / 60
            training.save()
            figures = training.report.get(str(training.step), {})
            line = ", ".join(f"{name} {figure['mean']:.3f}" for name, figure in figures.items())
            bar.write(f"step {training.step}: {line}")


if __name__ == "__main__":
    run_script(main)
