"""Train a compact diffusion policy for Push-T on expert demonstrations, and evaluate it.

    python examples/pusht/train_policy.py --datasets data/pusht-expert --output_dir runs/policy

First, the encoder learns to find keypoints of the block in frames of all kinds of episodes. The labels come from the
recorded block poses, which the policy never reads. Then the encoder is frozen, and the denoiser learns from the expert's
episodes and their mirror images. Checkpoints with averaged weights (EMA) are saved at several stages (`checkpoint-250`
and so on), to compare policies of different quality. Each stage is evaluated on the same held-out starts: the largest
and the final IoU of block and goal, and the fraction of episodes in which the coverage of the goal exceeds 95 %. The same
command resumes an interrupted run, with the same result.
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
from collect import TASKS, check_states
from diffusers.training_utils import EMAModel
from diffusion_policy import HORIZON, NUM_KEYPOINTS, SCALE, DiffusionPolicy
from expert import coverage, outline
from simulator import ARENA, SUCCESS, Simulator
from torch.nn import functional
from tqdm import tqdm, trange
from train_reward import BLOCK, augment, ious
from transformers import HfArgumentParser

from irasim_diffusers.data import LeRobotFolder
from irasim_diffusers.files import temporary_path, write_text
from irasim_diffusers.metrics import bootstrap
from irasim_diffusers.training import check_output_dir, check_ranges, run_script

FIRST_SEED = 4_000_000  # first seed of the evaluated episodes, far from the seeds of the datasets
CORNERS = [0, 1, 4, 5]  # keypoints: corners of the block's outline, two at the bar and two at the stem
MIRRORED = [1, 0, 3, 2]  # order of the keypoints in a mirror image
ENCODER_BATCH, ENCODER_FRAMES = 64, 48  # frames per step, and frames per episode


@dataclass
class PolicyArguments:
    datasets: list[Path] = field(
        metadata={"help": "LeRobotDataset folders made by collect.py; they must contain expert episodes"}
    )
    output_dir: Path = field(metadata={"help": "folder for the checkpoints and report.json"})
    max_demonstrations: int = field(default=400, metadata={"help": "maximum number of expert episodes"})
    stages: list[int] = field(
        default_factory=lambda: [250, 500, 1000, 1500, 2500, 4000, 7000, 12000],
        metadata={
            "help": "steps at which a checkpoint is saved, in increasing order; the training ends at the last one"
        },
    )
    encoder_steps: int = field(
        default=1500, metadata={"help": "training steps of the encoder, on batches of 64 frames"}
    )
    encoder_episodes: int = field(default=400, metadata={"help": "maximum number of episodes to train the encoder on"})
    batch_size: int = field(default=256, metadata={"help": "chunks per training step of the denoiser"})
    learning_rate: float = field(default=1e-3, metadata={"help": "maximum learning rate of the denoiser"})
    ema_decay: float = field(default=0.999, metadata={"help": "decay of the averaged weights (EMA)"})
    num_executed: int = field(default=8, metadata={"help": "number of targets of a chunk that are executed"})
    num_episodes: int = field(
        default=20, metadata={"help": "number of episodes that evaluate each stage; 0 skips the evaluation"}
    )
    max_episode_steps: int = field(default=300, metadata={"help": "number of steps of an evaluated episode"})
    seed: int = field(default=0, metadata={"help": "random seed"})


def load_state(path: Path, setting: dict[str, Any]) -> dict[str, Any] | None:
    """Load the state from which a run resumes; None for a new run.

    Raises:
        ValueError: If the state has other settings.
    """
    if not path.is_file():
        return None
    state = torch.load(path, weights_only=True)
    before = state["setting"]
    changed = [
        f"{name} was {'not set' if before.get(name) in (None, 'None') else repr(before[name])}"
        for name in before | setting
        if before.get(name) != setting.get(name)
    ]
    if changed:
        raise ValueError(
            f"`output_dir` {str(path.parent)!r} contains a run with other settings: {', '.join(changed)}. Use these, or choose a "
            "new folder."
        )
    return state


class Training:
    """Policy with optimizer, averaged weights and progress, which `save` stores and `resume` restores."""

    def __init__(self, arguments: PolicyArguments) -> None:
        self.arguments, self.path = arguments, arguments.output_dir / "training.pt"
        torch.manual_seed(arguments.seed)
        self.policy = DiffusionPolicy()
        self.policy.encoder.requires_grad_(False)
        self.optimizer = torch.optim.AdamW(self.policy.parameters(), lr=arguments.learning_rate, weight_decay=1e-4)
        self.average = EMAModel(self.policy.parameters(), decay=arguments.ema_decay, use_ema_warmup=True, power=0.75)
        self.step, self.minutes, self.encoder_error = 0, 0.0, math.nan
        self.report: dict[str, dict] = {}

    def setting(self) -> dict[str, Any]:
        """Return the arguments that determine the result."""
        values = asdict(self.arguments)
        del values["output_dir"]
        return values | {"datasets": [str(path) for path in self.arguments.datasets]}

    def save_stage(self) -> None:
        """Write and evaluate the averaged weights; write the report, then the state for resuming."""
        arguments = self.arguments
        self.average.store(self.policy.parameters())
        self.average.copy_to(self.policy.parameters())
        self.policy.eval().save_pretrained(arguments.output_dir / f"checkpoint-{self.step}")
        if arguments.num_episodes:
            self.report[str(self.step)] = evaluate(self.policy, arguments)
        self.average.restore(self.policy.parameters())
        self.policy.train()
        figures = {"minutes": self.minutes, "encoder_error": self.encoder_error}  # error in arena units
        setting = self.setting() | figures | {"command": " ".join(["python", *sys.argv])}
        write_text(arguments.output_dir / "report.json", json.dumps(self.report | {"setting": setting}, indent=2))
        self.save()

    def save(self) -> None:
        """Write the state from which the run resumes."""
        state = {name: getattr(self, name) for name in ("step", "minutes", "encoder_error", "report")}
        state |= {name: getattr(self, name).state_dict() for name in ("policy", "optimizer", "average")}
        with temporary_path(self.path) as partial:
            torch.save(state | {"setting": self.setting(), "random": torch.get_rng_state()}, partial)

    def resume(self) -> None:
        """Restore the trained encoder or the newest stage of an earlier run.

        Raises:
            ValueError: If the run has other settings.
        """
        if (state := load_state(self.path, self.setting())) is None:
            return
        for name in ("step", "minutes", "encoder_error", "report"):
            setattr(self, name, state[name])
        for name in ("policy", "optimizer", "average"):
            getattr(self, name).load_state_dict(state[name])
        torch.set_rng_state(state["random"])

    def fit_encoder(self, frames: torch.Tensor, keypoints: torch.Tensor) -> None:
        """Train the encoder on frames (N, 3, H, W), uint8, with keypoints (N, K, 2).

        Raises:
            FloatingPointError: If a gradient is not finite.
        """
        encoder, steps = self.policy.encoder.requires_grad_(True), self.arguments.encoder_steps
        optimizer = torch.optim.AdamW(encoder.parameters(), lr=2e-3, weight_decay=1e-4)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
        errors: list[float] = []
        for step in tqdm(range(steps), desc="encoder", unit="step"):
            rows = torch.randint(len(frames), (ENCODER_BATCH,))
            images, labels = frames[rows].float() / 255, keypoints[rows]
            if step % 2:
                images, labels = mirror_frames(images), mirror(labels)[:, MIRRORED]
            distances = (encoder(augment(images)) - labels).square().sum(-1)
            optimizer.zero_grad()
            (distances + 1).sqrt().mean().backward()
            norm = torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
            if not torch.isfinite(norm):
                raise FloatingPointError(
                    f"the gradient norm of the encoder is {norm:g} at step {step + 1}: check the data."
                )
            optimizer.step()
            schedule.step()
            errors.append(distances.detach().sqrt().mean().item())
        encoder.requires_grad_(False)
        self.encoder_error = float(np.mean(errors[-100:]))

    @torch.no_grad()
    def find_keypoints(self, frames: torch.Tensor) -> torch.Tensor:
        """Find the keypoints (2 N, K, 2) of frames (N, 3, H, W), uint8, and of their mirror images."""
        with torch.random.fork_rng():  # the same noise in a resumed run
            torch.manual_seed(self.arguments.seed)
            views = ((part, mirror_frames(part)) for part in frames.split(256))
            found = [[self.policy.encoder(augment(view.float() / 255)) for view in pair] for pair in views]
        return torch.cat([torch.cat(parts) for parts in zip(*found, strict=True)])

    def update(self, keypoints: torch.Tensor, positions: torch.Tensor, chunks: torch.Tensor) -> float:
        """Make one step on a random batch of the demonstrations; return the loss.

        Raises:
            FloatingPointError: If the loss is not finite.
        """
        arguments, policy = self.arguments, self.policy
        self.step += 1
        for group in self.optimizer.param_groups:  # warmup, and cosine decay over the whole training
            decay = 0.5 * (1 + math.cos(math.pi * self.step / arguments.stages[-1]))
            group["lr"] = arguments.learning_rate * min(1.0, self.step / 200) * (0.05 + 0.95 * decay)
        rows = torch.multinomial(sampling_weights(chunks), arguments.batch_size, replacement=True)
        found = keypoints[rows] + torch.randn(arguments.batch_size, NUM_KEYPOINTS, 2)  # noise, one arena unit
        observation = policy.embed(found, positions[rows])
        clean = (chunks[rows] - positions[rows, None]) / SCALE
        timesteps = torch.randint(policy.config.num_train_timesteps, (len(clean),))
        noisy = policy.scheduler().add_noise(clean, torch.randn_like(clean), timesteps)
        loss = functional.mse_loss(policy(noisy, timesteps, observation), clean)
        if not torch.isfinite(loss):
            raise FloatingPointError(f"the loss is {loss.item()} at step {self.step}: use a lower `learning_rate`.")
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        self.optimizer.step()
        self.average.step(policy.parameters())
        return loss.item()


def mirror(points: torch.Tensor) -> torch.Tensor:
    """Reflect points (..., 2) across the symmetry axis of the goal, a diagonal of the arena."""
    return ARENA - points.flip(-1)


def mirror_frames(frames: torch.Tensor) -> torch.Tensor:
    """Reflect frames (..., H, W) across the symmetry axis of the goal."""
    return frames.transpose(-1, -2).flip(-1, -2)


def labelled_frames(arguments: PolicyArguments) -> tuple[torch.Tensor, torch.Tensor]:
    """Read frames (N, 3, H, W), uint8, and keypoints (N, K, 2) of the block in arena units.

    The frames are evenly spaced in episodes of all kinds.
    """
    folders = [LeRobotFolder(root) for root in arguments.datasets]
    numbers = [(folder, number) for folder in folders for number in range(len(folder))]
    chosen = np.unique(np.linspace(0, len(numbers) - 1, arguments.encoder_episodes).round().astype(int))
    frames, blocks = [], []
    for folder, number in tqdm([numbers[index] for index in chosen], desc="reading", unit="episode"):
        episode = folder[number]
        taken = np.linspace(0, len(episode) - 1, ENCODER_FRAMES).round().astype(int)
        frames.append(torch.from_numpy(episode.frames[taken]).movedim(-1, 1))
        blocks.append(episode.states[BLOCK][taken])
    return torch.cat(frames), torch.from_numpy(outline(np.concatenate(blocks))[:, CORNERS]).float()


def demonstrations(arguments: PolicyArguments, horizon: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Read frames (N, 3, H, W), uint8, pusher positions (N, 2) and the next targets (N, n, 2).

    At the end of an episode, the last target is repeated.

    Raises:
        ValueError: If the datasets contain no expert episodes.
    """
    episodes: list[tuple[torch.Tensor, ...]] = []
    for root in arguments.datasets:
        folder = LeRobotFolder(root)
        experts = [number for number, row in enumerate(folder.rows) if row["tasks"][0] == TASKS["expert"]]
        for number in tqdm(experts[: arguments.max_demonstrations - len(episodes)], desc=str(root), unit="episode"):
            episode = folder[number]
            targets = np.concatenate([episode.actions, np.repeat(episode.actions[-1:], horizon - 1, axis=0)])
            windows = np.lib.stride_tricks.sliding_window_view(targets, horizon, axis=0)  # (T, 2, n)
            frames, positions = (
                torch.from_numpy(part) for part in (episode.frames, episode.states["observation.state"])
            )
            chunks = torch.from_numpy(windows.copy()).float().transpose(1, 2)
            episodes.append((frames.movedim(-1, 1), positions.float(), chunks))
    if not episodes:
        raise ValueError("`datasets` must contain expert episodes: collect some with `collect.py --expert 1`.")
    frames, positions, chunks = (torch.cat(parts) for parts in zip(*episodes, strict=True))
    return frames, positions, chunks


