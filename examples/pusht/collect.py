"""Collect episodes of Push-T, as a LeRobotDataset v3.0 folder.

    python examples/pusht/collect.py --output data/pusht-train --episodes 1500 --first_seed 0

Five pushers share the episodes: an aimless one, an expert, the expert with noise, one driven by held arrow keys as in the Space,
and one that goes to distant targets, also at the edges and in the corners. The seed of an episode determines its content. Files of 50
episodes are written one by one. The same command resumes at the first missing file, a larger `--episodes` adds episodes, and
other settings raise an error. `--pusher_radius` changes the world.
"""

import functools
import json
import multiprocessing
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from expert import push_to_goal
from huggingface_hub import DatasetCard, DatasetCardData, HfApi
from simulator import FPS, PUSHER_RADIUS, SIZE, Pusher, Simulator, State, hold_keys, jump_to_targets, push_about
from tqdm import tqdm
from transformers import HfArgumentParser

from irasim_diffusers.data import (
    Episode,
    LeRobotFolder,
    is_written,
    publish_lerobot,
    write_file,
    write_metadata,
)
from irasim_diffusers.data.lerobot import EPISODES_PATH
from irasim_diffusers.data.publish import SOURCE_FILE
from irasim_diffusers.files import temporary_path
from irasim_diffusers.training import run_script

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
EPISODES_PER_FILE = 50
CARD = """# Push-T clips

{episodes} episodes of {length} frames at {fps} Hz of the Push-T simulator (gym-pusht), {size}x{size} pixels, in LeRobotDataset
v3.0. Pixels are the simulator's observations, which do not show the action. An action is the position in the arena,
0 to 512 from the top left, that the pusher is to move to. The pusher's radius is {pusher_radius:g} of these units
(in gym-pusht {default_radius:g}).

| pusher | episodes | |
|---|---|---|
{rows}

`observation.state` is the pusher's position, `observation.environment_state` position and angle (radians) of the block's
frame, whose origin is the middle of the bar's upper edge. Videos are stored without loss.

Made by `{command}` of irasim-diffusers; episode k is fixed by seed {first_seed} + k.
"""
WHO = {
    "aimless": "seeks contact, misses, slides off, wanders, waits",
    "expert": "brings the block to the goal and waits",
    "noisy": "the expert with noise of 5 to 40 units on every target",
    "keys": "holds arrow keys at speeds of 4 to 64 units a step, or waits",
    "jumps": "moves to targets in the whole arena, including edges, corners and the block",
}


@dataclass
class CollectArguments:
    output: Path = field(metadata={"help": "folder of the data set"})
    episodes: int = 1000
    length: int = field(default=120, metadata={"help": "frames of an episode; 120 are 12 seconds"})
    first_seed: int = field(default=0, metadata={"help": "seed of episode 0; episode k has first_seed + k"})
    aimless: float = field(default=0.3, metadata={"help": "share of episodes of the aimless pusher"})
    expert: float = field(default=0.1, metadata={"help": "share of the expert"})
    noisy: float = field(default=0.1, metadata={"help": "share of the expert with noise"})
    keys: float = field(default=0.35, metadata={"help": "share of the pusher that is driven by held keys"})
    jumps: float = field(default=0.15, metadata={"help": "share of the pusher that goes to distant targets"})
    pusher_radius: float = field(
        default=PUSHER_RADIUS, metadata={"help": "arena units; the expert knows a pusher of 15 only"}
    )
    num_workers: int = multiprocessing.cpu_count()
    push_to_hub: str | None = field(default=None, metadata={"help": "Hub repository to publish to, user/name"})


