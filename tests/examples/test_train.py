"""Training on robot clips with `accelerate launch`."""

import contextlib
import dataclasses
import functools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
import train
import train_lora
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.tracking import get_available_trackers
from conftest import tiny_pipeline, tiny_transformer, tiny_vae
from diffusers import AutoencoderKL, DDIMScheduler
from hub_server import HubServer
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_lerobot import write_folder
from test_pusht import EXAMPLES, call, run
from train import TrainingArguments, check_arguments
from train_vae import VAEArguments, build_vae, check_divisible, open_data
from transformers import HfArgumentParser

from irasim_diffusers import IRASimPipeline
from irasim_diffusers.cli import _parser, main
from irasim_diffusers.commands.adapt import check_flags
from irasim_diffusers.data import (
    IRASimFolder,
    LatentClips,
    LeRobotFolder,
    PreparedEpisodes,
    cache_latents,
    open_dataset,
    read_video,
    write_video,
)
from irasim_diffusers.models import noise_process
from irasim_diffusers.training import (
    check_held_out,
    check_run_arguments,
    load_vae,
    newest_checkpoint,
    open_sources,
    run_script,
)
from irasim_diffusers.training.arguments import MAY_CHANGE
from irasim_diffusers.training.datasets import check_data, open_source
from irasim_diffusers.training.loss import training_loss
from irasim_diffusers.training.rollouts import clip_length, crop

CLIPS = Path(os.environ.get("IRASIM_TEST_DATA", "/nonexistent"))
needs_clips = pytest.mark.skipif(not CLIPS.is_dir(), reason="IRASIM_TEST_DATA is not a folder of robot clips")
CONFIGS = EXAMPLES / "accelerate_configs"
TWO = ["--config_file", str(CONFIGS / "cpu.yaml")]
STEPS = 40  # steps of the run that is killed
MODEL = ["--num_layers", 1, "--num_attention_heads", 2, "--attention_head_dim", 12, "--sample_frames", 4]
SHORT = ["--train_batch_size", 4, "--max_train_steps", 2, "--checkpointing_steps", 2, "--mixed_precision", "no"]


def write_robot(root, seed, episodes=3, cameras=2, width=32):
    """Write clips of the IRASim release with a square that moves by the first two action components."""
    generator = np.random.default_rng(seed)
    (root / "annotation" / "train").mkdir(parents=True)
    for number in range(episodes):
        poses = np.cumsum(generator.normal(size=(9, 7)) * 0.05, axis=0)
        frames = np.full((9, 16, width, 3), 220, dtype=np.uint8)
        for frame, (x, y, *_) in zip(frames, poses, strict=True):
            row, column = int(6 + 20 * x) % 12, int(14 + 20 * y) % (width - 4)
            frame[row : row + 4, column : column + 4] = (200, 30, 30)
        videos = [f"videos/train/{number}/{camera}.mp4" for camera in range(cameras)]
        for path in videos:
            write_video(root / path, frames, 5, lossless=True)
        annotation = {"states": poses.tolist(), "videos": [{"video_path": path} for path in videos]}
        (root / "annotation" / "train" / f"{number}.json").write_text(json.dumps(annotation))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    root = tmp_path_factory.mktemp("robots")
    write_robot(root / "first", 1)
    write_robot(root / "second", 2, episodes=2)
    write_robot(root / "held-out", 4, episodes=2)
    (root / "second" / "videos" / "train" / "1" / "0.mp4").write_bytes(b"broken")
    tiny_vae().save_pretrained(root / "vae")
    return root


@pytest.fixture(scope="module")
def trained(workspace):
    output = call(
        *("train", "--dataset", workspace / "first", workspace / "second", "--dataset_weights", 1, 3),
        *("--vae", workspace / "vae", "--output_dir", workspace / "model", "--cameras", 0, 1, "--skip_broken"),
        *("--fps", 5, "--action_derivation", "relative_6d", "--frame_skip", 2, "--snr_gamma", 5, *MODEL, *SHORT),
    )
    return workspace / "model", output


def test_two_robots_with_two_cameras_and_derived_actions(trained):
    folder, output = trained
    assert "skipped" in output
    assert "1/0.mp4" in output
    pipeline = IRASimPipeline.from_pretrained(folder)
    config = pipeline.transformer.config
    assert (config.cameras, config.fps, config.action_dim) == ([["0"], ["1"]], 2.5, 10)
    assert (config.action_derivation, pipeline.frame_size) == ("relative_6d", (32, 32))
    video = pipeline(
        np.zeros((32, 32, 3), np.uint8), np.zeros((3, 10)), num_inference_steps=2, output_type="np"
    ).frames
    assert video.shape == (1, 3, 32, 32, 3)


