"""Collect Push-T episodes as a LeRobotDataset v3.0 folder.

    python examples/pusht/collect.py --output data/pusht-train --episodes 1500 --first_seed 0

Each episode uses one of five policies: an aimless pusher, an expert, the expert with noise, a pusher driven by held
arrow keys as in the Space, and a pusher that moves to distant targets, including edges and corners. With the
same settings, an episode depends only on its seed. Episodes are written in files of 50. The same command resumes at
the first missing file, and a larger `--episodes` adds episodes; any other changed setting raises an error.
`--pusher_radius` changes the simulated world.
"""

import contextlib
import functools
import json
import multiprocessing
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from expert import push_to_goal
from huggingface_hub import DatasetCard, DatasetCardData, HfApi
from simulator import FPS, PUSHER_RADIUS, SIZE, Pusher, Simulator, State, hold_keys, jump_to_targets, push_about
from tqdm import tqdm
from transformers import HfArgumentParser

from irasim_diffusers.data import (
    SOURCE_FILE,
    Episode,
    EpisodeSource,
    LeRobotFolder,
    count_written,
    first_readable,
    publish_lerobot,
    write_file,
    write_metadata,
)
from irasim_diffusers.files import write_text
from irasim_diffusers.json_files import read_json_object
from irasim_diffusers.training import check_ranges, run_script

CAMERA = "observation.image"
NAMES = {
    "observation.state": ["agent_x", "agent_y"],
    "observation.environment_state": ["block_x", "block_y", "block_angle"],
    "action": ["target_x", "target_y"],
}
TASKS = {
    "aimless": "Push the T-shaped block about.",
    "expert": "Push the T-shaped block onto the T-shaped goal.",
    "noisy": "Push the T-shaped block onto the T-shaped goal, with an unsteady hand.",
    "keys": "Move the pusher by held keys.",
    "jumps": "Move the pusher to distant targets.",
}
STATES = ("observation.state", "observation.environment_state")  # pusher, and block
EPISODES_PER_FILE = 50
CARD = """# Push-T clips

{episodes} episodes of {length} frames at {fps} Hz of the Push-T simulator (gym-pusht), {size}x{size} pixels, in LeRobotDataset
v3.0. Frames are the simulator's observations, which do not show the action. An action is the target position (x, y) of the
pusher in the arena, 0 to 512 from the top left. The pusher's radius is {pusher_radius:g} arena units
({default_radius:g} in gym-pusht).

| policy | episodes | behavior |
|---|---|---|
{rows}

`observation.state` is the pusher's position. `observation.environment_state` is the position and angle (radians) of the
block; positions are in arena units, and the origin of the block's frame is the middle of the bar's upper edge. Videos are lossless.

Created with `{command}` from irasim-diffusers. Episode k uses seed {first_seed} + k.
"""
BEHAVIORS = {
    "aimless": "pushes the block at random, slides off, misses, wanders or waits",
    "expert": "pushes the block to the goal and waits",
    "noisy": "the expert with noise on every target (standard deviation 5 to 40 units)",
    "keys": "follows held arrow keys at 4 to 64 units per step, or waits",
    "jumps": "moves to targets anywhere in the arena, including edges, corners and the block, or waits",
}


@dataclass
class CollectArguments:
    output: Path = field(metadata={"help": "folder to write the dataset to"})
    episodes: int = field(default=1000, metadata={"help": "number of episodes"})
    length: int = field(default=120, metadata={"help": "frames per episode; 120 are 12 seconds"})
    first_seed: int = field(default=0, metadata={"help": "seed of episode 0; episode k uses first_seed + k"})
    aimless: float = field(default=0.3, metadata={"help": "relative share of episodes with the aimless pusher"})
    expert: float = field(default=0.1, metadata={"help": "relative share of episodes with the expert"})
    noisy: float = field(default=0.1, metadata={"help": "relative share of episodes with the noisy expert"})
    keys: float = field(default=0.35, metadata={"help": "relative share of episodes driven by held keys"})
    jumps: float = field(default=0.15, metadata={"help": "relative share of episodes with distant targets"})
    pusher_radius: float = field(
        default=PUSHER_RADIUS, metadata={"help": "radius of the pusher in arena units; the expert supports only 15"}
    )
    num_workers: int = field(
        default=multiprocessing.cpu_count(), metadata={"help": "number of processes (default: one per CPU core)"}
    )
    push_to_hub: str | None = field(default=None, metadata={"help": "Hub repository to publish to, as user/name"})


