"""Train a compact diffusion policy for Push-T on expert demonstrations, and evaluate it in the simulator.

    python examples/pusht/train_policy.py --datasets data/pusht-expert --output_dir runs/policy

Only the expert's episodes of the datasets are used. Checkpoints are saved at several stages of the training, so that policies of
different quality can be compared: `checkpoint-250` and so on, each with weights averaged over steps (EMA). Each stage is evaluated
on the same held-out starts. The score of an episode is the largest IoU of block and goal, and the success rate is the fraction of
episodes whose coverage of the goal exceeds 95 %, as in gym-pusht.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

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
        default_factory=lambda: [250, 500, 1000, 2000, 4000, 8000],
        metadata={"help": "increasing numbers of steps after which a checkpoint is saved; the last ends the training"},
    )
    batch_size: int = 64
    learning_rate: float = 1e-3
    ema_decay: float = 0.995
    num_executed: int = field(default=8, metadata={"help": "executed targets of a chunk"})
    num_episodes: int = field(default=20, metadata={"help": "evaluated episodes per stage; 0 skips the evaluation"})
    max_episode_steps: int = 300
    seed: int = 0


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


def main() -> None:
    (arguments,) = HfArgumentParser(PolicyArguments).parse_args_into_dataclasses()
    require_finite(asdict(arguments))
    stages = arguments.stages
    if not stages or stages[0] < 1 or sorted(set(stages)) != stages:
        raise ValueError(f"`stages` must be increasing positive numbers of steps, got {stages}.")
    for name in ("max_demonstrations", "batch_size", "num_executed", "max_episode_steps"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"`{name}` must be at least 1, got {getattr(arguments, name)}.")
    torch.manual_seed(arguments.seed)
    policy = DiffusionPolicy()
    if arguments.num_executed > policy.config.horizon:
        raise ValueError(f"`num_executed` must be at most {policy.config.horizon}, got {arguments.num_executed}.")
    frames, positions, chunks = demonstrations(arguments, policy.config.horizon)
    scheduler = policy.scheduler()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=arguments.learning_rate, weight_decay=1e-4)
    average = EMAModel(policy.parameters(), decay=arguments.ema_decay, use_ema_warmup=True, power=0.75)
    report: dict[str, dict] = {}
    started = time.perf_counter()
    bar = tqdm(range(1, stages[-1] + 1), desc="training", unit="step")
    for step in bar:
        for group in optimizer.param_groups:  # cosine decay over the whole training, after a warm-up
            decay = 0.5 * (1 + np.cos(np.pi * step / stages[-1]))
            group["lr"] = arguments.learning_rate * min(1.0, step / 200) * (0.05 + 0.95 * decay)
        rows = torch.randint(len(frames), (arguments.batch_size,))
        observation = policy.encode(augment(frames[rows].float() / 255), positions[rows])
        clean = (chunks[rows] - positions[rows, None]) / SCALE
        noise = torch.randn_like(clean)
        timesteps = torch.randint(policy.config.num_train_timesteps, (len(rows),))
        loss = functional.mse_loss(policy(scheduler.add_noise(clean, noise, timesteps), timesteps, observation), clean)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"The loss is {loss.item()} at step {step}: use a smaller `learning_rate`.")
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        average.step(policy.parameters())
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss:.4f}")
        if step not in stages:
            continue
        average.store(policy.parameters())
        average.copy_to(policy.parameters())
        policy.eval().save_pretrained(arguments.output_dir / f"checkpoint-{step}")
        if arguments.num_episodes:
            report[str(step)] = evaluate(policy, arguments)
            line = ", ".join(f"{name} {figures['mean']:.3f}" for name, figures in report[str(step)].items())
            bar.write(f"step {step}: {line}")
        average.restore(policy.parameters())
        policy.train()
        setting = asdict(arguments) | {"command": " ".join(["python", *sys.argv])}
        setting["minutes"] = (time.perf_counter() - started) / 60
        with temporary_path(arguments.output_dir / "report.json") as partial:
            partial.write_text(json.dumps(report | {"setting": setting}, indent=2, default=str), encoding="utf-8")


if __name__ == "__main__":
    run_script(main)
