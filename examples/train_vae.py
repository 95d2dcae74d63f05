"""Train a small autoencoder on single frames of robot clips.

    accelerate launch examples/train_vae.py --dataset data/pusht-train --output_dir runs/pusht-vae

Large models use the frozen SDXL VAE, as in the paper. For simple images, a small autoencoder is much faster: an
AutoencoderKL, or with `--tiny` an AutoencoderTiny, which has no normalization and can be trained on crops. The loss is
MSE + 0.1 L1 + `--kl_weight` KL. At the end, `scaling_factor` is computed from the validation frames so that scaled
latents have the standard deviation `--latent_std`. The same command resumes from the newest complete checkpoint, also
after Ctrl-C or SIGTERM. With `--pretrained` and `--freeze_encoder`, only the decoder is trained and `scaling_factor` is
kept, so latents and the world models trained on them stay valid.
"""

import math
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.optimization import get_scheduler
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from irasim_diffusers.data import PreparedEpisodes, first_readable, open_dataset
from irasim_diffusers.latents import (
    MAX_FACTOR,
    MIN_FACTOR,
    Autoencoder,
    check_sizes,
    downsampling_factor,
    encode_images,
)
from irasim_diffusers.training import (
    DataArguments,
    Interruption,
    check_frame_size,
    check_held_out,
    check_launch,
    check_output_dir,
    check_ranges,
    check_resume,
    check_same_size,
    default_mixed_precision,
    load_autoencoder,
    load_frames,
    newest_checkpoint,
    prepare_output,
    run_script,
    save_checkpoint,
    save_finished,
    step_of,
    stop_training,
)

NO_CROPS = "`crop_size` must be omitted for an AutoencoderKL, whose normalization depends on the whole frame"
NEW_ONLY = ("tiny", "block_out_channels", "latent_channels", "norm_num_groups")  # only for a new autoencoder
MAY_CHANGE = (
    *("output_dir", "max_train_steps", "checkpointing_steps", "compile", "latent_std"),
    *("validation_dataset", "validation_split", "validation_steps"),
)


@dataclass(kw_only=True)
class VAEArguments(DataArguments):
    dataset: str = field(metadata={"help": "LeRobotDataset, IRASim-format or `datasets` folder, or Hub id"})
    output_dir: str = field(metadata={"help": "folder for checkpoints and the trained VAE"})
    pretrained: str | None = field(
        default=None, metadata={"help": "autoencoder to start from: folder or Hub id, optionally with :<subfolder>"}
    )
    freeze_encoder: bool = field(default=False, metadata={"help": "train only the decoder of --pretrained"})
    frames_per_episode: int = field(
        default=24, metadata={"help": "maximum number of evenly spaced training frames per episode"}
    )
    tiny: bool = field(default=False, metadata={"help": "train a new AutoencoderTiny instead of an AutoencoderKL"})
    block_out_channels: list[int] | None = field(
        default=None,
        metadata={
            "help": "channels at each resolution of a new autoencoder; each entry after the first halves the resolution (default: 32 64 "
            "96 128; --tiny: 32 32 32 32, the entries must be equal)"
        },
    )
    latent_channels: int | None = field(
        default=None, metadata={"help": "channels of the latents of a new autoencoder (default: 4)"}
    )
    norm_num_groups: int | None = field(
        default=None,
        metadata={
            "help": "number of GroupNorm groups of a new AutoencoderKL; with 1, latents depend least on distant pixels "
            "(default: 32)"
        },
    )
    latent_std: float = field(
        default=1.0,
        metadata={
            "help": "standard deviation of scaled latents, unless the encoder is frozen; use 0.25 if most of each image is empty"
        },
    )
    latent_noise: float = field(
        default=0.1,
        metadata={"help": "standard deviation of the noise that AutoencoderTiny adds to latents in training"},
    )
    crop_size: int | None = field(
        default=None,
        metadata={
            "help": "train AutoencoderTiny on square crops of this side, in pixels, around pixels that differ from the mean frame"
        },
    )
    train_batch_size: int = field(default=16, metadata={"help": "frames per step and process"})
    max_train_steps: int = field(default=2800, metadata={"help": "total number of steps"})
    learning_rate: float = field(
        default=2e-3, metadata={"help": "learning rate after the warmup; it then decays as a cosine"}
    )
    lr_warmup_steps: int = field(default=100, metadata={"help": "steps of linear warmup"})
    kl_weight: float = field(default=1e-6, metadata={"help": "weight of the KL loss"})
    mixed_precision: str | None = field(
        default=None,
        metadata={
            "help": "no, fp16 or bf16 (default: the fp16 or bf16 of `accelerate launch`, else bf16 if the device supports it "
            "in hardware)"
        },
    )
    compile: bool = field(default=False, metadata={"help": "compile encoder and decoder"})
    checkpointing_steps: int = field(default=400, metadata={"help": "steps between checkpoints"})
    validation_steps: int = field(default=400, metadata={"help": "steps between validations"})
    seed: int = field(default=0, metadata={"help": "random seed"})

    def __post_init__(self) -> None:
        widths = [32, 32, 32, 32] if self.tiny else [32, 64, 96, 128]
        new = {"block_out_channels": widths, "latent_channels": 4, "norm_num_groups": None if self.tiny else 32}
        for name, value in new.items():
            if getattr(self, name) is None and not self.pretrained:
                setattr(self, name, value)