def test_lora_trains_only_adapters_and_action_encoder(workspace, trained):
    base, _ = trained
    call(
        *("train_lora", "--dataset", workspace / "first", "--pretrained_model_name_or_path", base),
        *("--output_dir", workspace / "lora", "--cameras", 0, 1, "--action_derivation", "relative_6d"),
        *("--lora_rank", 3, "--lora_alpha", 6, "--learning_rate", 0.01, *SHORT),
    )
    state = load_file(workspace / "lora" / "pytorch_lora_weights.safetensors")
    assert all(key.startswith("transformer.") for key in state)
    assert {key.split(".")[1] for key in state if "lora" not in key} == {"action_embed", "null_action"}
    assert not (workspace / "lora" / "model_index.json").exists()

    def predict(pipeline):
        generator = torch.Generator().manual_seed(0)
        frame = np.zeros((32, 32, 3), np.uint8)
        return pipeline(frame, np.ones((3, 10)), num_inference_steps=2, generator=generator, output_type="pt").frames

    pipeline = IRASimPipeline.from_pretrained(base)
    before = {name: value.clone() for name, value in pipeline.transformer.state_dict().items()}
    plain = predict(pipeline)
    pipeline.load_lora_weights(workspace / "lora")
    adapted = predict(pipeline)
    assert not torch.allclose(plain, adapted)
    for name, value in pipeline.transformer.state_dict().items():
        own = name.replace(".base_layer", "")
        if "lora" not in name and not own.startswith(("action_embed", "null_action")):
            assert torch.equal(value, before[own])
    assert pipeline.transformer.peft_config["default_0"].lora_alpha == 6
    pipeline.unload_lora_weights()
    torch.testing.assert_close(predict(pipeline), plain)


def test_pretrained_model_with_other_autoencoder_and_patch_size(workspace, trained):
    sampled = IRASimPipeline.from_pretrained(trained[0])
    sampled.scheduler = DDIMScheduler.from_config(sampled.scheduler.config, timestep_spacing="trailing")
    sampled.register_to_config(num_inference_steps=3)
    sampled.save_pretrained(workspace / "sampled")
    flat = AutoencoderKL(block_out_channels=(4,), norm_num_groups=1, latent_channels=3, mid_block_add_attention=False)
    flat.save_pretrained(workspace / "flat")  # latents with twice the size and another number of channels
    flags = ["train", "--dataset", workspace / "first", "--cameras", 0, 1, "--action_derivation", "relative_6d"]
    flags += SHORT
    with pytest.raises(ValueError, match=r"`vae` must have the same latents .*`irasim adapt --model .*sampled --vae"):
        call(*flags, "--pretrained", workspace / "sampled", "--output_dir", "none", "--vae", workspace / "flat")
    with pytest.raises(ValueError, match=r"`patch_size` is 2 in .* cannot be changed to 1: .* with `irasim adapt`"):
        call(*flags, "--pretrained", workspace / "sampled", "--output_dir", "none", "--patch_size", 1)
    adapt = ["--model", workspace / "sampled", "--vae", workspace / "flat", "--dataset", workspace / "first"]
    adapt += ["--cameras", 0, 1, "--split", "train", "--patch-size", 2, "--output", workspace / "adapted"]
    assert main(["adapt", *map(str, adapt)]) == 0
    call(
        *flags,
        *("--pretrained_model_name_or_path", workspace / "adapted", "--output_dir", workspace / "finer"),
        "--relative_latents",
    )
    pipeline = IRASimPipeline.from_pretrained(workspace / "finer")
    config = pipeline.transformer.config
    assert (config.in_channels, config.patch_size, config.base_patch_size) == (3, 2, 4)
    assert (config.relative_latents, pipeline.frame_size) == (True, (32, 32))
    assert (pipeline.config.num_inference_steps, pipeline.scheduler.config.timestep_spacing) == (3, "trailing")


def test_unet_in_pixel_space(workspace):
    call(
        *("train", "--dataset", workspace / "first", "--output_dir", workspace / "pixels", "--cameras", 0),
        *("--model", "unet", "--pixel_space", "--block_out_channels", 8, 16, "--sample_frames", 4, *SHORT),
        *("--fps", 5, "--gradient_checkpointing", "--validation_dataset", workspace / "held-out"),
        *("--validation_steps", 2, "--num_validation_clips", 1, "--validation_inference_steps", 1),
    )
    pipeline = IRASimPipeline.from_pretrained(workspace / "pixels")
    assert pipeline.vae is None
    assert (pipeline.transformer.config.in_channels, pipeline.frame_size) == (3, (16, 32))
    assert pipeline.transformer.conv_out.weight.any()
    video = pipeline(np.zeros((16, 32, 3), np.uint8), np.zeros((3, 7)), num_inference_steps=1, output_type="np").frames
    assert video.shape == (1, 3, 16, 32, 3)