def begin(arguments: CollectArguments) -> None:
    """Note in the folder what fixes its episodes; a finished one that shall grow is unfinished until it has.

    Raises:
        ValueError: If the folder was begun with anything else than fewer episodes.
    """
    root, marker = arguments.output, arguments.output / SOURCE_FILE
    names = ("episodes", "length", "first_seed", *TASKS, "pusher_radius")
    wanted = {name: getattr(arguments, name) for name in names}
    if not marker.is_file():
        if root.is_dir() and any(root.iterdir()):
            raise ValueError(f"{str(root)!r} holds files of unknown settings: give a new folder.")
        write_marker(marker, wanted)
    begun = json.loads(marker.read_text())
    if begun | {"episodes": None} == wanted | {"episodes": None} and begun["episodes"] < arguments.episodes:
        (root / "meta" / "info.json").unlink(missing_ok=True)
        write_marker(marker, wanted)
        return
    changes = [
        f"`{name}` {begun.get(name)}, not {value}" for name, value in wanted.items() if begun.get(name) != value
    ]
    if changes:
        raise ValueError(f"{str(root)!r} was begun with {', '.join(changes)}: give a new folder or these settings.")


def write_marker(marker: Path, settings: dict[str, Any]) -> None:
    """Write what fixes the episodes of a folder."""
    with temporary_path(marker) as partial:
        partial.write_text(json.dumps(settings))


def pusher_of(kind: str, rng: np.random.Generator, state: State) -> Pusher:
    """The pusher of one episode."""
    if kind == "aimless":
        return push_about(rng, state)
    if kind == "keys":
        return hold_keys(rng, state)
    if kind == "jumps":
        return jump_to_targets(rng, state)
    return push_to_goal(rng, state, noise=rng.uniform(5, 40) if kind == "noisy" else 0.0)


def collect_episode(simulator: Simulator, seed: int, length: int, shares: dict[str, float]) -> Episode:
    """One episode of `length` frames, its pusher drawn by the shares."""
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


def written_episodes(root: Path, file_index: int) -> int:
    """Number of episodes in a file; a new version of a file that has grown keeps those that it had as they are."""
    if not is_written(root, file_index):
        return 0
    return pq.read_metadata(root / EPISODES_PATH.format(chunk_index=0, file_index=file_index)).num_rows


def collect_file(file_index: int, arguments: CollectArguments) -> int:
    """Collect and write one file of episodes, if it is not there or shall have more; return its number of episodes."""
    first = file_index * EPISODES_PER_FILE
    numbers = range(first, min(first + EPISODES_PER_FILE, arguments.episodes))
    if written_episodes(arguments.output, file_index) < len(numbers):
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
    """Write the data set card, README.md in the folder."""
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
        rows="\n".join(f"| {kind} | {counts[task]} | {WHO[kind]} |" for kind, task in TASKS.items()),
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
    shares = [getattr(arguments, kind) for kind in TASKS]
    if min(shares) < 0 or sum(shares) == 0:
        raise ValueError(
            f"{', '.join(f'`{kind}`' for kind in TASKS)} must be shares, none negative and not all zero, got {shares}."
        )
    if arguments.pusher_radius <= 0:
        raise ValueError(f"`pusher_radius` must be positive, got {arguments.pusher_radius:g}.")
    if arguments.pusher_radius != PUSHER_RADIUS and arguments.expert + arguments.noisy > 0:
        raise ValueError(
            f"the expert plans for a pusher of radius {PUSHER_RADIUS:g}: with `pusher_radius` {arguments.pusher_radius:g}, "
            f"`expert` and `noisy` must be 0, got {arguments.expert:g} and {arguments.noisy:g}."
        )
    begin(arguments)
    if arguments.push_to_hub:  # before hours of work
        HfApi().create_repo(arguments.push_to_hub, repo_type="dataset", exist_ok=True)
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
        tasks=list(TASKS.values()),
        robot_type="gym_pusht",
    )
    write_card(arguments)
    if arguments.push_to_hub:
        publish_lerobot(LeRobotFolder(arguments.output), arguments.push_to_hub)


if __name__ == "__main__":
    run_script(main)
