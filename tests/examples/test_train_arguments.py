"""Checks of training arguments and data before any work."""

import contextlib
import os
import re
import shlex
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import train
import train_lora
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.tracking import get_available_trackers
from fork_server import fork_server
from test_lerobot import write_folder
from test_pusht import EXAMPLES, call
from test_train import CONFIGS, SHORT, train_robot, write_robot, write_workspace
from tiny_models import tiny_pipeline, tiny_transformer, tiny_vae
from train import TrainingArguments, check_arguments
from train_vae import (
    Frames,
    VAEArguments,
    build_vae,
    check_divisible,
    crop_frames,
    describe_psnr,
    load_frames,
    open_data,
    set_scaling,
)
from train_vae import check_arguments as check_autoencoder_arguments
from transformers import HfArgumentParser

from irasim_diffusers.cli import _parser
from irasim_diffusers.commands import adapt
from irasim_diffusers.commands.adapt import check_flags
from irasim_diffusers.data import PreparedEpisodes, open_dataset, write_video
from irasim_diffusers.training import check_held_out, check_run_arguments, load_vae, open_sources, run_script
from irasim_diffusers.training.datasets import check_data, open_source, validation_clips


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return write_workspace(tmp_path_factory.mktemp("robots"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "sgd"}, "`optimizer` must be one of adamw, adamw8bit, muon, got 'sgd'"),
        ({"vae": None}, "`vae` is required, except with `pixel_space` or a pretrained pipeline"),
        ({"preset": "M"}, "`preset` must be one of S, B, L, XL, got 'M'"),
        ({"model": "gan"}, "`model` must be one of transformer, unet, got 'gan'"),
        ({"model": "unet", "preset": "S"}, "`preset` must be one of VDM, LVDM, got 'S'"),
        ({"model": "unet", "conditioning": "frame"}, "`conditioning` does not apply to `model` unet"),
        (
            {"model": "unet", "optimizer": "muon", "num_layers": 2},
            "does not apply to `model` unet: omit num_layers, optimizer",
        ),
        ({"block_out_channels": [8, 16]}, "`block_out_channels` does not apply to `model` transformer"),
        ({"pixel_space": True}, "`pixel_space` is for a new model without latents: omit `vae`"),
        ({"max_train_minutes": 1, "lr_scheduler": "cosine"}, "`lr_scheduler` must be constant or .* got 'cosine'"),
        ({"adam_beta1": 1.0}, r"`adam_beta1` must be in \[0, 1\), got 1.0"),
        ({"adam_beta2": -0.1}, r"`adam_beta2` must be in \[0, 1\), got -0.1"),
        ({"snr_gamma": 5, "prediction_type": "flow_prediction"}, "`snr_gamma` must be omitted for flow matching"),
        ({"dataset_weights": [1, 2]}, r"`dataset_weights` must contain one number per dataset \(1\), got \[1, 2\]"),
        ({"height": 32}, "`height` and `width` must be given together, got only `height`"),
        ({"lr_scheduler": "piecewise_constant"}, "`lr_scheduler` must be one of .*, got 'piecewise_constant'"),
        ({"preset": "S", "pretrained_model_name_or_path": "model"}, "`preset` is for a new model"),
        ({"frame_skip": 2, "target_fps": 5}, "`frame_skip` and `target_fps` are mutually exclusive"),
        ({"terminal_share": 1.5}, r"`terminal_share` must be in \[0, 1\], got 1.5"),
        ({"rollout_chunks": -1}, "`rollout_chunks` must be at least 0, got -1"),
        ({"rollout_inference_steps": 0}, r"`rollout_inference_steps` must be in \[1, 1000\], got 0"),
        ({"crop_size": 8, "state_keys": ["joints"]}, "`crop_size` and `state_keys` are mutually exclusive"),
        ({"scale_noisy_latents": True}, "`scale_noisy_latents` must be used with `prediction_type` sample, got none"),
        ({"spatial_position": "area"}, "`spatial_position` must be one of grid, rope, got 'area'"),
        ({"target_extent": [0, 0, 1, 1]}, "`target_extent` must be used with `action_space` absolute, got none"),
        ({"rollout_start_step": 5}, "require `rollout_chunks` > 0, got 0"),
        ({"motion_noise": 0.1}, "require `rollout_chunks` > 0, got 0"),
        ({"motion_noise": -0.1, "rollout_chunks": 1}, "`motion_noise` must be at least 0, got -0.1"),
        ({"model": "unet", "attention_head_dim": 7}, "`attention_head_dim` must be even for rotary positions, got 7"),
        ({"model": "unet", "block_out_channels": [7, 9]}, "`block_out_channels` must be multiples of"),
        ({"num_attention_heads": 2, "attention_head_dim": 7}, "must be divisible by 4 .*, got 2 times 7"),
        ({"revision": "main"}, "`revision` and `variant` require `pretrained_model_name_or_path`"),
        ({"model": "unet", "crop_size": 8}, "`crop_size` does not apply to `model` unet"),
        ({"target_extent": [0, 1], "action_space": "absolute"}, r"`target_extent` must be 4 numbers, .* got \[0, 1\]"),
        ({"action_normalisation": "max"}, "`action_normalisation` must be one of std, quantile, got 'max'"),
        ({"max_train_steps": -5}, "`max_train_steps` must be at least 1, got -5"),
        ({"max_train_steps": 0}, "`max_train_steps` must be at least 1, got 0"),
        ({"max_train_episodes": -1}, "`max_train_episodes` must be at least 1, got -1"),
        ({"height": 0, "width": 32}, "`height` must be at least 1, got 0"),
        ({"train_batch_size": 0}, "`train_batch_size` must be at least 1, got 0"),
        ({"logging_steps": 0}, "`logging_steps` must be at least 1, got 0"),
        ({"checkpointing_steps": 0}, "`checkpointing_steps` must be at least 1, got 0"),
        ({"history_noise": -0.1}, "`history_noise` must be at least 0, got -0.1"),
        ({"action_dropout": 2.0}, r"`action_dropout` must be in \[0, 1\], got 2.0"),
        ({"ema_decay": 2.0}, r"`ema_decay` must be in \[0, 1\], got 2.0"),
        ({"learning_rate": float("nan")}, "`learning_rate` must be finite, got nan"),
        ({"learning_rate": 0.0}, "`learning_rate` must be positive, got 0.0"),
        ({"action_scale": [float("nan")]}, r"`action_scale` must be finite, got \[nan\]"),
        ({"action_scale": [1.0, 0.0]}, r"`action_scale` must not be 0, got \[1.0, 0.0\]"),
        ({"dataset_weights": [-1.0]}, "`dataset_weights` must be positive, got -1.0"),
        ({"max_train_minutes": float("inf")}, "`max_train_minutes` must be finite, got inf"),
        ({"fps": 0.0}, "`fps` must be positive, got 0.0"),
        ({"validation_inference_steps": 0}, r"`validation_inference_steps` must be in \[1, 1000\], got 0"),
        (
            {"validation_dataset": "set/"},
            "`validation_split` must differ from `split` .* got 'train' for both in 'set/'",
        ),
        (
            {"dataset": [os.path.abspath("set")], "validation_dataset": "./set"},
            "`validation_split` must differ from `split` .* got 'train' for both in './set'",
        ),
        ({"report_to": "paper"}, "`report_to` must be one of all, .*tensorboard.*, got 'paper'"),
        ({"lr_scheduler": "sine"}, "`lr_scheduler` must be one of linear, .*, got 'sine'"),
        ({"attention_backend": "fast"}, "`attention_backend` must be one of .*, got 'fast'"),
        ({"prediction_type": "noise"}, "`prediction_type` must be one of epsilon, .*, got 'noise'"),
        ({"sample_frames": 4, "num_history_frames": 4}, "`num_history_frames` must be less than `sample_frames` = 4"),
    ],
)
def test_invalid_arguments_raise(changes, message):
    with pytest.raises(ValueError, match=message):
        check_arguments(TrainingArguments(**{"dataset": ["set"], "output_dir": "out", "vae": "vae"} | changes))


