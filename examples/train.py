"""Train an IRASim world model on robot clips.

    accelerate launch examples/train.py --dataset data/pusht-train --vae runs/pusht-vae --output_dir runs/pusht

The autoencoder is frozen, and every frame is encoded once. The objective and the defaults are those of the paper
(Table 10): AdamW, constant learning rate 1e-4, no weight decay, gradient clipping at 0.1, EMA 0.9999, action dropout
0.1, loss on predicted frames only. Checkpoints are written to `<output_dir>/checkpoint-<step>`. The same command
resumes from the newest complete checkpoint, also after Ctrl-C or SIGTERM. At the end, `<output_dir>` is a complete
pipeline.

`--pretrained_model_name_or_path` continues from a trained model. `irasim adapt` changes, for example, its patch size,
autoencoder or number of action components, and `train_lora.py` trains LoRA adapters instead of all weights.
"""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from transformers import HfArgumentParser

from irasim_diffusers import PRESETS, UNET_PRESETS, IRASimTransformer3DModel, UNetTrajectoryModel
from irasim_diffusers.conversion import can_adapt
from irasim_diffusers.data import PreparedEpisodes, action_normalisation, infer_action_space
from irasim_diffusers.models import Denoiser
from irasim_diffusers.training import (
    RunArguments,
    TrainingData,
    check_ranges,
    check_run_arguments,
    check_snr_gamma,
    encode_data,
    finished_pipeline,
    is_pipeline,
    load_sampler,
    load_transformer,
    load_vae,
    open_sources,
    run_script,
    save_finished,
    start_accelerator,
    train,
    update_config,
)

logger = get_logger(__name__, log_level="INFO")
WINDOW = ("sample_frames", "num_history_frames")


@dataclass(kw_only=True)
class TrainingArguments(RunArguments):
    model: str = field(
        default="transformer", metadata={"help": "transformer, or unet for the baselines VDM and LVDM of the paper"}
    )
    preset: str | None = field(
        default=None,
        metadata={"help": f"size of a new model in the paper: {', '.join(PRESETS)}; U-Net: {', '.join(UNET_PRESETS)}"},
    )
    pixel_space: bool = field(default=False, metadata={"help": "train on pixels, without an autoencoder"})
    num_layers: int | None = field(
        default=None,
        metadata={
            "help": "transformer: number of pairs of spatial and temporal blocks (default: 4, or that of --preset or the "
            "pretrained model)"
        },
    )
    num_attention_heads: int | None = field(
        default=None,
        metadata={
            "help": "number of attention heads (default: 3, U-Net 4, or that of --preset or the pretrained model)"
        },
    )
    attention_head_dim: int | None = field(
        default=None,
        metadata={
            "help": "channels per attention head (default: 64, U-Net 32, or that of --preset or the pretrained model)"
        },
    )
    block_out_channels: list[int] = field(
        default_factory=list,
        metadata={"help": "channels at each resolution of the U-Net (default: 48 96 168, or those of --preset)"},
    )
    condition_dim: int | None = field(
        default=None,
        metadata={"help": "size of the U-Net's trajectory embedding (default without --preset: 192)"},
    )
    patch_size: int | None = field(
        default=None,
        metadata={
            "help": "transformer: side of a patch in latent pixels (default: 2, or that of the pretrained model)"
        },
    )
    sample_frames: int | None = field(
        default=None,
        metadata={
            "help": "frames per window, history and predicted frames (default: 16, or that of the pretrained model)"
        },
    )
    num_history_frames: int | None = field(
        default=None,
        metadata={
            "help": "maximum number of history frames (default: 1, or that of the pretrained model); Frame-Ada uses a random "
            "number in 30 %% of the steps; other steps, Video-Ada and the U-Net use the maximum"
        },
    )
    conditioning: str | None = field(
        default=None,
        metadata={"help": "frame (Frame-Ada) or video (Video-Ada); default: frame, or that of the pretrained model"},
    )
    action_normalisation: str = field(
        default="std",
        metadata={
            "help": "offset and scale from the data: std (mean and standard deviation), or quantile (1 %% and 99 %%); without "
            "effect on a trained action encoder"
        },
    )
    action_scale: list[float] = field(
        default_factory=list,
        metadata={
            "help": "factor of the actions after --action_offset is subtracted: one number, or one per component (default: "
            "that of the pretrained model, or from the data)"
        },
    )
    action_offset: list[float] = field(
        default_factory=list,
        metadata={
            "help": "offset that is subtracted from the actions: one number, or one per component (default: that of the pretrained "
            "model, or from the data)"
        },
    )
    action_space: str | None = field(
        default=None,
        metadata={
            "help": "relative, or absolute for target positions (default: that of --action_derivation or the pretrained model; for "
            "recorded actions and a new model, inferred from actions and states, or relative if that fails)"
        },
    )
    action_frequencies: int | None = field(
        default=None,
        metadata={
            "help": "number of frequencies of the sine and cosine features of the actions (default: 0, or that of the "
            "pretrained model)"
        },
    )
    spatial_position: str | None = field(
        default=None,
        metadata={
            "help": "transformer: grid, or rope for rotary positions in the spatial blocks (default: grid, or that of the "
            "pretrained model)"
        },
    )
    ff_conv: bool = field(
        default=False,
        metadata={"help": "transformer: depthwise 3x3 convolution in the feed-forward of the spatial blocks"},
    )
    target_extent: list[float] = field(
        default_factory=list,
        metadata={
            "help": "transformer: edges of the frame (left, top, right, bottom) in units of the first two action components, "
            "which must be a target position; every patch receives its offset from the target; requires --action_space absolute"
        },
    )
    moving_layers: int | None = field(
        default=None,
        metadata={
            "help": "transformer: number of layers that move rigidly, at most one per object; requires --relative_latents and "
            "--prediction_type sample (default: 0, or that of the pretrained model)"
        },
    )
    relative_latents: bool = field(
        default=False,
        metadata={"help": "predict latents relative to the last history frame"},
    )
    scale_noisy_latents: bool = field(
        default=False,
        metadata={
            "help": "transformer: multiply noisy latents by sqrt(alpha_bar) at the input, for one-step sampling; requires "
            "--prediction_type sample"
        },
    )
    prediction_type: str | None = field(
        default=None,
        metadata={
            "help": "epsilon, v_prediction, sample or flow_prediction (default: epsilon, or that of the pretrained model)"
        },
    )