def test_pixel_cache_is_lossless(workspace):
    source = IRASimFolder(workspace / "first", cameras=["0"], fps=5)
    clips = LatentClips(cache_latents(source, None, workspace / "pixel-cache"), 4)
    pixels = (clips[0]["latents"].permute(1, 2, 3, 0) + 1) * 127.5
    assert np.array_equal(pixels.round().numpy().astype(np.uint8), source[0].frames[:4])


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
        ({"pixel_space": True}, "`pixel_space` is for a new model: omit `vae`"),
        ({"max_train_minutes": 1, "lr_scheduler": "cosine"}, "`lr_scheduler` must be constant or .* got 'cosine'"),
        ({"snr_gamma": 5, "prediction_type": "flow_prediction"}, "`snr_gamma` must be omitted for flow matching"),
        ({"dataset_weights": [1, 2]}, r"`dataset_weights` must be 1 numbers, one per dataset, got \[1, 2\]"),
        ({"height": 32}, "`height` and `width` must be given together"),
        ({"preset": "S", "pretrained_model_name_or_path": "model"}, "`preset` is for a new model"),
        ({"frame_skip": 2, "target_fps": 5}, "`frame_skip` and `target_fps` are mutually exclusive"),
        ({"terminal_share": 1.5}, r"`terminal_share` must be in \[0, 1\], got 1.5"),
        ({"rollout_chunks": -1}, "`rollout_chunks` must be at least 0, got -1"),
        ({"rollout_inference_steps": 0}, "`rollout_inference_steps` must be at least 1, got 0"),
        ({"crop_size": 8, "state_keys": ["joints"]}, "`crop_size` and `state_keys` are mutually exclusive"),
        ({"scale_noisy_latents": True}, "`scale_noisy_latents` must be used with `prediction_type` sample, got None"),
        ({"spatial_position": "area"}, "`spatial_position` must be one of grid, rope, got 'area'"),
        ({"target_extent": [0, 0, 1, 1]}, "`target_extent` must be used with `action_space` absolute, got None"),
        ({"rollout_start_step": 5}, "require `rollout_chunks` > 0, got 0"),
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
        ({"sample_frames": 4, "num_history_frames": 4}, "`sample_frames` must be larger than `num_history_frames`"),
    ],
)
def test_invalid_arguments_raise(changes, message):
    with pytest.raises(ValueError, match=message):
        check_arguments(TrainingArguments(**{"dataset": ["set"], "output_dir": "out", "vae": "vae"} | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"action_scale": [1.0, 2.0]}, r"`action_scale` must be one number, or 7, got \[1.0, 2.0\]"),
        ({"state_keys": ["joints"]}, "has no vector feature 'joints'; it has"),
        (
            {"validation_dataset": "other"},
            r"`validation_dataset` must have frames of size \(16, 32\).*, got \(16, 24\)",
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
    """Ten episodes as a LeRobotDataset and as a table, and ten in the format of the IRASim release."""
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


def test_frames_must_match_the_autoencoder():
    vae = build_vae(VAEArguments(dataset="set", output_dir="out"), 320)
    check_divisible(vae, 176, 320)
    with pytest.raises(ValueError, match=r"sides divisible by 8 .*, got 180x320: .* --height 176 --width 320"):
        check_divisible(vae, 180, 320)


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
    with pytest.raises(ValueError, match="`gradient_accumulation_steps` is 4, and accelerate was launched with 1"):
        train_robot(workspace, "accumulated", "--gradient_accumulation_steps", 4)


def test_autoencoder_of_pretrained_pipeline(tmp_path):
    pipeline = tiny_pipeline()
    pipeline.save_pretrained(tmp_path)
    arguments = TrainingArguments(dataset=["set"], output_dir="out", pretrained_model_name_or_path=str(tmp_path))
    check_arguments(arguments)
    assert torch.equal(load_vae(arguments).encoder.conv_in.weight, pipeline.vae.encoder.conv_in.weight)


def read_log(folder):
    """Read the tensorboard scalars by name."""
    logs = [EventAccumulator(str(events)).Reload() for events in folder.rglob("events.out.*")]
    return {name: [event.value for event in log.Scalars(name)] for log in logs for name in log.Tags()["scalars"]}


@contextlib.contextmanager
def local_hub(home):
    """Local Hub server with a separate cache."""
    hub = HubServer()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(home),
            "HF_TOKEN": "hf_local",
            "HF_HUB_OFFLINE": "0",
        }.items():
            patch.setenv(name, value)
        yield hub
    hub.close()


def robot_flags(workspace, output):
    return [
        *("--dataset", workspace / "first", "--vae", workspace / "vae", "--output_dir", workspace / output),
        *("--cache_dir", workspace / "shared-latents", "--cameras", 0, 1, *MODEL, *SHORT),
    ]


def train_robot(workspace, output, *arguments, launch=None):
    flags = [*robot_flags(workspace, output), *arguments]
    return run("train.py", *flags, launch=launch) if launch else call("train", *flags)


def test_two_processes_match_one_at_same_global_batch_size(workspace):
    flags = ["--max_train_steps", 5, "--logging_steps", 1, "--report_to", "tensorboard", "--sample_frames", 3]
    flags += ["--num_history_frames", 2, "--rollout_chunks", 4, "--rollout_start_step", 1, "--terminal_share", 0.5]
    flags += ["--history_noise", 0.2, "--learning_rate", 1e-3]
    one = train_robot(workspace, "one", *flags, "--train_batch_size", 4, "--gradient_accumulation_steps", 2)
    two = train_robot(workspace, "two", *flags, "--train_batch_size", 4, launch=TWO)
    assert "1 processes (NO)" in one
    assert "2 processes (MULTI_CPU)" in two
    losses = [read_log(workspace / folder)["loss"] for folder in ("one", "two")]
    assert len(losses[0]) == 5
    np.testing.assert_allclose(*losses, rtol=1e-5)
    states = [IRASimPipeline.from_pretrained(workspace / folder).transformer.state_dict() for folder in ("one", "two")]
    torch.testing.assert_close(*states, rtol=1e-3, atol=1e-5)