def test_the_current_folder_may_be_the_dataset():
    check_arguments(TrainingArguments(dataset=["."], output_dir="out", vae="vae"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"action_scale": [1.0, 2.0]}, r"`action_scale` must be one number or 7 numbers, .*, got \[1.0, 2.0\]"),
        ({"state_keys": ["joints"]}, "`state_keys` must be among the vector features .*, got 'joints'"),
        (
            {"validation_dataset": "other"},
            r"`validation_dataset` must have frames of 16x32 \(height x width\) like .*, got 16x24: resize both",
        ),
    ],
)
def test_incompatible_data_raise_before_encoding(workspace, changes, message):
    if "validation_dataset" in changes:
        write_robot(workspace / "other", 3, width=24)
        changes = {"validation_dataset": str(workspace / "other")}
    arguments = TrainingArguments(
        dataset=[str(workspace / "first")], output_dir="out", fps=5, cameras=["0"], **changes
    )
    source = open_source(arguments.dataset[0], arguments, "train", None, all_phases=True)
    with pytest.raises(ValueError, match=message):
        check_data([source], arguments)


@pytest.fixture(scope="module")
def episodes(tmp_path_factory):
    """Ten episodes as a LeRobotDataset, also by a link, and as a table; one in the IRASim release format."""
    root = tmp_path_factory.mktemp("episodes")
    write_folder(root / "lerobot", (4,) * 10)
    frames = [[np.full((8, 8, 3), number, np.uint8)] * 3 for number in range(10)]
    features = {
        "video": datasets.List(datasets.Image()),
        "actions": datasets.List(datasets.List(datasets.Value("float32"))),
    }
    rows = {"video": frames, "actions": [[[0.0, 1.0]] * 3] * 10}
    datasets.Dataset.from_dict(rows, datasets.Features(features)).to_parquet(root / "table" / "train.parquet")
    write_robot(root / "release", 5, episodes=1, cameras=1)
    (root / "link").symlink_to(root / "lerobot")
    return root


