"""Train an IRASim world model on robot clips.

    accelerate launch examples/train.py --dataset data/pusht-train --vae runs/pusht-vae --output_dir runs/pusht

The autoencoder is frozen and its latents are encoded once. The objective and the defaults are those of the paper (Table 10):
AdamW, constant learning rate 1e-4, no weight decay, gradient clipping at 0.1, EMA 0.9999, action dropout 0.1, loss on predicted
frames only. Checkpoints are written to `<output_dir>/checkpoint-<step>`. The same command resumes from the newest complete
checkpoint, also after Ctrl-C or SIGTERM. At the end `<output_dir>` is a complete pipeline.
"""

import functools
import logging
import math
import os
import signal
import time
from dataclasses import dataclass, field
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from accelerate.logging import get_logger
from accelerate.utils import DataLoaderConfiguration, InitProcessGroupKwargs, ProjectConfiguration, set_seed
from diffusers import AutoencoderKL, DDIMScheduler, FlowMatchEulerDiscreteScheduler, PNDMScheduler
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import EMAModel, _collate_lora_metadata
from diffusers.utils import is_bitsandbytes_available
from diffusers.utils.hub_utils import load_or_create_model_card, populate_model_card
from huggingface_hub import create_repo, hf_hub_download, upload_folder
from huggingface_hub.errors import EntryNotFoundError
from peft import LoraConfig, get_peft_model_state_dict
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import HfArgumentParser

from irasim_diffusers import PRESETS, UNET_PRESETS, IRASimPipeline, IRASimTransformer3DModel, UNetTrajectoryModel
from irasim_diffusers.conversion import change_action_dim, change_autoencoder, change_patch_size, predict_samples
from irasim_diffusers.data import (
    LatentClips,
    MixedClips,
    PreparedEpisodes,
    action_normalisation,
    cache_latents,
    check_mixture,
    first_readable,
    frame_skip_for,
    open_dataset,
    standardised_states,
    write_video,
)
from irasim_diffusers.latents import latent_scaling, scale_latents
from irasim_diffusers.metrics import psnr
from irasim_diffusers.models import noise_process
from irasim_diffusers.models.transformer_irasim import ACTION_ENCODER
from irasim_diffusers.training import (
    Interruption,
    NoiseProcess,
    StateReadout,
    averaged_state,
    check_launch,
    checkpoints,
    clip_length,
    crop,
    diffusion_loss,
    load_average,
    newest_checkpoint,
    predict_chunk,
    remove_leftovers,
    require_finite,
    run_script,
    save_average,
    save_checkpoint,
    save_finished,
    seconds_trained,
)

logger = get_logger(__name__, log_level="INFO")