NEW_MODEL: dict[str, Any] = {
    "num_layers": 4,
    "num_attention_heads": 3,
    "attention_head_dim": 64,
    "sample_frames": 16,
    "num_history_frames": 1,
    "conditioning": "frame",
    "action_space": "relative",
    "moving_layers": 0,
    "relative_latents": False,
    "scale_noisy_latents": False,
    "prediction_type": "epsilon",
    "patch_size": 2,
    "action_frequencies": 0,
    "spatial_position": "grid",
    "ff_conv": False,
    "activation_fn": "gelu",  # faster on a CPU than the approximation in the paper
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
"""Default config of a new U-Net, about the size of the default transformer."""
MODELS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "transformer": (IRASimTransformer3DModel, NEW_MODEL, PRESETS),
    "unet": (UNetTrajectoryModel, NEW_UNET, UNET_PRESETS),
}
"""Class, default config and presets by `model`."""
INAPPLICABLE = {
    "transformer": ("block_out_channels", "condition_dim"),
    "unet": (
        "pretrained_model_name_or_path",
        "num_layers",
        "patch_size",
        "spatial_position",
        "ff_conv",
        "target_extent",
        "moving_layers",
        "scale_noisy_latents",
        "crop_size",
    ),
}
"""Options that do not apply, by `model`."""


def check_arguments(arguments: TrainingArguments) -> None:
    """Check the arguments before anything is read.

    Raises:
        ValueError: If a value is missing, invalid or in conflict with other arguments, the pretrained model cannot be accessed, or
            an optional package is not installed.
    """
    check_run_arguments(arguments)
    presets = MODELS[arguments.model][2] if arguments.model in MODELS else {}
    check_ranges(
        arguments,
        not_negative=("action_frequencies", "moving_layers"),
        at_least_1=(*WINDOW, "num_layers", "num_attention_heads", "attention_head_dim", "patch_size", "condition_dim"),
        positive=("block_out_channels",),
        choices={
            "model": tuple(MODELS),
            "preset": tuple(presets),
            "conditioning": ("frame", "video"),
            "action_normalisation": ("std", "quantile"),
            "action_space": ("relative", "absolute"),
            "spatial_position": ("grid", "rope"),
            "prediction_type": ("epsilon", "v_prediction", "sample", "flow_prediction"),
        },
    )
    check_model_arguments(arguments)
    check_pretrained_arguments(arguments)
    if arguments.pretrained_model_name_or_path is None:
        with torch.device("meta"):  # the model checks its config
            MODELS[arguments.model][0](**new_settings(arguments))


