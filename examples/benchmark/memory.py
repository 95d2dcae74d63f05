"""Estimate the training memory of each preset of the paper, or measure it on a GPU.

    python examples/benchmark/memory.py                  # estimate, takes a few seconds
    python examples/benchmark/memory.py --measure        # measure training steps on a CUDA device

The estimate contains all weights and their EMA, the gradients and AdamW moments of the trained weights, all in float32
(8-bit AdamW: one byte per moment), and the tensors that autograd saves in pure bfloat16 without fused attention, counted
on the meta device. Autocast additionally keeps bfloat16 copies of the weights, and fused attention saves no attention
matrices; for one window of XL the two effects roughly cancel. Temporary kernel memory, fragmentation and a frozen
autoencoder (SDXL: 0.33 GB) are not included. Windows have 16 frames of 256x320, as in the paper's RT-1 experiments.
"""

import gc
from dataclasses import dataclass, field
from itertools import product

import torch
from diffusers.utils import is_bitsandbytes_available, logging
from peft import LoraConfig
from transformers import HfArgumentParser

from irasim_diffusers import PRESETS, IRASimTransformer3DModel
from irasim_diffusers.models import noise_process
from irasim_diffusers.training import diffusion_loss, run_script


@dataclass
class MemoryArguments:
    measure: bool = field(default=False, metadata={"help": "measure on a CUDA device; requires bitsandbytes"})
    batch_size: int = field(default=1, metadata={"help": "windows per batch"})
    lora_rank: int = field(default=16, metadata={"help": "rank of the LoRA adapters"})
    presets: list[str] = field(default_factory=lambda: list(PRESETS), metadata={"help": "model sizes of the paper"})


def build(preset: str, lora_rank: int, checkpointing: bool, device: str) -> IRASimTransformer3DModel:
    """Create a model; with a LoRA rank, only adapters, action encoder and null action are trained."""
    with torch.device(device):
        model = IRASimTransformer3DModel(**PRESETS[preset])
        if lora_rank:
            model.add_adapter(LoraConfig(r=lora_rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    for name, parameter in model.named_parameters():
        if name.startswith(("action_embed.", "null_action")):
            parameter.requires_grad_(True)
    if checkpointing:
        model.enable_gradient_checkpointing()
    return model.train()


def loss_of(model: IRASimTransformer3DModel, batch_size: int, dtype: torch.dtype) -> torch.Tensor:
    """Compute the loss of one training step on zero latents."""
    config, device = model.config, model.device
    frames, size = config.sample_frames, (config.sample_height, config.sample_width)
    latents = torch.zeros(batch_size, config.in_channels, frames, *size, device=device, dtype=dtype)
    actions = torch.zeros(batch_size, frames - 1, config.action_dim, device=device)
    return diffusion_loss(
        model,
        noise_process(config),
        latents,
        actions,
        timesteps=torch.zeros(batch_size, dtype=torch.long, device=device),
        noise=latents[:, :, 1:],
    )["loss"]


def kept_bytes(model: IRASimTransformer3DModel, batch_size: int) -> int:
    """Count the bytes of the tensors that autograd saves for the backward pass, without the weights."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of(model, batch_size, torch.bfloat16)
    total = sum(storage.nbytes() for storage in storages.values())
    del loss
    return total


def computed(preset: str, lora_rank: int, checkpointing: bool, eight_bit: bool, batch_size: int) -> float:
    """Estimate the memory of a training step in gigabytes."""
    model = build(preset, lora_rank, checkpointing, "meta")
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    states = 4 * total + 4 * total + (4 + (2 if eight_bit else 8)) * trained  # weights, EMA, gradients and moments
    activations = kept_bytes(model.to(torch.bfloat16), batch_size)
    if checkpointing:  # one block at a time is recomputed
        whole = kept_bytes(build(preset, lora_rank, False, "meta").to(torch.bfloat16), batch_size)
        activations += whole // (2 * model.config.num_layers)
    return (states + activations) / 1e9


def measured(preset: str, lora_rank: int, checkpointing: bool, eight_bit: bool, batch_size: int) -> float:
    """Measure the peak memory of two training steps in gigabytes; the size of the EMA weights is added."""
    model = build(preset, lora_rank, checkpointing, "cuda")
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer: torch.optim.Optimizer
    if eight_bit:
        import bitsandbytes

        optimizer = bitsandbytes.optim.AdamW8bit(trained)
    else:
        optimizer = torch.optim.AdamW(trained, fused=True)
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(2):
        with torch.autocast("cuda", torch.bfloat16):
            loss = loss_of(model, batch_size, torch.float32)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return (torch.cuda.max_memory_allocated() + 4 * sum(p.numel() for p in model.parameters())) / 1e9


def main() -> None:
    (arguments,) = HfArgumentParser(MemoryArguments).parse_args_into_dataclasses()
    if arguments.measure and not torch.cuda.is_available():
        raise ValueError("`measure` requires a CUDA device, but none is available: omit it for an estimate.")
    if arguments.measure and not is_bitsandbytes_available():
        raise ValueError("`measure` requires bitsandbytes for 8-bit AdamW: pip install bitsandbytes")
    logging.set_verbosity_error()
    memory = measured if arguments.measure else computed
    columns = list(product((False, True), (False, True)))  # checkpointing, 8-bit moments
    titles = [
        f"{'checkpointing' if checkpointing else 'plain'}{', 8-bit AdamW' if eight_bit else ''}"
        for checkpointing, eight_bit in columns
    ]
    print(f"GB at batch size {arguments.batch_size}, {'measured' if arguments.measure else 'estimated'}\n")
    print(f"| model | trained weights | {' | '.join(titles)} |\n|{'---|' * (2 + len(columns))}")
    for preset, rank in product(arguments.presets, (0, arguments.lora_rank)):
        figures = [memory(preset, rank, *column, arguments.batch_size) for column in columns]
        trained = f"LoRA, rank {rank}" if rank else "all"
        print(f"| {preset} | {trained} | {' | '.join(f'{figure:.1f}' for figure in figures)} |", flush=True)


if __name__ == "__main__":
    run_script(main)