def test_crop_contains_motion_and_target():
    """Frames and targets are cropped consistently, by whole patches, around the changing pixel."""
    config = {
        "patch_size": 2,
        "target_extent": [-1.0, 10.0, 11.0, 20.0],
        "sample_width": 12,
        "sample_height": 10,
    }
    generator = torch.Generator().manual_seed(0)
    latents = torch.zeros(50, 1, 3, 10, 12)
    places = torch.stack([torch.randint(0, size, (50,), generator=generator) for size in (10, 12)], dim=1)
    for clip, (row, column) in zip(latents, places.tolist(), strict=True):
        clip[0, :, row, column] = torch.tensor([1.0, 2.0, 3.0])
    targets = places.flip(1) + torch.tensor([-0.5, 10.5])  # the target is the center of the pixel; a pixel is one unit
    actions = torch.cat([targets, torch.full((50, 1), 7.0)], dim=1)[:, None]
    cropped, moved = crop(latents, actions, config, 4, torch.rand(50, 3, generator=generator))
    assert cropped.shape == (50, 1, 3, 4, 4)
    assert (moved[..., 2] == 7).all()
    corners = set()
    for clip, target, place in zip(cropped, moved[:, 0, :2], places, strict=True):
        ((row, column),) = (clip[0, 2] == 3).nonzero().tolist()
        assert clip[0, :, row, column].tolist() == [1, 2, 3]
        torch.testing.assert_close(target, torch.tensor([column - 0.5, row + 10.5]))
        corner = (place - torch.tensor([row, column])).tolist()
        assert all(side % 2 == 0 for side in corner)
        corners.add(tuple(corner))
    assert len(corners) > 10
    draws = torch.rand(1, 3, generator=generator)
    _, same = crop(latents[:1], actions[:1], config | {"target_extent": None}, 4, draws)
    assert torch.equal(same, actions[:1])


def test_prediction_for_crop_matches_whole_frame():
    """The predictions agree away from the border of the crop."""
    settings = {"spatial_position": "rope", "ff_conv": True, "prediction_type": "sample", "action_space": "absolute"}
    model = tiny_transformer(
        **settings, num_layers=1, patch_size=1, sample_height=10, sample_width=12, target_extent=[0, 0, 12, 10]
    )
    for block in [*model.transformer_blocks, *model.temporal_transformer_blocks]:
        torch.nn.init.zeros_(block.attn1.to_out[0].weight)  # disables attention, which reaches beyond the crop
    torch.manual_seed(3)
    latents, actions = torch.randn(2, 4, 3, 10, 12), 6 * torch.rand(2, 1, 3)
    model.register_to_config(num_history_frames=2, sample_frames=3)
    config = dict(model.config)
    cropped, moved = crop(latents, actions, config, 6, torch.full((2, 3), 0.4))
    timestep = torch.tensor([500, 10])
    torch.nn.init.zeros_(model.action_embed.linear_2.weight)  # the embedding depends on the absolute target
    whole, part = model(latents, timestep, actions).sample, model(cropped, timestep, moved).sample
    for number in range(2):
        (top, left) = next(
            (top, left)
            for top in range(5)
            for left in range(7)
            if torch.equal(latents[number, :, :, top : top + 6, left : left + 6], cropped[number])
        )
        inside = whole[number, :, :, top + 1 : top + 5, left + 1 : left + 5]
        torch.testing.assert_close(inside, part[number, :, :, 1:5, 1:5], rtol=1e-4, atol=1e-5)


class TrueFrames(torch.nn.Module):
    """Predicts the change to the next frame of clips that get brighter by one per frame."""

    def __init__(self):
        super().__init__()
        self.histories = []

    def forward(self, hidden_states, timestep, actions, action_mask=None, return_dict=False):
        length = hidden_states.shape[2] - actions.shape[1]
        self.histories.append((hidden_states[:, 0, :length, 0, 0], actions[:, 0, 0]))
        steps = torch.arange(1, actions.shape[1] + 1).view(-1, 1, 1)
        future = torch.zeros_like(hidden_states[:, :, length:]) + steps + self.error
        return (torch.cat([hidden_states[:, :, :length], future], dim=2),)