def test_numbers_of_action_components_must_agree(episodes):
    sources = [PreparedEpisodes(open_dataset(episodes / name)) for name in ("lerobot", "table")]
    with pytest.raises(
        ValueError, match="must have the same number of action components, got 3 and 2: pad the actions"
    ):
        check_data(sources, TrainingArguments(dataset=["lerobot", "table"], output_dir="out"))


@pytest.mark.parametrize("name", ["lerobot", "table"])
@pytest.mark.parametrize(
    ("split", "validation_split", "max_episodes", "shared"),
    [
        ("train", "train[90%:]", None, 1),
        ("train[:90%]", "train[80%:]", None, 1),
        ("train[90%:]", "train", None, 1),
        ("train", "train[:50%]", 3, 3),
        ("train[:90%]", "train[90%:]", None, 0),
        ("train", "train[50%:]", 5, 0),
        ("train[:20%]+train[80%:]", "train[20%:80%]", None, 0),
    ],
)
def test_training_and_validation_must_not_share_episodes(
    episodes, name, split, validation_split, max_episodes, shared
):
    arguments = TrainingArguments(
        dataset=[str(episodes / name)],
        output_dir="out",
        split=split,
        validation_dataset=os.path.relpath(episodes / name),
        validation_split=validation_split,
        max_train_episodes=max_episodes,
        fps=10,
    )
    expected = contextlib.nullcontext()
    if shared:
        expected = pytest.raises(
            ValueError, match=f"`split` and `validation_split` must not .*, which share {shared}: "
        )
    with expected:
        open_sources(arguments)


