"""Train an IRASim world model on robot clips.

    accelerate launch examples/train.py --dataset data/pusht-train --vae runs/pusht-vae --output_dir runs/pusht

The autoencoder is frozen and its latents are encoded once. Objective and defaults are the paper's (Table 10): AdamW,
constant learning rate 1e-4, no weight decay, gradient clip 0.1, EMA 0.9999, action dropout 0.1, loss on predicted frames
only. Checkpoints go to `<output_dir>/checkpoint-<step>`; the same command run again goes on from the newest. At the end
`<output_dir>` is a complete pipeline.
"""

import contextlib
import logging
import shutil
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, InitProcessGroupKwargs, ProjectConfiguration, set_seed
from diffusers import AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, _collate_lora_metadata
from diffusers.utils import is_bitsandbytes_available
from diffusers.utils.hub_utils import load_or_create_model_card, populate_model_card
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import create_repo, hf_hub_download, upload_folder
from huggingface_hub.errors import RemoteEntryNotFoundError
from peft import LoraConfig, get_peft_model_state_dict
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from irasim_diffusers import PRESETS, IRASimPipeline, IRASimTransformer3DModel
from irasim_diffusers.conversion import change_patch_size
from irasim_diffusers.data import (
    LatentClips,
    MixedClips,
    PreparedEpisodes,
    action_normalisation,
    cache_latents,
    open_dataset,
    standardised_states,
)
from irasim_diffusers.metrics import psnr
from irasim_diffusers.models import noise_process
from irasim_diffusers.training import NoiseProcess, StateReadout, diffusion_loss

logger = logging.getLogger(__name__)
ACTION_ENCODER = ("action_embed.", "trajectory_embed.", "null_action")


