"""Counterfactual futures of recorded Push-T histories: the simulator executes other actions."""

from dataclasses import dataclass

import numpy as np
from simulator import Simulator, State, push_about, push_at

from irasim_diffusers.data import LeRobotFolder
from irasim_diffusers.metrics import psnr

WAYS = 8  # futures per history
MOVED = 5.0
"""Minimum displacement (arena units) or turn (hundredths of a radian) of a moved block; about a pixel."""
DISTINCT = 30.0
"""Two simulated futures are different if the PSNR between them is at most this value, in dB."""


@dataclass(frozen=True)
class Task:
    """A recorded history for counterfactual identification."""

    seed: int  # of the episode
    pusher_radius: float  # arena units
    actions: np.ndarray  # (T, 2), recorded
    blocks: np.ndarray  # (T, 3), recorded: x, y, angle
    start: int  # index of the last history frame
    num_actions: int  # actions of a future
    history: int  # number of history frames


def moved(before: np.ndarray, after: np.ndarray) -> bool:
    """Return whether the pose of the block (x, y, angle) has changed by more than about a pixel."""
    return bool(np.linalg.norm(after[:2] - before[:2]) > MOVED or abs(after[2] - before[2]) > MOVED / 100)


def counterfactuals(task: Task) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Simulate 8 different futures of one history, in each of which the block moves.

    Returns:
        History (h, 96, 96, 3), actions (8, n, 2) and frames (8, n, 96, 96, 3), uint8; None if 60 action sequences do not
        give 8 such futures.

    Raises:
        ValueError: If the simulator does not reproduce the recorded episode.
    """
    start, end = task.start, task.start + task.num_actions
    past = task.actions[:start]
    simulator = Simulator(task.pusher_radius)
    _, states = simulator.replay(task.seed, past, first_frame=start)
    rng = np.random.default_rng([task.seed, 2])
    sequences: list[np.ndarray] = []
    futures: list[np.ndarray] = []
    seen = None
    for attempt in range(60):
        actions = task.actions[start:end] if attempt == 0 else candidate(rng, states[-1], task.num_actions)
        frames, outcome = simulator.replay(task.seed, np.concatenate([past, actions]), start + 1 - task.history)
        if attempt == 0:
            _check_end(task, outcome[-1])
        if not moved(outcome[start].block, outcome[-1].block):
            continue
        seen, future = frames[: task.history], frames[task.history :]
        if any(psnr(future / 255.0, other / 255.0) > DISTINCT for other in futures):
            continue
        sequences.append(actions)
        futures.append(future)
        if len(futures) == WAYS:
            return seen, np.stack(sequences), np.stack(futures)
    return None


def check_reproduction(task: Task) -> None:
    """Raise ValueError if the simulator does not reproduce the recorded episode up to the end of a task."""
    end = task.start + task.num_actions
    _, states = Simulator(task.pusher_radius).replay(task.seed, task.actions[:end], first_frame=end)
    _check_end(task, states[-1])


def _check_end(task: Task, state: State) -> None:
    block = task.blocks[task.start + task.num_actions]
    if moved(block, state.block):
        raise ValueError(
            f"`first_seed` and `pusher_radius` must match the dataset: with seed {task.seed} the block ends at "
            f"{state.block.round(2).tolist()} in the simulator and {block.round(2).tolist()} in the dataset."
        )


def candidate(rng: np.random.Generator, state: State, num_actions: int) -> np.ndarray:
    """Draw a random action sequence (n, 2) that probably pushes the block.

    The pusher does not observe the result of its actions: it always receives the start state.
    """
    pusher = push_at(rng, state) if rng.random() < 0.8 else push_about(rng, state)
    return np.stack([next(pusher), *(pusher.send(state) for _ in range(num_actions - 1))])


def identification_tasks(
    dataset: LeRobotFolder, num_histories: int, length: int, history: int, first_seed: int, pusher_radius: float
) -> list[Task]:
    """Select from each of up to `2 * num_histories` episodes a history after which the block moves."""
    tasks = []
    for number in range(len(dataset)):
        vectors = dataset.vectors(number)
        block = vectors["observation.environment_state"]
        num_actions = length - history
        starts = [k for k in range(max(20, history - 1), len(block) - num_actions, 5) if moved(block[k], block[k + 5])]
        if starts:
            actions = vectors["action"]
            tasks.append(Task(first_seed + number, pusher_radius, actions, block, starts[0], num_actions, history))
    # spare histories, because some have fewer than 8 different futures with a moving block
    return tasks[: 2 * num_histories]