@dataclass
class TrainingArguments:
    # data
    dataset: list[str] = field(
        metadata={"help": "LeRobotDataset, IRASim-format or `datasets` folder, or Hub id; several data sets are mixed"}
    )
    output_dir: str = field(metadata={"help": "folder for checkpoints and the finished pipeline"})
    vae: str | None = field(
        default=None,
        metadata={
            "help": "frozen autoencoder: folder or Hub id, optionally with ':<subfolder>' (default: that of the pretrained "
            "pipeline)"
        },
    )
    pixel_space: bool = field(default=False, metadata={"help": "train on pixels, without an autoencoder"})
    validation_dataset: str | None = field(
        default=None, metadata={"help": "data set of held-out episodes, in the same formats"}
    )
    dataset_revision: str | None = field(
        default=None, metadata={"help": "branch, tag or commit of the data sets on the Hub"}
    )
    dataset_weights: list[float] = field(
        default_factory=list, metadata={"help": "sampling weight of each data set (default: its number of windows)"}
    )
    cameras: list[str] = field(
        default_factory=list,
        metadata={"help": "cameras to stack into one picture; left,right makes a row (default: the only camera)"},
    )
    split: str = field(default="train", metadata={"help": "split of the data, or a part such as train[:90%%]"})
    validation_split: str = field(default="train", metadata={"help": "split of the validation data"})
    max_train_episodes: int | None = field(
        default=None, metadata={"help": "number of episodes of each data set to train on, from the first"}
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "download data sets from the Hub file by file, encode them, and keep only the latents"},
    )
    skip_broken: bool = field(default=False, metadata={"help": "skip episodes that cannot be read, and list them"})
    recorded_latents: bool = field(
        default=False, metadata={"help": "use the latents that are stored with IRASim-format data"}
    )
    fps: float | None = field(default=None, metadata={"help": "frames per second, if the data do not record it"})
    frame_skip: int = field(default=1, metadata={"help": "train on every n-th frame, with all offsets"})
    target_fps: float | None = field(
        default=None, metadata={"help": "frames per second after skipping, instead of --frame_skip"}
    )
    height: int | None = field(default=None, metadata={"help": "resize frames to this height and --width"})
    width: int | None = field(default=None, metadata={"help": "see --height"})
    action_column: str = field(default="actions", metadata={"help": "action column of `datasets` data"})
    state_columns: list[str] = field(default_factory=list, metadata={"help": "state columns of `datasets` data"})
    action_derivation: str = field(
        default="recorded",
        metadata={"help": "recorded, or derived from states: relative_euler, relative_6d, relative_planar, absolute"},
    )
    action_composition: str | None = field(
        default=None,
        metadata={"help": "derivation of recorded actions, which determines how they compose over skipped frames"},
    )
    state_key: str | None = field(default=None, metadata={"help": "state feature that actions are derived from"})
    pad_actions_to: int | None = field(
        default=None, metadata={"help": "pad actions with zeros to this number of components"}
    )
    cache_dir: str | None = field(
        default=None, metadata={"help": "folder of the latent cache (default: output_dir/latents)"}
    )
    # model
    pretrained_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "aliases": ["--pretrained"],
            "help": "pretrained pipeline or transformer: folder or Hub id; window, patch size and action scaling may change",
        },
    )
    revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of the pretrained model"})
    variant: str | None = field(
        default=None, metadata={"help": "variant of the pretrained model's files, such as fp16"}
    )
    model: str = field(
        default="transformer", metadata={"help": "transformer, or unet for the baselines VDM and LVDM of the paper"}
    )
    preset: str | None = field(
        default=None,
        metadata={"help": f"model size of the paper: {', '.join(PRESETS)}; U-Net: {', '.join(UNET_PRESETS)}"},
    )
    num_layers: int | None = field(
        default=None,
        metadata={"help": "pairs of a spatial and a temporal block, if no --preset is given (default: 4)"},
    )
    num_attention_heads: int | None = field(
        default=None, metadata={"help": "if no --preset is given (default: 3; U-Net: 4)"}
    )
    attention_head_dim: int | None = field(
        default=None, metadata={"help": "if no --preset is given (default: 64; U-Net: 32)"}
    )
    block_out_channels: list[int] = field(
        default_factory=list,
        metadata={"help": "channels at each resolution of the U-Net, if no --preset is given (default: 48 96 168)"},
    )
    condition_dim: int | None = field(
        default=None,
        metadata={"help": "size of the U-Net's trajectory embedding, if no --preset is given (default: 192)"},
    )
    patch_size: int | None = field(
        default=None, metadata={"help": "in latent pixels (default: 2, or that of the pretrained model)"}
    )
    sample_frames: int | None = field(
        default=None, metadata={"help": "frames of a window, history and predicted frames (default: 16)"}
    )
    num_history_frames: int | None = field(
        default=None,
        metadata={
            "help": "maximum number of history frames (default: 1); 70 %% of the steps use all, the others draw 1 to this number"
        },
    )
    crop_size: int | None = field(
        default=None,
        metadata={
            "help": "train on square crops of this side (latent pixels) around moving patches if the history is not predicted; "
            "requires --spatial_position rope"
        },
    )
    rollout_chunks: int = field(
        default=0,
        metadata={
            "help": "also train on the model's predictions: before the loss on a chunk, up to this many chunks are predicted "
            "without gradient, and the last predicted frames are the history; clips become longer by these chunks"
        },
    )
    rollout_start_step: int = field(default=0, metadata={"help": "step at which --rollout_chunks takes effect"})
    rollout_inference_steps: int = field(
        default=1, metadata={"help": "denoising steps of the chunks that are predicted for --rollout_chunks"}
    )
    history_noise: float = field(
        default=0.0,
        metadata={"help": "maximum standard deviation of the noise on history latents, against drift in rollouts"},
    )
    conditioning: str | None = field(
        default=None, metadata={"help": "frame for Frame-Ada (default), video for Video-Ada"}
    )
    action_normalisation: str = field(
        default="std", metadata={"help": "offset and scale from the data: std, or quantile (1 %% and 99 %%)"}
    )
    action_scale: list[float] = field(
        default_factory=list, metadata={"help": "one number, or one per component, instead of the data's"}
    )
    action_offset: list[float] = field(
        default_factory=list, metadata={"help": "one number, or one per component, instead of the data's"}
    )
    action_space: str | None = field(
        default=None, metadata={"help": "relative (default), or absolute for recorded target positions"}
    )
    action_frequencies: int | None = field(
        default=None,
        metadata={
            "help": "octaves of sine and cosine features of the actions (default: 0, or that of the pretrained model)"
        },
    )
    spatial_position: str | None = field(
        default=None, metadata={"help": "grid (default), or rope for rotary positions in the spatial blocks"}
    )
    ff_conv: bool = field(
        default=False, metadata={"help": "depthwise 3x3 convolution in the feed-forward of the spatial blocks"}
    )
    target_extent: list[float] = field(
        default_factory=list,
        metadata={
            "help": "edges of the frame (left, top, right, bottom) in units of the first two action components, if these are a "
            "target position: every patch receives its offset from the target"
        },
    )
    relative_latents: bool = field(
        default=False,
        metadata={"help": "predict latents relative to the last history frame"},
    )
    scale_noisy_latents: bool = field(
        default=False,
        metadata={"help": "multiply noisy latents by sqrt(alpha_bar) at the input, for one-step sampling"},
    )
    prediction_type: str | None = field(
        default=None,
        metadata={
            "help": "epsilon (default), v_prediction, sample or flow_prediction; a pretrained v_prediction model can change to sample"
        },
    )
    # LoRA
    lora_rank: int = field(
        default=0,
        metadata={"aliases": ["--rank"], "help": "train LoRA adapters of this rank and the action encoder only"},
    )
    lora_alpha: int | None = field(default=None, metadata={"help": "LoRA alpha (default: the rank)"})
    lora_dropout: float = 0.0
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"],
        metadata={"aliases": ["--lora_layers"], "help": "layers with adapters"},
    )
    # optimisation
    train_batch_size: int = field(default=16, metadata={"help": "windows per process and batch"})
    gradient_accumulation_steps: int = 1
    max_train_steps: int = 300_000
    max_train_minutes: float | None = field(
        default=None, metadata={"help": "stop after this time, including validation and checkpoints"}
    )
    learning_rate: float = 1e-4
    lr_scheduler: str = field(
        default="constant_with_warmup", metadata={"help": "learning rate schedule of diffusers' get_scheduler"}
    )
    lr_warmup_steps: int = 0
    lr_num_cycles: int = field(default=1, metadata={"help": "number of cycles of cosine_with_restarts"})
    lr_power: float = field(default=1.0, metadata={"help": "power of polynomial"})
    optimizer: str = field(
        default="adamw",
        metadata={
            "help": "adamw, adamw8bit (bitsandbytes), or muon (torch 2.9) for the blocks' matrices and adamw for the rest"
        },
    )
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 0.0
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 0.1
    snr_gamma: float | None = field(default=None, metadata={"help": "gamma of min-SNR loss weights; 5 in its paper"})
    terminal_share: float = field(
        default=0.0,
        metadata={"help": "fraction of windows at the last timestep, where sampling starts; the others are uniform"},
    )
    action_dropout: float = field(
        default=0.1, metadata={"help": "fraction of windows whose actions are replaced by the null action"}
    )
    state_keys: list[str] = field(
        default_factory=list,
        metadata={"help": "state features to predict from intermediate features as an auxiliary loss"},
    )
    state_angles: list[str] = field(
        default_factory=list, metadata={"help": "components of --state_keys that are angles in radians"}
    )
    state_loss_weight: float = 1.0
    ema_decay: float = 0.9999
    ema_warmup: bool = field(default=True, metadata={"help": "increase the EMA decay with the steps, for short runs"})
    mixed_precision: str | None = field(
        default=None,
        metadata={"help": "no, fp16 or bf16 (default: that of accelerate's config, or bf16)"},
    )
    allow_tf32: bool = field(
        default=False, metadata={"help": "faster float32 matrix products on Ampere GPUs and later"}
    )
    gradient_checkpointing: bool = False
    compile: bool = field(default=False, metadata={"help": "compile the model with torch.compile"})
    attention_backend: str | None = field(
        default=None, metadata={"help": "attention backend of diffusers; _native_math trains twice as fast on a CPU"}
    )
    dataloader_num_workers: int = 0
    # bookkeeping
    logging_steps: int = 20
    checkpointing_steps: int = 500
    checkpoints_total_limit: int = 2
    validation_steps: int = 2000
    num_validation_clips: int = 16
    validation_inference_steps: int = 16
    report_to: str | None = field(
        default=None, metadata={"help": "tracker of accelerate, for example tensorboard or wandb"}
    )
    push_to_hub: bool = field(default=False, metadata={"help": "push the trained model to the Hub, with a card"})
    hub_model_id: str | None = field(default=None, metadata={"help": "repository (default: the name of output_dir)"})
    seed: int = 0