def prepare_folder(arguments: CollectArguments) -> None:
    """Write the settings file of a new folder, or check the settings of an existing one.

    If the existing folder has fewer episodes, its info.json is deleted, which marks the folder as incomplete.

    Raises:
        ValueError: If the folder contains files but no valid settings file, or if any setting differs, except for a larger number
            of episodes.
    """
    root = arguments.output
    names = ("episodes", "length", "first_seed", *TASKS, "pusher_radius")
    wanted = {name: getattr(arguments, name) for name in names}
    if not (root / SOURCE_FILE).is_file():
        if root.is_dir() and any(root.iterdir()):
            raise ValueError(
                f"`output` must be a new folder or one written by collect.py, got {str(root)!r}, which contains files but no settings file."
            )
        write_text(root / SOURCE_FILE, json.dumps(wanted))
    written = read_settings(root)
    if written | {"episodes": None} == wanted | {"episodes": None} and written["episodes"] < arguments.episodes:
        (root / "meta" / "info.json").unlink(missing_ok=True)
        write_text(root / SOURCE_FILE, json.dumps(wanted))
        return
    changes = [
        f"`{name}` {written.get(name)}, not {value}" for name, value in wanted.items() if written.get(name) != value
    ]
    if changes:
        raise ValueError(
            f"`output` {str(root)!r} was created with {', '.join(changes)}: use the original settings or choose a new folder."
        )


def read_settings(root: Path) -> dict[str, Any]:
    """Read the settings that determine the episodes of a folder.

    Raises:
        ValueError: If the folder was not created by this script, or its settings file is damaged.
    """
    if not (root / SOURCE_FILE).is_file():
        raise ValueError(
            f"{str(root)!r} must be a folder written by collect.py: it has no settings file {SOURCE_FILE!r}."
        )
    settings = read_json_object(root / SOURCE_FILE)
    if "first_seed" not in settings:  # `write_lerobot` writes a file of the same name
        raise ValueError(
            f"{str(root)!r} must be a folder written by collect.py: another program wrote {SOURCE_FILE!r}. Choose another folder."
        )
    return settings


def check_states(*datasets: EpisodeSource, states: tuple[str, ...] = STATES) -> None:
    """Check that datasets contain states that this script writes, before any work.

    Raises:
        ValueError: If a state is missing, or no episode can be read.
    """
    for dataset in datasets:
        found = first_readable(dataset, dataset.vectors).keys() - {"action"}
        for name in states:
            if name not in found:
                raise ValueError(
                    f"{dataset.name!r} must have the state {name!r}, got {sorted(found)}: collect a dataset with collect.py."
                )


def pusher_of(kind: str, rng: np.random.Generator, state: State) -> Pusher:
    """Create the pusher of one episode."""
    if kind == "aimless":
        return push_about(rng, state)
    if kind == "keys":
        return hold_keys(rng, state)
    if kind == "jumps":
        return jump_to_targets(rng, state)
    return push_to_goal(rng, state, noise=rng.uniform(5, 40) if kind == "noisy" else 0.0)


def collect_episode(simulator: Simulator, seed: int, length: int, shares: dict[str, float]) -> Episode:
    """Collect an episode of `length` frames with a policy that is drawn in proportion to `shares`."""
    state = simulator.reset(seed)
    weights = np.array([shares[kind] for kind in TASKS])
    kind = list(TASKS)[np.random.default_rng([seed, 3]).choice(len(TASKS), p=weights / weights.sum())]
    pusher = pusher_of(kind, np.random.default_rng([seed, 1]), state)
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
        task=TASKS[kind],
    )


