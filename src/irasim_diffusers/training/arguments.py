"""Arguments that the training scripts share, and their checks."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from diffusers.models.attention_dispatch import AttentionBackendName, _check_attention_backend_requirements
from diffusers.optimization import SchedulerType
from diffusers.utils import is_bitsandbytes_available

from ..data_arguments import MAX_SIDE, DataArguments, EpisodeArguments
from .scripts import check_ranges


@dataclass(kw_only=True)
class RunArguments(EpisodeArguments):
    """Arguments that `train.py`, `train_lora.py` and `pusht/convolutional.py` share; see the help texts.

    `convolutional.py` rejects those that do not apply to it.
    """

    # data
    dataset: list[str] = field(
        metadata={"help": "LeRobotDataset, IRASim-format or `datasets` folder, or Hub id; several datasets are mixed"}
    )
    output_dir: str = field(metadata={"help": "folder for checkpoints and the finished pipeline or adapters"})
    vae: str | None = field(
        default=None,
        metadata={
            "help": "frozen autoencoder: folder or Hub id, optionally with ':<subfolder>' (default: that of the pretrained "
            "pipeline; required without one, except in pixel space, where it must be omitted)"
        },
    )
    dataset_revision: str | None = field(
        default=None, metadata={"help": "branch, tag or commit of the training datasets on the Hub"}
    )
    dataset_weights: list[float] = field(
        default_factory=list, metadata={"help": "sampling weight of each dataset (default: its number of windows)"}
    )
    change_share: float = field(
        default=0.0,
        metadata={
            "help": "fraction of clips drawn with a probability proportional to how much their frames change; the others are "
            "drawn uniformly"
        },
    )
    max_train_episodes: int | None = field(
        default=None, metadata={"help": "maximum number of training episodes per dataset; the first ones are used"}
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "download datasets from the Hub file by file, encode them, and keep only the latents"},
    )
    recorded_latents: bool = field(
        default=False,
        metadata={"help": "use the latents that are stored with IRASim-format data of one camera; not in pixel space"},
    )
    target_fps: float | None = field(
        default=None,
        metadata={
            "help": "frame rate after skipping frames, which must divide that of the data; replaces --frame_skip"
        },
    )
    cache_dir: str | None = field(
        default=None, metadata={"help": "folder of the latent cache (default: output_dir/latents)"}
    )
    # pretrained model
    pretrained_model_name_or_path: str | None = field(
        default=None,
        metadata={
            "aliases": ["--pretrained"],
            "help": "pretrained pipeline or transformer: folder or Hub id (required by train_lora.py; not for a U-Net or "
            "convolutional.py); see also `irasim adapt`",
        },
    )
    revision: str | None = field(default=None, metadata={"help": "branch, tag or commit of the pretrained model"})
    variant: str | None = field(
        default=None, metadata={"help": "variant of the pretrained transformer's files, such as fp16"}
    )
    # objective
    crop_size: int | None = field(
        default=None,
        metadata={
            "help": "train on square crops of this side length (latent pixels, a multiple of the patch size) around patches that "
            "change; a transformer must have spatial_position rope and, for absolute actions, target_extent; not for a U-Net or "
            "--state_keys"
        },
    )
    rollout_chunks: int = field(
        default=0,
        metadata={
            "help": "also train on predicted histories: up to this many chunks are predicted without gradient, and their last "
            "frames are the history of the chunk with the loss; clips become longer by these chunks"
        },
    )
    rollout_start_step: int = field(default=0, metadata={"help": "step at which --rollout_chunks takes effect"})
    rollout_inference_steps: int = field(
        default=1, metadata={"help": "number of denoising steps of the chunks of --rollout_chunks"}
    )
    history_noise: float = field(
        default=0.0,
        metadata={
            "help": "maximum standard deviation of the noise that is added to the history latents to reduce drift in rollouts"
        },
    )
    motion_noise: float = field(
        default=0.0,
        metadata={
            "help": "standard deviation of the noise that is added to the motions of moving layers in the chunks of "
            "--rollout_chunks, in patches and units of 0.5 radians, for example 0.06, so that histories contain such errors"
        },
    )
    short_chunk_share: float = field(
        default=0.0,
        metadata={
            "help": "fraction of steps that predict a shorter chunk, whose length is drawn uniformly, for models that also predict "
            "single frames, as in an environment; with --conditioning frame"
        },
    )
    snr_gamma: float | None = field(
        default=None,
        metadata={
            "help": "gamma of min-SNR loss weights, for example 5; not for flow_prediction (default: equal weights)"
        },
    )
    huber_c: float | None = field(
        default=None, metadata={"help": "scale of the pseudo-Huber loss (default: the loss is the squared error)"}
    )
    terminal_share: float = field(
        default=0.0,
        metadata={
            "help": "fraction of windows at the last timestep, where sampling starts; the other timesteps are drawn uniformly; "
            "not for convolutional.py"
        },
    )
    action_dropout: float = field(
        default=0.1, metadata={"help": "fraction of windows that are trained with the null action"}
    )
    state_keys: list[str] = field(
        default_factory=list,
        metadata={
            "help": "state features to predict from intermediate features as an auxiliary loss; not for convolutional.py"
        },
    )
    state_angles: list[str] = field(
        default_factory=list, metadata={"help": "components of --state_keys that are angles in radians"}
    )
    state_loss_weight: float = field(default=1.0, metadata={"help": "weight of the auxiliary loss of --state_keys"})
    # optimization
    train_batch_size: int = field(default=16, metadata={"help": "windows per process and batch"})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "batches per process and step"})
    max_train_steps: int = field(default=300_000, metadata={"help": "total number of steps"})
    max_train_minutes: float | None = field(
        default=None,
        metadata={
            "help": "stop after this training time, including validation, checkpoints and, when resumed, earlier runs; requires "
            "--lr_scheduler constant or constant_with_warmup"
        },
    )
    learning_rate: float = field(default=1e-4, metadata={"help": "learning rate after the warmup"})
    lr_scheduler: str = field(
        default="constant_with_warmup",
        metadata={"help": "learning rate schedule of diffusers' get_scheduler, except piecewise_constant"},
    )
    lr_warmup_steps: int = field(
        default=0, metadata={"help": "steps of linear warmup; without effect on the schedule constant"}
    )
    lr_num_cycles: int = field(default=1, metadata={"help": "number of cycles of the cosine_with_restarts schedule"})
    lr_power: float = field(default=1.0, metadata={"help": "power of the polynomial schedule"})
    optimizer: str = field(
        default="adamw",
        metadata={
            "help": "adamw, adamw8bit (bitsandbytes), or muon for the matrices of transformer blocks and adamw for the rest; muon "
            "does not support models without such blocks, fp16, FSDP or DeepSpeed"
        },
    )
    adam_beta1: float = field(default=0.9, metadata={"help": "beta1 of AdamW"})
    adam_beta2: float = field(default=0.999, metadata={"help": "beta2 of AdamW"})
    adam_weight_decay: float = field(default=0.0, metadata={"help": "weight decay of AdamW and Muon"})
    adam_epsilon: float = field(default=1e-8, metadata={"help": "epsilon of AdamW"})
    max_grad_norm: float = field(default=0.1, metadata={"help": "maximum norm of the gradient"})
    ema_decay: float = field(default=0.9999, metadata={"help": "decay of the averaged weights (EMA)"})
    ema_warmup: bool = field(
        default=True,
        metadata={
            "help": "increase the EMA decay to --ema_decay as 1 - (1 + step)^-0.75; --no_ema_warmup uses (1 + step) / (10 + step)"
        },
    )
    mixed_precision: str | None = field(
        default=None,
        metadata={
            "help": "no, fp16 or bf16 (default: the fp16 or bf16 of `accelerate launch`, else bf16 if the device supports it in "
            "hardware, else no)"
        },
    )
    allow_tf32: bool = field(default=False, metadata={"help": "allow TF32 matrix products"})
    gradient_checkpointing: bool = field(
        default=False,
        metadata={"help": "recompute activations in the backward pass, to save memory; not for convolutional.py"},
    )
    compile: bool = field(default=False, metadata={"help": "compile the blocks of the model with torch.compile"})
    attention_backend: str | None = field(
        default=None,
        metadata={
            "help": "attention backend of diffusers; _native_math trains twice as fast on a CPU; not for convolutional.py"
        },
    )
    dataloader_num_workers: int = field(default=0, metadata={"help": "worker processes that load batches"})
    # bookkeeping
    logging_steps: int = field(default=20, metadata={"help": "steps between logged values"})
    checkpointing_steps: int = field(default=500, metadata={"help": "steps between checkpoints"})
    checkpoints_total_limit: int = field(default=2, metadata={"help": "maximum number of checkpoints that are kept"})
    validation_steps: int = field(default=2000, metadata={"help": "steps between validations"})
    num_validation_clips: int = field(
        default=16, metadata={"help": "maximum number of validation clips, one per episode"}
    )
    validation_inference_steps: int = field(default=16, metadata={"help": "number of denoising steps in validation"})
    report_to: str | None = field(
        default=None, metadata={"help": "tracker of accelerate, for example tensorboard or wandb"}
    )
    push_to_hub: bool = field(
        default=False, metadata={"help": "push the trained model to the Hub, with a card; not for convolutional.py"}
    )
    hub_model_id: str | None = field(
        default=None, metadata={"help": "Hub repository of --push_to_hub (default: the name of output_dir)"}
    )
    seed: int = field(default=0, metadata={"help": "random seed"})


MAY_CHANGE = {
    *("output_dir", "cache_dir", "max_train_steps", "max_train_minutes", "dataloader_num_workers", "report_to"),
    *("logging_steps", "checkpointing_steps", "checkpoints_total_limit", "push_to_hub", "hub_model_id"),
    *("validation_dataset", "validation_split", "validation_steps", "num_validation_clips"),
    *("validation_inference_steps", "compile", "attention_backend", "gradient_checkpointing", "allow_tf32"),
    # these determine the names of the latent caches, which must not change
    *("dataset", "dataset_revision", "streaming", "vae", "max_train_episodes"),
}
"""Arguments that may change when a run is resumed."""

NOT_NEGATIVE = (
    *("rollout_chunks", "rollout_start_step", "lr_warmup_steps", "history_noise", "adam_weight_decay"),
    *("motion_noise", "state_loss_weight", "dataloader_num_workers", "seed"),
)
AT_LEAST_1 = (
    *("train_batch_size", "gradient_accumulation_steps", "max_train_steps", "frame_skip"),
    *("max_train_episodes", "logging_steps", "checkpointing_steps", "checkpoints_total_limit", "validation_steps"),
    *("num_validation_clips", "lr_num_cycles", "height", "width", "pad_actions_to", "crop_size"),
)
POSITIVE = (
    *("learning_rate", "max_grad_norm", "max_train_minutes", "fps", "target_fps", "adam_epsilon", "snr_gamma"),
    *("dataset_weights", "lr_power", "huber_c"),
)
CHOICES = {
    "optimizer": ("adamw", "adamw8bit", "muon"),
    "mixed_precision": ("no", "fp16", "bf16"),
    "lr_scheduler": tuple(each.value for each in SchedulerType if each != SchedulerType.PIECEWISE_CONSTANT),
    "attention_backend": tuple(each.value for each in AttentionBackendName),
    "report_to": ("all", *LOGGER_TYPE_TO_CLASS),
}


def check_run_arguments(arguments: RunArguments) -> None:
    """Check the shared arguments before anything is read.

    Raises:
        ValueError: If a value is invalid or conflicts with another argument, or an optional package is not installed.
    """
    fractions = ("change_share", "short_chunk_share", "terminal_share", "action_dropout", "ema_decay")
    check_ranges(arguments, NOT_NEGATIVE, AT_LEAST_1, POSITIVE, fractions, CHOICES)
    for name in ("validation_inference_steps", "rollout_inference_steps"):
        if not 1 <= getattr(arguments, name) <= 1000:
            raise ValueError(f"`{name}` must be in [1, 1000], got {getattr(arguments, name)}.")
    if arguments.attention_backend is not None:
        _check_attention_backend(arguments.attention_backend)
    for name in ("adam_beta1", "adam_beta2"):
        if not 0 <= getattr(arguments, name) < 1:
            raise ValueError(f"`{name}` must be in [0, 1), got {getattr(arguments, name)}.")
    if arguments.optimizer == "adamw8bit" and not is_bitsandbytes_available():
        raise ValueError("`optimizer` adamw8bit requires bitsandbytes: run `pip install bitsandbytes`.")
    if arguments.report_to not in (None, "all", *map(str, get_available_trackers())):
        raise ValueError(
            f"`report_to` {arguments.report_to} is not installed: run `pip install {arguments.report_to}`, or omit the argument."
        )
    if arguments.crop_size and arguments.state_keys:
        raise ValueError("`crop_size` and `state_keys` are mutually exclusive: the states refer to the whole frame.")
    if arguments.max_train_minutes is not None and not arguments.lr_scheduler.startswith("constant"):
        raise ValueError(
            f"`lr_scheduler` must be constant or constant_with_warmup with `max_train_minutes`, got "
            f"{arguments.lr_scheduler!r}: the other schedules require a known number of steps."
        )
    rollouts = arguments.rollout_start_step, arguments.rollout_inference_steps - 1, arguments.motion_noise
    if arguments.rollout_chunks == 0 and any(rollouts):
        raise ValueError(
            "`rollout_start_step`, `rollout_inference_steps` and `motion_noise` require `rollout_chunks` > 0, got 0."
        )
    _check_data_arguments(arguments)


def _check_attention_backend(name: str) -> None:
    try:
        _check_attention_backend_requirements(AttentionBackendName(name))
    except RuntimeError as error:
        raise ValueError(f"`attention_backend` {name!r} cannot be used: {error}") from error


def _check_data_arguments(arguments: RunArguments) -> None:
    if len(arguments.dataset_weights) not in (0, len(arguments.dataset)):
        raise ValueError(
            f"`dataset_weights` must contain one number per dataset ({len(arguments.dataset)}), got {arguments.dataset_weights}."
        )
    known = [os.path.realpath(name) for name in arguments.dataset]
    shared = arguments.validation_dataset is not None and os.path.realpath(arguments.validation_dataset) in known
    if shared and arguments.validation_split == arguments.split:
        raise ValueError(
            f"`validation_split` must differ from `split` for a dataset that is also in `dataset`, got {arguments.split!r} for "
            f"both in {arguments.validation_dataset!r}: use two splits, or parts such as 'train[:90%]' and 'train[90%:]' if the "
            "format supports them."
        )
    check_frame_size(arguments)
    if arguments.frame_skip > 1 and arguments.target_fps is not None:
        raise ValueError("`frame_skip` and `target_fps` are mutually exclusive: pass one of them.")


def check_frame_size(arguments: DataArguments) -> None:
    """Check that `height` and `width` are given together, and limit the memory of a frame.

    Raises:
        ValueError: If only one of them is given, or one is too large.
    """
    if (arguments.height is None) != (arguments.width is None):
        found = "width" if arguments.height is None else "height"
        raise ValueError(f"`height` and `width` must be given together, got only `{found}`: pass both or neither.")
    for name in ("height", "width"):
        if (getattr(arguments, name) or 0) > MAX_SIDE:
            raise ValueError(f"`{name}` must be at most {MAX_SIDE}, got {getattr(arguments, name)}.")


def check_snr_gamma(snr_gamma: float | None, prediction_type: str | None) -> None:
    """Check that `snr_gamma` is not given for flow matching.

    Raises:
        ValueError: If it is.
    """
    if snr_gamma is not None and prediction_type == "flow_prediction":
        raise ValueError(
            f"`snr_gamma` must be omitted for flow matching, which has no min-SNR weights, got {snr_gamma:g}."
        )


def check_chunks(arguments: RunArguments, config: Mapping[str, Any]) -> None:
    """Check the options of rollouts and chunks against the config of a model.

    Args:
        arguments: Arguments of the run.
        config: Config of the model, or the entries of a new one.

    Raises:
        ValueError: If the model does not support one of them.
    """
    if arguments.rollout_inference_steps > config.get("num_train_timesteps", 1000):
        raise ValueError(
            f"`rollout_inference_steps` must be at most {config['num_train_timesteps']}, the timesteps of the model, got "
            f"{arguments.rollout_inference_steps}."
        )
    if arguments.motion_noise and not config.get("moving_layers"):
        raise ValueError(
            f"`motion_noise` must be 0 for a model without moving layers, got {arguments.motion_noise:g}: train a transformer "
            "with `moving_layers`, or add layers with `irasim adapt --moving-layers`."
        )
    if arguments.short_chunk_share and config.get("conditioning") != "frame":
        raise ValueError(
            f"`short_chunk_share` must be 0 for Video-Ada and U-Nets, which predict a fixed number of frames, got "
            f"{arguments.short_chunk_share:g}."
        )


def check_crop(crop_size: int | None, config: Mapping[str, Any]) -> None:
    """Check `crop_size` against the config of a model.

    Args:
        crop_size: Side of the crops in latent pixels; None for whole frames.
        config: Config of the model, or the entries of a new one.

    Raises:
        ValueError: If the model cannot be trained on crops, or its patch size does not divide `crop_size`.
    """
    if crop_size is None:
        return
    if config.get("spatial_position", "rope") != "rope":  # convolutions have no positions
        raise ValueError(
            f"`crop_size` requires `spatial_position='rope'`, got {config['spatial_position']!r}: other position "
            "embeddings depend on the absolute location."
        )
    if crop_size % config["patch_size"]:
        raise ValueError(f"`crop_size` must be a multiple of the patch size {config['patch_size']}, got {crop_size}.")
    if config["action_space"] == "absolute" and not config["target_extent"]:
        raise ValueError(
            "`crop_size` with absolute actions requires `target_extent`, from which the shift of the targets is computed."
        )
