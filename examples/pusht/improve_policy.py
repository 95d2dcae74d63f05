"""Improve a diffusion policy for Push-T inside a world model, and measure the change in the simulator.

    python examples/pusht/improve_policy.py --policy runs/policy/checkpoint-2000 --dataset data/pusht-train \
        --reward runs/reward-closeness --output_dir runs/improved

Each iteration draws recorded frames, samples a group of chunks from the policy for each frame, and predicts the result
of every chunk with the world model. The reward of a chunk is that of the frame after its first `--num_executed`
targets. As in GRPO, the advantage of a chunk is the difference between its reward and the mean of its group, in
standard deviations. The denoising loss of each chunk is weighted by its advantage, limited to [0, 3]. As the KL term of
GRPO, the squared difference from the denoised chunks of the initial policy keeps the policy close to it; without this
term, training on own samples amplifies their errors. The training uses no simulator. The simulator evaluates the policy before and after the training, from the same starts, and the report
contains both results.

If the block is far from the goal, the policy needs a dense reward: train one with `train_reward.py --target
closeness`. The same command resumes from the last finished iteration.
"""

import copy
import json
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from collect import check_states
from diffusion_policy import SCALE, DiffusionPolicy
from tqdm import tqdm
from train_policy import evaluate, load_state
from transformers import HfArgumentParser

from irasim_diffusers import embedded_checkpoint
from irasim_diffusers.data import EpisodeSource, open_dataset
from irasim_diffusers.envs import load_world_model
from irasim_diffusers.files import temporary_path, write_text
from irasim_diffusers.planning import Scoring
from irasim_diffusers.rewards import FrameRegressor
from irasim_diffusers.training import check_output_dir, check_ranges, run_script


@dataclass
class ImproveArguments:
    policy: str = field(metadata={"help": "checkpoint of train_policy.py"})
    dataset: str = field(
        metadata={"help": "LeRobotDataset folder whose frames are the states in which the policy acts"}
    )
    output_dir: Path = field(metadata={"help": "folder for the policy and report.json"})
    model: str = field(default=str(embedded_checkpoint()), metadata={"help": "world model, folder or Hub id"})
    reward: str | None = field(
        default=None,
        metadata={"help": "FrameRegressor folder (default: the reward model stored with the world model)"},
    )
    num_iterations: int = field(default=20, metadata={"help": "number of iterations"})
    num_states: int = field(default=8, metadata={"help": "number of states per iteration"})
    group_size: int = field(default=8, metadata={"help": "number of chunks per state"})
    num_updates: int = field(default=8, metadata={"help": "number of optimizer steps per iteration"})
    learning_rate: float = field(default=2e-5, metadata={"help": "learning rate"})
    reference_weight: float = field(
        default=1.0, metadata={"help": "weight of the squared difference from the predictions of the initial policy"}
    )
    min_spread: float = field(
        default=2e-3, metadata={"help": "groups with a smaller standard deviation of rewards are ignored"}
    )
    num_executed: int = field(default=8, metadata={"help": "number of targets of a chunk that are executed"})
    num_episodes: int = field(default=20, metadata={"help": "number of episodes evaluated in the simulator"})
    max_episode_steps: int = field(default=300, metadata={"help": "number of steps of an evaluated episode"})
    seed: int = field(default=0, metadata={"help": "random seed"})