def collect_file(file_index: int, arguments: CollectArguments) -> int:
    """Collect and write one file unless it is complete; return its number of episodes.

    A larger file starts with the same episodes, because an episode depends only on its seed.
    """
    first = file_index * EPISODES_PER_FILE
    numbers = range(first, min(first + EPISODES_PER_FILE, arguments.episodes))
    if count_written(arguments.output, file_index) < len(numbers):
        simulator = Simulator(arguments.pusher_radius)
        shares = {kind: getattr(arguments, kind) for kind in TASKS}
        seeds = [arguments.first_seed + number for number in numbers]
        write_file(
            arguments.output,
            file_index,
            [collect_episode(simulator, seed, arguments.length, shares) for seed in seeds],
            fps=FPS,
            camera=CAMERA,
            tasks=list(TASKS.values()),
            first_episode=first,
            first_frame=first * arguments.length,
        )
    return len(numbers)


def write_card(arguments: CollectArguments) -> None:
    """Write the dataset card, README.md in the folder."""
    counts = dict.fromkeys(TASKS.values(), 0)
    for row in LeRobotFolder(arguments.output).rows:
        counts[row["tasks"][0]] += 1
    card = CARD.format(
        episodes=sum(counts.values()),
        length=arguments.length,
        fps=FPS,
        size=SIZE,
        pusher_radius=arguments.pusher_radius,
        default_radius=PUSHER_RADIUS,
        rows="\n".join(f"| {kind} | {counts[task]} | {BEHAVIORS[kind]} |" for kind, task in TASKS.items()),
        command=" ".join(["python", *sys.argv]),
        first_seed=arguments.first_seed,
    )
    header = DatasetCardData(
        license="apache-2.0",
        task_categories=["robotics"],
        tags=["LeRobot", "push-t", "world-model"],
        configs=[{"config_name": "default", "data_files": "data/*/*.parquet"}],
    )
    DatasetCard(f"---\n{header.to_yaml()}\n---\n\n{card}").save(arguments.output / "README.md")


def main() -> None:
    (arguments,) = HfArgumentParser(CollectArguments).parse_args_into_dataclasses()
    check_ranges(arguments, not_negative=("first_seed",), at_least_1=("episodes", "length", "num_workers"))
    shares = [getattr(arguments, kind) for kind in TASKS]
    if min(shares) < 0 or sum(shares) == 0:
        raise ValueError(
            f"{', '.join(f'`{kind}`' for kind in TASKS)} must be non-negative shares that are not all zero, got {shares}."
        )
    if arguments.pusher_radius <= 0:
        raise ValueError(f"`pusher_radius` must be positive, got {arguments.pusher_radius:g}.")
    if arguments.pusher_radius != PUSHER_RADIUS and arguments.expert + arguments.noisy > 0:
        raise ValueError(
            f"`expert` and `noisy` must be 0, got {arguments.expert:g} and {arguments.noisy:g}: the expert supports only "
            f"`pusher_radius` {PUSHER_RADIUS:g}, got {arguments.pusher_radius:g}."
        )
    prepare_folder(arguments)
    if arguments.push_to_hub:  # before the work, so that an error is reported early
        HfApi().create_repo(arguments.push_to_hub, repo_type="dataset", exist_ok=True)
    files = range(-(-arguments.episodes // EPISODES_PER_FILE))
    work, num_workers = functools.partial(collect_file, arguments=arguments), min(arguments.num_workers, len(files))
    context = multiprocessing.get_context("spawn")  # forking a process with threads can deadlock
    with context.Pool(num_workers) if num_workers > 1 else contextlib.nullcontext() as pool:
        counts = pool.imap_unordered(work, files) if pool else map(work, files)
        with tqdm(total=arguments.episodes, unit="episode") as bar:
            for count in counts:
                bar.update(count)
    write_metadata(
        arguments.output,
        fps=FPS,
        camera=CAMERA,
        frame_size=(SIZE, SIZE),
        names=NAMES,
        tasks=list(TASKS.values()),
        robot_type="gym_pusht",
    )
    write_card(arguments)
    if arguments.push_to_hub:
        publish_lerobot(LeRobotFolder(arguments.output), arguments.push_to_hub)


if __name__ == "__main__":
    run_script(main)
