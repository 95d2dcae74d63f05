"""Checkpoints that would fill the memory, load for hours, or predict NaN raise errors."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_pipeline, tiny_transformer, tiny_unet

from irasim_diffusers import IRASimPipeline

INDEX, TRANSFORMER, VAE = "model_index.json", "transformer/config.json", "vae/config.json"
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"
LAYER = "transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile") / "model"
    tiny_pipeline(num_inference_steps=2).save_pretrained(folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


@pytest.mark.parametrize(
    ("file", "entries", "message"),
    [
        (
            INDEX,
            {"num_inference_steps": 10**9},
            "`num_inference_steps` must be an integer .* at most 1000, .* 1000000000",
        ),
        (INDEX, {"num_inference_steps": 1001}, "at most 1000, the timesteps in training, got 1001"),
        (INDEX, {"num_inference_steps": True}, "`num_inference_steps` must be an integer .* got True"),
        (INDEX, {"num_inference_steps": "2"}, "`num_inference_steps` must be an integer .* got '2'"),
        (
            TRANSFORMER,
            {"sample_frames": 10**9},
            "`sample_frames` must be an integer of at least 1 and at most 4096, got 1000000000",
        ),
        (
            TRANSFORMER,
            {"sample_frames": True},
            "`sample_frames` must be an integer of at least 1 and at most 4096, got True",
        ),
        (
            TRANSFORMER,
            {"sample_frames": 4096, "sample_height": 4096},
            "must be at most 268435456, got .*: a window must",
        ),
        (
            TRANSFORMER,
            {"num_layers": 10**6},
            "`num_layers` must be an integer of at least 1 and at most 256, got 1000000",
        ),
        (
            TRANSFORMER,
            {"num_train_timesteps": 10**9},
            "`num_train_timesteps` must be an integer of at least 1 and at most 100000",
        ),
        (TRANSFORMER, {"base_patch_size": 0}, r"`base_patch_size` must be a number in \[0.001, 1000\], got 0"),
        (TRANSFORMER, {"action_frequencies": 1.5}, r"`action_frequencies` must be an integer in \[0, 32\], got 1.5"),
        (TRANSFORMER, {"base_patch_size": "a"}, r"`base_patch_size` must be a number in \[0.001, 1000\], got 'a'"),
        (TRANSFORMER, {"target_extent": 5}, "`target_extent` must be the finite left, top, right and bottom edge"),
        (TRANSFORMER, {"target_extent": ["a", 0, 1, 1]}, "`target_extent` must be the finite left, top, right"),
        (INDEX, {"chunk_length": 0}, "`chunk_length` must be an integer in .* got 0"),
        (INDEX, {"chunk_length": 10000}, "`chunk_length` must be an integer in .* got 10000"),
        (INDEX, {"chunk_length": "a"}, "`chunk_length` must be an integer in .* got a"),
        (INDEX, {"window_length": 5, "chunk_length": 3}, "`window_length` is deprecated: omit it"),
        (INDEX, {"window_length": "a"}, "`window_length` is deprecated: omit it"),
        (INDEX, {"timesteps": 5}, "`timesteps` must be `num_inference_steps` = .* numbers, got 5"),
        (TRANSFORMER, {"fps": 1e-320}, r"`fps` must be a number in \[0.001, 100000\], got 1e-320"),
        (TRANSFORMER, {"beta_start": float("nan")}, r"`beta_start` must be a number in \[0, 1\], got nan"),
        (TRANSFORMER, {"action_names": [1, 2, 3]}, "`action_names` must be a list of strings or None, got 1"),
        (
            VAE,
            {"layers_per_block": 10**6},
            r"`layers_per_block` of the autoencoder must be an integer in \[1, 64\]",
        ),
        (
            VAE,
            {"block_out_channels": [8] * 1000},
            "`block_out_channels` of the autoencoder must be 1 to 8 integers",
        ),
        (VAE, {"scaling_factor": 1e-39}, "`scaling_factor` of the autoencoder must be a number in .*, got 1e-39"),
        (VAE, {"scaling_factor": 1e20}, "`scaling_factor` of the autoencoder must be a number in .*, got 1e"),
        (VAE, {"shift_factor": 1e20}, "`shift_factor` of the autoencoder must be a number in"),
    ],
)
def test_absurd_configs_raise(copy, file, entries, message):
    path = copy / file
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | entries), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        IRASimPipeline.from_pretrained(copy)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.int64, torch.uint8, torch.complex64])
@pytest.mark.parametrize("name", ["transformer", "vae"])
def test_weights_of_other_types_raise(copy, name, dtype):
    file = copy / name / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    key = next(key for key in tensors if key.endswith("weight"))
    save_file(tensors | {key: tensors[key].to(dtype)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"must contain floating-point weights, got \w+ for '.*weight'"):
        IRASimPipeline.from_pretrained(copy)


def test_weights_of_other_floating_point_types_load(copy):
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        tensors = {key: value.to(dtype) for key, value in load_file(copy / WEIGHTS).items()}
        save_file(tensors, copy / WEIGHTS, metadata={"format": "pt"})
        assert IRASimPipeline.from_pretrained(copy).transformer.dtype == torch.float32


@pytest.mark.parametrize(
    "entries", [{"block_out_channels": [8] * 100}, {"condition_dim": 10**9}, {"sample_frames": 10**9}]
)
def test_absurd_unets_raise(entries):
    with pytest.raises(ValueError, match=r"must be (an integer of at least 1 and at most|1 to)"):
        tiny_unet(**entries)
    with pytest.raises(ValueError, match="`action_frequencies` must be an integer in"):
        tiny_transformer(action_frequencies=10**6)


def lora(folder, metadata=None, dtype=torch.float32):
    """Write a LoRA file with one layer and a PEFT config; return its folder."""
    tensors = {
        f"transformer.{LAYER}.lora_A.weight": torch.ones(2, 24).to(dtype),
        f"transformer.{LAYER}.lora_B.weight": torch.ones(24, 2).to(dtype),
    }
    config = {"r": 2, "lora_alpha": 4, "target_modules": ["to_q"]} | (metadata or {})
    stored = {"lora_adapter_metadata": json.dumps({f"transformer.{key}": value for key, value in config.items()})}
    save_file(tensors, folder / "pytorch_lora_weights.safetensors", metadata={"format": "pt"} | stored)
    return folder


def test_patterns_of_lora_files_are_not_evaluated(tmp_path):
    """Matching this pattern would take exponential time; the layers in the file are used instead."""
    pipeline = tiny_pipeline()
    pipeline.load_lora_weights(lora(tmp_path, {"target_modules": "(a+)+$|(.*)*x", "exclude_modules": "(.*)*y"}))
    adapted = {name.split(".lora_A")[0] for name, _ in pipeline.transformer.named_parameters() if "lora_A" in name}
    assert adapted == {LAYER}
    config = next(iter(pipeline.transformer.peft_config.values()))
    assert (config.r, config.lora_alpha) == (2, 4)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (
            {"lora_alpha": float("nan")},
            "`lora_alpha` of the LoRA file must be a positive number of at most 1e.06, got nan",
        ),
        ({"lora_alpha": 1e30}, "`lora_alpha` of the LoRA file must be a positive number"),
        ({"lora_alpha": True}, "`lora_alpha` of the LoRA file must be a positive number"),
        ({"r": 10**9}, "`r` of the LoRA file must be a positive integer"),
        ({"r": "2"}, "`r` of the LoRA file must be a positive integer"),
        ({"alpha_pattern": {LAYER: float("inf")}}, "`lora_alpha` of the LoRA file must be a positive number"),
        ({"alpha_pattern": {"(a+)+$|(.*)*x": 2}}, "`alpha_pattern` of the LoRA file must have module names as keys"),
        ({"rank_pattern": {"(a+)+": 2}}, "`rank_pattern` of the LoRA file must have module names as keys"),
    ],
)
def test_absurd_lora_metadata_raises(tmp_path, metadata, message):
    pipeline = tiny_pipeline()
    with pytest.raises(ValueError, match=message):
        pipeline.load_lora_weights(lora(tmp_path, metadata))
    assert not getattr(pipeline.transformer, "peft_config", None)


def test_lora_weights_of_other_types_raise(tmp_path):
    with pytest.raises(ValueError, match=r"LoRA weights must be floating-point, got torch\.complex64"):
        tiny_pipeline().load_lora_weights(lora(tmp_path, dtype=torch.complex64))


def test_predictions_that_are_not_finite_raise(frames, actions):
    pipeline = tiny_pipeline(num_inference_steps=2)
    with torch.no_grad():
        pipeline.transformer.proj_out.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="the prediction contains NaN or infinite values"):
        pipeline(frames, actions)
    with pytest.raises(ValueError, match="the prediction contains NaN or infinite values"):
        list(pipeline.stream(frames, actions))
