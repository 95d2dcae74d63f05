"""Collect episodes of Push-T with a random pusher, as a LeRobotDataset v3.0 folder.

    python examples/pusht/collect.py --output data/pusht-train --episodes 1000 --first_seed 0

Every episode is fixed by its seed. Files of 50 episodes are written one by one; the same command run again goes on
with the first one missing.
"""

import argparse
import functools
import multiprocessing
from pathlib import Path

import numpy as np
from simulator import FPS, SIZE, TASK, Simulator, push_about
from tqdm import tqdm

from irasim_diffusers.data import Episode, is_written, write_file, write_metadata

CAMERA = "observation.image"
NAMES = {
    "observation.state": ["agent_x", "agent_y"],
    "observation.environment_state": ["block_x", "block_y", "block_angle"],
    "action": ["target_x", "target_y"],
}
EPISODES_PER_FILE = 50


def collect_episode(simulator: Simulator, seed: int, length: int) -> Episode:
    """One episode of `length` frames."""
    state = simulator.reset(seed)
    pusher = push_about(np.random.default_rng([seed, 1]), state)
    action = next(pusher)
    frames, states, actions = [], [], []
    for _ in range(length):
        frames.append(simulator.frame())
        states.append(state)
        actions.append(action)
        state = simulator.step(action)
        action = pusher.send(state)
    return Episode(
        frames=np.stack(frames),
        actions=np.stack(actions),
        states={
            "observation.state": np.stack([state.agent for state in states]).astype(np.float32),
            "observation.environment_state": np.stack([state.block for state in states]).astype(np.float32),
        },
        task=TASK,
    )


def collect_file(file_index: int, arguments: argparse.Namespace) -> int:
    """Collect and write one file of episodes; return its number of episodes."""
    first = file_index * EPISODES_PER_FILE
    numbers = range(first, min(first + EPISODES_PER_FILE, arguments.episodes))
    if not is_written(arguments.output, file_index):
        simulator = Simulator()
        write_file(
            arguments.output,
            file_index,
            [collect_episode(simulator, arguments.first_seed + number, arguments.length) for number in numbers],
            fps=FPS,
            camera=CAMERA,
            first_episode=first,
            first_frame=first * arguments.length,
        )
    return len(numbers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--episodes", type=int, default=1000)
    parser.add_argument("--length", type=int, default=120, help="frames of an episode (default: 120, 12 seconds)")
    parser.add_argument("--first_seed", type=int, default=0, help="seed of episode 0; episode k has first_seed + k")
    parser.add_argument("--num_workers", type=int, default=multiprocessing.cpu_count())
    arguments = parser.parse_args()

    files = range(-(-arguments.episodes // EPISODES_PER_FILE))
    with multiprocessing.Pool(arguments.num_workers) as pool, tqdm(total=arguments.episodes, unit="episode") as bar:
        for count in pool.imap_unordered(functools.partial(collect_file, arguments=arguments), files):
            bar.update(count)
    write_metadata(
        arguments.output,
        fps=FPS,
        camera=CAMERA,
        frame_size=(SIZE, SIZE),
        names=NAMES,
        tasks=[TASK],
        robot_type="gym_pusht",
    )


if __name__ == "__main__":
    main()