class Autoencoding(torch.nn.Module):
    """Encoder and decoder in one forward pass, as distributed wrappers require.

    Args:
        vae: The autoencoder.
        noise: Standard deviation of the posterior of an AutoencoderTiny, which has a fixed variance.
    """

    def __init__(self, vae: Autoencoder, noise: float) -> None:
        super().__init__()
        self.vae, self.noise = vae, noise

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the reconstruction (B, 3, H, W) and the KL divergence of each frame (B,), up to a constant."""
        if isinstance(self.vae, AutoencoderKL):
            posterior = self.vae.encode(pictures).latent_dist
            return self.vae.decode(posterior.sample()).sample, posterior.kl()
        latents = self.vae.encode(pictures).latents
        noisy = latents + self.noise * torch.randn_like(latents)
        return self.vae.decode(noisy).sample, latents.square().sum((1, 2, 3)) / 2


def open_frames(arguments: VAEArguments, name: str, split: str, episodes: int | None = None) -> PreparedEpisodes:
    """Open a dataset with the requested cameras and frame size."""
    source = open_dataset(
        name, arguments.cameras or None, split=split, max_episodes=episodes, action_column=arguments.action_column
    )
    return PreparedEpisodes(source, frame_size=arguments.frame_size)


def to_model(frames: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Convert uint8 frames to floats in [-1, 1]."""
    return frames.to(device).float() / 127.5 - 1


@torch.no_grad()
def reconstruction_psnr(vae: Autoencoder, frames: torch.Tensor, device: torch.device) -> float:
    """Return the PSNR of the mean squared error of 8-bit reconstructions, in dB; may be infinite."""
    errors = []
    for batch in frames.split(32):
        decoded = vae.decode(encode_images(vae, to_model(batch, device))).sample.float()
        decoded = (decoded.clamp(-1, 1) + 1).mul(127.5).round()
        errors.append(((decoded - batch.to(device).float()) / 255).square().mean().item() * len(batch))
    return -10 * math.log10(error) if (error := sum(errors) / len(frames)) else math.inf


@torch.no_grad()
def latent_std(vae: Autoencoder, frames: torch.Tensor, device: torch.device) -> float:
    """Return the standard deviation of the latents over frames, positions and channels."""
    latents = torch.cat([encode_images(vae, to_model(batch, device)).float() for batch in frames.split(32)])
    return latents.std().item()


def build_vae(arguments: VAEArguments, sample_size: int) -> Autoencoder:
    """Create a new autoencoder, or load the pretrained one and freeze its encoder if requested.

    Raises:
        ValueError: If the pretrained autoencoder cannot be loaded, or is an AutoencoderKL and `crop_size` is passed.
    """
    if arguments.pretrained:
        vae = load_autoencoder(arguments.pretrained, "pretrained").requires_grad_(True)
        if arguments.crop_size and isinstance(vae, AutoencoderKL):
            raise ValueError(f"{NO_CROPS}: omit it, or train a new autoencoder with `tiny` instead of `pretrained`.")
        if arguments.freeze_encoder:
            for module in filter(None, (vae.encoder, getattr(vae, "quant_conv", None))):
                module.requires_grad_(False)
        return vae
    channels = tuple(arguments.block_out_channels or ())
    if arguments.tiny:
        blocks = (1, *(2,) * (len(channels) - 1))
        return AutoencoderTiny(
            encoder_block_out_channels=channels,
            decoder_block_out_channels=channels,
            num_encoder_blocks=blocks,
            num_decoder_blocks=blocks[::-1],
            latent_channels=arguments.latent_channels,
        )
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=1,
        latent_channels=arguments.latent_channels,
        norm_num_groups=arguments.norm_num_groups,
        sample_size=sample_size,
        mid_block_add_attention=False,
    )