@dataclass
class TrainingArguments:
    # data
    dataset: list[str] = field(
        metadata={"help": "LeRobotDataset, IRASim-format or `datasets` folder, or Hub id; several are mixed"}
    )
    output_dir: str = field(metadata={"help": "where checkpoints and the finished pipeline are written"})
    vae: str | None = field(
        default=None,
        metadata={
            "help": "frozen autoencoder: folder or Hub id, ':<subfolder>' appended where it has one (default: that of the "
            "pretrained pipeline)"
        },
    )
    validation_dataset: str | None = field(
        default=None, metadata={"help": "data set of held-out episodes, in any of these forms"}
    )
    dataset_weights: list[float] = field(
        default_factory=list, metadata={"help": "share of each data set (default: as long as they are)"}
    )
    cameras: list[str] = field(
        default_factory=list,
        metadata={"help": "cameras, stacked into one picture; left,right makes a row (default: the only one)"},
    )
    split: str = field(default="train", metadata={"help": "split of IRASim-format and `datasets` data"})
    validation_split: str = field(default="train", metadata={"help": "split of the validation data"})
    max_train_episodes: int | None = field(
        default=None, metadata={"help": "train on the first that many episodes of each data set"}
    )
    skip_broken: bool = field(
        default=False, metadata={"help": "leave out episodes that cannot be read, and list them"}
    )
    recorded_latents: bool = field(
        default=False, metadata={"help": "take the latents beside the videos of IRASim-format data"}
    )
    fps: float | None = field(default=None, metadata={"help": "frames a second, where the data do not record them"})
    frame_skip: int = field(default=1, metadata={"help": "keep every frame of that number"})
    height: int | None = field(default=None, metadata={"help": "resize frames to this height and --width"})
    width: int | None = field(default=None, metadata={"help": "see --height"})
    action_column: str = field(default="actions", metadata={"help": "column of actions of `datasets` data"})
    state_columns: list[str] = field(default_factory=list, metadata={"help": "columns of states of `datasets` data"})
    action_derivation: str = field(
        default="recorded",
        metadata={"help": "recorded, or from states: relative_euler, relative_6d, relative_planar, absolute"},
    )
    action_composition: str | None = field(
        default=None, metadata={"help": "how recorded actions compose over skipped frames; see action_derivation"}
    )
    state_key: str | None = field(default=None, metadata={"help": "state that actions are derived from"})
    pad_actions_to: int | None = field(default=None, metadata={"help": "components after padding with zeros"})
    cache_dir: str | None = field(
        default=None, metadata={"help": "where latents are kept (default: output_dir/latents)"}
    )
    # model
    pretrained_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "help": "pipeline or transformer to start from: folder or Hub id; window, patch and action scaling may change"
        },
    )
    preset: str | None = field(default=None, metadata={"help": f"size of the paper: {', '.join(PRESETS)}"})
    num_layers: int | None = field(
        default=None, metadata={"help": "pairs of a spatial and a temporal block, without --preset (default: 4)"}
    )
    num_attention_heads: int | None = field(default=None, metadata={"help": "without --preset (default: 3)"})
    attention_head_dim: int | None = field(default=None, metadata={"help": "without --preset (default: 64)"})
    patch_size: int | None = field(
        default=None, metadata={"help": "in latent pixels; default: 2, or the pretrained one's"}
    )
    sample_frames: int | None = field(
        default=None, metadata={"help": "frames of a window, history and predicted (default: 16)"}
    )
    num_history_frames: int | None = field(
        default=None, metadata={"help": "most history frames (default: 1); each step draws 1 to this many"}
    )
    window_lengths: list[int] = field(
        default_factory=list,
        metadata={
            "help": "lengths that divide sample_frames; each step cuts its windows to one of them, drawn at random"
        },
    )
    history_noise: float = field(
        default=0.0, metadata={"help": "most deviation of the noise on history latents, against drift in rollouts"}
    )
    conditioning: str | None = field(
        default=None, metadata={"help": "frame for Frame-Ada (default), video for Video-Ada"}
    )
    action_normalisation: str = field(
        default="std", metadata={"help": "offset and scale from the data: std, or quantile (1 % and 99 %)"}
    )
    action_scale: list[float] = field(
        default_factory=list, metadata={"help": "one, or one a component, instead of the data's"}
    )
    action_offset: list[float] = field(
        default_factory=list, metadata={"help": "one, or one a component, instead of the data's"}
    )
    action_space: str | None = field(
        default=None, metadata={"help": "relative (default), or absolute for recorded target positions"}
    )
    action_frequencies: int | None = field(
        default=None,
        metadata={
            "help": "octaves of sines and cosines that join the actions; default: none, or the pretrained one's"
        },
    )
    prediction_type: str | None = field(
        default=None, metadata={"help": "epsilon (default), v_prediction, sample or flow_prediction"}
    )
    # LoRA
    lora_rank: int = field(default=0, metadata={"help": "train adapters of that rank and the action encoder alone"})
    lora_alpha: int | None = field(default=None, metadata={"help": "scale of the adapters (default: their rank)"})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"], metadata={"help": "layers that get adapters"}
    )
    # optimisation
    train_batch_size: int = field(default=16, metadata={"help": "windows per step and process"})
    gradient_accumulation_steps: int = 1
    max_train_steps: int = 300_000
    learning_rate: float = 1e-4
    lr_scheduler: str = field(default="constant_with_warmup", metadata={"help": "any of diffusers' get_scheduler"})
    lr_warmup_steps: int = 0
    optimizer: str = field(
        default="adamw",
        metadata={
            "help": "adamw, adamw8bit (bitsandbytes), or muon (torch 2.9) for the blocks' matrices and adamw for the rest"
        },
    )
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 0.0
    max_grad_norm: float = 0.1
    snr_gamma: float | None = field(default=None, metadata={"help": "min-SNR weights of timesteps; 5 in its paper"})
    action_dropout: float = field(default=0.1, metadata={"help": "share of trajectories that take the null action"})
    state_keys: list[str] = field(
        default_factory=list, metadata={"help": "vector features read out of inner features as a second objective"}
    )
    state_angles: list[str] = field(
        default_factory=list, metadata={"help": "components of these that are angles in radians"}
    )
    state_loss_weight: float = 1.0
    ema_decay: float = 0.9999
    ema_warmup: bool = field(default=True, metadata={"help": "let the decay rise with the steps, for short runs"})
    mixed_precision: str = field(default="bf16", metadata={"help": "no, fp16 or bf16"})
    gradient_checkpointing: bool = False
    compile: bool = field(default=False, metadata={"help": "compile the transformer's blocks"})
    attention_backend: str | None = field(
        default=None, metadata={"help": "a backend of diffusers; _native_math is twice as fast for training on CPU"}
    )
    dataloader_num_workers: int = 0
    # bookkeeping
    checkpointing_steps: int = 500
    checkpoints_total_limit: int = 2
    validation_steps: int = 2000
    num_validation_clips: int = 16
    validation_inference_steps: int = 16
    report_to: str | None = field(
        default=None, metadata={"help": "tensorboard, wandb or another tracker of accelerate"}
    )
    push_to_hub: bool = field(default=False, metadata={"help": "publish what was trained, with a card"})
    hub_model_id: str | None = field(default=None, metadata={"help": "where to (default: the name of output_dir)"})
    seed: int = 0


