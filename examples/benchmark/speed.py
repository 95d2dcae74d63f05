"""Measure the speed and memory of a pipeline: single predictions, batches of candidates and streaming.

    python examples/benchmark/speed.py --model runs/pusht --schedulers PNDMScheduler:50 DPMSolverMultistepScheduler:8

All schedulers are measured in one run, so that their times are comparable. Times include decoding and are medians over
`--repeats` runs (5 times as many chunks of the stream) after one warm-up run; the slowest chunk is also reported. The
memory is the peak of the process over all schedulers, without the memory of a GPU. A batch predicts `--num_actions` frames
for each action sequence from one history: `--batch_sizes 50` corresponds to one decision of a planner among 50 candidates.
"""

import json
import platform
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from transformers import HfArgumentParser

from irasim_diffusers import IRASimPipeline, embedded_checkpoint
from irasim_diffusers.commands import check_output
from irasim_diffusers.evaluation import EvaluationCounter
from irasim_diffusers.files import write_text
from irasim_diffusers.training import run_script


@dataclass
class SpeedArguments:
    model: str = field(default=str(embedded_checkpoint()), metadata={"help": "pipeline folder or Hub id"})
    schedulers: list[str] = field(
        default_factory=list, metadata={"help": "diffusers schedulers as class:steps (default: the model's)"}
    )
    batch_sizes: list[int] = field(
        default_factory=lambda: [1, 50], metadata={"help": "numbers of action sequences that are predicted together"}
    )
    num_actions: int = field(default=15, metadata={"help": "actions, and thus predicted frames, per sequence"})
    chunk_length: int = field(default=2, metadata={"help": "frames per streamed chunk"})
    repeats: int = field(default=5, metadata={"help": "repetitions of each measurement"})
    dtype: str = field(default="bfloat16", metadata={"help": "float32, bfloat16 or float16"})
    device: str = field(default="cpu", metadata={"help": "cpu, cuda, ..."})
    compile: bool = field(default=False, metadata={"help": "compile the transformer's blocks"})
    output: Path | None = field(default=None, metadata={"help": "JSON report to write"})


def seconds(work: Callable[[], object], device: str, repeats: int) -> float:
    """Return the median duration of `work` in seconds, after one warm-up run."""
    durations = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        if device != "cpu":
            torch.cuda.synchronize()
        durations.append(time.perf_counter() - start)
    return float(np.median(durations[1:]))


def main() -> None:
    (arguments,) = HfArgumentParser(SpeedArguments).parse_args_into_dataclasses()
    if arguments.output:
        check_output(arguments.output, ".json")
    pipeline = IRASimPipeline.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype))
    pipeline.to(arguments.device)
    pipeline.set_progress_bar_config(disable=True)
    if arguments.compile:
        pipeline.transformer.compile_repeated_blocks(dynamic=False)
    config = pipeline.transformer.config
    history = np.zeros((config.num_history_frames, *pipeline.frame_size, 3), dtype=np.uint8)
    own = f"{type(pipeline.scheduler).__name__}:{pipeline.config.num_inference_steps}"
    rows = []
    sizes = [f"s for {size} x {arguments.num_actions} frames" for size in arguments.batch_sizes]
    latency = f"ms per chunk of {arguments.chunk_length}: median"
    print("|", " | ".join(["scheduler", "steps", "evaluations", *sizes, latency, "maximum"]), "|")
    print("|---" * (5 + len(sizes)) + "|")
    for name in arguments.schedulers or [own]:
        class_name, steps = name.split(":")
        pipeline = pipeline.with_scheduler(class_name)
        row: dict[str, object] = {"scheduler": class_name, "steps": int(steps)}
        for size in arguments.batch_sizes:
            actions = np.zeros((size, arguments.num_actions, config.action_dim))

            def window(
                sampled: IRASimPipeline = pipeline, actions: np.ndarray = actions, steps: int = int(steps)
            ) -> None:
                sampled(history, actions, num_inference_steps=steps, output_type="np")

            with EvaluationCounter(pipeline.transformer) as evaluations:
                row[f"seconds_{size}"] = seconds(window, arguments.device, arguments.repeats)
            row["evaluations"] = evaluations.count // (arguments.repeats + 1)
        actions = np.zeros((arguments.chunk_length * (5 * arguments.repeats + 1), config.action_dim))
        stream = pipeline.stream(
            history, actions, arguments.chunk_length, num_inference_steps=int(steps), output_type="np"
        )
        chunks = []
        for _ in range(5 * arguments.repeats + 1):
            start = time.perf_counter()
            for _ in range(arguments.chunk_length):
                next(stream)
            chunks.append(1000 * (time.perf_counter() - start))
        row |= {"chunk_ms": float(np.median(chunks[1:])), "slowest_chunk_ms": max(chunks[1:])}
        rows.append(row)
        speeds = " | ".join(f"{row[f'seconds_{size}']:.2f}" for size in arguments.batch_sizes)
        print(
            f"| {class_name} | {steps} | {row['evaluations']} | {speeds} | {row['chunk_ms']:.0f} | "
            f"{row['slowest_chunk_ms']:.0f} |",
            flush=True,
        )
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9  # Linux returns KiB
    print(
        f"peak memory {memory:.2f} GB, {platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    )
    if arguments.output:
        write_text(arguments.output, json.dumps({"rows": rows, "peak_memory_gb": memory}, indent=2))


if __name__ == "__main__":
    run_script(main)