def run_settings(arguments: VAEArguments, processes: int) -> dict[str, Any]:
    """Return the settings that must not change when a run is resumed."""
    # earlier versions stored other defaults
    omitted = {name for name in NEW_ONLY if arguments.pretrained or getattr(arguments, name) is None}
    flags = {name: value for name, value in asdict(arguments).items() if name not in omitted.union(MAY_CHANGE)}
    return flags | {"processes": processes}


def check_arguments(arguments: VAEArguments) -> None:
    """Check the arguments before anything is read.

    Raises:
        ValueError: If a value is invalid or requires another argument.
    """
    check_ranges(
        arguments,
        not_negative=("kl_weight", "lr_warmup_steps", "seed"),
        fractions=("latent_noise",),
        at_least_1=(
            *("train_batch_size", "max_train_steps", "checkpointing_steps", "validation_steps", "frames_per_episode"),
            *("latent_channels", "norm_num_groups", "height", "width", "crop_size"),
        ),
        positive=("learning_rate", "latent_std"),
        choices={"mixed_precision": ("no", "fp16", "bf16")},
    )
    if not MIN_FACTOR <= arguments.latent_std <= MAX_FACTOR:
        raise ValueError(f"`latent_std` must be in [{MIN_FACTOR:g}, {MAX_FACTOR:g}], got {arguments.latent_std:g}.")
    check_new_autoencoder(arguments)
    if arguments.crop_size and not (arguments.tiny or arguments.pretrained):
        raise ValueError(f"{NO_CROPS}: use `tiny`.")
    if arguments.freeze_encoder and not arguments.pretrained:
        raise ValueError("`freeze_encoder` requires `pretrained`: a new encoder must be trained.")
    check_frame_size(arguments)


def check_new_autoencoder(arguments: VAEArguments) -> None:
    """Check the arguments in `NEW_ONLY`.

    Raises:
        ValueError: If one is out of range or does not apply.
    """
    if arguments.pretrained:
        if given := [name for name in NEW_ONLY if getattr(arguments, name) not in (None, False)]:
            raise ValueError(f"`{given[0]}` must be omitted with `pretrained`, which determines the layers.")
        return
    channels = arguments.block_out_channels or []
    check_sizes({"block_out_channels": channels, "latent_channels": arguments.latent_channels})
    if arguments.tiny and len(set(channels)) != 1:
        raise ValueError(f"`block_out_channels` must be equal positive numbers with `tiny`, got {channels}.")
    if arguments.tiny and arguments.norm_num_groups is not None:
        raise ValueError("`norm_num_groups` must be omitted with `tiny`: an AutoencoderTiny has no normalization.")
    groups = arguments.norm_num_groups
    if groups and any(number % groups for number in channels):
        raise ValueError(
            f"`block_out_channels` must be positive multiples of `norm_num_groups` = {groups}, got {channels}."
        )


