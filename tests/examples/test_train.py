"""Training on robot clips, in this process and with `accelerate launch`."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler
from fork_server import ForkServer, fork_server
from hub_server import HubServer
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_lerobot import write_folder
from test_pusht import EXAMPLES, call, output_of
from tiny_models import tiny_pipeline, tiny_transformer, tiny_vae

from irasim_diffusers import IRASimPipeline
from irasim_diffusers.cli import main
from irasim_diffusers.data import IRASimFolder, LatentClips, LeRobotFolder, cache_latents, read_video, write_video

CLIPS = Path(os.environ.get("IRASIM_TEST_DATA", "/nonexistent"))
needs_clips = pytest.mark.skipif(not CLIPS.is_dir(), reason="IRASIM_TEST_DATA is not a folder of robot clips")
CONFIGS = EXAMPLES / "accelerate_configs"
TWO = ["--config_file", str(CONFIGS / "cpu.yaml")]
MODEL = ["--num_layers", 1, "--num_attention_heads", 2, "--attention_head_dim", 12, "--sample_frames", 4]
SHORT = ["--train_batch_size", 4, "--max_train_steps", 2, "--checkpointing_steps", 2, "--mixed_precision", "no"]


def write_robot(root, seed, episodes=3, cameras=2, width=32):
    """Write clips in the IRASim release format; a square moves by the first two components of the states."""
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


def write_workspace(root):
    """Write clips of two robots, the second with a broken video, held-out clips, and an autoencoder."""
    write_robot(root / "first", 1)
    write_robot(root / "second", 2, episodes=2)
    write_robot(root / "held-out", 4, episodes=2)
    (root / "second" / "videos" / "train" / "1" / "0.mp4").write_bytes(b"broken")
    tiny_vae().save_pretrained(root / "vae")
    return root


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return write_workspace(tmp_path_factory.mktemp("robots"))


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


def test_tiny_autoencoder_is_trained_on_crops(workspace):
    call(
        *("train_vae", "--dataset", workspace / "first", "--cameras", 0, "--output_dir", workspace / "tiny", "--tiny"),
        *("--block_out_channels", 8, 8, "--latent_channels", 5, "--crop_size", 8, "--latent_std", 0.5, *SHORT),
    )
    flags = [
        *("train", "--dataset", workspace / "first", "--vae", workspace / "tiny", "--cameras", 0, "--fps", 5),
        *("--output_dir", workspace / "on-tiny", "--cache_dir", workspace / "tiny-latents"),
        *("--patch_size", 1, "--spatial_position", "rope", *MODEL, *SHORT),
    ]
    with pytest.raises(ValueError, match="`crop_size` must be at most the smaller side of the 8x16 latents, got 9"):
        call(*flags, "--crop_size", 9)
    assert not (workspace / "tiny-latents").exists()
    assert not (workspace / "on-tiny").exists()
    call(*flags, "--crop_size", 4)
    pipeline = IRASimPipeline.from_pretrained(workspace / "on-tiny")
    assert isinstance(pipeline.vae, AutoencoderTiny)
    config = pipeline.transformer.config
    assert (config.in_channels, config.sample_height, config.sample_width) == (5, 8, 16)
    frames = IRASimFolder(workspace / "first", cameras=["0"], fps=5)[0].frames
    latents = pipeline.encode_history(pipeline.preprocess_frames(frames[:1]))[0]
    assert 0.2 < latents.std() < 1
    cached = LatentClips(next((workspace / "tiny-latents").iterdir()), 4)[0]["latents"][:, :1]
    torch.testing.assert_close(cached * pipeline.vae.config.scaling_factor, latents, atol=2e-3, rtol=2e-3)


def test_unet_in_pixel_space(workspace):
    call(
        *("train", "--dataset", workspace / "first", "--output_dir", workspace / "pixels", "--cameras", 0),
        *("--model", "unet", "--preset", "VDM", "--pixel_space"),
        *("--block_out_channels", 8, 16, "--sample_frames", 4, *SHORT),  # a flag takes precedence over the preset
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


def read_log(folder):
    """Read the tensorboard scalars by name."""
    logs = [EventAccumulator(str(events)).Reload() for events in folder.rglob("events.out.*")]
    return {name: [event.value for event in log.Scalars(name)] for log in logs for name in log.Tags()["scalars"]}


@pytest.fixture(scope="module")
def local_hub(workspace):
    """Local Hub server, and a server of processes that use it, with a separate cache."""
    hub = HubServer()
    variables = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(workspace / "hf"), "HF_TOKEN": "hf_local"}
    processes = ForkServer(variables | {"HF_HUB_OFFLINE": "0"})
    yield hub, processes
    processes.close()
    hub.close()


def robot_flags(workspace, output):
    return [
        *("--dataset", workspace / "first", "--vae", workspace / "vae", "--output_dir", workspace / output),
        *("--cache_dir", workspace / "shared-latents", "--cameras", 0, 1, *MODEL, *SHORT),
    ]


def train_robot(workspace, output, *arguments):
    return call("train", *robot_flags(workspace, output), *arguments)


def test_two_processes_match_one_at_same_global_batch_size(workspace):
    flags = ["--max_train_steps", 5, "--logging_steps", 1, "--report_to", "tensorboard", "--sample_frames", 3]
    flags += ["--num_history_frames", 2, "--rollout_chunks", 4, "--rollout_start_step", 1, "--terminal_share", 0.5]
    flags += ["--history_noise", 0.2, "--learning_rate", 1e-3]
    one = train_robot(workspace, "one", *flags, "--train_batch_size", 4, "--gradient_accumulation_steps", 2)
    command = [EXAMPLES / "train.py", *robot_flags(workspace, "two"), *flags, "--train_batch_size", 4]
    two = [output_of(rank) for rank in fork_server().run_ranks(*command)]
    assert "1 processes (NO)" in one
    assert "2 processes (MULTI_CPU)" in two[0]
    losses = [read_log(workspace / folder)["loss"] for folder in ("one", "two")]
    assert len(losses[0]) == 5
    np.testing.assert_allclose(*losses, rtol=1e-5)
    states = [IRASimPipeline.from_pretrained(workspace / folder).transformer.state_dict() for folder in ("one", "two")]
    torch.testing.assert_close(*states, rtol=1e-3, atol=1e-5)


def test_compiled_training_matches_eager_training(workspace, monkeypatch):
    # traces and differentiates the graph, but generates no code
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


def test_training_with_validation_and_push_to_hub(workspace, local_hub):
    hub, processes = local_hub
    process = processes.run(
        *(EXAMPLES / "train.py", *robot_flags(workspace, "logged")),
        *("--report_to", "tensorboard", "--logging_steps", 1, "--fps", 5),
        *("--validation_dataset", workspace / "held-out", "--validation_steps", 2, "--num_validation_clips", 2),
        *("--validation_inference_steps", 2, "--push_to_hub", "--hub_model_id", "lab/arm"),
    )
    output_of(process)
    video = read_video(workspace / "logged" / "validation" / "step-2.mp4")
    assert video.shape == (3, 64, 64, 3)  # the predictions of two clips side by side, below the ground truth
    log = read_log(workspace / "logged")
    assert {"loss", "learning_rate", "psnr", "psnr_shuffled_actions", "psnr_last_frame"} <= log.keys()
    assert np.isfinite(log["psnr"]).all()
    assert {"model_index.json", "README.md", "pipeline.py"} <= set(hub.repositories["lab/arm"]["main"])


def test_training_stops_at_non_finite_loss(workspace):
    arguments = ["--learning_rate", 1e30, "--max_train_steps", 50, "--checkpointing_steps", 1]
    with pytest.raises(FloatingPointError, match=r"^the (loss|gradient norm) is (nan|inf) at step \d+; the"):
        train_robot(workspace, "diverged", *arguments)
    assert not (workspace / "diverged" / "model_index.json").exists()


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


def test_sample_prediction_trains_and_predicts(workspace):
    train_robot(workspace, "sample", "--prediction_type", "sample", "--snr_gamma", 5)
    pipeline = IRASimPipeline.from_pretrained(workspace / "sample")
    assert pipeline.transformer.config.prediction_type == "sample"
    frame = np.zeros((32, 32, 3), np.uint8)
    video = pipeline(frame, np.zeros((3, 7)), num_inference_steps=2, output_type="np").frames
    assert video.shape == (1, 3, 32, 32, 3)
    assert np.isfinite(video).all()


def test_action_scale_from_data_for_new_action_encoder(workspace):
    """Converted Open-Sora weights, for example, have no trained action encoder."""
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
        ValueError,
        match=r"must have 5 action components, as many as .*, got 7: change .*`irasim adapt --action-dim 7`",
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
    """Train for 40 steps on real clips, check that the loss decreases, and return the pipeline."""
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


def test_streamed_dataset_matches_local_folder(workspace, local_hub):
    """A streamed and resumed run gives the same weights as an uninterrupted run from disk."""
    root = workspace / "files"
    write_folder(root)

    def train_files(dataset, output, *arguments):
        flags = ["--dataset", dataset, "--vae", workspace / "vae", "--output_dir", workspace / output]
        flags += ["--patch_size", 1, *MODEL, *SHORT, "--max_train_steps", 4, *arguments]
        return call("train", *flags) if dataset == root else output_of(processes.run(EXAMPLES / "train.py", *flags))

    hub, processes = local_hub
    train_files(root, "from-disk")
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
    assert not list((workspace / "hf").rglob("*.mp4"))
    expected, streamed = (
        IRASimPipeline.from_pretrained(workspace / folder).transformer for folder in ("from-disk", "streamed")
    )
    for name, value in expected.state_dict().items():
        assert torch.equal(streamed.state_dict()[name], value), name