@pytest.mark.parametrize(("name", "other"), [("lerobot", "link"), ("release", "release/../release")])
def test_shared_episodes_are_found_for_other_spellings_of_a_folder(episodes, name, other):
    source = PreparedEpisodes(open_dataset(episodes / name, fps=5))
    arguments = TrainingArguments(dataset=["set"], output_dir="out", validation_dataset=str(episodes / other))
    held_out = PreparedEpisodes(open_dataset(episodes / other, fps=5))
    with pytest.raises(ValueError, match=f"which share {len(source)}: "):
        check_held_out([source], [str(episodes / name)], held_out, arguments)
    check_held_out([source], ["another"], held_out, arguments)


def test_frames_of_different_sizes_raise(workspace, tmp_path):
    """The message is that of validation, of the autoencoder's training data and of `irasim adapt`."""
    write_robot(tmp_path / "mixed", 3, cameras=1)
    write_video(tmp_path / "mixed/videos/train/1/0.mp4", np.zeros((9, 16, 24, 3), np.uint8), 5, lossless=True)
    mixed = str(tmp_path / "mixed")
    message = "frames of episode 1 of .* must be 16x32 .* like those of earlier episodes, got 16x24: resize all with `height`"
    arguments = TrainingArguments(
        dataset=["set"], output_dir="out", validation_dataset=mixed, validation_split="train"
    )
    with pytest.raises(ValueError, match=message):
        validation_clips(arguments, {"num_history_frames": 1, "sample_frames": 3})
    with pytest.raises(ValueError, match=message):
        load_frames(PreparedEpisodes(open_dataset(mixed)), 2, skip_broken=False)
    flags = ["adapt", "--model", "none", "--output", "none", "--vae", "none", "--dataset", mixed]
    with pytest.raises(ValueError, match=message):
        adapt._images(_parser().parse_args(flags))


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        (train, ["--snr_gamma", 5], "`snr_gamma` must be omitted for flow matching, .*, got 5"),
        (train_lora, ["--snr_gamma", 5], "`snr_gamma` must be omitted for flow matching, .*, got 5"),
        (train, ["--validation_dataset", "mixed"], "frames of episode 1 of .*mixed' must be 16x32"),
        (train_lora, ["--lora_target_modules", "none"], "Target modules .*none.* not found in the base model"),
    ],
)
def test_faults_of_training_are_found_before_encoding(workspace, tmp_path, monkeypatch, script, flags, message):
    tiny_transformer(prediction_type="flow_prediction").save_pretrained(tmp_path / "flow")
    write_robot(tmp_path / "mixed", 3)
    write_video(tmp_path / "mixed/videos/train/1/0.mp4", np.zeros((9, 16, 24, 3), np.uint8), 5, lossless=True)
    flags = [tmp_path / "mixed" if each == "mixed" else each for each in flags]
    command = [script.__name__, "--dataset", workspace / "first", "--cameras", 0, "--vae", workspace / "vae", *flags]
    command += ["--pretrained_model_name_or_path", tmp_path / "flow", "--output_dir", tmp_path / "out", "--fps", 5]
    monkeypatch.setattr("sys.argv", [*map(str, command)])
    with pytest.raises(ValueError, match=message):
        script.main()
    assert not (tmp_path / "out").exists()


