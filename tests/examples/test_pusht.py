"""End-to-end tests of the Push-T example: real simulator and tiny networks."""

import contextlib
import importlib
import io
import json
import logging
import shutil
import signal
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import collect
import conditioning
import convolutional
import embed
import evaluate
import numpy as np
import pytest
import torch
import train_vae as train_vae_script
from accelerate.state import AcceleratorState, GradientState
from collect import TASKS
from fork_server import fork_server, run_forked
from huggingface_hub import DatasetCard
from poses import pose_errors, read_poses, true_poses
from simulator import Simulator

from irasim_diffusers import IRASimPipeline, embedded_checkpoint
from irasim_diffusers.cli import main
from irasim_diffusers.data import LeRobotFolder, read_video

EXAMPLES = Path(__file__).parents[2] / "examples"
SIZES = ["--num_layers", "1", "--num_attention_heads", "2", "--attention_head_dim", "12", "--train_batch_size", "4"]
SHARES = ["--aimless", "0.5", "--expert", "0.25", "--noisy", "0.25", "--keys", "0", "--jumps", "0"]
SPACE = ["--action_offset", "256", "--action_scale", "0.03125", "--action_space", "absolute"]


def run(script, *arguments):
    """Run a script in a new process; return its output."""
    return output_of(fork_server().run(EXAMPLES / script, *arguments))


def output_of(process):
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout + process.stderr


def call(script, *arguments):
    """Run the main function of a script in this process, and return what it prints and logs."""
    output, root = io.StringIO(), logging.getLogger()
    handler, level = logging.StreamHandler(output), root.level
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    root.addHandler(handler)
    _reset_accelerate()  # an earlier test may have initialized accelerate
    try:
        with (
            pytest.MonkeyPatch.context() as patch,
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(output),
        ):
            patch.setattr("sys.argv", [f"{script}.py", *map(str, arguments)])
            importlib.import_module(script).main()
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        for number, previous in handlers.items():
            signal.signal(number, previous)
        _reset_accelerate()
    return output.getvalue()


def _reset_accelerate():
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    root = tmp_path_factory.mktemp("pusht")
    call("collect", "--output", root / "set", "--episodes", 3, "--length", 60, "--first_seed", 5, *SHARES)
    for rank in fork_server().run_ranks(EXAMPLES / "train_vae.py", *vae_flags(root, "vae")):
        output_of(rank)
    return root


def vae_flags(root, output, *arguments):
    return [
        *("--dataset", root / "set", "--output_dir", root / output, "--max_train_steps", 6, "--frames_per_episode", 5),
        *("--block_out_channels", 32, 32, 32, 32, "--checkpointing_steps", 3, "--validation_steps", 3),
        *("--train_batch_size", 4, *arguments),
    ]


def train(root, output, *arguments):
    return call(
        *("train", "--dataset", root / "set", "--vae", root / "vae", "--output_dir", root / output, *SIZES, *SPACE),
        *("--cache_dir", root / "latents", "--prediction_type", "v_prediction", "--num_history_frames", 2, *arguments),
    )


def weights(folder):
    return IRASimPipeline.from_pretrained(folder).transformer.state_dict()


def test_collected_episodes_match_simulator(workspace):
    folder = LeRobotFolder(workspace / "set")
    assert (len(folder), folder.fps, folder.info["robot_type"]) == (3, 10, "gym_pusht")
    simulator = Simulator()
    for number, episode in enumerate(folder):
        frames, states = simulator.replay(5 + number, episode.actions[:-1])
        assert np.array_equal(frames, episode.frames)
        blocks = np.stack([state.block for state in states]).astype(np.float32)
        assert np.array_equal(blocks, episode.states["observation.environment_state"])


def test_collect_skips_existing_files(workspace):
    video = workspace / "set" / "videos" / "observation.image" / "chunk-000" / "file-000.mp4"
    before = video.stat().st_mtime_ns
    call("collect", "--output", workspace / "set", "--episodes", 3, "--length", 60, "--first_seed", 5, *SHARES)
    assert video.stat().st_mtime_ns == before