NEW_MODEL: dict[str, Any] = {
    "num_layers": 4,
    "num_attention_heads": 3,
    "attention_head_dim": 64,
    "sample_frames": 16,
    "num_history_frames": 1,
    "conditioning": "frame",
    "action_space": "relative",
    "relative_latents": False,
    "scale_noisy_latents": False,
    "prediction_type": "epsilon",
    "patch_size": 2,
    "action_frequencies": 0,
    "spatial_position": "grid",
    "ff_conv": False,
    "target_extent": None,
}
"""Default config of a new transformer."""
NEW_UNET: dict[str, Any] = {
    "block_out_channels": [48, 96, 168],
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "condition_dim": 192,
    "sample_frames": 16,
    "num_history_frames": 1,
    "action_space": "relative",
    "relative_latents": False,
    "prediction_type": "epsilon",
    "action_frequencies": 0,
}
"""Default config of a new U-Net, with about as many parameters."""
MODELS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "transformer": (IRASimTransformer3DModel, NEW_MODEL, PRESETS),
    "unet": (UNetTrajectoryModel, NEW_UNET, UNET_PRESETS),
}
"""Class, default config and presets by `model`."""
FOREIGN = {
    "transformer": ("block_out_channels", "condition_dim"),
    "unet": (
        "pretrained_model_name_or_path",
        "num_layers",
        "patch_size",
        "spatial_position",
        "ff_conv",
        "target_extent",
        "scale_noisy_latents",
        "crop_size",
    ),
}
"""Options that do not apply to a model."""
MAY_CHANGE = {
    *("output_dir", "cache_dir", "max_train_steps", "max_train_minutes", "dataloader_num_workers", "report_to"),
    *("logging_steps", "checkpointing_steps", "checkpoints_total_limit", "push_to_hub", "hub_model_id"),
    *(
        "validation_dataset",
        "validation_split",
        "validation_steps",
        "num_validation_clips",
        "validation_inference_steps",
    ),
    *("compile", "attention_backend", "gradient_checkpointing", "allow_tf32"),
    *(
        "dataset",
        "dataset_revision",
        "streaming",
        "vae",
        "max_train_episodes",
    ),  # the identity of the latents covers these
}
"""Arguments that may change when a run is resumed."""
NOT_NEGATIVE = (
    *("rollout_chunks", "rollout_start_step", "lora_rank", "action_frequencies", "lr_warmup_steps", "history_noise"),
    *("adam_weight_decay", "adam_beta1", "adam_beta2", "state_loss_weight", "dataloader_num_workers", "seed"),
)
AT_LEAST_1 = (
    *("rollout_inference_steps", "train_batch_size", "gradient_accumulation_steps", "max_train_steps", "frame_skip"),
    *("max_train_episodes", "num_layers", "num_attention_heads", "attention_head_dim", "patch_size", "condition_dim"),
    *("sample_frames", "num_history_frames", "logging_steps", "checkpointing_steps", "checkpoints_total_limit"),
    *("validation_steps", "num_validation_clips", "lr_num_cycles", "height", "width", "pad_actions_to"),
    *("crop_size", "lora_alpha"),
)
POSITIVE = (
    *("learning_rate", "max_grad_norm", "max_train_minutes", "fps", "target_fps", "adam_epsilon", "snr_gamma"),
    *("dataset_weights", "lr_power", "block_out_channels"),
)
FRACTIONS = ("terminal_share", "action_dropout", "ema_decay", "lora_dropout")
CHOICES = {
    "optimizer": ("adamw", "adamw8bit", "muon"),
    "conditioning": ("frame", "video"),
    "action_normalisation": ("std", "quantile"),
    "action_space": ("relative", "absolute"),
    "spatial_position": ("grid", "rope"),
    "prediction_type": ("epsilon", "v_prediction", "sample", "flow_prediction"),
    "mixed_precision": ("no", "fp16", "bf16"),
    "lr_scheduler": tuple(each.value for each in SchedulerType),
    "attention_backend": tuple(each.value for each in AttentionBackendName),
}
"""Arguments by their values; None is allowed where it is the default."""
WINDOW = ("sample_frames", "num_history_frames")
FULL_HISTORY = 0.7
"""Fraction of the steps that use all history frames; the others draw the number uniformly."""
TRUE_HISTORY = 0.3
"""Fraction of clips that keep the true history in a rollout step."""


def load_vae(arguments: TrainingArguments) -> AutoencoderKL | None:
    """Load the frozen autoencoder, or return None for pixel space."""
    if arguments.pixel_space:
        return None
    if arguments.vae is None:
        return pretrained_vae(arguments)
    split = ":" in arguments.vae and not Path(arguments.vae).is_dir()
    name, _, subfolder = arguments.vae.rpartition(":") if split else (arguments.vae, "", "")
    vae = AutoencoderKL.from_pretrained(name, subfolder=subfolder or None)
    return vae.requires_grad_(False).eval().to(memory_format=torch.channels_last)


def pretrained_vae(arguments: TrainingArguments) -> AutoencoderKL | None:
    """Load the frozen autoencoder of the pretrained pipeline; None for a pixel-space pipeline."""
    name = str(arguments.pretrained_model_name_or_path)
    if IRASimPipeline.load_config(name, revision=arguments.revision)["vae"][1] is None:
        return None
    vae = AutoencoderKL.from_pretrained(name, subfolder="vae", revision=arguments.revision)
    return vae.requires_grad_(False).eval().to(memory_format=torch.channels_last)


def is_pipeline(name: str, revision: str | None = None) -> bool:
    """Return whether a folder or Hub repository contains a pipeline."""
    if Path(name).is_dir():
        return (Path(name) / "model_index.json").is_file()
    try:
        hf_hub_download(name, "model_index.json", revision=revision)
    except EntryNotFoundError:
        return False
    return True


def open_source(
    name: str, arguments: TrainingArguments, split: str, max_episodes: int | None, all_phases: bool
) -> PreparedEpisodes:
    """Open a data set with the requested cameras, frame size and actions."""
    source = open_dataset(
        name,
        arguments.cameras or None,
        split=split,
        max_episodes=max_episodes,
        fps=arguments.fps,
        action_column=arguments.action_column,
        state_columns=arguments.state_columns,
        revision=arguments.dataset_revision if name in arguments.dataset else None,
        streaming=arguments.streaming,
    )
    skip = arguments.frame_skip if arguments.target_fps is None else frame_skip_for(source.fps, arguments.target_fps)
    return PreparedEpisodes(
        source,
        arguments.action_derivation,
        arguments.state_key,
        skip,
        arguments.action_composition,
        arguments.pad_actions_to,
        (arguments.height, arguments.width) if arguments.height and arguments.width else None,
        all_phases,
    )


def check_frames(source: PreparedEpisodes, vae: AutoencoderKL | None, patch_size: int) -> None:
    """Check that frames can be divided into patches, before they are encoded."""
    height, width = first_readable(source, source.__getitem__).frames.shape[1:3]
    multiple = patch_size if vae is None else 2 ** (len(vae.config.block_out_channels) - 1) * patch_size
    if height % multiple or width % multiple:
        nearest = [max(round(side / multiple), 1) * multiple for side in (height, width)]
        raise ValueError(
            f"frames of {source.name!r} must have sides divisible by {multiple}, got {height}x{width}: use "
            f"--height {nearest[0]} --width {nearest[1]}."
        )


def check_data(sources: list[PreparedEpisodes], arguments: TrainingArguments) -> None:
    """Check the arguments and the validation data against the data, before they are encoded."""
    vectors = first_readable(sources[0], sources[0].vectors)
    action_dim = vectors["action"].shape[1]
    for name in ("action_scale", "action_offset"):
        values = getattr(arguments, name)
        if len(values) not in (0, 1, action_dim):
            raise ValueError(f"`{name}` must be one number, or {action_dim}, got {values}.")
    missing = [key for key in arguments.state_keys if key not in vectors]
    if missing:
        raise ValueError(f"{sources[0].name!r} has no vector feature {missing[0]!r}; it has {sorted(vectors)}.")
    if arguments.validation_dataset is None:
        return
    held_out = open_source(arguments.validation_dataset, arguments, arguments.validation_split, None, all_phases=False)
    check_mixture([sources[0], held_out])
    found = first_readable(held_out, held_out.vectors)["action"].shape[1]
    if found != action_dim:
        raise ValueError(f"`validation_dataset` must have {action_dim} action components as the data, got {found}.")
    if arguments.recorded_latents or arguments.streaming:  # frames may be absent or must be downloaded
        return
    sizes = [
        first_readable(source, functools.partial(_first_frame, source)).shape[:2] for source in (sources[0], held_out)
    ]
    if sizes[0] != sizes[1]:
        raise ValueError(f"`validation_dataset` must have pictures of {sizes[0]} (height, width), got {sizes[1]}.")


def _first_frame(source: PreparedEpisodes, number: int) -> np.ndarray:
    return source.window(number, 0, 1).frames[0]