def sampling_weights(chunks: torch.Tensor) -> torch.Tensor:
    """Return sampling weights (N,) of chunks (N, n, 2): 0.1 while the expert waits at the goal, else 1."""
    return torch.where((chunks - chunks[:, :1]).abs().amax((1, 2)) > 1, 1.0, 0.1)


def evaluate(policy: DiffusionPolicy, arguments: PolicyArguments) -> dict[str, dict[str, float]]:
    """Run the policy in the simulator; return largest IoU, final IoU and success rate.

    Each value has a 95 % interval.
    """
    simulators = [Simulator() for _ in range(arguments.num_episodes)]
    states = [simulator.reset(FIRST_SEED + number) for number, simulator in enumerate(simulators)]
    generator = torch.Generator().manual_seed(arguments.seed)
    values = [ious(np.stack([state.block for state in states]))]
    while len(values) <= arguments.max_episode_steps:
        observation = {
            "pixels": np.stack([simulator.frame() for simulator in simulators]),
            "agent_pos": np.stack([state.agent for state in states]),
        }
        chunks = policy.sample(observation, generator=generator)[:, 0].numpy()
        for step in range(arguments.num_executed):
            states = [simulator.step(chunk[step]) for simulator, chunk in zip(simulators, chunks, strict=True)]
            values.append(ious(np.stack([state.block for state in states])))
    found = np.stack(values[: arguments.max_episode_steps + 1], axis=1)  # (N, T)
    best = found.max(1)
    rng = np.random.default_rng(arguments.seed)
    figures = {"max_iou": best, "final_iou": found[:, -1], "success": (coverage(best) > SUCCESS).astype(float)}
    return {name: bootstrap(figure, rng) for name, figure in figures.items()}