@pytest.mark.parametrize("length", [1, 2])
def test_training_on_own_rollouts(length):
    """The history consists of predicted frames with matching actions; some clips keep the true history."""
    config = {"num_history_frames": 2, "sample_frames": 2 + length, "conditioning": "frame", "relative_latents": True}
    settings = TrainingArguments(
        dataset=["set"],
        output_dir="out",
        rollout_chunks=3,
        rollout_start_step=1,
        terminal_share=1.0,
        action_dropout=0.0,
    )
    frames = clip_length(config, 3)
    assert frames == 2 + 4 * length
    count = torch.arange(float(frames))
    latents = count.view(1, 1, -1, 1, 1).repeat(40, 3, 1, 2, 2)
    actions = count[1:].view(1, -1, 1).repeat(40, 1, 1)  # row k leads to frame k + 1
    process = noise_process(tiny_transformer(prediction_type="sample").config)
    chunks = set()
    for step in range(12):
        model = TrueFrames()
        model.error = 0.0
        clip = {"latents": latents, "actions": actions}
        loss = training_loss(model, process, clip, config, settings, step=step, position=0)
        assert loss < 1e-8  # each frame is paired with the matching history
        assert step or len(model.histories) == 1  # rollouts start at step 1
        for history, action in model.histories:
            torch.testing.assert_close(action, history[:, -1] + 1)
        chunks.add(len(model.histories))
        model.error, model.histories = 0.25, []
        training_loss(model, process, clip, config, settings, step=step, position=0)
        history, action = model.histories[-1]
        off = history[:, -1] - (action - 1)
        true = off.abs() < 1e-3
        if len(model.histories) == 1:
            assert true.all()
        else:
            assert 0.1 < true.float().mean() < 0.6
            torch.testing.assert_close(off[~true], torch.full_like(off[~true], 0.25 * (len(model.histories) - 1)))
    assert chunks == {1, 2, 3, 4}


def test_rollouts_are_predicted_in_the_crop_of_the_loss():
    config = {"num_history_frames": 2, "sample_frames": 3, "conditioning": "frame", "relative_latents": True}
    config |= {"patch_size": 1, "target_extent": None}
    settings = TrainingArguments(dataset=["set"], output_dir="out", rollout_chunks=3, action_dropout=0.0, crop_size=2)
    process = noise_process(tiny_transformer(prediction_type="sample").config)
    columns = torch.arange(8.0).expand(4, 3, 6, 8, 8)  # every frame shows the column of each pixel, without change
    lengths = set()
    for step in range(6):
        windows = []

        def model(hidden_states, timesteps, actions, windows=windows, **kwargs):
            windows.append(hidden_states)
            return (torch.zeros_like(hidden_states),)

        clip = {"latents": columns, "actions": torch.zeros(4, 5, 1)}
        training_loss(model, process, clip, config, settings, step=step, position=0)
        assert {window.shape[-2:] for window in windows} == {(2, 2)}
        histories = torch.stack([window[:, :, 1] for window in windows])
        torch.testing.assert_close(histories, histories[:1].expand_as(histories))
        lengths.add(len(windows))
    assert len(lengths) > 1


def test_all_weights_have_gradients_after_bfloat16_rollout():
    """Autocast must not reuse weights that were cast without gradient during a rollout."""
    config = {"num_history_frames": 2, "sample_frames": 3, "conditioning": "frame", "relative_latents": True}
    model = tiny_transformer(**config, num_layers=1, prediction_type="sample").train()
    settings = TrainingArguments(dataset=["set"], output_dir="out", rollout_chunks=2, action_dropout=0.0)
    torch.manual_seed(0)
    clip = {"latents": torch.randn(2, 4, 5, 4, 6), "actions": torch.randn(2, 4, 3)}
    process = noise_process(model.config)
    for step in range(8):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            training_loss(model, process, clip, dict(model.config), settings, step=step, position=0).backward()
        missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        assert not missing


def test_compiled_training_matches_eager_training(workspace, monkeypatch):
    # traces and differentiates the graph without generating code, which tests/models/test_model_features.py covers
    compile_module = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", compile_module)
    train_robot(workspace, "eager")
    torch._dynamo.reset()
    train_robot(workspace, "compiled", "--compile")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    eager, compiled = (
        IRASimPipeline.from_pretrained(workspace / folder).transformer.state_dict() for folder in ("eager", "compiled")
    )
    for name, value in eager.items():
        torch.testing.assert_close(compiled[name], value, msg=name)


def test_training_with_validation_and_push_to_hub(workspace):
    with local_hub(workspace / "hf") as hub:
        run(
            *("train.py", *robot_flags(workspace, "logged")),
            *("--report_to", "tensorboard", "--logging_steps", 1, "--fps", 5),
            *("--validation_dataset", workspace / "held-out", "--validation_steps", 2, "--num_validation_clips", 2),
            *("--validation_inference_steps", 2, "--push_to_hub", "--hub_model_id", "lab/arm"),
        )
    video = read_video(workspace / "logged" / "validation" / "step-2.mp4")
    assert video.shape == (3, 64, 64, 3)  # the predictions of two clips side by side, below the ground truth
    log = read_log(workspace / "logged")
    assert {"loss", "learning_rate", "psnr", "psnr_shuffled_actions", "psnr_last_frame"} <= log.keys()
    assert np.isfinite(log["psnr"]).all()
    assert {"model_index.json", "README.md", "pipeline.py"} <= set(hub.repositories["lab/arm"]["main"])


def test_resuming_with_other_settings_raises(workspace):
    train_robot(workspace, "settled")
    with pytest.raises(ValueError, match=r"run with other settings: learning_rate was 0\.0001 and is 1e-05"):
        train_robot(
            workspace, "settled", "--learning_rate", 1e-5, "--dataset", "missing"
        )  # before the data are opened
    train_robot(workspace, "settled", "--logging_steps", 1, "--max_train_steps", 4)
    settings = json.loads((workspace / "settled" / "checkpoint-4" / "settings.json").read_text())
    flags = {each.name for each in dataclasses.fields(TrainingArguments)}
    assert flags & settings.keys() == flags - MAY_CHANGE
    for name in flags & settings.keys():
        with pytest.raises(ValueError, match=f"run with other settings: {name} was"):
            newest_checkpoint(workspace / "settled", {name: "another"})