def test_frames_must_match_the_autoencoder():
    vae = build_vae(VAEArguments(dataset="set", output_dir="out"), 320)
    check_divisible(vae, 176, 320)
    with pytest.raises(ValueError, match=r"sides divisible by 8 .*, got 180x320: .* --height 176 --width 320"):
        check_divisible(vae, 180, 320)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"crop_size": 48}, "`crop_size` must be omitted for an AutoencoderKL, .*: use `tiny`"),
        ({"tiny": True, "block_out_channels": [8, 16]}, "must be equal positive numbers with `tiny`, got \\[8, 16\\]"),
        ({"tiny": True, "block_out_channels": []}, "`block_out_channels` of the autoencoder must be 1 to 8 integers"),
        ({"latent_noise": -0.1}, "`latent_noise` must"),
        ({"latent_noise": 1e300}, "`latent_noise` must"),
        ({"latent_std": 1e30}, r"`latent_std` must be in \[1e-06, 1e\+06\], got 1e\+30"),
        ({"latent_std": 1e-30}, r"`latent_std` must be in \[1e-06, 1e\+06\], got 1e-30"),
        ({"latent_channels": 10**11}, "`latent_channels` of the autoencoder must be .*, got 100000000000"),
        ({"block_out_channels": [4 * 10**6] * 2}, "`block_out_channels` of the autoencoder must be .*, got .4000000"),
        ({"height": 32768, "width": 32768}, "`height` must be at most 8192, got 32768"),
        ({"tiny": True, "norm_num_groups": 8}, "`norm_num_groups` must be omitted with `tiny`"),
        ({"pretrained": "vae", "tiny": True}, "`tiny` must be omitted with `pretrained`"),
        ({"pretrained": "vae", "block_out_channels": [16]}, "`block_out_channels` must be omitted with `pretrained`"),
        ({"pretrained": "vae", "latent_channels": 4}, "`latent_channels` must be omitted with `pretrained`"),
        ({"pretrained": "vae", "norm_num_groups": 32}, "`norm_num_groups` must be omitted with `pretrained`"),
    ],
)
def test_invalid_autoencoder_arguments(flags, message):
    with pytest.raises(ValueError, match=message):
        check_autoencoder_arguments(VAEArguments(dataset="set", output_dir="out", **flags))


def test_crops_of_frames(tmp_path):
    """Crops contain the changed pixel; a pretrained tiny autoencoder can be trained on crops, an AutoencoderKL cannot."""
    flags = {"dataset": "set", "output_dir": "out", "block_out_channels": [4, 4, 4], "crop_size": 8}
    tiny = build_vae(VAEArguments(**flags, tiny=True), 32)
    assert VAEArguments(dataset="set", output_dir="out", tiny=True).block_out_channels == [32] * 4
    check_divisible(tiny, 16, 20, 8)
    for size, sides in ((6, (16, 20)), (24, (20, 40))):
        with pytest.raises(
            ValueError, match=f"`crop_size` must be a multiple of 4 and at most {sides[0]}, .* got {size}"
        ):
            check_divisible(tiny, *sides, size)
    tiny.save_pretrained(tmp_path / "tiny")
    tiny_vae().save_pretrained(tmp_path / "kl")
    loaded = build_vae(VAEArguments(**flags, pretrained=str(tmp_path / "tiny"), freeze_encoder=True), 32)
    assert {name.split(".")[0] for name, value in loaded.named_parameters() if value.requires_grad} == {"decoder"}
    with pytest.raises(ValueError, match="`crop_size` must be omitted for an AutoencoderKL"):
        build_vae(VAEArguments(**flags, pretrained=str(tmp_path / "kl")), 32)
    frames = torch.zeros(50, 3, 16, 20, dtype=torch.uint8)
    frames[:, :, 3, 17] = 255
    crops = crop_frames(frames, torch.zeros(3, 16, 20), 8, np.random.default_rng(0))
    assert crops.shape == (50, 3, 8, 8)
    assert (crops.amax((1, 2, 3)) == 255).sum() > 20  # half of the pixels are drawn by the change