NEW_MODEL: dict[str, Any] = {
    "num_layers": 4,
    "num_attention_heads": 3,
    "attention_head_dim": 64,
    "sample_frames": 16,
    "num_history_frames": 1,
    "conditioning": "frame",
    "action_space": "relative",
    "prediction_type": "epsilon",
    "patch_size": 2,
    "action_frequencies": 0,
}
"""Config of a model that starts from nothing, where no flag says otherwise."""
WINDOW = ("sample_frames", "num_history_frames")


def load_vae(name: str) -> AutoencoderKL:
    """The frozen autoencoder of a folder or Hub id, `org/model:vae` for a subfolder."""
    path, _, subfolder = (name, "", "") if Path(name).is_dir() or ":" not in name else name.rpartition(":")
    return AutoencoderKL.from_pretrained(path, subfolder=subfolder or None).requires_grad_(False).eval()


def is_pipeline(name: str) -> bool:
    """Whether a folder or Hub id holds a whole pipeline."""
    if Path(name).is_dir():
        return (Path(name) / "model_index.json").is_file()
    try:
        hf_hub_download(name, "model_index.json")
    except RemoteEntryNotFoundError:
        return False
    return True


def open_source(name: str, arguments: TrainingArguments, split: str, max_episodes: int | None) -> PreparedEpisodes:
    """A data set in the form and with the actions that the arguments ask for."""
    source = open_dataset(
        name,
        arguments.cameras or None,
        split=split,
        max_episodes=max_episodes,
        fps=arguments.fps,
        action_column=arguments.action_column,
        state_columns=arguments.state_columns,
    )
    return PreparedEpisodes(
        source,
        arguments.action_derivation,
        arguments.state_key,
        arguments.frame_skip,
        arguments.action_composition,
        arguments.pad_actions_to,
        (arguments.height, arguments.width) if arguments.height and arguments.width else None,
    )


def check_frames(source: PreparedEpisodes, vae: AutoencoderKL, patch_size: int) -> None:
    """Refuse pictures that do not divide into patches, before hours of encoding."""
    for number in range(len(source)):
        with contextlib.suppress(ValueError):  # broken episodes are named, or skipped, when their turn comes
            height, width = source[number].frames.shape[1:3]
            break
    else:
        raise ValueError(f"no episode of {source.name!r} can be read.")
    multiple = 2 ** (len(vae.config.block_out_channels) - 1) * patch_size
    if height % multiple or width % multiple:
        nearest = [max(round(side / multiple), 1) * multiple for side in (height, width)]
        raise ValueError(
            f"frames of {source.name!r} must have sides divisible by {multiple}, got {height}x{width}: resize them with "
            f"--height {nearest[0]} --width {nearest[1]}."
        )


def load_pretrained(arguments: TrainingArguments) -> IRASimTransformer3DModel | None:
    """The model to go on with, its patches and octaves as asked; None for a new one."""
    name = arguments.pretrained_model_name_or_path
    if name is None:
        return None
    model = IRASimTransformer3DModel.from_pretrained(name, subfolder="transformer" if is_pipeline(name) else None)
    fixed = NEW_MODEL.keys() - {
        "patch_size",
        "action_frequencies",
        *(WINDOW if model.config.conditioning == "frame" else ()),
    }
    for flag in sorted(fixed):
        asked = getattr(arguments, flag)
        if asked not in (None, model.config[flag]):
            raise ValueError(
                f"`{flag}` is {model.config[flag]!r} in {name!r} and cannot become {asked!r}: leave it out."
            )
    model.register_to_config(**{flag: getattr(arguments, flag) for flag in WINDOW if getattr(arguments, flag)})
    patch_size = arguments.patch_size or model.config.patch_size
    if (patch_size, arguments.action_frequencies) != (model.config.patch_size, None):
        model = change_patch_size(model, patch_size, arguments.action_frequencies)
    return model