def test_collect_adds_episodes(workspace, tmp_path):
    shutil.copytree(workspace / "set", tmp_path / "set")
    call("collect", "--output", tmp_path / "set", "--episodes", 4, "--length", 60, "--first_seed", 5, *SHARES)
    before, after = LeRobotFolder(workspace / "set"), LeRobotFolder(tmp_path / "set")
    assert (len(after), after.info["total_episodes"], after.info["total_frames"]) == (4, 4, 240)
    for number in range(3):
        assert np.array_equal(after[number].frames, before[number].frames)
        assert np.array_equal(after[number].actions, before[number].actions)
    frames, _ = Simulator().replay(8, after[3].actions[:-1])
    assert np.array_equal(frames, after[3].frames)
    assert "4 episodes" in (tmp_path / "set" / "README.md").read_text()


def test_card_counts_policies(workspace):
    card = DatasetCard.load(workspace / "set" / "README.md")
    tasks = [row["tasks"][0] for row in LeRobotFolder(workspace / "set").rows]
    for kind, task in TASKS.items():
        assert f"| {kind} | {tasks.count(task)} |" in card.text
    assert "LeRobot" in card.data.tags


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--aimless", "1"], "`aimless` 0.5, not 1.0: use"),
        (["--first_seed", "6", "--length", "90"], "`length` 60, not 90, `first_seed` 5, not 6: use"),
        (["--episodes", "2"], "`episodes` 3, not 2: use"),
        (["--episodes", "4", "--length", "90"], "`episodes` 3, not 4, `length` 60, not 90: use"),
        (
            ["--pusher_radius", "30", "--expert", "0", "--noisy", "0"],
            "`expert` 0.25, not 0.0, .*`pusher_radius` 15.0, not 30.0",
        ),
        (["--pusher_radius", "30"], "`expert` and `noisy` must be 0, got 0.25 and 0.25"),
        (["--pusher_radius", "0"], "must be positive, got 0"),
        (["--aimless", "-1"], "must be non-negative shares"),
        (["--length", "0"], "`length` must be at least 1, got 0"),
        (["--num_workers", "0"], "`num_workers` must be at least 1, got 0"),
        (["--keys", "nan"], "`keys` must be finite, got nan"),
    ],
)
def test_collect_rejects_changed_or_invalid_settings(workspace, monkeypatch, changes, message):
    original = ["--output", str(workspace / "set"), "--episodes", "3", "--length", "60", "--first_seed", "5", *SHARES]
    monkeypatch.setattr(sys, "argv", ["collect.py", *original, *changes])
    with pytest.raises(ValueError, match=message):
        collect.main()


def test_collect_rejects_folder_without_settings_file(tmp_path, monkeypatch):
    (tmp_path / "meta").mkdir()
    monkeypatch.setattr(sys, "argv", ["collect.py", "--output", str(tmp_path)])
    with pytest.raises(ValueError, match="no settings file"):
        collect.main()


def test_collect_leaves_no_settings_file_after_invalid_arguments(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["collect.py", "--output", str(tmp_path / "set"), "--episodes", "-5"])
    with pytest.raises(ValueError, match="`episodes` must be at least 1, got -5"):
        collect.main()
    assert not (tmp_path / "set").exists()


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    root = tmp_path_factory.mktemp("pusht") / "changed"
    run(
        *("pusht/collect.py", "--output", root, "--episodes", 4, "--length", 60, "--first_seed", 5, *SHARES),
        *("--aimless", 1, "--expert", 0, "--noisy", 0, "--keys", 0, "--jumps", 0, "--pusher_radius", 30),
    )
    return LeRobotFolder(root)


def test_collect_with_other_pusher_radius(changed):
    assert "pusher's radius is 30 arena units" in DatasetCard.load(changed.root / "README.md").text
    for number, episode in enumerate(changed):
        frames, states = Simulator(30.0).replay(5 + number, episode.actions[:-1])
        assert np.array_equal(frames, episode.frames)
        blocks = np.stack([state.block for state in states]).astype(np.float32)
        assert np.array_equal(blocks, episode.states["observation.environment_state"])
        assert not np.array_equal(Simulator().replay(5 + number, episode.actions[:-1])[0], frames)