def test_constant_latents_end_in_an_error_and_keep_the_checkpoint(workspace, tmp_path):
    """The autoencoder reconstructs black frames without an error, so their PSNR is infinite."""
    black = build_vae(VAEArguments(dataset="set", output_dir="out", tiny=True, block_out_channels=[4, 4]), 32)
    for parameter in black.parameters():
        torch.nn.init.zeros_(parameter)
    black.save_pretrained(tmp_path / "black")
    frames = torch.zeros(2, 3, 16, 32, dtype=torch.uint8)
    text = describe_psnr(black, Frames(frames, frames, frames[0], is_held_out=True), torch.device("cpu"))
    assert text == "held-out PSNR inf dB"
    flags = ["--dataset", workspace / "first", "--cameras", 0, "--output_dir", tmp_path / "out", *SHORT]
    flags += ["--pretrained", tmp_path / "black"]
    for _ in range(2):
        with pytest.raises(ValueError, match=r"must differ and be finite, got a standard deviation of 0: train again"):
            call("train_vae", *flags)
        assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]
    with pytest.raises(ValueError, match=r"`latent_std` divided by .* 1e\+06\], got 1 and 1e-09: resume"):
        set_scaling(black, 1.0, 1e-9)
    with pytest.raises(ValueError, match=r"`max_train_steps` must be at least 2, the step of '.*checkpoint-2', got 1"):
        call("train_vae", *flags, "--max_train_steps", 1)


def test_autoencoder_is_not_validated_on_frames_of_another_size(workspace, tmp_path):
    write_robot(tmp_path / "narrow", 3, episodes=1, width=24)
    flags = {"dataset": str(workspace / "first"), "output_dir": "out", "cameras": ["0"]}
    with pytest.raises(ValueError, match=r"must have frames of 16x32 .*, got 16x24: resize both"):
        open_data(VAEArguments(**flags, validation_dataset=str(tmp_path / "narrow")))


def test_autoencoder_is_not_validated_on_training_episodes(episodes):
    flags = {"dataset": str(episodes / "lerobot"), "output_dir": "out", "validation_dataset": str(episodes / "link")}
    with pytest.raises(ValueError, match="must not share episodes of the same dataset, got 'train' and 'train'"):
        open_data(VAEArguments(**flags))
    open_data(VAEArguments(**flags, split="train[:5]", validation_split="train[5:]"))


@pytest.mark.skipif("aim" in get_available_trackers(), reason="aim is installed")
def test_missing_tracker_raises():
    with pytest.raises(ValueError, match="`report_to` aim is not installed: run `pip install aim`"):
        check_arguments(TrainingArguments(dataset=["set"], output_dir="out", vae="vae", report_to="aim"))