def build_transformer(
    arguments: TrainingArguments,
    source: PreparedEpisodes,
    parts: list[LatentClips],
    vae: AutoencoderKL,
    pretrained: IRASimTransformer3DModel | None,
) -> IRASimTransformer3DModel:
    """A new model for the data's latents and actions, or the pretrained one told of them."""
    actions = torch.cat([part.actions for part in parts])
    offset, scale = action_normalisation(actions, arguments.action_normalisation)
    action_dim = len(offset)
    for name, given in (("action_scale", arguments.action_scale), ("action_offset", arguments.action_offset)):
        if len(given) not in (0, 1, action_dim):
            raise ValueError(f"`{name}` must be one number, or {action_dim}, got {given}.")
    given_scale = arguments.action_scale[0] if len(arguments.action_scale) == 1 else arguments.action_scale
    given_offset = arguments.action_offset[0] if len(arguments.action_offset) == 1 else arguments.action_offset
    height, width = parts[0].latent_size
    known = {
        "sample_height": height,
        "sample_width": width,
        "fps": source.fps,
        "cameras": [list(row) for row in source.cameras],
        "action_names": source.component_names("action"),
        "action_derivation": source.action_derivation,
    }
    if pretrained is not None:
        config = pretrained.config
        if config.action_dim != action_dim:
            raise ValueError(
                f"{arguments.pretrained_model_name_or_path!r} takes {config.action_dim} action components, the data have {action_dim}."
            )
        asked = {"action_scale": given_scale, "action_offset": given_offset}
        if (config.action_space == "absolute") != (arguments.action_derivation == "absolute") and (
            arguments.action_derivation != "recorded"
        ):
            raise ValueError(
                f"the pretrained model's action space is {config.action_space!r}: `action_derivation` cannot be "
                f"{arguments.action_derivation!r}."
            )
        if not arguments.lora_rank:
            if known["fps"] is None:
                known.pop("fps")
            pretrained.register_to_config(**known | {name: value for name, value in asked.items() if value != []})
        elif config.action_derivation != source.action_derivation:
            raise ValueError(
                f"adapters keep the model's actions: `action_derivation` must be {config.action_derivation!r}, got "
                f"{source.action_derivation!r}."
            )
        elif (config.sample_height, config.sample_width) != (height, width):
            raise ValueError(
                f"adapters keep the model's frames: latents must be {config.sample_height}x{config.sample_width}, got "
                f"{height}x{width}; resize with --height and --width."
            )
        return pretrained
    settings = {
        name: default if getattr(arguments, name) is None else getattr(arguments, name)
        for name, default in NEW_MODEL.items()
    }
    if arguments.action_derivation == "absolute":
        settings["action_space"] = "absolute"
    return IRASimTransformer3DModel(
        **settings | (PRESETS[arguments.preset] if arguments.preset else {}) | known,
        in_channels=vae.config.latent_channels,
        action_dim=action_dim,
        action_scale=scale if given_scale == [] else given_scale,
        action_offset=offset if given_offset == [] else given_offset,
    )


def validation_clips(arguments: TrainingArguments, config: dict) -> tuple[np.ndarray, np.ndarray] | None:
    """Held-out clips: frames (N, F, H, W, 3), uint8, and actions (N, F - h, A), one clip from the middle of an episode."""
    if arguments.validation_dataset is None:
        return None
    frames, actions = [], []
    source = open_source(arguments.validation_dataset, arguments, arguments.validation_split, None)
    for number in range(len(source)):
        try:
            episode = source[number]
        except ValueError:
            if not arguments.skip_broken:
                raise
            continue
        if len(episode) < config["sample_frames"]:
            continue
        start = (len(episode) - config["sample_frames"]) // 2
        last = start + config["sample_frames"]
        frames.append(episode.frames[start:last])
        actions.append(episode.actions[start + config["num_history_frames"] - 1 : last - 1])
        if len(frames) == arguments.num_validation_clips:
            break
    if not frames:
        raise ValueError(f"no episode of {arguments.validation_dataset!r} is as long as a window.")
    return np.stack(frames), np.stack(actions)


def validate(
    pipeline: IRASimPipeline, clips: tuple[np.ndarray, np.ndarray], steps: int
) -> tuple[dict[str, float], np.ndarray]:
    """Figures on held-out clips, and a picture of some of them.

    The figures are the PSNR under the clips' own actions, under those of other clips, and of repeating the last seen frame.
    In the picture (H, W, 3), uint8, truth and prediction lie below each other, for the first four clips.
    """
    frames, actions = clips
    num_history_frames = frames.shape[1] - actions.shape[1]
    history, truth = frames[:, :num_history_frames], frames[:, num_history_frames:] / 255.0

    def predict(given: np.ndarray) -> np.ndarray:
        generators = [torch.Generator().manual_seed(seed) for seed in range(len(frames))]
        return pipeline(history, given, num_inference_steps=steps, generator=generators, output_type="np").frames

    own = predict(actions)
    figures = {
        "psnr": psnr(own, truth).mean(),
        "psnr_shuffled_actions": psnr(predict(np.roll(actions, 1, axis=0)), truth).mean(),
        "psnr_last_frame": psnr(np.broadcast_to(history[:, -1:] / 255.0, truth.shape), truth).mean(),
    }
    strips = [np.concatenate(list(video), axis=1) for pair in zip(truth[:4], own[:4], strict=True) for video in pair]
    return figures, (np.concatenate(strips) * 255).round().astype(np.uint8)