def load_pretrained(
    arguments: TrainingArguments, vae: AutoencoderKL | None, source: PreparedEpisodes
) -> IRASimTransformer3DModel | None:
    """Load the pretrained model and adapt it to the requested autoencoder, patch size and frequencies; None for a new model."""
    name = arguments.pretrained_model_name_or_path
    if name is None:
        return None
    model = IRASimTransformer3DModel.from_pretrained(
        name,
        subfolder="transformer" if is_pipeline(name, arguments.revision) else None,
        revision=arguments.revision,
        variant=arguments.variant,
    )
    fixed = NEW_MODEL.keys() - {
        "patch_size",
        "action_frequencies",
        "action_space",
        "relative_latents",
        *(WINDOW if model.config.conditioning == "frame" else ()),
        *(["target_extent"] if model.config.target_extent else []),
    }
    for flag in sorted(fixed):
        asked, has = getattr(arguments, flag), model.config[flag]
        if asked not in (None, False, [], has) and (has, asked) != ("v_prediction", "sample"):
            raise ValueError(
                f"`{flag}` is {model.config[flag]!r} in {name!r} and cannot become {asked!r}: leave it out."
            )
    changed = {flag: getattr(arguments, flag) for flag in (*WINDOW, "relative_latents", "target_extent")}
    model.register_to_config(**{flag: value for flag, value in changed.items() if value})
    if (model.config.prediction_type, arguments.prediction_type) == ("v_prediction", "sample"):
        model = predict_samples(model)
    if arguments.vae is not None and is_pipeline(name, arguments.revision):
        own = pretrained_vae(arguments)
        if own is None or vae is None:
            raise ValueError(f"`vae` must be left out: {name!r} is a pixel-space model.")
        followed = follow_autoencoder(model, own, vae, source)
        if arguments.lora_rank and followed is not model:
            raise ValueError(
                "`vae` must be left out with `lora_rank`: it differs from the autoencoder of the pretrained model."
            )
        model = followed
    patch_size = arguments.patch_size or model.config.patch_size
    frequencies = arguments.action_frequencies
    if patch_size != model.config.patch_size or frequencies not in (None, model.config.action_frequencies):
        model = change_patch_size(model, patch_size, frequencies)
    return model