def check(arguments: PolicyArguments) -> None:
    """Check the arguments before any work.

    Raises:
        ValueError: If a value is invalid, or `output_dir` cannot be written.
    """
    check_ranges(
        arguments,
        not_negative=("num_episodes", "seed"),
        at_least_1=(
            *("max_demonstrations", "encoder_steps", "encoder_episodes", "batch_size", "num_executed"),
            "max_episode_steps",
        ),
        positive=("learning_rate",),
        fractions=("ema_decay",),
    )
    if not (stages := arguments.stages) or stages[0] < 1 or sorted(set(stages)) != stages:
        raise ValueError(f"`stages` must be positive numbers of steps in increasing order, got {stages}.")
    if arguments.num_executed > HORIZON:
        raise ValueError(f"`num_executed` must be at most {HORIZON}, got {arguments.num_executed}.")
    check_output_dir(arguments.output_dir)


def main() -> None:
    (arguments,) = HfArgumentParser(PolicyArguments).parse_args_into_dataclasses()
    check(arguments)
    training = Training(arguments)
    training.resume()
    earlier, started = training.minutes, time.perf_counter()
    if training.step == arguments.stages[-1]:
        return
    check_states(*map(LeRobotFolder, arguments.datasets))
    # read first, so that missing expert episodes are found before the training
    frames, *others = demonstrations(arguments, HORIZON)
    if math.isnan(training.encoder_error):
        training.fit_encoder(*labelled_frames(arguments))
        training.minutes = (time.perf_counter() - started) / 60
        training.save()
    data = training.find_keypoints(frames), *(torch.cat([part, mirror(part)]) for part in others)
    for step in trange(training.step + 1, arguments.stages[-1] + 1, desc="training", unit="step"):
        loss = training.update(*data)
        if step in arguments.stages:
            training.minutes = earlier + (time.perf_counter() - started) / 60
            training.save_stage()
            means = {name: round(value["mean"], 3) for name, value in training.report.get(str(step), {}).items()}
            tqdm.write(f"step {step}: loss {loss:.4f}, {means}")


if __name__ == "__main__":
    run_script(main)