def log_picture(accelerator: Accelerator, picture: np.ndarray, step: int) -> None:
    """Show the validation picture in every tracker that shows pictures."""
    for tracker in accelerator.trackers:
        if tracker.name == "tensorboard":
            tracker.log_images({"validation": picture[None]}, step=step, dataformats="NHWC")
        elif hasattr(tracker, "log_images"):
            tracker.log_images({"validation": [picture]}, step=step)


def checkpoints(output: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def save_checkpoint(accelerator: Accelerator, output: Path, step: int, limit: int) -> None:
    """Write a checkpoint under a temporary name, rename it, and drop the oldest beyond `limit`."""
    partial = output / f"partial-{step}"
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()  # every process writes its own random state
    if accelerator.is_main_process:
        partial.rename(output / f"checkpoint-{step}")
        for old in checkpoints(output)[:-limit]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def cut(clip: dict[str, torch.Tensor], length: int) -> dict[str, torch.Tensor]:
    """Clips of F frames cut into windows of `length` frames, a divisor of F; they follow each other in the batch."""
    frames = torch.arange(clip["latents"].shape[2]).unflatten(0, (-1, length))
    windows = {
        "latents": clip["latents"][:, :, frames].transpose(1, 2).flatten(0, 1),
        "actions": clip["actions"][:, frames[:, :-1]].flatten(0, 1),
    }
    return windows | ({"states": clip["states"][:, frames].flatten(0, 1)} if "states" in clip else {})


def training_loss(
    model: torch.nn.Module,
    noise_scheduler: NoiseProcess,
    clip: dict[str, torch.Tensor],
    config: dict,
    arguments: TrainingArguments,
    draw: tuple[int, ...],
) -> torch.Tensor:
    """The loss of a batch of clips; `draw` alone fixes length and history of its windows, timesteps, noise and drops."""
    generator = torch.Generator().manual_seed(int(np.random.SeedSequence(draw).generate_state(1)[0]))
    lengths = arguments.window_lengths or [config["sample_frames"]]
    windows = cut(clip, lengths[int(torch.randint(len(lengths), (), generator=generator))])
    latents, states = windows["latents"], windows.get("states")
    shortest = 1 if config["conditioning"] == "frame" else config["num_history_frames"]  # Video-Ada: a fixed number
    history = int(torch.randint(shortest, config["num_history_frames"] + 1, (), generator=generator))
    actions = windows["actions"][:, history - 1 :]  # action k leads to frame k + 1
    steps = noise_scheduler.config.num_train_timesteps
    timesteps = torch.randint(steps, (len(latents),), generator=generator).to(latents.device)
    noise = randn_tensor(latents.shape, generator=generator, device=latents.device)
    if arguments.history_noise:
        deviation = arguments.history_noise * torch.rand(len(latents), 1, 1, 1, 1, generator=generator)
        disturbed = latents[:, :, :history] + deviation.to(latents) * noise[:, :, :history]
        latents = torch.cat([disturbed, latents[:, :, history:]], dim=2)
    keep = (torch.rand(len(actions), 1, generator=generator) >= arguments.action_dropout).to(latents.device)
    return diffusion_loss(
        model,
        noise_scheduler,
        latents,
        actions,
        timesteps=timesteps,
        noise=noise[:, :, history:],
        action_mask=keep.expand(actions.shape[:2]),
        states=states,
        state_loss_weight=arguments.state_loss_weight,
        snr_gamma=arguments.snr_gamma,
    )


def build_optimizers(model: torch.nn.Module, arguments: TrainingArguments) -> list[torch.optim.Optimizer]:
    """AdamW for all that is trained, or Muon for the matrices of the blocks and AdamW for the rest."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    matrices = {
        name: parameter
        for name, parameter in named.items()
        if arguments.optimizer == "muon" and parameter.ndim == 2 and "transformer_blocks." in name
    }
    settings: dict[str, Any] = {"lr": arguments.learning_rate, "weight_decay": arguments.adam_weight_decay}
    rest = [parameter for name, parameter in named.items() if name not in matrices]
    betas = (arguments.adam_beta1, arguments.adam_beta2)
    if arguments.optimizer == "adamw8bit":
        import bitsandbytes

        return [bitsandbytes.optim.AdamW8bit(rest, betas=betas, **settings)]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, betas=betas, fused=True, **settings)]
    if matrices:  # one learning rate serves both
        optimizers.append(torch.optim.Muon(list(matrices.values()), adjust_lr_fn="match_rms_adamw", **settings))
    return optimizers


def add_lora(transformer: IRASimTransformer3DModel, arguments: TrainingArguments) -> None:
    """Adapters to train; of the model itself only the action encoder and the null action are trained on."""
    alpha = arguments.lora_rank if arguments.lora_alpha is None else arguments.lora_alpha
    transformer.add_adapter(
        LoraConfig(r=arguments.lora_rank, lora_alpha=alpha, target_modules=arguments.lora_target_modules)
    )
    for name, parameter in transformer.named_parameters():
        if name.startswith(ACTION_ENCODER) and "lora_" in name:
            raise ValueError("`lora_target_modules` must leave out the action encoder, which is trained whole.")
        if name.startswith(ACTION_ENCODER):
            parameter.requires_grad_(True)


def save_lora(transformer: IRASimTransformer3DModel, output: Path) -> None:
    """The adapters with the action encoder, as `IRASimPipeline.load_lora_weights` takes them."""
    encoder = {name: value for name, value in transformer.state_dict().items() if name.startswith(ACTION_ENCODER)}
    IRASimPipeline.save_lora_weights(
        output,
        transformer_lora_layers=get_peft_model_state_dict(transformer) | encoder,
        **_collate_lora_metadata({"transformer": transformer}),
    )


def make_pipeline(vae: AutoencoderKL, transformer: IRASimTransformer3DModel, scheduler_class: Any) -> IRASimPipeline:
    """The pipeline of a model, sampled as the paper does or as asked."""
    process = noise_process(transformer.config)
    if isinstance(process, FlowMatchEulerDiscreteScheduler):
        return IRASimPipeline(vae, transformer, process)
    config = {key: value for key, value in process.config.items() if not key.startswith("_")}
    extra = {"skip_prk_steps": True} if scheduler_class is PNDMScheduler else {}
    scheduler = scheduler_class.from_config(config | {"steps_offset": 1, "set_alpha_to_one": False} | extra)
    return IRASimPipeline(vae, transformer, scheduler)


def publish(vae: AutoencoderKL, transformer: IRASimTransformer3DModel, arguments: TrainingArguments) -> None:
    """Push the pipeline, or the adapters with a card that names what they adapt."""
    name = arguments.hub_model_id or Path(arguments.output_dir).name
    if not arguments.lora_rank:
        make_pipeline(vae, transformer, PNDMScheduler).push_to_hub(name)
        return
    repository = create_repo(name, exist_ok=True).repo_id
    card = load_or_create_model_card(
        repository,
        from_training=True,
        base_model=arguments.pretrained_model_name_or_path,
        model_description=f"LoRA of rank {arguments.lora_rank} for a robot world model, with its action encoder: "
        f'`pipe.load_lora_weights("{repository}")`.',
    )
    populate_model_card(card, tags=["lora", "world-model", "irasim", "robotics"])
    card.save(Path(arguments.output_dir) / "README.md")
    upload_folder(
        repo_id=repository,
        folder_path=arguments.output_dir,
        allow_patterns=["README.md", "pytorch_lora_weights.safetensors"],
    )


def check_arguments(arguments: TrainingArguments) -> None:
    """Refuse what cannot work before anything is read, and fill in the autoencoder of a pretrained pipeline."""
    if arguments.optimizer not in ("adamw", "adamw8bit", "muon"):
        raise ValueError(f"`optimizer` must be adamw, adamw8bit or muon, got {arguments.optimizer!r}.")
    pretrained = arguments.pretrained_model_name_or_path
    if arguments.vae is None:
        if pretrained is None or not is_pipeline(pretrained):
            raise ValueError("`vae` must be given, unless a pretrained pipeline brings its own.")
        arguments.vae = f"{pretrained}:vae"
    if arguments.optimizer == "adamw8bit" and not is_bitsandbytes_available():
        raise ValueError("`optimizer` adamw8bit needs `pip install bitsandbytes`.")
    if arguments.preset not in (None, *PRESETS):
        raise ValueError(f"`preset` must be one of {', '.join(PRESETS)}, got {arguments.preset!r}.")
    if arguments.snr_gamma is not None and arguments.prediction_type == "flow_prediction":
        raise ValueError("`snr_gamma` must be left out for a flow, which has no signal-to-noise weights.")
    if len(arguments.dataset_weights) not in (0, len(arguments.dataset)):
        raise ValueError(
            f"`dataset_weights` must be {len(arguments.dataset)} numbers, got {arguments.dataset_weights}."
        )
    if (arguments.height is None) != (arguments.width is None):
        raise ValueError("`height` and `width` must be given together.")
    if arguments.lora_rank and pretrained is None:
        raise ValueError("`lora_rank` needs `pretrained_model_name_or_path`: adapters adapt a trained model.")
    kept = ("patch_size", "action_frequencies", "sample_frames", "num_history_frames", "action_scale", "action_offset")
    given = [name for name in kept if getattr(arguments, name)]
    if arguments.lora_rank and given:
        raise ValueError(f"`lora_rank` keeps the model as it is: leave {', '.join(given)} out.")
    if pretrained is not None and arguments.preset:
        raise ValueError("`preset` is for a new model: leave it out with `pretrained_model_name_or_path`.")
    if arguments.optimizer == "muon" and arguments.mixed_precision == "fp16":
        raise ValueError(
            "`optimizer` muon is two optimisers, which accelerate cannot scale for fp16: take bf16 or no."
        )


def main() -> None:
    (arguments,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    check_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    output = Path(arguments.output_dir)
    accelerator = Accelerator(
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        mixed_precision=arguments.mixed_precision,
        log_with=arguments.report_to,
        project_config=ProjectConfiguration(project_dir=str(output), logging_dir=str(output / "logs")),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))],  # one may encode for long
    )
    set_seed(arguments.seed)
    output.mkdir(parents=True, exist_ok=True)
    if accelerator.is_main_process:
        for partial in output.glob("partial-*"):
            shutil.rmtree(partial)
    accelerator.wait_for_everyone()

    sources = [
        open_source(name, arguments, arguments.split, arguments.max_train_episodes) for name in arguments.dataset
    ]
    vae = load_vae(str(arguments.vae)).to(accelerator.device, memory_format=torch.channels_last)
    pretrained = load_pretrained(arguments)
    for source in sources:
        check_frames(source, vae, pretrained.config.patch_size if pretrained else arguments.patch_size or 2)
    folders = [
        cache_latents(
            source,
            vae,
            arguments.cache_dir or output / "latents",
            mixed_precision=arguments.mixed_precision == "bf16",
            skip_broken=arguments.skip_broken,
            recorded=arguments.recorded_latents,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
            wait_for_everyone=accelerator.wait_for_everyone,
        )
        for source in sources
    ]
    sample_frames = arguments.sample_frames or (
        pretrained.config.sample_frames if pretrained else NEW_MODEL["sample_frames"]
    )
    parts = [LatentClips(folder, sample_frames) for folder in folders]
    if arguments.state_keys:
        numbers = [part.episodes for part in parts]
        known = standardised_states(sources, arguments.state_keys, arguments.state_angles, numbers)
        for part, states in zip(parts, known, strict=True):
            part.states = states
    transformer = build_transformer(arguments, sources[0], parts, vae, pretrained)
    config = transformer.config
    lengths = [*arguments.window_lengths, config.sample_frames]
    if any(length <= config.num_history_frames or config.sample_frames % length for length in lengths):
        raise ValueError(
            f"`window_lengths` must divide the window of {config.sample_frames} frames and exceed the "
            f"{config.num_history_frames} history frames, got {arguments.window_lengths}."
        )
    clips = MixedClips(parts, arguments.dataset_weights or None, arguments.seed)
    if len(clips) < arguments.train_batch_size * accelerator.num_processes:
        raise ValueError(f"`train_batch_size` must be at most the {len(clips)} windows over all processes: lower it.")
    held_out = validation_clips(arguments, config) if accelerator.is_main_process else None
    loader = DataLoader(
        clips,
        batch_size=arguments.train_batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=arguments.dataloader_num_workers,
    )
    if arguments.lora_rank:
        add_lora(transformer, arguments)
    if arguments.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if arguments.attention_backend:
        transformer.set_attention_backend(arguments.attention_backend)
    if arguments.compile:
        transformer.compile(dynamic=False)
    logger.info(
        f"{sum(parameter.numel() for parameter in transformer.parameters()) / 1e6:.2f} M parameters, {len(clips)} windows "
        f"of {sum(len(part.episodes) for part in parts)} episodes"
    )

    ema = EMAModel(
        transformer.parameters(),
        decay=arguments.ema_decay,
        use_ema_warmup=arguments.ema_warmup,
        power=3 / 4,
        foreach=True,
        model_cls=IRASimTransformer3DModel,
        model_config=config,
    )
    ema.to(accelerator.device)
    trained = StateReadout(transformer, clips[0]["states"].shape[1]) if arguments.state_keys else transformer
    # accelerate steps a prepared schedule once for each process
    optimizers = build_optimizers(trained, arguments)
    schedules = [
        get_scheduler(
            arguments.lr_scheduler,
            optimizer,
            num_warmup_steps=arguments.lr_warmup_steps * accelerator.num_processes,
            num_training_steps=arguments.max_train_steps * accelerator.num_processes,
        )
        for optimizer in optimizers
    ]
    model, loader = accelerator.prepare(trained, loader)
    optimizers = [accelerator.prepare(optimizer) for optimizer in optimizers]
    schedules = [accelerator.prepare(schedule) for schedule in schedules]
    accelerator.register_for_checkpointing(ema)
    noise_scheduler = noise_process(config)
    if arguments.report_to:
        settings = {
            name: value if isinstance(value, int | float) else str(value) for name, value in vars(arguments).items()
        }
        accelerator.init_trackers("irasim-diffusers", config=settings)

    shift = getattr(vae.config, "shift_factor", None) or 0.0
    step = 0
    if checkpoints(output):
        newest = checkpoints(output)[-1]
        accelerator.load_state(str(newest))
        ema.to(accelerator.device)  # accelerate loads it onto the CPU
        step = int(newest.name.split("-")[1])
        logger.info(f"resumed from {newest}")
    steps_per_epoch = -(-len(loader) // arguments.gradient_accumulation_steps)
    epoch, done = divmod(step, steps_per_epoch)
    batch_number = epoch * len(loader) + done * arguments.gradient_accumulation_steps
    bar = tqdm(total=arguments.max_train_steps, initial=step, disable=not accelerator.is_main_process, unit="step")
    start = time.perf_counter()
    while step < arguments.max_train_steps:
        loader.set_epoch(epoch)
        clips.set_epoch(epoch)
        batches = (
            accelerator.skip_first_batches(loader, done * arguments.gradient_accumulation_steps) if done else loader
        )
        for batch in batches:
            batch_number += 1
            with accelerator.accumulate(model):
                loss = training_loss(
                    model,
                    noise_scheduler,
                    batch | {"latents": (batch["latents"] - shift) * vae.config.scaling_factor},
                    config,
                    arguments,
                    draw=(arguments.seed, batch_number, accelerator.process_index),
                )
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), arguments.max_grad_norm)
                for optimizer, schedule in zip(optimizers, schedules, strict=True):
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            ema.step(transformer.parameters())
            step += 1
            bar.update()
            if step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.4f}", lr=f"{schedules[0].get_last_lr()[0]:.2e}")
                accelerator.log({"loss": loss.item(), "learning_rate": schedules[0].get_last_lr()[0]}, step=step)
            if step % arguments.checkpointing_steps == 0:
                save_checkpoint(accelerator, output, step, arguments.checkpoints_total_limit)
            if held_out is not None and step % arguments.validation_steps == 0:
                ema.store(transformer.parameters())
                ema.copy_to(transformer.parameters())
                pipeline = make_pipeline(vae, transformer, DDIMScheduler)
                pipeline.set_progress_bar_config(disable=True)
                with torch.compiler.set_stance("force_eager"):
                    figures, picture = validate(pipeline, held_out, arguments.validation_inference_steps)
                ema.restore(transformer.parameters())
                accelerator.log(figures, step=step)
                log_picture(accelerator, picture, step)
                text = ", ".join(f"{name} {value:.2f}" for name, value in figures.items())
                bar.write(f"step {step}, {time.perf_counter() - start:.0f} s: {text}")
            if step == arguments.max_train_steps:
                break
        epoch, done = epoch + 1, 0
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        ema.copy_to(transformer.parameters())
        if arguments.lora_rank:
            save_lora(transformer, output)
        else:
            make_pipeline(vae, transformer, PNDMScheduler).save_pretrained(output)
        logger.info(f"saved to {output}")
        if arguments.push_to_hub:
            publish(vae, transformer, arguments)
    accelerator.end_training()


if __name__ == "__main__":
    main()
