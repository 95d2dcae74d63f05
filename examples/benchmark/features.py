"""Compare precisions, quantization and caches that examples/features.md describes.

    python examples/benchmark/features.py --dataset data/pusht-test

The script prints a table for held-out clips of 15 predicted frames: PSNR, number of computed attention layers, time in
seconds, and memory of the transformer's weights. It requires `pip install torchao`.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from diffusers import (
    FirstBlockCacheConfig,
    PipelineQuantizationConfig,
    PyramidAttentionBroadcastConfig,
    TorchAoConfig,
)
from transformers import HfArgumentParser

from irasim_diffusers import IRASimPipeline, embedded_checkpoint
from irasim_diffusers.data import open_dataset
from irasim_diffusers.metrics import psnr
from irasim_diffusers.training import run_script


@dataclass
class FeatureArguments:
    dataset: str = field(metadata={"help": "held-out dataset"})
    model: str = field(default=str(embedded_checkpoint()), metadata={"help": "pipeline folder or Hub id"})
    num_clips: int = field(default=12, metadata={"help": "maximum number of clips, one per episode"})
    cache_steps: int = field(
        default=16, metadata={"help": "denoising steps of the measurements with caches, and of their baseline"}
    )


def int8(model: str) -> IRASimPipeline:
    """Load the pipeline with 8-bit weights."""
    from torchao.quantization import Int8WeightOnlyConfig

    mapping = {"transformer": TorchAoConfig(Int8WeightOnlyConfig())}
    return IRASimPipeline.from_pretrained(model, quantization_config=PipelineQuantizationConfig(quant_mapping=mapping))


def casting(model: str) -> IRASimPipeline:
    """Load the pipeline with weights stored in float8."""
    pipeline = IRASimPipeline.from_pretrained(model, dtype=torch.bfloat16)
    pipeline.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)
    return pipeline


def first_block(model: str, threshold: float) -> IRASimPipeline:
    """Load the pipeline with the first-block cache."""
    pipeline = IRASimPipeline.from_pretrained(model)
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
    return pipeline


def broadcast(model: str) -> IRASimPipeline:
    """Load the pipeline with pyramid attention broadcast."""
    pipeline = IRASimPipeline.from_pretrained(model)
    pipeline.transformer.enable_cache(
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_identifiers=("^transformer_blocks",),
            spatial_attention_block_skip_range=2,
            temporal_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(100, 800),
            temporal_attention_timestep_skip_range=(100, 800),
            current_timestep_callback=lambda: pipeline.current_timestep,
        )
    )
    return pipeline


def weight_megabytes(module: torch.nn.Module) -> float:
    """Return the memory of the parameters in megabytes, including the data of quantized tensors."""

    def size(tensor: torch.Tensor) -> int:
        names = getattr(tensor, "tensor_data_names", None)
        return sum(size(getattr(tensor, name)) for name in names) if names else tensor.nbytes

    return sum(size(parameter) for parameter in module.parameters()) / 1e6


def main() -> None:
    (arguments,) = HfArgumentParser(FeatureArguments).parse_args_into_dataclasses()
    model, many = arguments.model, arguments.cache_steps
    rows: dict[str, tuple[Callable[[], IRASimPipeline], int | None]] = {
        "float32": (lambda: IRASimPipeline.from_pretrained(model), None),
        "bfloat16": (lambda: IRASimPipeline.from_pretrained(model, dtype=torch.bfloat16), None),
        "int8 weights (torchao)": (lambda: int8(model), None),
        "float8 storage, bfloat16 compute": (lambda: casting(model), None),
        f"float32, {many} steps": (lambda: IRASimPipeline.from_pretrained(model), many),
        f"first-block cache 0.05, {many} steps": (lambda: first_block(model, 0.05), many),
        f"first-block cache 0.1, {many} steps": (lambda: first_block(model, 0.1), many),
        f"attention broadcast, {many} steps": (lambda: broadcast(model), many),
    }
    config = IRASimPipeline.from_pretrained(model).transformer.config
    seen = config.num_history_frames
    length = seen + 15
    episodes = list(open_dataset(arguments.dataset, max_episodes=arguments.num_clips))
    if min(map(len, episodes)) < length:
        raise ValueError(f"the first {len(episodes)} episodes of `dataset` must have at least {length} frames each.")
    starts = [(len(episode) - length) // 2 for episode in episodes]
    clips = np.stack([episode.frames[k : k + length] for episode, k in zip(episodes, starts, strict=True)])
    actions = np.stack(
        [episode.actions[k + seen - 1 : k + length - 1] for episode, k in zip(episodes, starts, strict=True)]
    )
    print(
        f"{len(clips)} clips of {length} frames, {seen} of them history; {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}\n"
    )
    print("| | PSNR | attention layers computed | seconds | weights |\n|---|---|---|---|---|")
    for name, (load, steps) in rows.items():
        pipeline = load()
        pipeline.set_progress_bar_config(disable=True)
        pipeline(clips[:1, :seen], actions[:1], num_inference_steps=1)  # exclude the one-time setup from the time
        computed: list[int] = []
        for block in [*pipeline.transformer.transformer_blocks, *pipeline.transformer.temporal_transformer_blocks]:
            block.attn1.to_q.register_forward_hook(lambda *_, computed=computed: computed.append(1))
        generators = [torch.Generator().manual_seed(seed) for seed in range(len(clips))]
        start = time.perf_counter()
        video = pipeline(
            clips[:, :seen], actions, num_inference_steps=steps, generator=generators, output_type="np"
        ).frames
        seconds = time.perf_counter() - start
        quality = psnr(video, clips[:, seen:] / 255.0).mean()
        memory = weight_megabytes(pipeline.transformer)
        print(f"| {name} | {quality:.2f} dB | {len(computed)} | {seconds:.1f} | {memory:.1f} MB |", flush=True)


if __name__ == "__main__":
    run_script(main)
