"""Measure the speed of world model environments and of a decision, and the memory over a long episode.

    python examples/benchmark/closed_loop.py --num_envs 1 8 --num_candidates 50 --memory_steps 2000

A decision ranks `num_candidates` sequences of `horizon` actions by a goal image, from one start frame.
Speed is the number of rows times steps per second of wall-clock time and of CPU time. CPU time counts this process only,
so it does not depend on other work of the machine; on a CPU with `--num_threads 1`, it is the time on one idle core.
"""

import json
import platform
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from transformers import HfArgumentParser

from irasim_diffusers import IRASimPipeline, embedded_checkpoint
from irasim_diffusers.commands import check_output
from irasim_diffusers.files import write_text
from irasim_diffusers.planning import Rank
from irasim_diffusers.rewards import GoalImage
from irasim_diffusers.training import check_ranges, exit_without_extra, run_script

try:
    import gymnasium  # noqa: F401

    from irasim_diffusers.envs import WorldModelVectorEnv
except ModuleNotFoundError as error:
    exit_without_extra(error, "envs")


@dataclass
class ClosedLoopArguments:
    model: str = field(default=str(embedded_checkpoint()), metadata={"help": "pipeline folder or Hub id"})
    num_envs: list[int] = field(
        default_factory=lambda: [1, 8], metadata={"help": "numbers of environment rows to measure"}
    )
    num_steps: int = field(default=30, metadata={"help": "number of measured steps, after three warm-up steps"})
    memory_steps: int = field(
        default=0, metadata={"help": "number of steps of one row in which memory is measured; 0 skips this"}
    )
    num_candidates: int = field(
        default=0, metadata={"help": "number of action sequences of a measured decision; 0 skips this"}
    )
    horizon: int = field(default=15, metadata={"help": "number of actions of a sequence"})
    dtype: str = field(
        default="float32", metadata={"help": "float32 or bfloat16, for the decision; environments use their default"}
    )
    num_threads: int = field(default=1, metadata={"help": "number of torch threads"})
    device: str = field(default="cpu", metadata={"help": "cpu, cuda, ..."})
    output: Path | None = field(default=None, metadata={"help": "JSON report to write"})


def speed(environments: WorldModelVectorEnv, num_steps: int) -> dict[str, float]:
    """Measure rows times steps per second of wall-clock time and of CPU time."""
    environments.reset(seed=0)
    environments.action_space.seed(0)
    for _ in range(3):
        environments.step(environments.action_space.sample())
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(num_steps):
        environments.step(environments.action_space.sample())
    steps = environments.num_envs * num_steps
    return {
        "rows": environments.num_envs,
        "per_second": round(steps / (time.perf_counter() - wall), 1),
        "per_cpu_second": round(steps / (time.process_time() - cpu), 1),
    }


def decision(arguments: ClosedLoopArguments) -> dict[str, Any]:
    """Measure the median of three times in which `Rank` chooses among sequences of actions."""
    model = IRASimPipeline.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype)).to(arguments.device)
    model.set_progress_bar_config(disable=True)
    frame, space = np.full((*model.frame_size, 3), 255, np.uint8), model.action_space.box()
    space.seed(0)
    shape = arguments.num_candidates, arguments.horizon
    candidates = np.stack([space.sample() for _ in range(shape[0] * shape[1])]).reshape(*shape, -1)
    state, goal, rank = model.start(frame[None], seeds=[0]), GoalImage(frame), Rank()
    rank(model, state, goal, candidates[:, :1])
    times = []
    for _ in range(3):
        start = time.perf_counter()
        rank(model, state, goal, candidates)
        times.append(time.perf_counter() - start)
    size = {"candidates": arguments.num_candidates, "horizon": arguments.horizon, "dtype": arguments.dtype}
    return size | {"seconds": round(statistics.median(times), 2)}


def memory(environments: WorldModelVectorEnv, num_steps: int) -> list[dict[str, float]]:
    """Measure the resident memory in MiB at several points of a long episode."""
    process, readings = psutil.Process(), []
    environments.reset(seed=0)
    for step in range(1, num_steps + 1):
        environments.step(environments.action_space.sample())
        if step % max(1, num_steps // 5) == 0:
            readings.append({"step": step, "megabytes": round(process.memory_info().rss / 2**20, 1)})
    return readings


def main() -> None:
    (arguments,) = HfArgumentParser(ClosedLoopArguments).parse_args_into_dataclasses()
    if arguments.output is not None:
        check_output(arguments.output, ".json")
    at_least_1 = ("num_envs", "num_steps", "horizon", "num_threads")
    choices = {"dtype": ("float32", "bfloat16")}
    check_ranges(arguments, ("memory_steps", "num_candidates"), at_least_1, choices=choices)
    torch.set_num_threads(arguments.num_threads)

    def environments(num_envs: int) -> WorldModelVectorEnv:
        return WorldModelVectorEnv.from_pretrained(
            arguments.model, num_envs, arguments.device, max_episode_steps=10**6, render_mode="rgb_array"
        )

    report: dict[str, Any] = {
        "machine": f"{platform.machine()}, {arguments.num_threads} thread(s), torch {torch.__version__}",
        "speed": [speed(environments(number), arguments.num_steps) for number in arguments.num_envs],
    }
    if arguments.num_candidates:
        report["decision"] = decision(arguments)
    if arguments.memory_steps:
        report["memory"] = memory(environments(1), arguments.memory_steps)
    print(json.dumps(report, indent=2))
    if arguments.output is not None:
        write_text(arguments.output, json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    run_script(main)