@torch.no_grad()
def follow_autoencoder(
    model: IRASimTransformer3DModel, own: AutoencoderKL, other: AutoencoderKL, source: PreparedEpisodes
) -> IRASimTransformer3DModel:
    """Adapt the pretrained model to the latents of another autoencoder, if they differ from those of its own."""
    pictures = []
    for number in range(min(len(source), 32)):
        try:
            frames = source[number].frames
        except ValueError:  # reported or skipped when it is encoded
            continue
        pictures.append(frames[np.linspace(0, len(frames) - 1, 16).astype(int)])
    if not pictures:
        raise ValueError(f"none of the first episodes of {source.name!r} can be read.")
    pixels = torch.from_numpy(np.concatenate(pictures)).permute(0, 3, 1, 2) / 127.5 - 1
    own.to(other.device)
    few = [scaled_latents(vae, pixels[:: len(pixels) // 4]) for vae in (own, other)]
    if few[0].shape == few[1].shape and (few[0] - few[1]).square().mean() < 1e-4 * few[0].square().mean():
        return model
    before, after = (scaled_latents(vae, pixels) for vae in (own, other))
    patch_size, remainder = divmod(model.config.patch_size * after.shape[-1], before.shape[-1])
    if remainder or not patch_size:
        raise ValueError(
            f"`vae` must allow patches of the same size in pixels as the pretrained model, got latents {tuple(after.shape[1:])} for "
            f"{tuple(before.shape[1:])} in patches of {model.config.patch_size}: use another autoencoder."
        )
    logger.info(
        f"the autoencoder differs from that of the pretrained model: fitted patches of {patch_size} latent pixels to it"
    )
    return change_autoencoder(model, patch_size, before, after)


def scaled_latents(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Return scaled latents of frames (N, 3, H, W) in [-1, 1], float32 on the CPU."""
    latents = [vae.encode(part.to(vae.device)).latent_dist.mode().float().cpu() for part in pixels.split(16)]
    return scale_latents(vae, torch.cat(latents))


def build_transformer(
    arguments: TrainingArguments,
    source: PreparedEpisodes,
    parts: list[LatentClips],
    vae: AutoencoderKL | None,
    pretrained: IRASimTransformer3DModel | None,
) -> IRASimTransformer3DModel | UNetTrajectoryModel:
    """Create the model, or update the config of the pretrained one."""
    actions = torch.cat([part.actions for part in parts])
    offset, scale = action_normalisation(actions, arguments.action_normalisation)
    action_dim = len(offset)
    bounds = {"action_low": actions.amin(0).tolist(), "action_high": actions.amax(0).tolist()}
    given: dict[str, Any] = {
        name: values[0] if len(values) == 1 else values
        for name, values in (("action_scale", arguments.action_scale), ("action_offset", arguments.action_offset))
    }
    height, width = parts[0].latent_size
    known: dict[str, Any] = {
        "sample_height": height,
        "sample_width": width,
        "fps": source.fps,
        "cameras": [list(row) for row in source.cameras],
        "action_names": source.component_names("action"),
        "action_derivation": source.action_derivation,
    }
    if pretrained is not None and arguments.lora_rank:
        config = pretrained.config
        asked: dict[str, Any] = {"action_dim": action_dim, "sample_height": height, "sample_width": width}
        if source.action_derivation != "recorded":  # recorded actions have no known derivation
            asked["action_derivation"] = source.action_derivation
        for name, value in asked.items():
            if config[name] != value:
                raise ValueError(
                    f"`{name}` must be {config[name]!r} as in the pretrained model with `lora_rank`, got {value!r}."
                )
        return pretrained
    derivation, action_space = source.action_derivation, arguments.action_space
    if derivation != "recorded":
        derived = "absolute" if derivation == "absolute" else "relative"
        if action_space not in (None, derived):
            raise ValueError(f"`action_space` must be {derived!r} for {derivation} actions, got {action_space!r}.")
        action_space = derived
    if pretrained is not None:
        if pretrained.config.action_dim != action_dim:
            logger.info(
                f"the data have {action_dim} action components, the pretrained model {pretrained.config.action_dim}: the "
                "action encoder is initialised again"
            )
            pretrained = change_action_dim(pretrained, action_dim)
        config = pretrained.config
        encoder = getattr(pretrained, "trajectory_embed", pretrained.action_embed)
        if not encoder.linear_2.weight.any():  # zero-initialised: not trained on actions yet
            known |= {
                "action_scale": scale,
                "action_offset": offset,
                "action_space": action_space or "relative",
            } | bounds
        else:
            if derivation == "recorded":  # keep the derivation of the model
                known.pop("action_derivation")
            for name, wanted in (("action_space", action_space), ("action_derivation", derivation)):
                if wanted not in (None, "recorded", config[name]) and config[name] != "recorded":
                    raise ValueError(
                        f"`{name}` is {config[name]!r} in {arguments.pretrained_model_name_or_path!r} and cannot become "
                        f"{wanted!r}."
                    )
        known |= {name: value for name, value in given.items() if value != []}
        if known["fps"] is None:
            known.pop("fps")
        pretrained.register_to_config(**known)
        return pretrained
    model_class, defaults, presets = MODELS[arguments.model]
    settings = {
        name: default if getattr(arguments, name) in (None, []) else getattr(arguments, name)
        for name, default in defaults.items()
    }
    settings["action_space"] = action_space or "relative"
    settings |= presets[arguments.preset] if arguments.preset else {}
    return model_class(
        **settings | known | bounds | {"in_channels": 3 if vae is None else vae.config.latent_channels},
        action_dim=action_dim,
        action_scale=scale if given["action_scale"] == [] else given["action_scale"],
        action_offset=offset if given["action_offset"] == [] else given["action_offset"],
    )


def validation_clips(arguments: TrainingArguments, config: dict) -> tuple[np.ndarray, np.ndarray] | None:
    """Read one held-out clip from the middle of each episode: frames (N, F, H, W, 3), uint8, and actions (N, F - h, A)."""
    if arguments.validation_dataset is None:
        return None
    frames, actions = [], []
    source = open_source(arguments.validation_dataset, arguments, arguments.validation_split, None, all_phases=False)
    wanted = clip_length(config, arguments.rollout_chunks)
    for number in range(len(source)):
        try:
            length = len(source.vectors(number)["action"])
            if length < wanted:
                raise ValueError(
                    f"episode {number} of {arguments.validation_dataset!r} has {length} frames, fewer than a clip of "
                    f"{wanted}: use a smaller `sample_frames` or `rollout_chunks`, or skip it with --skip_broken."
                )
            clip = source.window(number, (length - wanted) // 2, wanted)
        except ValueError:
            if not arguments.skip_broken:
                raise
            continue
        frames.append(clip.frames)
        actions.append(clip.actions[config["num_history_frames"] - 1 : -1])
        if len(frames) == arguments.num_validation_clips:
            break
    if not frames:
        raise ValueError(f"no episode of {arguments.validation_dataset!r} has {wanted} frames, the length of a clip.")
    return np.stack(frames), np.stack(actions)


def validate(
    pipeline: IRASimPipeline, clips: tuple[np.ndarray, np.ndarray], steps: int
) -> tuple[dict[str, float], np.ndarray]:
    """Compute metrics on held-out clips, and a video of the first four.

    The metrics are the PSNR under the clips' own actions, under those of other clips, and of repeating the last history frame.
    The video (n, H, W, 3), uint8, shows the true frames in the first row and the predictions in the second.
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
    rows = [np.concatenate(list(clips[:4]), axis=2) for clips in (truth, own)]  # (n, H, 4 W, 3) each
    return figures, (np.concatenate(rows, axis=1) * 255).round().astype(np.uint8)


def log_video(accelerator: Accelerator, video: np.ndarray, path: Path, fps: float, step: int) -> None:
    """Write the validation video, and log it to the trackers; TensorBoard receives the last frame."""
    write_video(path, video, fps)
    for tracker in accelerator.trackers:
        if tracker.name in ("wandb", "trackio"):
            tracker.log({"validation": import_module(tracker.name).Video(str(path))}, step=step)
        elif tracker.name == "tensorboard":
            tracker.log_images({"validation": video[-1:]}, step=step, dataformats="NHWC")


def training_loss(
    model: torch.nn.Module,
    noise_scheduler: NoiseProcess,
    clip: dict[str, torch.Tensor],
    config: dict,
    arguments: TrainingArguments,
    step: int,
    position: int,
) -> torch.Tensor:
    """Compute the loss of a batch of clips.

    The numbers of history frames and of chunks predicted first depend on the seed and the step only. Noise, timesteps and action
    dropout depend on the seed and the index of the clip in the run, counted from `position`. The draws therefore do not depend on
    the number of processes.
    """
    latents, actions = clip["latents"], clip["actions"]
    common = np.random.default_rng([arguments.seed, 0, step])
    most = config["num_history_frames"]
    length = config["sample_frames"] - most  # of a chunk
    shortest = 1 if config["conditioning"] == "frame" else most  # Video-Ada has a fixed number
    num_history = most if common.random() < FULL_HISTORY else int(common.integers(shortest, most + 1))
    started = step >= arguments.rollout_start_step
    chunks = int(common.integers(0, arguments.rollout_chunks + 1)) if started else 0

    def draw(kind: int, *shape: int, normal: bool = False) -> torch.Tensor:
        """Draw uniform or normal numbers (B, ...)."""
        generators = [
            np.random.default_rng([arguments.seed, 1, position + index, kind]) for index in range(len(latents))
        ]
        drawn = [
            each.standard_normal(shape, np.float32) if normal else each.random(shape, np.float32)
            for each in generators
        ]
        return torch.from_numpy(np.stack(drawn)).to(latents.device)

    draws = draw(0, 8)
    (timestep, terminal, deviation, drop, true_history), places = draws[:, :5].unbind(1), draws[:, 5:]
    history = latents[:, :, most - num_history : most]
    shape = (latents.shape[1], length, *latents.shape[3:])
    for chunk in range(chunks):
        first = most + chunk * length
        future = predict_chunk(
            model,
            noise_scheduler,
            history,
            actions[:, first - 1 : first - 1 + length],
            draw(2 + chunk, *shape, normal=True),
            num_inference_steps=arguments.rollout_inference_steps,
            relative_latents=config["relative_latents"],
        )
        history = torch.cat([history, future.to(history)], dim=2)[:, :, -most:]
    torch.clear_autocast_cache()  # before torch 2.11 it keeps weights cast without gradient
    first = most + chunks * length  # of the frames with the loss
    start, end = first - history.shape[2], first + length
    keep = (true_history < TRUE_HISTORY).view(-1, 1, 1, 1, 1)
    history = torch.where(keep, latents[:, :, start:first], history)
    window, actions = torch.cat([history, latents[:, :, first:end]], dim=2), actions[:, first - 1 : end - 1]
    if arguments.crop_size and not chunks:
        window, actions = crop(window, actions, config, arguments.crop_size, places)
    noise = draw(1, *window.shape[1:], normal=True)
    clean = first - start
    noisy_history = (
        window[:, :, :clean] + arguments.history_noise * deviation.view(-1, 1, 1, 1, 1) * noise[:, :, :clean]
    )
    steps = noise_scheduler.config.num_train_timesteps
    return diffusion_loss(
        model,
        noise_scheduler,
        torch.cat([noisy_history, window[:, :, clean:]], dim=2),
        actions,
        timesteps=torch.where(terminal < arguments.terminal_share, steps - 1, (timestep * steps).long()).clamp_max(
            steps - 1
        ),
        noise=noise[:, :, clean:],
        action_mask=(drop >= arguments.action_dropout)[:, None].expand(-1, length),
        relative_latents=config["relative_latents"],
        states=clip["states"][:, start:end] if arguments.state_keys else None,
        state_loss_weight=arguments.state_loss_weight,
        snr_gamma=arguments.snr_gamma,
    )


def build_optimizers(model: torch.nn.Module, arguments: TrainingArguments) -> list[torch.optim.Optimizer]:
    """Build AdamW for all trained parameters, or Muon for the matrices of the blocks and AdamW for the others."""
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    matrices = {
        name: parameter
        for name, parameter in named.items()
        if arguments.optimizer == "muon" and parameter.ndim == 2 and "transformer_blocks." in name
    }
    settings: dict[str, Any] = {"lr": arguments.learning_rate, "weight_decay": arguments.adam_weight_decay}
    adam: dict[str, Any] = {"betas": (arguments.adam_beta1, arguments.adam_beta2), "eps": arguments.adam_epsilon}
    rest = [parameter for name, parameter in named.items() if name not in matrices]
    if arguments.optimizer == "adamw8bit":
        import bitsandbytes

        return [bitsandbytes.optim.AdamW8bit(rest, **adam, **settings)]
    optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(rest, fused=True, **adam, **settings)]
    if matrices:  # both use the same learning rate
        optimizers.append(torch.optim.Muon(list(matrices.values()), adjust_lr_fn="match_rms_adamw", **settings))
    return optimizers


def add_lora(transformer: IRASimTransformer3DModel, arguments: TrainingArguments) -> None:
    """Add LoRA adapters, and train only them, the action encoder and the null action."""
    alpha = arguments.lora_rank if arguments.lora_alpha is None else arguments.lora_alpha
    transformer.add_adapter(
        LoraConfig(
            r=arguments.lora_rank,
            lora_alpha=alpha,
            lora_dropout=arguments.lora_dropout,
            target_modules=arguments.lora_target_modules,
        )
    )
    for name, parameter in transformer.named_parameters():
        if name.startswith(ACTION_ENCODER) and "lora_" in name:
            raise ValueError(
                "`lora_target_modules` must not include the action encoder: all of its weights are trained."
            )
        if name.startswith(ACTION_ENCODER):
            parameter.requires_grad_(True)


def save_lora(transformer: IRASimTransformer3DModel, output: Path) -> None:
    """Save adapters and action encoder in the format of `IRASimPipeline.load_lora_weights`."""
    encoder = {name: value for name, value in transformer.state_dict().items() if name.startswith(ACTION_ENCODER)}
    IRASimPipeline.save_lora_weights(
        output,
        transformer_lora_layers=get_peft_model_state_dict(transformer) | encoder,
        **_collate_lora_metadata({"transformer": transformer}),
    )


def make_pipeline(
    vae: AutoencoderKL | None,
    transformer: IRASimTransformer3DModel | UNetTrajectoryModel,
    scheduler_class: Any = PNDMScheduler,
) -> IRASimPipeline:
    """Build the pipeline with the sampler of the paper, `scheduler_class`, or one DDIM step for `scale_noisy_latents`."""
    process = noise_process(transformer.config)
    if isinstance(process, FlowMatchEulerDiscreteScheduler):
        return IRASimPipeline(vae, transformer, process)
    if transformer.config.get("scale_noisy_latents"):
        scheduler = DDIMScheduler.from_config(process.config, timestep_spacing="trailing")
        return IRASimPipeline(vae, transformer, scheduler, num_inference_steps=1)
    config = {key: value for key, value in process.config.items() if not key.startswith("_")}
    extra: dict[str, Any] = {"skip_prk_steps": True}
    if scheduler_class is not PNDMScheduler:
        extra = {"timestep_spacing": "trailing"}  # the first of few steps is then at pure noise
    if transformer.config.prediction_type == "sample":
        extra["prediction_type"] = "v_prediction"  # PNDM does not support sample prediction; the pipeline converts it
    scheduler = scheduler_class.from_config(config | {"steps_offset": 1, "set_alpha_to_one": False} | extra)
    return IRASimPipeline(vae, transformer, scheduler)


def finished_pipeline(
    vae: AutoencoderKL | None,
    transformer: IRASimTransformer3DModel | UNetTrajectoryModel,
    arguments: TrainingArguments,
) -> IRASimPipeline:
    """Build the pipeline of the trained model, with the scheduler of the pretrained pipeline if it still fits the model."""
    pipeline = make_pipeline(vae, transformer)
    name, revision = arguments.pretrained_model_name_or_path, arguments.revision
    if name is None or not is_pipeline(name, revision):
        return pipeline
    known = IRASimPipeline.load_config(name, revision=revision)
    scheduler = getattr(diffusers, known["scheduler"][1]).from_pretrained(
        name, subfolder="scheduler", revision=revision
    )
    settings = {key: known[key] for key in ("num_inference_steps", "window_length", "timesteps") if key in known}
    if (settings.get("window_length") or 0) > transformer.config.sample_frames:
        settings["window_length"] = None
    sampled = IRASimPipeline(pipeline.vae, transformer, scheduler, **settings)
    try:
        sampled.check_scheduler()
    except ValueError:  # the prediction type or the noise process has changed
        return pipeline
    return sampled


def publish(
    vae: AutoencoderKL | None,
    transformer: IRASimTransformer3DModel | UNetTrajectoryModel,
    arguments: TrainingArguments,
) -> None:
    """Push the pipeline to the Hub, or the adapters with a card that names the base model."""
    name = arguments.hub_model_id or Path(arguments.output_dir).name
    if not arguments.lora_rank:
        finished_pipeline(vae, transformer, arguments).push_to_hub(name)
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
    """Check the arguments before anything is read.

    Raises:
        ValueError: If a value is invalid or does not apply to the other arguments.
    """
    check_values(arguments)
    check_model_arguments(arguments)
    check_pretrained_arguments(arguments)
    if arguments.max_train_minutes is not None and not arguments.lr_scheduler.startswith("constant"):
        raise ValueError(
            f"`lr_scheduler` must be constant or constant_with_warmup with `max_train_minutes`, got "
            f"{arguments.lr_scheduler!r}: the others need to know the number of steps."
        )
    if len(arguments.dataset_weights) not in (0, len(arguments.dataset)):
        raise ValueError(
            f"`dataset_weights` must be {len(arguments.dataset)} numbers, got {arguments.dataset_weights}."
        )
    held_out = os.path.normpath(arguments.validation_dataset or "")
    if held_out in map(os.path.normpath, arguments.dataset) and arguments.validation_split == arguments.split:
        raise ValueError(
            f"`validation_split` must differ from `split` for a data set that is also in `dataset`, got {arguments.split!r} for "
            f"both in {arguments.validation_dataset!r}."
        )
    if (arguments.height is None) != (arguments.width is None):
        raise ValueError("`height` and `width` must be given together.")
    if arguments.frame_skip > 1 and arguments.target_fps is not None:
        raise ValueError("`frame_skip` and `target_fps` exclude each other.")
    if arguments.rollout_chunks == 0 and (arguments.rollout_start_step or arguments.rollout_inference_steps > 1):
        raise ValueError(
            "`rollout_start_step` and `rollout_inference_steps` must be used with `rollout_chunks`, got 0."
        )


def check_values(arguments: TrainingArguments) -> None:
    """Check every value by itself.

    Raises:
        ValueError: If a number is out of range or a name is unknown.
    """
    require_finite(vars(arguments))
    for names, least in ((NOT_NEGATIVE, 0), (AT_LEAST_1, 1)):
        for name in names:
            value = getattr(arguments, name)
            if value is not None and value < least:
                raise ValueError(f"`{name}` must be at least {least}, got {value}.")
    for name in POSITIVE:
        values = getattr(arguments, name)
        for value in values if isinstance(values, list) else [values]:
            if value is not None and value <= 0:
                raise ValueError(f"`{name}` must be positive, got {value}.")
    for name in FRACTIONS:
        if not 0 <= getattr(arguments, name) <= 1:
            raise ValueError(f"`{name}` must be in [0, 1], got {getattr(arguments, name)}.")
    if not 1 <= arguments.validation_inference_steps <= 1000:
        raise ValueError(
            f"`validation_inference_steps` must be in 1..1000, got {arguments.validation_inference_steps}."
        )
    presets = MODELS[arguments.model][2] if arguments.model in MODELS else {}
    choices: dict[str, Any] = CHOICES | {"model": MODELS, "preset": presets}
    for name, known in choices.items():
        value = getattr(arguments, name)
        if value is not None and value not in known:
            raise ValueError(f"`{name}` must be one of {', '.join(known)}, got {value!r}.")
    if len(arguments.target_extent) not in (0, 4):
        raise ValueError(
            f"`target_extent` must be 4 numbers, left, top, right and bottom, got {arguments.target_extent}."
        )
    if 0 in arguments.action_scale:
        raise ValueError(f"`action_scale` must not be 0, got {arguments.action_scale}.")


def check_model_arguments(arguments: TrainingArguments) -> None:
    """Check the arguments of the model and its objective against each other.

    Raises:
        ValueError: If an argument does not apply to the model or a package is missing.
    """
    if arguments.optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        raise ValueError(f"`optimizer` muon requires torch 2.9 or later, found {torch.__version__}.")
    if arguments.optimizer == "adamw8bit" and not is_bitsandbytes_available():
        raise ValueError("`optimizer` adamw8bit requires `pip install bitsandbytes`.")
    foreign = [name for name in FOREIGN[arguments.model] if getattr(arguments, name)]
    if arguments.model == "unet":
        foreign += ["conditioning"] if arguments.conditioning == "frame" else []
        foreign += ["optimizer"] if arguments.optimizer == "muon" else []
    if foreign:
        raise ValueError(
            f"`{foreign[0]}` does not apply to `model` {arguments.model}: leave out {', '.join(foreign)}."
        )
    if arguments.snr_gamma is not None and arguments.prediction_type == "flow_prediction":
        raise ValueError("`snr_gamma` must be left out for flow matching, which has no min-SNR weights.")
    if arguments.crop_size and arguments.state_keys:
        raise ValueError(
            "`crop_size` and `state_keys` exclude each other: the states are positions in the whole frame."
        )
    if arguments.scale_noisy_latents and arguments.prediction_type != "sample":
        raise ValueError(
            f"`scale_noisy_latents` must be used with `prediction_type` sample, got {arguments.prediction_type!r}."
        )
    if arguments.target_extent and arguments.action_space != "absolute":
        raise ValueError(f"`target_extent` must be used with `action_space` absolute, got {arguments.action_space!r}.")
    frames, history = (getattr(arguments, name) or NEW_MODEL[name] for name in WINDOW)
    if arguments.pretrained_model_name_or_path is None and frames <= history:
        raise ValueError(
            f"`sample_frames` must be larger than `num_history_frames`, got {frames} and {history}: a window has at least one "
            "predicted frame."
        )


def check_pretrained_arguments(arguments: TrainingArguments) -> None:
    """Check which arguments a pretrained model, LoRA and pixel space allow.

    Raises:
        ValueError: If an argument is missing or must be left out.
    """
    pretrained = arguments.pretrained_model_name_or_path
    if arguments.pixel_space and (arguments.vae or arguments.recorded_latents or pretrained):
        raise ValueError(
            "`pixel_space` is for a new model: leave out `vae`, `recorded_latents` and "
            "`pretrained_model_name_or_path`."
        )
    if not (arguments.pixel_space or arguments.vae) and not (
        pretrained and is_pipeline(pretrained, arguments.revision)
    ):
        raise ValueError("`vae` must be given, except with `pixel_space` or a pretrained pipeline.")
    if arguments.lora_rank and pretrained is None:
        raise ValueError("`lora_rank` requires `pretrained_model_name_or_path`: adapters belong to a trained model.")
    fixed = (
        *("patch_size", "action_frequencies", *WINDOW, "relative_latents"),
        *("prediction_type", "action_scale", "action_offset"),
    )
    given = [name for name in fixed if getattr(arguments, name) not in (None, [], False)]
    if arguments.lora_rank and given:
        raise ValueError(f"`lora_rank` leaves the model as it is: leave out {', '.join(given)}.")
    if pretrained is not None and arguments.preset:
        raise ValueError("`preset` is for a new model: leave it out with `pretrained_model_name_or_path`.")


def check_accelerator(accelerator: Accelerator, arguments: TrainingArguments) -> None:
    """Check what the distributed type supports, and keep raw actions in float32."""
    if arguments.optimizer == "muon" and accelerator.mixed_precision == "fp16":
        raise ValueError("`optimizer` muon does not support `mixed_precision` fp16: use bf16 or no.")
    if accelerator.gradient_accumulation_steps != arguments.gradient_accumulation_steps:
        raise ValueError(
            f"`gradient_accumulation_steps` is {arguments.gradient_accumulation_steps}, and accelerate was launched with "
            f"{accelerator.gradient_accumulation_steps}: pass it to `accelerate launch`, too, or remove it from its config."
        )
    kind = accelerator.distributed_type
    if kind not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return
    if arguments.optimizer == "muon":
        raise ValueError(f"`optimizer` muon does not support {kind.value}: use adamw.")
    if kind == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise ValueError("FSDP must be version 2: use examples/accelerate_configs/fsdp2.yaml.")
        from torch.distributed.fsdp import MixedPrecisionPolicy

        plugin.mixed_precision_policy = MixedPrecisionPolicy(cast_forward_inputs=False)  # autocast casts the inputs
    elif accelerator.state.deepspeed_plugin.zero_stage > 2:
        raise ValueError("DeepSpeed must be ZeRO-1 or 2: use examples/accelerate_configs/zero2.yaml, or FSDP.")
    else:  # DeepSpeed clips gradients itself
        accelerator.state.deepspeed_plugin.deepspeed_config["gradient_clipping"] = arguments.max_grad_norm


def run_settings(
    arguments: TrainingArguments, accelerator: Accelerator, folders: list[Path], config: dict
) -> dict[str, Any]:
    """Return the settings that must not change when a run is resumed."""
    flags = {name: value for name, value in vars(arguments).items() if name not in MAY_CHANGE}
    return flags | {
        "mixed_precision": accelerator.mixed_precision,
        "processes": accelerator.num_processes,
        "latents": [folder.name for folder in folders],
        "config": {key: value for key, value in config.items() if not key.startswith("_")},
    }


def check_finite(name: str, value: torch.Tensor, step: int, output: Path) -> None:
    """Raise FloatingPointError if a value of a step is NaN or infinite, before the weights change."""
    if not math.isfinite(value.item()):
        found = checkpoints(output)
        last = f"the last checkpoint is {str(found[-1])!r}" if found else "there is no checkpoint"
        raise FloatingPointError(
            f"the {name} is {value.item()} at step {step + 1}; {last}. Use a lower `learning_rate`, or check the data."
        )


def averaged_transformer(
    transformer: IRASimTransformer3DModel | UNetTrajectoryModel, ema: EMAModel, arguments: TrainingArguments
) -> IRASimTransformer3DModel | UNetTrajectoryModel:
    """Build a model with the averaged weights, gathered from shards; every process must call this function."""
    config = {key: value for key, value in transformer.config.items() if not key.startswith("_")}
    averaged = MODELS[arguments.model][0](**config)
    if arguments.lora_rank:
        add_lora(averaged, arguments)
    averaged.load_state_dict(averaged_state(ema, transformer))
    return averaged.eval()


def save(
    vae: AutoencoderKL | None,
    transformer: IRASimTransformer3DModel | UNetTrajectoryModel,
    arguments: TrainingArguments,
) -> None:
    """Write the pipeline or the adapters into the output folder."""
    if arguments.lora_rank:
        save_finished(Path(arguments.output_dir), functools.partial(save_lora, transformer))
    else:
        pipeline = finished_pipeline(vae, transformer, arguments)
        save_finished(Path(arguments.output_dir), pipeline.save_pretrained)


def main() -> None:
    (arguments,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    check_arguments(arguments)
    output = Path(arguments.output_dir)
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(),
        gradient_accumulation_steps=arguments.gradient_accumulation_steps,
        mixed_precision=arguments.mixed_precision or (launched if launched != "no" else "bf16"),
        log_with=arguments.report_to,
        project_config=ProjectConfiguration(project_dir=str(output), logging_dir=str(output / "logs")),
        dataloader_config=DataLoaderConfiguration(use_seedable_sampler=True),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))],  # one process may encode for a long time
    )
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    check_launch(accelerator)
    check_accelerator(accelerator, arguments)
    torch.backends.cuda.matmul.allow_tf32 = arguments.allow_tf32
    set_seed(arguments.seed)
    sources = [
        open_source(name, arguments, arguments.split, arguments.max_train_episodes, all_phases=True)
        for name in arguments.dataset
    ]
    check_mixture(sources)
    check_data(sources, arguments)
    vae = load_vae(arguments)
    if vae is not None:
        vae.to(accelerator.device)
    pretrained = load_pretrained(arguments, vae, sources[0])
    patch_size = pretrained.config.patch_size if pretrained else arguments.patch_size or NEW_MODEL["patch_size"]
    if arguments.crop_size is not None:
        position = pretrained.config.spatial_position if pretrained else arguments.spatial_position
        if position != "rope":
            raise ValueError(
                f"`crop_size` requires `spatial_position='rope'`, got {position!r}: other positions depend on the place in the "
                "frame."
            )
        if arguments.crop_size < 1 or arguments.crop_size % patch_size:
            raise ValueError(
                f"`crop_size` must be a multiple of the patch size {patch_size}, got {arguments.crop_size}."
            )
        model = pretrained.config if pretrained else vars(arguments)
        if model["action_space"] == "absolute" and not model["target_extent"]:
            raise ValueError(
                "`crop_size` with absolute actions requires `target_extent`, which shifts targets with the crop."
            )
    for source in [] if arguments.recorded_latents else sources:
        check_frames(source, vae, 1 if arguments.model == "unet" else patch_size)
    output.mkdir(parents=True, exist_ok=True)
    if accelerator.is_main_process:
        remove_leftovers(output)
        if arguments.push_to_hub:  # an error now rather than after the training
            create_repo(arguments.hub_model_id or output.name, exist_ok=True)
    accelerator.wait_for_everyone()
    folders = [
        cache_latents(
            source,
            vae,
            arguments.cache_dir or output / "latents",
            mixed_precision=accelerator.mixed_precision == "bf16",
            skip_broken=arguments.skip_broken,
            recorded=arguments.recorded_latents,
            process_index=accelerator.process_index,
            num_processes=accelerator.num_processes,
            wait_for_everyone=accelerator.wait_for_everyone,
        )
        for source in sources
    ]
    known = pretrained.config if pretrained else NEW_MODEL
    span = clip_length({name: getattr(arguments, name) or known[name] for name in WINDOW}, arguments.rollout_chunks)
    parts = [
        LatentClips(folder, span, skip_short=arguments.skip_broken, frame_skip=source.frame_skip)
        for folder, source in zip(folders, sources, strict=True)
    ]
    if arguments.state_keys:
        numbers = [part.episodes for part in parts]
        known = standardised_states(sources, arguments.state_keys, arguments.state_angles, numbers)
        for part, states in zip(parts, known, strict=True):
            part.states = states
    transformer = build_transformer(arguments, sources[0], parts, vae, pretrained)
    config = transformer.config
    if (arguments.crop_size or 0) > min(parts[0].latent_size):
        raise ValueError(
            f"`crop_size` must be at most the smaller side of the latents {parts[0].latent_size}, got {arguments.crop_size}."
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
        torch._dynamo.config.cache_size_limit = 64  # windows of several lengths, with and without gradients
        transformer.compile_repeated_blocks(dynamic=False)
    parameters = sum(parameter.numel() for parameter in transformer.parameters())
    used = sum(len({number for number, _ in part.windows}) for part in parts)
    logger.info(
        f"{parameters / 1e6:.2f} M parameters, {len(clips)} windows of {used} episodes, "
        f"{sum(map(len, sources)) - used} left out, {accelerator.num_processes} processes "
        f"({accelerator.distributed_type.value})"
    )

    trained = StateReadout(transformer, clips[0]["states"].shape[1]) if arguments.state_keys else transformer
    optimizers = build_optimizers(trained, arguments)
    # accelerate steps a prepared schedule once per process
    schedules = [
        get_scheduler(
            arguments.lr_scheduler,
            optimizer,
            num_warmup_steps=arguments.lr_warmup_steps * accelerator.num_processes,
            num_training_steps=arguments.max_train_steps * accelerator.num_processes,
            num_cycles=arguments.lr_num_cycles,
            power=arguments.lr_power,
        )
        for optimizer in optimizers
    ]
    model, loader, *prepared = accelerator.prepare(trained, loader, *optimizers, *schedules)
    optimizers, schedules = prepared[: len(optimizers)], prepared[len(optimizers) :]
    ema = EMAModel(  # after the model has been sharded
        (parameter for parameter in transformer.parameters() if parameter.requires_grad),
        decay=arguments.ema_decay,
        use_ema_warmup=arguments.ema_warmup,
        power=3 / 4,
        foreach=True,
    )
    ema.to(accelerator.device, torch.float32)  # also if DeepSpeed has cast the model
    noise_scheduler = noise_process(config)
    if arguments.report_to:
        settings = {
            name: value if isinstance(value, int | float) else str(value) for name, value in vars(arguments).items()
        }
        accelerator.init_trackers("irasim-diffusers", config=settings)

    shift, factor = (0.0, 1.0) if vae is None else latent_scaling(vae)
    settings = run_settings(arguments, accelerator, folders, config)
    step, seconds = 0, 0.0
    newest = newest_checkpoint(output, settings)
    if newest:
        seconds = seconds_trained(newest)
        accelerator.load_state(str(newest))
        load_average(ema, transformer, newest)
        step = int(newest.name.split("-")[1])
        logger.info(f"resumed from {newest}")
    accumulation = accelerator.gradient_accumulation_steps
    steps_per_epoch = -(-len(loader) // accumulation)
    epoch, done = divmod(step, steps_per_epoch)
    batch_number = epoch * len(loader) + done * accumulation
    bar = tqdm(total=arguments.max_train_steps, initial=step, disable=not accelerator.is_main_process, unit="step")
    start = time.perf_counter() - seconds
    limit = float("inf") if arguments.max_train_minutes is None else 60 * arguments.max_train_minutes
    total = torch.zeros((), device=accelerator.device)  # loss over the batches of a step
    interruption = Interruption()
    while step < arguments.max_train_steps and seconds < limit:
        loader.set_epoch(epoch)
        clips.set_epoch(epoch)
        batches = loader
        if done:
            batches = accelerator.skip_first_batches(loader, done * accumulation)
            batches.iteration = epoch  # accelerate before 1.15 does not set the epoch
        for batch in batches:
            place = batch_number * accelerator.num_processes + accelerator.process_index
            with accelerator.accumulate(model):
                with accelerator.autocast():
                    loss = training_loss(
                        model,
                        noise_scheduler,
                        batch | {"latents": (batch["latents"] - shift) * factor},
                        config,
                        arguments,
                        step=step,
                        position=place * arguments.train_batch_size,
                    )
                check_finite("loss", loss, step, output)
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(model.parameters(), arguments.max_grad_norm)
                    if norm is not None and accelerator.scaler is None:  # a scaler skips such steps
                        check_finite("gradient norm", norm, step, output)
                for optimizer, schedule in zip(optimizers, schedules, strict=True):
                    optimizer.step()
                    schedule.step()
                    optimizer.zero_grad()
            batch_number += 1
            total += loss.detach() / accumulation
            if not accelerator.sync_gradients:
                continue
            ema.step(parameter for parameter in transformer.parameters() if parameter.requires_grad)
            step += 1
            bar.update()
            if step % arguments.logging_steps == 0:
                figures = {
                    "loss": accelerator.reduce(total, "mean").item(),
                    "learning_rate": schedules[0].get_last_lr()[0],
                }
                bar.set_postfix(loss=f"{figures['loss']:.4f}", lr=f"{figures['learning_rate']:.2e}")
                accelerator.log(figures, step=step)
            total.zero_()
            seconds = time.perf_counter() - start
            if limit < float("inf"):  # all processes must stop at the same step
                seconds = accelerator.reduce(torch.tensor(seconds, device=accelerator.device), "mean").item()
            stopped_by = interruption.requested(accelerator)
            if step % arguments.checkpointing_steps == 0 or seconds >= limit or stopped_by:
                save_checkpoint(
                    accelerator,
                    output,
                    step,
                    arguments.checkpoints_total_limit,
                    settings | {"seconds": seconds},
                    add=functools.partial(save_average, accelerator, ema, transformer),
                )
            if stopped_by:
                logger.info(
                    f"stopped by {signal.Signals(stopped_by).name} at step {step}; run the same command to resume"
                )
                accelerator.end_training()
                raise SystemExit(128 + stopped_by)
            if arguments.validation_dataset and step % arguments.validation_steps == 0:
                averaged = averaged_transformer(transformer, ema, arguments)
                if held_out is not None:
                    pipeline = make_pipeline(vae, averaged.to(accelerator.device), DDIMScheduler)
                    pipeline.set_progress_bar_config(disable=True)
                    with accelerator.autocast():
                        figures, video = validate(pipeline, held_out, arguments.validation_inference_steps)
                    accelerator.log(figures, step=step)
                    log_video(accelerator, video, output / f"validation/step-{step}.mp4", config.fps or 10, step)
                    text = ", ".join(f"{name} {value:.2f}" for name, value in figures.items())
                    bar.write(f"step {step}, {time.perf_counter() - start:.0f} s: {text}")
                del averaged
            if step == arguments.max_train_steps or seconds >= limit:
                break
        epoch, done = epoch + 1, 0
    averaged = averaged_transformer(transformer, ema, arguments)
    if accelerator.is_main_process:
        save(vae, averaged, arguments)
        logger.info(f"saved to {output} after {step} steps in {seconds / 60:.1f} min")
        if arguments.push_to_hub:
            publish(vae, averaged, arguments)
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main)