class Improvement:
    """The policy, its optimizer and the progress of the run.

    Args:
        arguments: Arguments of the script.
    """

    def __init__(self, arguments: ImproveArguments) -> None:
        self.arguments, self.path = arguments, arguments.output_dir / "training.pt"
        self.policy = DiffusionPolicy.from_pretrained(arguments.policy).eval()
        self.reference = copy.deepcopy(self.policy).requires_grad_(False)
        self.policy.encoder.requires_grad_(False)  # as in train_policy.py
        trained = [parameter for parameter in self.policy.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, arguments.learning_rate, weight_decay=0.0)
        self.rewards: list[float] = []  # mean reward of the chunks of each iteration
        self.before: dict[str, Any] = {}

    def setting(self) -> dict[str, Any]:
        """Return the arguments that must not change in a resumed run."""
        values = {name: str(value) for name, value in asdict(self.arguments).items()}
        return {name: value for name, value in values.items() if name not in ("output_dir", "num_iterations")}

    def save(self) -> None:
        """Write the state from which the run resumes."""
        state = {"setting": self.setting(), "policy": self.policy.state_dict(), "rewards": self.rewards}
        with temporary_path(self.path) as partial:
            torch.save(state | {"optimizer": self.optimizer.state_dict(), "before": self.before}, partial)

    def resume(self) -> None:
        """Restore an earlier run with the same settings.

        Raises:
            ValueError: If the folder contains a run with other settings or more iterations.
        """
        state = load_state(self.path, self.setting())
        if state is None:
            return
        self.policy.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.rewards, self.before = state["rewards"], state["before"]
        if len(self.rewards) > self.arguments.num_iterations:
            raise ValueError(
                f"`num_iterations` must be at least {len(self.rewards)}, the iterations of the run in "
                f"{str(self.arguments.output_dir)!r}, got {self.arguments.num_iterations}: use more, or another `output_dir`."
            )

    def iterate(self, model: Any, reward: Any, dataset: EpisodeSource) -> None:
        """Sample, predict and score one group per state, and update the policy.

        Raises:
            FloatingPointError: If a reward is not finite.
        """
        arguments, iteration = self.arguments, len(self.rewards)
        rng = np.random.default_rng([arguments.seed, iteration])
        generator = torch.Generator().manual_seed(int(rng.integers(2**31)))
        histories, positions = draw_states(dataset, rng, arguments.num_states)
        observation = {"pixels": histories[:, -1], "agent_pos": positions}
        chunks = self.policy.sample(observation, arguments.group_size, generator)  # (N, K, n, 2)
        advantages, rewards = [], []
        for row, history in enumerate(histories):
            state = model.start(history, [int(rng.integers(2**31))])
            scores = Scoring()(model, state, chunks[row, :, : arguments.num_executed], reward)
            if not scores.isfinite().all():
                raise FloatingPointError(
                    f"the rewards of iteration {iteration} must be finite, got {scores.tolist()}."
                )
            spread = scores.std(correction=0)
            used = spread >= arguments.min_spread
            advantages.append((scores - scores.mean()) / spread if used else torch.zeros_like(scores))
            rewards.append(scores.mean())
        self.update(observation, chunks, torch.stack(advantages).clamp(0, 3), generator)
        self.rewards.append(float(torch.stack(rewards).mean()))

    def update(
        self, observation: dict[str, Any], chunks: torch.Tensor, weights: torch.Tensor, generator: torch.Generator
    ) -> None:
        """Minimize the denoising loss of chunks (N, K, n, 2) with weights (N, K)."""
        scheduler, group = self.policy.scheduler(), chunks.shape[1]
        positions = torch.as_tensor(observation["agent_pos"])
        frames = torch.as_tensor(observation["pixels"]).movedim(-1, 1).float() / 255
        clean = (chunks.flatten(0, 1) - positions.repeat_interleave(group, dim=0)[:, None]) / SCALE
        keypoints = self.policy.encoder(frames)  # frozen, so that both policies have the same ones
        kept = self.reference.embed(keypoints, positions).repeat_interleave(group, dim=0)
        for _ in range(self.arguments.num_updates):
            encoded = self.policy.embed(keypoints, positions).repeat_interleave(group, dim=0)
            timesteps = torch.randint(self.policy.config.num_train_timesteps, (len(clean),), generator=generator)
            noise = torch.randn(clean.shape, generator=generator)
            noisy = scheduler.add_noise(clean, noise, timesteps)
            predicted = self.policy(noisy, timesteps, encoded)
            loss = (weights.flatten() * (predicted - clean).square().mean((1, 2))).mean()
            change = (predicted - self.reference(noisy, timesteps, kept)).square().mean()
            loss = loss + self.arguments.reference_weight * change
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.policy.parameters(), 1.0)
            self.optimizer.step()


def draw_states(dataset: EpisodeSource, rng: np.random.Generator, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw histories (N, 2, H, W, 3), uint8, of random episodes, and their last pusher positions (N, 2).

    Raises:
        ValueError: If an episode has only one frame.
    """
    histories, positions = [], []
    for episode in rng.integers(len(dataset), size=number):
        length = len(dataset.vectors(int(episode))["action"])
        if length < 2:
            raise ValueError(f"episodes of {dataset.name!r} must have at least 2 frames, got 1 in episode {episode}.")
        window = dataset.window(int(episode), int(rng.integers(length - 1)), 2)
        histories.append(window.frames)
        positions.append(window.states["observation.state"][-1])
    return np.stack(histories), np.stack(positions).astype(np.float32)


def main() -> None:
    (arguments,) = HfArgumentParser(ImproveArguments).parse_args_into_dataclasses()
    check_ranges(
        arguments,
        not_negative=("min_spread", "reference_weight", "seed"),
        at_least_1=(
            "num_iterations",
            "num_states",
            "num_updates",
            "num_executed",
            "num_episodes",
            "max_episode_steps",
        ),
        positive=("learning_rate",),
    )
    if arguments.group_size < 2:
        raise ValueError(
            f"`group_size` must be at least 2, got {arguments.group_size}: chunks are compared within a group."
        )
    check_output_dir(arguments.output_dir)
    started = time.perf_counter()
    run, dataset = Improvement(arguments), open_dataset(arguments.dataset)
    check_states(dataset, states=("observation.state",))
    if arguments.num_executed > run.policy.config.horizon:
        raise ValueError(f"`num_executed` must be at most {run.policy.config.horizon}, got {arguments.num_executed}.")
    run.resume()
    stored = load_world_model(arguments.model)
    reward = (
        stored.get("reward") if arguments.reward is None else FrameRegressor.from_pretrained(arguments.reward).eval()
    )
    if reward is None:
        raise ValueError(
            f"`reward` is required, because {arguments.model!r} contains no reward model: pass a FrameRegressor folder."
        )
    if not run.before:
        run.before = evaluate(run.policy, arguments)
        run.save()
    with tqdm(range(len(run.rewards), arguments.num_iterations), desc="improving", unit="iteration") as bar:
        for _ in bar:
            run.iterate(stored["model"], reward, dataset)
            run.save()
            bar.set_postfix(reward=f"{run.rewards[-1]:.4f}")
    run.policy.save_pretrained(arguments.output_dir)
    report: dict[str, Any] = {"before": run.before, "after": evaluate(run.policy, arguments), "rewards": run.rewards}
    report["setting"] = run.setting() | {"command": " ".join(["python", *sys.argv])}
    report["setting"]["minutes"] = (time.perf_counter() - started) / 60
    write_text(arguments.output_dir / "report.json", json.dumps(report, indent=2))
    for name, figures in report["before"].items():
        print(f"{name}: {figures['mean']:.3f} before, {report['after'][name]['mean']:.3f} after, in the simulator")


if __name__ == "__main__":
    run_script(main)