def test_identification_uses_pusher_radius_of_dataset(changed):
    task = evaluate.identification_tasks(changed, 1, 10, 2, 5, 30.0)[0]
    seen, sequences, futures = evaluate.counterfactuals(task)
    assert (seen.shape, sequences.shape, futures.shape) == ((2, 96, 96, 3), (8, 8, 2), (8, 8, 96, 96, 3))
    recorded = changed[task.seed - 5].frames
    assert np.array_equal(seen, recorded[task.start - 1 : task.start + 1])
    assert np.array_equal(futures[0], recorded[task.start + 1 : task.start + 9])
    for wrong in ({"pusher_radius": 15.0}, {"seed": task.seed + 100}):
        with pytest.raises(ValueError, match="`first_seed` and `pusher_radius` must match the dataset"):
            evaluate.counterfactuals(replace(task, **wrong))


def test_poses_from_pixels(workspace):
    for episode in LeRobotFolder(workspace / "set"):
        read = read_poses(episode.frames[::6])
        true = true_poses(episode.states["observation.state"], episode.states["observation.environment_state"])
        true = type(true)(true.pusher[::6], true.block[::6])
        assert read.found.all()
        errors = pose_errors(read, true)
        assert np.median(errors["pusher"]) < 0.2
        assert np.median(errors["block_centre"]) < 0.3
        assert np.median(errors["block_angle"]) < 1
        assert errors["block_centre"].max() < 1


