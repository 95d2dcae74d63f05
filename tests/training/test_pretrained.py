import json
import re

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file
from tiny_models import tiny_pipeline, tiny_transformer

from irasim_diffusers.commands import loading
from irasim_diffusers.data import Episode, LeRobotFolder, PreparedEpisodes, write_file, write_metadata
from irasim_diffusers.training import RunArguments, is_pipeline, load_autoencoder, load_transformer, load_vae
from irasim_diffusers.training.datasets import check_frames

pytestmark = pytest.mark.usefixtures("offline")


def test_pipelines_models_and_missing_folders_are_told_apart(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "pipeline")
    tiny_transformer().save_pretrained(tmp_path / "model")
    assert is_pipeline(str(tmp_path / "pipeline"))
    assert not is_pipeline(str(tmp_path / "model"))
    for name in ("nowhere", "org/nowhere", str(tmp_path / "nowhere")):
        message = (
            f"`pretrained_model_name_or_path` must be a folder or Hub id, got {name!r}: the folder does not exist"
        )
        with pytest.raises(ValueError, match=re.escape(message)):
            is_pipeline(name)


def test_missing_autoencoders_raise_one_line(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    load_autoencoder(f"{tmp_path / 'model'}:vae")
    message = "`pretrained` must be the folder or Hub id of an AutoencoderKL or AutoencoderTiny, got 'nowhere': the folder does not exist"
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_autoencoder("nowhere", "pretrained")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("weights", "entries", "message"),
    [
        (
            lambda state: state.pop("encoder.conv_in.bias"),
            {},
            "the weights file does not contain encoder.conv_in.bias",
        ),
        (lambda state: state.update(extra=torch.zeros(3)), {}, "extra is not a weight of this autoencoder"),
        (
            lambda state: state["encoder.conv_in.bias"].fill_(torch.nan),
            {},
            "must be finite, .* in encoder.conv_in.bias",
        ),
        (lambda state: state["decoder.conv_out.bias"].fill_(1e38).add_(1e38), {}, None),
        (lambda state: state["encoder.conv_in.weight"].fill_(3e38), {}, "its latents and .* must be finite"),
        (lambda state: state, {"scaling_factor": "1"}, "`scaling_factor` of the autoencoder must be a number in"),
        (
            lambda state: state,
            {"latent_channels": 10**9},
            "`latent_channels` of the autoencoder must be an integer in",
        ),
    ],
)
def test_damaged_autoencoders_are_rejected_by_scripts_and_commands(tmp_path, weights, entries, message):
    tiny_pipeline().save_pretrained(tmp_path)
    file, config = tmp_path / "vae/diffusion_pytorch_model.safetensors", tmp_path / "vae/config.json"
    state = load_file(file)
    weights(state)
    save_file(state, file, {"format": "pt"})
    config.write_text(json.dumps(json.loads(config.read_text()) | entries))
    _check_loaders(tmp_path / "vae", message)
    arguments = RunArguments(dataset=["set"], output_dir="out", pretrained_model_name_or_path=str(tmp_path))
    if message:
        with pytest.raises(ValueError, match=message):
            load_vae(arguments)


BLOCKS = {"encoder_block_out_channels": (8, 8, 8), "num_encoder_blocks": (1, 1, 1)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        (
            {"decoder_block_out_channels": (8, 8), "num_decoder_blocks": (1, 1)},
            r"and an image of shape \(1, 3, 2, 4\)",
        ),
        ({"upsampling_scaling_factor": 4}, r"to latents of shape \(1, 4, 2, 3\) and back, .* shape \(1, 3, 32, 48\)"),
        ({"out_channels": 4}, r"must map an image of shape \(1, 3, 8, 12\) .* an image of shape \(1, 4, 8, 12\)"),
        ({"in_channels": 1}, "it must encode and decode RGB images: .* to have 1 channels, but got 3"),
    ],
)
def test_autoencoders_must_reconstruct_images(tmp_path, changes, message):
    same = {"decoder_block_out_channels": (8, 8, 8), "num_decoder_blocks": (1, 1, 1)}
    AutoencoderTiny(**BLOCKS | same | changes).save_pretrained(tmp_path)
    _check_loaders(tmp_path, message)


def _check_loaders(folder, message):
    for load in (load_autoencoder, loading.load_vae):
        if message is None:
            load(str(folder))
            continue
        with pytest.raises(
            ValueError, match=f"vae.* must be the folder or Hub id of an .*, got {str(folder)!r}: .*{message}"
        ):
            load(str(folder))


def test_configs_that_are_no_objects_are_named(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    arguments = RunArguments(dataset=["set"], output_dir="out", pretrained_model_name_or_path=str(tmp_path))
    for name in ("transformer/config.json", "vae/config.json", "scheduler/scheduler_config.json", "model_index.json"):
        before = (tmp_path / name).read_text()
        (tmp_path / name).write_text("null")
        with pytest.raises(ValueError, match=f"{name}' must contain a JSON object, got NoneType: the file is damaged"):
            load_vae(arguments)
        (tmp_path / name).write_text(before)
    (tmp_path / "transformer" / "config.json").write_text("[]")
    arguments.pretrained_model_name_or_path = str(tmp_path / "transformer")
    with pytest.raises(ValueError, match=r"got '.*': '.*config.json' must contain a JSON object, got list"):
        load_transformer(arguments)


def test_sizes_are_checked_without_decoding_episodes(tmp_path, monkeypatch):
    frames = np.zeros((3, 10, 12, 3), np.uint8)
    setting = {"fps": 5, "camera": "observation.image", "tasks": [""]}
    write_file(tmp_path, 0, [Episode(frames, np.zeros((3, 2), np.float32))], **setting)
    write_metadata(tmp_path, frame_size=(10, 12), names={}, robot_type="test", **setting)
    source = PreparedEpisodes(LeRobotFolder(tmp_path))
    monkeypatch.delattr(PreparedEpisodes, "__getitem__")
    check_frames([source], None, 2)
    with pytest.raises(ValueError, match="must have sides divisible by 4, got 10x12: use --height 8 --width 12"):
        check_frames([source], None, 4)
    wide = PreparedEpisodes(LeRobotFolder(tmp_path), frame_size=(10, 16))
    message = r"must have frames of the same size, got 10x12 and 10x16 \(height x width\): resize both with `height`"
    with pytest.raises(ValueError, match=message):
        check_frames([source, source, wide], None, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda state: state.pop("proj_out.bias"),
            "the config does not match the weights, for example 'proj_out.bias'",
        ),
        (
            lambda state: state.update(extra=torch.zeros(3)),
            "the config does not match the weights, for example 'extra'",
        ),
        (
            lambda state: state["proj_out.bias"].fill_(torch.nan),
            "the weights contain NaN or infinity in 'proj_out.bias'",
        ),
    ],
)
def test_damaged_transformers_are_rejected(tmp_path, change, message):
    tiny_transformer().save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    change(state)
    save_file(state, path, {"format": "pt"})
    arguments = RunArguments(dataset=["set"], output_dir="out", pretrained_model_name_or_path=str(tmp_path))
    with pytest.raises(ValueError, match=f"`pretrained_model_name_or_path` must be .*: {message}"):
        load_transformer(arguments)