def check_model_arguments(arguments: TrainingArguments) -> None:
    """Check the arguments of the model and its objective against each other.

    Raises:
        ValueError: If an argument is invalid or does not apply to the model.
    """
    inapplicable = [name for name in INAPPLICABLE[arguments.model] if getattr(arguments, name)]
    if arguments.model == "unet":
        inapplicable += ["conditioning"] if arguments.conditioning == "frame" else []
        inapplicable += ["optimizer"] if arguments.optimizer == "muon" else []
    if inapplicable:
        raise ValueError(
            f"`{inapplicable[0]}` does not apply to `model` {arguments.model}: omit {', '.join(inapplicable)}."
        )
    check_snr_gamma(arguments.snr_gamma, arguments.prediction_type)
    if arguments.scale_noisy_latents and arguments.prediction_type != "sample":
        raise ValueError(
            f"`scale_noisy_latents` must be used with `prediction_type` sample, got {arguments.prediction_type or 'none'}."
        )
    if len(arguments.target_extent) not in (0, 4):
        raise ValueError(
            f"`target_extent` must be 4 numbers, left, top, right and bottom, got {arguments.target_extent}."
        )
    if arguments.target_extent and arguments.action_space != "absolute":
        raise ValueError(
            f"`target_extent` must be used with `action_space` absolute, got {arguments.action_space or 'none'}."
        )
    if 0 in arguments.action_scale:
        raise ValueError(f"`action_scale` must not be 0, got {arguments.action_scale}.")


def check_pretrained_arguments(arguments: TrainingArguments) -> None:
    """Check the arguments that depend on whether the model is pretrained or new.

    Raises:
        ValueError: If an argument is missing or must be omitted, or the pretrained model cannot be accessed.
    """
    pretrained = arguments.pretrained_model_name_or_path
    if arguments.pixel_space and (arguments.vae or arguments.recorded_latents or pretrained):
        raise ValueError(
            "`pixel_space` is for a new model without latents: omit `vae`, `recorded_latents` and "
            "`pretrained_model_name_or_path`."
        )
    if not (arguments.pixel_space or arguments.vae) and not (
        pretrained and is_pipeline(pretrained, arguments.revision)
    ):
        raise ValueError("`vae` is required, except with `pixel_space` or a pretrained pipeline.")
    if pretrained is not None and arguments.preset:
        raise ValueError("`preset` is for a new model: omit it with `pretrained_model_name_or_path`.")
    if pretrained is None and (arguments.revision or arguments.variant):
        raise ValueError("`revision` and `variant` require `pretrained_model_name_or_path`.")


def new_settings(arguments: TrainingArguments) -> dict[str, Any]:
    """Return the config entries of a new model that do not depend on the data."""
    _, defaults, presets = MODELS[arguments.model]
    settings = defaults | (presets[arguments.preset] if arguments.preset else {})
    given = {name: getattr(arguments, name, None) for name in settings}
    return settings | {name: value for name, value in given.items() if value not in (None, [])}


def load_pretrained(arguments: TrainingArguments) -> IRASimTransformer3DModel:
    """Load the pretrained model, and update the config entries that may differ.

    Raises:
        ValueError: If the model cannot be loaded, or an argument differs from a config entry that cannot be changed.
    """
    name, model = arguments.pretrained_model_name_or_path, load_transformer(arguments)
    may_change = {"action_space", "relative_latents", *(WINDOW if model.config.conditioning == "frame" else ())}
    may_change |= {"target_extent"} if model.config.target_extent else set()
    for flag in sorted(NEW_MODEL.keys() - may_change):
        value, stored = getattr(arguments, flag, None), model.config[flag]
        omitted = value is None or value is False or value == []
        if not omitted and value != stored:
            remedy = ", or change it with `irasim adapt`" if can_adapt(model.config, flag, value) else ""
            raise ValueError(
                f"`{flag}` is {stored!r} in {name!r} and cannot be changed to {value!r}: omit it{remedy}."
            )
    changed = ((flag, getattr(arguments, flag)) for flag in (*WINDOW, "relative_latents", "target_extent"))
    return update_config(model, {flag: value for flag, value in changed if value})


def build_transformer(
    arguments: TrainingArguments,
    data: TrainingData,
    action_space: str | None,
    pretrained: IRASimTransformer3DModel | None,
) -> Denoiser:
    """Create the model, or update the config of the pretrained one from the data and its action space.

    Raises:
        ValueError: If the actions of the data do not match the arguments or the pretrained model.
    """
    known, measured = data_settings(arguments, data, action_space)
    given = {
        name: values[0] if len(values) == 1 else values
        for name, values in (("action_scale", arguments.action_scale), ("action_offset", arguments.action_offset))
        if values
    }
    action_dim = len(measured["action_offset"])
    if pretrained is None:
        channels = 3 if data.vae is None else data.vae.config.latent_channels
        settings = new_settings(arguments) | known | measured | given  # presets also contain channels
        return MODELS[arguments.model][0](**settings | {"in_channels": channels, "action_dim": action_dim})
    config = pretrained.config
    if config.action_dim != action_dim:
        padding = "pad them with `pad_actions_to`, or " if action_dim < config.action_dim else ""
        raise ValueError(
            f"the data must have {config.action_dim} action components, as many as {arguments.pretrained_model_name_or_path!r}, "
            f"got {action_dim}: {padding}change the model with `irasim adapt --action-dim {action_dim}`."
        )
    if not is_trained_on_actions(pretrained):
        known |= measured
    else:
        check_action_space(arguments, config, action_space, known["action_derivation"])
        if known["action_derivation"] == "recorded":  # keep the derivation of the model
            known.pop("action_derivation")
    for entry in ("fps", "action_units"):  # keep the value of the model if the data have none
        if known[entry] is None:
            known.pop(entry)
    return update_config(pretrained, known | given)