def test_missing_poses_are_nan(workspace):
    frame = LeRobotFolder(workspace / "set")[0].frames[0]
    pale = (frame // 2 + 127).astype(np.uint8)
    halves = np.where(np.arange(96)[:, None, None] % 8 < 4, frame, 255).astype(np.uint8)
    read = read_poses(np.stack([np.full_like(frame, 255), pale, halves]))
    assert not read.found.any()
    assert np.isnan(read.block[0]).all()
    assert np.isnan(read.pusher[0]).all()


def test_trained_vae_config(workspace):
    config = json.loads((workspace / "vae" / "config.json").read_text())
    assert 0.1 < config["scaling_factor"] < 100
    assert config["scaling_factor"] != 0.18215
    assert {path.name for path in (workspace / "vae").glob("checkpoint-*")} == {"checkpoint-3", "checkpoint-6"}


def test_train_vae_rejects_folder_of_another_run(workspace, monkeypatch):
    flags = vae_flags(workspace, "vae", "--latent_channels", 8, "--kl_weight", 0.5)
    monkeypatch.setattr(sys, "argv", ["train_vae.py", *map(str, flags)])
    with pytest.raises(ValueError, match=r"other settings: latent_channels was 4 and is 8, kl_weight was"):
        train_vae_script.main()


def test_pretrained_vae_is_read_from_a_subfolder(tmp_path):
    arguments = train_vae_script.VAEArguments(dataset="-", output_dir="-", block_out_channels=[32, 32])
    vae = train_vae_script.build_vae(arguments, 16)
    vae.save_pretrained(tmp_path / "vae")
    arguments = replace(arguments, pretrained=f"{tmp_path}:vae", freeze_encoder=True)
    loaded = train_vae_script.build_vae(arguments, 16)
    torch.testing.assert_close(loaded.state_dict(), vae.state_dict())
    trained = {name.split(".")[0] for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert trained == {"decoder", "post_quant_conv"}
    with pytest.raises(
        ValueError, match="`pretrained` must be the folder or Hub id of an AutoencoderKL or AutoencoderTiny, got"
    ):
        train_vae_script.build_vae(replace(arguments, pretrained=str(tmp_path)), 16)


@pytest.fixture(scope="module")
def trained(workspace):
    shutil.copytree(workspace / "set", workspace / "held-out")
    train(
        *(workspace, "whole", "--max_train_steps", 6, "--checkpointing_steps", 2, "--validation_steps", 6),
        *(
            "--validation_dataset",
            workspace / "held-out",
            "--num_validation_clips",
            2,
            "--validation_inference_steps",
            2,
        ),
        *("--validation_split", "train[:2]"),
    )
    return workspace / "whole"


def test_training_saves_action_space_in_config(trained):
    config = IRASimPipeline.from_pretrained(trained).transformer.config
    assert (config.sample_height, config.sample_width, config.sample_frames) == (12, 12, 16)
    assert (config.action_dim, config.action_names, config.action_space) == (2, ["target_x", "target_y"], "absolute")
    assert (config.action_offset, config.action_scale, config.prediction_type) == (256, 0.03125, "v_prediction")
    assert sorted(path.name for path in trained.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]


def test_resuming_is_exact(workspace, trained):
    train(workspace, "parts", "--max_train_steps", 6, "--checkpointing_steps", 2)
    for name in ("checkpoint-6", "transformer"):
        path = workspace / "parts" / name
        path.rename(path.with_name(f"unused-{name}"))
    (workspace / "parts" / "partial-5").mkdir()  # an incomplete checkpoint
    output = train(workspace, "parts", "--max_train_steps", 6, "--checkpointing_steps", 2)
    assert "checkpoint-4" in output
    assert not (workspace / "parts" / "partial-5").exists()
    for name, tensor in weights(trained).items():
        assert torch.equal(weights(workspace / "parts")[name], tensor), name


def test_resuming_is_exact_with_all_objectives_and_muon(workspace):
    flags = ["--optimizer", "muon", "--sample_frames", 4, "--num_history_frames", 2, "--gradient_checkpointing"]
    flags += ["--rollout_chunks", 2, "--rollout_start_step", 2, "--history_noise", 0.2, "--terminal_share", 0.6]
    flags += ["--state_keys", "observation.state", "observation.environment_state", "--state_angles", "block_angle"]
    train(workspace, "muon", "--max_train_steps", 4, "--checkpointing_steps", 4, *flags)
    train(workspace, "muon-parts", "--max_train_steps", 4, "--checkpointing_steps", 2, *flags)
    for name in ("checkpoint-4", "transformer"):
        path = workspace / "muon-parts" / name
        path.rename(path.with_name(f"unused-{name}"))
    assert "checkpoint-2" in train(workspace, "muon-parts", "--max_train_steps", 4, *flags)
    for name, tensor in weights(workspace / "muon").items():
        assert torch.equal(weights(workspace / "muon-parts")[name], tensor), name


def recipe(root):
    return [
        *("--cache_dir", root / "frames", "--max_train_steps", 2, "--train_batch_size", 2),
        *("--rollout_chunks", 2, "--action_dropout", 0, "--dataset", root / "set"),
    ]


@pytest.fixture(scope="module")
def targets(workspace):
    """Pipeline in pixel space, trained with the flags of the recipe."""
    run(
        *("train.py", *recipe(workspace), "--output_dir", workspace / "targets", *SPACE, "--pixel_space"),
        *("--patch_size", 16, "--num_layers", 1, "--num_attention_heads", 2, "--attention_head_dim", 12),
        *("--sample_frames", 3, "--num_history_frames", 2, "--target_extent", 0, 0, 512, 512, "--ff_conv"),
        *("--spatial_position", "rope", "--prediction_type", "sample", "--relative_latents", "--scale_noisy_latents"),
        *("--terminal_share", 0.7, "--crop_size", 64, "--optimizer", "muon", "--attention_backend", "_native_math"),
    )
    return workspace / "targets"


def test_recipe_of_embedded_model(workspace, targets):
    """The trained model can also be fine-tuned with LoRA, and with more action components and moving layers."""
    pipeline = IRASimPipeline.from_pretrained(targets)
    config = pipeline.transformer.config
    assert (config.target_extent, config.ff_conv, config.spatial_position) == ([0, 0, 512, 512], True, "rope")
    assert config.activation_fn == "gelu"
    assert (type(pipeline.scheduler).__name__, pipeline.config.num_inference_steps) == ("DDIMScheduler", 1)
    assert pipeline.vae is None
    assert 0 <= min(config.action_low) < max(config.action_high) <= 512
    assert pipeline(np.zeros((96, 96, 3), np.uint8), np.zeros((4, 2)), output_type="np").frames.shape == (
        1,
        4,
        96,
        96,
        3,
    )
    call(
        *("train_lora", *recipe(workspace), "--output_dir", workspace / "targets-lora"),
        *("--pretrained", targets, "--rank", 2, "--crop_size", 64),
    )
    pipeline.load_lora_weights(workspace / "targets-lora")
    changes = ["--action-dim", "3", "--moving-layers", "2"]
    assert main(["adapt", "--model", str(targets), "--output", str(workspace / "adapted"), *changes]) == 0
    call(
        *("train", *recipe(workspace), "--output_dir", workspace / "states", "--pretrained", workspace / "adapted"),
        *("--pad_actions_to", 3),
    )
    changed = IRASimPipeline.from_pretrained(workspace / "states").transformer.config
    assert (changed.action_dim, changed.target_extent, changed.moving_layers) == (3, None, 2)


def test_video_ada_with_flow_matching(workspace):
    flags = ["--conditioning", "video", "--prediction_type", "flow_prediction"]
    train(workspace, "video", "--max_train_steps", 2, *flags)
    pipeline = IRASimPipeline.from_pretrained(workspace / "video")
    assert (pipeline.transformer.config.conditioning, pipeline.transformer.config.fps) == ("video", 10)
    pipeline(np.zeros((2, 96, 96, 3), np.uint8), np.zeros((14, 2)), num_inference_steps=1)


def test_evaluation_measures_the_autoencoder(workspace, trained):
    call(
        *("evaluate", "--model", trained, "--dataset", workspace / "set", "--output", workspace / "latents.json"),
        *("--num_inference_steps", 1, "--num_clips", 2, "--num_histories", 0, "--num_drives", 0),
    )
    figures = json.loads((workspace / "latents.json").read_text())
    assert figures["clip_psnr"]["n"] == 2
    assert figures["vae_psnr"]["n"] > 0


def test_evaluation_reports_all_metrics(workspace, targets):
    report = workspace / "report.json"
    call(
        *("evaluate", "--model", targets, "--dataset", workspace / "set", "--output", report),
        *("--num_clips", 2, "--num_histories", 1, "--first_seed", 5, "--num_seen_frames", 2, "--num_drives", 1),
    )
    figures = json.loads(report.read_text())
    assert figures["clip_psnr"]["n"] == 2
    assert figures["identification"]["predictions"] == 8
    assert 0 <= figures["identification"]["mean"] <= 1
    assert set(figures["driving"]) == {"0.25", "0.5", "1"}
    for driving in figures["driving"].values():
        assert driving["one_pusher"]["n"] == 1
        assert 0 <= driving["one_pusher"]["mean"] <= 1
        assert 0 < driving["one_pusher_frames"] <= 60
        assert set(driving["psnr_by_frame"]) == {"1", "15", "30", "60"}
    assert "evaluate.py" in figures["setting"]["command"]


def test_convolutional_baseline_trains_resumes_and_is_evaluated(workspace):
    folder = workspace / "convolutional"
    flags = ["pusht/convolutional.py", "--dataset", workspace / "set", "--output_dir", folder, "--channels", 8]
    flags += ["--rollout_chunks", 2, "--crop_size", 64, "--train_batch_size", 2, "--cache_dir", workspace / "frames"]
    run(*flags, "--max_train_steps", 2, "--learning_rate", 0.01)
    assert "checkpoint-2" in call("convolutional", *flags[1:], "--max_train_steps", 3, "--learning_rate", 0.01)
    assert (folder / "checkpoint-3").is_dir()
    with pytest.raises(ValueError, match=r"learning_rate was 0\.01"):
        call("convolutional", *flags[1:], "--max_train_steps", 4, "--learning_rate", 0.02)
    model = IRASimPipeline.from_pretrained(folder).transformer
    assert isinstance(model, convolutional.ConvolutionalModel)
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    window, action = torch.zeros(1, 3, 3, 96, 96), torch.tensor([[[200.0, 300.0]]])
    moved = model(window, None, action + torch.tensor([512 / 24, 0.0])).sample
    still = model(window, None, action).sample
    assert not still[:, :, :2].any()
    torch.testing.assert_close(moved[..., 48:, 48:60], still[..., 48:, 44:56], rtol=1e-3, atol=1e-3)
    run(  # in a new process, which has not imported the module of the network
        *("pusht/evaluate.py", "--model", folder, "--dataset", workspace / "set", "--output", folder / "report.json"),
        *("--num_clips", 2, "--num_histories", 0, "--num_drives", 0, "--num_history_frames", 2),
    )
    assert json.loads((folder / "report.json").read_text())["clip_psnr"]["n"] == 2


def test_embedding_changes_the_package_only_at_the_end(workspace, trained, tmp_path, monkeypatch):
    target = tmp_path / "package" / "pusht"
    shutil.copytree(embedded_checkpoint(), target)
    before = {path: path.read_bytes() for path in target.rglob("*") if path.is_file()}
    monkeypatch.setattr("embed.embedded_checkpoint", lambda: target)

    def run_embed(*flags):
        command = ["embed.py", "--model", trained, "--dataset", workspace / "set", *flags]
        monkeypatch.setattr("sys.argv", [*map(str, command)])
        embed.main()

    for flags, message in (
        (["--episode", 3], r"`episode` must be in 0\.\.2, got 3"),
        (["--start", 60, "--num_actions", 5], "`start` plus 7 frames must be at most 60, .*, got 67"),
        (["--num_actions", 0], "`num_actions` must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            run_embed(*flags)
    monkeypatch.setattr(embed, "film_strip", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_embed("--num_actions", 5)
    assert before == {path: path.read_bytes() for path in target.rglob("*") if path.is_file()}
    monkeypatch.undo()
    monkeypatch.setattr("embed.embedded_checkpoint", lambda: target)
    run_embed("--episode", 1, "--start", 53, "--num_actions", 5)
    assert np.array_equal(read_video(target / "example.mp4"), LeRobotFolder(workspace / "set")[1].frames[53:60])
    assert len((target / "example_actions.csv").read_text().splitlines()) == 6
    assert IRASimPipeline.from_pretrained(target).vae is not None
    assert (target / "README.md").read_bytes() == before[target / "README.md"]
    assert [path.name for path in target.parent.iterdir()] == ["pusht"]


def test_unet_is_trained_for_given_time_and_evaluated(workspace, monkeypatch, capsys):
    arguments = [
        *("conditioning.py", "--output_dir", workspace / "conditioning", "--models", "LVDM", "--seeds", 3),
        *("--max_train_minutes", 1e-3, "--rounds", 1, "--num_history_frames", 1, 2),
        *("--test_dataset", workspace / "set"),
        *("--num_inference_steps", 1, "--num_clips", 1, "--num_histories", 0, "--scheduler", "DDIMScheduler"),
        *("--dataset", workspace / "set", "--vae", workspace / "vae", *SPACE),
        "--unet_flags=--block_out_channels 8 16",
        *("--train_batch_size", 2, "--mixed_precision", "no"),
    ]
    monkeypatch.setattr("sys.argv", [*map(str, arguments)])
    monkeypatch.setattr("example_runs.subprocess", SimpleNamespace(run=run_forked))
    conditioning.main()
    report = json.loads((workspace / "conditioning" / "conditioning.json").read_text())
    assert report["flags"]["LVDM"][-2:] == ["8", "16"]
    assert [(each["model"], each["num_history_frames"]) for each in report["rows"]] == [("LVDM", 1), ("LVDM", 2)]
    row = report["rows"][1]
    assert row["seeds"] == 1
    runs = [json.loads(path.read_text()) for path in sorted(workspace.glob("conditioning/LVDM-*/report-*.json"))]
    assert [run["setting"]["num_seen_frames"] for run in runs] == [2, None]
    for name in ("clip_psnr_last_frame", "vae_psnr"):  # both runs are scored on the same frames
        assert runs[0][name] == runs[1][name]
    assert "| LVDM | 2 | 1 | " in capsys.readouterr().out
    folder = workspace / "conditioning" / "LVDM-history-2-seed-3"
    config = IRASimPipeline.from_pretrained(folder).transformer.config
    assert (config.block_out_channels, config.num_history_frames, config.action_scale) == ([8, 16], 2, 0.03125)
    steps = int(row["steps"])
    assert json.loads((folder / f"checkpoint-{steps}" / "settings.json").read_text())["seconds"] >= 0.06