def test_damaged_checkpoint_is_skipped(workspace):
    output = workspace / "damaged"
    train_robot(workspace, "damaged", "--max_train_steps", 4)
    whole = shutil.copytree(output / "checkpoint-4", workspace / "whole")
    for name in ("settings.json", "model.safetensors", "optimizer.bin", "ema.safetensors", "random_states_0.pkl"):
        (output / "checkpoint-4" / name).write_bytes(b"")  # as after a power failure
        assert newest_checkpoint(output, {}) == output / "checkpoint-2", name
        shutil.copy(whole / name, output / "checkpoint-4" / name)
    (output / "checkpoint-4" / "model.safetensors").unlink()
    log = train_robot(workspace, "damaged", "--max_train_steps", 4)
    assert f"skipped damaged checkpoint {output / 'checkpoint-4'}: model.safetensors is missing" in log
    assert {path.name for path in output.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    assert newest_checkpoint(output, {}) == output / "checkpoint-4"
    for step in (2, 4):
        (output / f"checkpoint-{step}" / "optimizer.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"no checkpoint in .* is complete: checkpoint-4 \(optimizer.bin has 0 bytes"):
        newest_checkpoint(output, {})


def test_training_stops_at_non_finite_loss(workspace):
    arguments = ["--learning_rate", 1e30, "--max_train_steps", 50, "--checkpointing_steps", 1]
    with pytest.raises(FloatingPointError, match=r"^the (loss|gradient norm) is (nan|inf) at step \d+; the"):
        train_robot(workspace, "diverged", *arguments)
    assert not (workspace / "diverged" / "model_index.json").exists()


def test_invalid_input_prints_one_line_and_exits_with_2(workspace, monkeypatch, capsys):
    flags = ["--dataset", workspace / "first", "--vae", workspace / "vae", "--output_dir", workspace / "refused"]
    command = [sys.executable, EXAMPLES / "train.py", *flags, "--cameras", 3]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
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
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command = [*launch, EXAMPLES / "train.py", "--dataset", workspace / "first", "--vae", workspace / "vae"]
    command += ["--output_dir", workspace / "single", *SHORT]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert result.returncode
    assert "starts one process only. Start several with `--config_file" in result.stderr


def test_sigterm_saves_a_checkpoint(workspace):
    output = workspace / "terminated"
    command = [sys.executable, EXAMPLES / "train.py", "--dataset", workspace / "first", "--vae", workspace / "vae"]
    command += ["--output_dir", output, "--cameras", 0, 1, *MODEL, *SHORT, "--max_train_steps", 100_000]
    command += ["--checkpointing_steps", 100_000, "--logging_steps", 1]
    with subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True) as process:
        while "loss=" not in (
            line := process.stderr.readline()
        ):  # until the training loop runs; the progress bar ends in a carriage return
            assert line or process.poll() is None
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
    assert process.returncode == 128 + signal.SIGTERM
    assert "stopped by SIGTERM at step" in rest
    assert "Traceback" not in rest
    assert len(list(output.glob("checkpoint-*"))) == 1


def test_sigterm_of_the_launcher_saves_a_checkpoint_of_two_processes(workspace):
    """After SIGTERM to `accelerate launch`, the same command with fewer steps resumes the training."""
    output = workspace / "preempted"
    command = [sys.executable, "-m", "accelerate.commands.launch", *TWO, EXAMPLES / "train.py"]
    command += [
        "--dataset",
        workspace / "first",
        "--vae",
        workspace / "vae",
        "--output_dir",
        output,
        "--cameras",
        0,
        1,
    ]
    command += [*MODEL, "--train_batch_size", 1, "--mixed_precision", "no", "--checkpointing_steps", 100_000]
    command += ["--cache_dir", workspace / "preempted-latents", "--logging_steps", 1]
    endless = list(map(str, [*command, "--max_train_steps", 100_000]))
    with subprocess.Popen(endless, stderr=subprocess.PIPE, text=True) as process:
        while "loss=" not in (line := process.stderr.readline()):
            assert line or process.poll() is None
        process.send_signal(signal.SIGTERM)
        rest = process.stderr.read()
    assert process.returncode
    assert "stopped by SIGTERM at step" in rest
    (checkpoint,) = output.glob("checkpoint-*")
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    assert not list(output.glob(".*.partial"))
    resumed = subprocess.run(
        list(map(str, [*command, "--max_train_steps", step + 1])), capture_output=True, text=True, check=False
    )
    assert resumed.returncode == 0, resumed.stderr
    assert f"resumed from {checkpoint}" in resumed.stderr
    assert (output / "model_index.json").is_file()


def test_units_of_converted_data_reach_the_model(workspace):
    source = ["--dataset", workspace / "first", "--cameras", "0", "--split", "train", "--fps", 5]
    flags = [*source, "--output", workspace / "converted"]
    assert main(["data", *map(str, flags)]) == 0
    call(
        *("train", "--dataset", workspace / "converted", "--pixel_space", "--patch_size", 8, *MODEL, *SHORT),
        *("--output_dir", workspace / "with-units", "--max_train_steps", 1),
    )
    config = IRASimPipeline.from_pretrained(workspace / "with-units").transformer.config
    units = LeRobotFolder(workspace / "converted").action_units
    assert config.action_units == units
    assert units[:3] == ["m", "m", "m"]


def test_zero_does_not_count_as_an_omitted_argument(workspace):
    """An explicit `--action_frequencies 0` is compared with the pretrained model, although 0 == False."""
    tiny_transformer(action_frequencies=2).save_pretrained(workspace / "octaves")
    flags = {"dataset": ["set"], "output_dir": "out", "pretrained_model_name_or_path": str(workspace / "octaves")}
    with pytest.raises(
        ValueError, match=r"`action_frequencies` is 2 in .* cannot be changed to 0: omit it, or change it"
    ):
        train.load_pretrained(TrainingArguments(**flags, action_frequencies=0))
    assert train.load_pretrained(TrainingArguments(**flags)).config.action_frequencies == 2


def test_sample_prediction_trains_and_predicts(workspace):
    train_robot(workspace, "sample", "--prediction_type", "sample", "--snr_gamma", 5)
    pipeline = IRASimPipeline.from_pretrained(workspace / "sample")
    pipeline(np.zeros((32, 32, 3), np.uint8), np.zeros((3, 7)), num_inference_steps=2)


def test_action_scale_from_data_for_new_action_encoder(workspace):
    """For models without a trained action encoder, such as converted Open-Sora weights."""
    transformer = tiny_transformer(
        num_layers=1, action_dim=7, action_scale=1.0, action_offset=0.0, sample_frames=4, num_history_frames=1
    )
    torch.nn.init.zeros_(transformer.action_embed.linear_2.weight)
    transformer.save_pretrained(workspace / "foreign")
    train_robot(workspace, "tuned", "--pretrained", workspace / "foreign", "--max_train_steps", 1)
    config = IRASimPipeline.from_pretrained(workspace / "tuned").transformer.config
    assert config.action_dim == len(config.action_scale) == 7
    assert min(config.action_scale) > 1


def test_other_number_of_action_components(workspace):
    tiny_pipeline(num_layers=1, action_dim=5, action_scale=1.0, action_offset=0.0, sample_frames=4).save_pretrained(
        workspace / "five"
    )
    with pytest.raises(
        ValueError, match=r"must have 5 action components like .*, got 7: .*`irasim adapt --action-dim 7`"
    ):
        call(
            "train",
            "--dataset",
            workspace / "first",
            "--pretrained",
            workspace / "five",
            "--cameras",
            0,
            1,
            *SHORT,
            "--output_dir",
            workspace / "none",
        )
    assert (
        main(["adapt", "--model", str(workspace / "five"), "--action-dim", "7", "--output", str(workspace / "seven")])
        == 0
    )
    train_robot(
        *(workspace, "tuned-five", "--pretrained", workspace / "seven", "--sample_frames", 4),
        *("--num_history_frames", 1, "--max_train_steps", 1),
    )
    config = IRASimPipeline.from_pretrained(workspace / "tuned-five").transformer.config
    assert config.action_dim == len(config.action_scale) == 7
    assert min(config.action_scale) > 1


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
    """Yield the page, program and flags of the training commands in the guides."""
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


@pytest.mark.gpu
@pytest.mark.parametrize(("config", "kind"), [("fsdp2", "FSDP"), ("zero2", "DEEPSPEED")])
def test_sharded_training_resumes(workspace, config, kind):
    if config == "zero2":
        pytest.importorskip("deepspeed")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIGS / f"{config}.yaml"]
    launch += ["--num_processes", torch.cuda.device_count(), EXAMPLES / "train.py"]
    for steps in (2, 4):
        arguments = [
            *("--dataset", workspace / "first", "--vae", workspace / "vae", "--output_dir", workspace / config),
            *("--cameras", 0, 1, *MODEL, *SHORT, "--max_train_steps", steps, "--mixed_precision", "bf16"),
        ]
        done = subprocess.run([*map(str, launch + arguments)], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        assert f"({kind})" in done.stdout + done.stderr
    assert "resumed from" in done.stdout + done.stderr
    state = IRASimPipeline.from_pretrained(workspace / config).transformer.state_dict()
    assert all(torch.isfinite(tensor).all() for tensor in state.values())


def train_on_clips(name, folder, *arguments):
    """Train 40 steps on real clips, check that the loss decreases, and return the pipeline."""
    tiny_vae().save_pretrained(folder / "vae")
    call(
        *("train", "--dataset", CLIPS / name, "--vae", folder / "vae", "--output_dir", folder / "model"),
        *(*MODEL, *SHORT, "--max_train_steps", 40, "--learning_rate", 1e-2, "--max_grad_norm", 1),
        *("--report_to", "tensorboard", "--logging_steps", 1, *arguments),
    )
    losses = read_log(folder / "model")["loss"]
    assert np.mean(losses[-10:]) < 0.9 * np.mean(losses[:10]), losses
    return IRASimPipeline.from_pretrained(folder / "model")


@needs_clips
@pytest.mark.parametrize(("cameras", "size"), [(["2"], (24, 40)), (["0", "1", "2"], (72, 40))])
def test_real_robot_with_one_and_three_cameras(cameras, size, tmp_path):
    flags = ["--fps", 5, "--max_train_episodes", 1, "--height", size[0], "--width", size[1], "--cameras", *cameras]
    pipeline = train_on_clips("droid", tmp_path, *flags)
    config = pipeline.transformer.config
    assert (config.cameras, config.fps, pipeline.frame_size) == ([[camera] for camera in cameras], 5, size)
    assert (config.action_derivation, config.action_space) == ("relative_euler", "relative")
    assert config.action_names == ["x", "y", "z", "roll", "pitch", "yaw", "gripper"]


@needs_clips
def test_recorded_latents_of_real_clips(tmp_path):
    """Train on a Language-Table clip with its released latents."""
    flags = ["--split", "test", "--recorded_latents", "--fps", 10, "--action_scale", 20, "--action_offset", 0]
    pipeline = train_on_clips("language_table", tmp_path, *flags, "--sample_frames", 8, "--train_batch_size", 2)
    config = pipeline.transformer.config
    assert (config.sample_height, config.sample_width, config.action_dim) == (36, 64, 2)
    assert (config.action_names, config.action_derivation) == (["x", "y"], "recorded")


def test_streamed_dataset_matches_local_folder(workspace):
    """A streamed and resumed run gives the same weights as an uninterrupted run from disk."""
    root = workspace / "files"
    write_folder(root)

    def train_files(dataset, output, *arguments, start=run):
        return start(
            *(
                "train.py" if start is run else "train",
                "--dataset",
                dataset,
                "--vae",
                workspace / "vae",
                "--output_dir",
                workspace / output,
            ),
            *("--patch_size", 1, *MODEL, *SHORT, "--max_train_steps", 4, *arguments),
        )

    train_files(root, "from-disk", start=call)
    with local_hub(workspace / "streaming") as hub:
        files = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.*") if path.is_file()}
        pinned = ["--streaming", "--dataset_revision", hub.commit("datasets/lab/files", files)]
        output = train_files("lab/files", "streamed", *pinned, "--max_train_steps", 2)
        assert "12 windows of 3 episodes, 0 episodes skipped" in output
        hub.commit("datasets/lab/files", {"README.md": b"edited"})
        assert "resumed from" in train_files("lab/files", "streamed", *pinned)
    fetched = [request.split("/")[-1] for request in hub.requests if request.startswith("GET") and ".mp4" in request]
    assert fetched == [f"file-{number:03d}.mp4" for number in (0, 1, 0)], (
        "each file is downloaded once, plus one download for the frame size"
    )
    assert not list((workspace / "streaming").rglob("*.mp4"))
    expected, streamed = (
        IRASimPipeline.from_pretrained(workspace / folder).transformer for folder in ("from-disk", "streamed")
    )
    for name, value in expected.state_dict().items():
        assert torch.equal(streamed.state_dict()[name], value), name


def test_killed_and_resumed_run_matches_uninterrupted_run(workspace):
    """Checkpoints are written every step, so that some runs are killed while writing one."""

    def arguments(output):
        return [
            *("train.py", "--dataset", workspace / "first", "--vae", workspace / "vae", "--output_dir", output),
            *("--cache_dir", workspace / "kill-latents", "--cameras", 0, 1, *MODEL, *SHORT),
            *("--max_train_steps", STEPS, "--checkpointing_steps", 1, "--gradient_accumulation_steps", 2),
        ]

    script, *flags = arguments(workspace / "steady")
    call(script.removesuffix(".py"), *flags)
    output, generator = workspace / "killed", np.random.default_rng(11)

    def newest():
        return max((int(path.name.split("-")[1]) for path in output.glob("checkpoint-*")), default=0)

    reached = [0]
    for _ in range(3):
        script, *rest = arguments(output)
        command = [sys.executable, str(EXAMPLES / script)]
        process = subprocess.Popen(
            [*command, *map(str, rest)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        while process.poll() is None and newest() <= reached[-1]:
            time.sleep(0.01)
        time.sleep(generator.uniform(0, 0.3))
        os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        reached.append(newest())
    assert reached == sorted(set(reached)), "every run makes progress"
    assert reached[-1] < STEPS, "the last run was killed before the end"
    call(script.removesuffix(".py"), *arguments(output)[1:])
    expected, resumed = (
        IRASimPipeline.from_pretrained(folder).transformer for folder in (workspace / "steady", output)
    )
    for name, value in expected.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name
    assert not list(output.glob("partial-*"))


def test_last_step_has_a_checkpoint(workspace):
    train_robot(workspace, "last", "--max_train_steps", 2, "--checkpointing_steps", 100)
    assert [path.name for path in (workspace / "last").glob("checkpoint-*")] == ["checkpoint-2"]