def test_gradient_accumulation_must_match_accelerate(workspace, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    with pytest.raises(ValueError, match=r"`gradient_accumulation_steps` must be 1 like that of .*, got 4: pass"):
        train_robot(workspace, "accumulated", "--gradient_accumulation_steps", 4)


def test_autoencoder_of_pretrained_pipeline(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path)
    arguments = TrainingArguments(dataset=["set"], output_dir="out", pretrained_model_name_or_path=str(tmp_path))
    check_arguments(arguments)
    assert torch.equal(load_vae(arguments).encoder.conv_in.weight, pipeline.vae.encoder.conv_in.weight)


def test_invalid_input_ends_in_one_line_and_exits_with_2(workspace, monkeypatch, capsys):
    flags = ["--dataset", workspace / "first", "--vae", workspace / "vae", "--output_dir", workspace / "refused"]
    result = fork_server().run(EXAMPLES / "train.py", *flags, "--cameras", 3)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("train.py: error: ")
    assert "Traceback" not in result.stderr
    monkeypatch.setattr("sys.argv", [str(part) for part in ("train.py", *flags, "--max_train_steps", 0)])
    with pytest.raises(SystemExit) as stop:
        run_script(train.main)
    assert stop.value.code == 2
    assert capsys.readouterr().err == "train.py: error: `max_train_steps` must be at least 1, got 0.\n"
    assert not (workspace / "refused").exists()


def test_cpu_launch_with_single_process_raises(workspace):
    """`accelerate launch --cpu --num_processes 2` sets these variables and starts one process."""
    launched = {"ACCELERATE_USE_CPU": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    command = [EXAMPLES / "train.py", "--dataset", workspace / "first", "--vae", workspace / "vae"]
    result = fork_server().start(*command, "--output_dir", workspace / "single", *SHORT, variables=launched)
    assert result.wait()
    assert "starts only one process: start several with `--config_file" in result.stderr


def test_zero_does_not_count_as_an_omitted_argument(workspace):
    """An explicit `--action_frequencies 0` is compared with the pretrained model, although 0 == False."""
    tiny_transformer(action_frequencies=2).save_pretrained(workspace / "octaves")
    flags = {"dataset": ["set"], "output_dir": "out", "pretrained_model_name_or_path": str(workspace / "octaves")}
    with pytest.raises(ValueError, match=r"`action_frequencies` is 2 in .* cannot be changed to 0: omit it\.$"):
        train.load_pretrained(TrainingArguments(**flags, action_frequencies=0))
    with pytest.raises(ValueError, match="cannot be changed to 3: omit it, or change it with `irasim adapt`"):
        train.load_pretrained(TrainingArguments(**flags, action_frequencies=3))
    with pytest.raises(ValueError, match=r"`num_history_frames` must be less than `sample_frames` = 1, .*, got 2"):
        train.load_pretrained(TrainingArguments(**flags, sample_frames=1))
    assert train.load_pretrained(TrainingArguments(**flags)).config.action_frequencies == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, "`pretrained_model_name_or_path` is required: adapters belong to a trained model"),
        ({"pretrained_model_name_or_path": "model", "lora_rank": 0}, "`lora_rank` must be at least 1, got 0"),
        (
            {"pretrained_model_name_or_path": "model", "lora_dropout": 2.0},
            r"`lora_dropout` must be in \[0, 1\], got 2.0",
        ),
        (
            {"pretrained_model_name_or_path": "model", "max_train_steps": 0},
            "`max_train_steps` must be at least 1, got 0",
        ),
        (
            {"pretrained_model_name_or_path": str(Path(__file__).parent)},
            "`vae` is required, because .* not a pipeline",
        ),
    ],
)
def test_invalid_lora_arguments_raise(changes, message):
    arguments = train_lora.LoraArguments(**{"dataset": ["set"], "output_dir": "out"} | changes)
    with pytest.raises(ValueError, match=message):
        train_lora.check_arguments(arguments)


def documented_commands():
    """Yield the program and flags of each training or `irasim adapt` command in README.md and the guides."""
    root = EXAMPLES.parent
    for page in (root / "README.md", *sorted(EXAMPLES.rglob("*.md"))):
        blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
        text = "\n".join(blocks).replace("\\\n", " ")
        for line in re.findall(r"^.*?((?:examples/train\w*\.py|irasim adapt) .*)$", text, re.MULTILINE):
            if "..." not in line:
                program, *flags = shlex.split(line.removeprefix("irasim "), comments=True)
                yield pytest.param(program.removeprefix("examples/"), flags, id=f"{page.name}: {line[:60]}")


@pytest.mark.parametrize(("program", "flags"), list(documented_commands()))
def test_documented_commands_are_valid(program, flags):
    if program == "adapt":
        check_flags(_parser().parse_args(["adapt", *flags]))
        return
    arguments = {
        "train.py": TrainingArguments,
        "train_lora.py": train_lora.LoraArguments,
        "train_vae.py": VAEArguments,
    }
    parsed, rest = HfArgumentParser(arguments[program]).parse_args_into_dataclasses(
        flags, return_remaining_strings=True
    )
    assert not rest
    if program != "train_vae.py" and parsed.optimizer != "adamw8bit":  # requires bitsandbytes
        check_run_arguments(parsed)


def test_accelerate_configs_load():
    kinds = {path.stem: load_config_from_file(str(path)).distributed_type.value for path in CONFIGS.glob("*.yaml")}
    assert kinds == {"cpu": "MULTI_GPU", "single_gpu": "NO", "ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED"}