def check_divisible(vae: Autoencoder, height: int, width: int, crop_size: int | None = None) -> None:
    """Raise ValueError if the autoencoder changes the size of frames or crops, or crops are too large."""
    factor = downsampling_factor(vae)
    if crop_size and (crop_size % factor or crop_size > min(height, width)):
        raise ValueError(
            f"`crop_size` must be a multiple of {factor} and at most {min(height, width)}, the smaller side of the frames, got "
            f"{crop_size}."
        )
    if height % factor or width % factor:
        lower = [max(side // factor, 1) * factor for side in (height, width)]
        raise ValueError(
            f"frames must have sides divisible by {factor} for this autoencoder, got {height}x{width}: use `height` and `width`, "
            f"for example --height {lower[0]} --width {lower[1]}."
        )


@dataclass(frozen=True)
class Frames:
    """Frames for training and validation."""

    training: torch.Tensor  # (N, 3, H, W), uint8
    held_out: torch.Tensor  # (M, 3, H, W), uint8
    mean: torch.Tensor  # (3, H, W), mean of the training frames
    is_held_out: bool  # False if the validation frames are training frames


def open_data(arguments: VAEArguments) -> tuple[PreparedEpisodes, PreparedEpisodes]:
    """Open the training and the validation data.

    The validation data are the first 64 episodes of the validation dataset, or, without one, of the training dataset.

    Raises:
        ValueError: If the data cannot be opened or read, or training and validation share episodes or differ in frame size.
    """
    source = open_frames(arguments, arguments.dataset, arguments.split)
    if arguments.validation_dataset is None:
        return source, open_frames(arguments, arguments.dataset, arguments.split, episodes=64)
    held_out = open_frames(arguments, arguments.validation_dataset, arguments.validation_split, episodes=64)
    check_held_out([source], [arguments.dataset], held_out, arguments)
    check_same_size(source, held_out)
    return source, held_out


def train(
    accelerator: Accelerator, arguments: VAEArguments, vae: Autoencoder, frames: Frames, newest: Path | None
) -> None:
    """Train the autoencoder, starting from the newest checkpoint if one exists.

    Raises:
        FloatingPointError: If the loss is not finite.
        SystemExit: After Ctrl-C or SIGTERM, when the checkpoint has been written.
    """
    output, settings = Path(arguments.output_dir), run_settings(arguments, accelerator.num_processes)
    trained = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=arguments.learning_rate, weight_decay=0.0)
    # accelerate steps a prepared schedule once for each process
    schedule = get_scheduler(
        "cosine",
        optimizer,
        num_warmup_steps=arguments.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=arguments.max_train_steps * accelerator.num_processes,
    )
    autoencoding, optimizer, schedule = accelerator.prepare(
        Autoencoding(vae, arguments.latent_noise), optimizer, schedule
    )

    step = 0
    if newest:
        accelerator.load_state(str(newest))
        step = step_of(newest)
    bar = tqdm(total=arguments.max_train_steps, initial=step, disable=not accelerator.is_main_process, unit="step")
    start = time.perf_counter()
    with Interruption() as interruption:
        while step < arguments.max_train_steps:
            loss = batch_loss(accelerator, autoencoding, frames, arguments, step)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(autoencoding.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            step += 1
            bar.update()
            bar.set_postfix(loss=f"{loss.item():.5f}")
            stopped_by = interruption.requested(accelerator)
            if stopped_by or step % arguments.checkpointing_steps == 0 or step == arguments.max_train_steps:
                save_checkpoint(accelerator, output, step, limit=2, settings=settings)
            if stopped_by:
                stop_training(accelerator, stopped_by, step)
            if accelerator.is_main_process and step % arguments.validation_steps == 0:
                with accelerator.autocast():
                    psnr = describe_psnr(vae, frames, accelerator.device)
                bar.write(f"step {step}: {psnr}, {time.perf_counter() - start:.0f} s")
    accelerator.wait_for_everyone()


def batch_loss(
    accelerator: Accelerator, autoencoding: torch.nn.Module, frames: Frames, arguments: VAEArguments, step: int
) -> torch.Tensor:
    """Return the loss of a step.

    The frames and crops depend only on seed, step and process, so that a resumed run uses the same ones.

    Raises:
        FloatingPointError: If the loss is not finite.
    """
    rng = np.random.default_rng([arguments.seed, step, accelerator.process_index])
    chosen = torch.from_numpy(rng.integers(len(frames.training), size=arguments.train_batch_size))
    pictures = frames.training[chosen]
    if arguments.crop_size:
        pictures = crop_frames(pictures, frames.mean, arguments.crop_size, rng)
    pictures = to_model(pictures, accelerator.device)
    with accelerator.autocast():
        reconstruction, kl = autoencoding(pictures)
    difference = reconstruction.float() - pictures
    loss = difference.square().mean() + 0.1 * difference.abs().mean() + arguments.kl_weight * kl.float().mean()
    if not math.isfinite(loss.item()):
        raise FloatingPointError(f"the loss is {loss.item()} at step {step + 1}: use a lower `learning_rate`.")
    return loss


def crop_frames(pictures: torch.Tensor, mean: torch.Tensor, size: int, rng: np.random.Generator) -> torch.Tensor:
    """Cut a square out of each frame around a random pixel.

    Args:
        pictures: Frames (B, 3, H, W), uint8.
        mean: Mean frame (3, H, W). A pixel is drawn with a probability proportional to its difference from the mean frame plus 1.
        size: Side of the squares in pixels.
        rng: Source of the pixels and of their places in the squares.

    Returns:
        The squares (B, 3, size, size), uint8.
    """
    height, width = pictures.shape[2:]
    shares = ((pictures - mean).abs().mean(1) + 1).flatten(1).double().cumsum(1)
    drawn = torch.from_numpy(rng.random((len(pictures), 1))) * shares[:, -1:]
    pixels = torch.searchsorted(shares, drawn)[:, 0].clamp(max=height * width - 1).numpy()
    places = rng.integers(size, size=(2, len(pictures)))
    tops = np.clip(pixels // width - places[0], 0, height - size)
    lefts = np.clip(pixels % width - places[1], 0, width - size)
    return torch.stack(
        [
            picture[:, top : top + size, left : left + size]
            for picture, top, left in zip(pictures, tops, lefts, strict=True)
        ]
    )


def describe_psnr(vae: Autoencoder, frames: Frames, device: torch.device) -> str:
    """Return the PSNR of the validation frames as text."""
    which = "held-out" if frames.is_held_out else "training"
    return f"{which} PSNR {reconstruction_psnr(vae, frames.held_out, device):.2f} dB"


def set_scaling(vae: Any, wanted: float, deviation: float) -> None:
    """Set the scaling factor that changes the standard deviation of the latents to `wanted`.

    Raises:
        ValueError: If the factor is out of range.
    """
    if not 0 < deviation < math.inf:
        raise ValueError(
            f"the latents of the validation frames must differ and be finite, got a standard deviation of {deviation:g}: train "
            "again, for example with a lower `learning_rate`."
        )
    if not MIN_FACTOR * deviation <= wanted <= MAX_FACTOR * deviation:
        raise ValueError(
            f"`latent_std` divided by the standard deviation of the latents must be in [{MIN_FACTOR:g}, {MAX_FACTOR:g}], got "
            f"{wanted:g} and {deviation:g}: resume with another `latent_std`."
        )
    vae.register_to_config(scaling_factor=wanted / deviation)
    if isinstance(vae, AutoencoderKL):
        vae.register_to_config(shift_factor=None, latents_mean=None, latents_std=None)


def main() -> None:
    (arguments,) = HfArgumentParser(VAEArguments).parse_args_into_dataclasses()
    check_arguments(arguments)
    arguments.mixed_precision = arguments.mixed_precision or default_mixed_precision()
    output = Path(arguments.output_dir)
    accelerator = Accelerator(cpu=not torch.accelerator.is_available(), mixed_precision=arguments.mixed_precision)
    check_launch(accelerator)
    check_output_dir(output)
    settings, defaults = (
        run_settings(arguments, accelerator.num_processes),
        asdict(VAEArguments(dataset="", output_dir="")),
    )
    check_resume(output, settings, defaults, arguments.max_train_steps)
    set_seed(arguments.seed)
    source, held_out_source = open_data(arguments)
    height, width = first_readable(source, source.__getitem__).frames.shape[1:3]
    vae = build_vae(arguments, max(height, width))
    check_divisible(vae, height, width, arguments.crop_size)
    prepare_output(accelerator, output)
    newest = newest_checkpoint(output, settings, defaults)
    training = load_frames(source, arguments.frames_per_episode, arguments.skip_broken)
    frames = Frames(
        training,
        load_frames(held_out_source, 4, arguments.skip_broken),
        sum(part.float().sum(0) for part in training.split(256)) / len(training),
        arguments.validation_dataset is not None,
    )
    if arguments.compile:
        vae.encoder.compile()
        vae.decoder.compile()
    train(accelerator, arguments, vae, frames, newest)
    if not arguments.freeze_encoder:
        set_scaling(vae, arguments.latent_std, latent_std(vae, frames.held_out, accelerator.device))
    if accelerator.is_main_process:
        save_finished(output, vae.save_pretrained)
        psnr = describe_psnr(vae, frames, accelerator.device)
        print(f"{psnr} in float32; scaling_factor {vae.config.scaling_factor:.4f}; {output}")


if __name__ == "__main__":
    run_script(main)