def data_settings(
    arguments: TrainingArguments, data: TrainingData, action_space: str | None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return config entries from the data, for every model and for an untrained action encoder."""
    source, actions = data.sources[0], torch.cat([part.actions for part in data.parts])
    height, width = data.parts[0].latent_size
    offset, scale = action_normalisation(actions, arguments.action_normalisation)
    known = {
        "sample_height": height,
        "sample_width": width,
        "fps": source.fps,
        "cameras": [list(row) for row in source.cameras],
        "action_names": source.component_names("action"),
        "action_derivation": source.action_derivation,
        "action_units": source.action_units,
    }
    measured = {
        "action_scale": scale,
        "action_offset": offset,
        "action_space": action_space or "relative",
        "action_low": actions.amin(0).tolist(),
        "action_high": actions.amax(0).tolist(),
    }
    return known, measured


def find_action_space(
    arguments: TrainingArguments, source: PreparedEpisodes, pretrained: IRASimTransformer3DModel | None
) -> str | None:
    """Return the action space of the arguments or the data.

    The result is None if it cannot be determined, or is that of the pretrained model.

    Raises:
        ValueError: If the argument contradicts the derivation of the actions.
    """
    derivation, action_space = source.action_derivation, arguments.action_space
    if derivation != "recorded":
        derived = "absolute" if derivation == "absolute" else "relative"
        if action_space not in (None, derived):
            raise ValueError(f"`action_space` must be {derived!r} for {derivation} actions, got {action_space!r}.")
        return derived
    if action_space is None and (pretrained is None or not is_trained_on_actions(pretrained)):
        action_space = infer_action_space(source)
        reason = "inferred from actions and states"
        if action_space is None:
            reason = "could not be inferred from the states; set `action_space` to override"
        logger.info(f"`action_space` is {action_space or 'relative'}: {reason}")
    return action_space


def is_trained_on_actions(model: IRASimTransformer3DModel) -> bool:
    """Return whether the action encoder has been trained; its last layer is initialized with zeros."""
    return bool(getattr(model, "trajectory_embed", model.action_embed).linear_2.weight.any())


def check_action_space(
    arguments: TrainingArguments, config: Mapping[str, Any], action_space: str | None, derivation: str
) -> None:
    """Check that the actions have the same meaning as those of the pretrained model.

    Raises:
        ValueError: If the action space or the derivation differs.
    """
    for name, wanted in (("action_space", action_space), ("action_derivation", derivation)):
        if wanted not in (None, "recorded", config[name]) and config[name] != "recorded":
            raise ValueError(
                f"`{name}` is {config[name]!r} in {arguments.pretrained_model_name_or_path!r} and cannot be changed to "
                f"{wanted!r}: use data with the same kind of actions, and omit `{name}`."
            )


def main() -> None:
    (arguments,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
    check_arguments(arguments)
    accelerator = start_accelerator(arguments)
    sources = open_sources(arguments)
    vae = None if arguments.pixel_space else load_vae(arguments)
    pretrained = load_pretrained(arguments) if arguments.pretrained_model_name_or_path else None
    # loaded before the training, so that a run on an offline node cannot fail when it saves its result
    sampler = load_sampler(arguments.pretrained_model_name_or_path, arguments.revision)
    action_space = find_action_space(arguments, sources[0], pretrained)
    config = dict(pretrained.config if pretrained else new_settings(arguments))
    config |= {"action_space": action_space} if action_space else {}
    data = encode_data(sources, vae, config, arguments, accelerator)
    transformer = build_transformer(arguments, data, action_space, pretrained)
    copy = functools.partial(type(transformer).from_config, transformer.config)
    run = train(transformer, data, copy, arguments, accelerator)
    averaged = run.averaged()
    if accelerator.is_main_process:
        pipeline = finished_pipeline(vae, averaged, sampler)
        save_finished(Path(arguments.output_dir), pipeline.save_pretrained)
        logger.info(f"saved to {arguments.output_dir} after {run.step} steps in {run.seconds / 60:.1f} min")
        if arguments.push_to_hub:
            pipeline.push_to_hub(arguments.hub_model_id or Path(arguments.output_dir).name)
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main)
