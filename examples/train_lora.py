"""Train LoRA adapters of a pretrained world model on robot clips.

    accelerate launch examples/train_lora.py --dataset my_robot --pretrained_model_name_or_path base --output_dir runs/lora \
        --rank 16 --learning_rate 5e-4

The adapters, the action encoder and the null action are trained; all other weights are frozen. The data must match the
pretrained model in the actions and the frame size. Checkpoints, resuming and validation work as in `train.py`. At the
end, `<output_dir>` contains `pytorch_lora_weights.safetensors`, which `IRASimPipeline.load_lora_weights` loads.
"""

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from accelerate.logging import get_logger
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils.hub_utils import load_or_create_model_card, populate_model_card
from huggingface_hub import create_repo, upload_folder
from peft import LoraConfig, get_peft_model_state_dict
from transformers import HfArgumentParser

from irasim_diffusers import IRASimPipeline, IRASimTransformer3DModel
from irasim_diffusers.models import ACTION_ENCODER
from irasim_diffusers.training import (
    RunArguments,
    TrainingData,
    check_ranges,
    check_run_arguments,
    encode_data,
    is_pipeline,
    load_transformer,
    load_vae,
    open_sources,
    run_script,
    save_finished,
    start_accelerator,
    train,
)

logger = get_logger(__name__, log_level="INFO")


@dataclass(kw_only=True)
class LoraArguments(RunArguments):
    lora_rank: int = field(default=16, metadata={"aliases": ["--rank"], "help": "rank of the adapters"})
    lora_alpha: int | None = field(default=None, metadata={"help": "LoRA alpha (default: the rank)"})
    lora_dropout: float = field(default=0.0, metadata={"help": "dropout probability of the inputs of the adapters"})
    lora_target_modules: list[str] = field(
        default_factory=lambda: ["to_q", "to_k", "to_v", "to_out.0"],
        metadata={"aliases": ["--lora_layers"], "help": "layers that receive adapters"},
    )


def check_arguments(arguments: LoraArguments) -> None:
    """Check the arguments before anything is read.

    Raises:
        ValueError: If a value is missing, invalid or in conflict with other arguments, the pretrained model cannot be accessed, or
            an optional package is not installed.
    """
    check_run_arguments(arguments)
    check_ranges(arguments, at_least_1=("lora_rank", "lora_alpha"), fractions=("lora_dropout",))
    name = arguments.pretrained_model_name_or_path
    if name is None:
        raise ValueError("`pretrained_model_name_or_path` is required: adapters belong to a trained model.")
    if not arguments.vae and not is_pipeline(name, arguments.revision):
        raise ValueError(f"`vae` is required, because {name!r} is not a pipeline.")


def check_config(transformer: IRASimTransformer3DModel, data: TrainingData) -> None:
    """Check that the data match the pretrained model in the actions and the frame size.

    Raises:
        ValueError: If they differ.
    """
    part, derivation = data.parts[0], data.sources[0].action_derivation
    found: dict[str, Any] = dict(zip(("sample_height", "sample_width"), part.latent_size, strict=True))
    found["action_dim"] = part.actions.shape[1]
    if derivation != "recorded":  # recorded actions have no known derivation
        found["action_derivation"] = derivation
    for name, value in found.items():
        if transformer.config[name] != value:
            remedies = {
                "action_dim": ", or change the model with `irasim adapt`",
                "action_derivation": " or another `action_derivation`",  # train.py does not change it either
            }
            remedy = remedies.get(name, ", or train all weights with train.py")
            raise ValueError(
                f"`{name}` must be {transformer.config[name]!r} as in the pretrained model, got {value!r}: use matching "
                f"data{remedy}."
            )


def add_lora(transformer: IRASimTransformer3DModel, arguments: LoraArguments) -> IRASimTransformer3DModel:
    """Add LoRA adapters, and freeze all weights except adapters, action encoder and null action.

    Raises:
        ValueError: If `lora_target_modules` includes the action encoder, or matches no layer.
    """
    transformer.add_adapter(
        LoraConfig(
            r=arguments.lora_rank,
            lora_alpha=arguments.lora_rank if arguments.lora_alpha is None else arguments.lora_alpha,
            lora_dropout=arguments.lora_dropout,
            target_modules=arguments.lora_target_modules,
        )
    )
    for name, parameter in transformer.named_parameters():
        if name.startswith(ACTION_ENCODER):
            if "lora_" in name:
                raise ValueError(
                    "`lora_target_modules` must not include the action encoder: all of its weights are trained."
                )
            parameter.requires_grad_(True)
    return transformer


def save_lora(transformer: IRASimTransformer3DModel, output: Path) -> None:
    """Save the adapters, the action encoder and the null action for `IRASimPipeline.load_lora_weights`."""
    encoder = {name: value for name, value in transformer.state_dict().items() if name.startswith(ACTION_ENCODER)}
    IRASimPipeline.save_lora_weights(
        output,
        transformer_lora_layers=get_peft_model_state_dict(transformer) | encoder,
        **_collate_lora_metadata({"transformer": transformer}),
    )


def publish(arguments: LoraArguments) -> None:
    """Push the adapters to the Hub, with a card that names the base model."""
    output = Path(arguments.output_dir)
    repository = create_repo(arguments.hub_model_id or output.name, exist_ok=True).repo_id
    card = load_or_create_model_card(
        repository,
        from_training=True,
        base_model=arguments.pretrained_model_name_or_path,
        model_description=f"LoRA of rank {arguments.lora_rank} for a robot world model, with its action encoder: "
        f'`pipe.load_lora_weights("{repository}")`.',
    )
    populate_model_card(card, tags=["lora", "world-model", "irasim", "robotics"])
    card.save(output / "README.md")
    upload_folder(
        repo_id=repository, folder_path=output, allow_patterns=["README.md", "pytorch_lora_weights.safetensors"]
    )


def main() -> None:
    (arguments,) = HfArgumentParser(LoraArguments).parse_args_into_dataclasses()
    check_arguments(arguments)
    accelerator = start_accelerator(arguments)
    sources = open_sources(arguments)
    vae = load_vae(arguments)
    transformer = load_transformer(arguments)
    copy = functools.partial(type(transformer).from_config, transformer.config)
    add_lora(transformer, arguments)  # before the data are encoded, because `lora_target_modules` may match no layer
    data = encode_data(sources, vae, transformer.config, arguments, accelerator)
    check_config(transformer, data)
    run = train(transformer, data, lambda: add_lora(copy(), arguments), arguments, accelerator)
    averaged = run.averaged()
    if accelerator.is_main_process:
        save_finished(Path(arguments.output_dir), functools.partial(save_lora, averaged))
        logger.info(f"saved to {arguments.output_dir} after {run.step} steps in {run.seconds / 60:.1f} min")
        if arguments.push_to_hub:
            publish(arguments)
    accelerator.end_training()


if __name__ == "__main__":
    run_script(main)
