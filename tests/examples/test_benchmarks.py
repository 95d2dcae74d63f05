"""Tests of the benchmark scripts that train and compare several models."""

import json
from types import SimpleNamespace

import conditioning
import data
import numpy as np
import PIL.Image
import pytest
import scaling
from fork_server import run_forked
from scipy import stats
from test_train import write_robot

from irasim_diffusers.data import open_dataset


def test_scaling_trains_once_and_plots(tmp_path, monkeypatch, capsys):
    write_robot(tmp_path / "robot", 1, episodes=2, cameras=1)
    write_robot(tmp_path / "held-out", 2, episodes=1, cameras=1)
    arguments = [
        *("scaling.py", "--output_dir", tmp_path / "runs", "--sizes", "1x2x12", "--intervals", 2),
        *("--dataset", tmp_path / "robot", "--validation_dataset", tmp_path / "held-out", "--pixel_space"),
        *("--num_validation_clips", 1, "--validation_inference_steps", 1, "--validation_steps", 1, "--fps", 5),
        *("--sample_frames", 4, "--train_batch_size", 2, "--max_train_steps", 3, "--mixed_precision", "no"),
    ]
    monkeypatch.setattr("sys.argv", [*map(str, arguments)])
    monkeypatch.setattr("example_runs.subprocess", SimpleNamespace(run=run_forked))
    scaling.main()
    assert "| 1x2x12 | " in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "runs" / "scaling.json").read_text())["rows"]
    assert [step for step, _ in row["loss"]] == [2, 3]
    assert [step for step, _ in row["psnr"]] == [1, 2, 3]
    assert np.isfinite([value for name in ("loss", "psnr") for _, value in row[name]]).all()
    assert PIL.Image.open(tmp_path / "runs" / "scaling.png").width > 1000
    weights = tmp_path / "runs" / "1x2x12" / "transformer" / "diffusion_pytorch_model.safetensors"
    before = weights.stat().st_mtime_ns
    scaling.main()
    assert weights.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("size", "flags"),
    [
        ("XL", ["--preset", "XL"]),
        ("4x3x64", ["--num_layers", "4", "--num_attention_heads", "3", "--attention_head_dim", "64"]),
    ],
)
def test_size_flags(size, flags):
    assert scaling.size_flags(size) == flags


@pytest.mark.parametrize("size", ["M", "4x3", "4x3x", "4x3x6.4"])
def test_invalid_sizes_raise(size):
    with pytest.raises(
        ValueError, match=r"`sizes` must be presets \(S, B, L, XL, VDM, LVDM\) or sizes such as 4x3x64, got"
    ):
        scaling.size_flags(size)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "`validation_dataset` is required"),
        (["--validation_dataset=data"], "`sizes` must be"),
        (["--validation_dataset", "data"], "`sizes` must be"),
    ],
)
def test_scaling_requires_a_validation_dataset(flags, message, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["scaling.py", "--output_dir", str(tmp_path), "--sizes", "M", *flags])
    with pytest.raises(ValueError, match=message):
        scaling.main()


def test_averaged_uses_equal_intervals():
    assert scaling.averaged({1: 4.0, 2: 2.0, 3: 1.0, 4: 0.0}, 2) == [[2, 3.0], [4, 0.5]]
    assert scaling.averaged({7: 4.0}, 20) == [[7, 4.0]]


def make_run(model, seed, psnr, history=1):
    report = {
        "clip_psnr": {"mean": psnr, "low": psnr - 1, "high": psnr + 1},
        "last_frame": {"moving": {"pusher": {"median": 2.0, "low": 1.0, "high": 3.0}}},
    }
    figures = conditioning.read_figures(report)
    return {
        "model": model,
        "num_history_frames": history,
        "seed": seed,
        "parameters": 5,
        "steps": 10 + seed,
        "evaluations": 1.0,
        "figures": figures,
    }


def test_intervals_over_seeds_and_paired_differences():
    first, second = [25.0, 24.0, 26.5], [24.0, 23.5, 25.0]
    runs = [make_run("Frame-Ada", seed, value) for seed, value in enumerate(first)]
    runs += [make_run("LVDM", seed, value) for seed, value in enumerate(second)]
    rows, (difference,) = conditioning.compare(runs)
    assert [(row["model"], row["seeds"], row["steps"]) for row in rows] == [("Frame-Ada", 3, 11), ("LVDM", 3, 11)]
    for found, values in ((rows[0], first), (rows[1], second), (difference, np.subtract(first, second))):
        interval = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
        np.testing.assert_allclose([found["clip_psnr"]["low"], found["clip_psnr"]["high"]], interval)
    assert difference["model"] == "Frame-Ada - LVDM"
    text = conditioning.tables(rows, [difference], runs)
    assert "| LVDM | 1 | 3 | 5 | 11 | 1 | 24.167 [" in text
    assert "| Frame-Ada - LVDM | 1 | 3 | 1.000 [" in text
    assert "| LVDM | 1 | 2 | 12 | 25.000 [24.000, 26.000] |" in text


def test_one_seed_uses_interval_over_clips():
    rows, differences = conditioning.compare([make_run("Frame-Ada", 0, 25.0), make_run("LVDM", 0, 24.0)])
    assert rows[0]["clip_psnr"] == {"value": 25.0, "low": 24.0, "high": 26.0}
    assert rows[0]["last_frame/moving/pusher"]["value"] == 2
    assert "identification" not in rows[0]
    assert differences[0]["clip_psnr"] == {"value": 1.0}


def test_histories_are_compared_per_model():
    values = {
        ("Frame-Ada", 1): (24.0, 25.0),
        ("LVDM", 1): (23.0, 23.5),
        ("LVDM", 2): (25.0, 24.5),
        ("Frame-Ada", 2): (26.0, 28.0),
    }
    runs = [
        make_run(model, seed, value, history)
        for (model, history), pair in values.items()
        for seed, value in enumerate(pair)
    ]
    _, differences = conditioning.compare(runs)
    assert [(row["model"], row["num_history_frames"], row["clip_psnr"]["value"]) for row in differences] == [
        ("Frame-Ada - LVDM", 1, 1.25),
        ("LVDM - Frame-Ada", 2, -2.25),
        ("LVDM", "2 - 1", 1.5),
        ("Frame-Ada", "2 - 1", 2.5),
    ]
    assert "| LVDM | 2 - 1 | 2 | 1.500 [" in conditioning.tables([], differences, runs)


def test_turns_alternate_models():
    assert conditioning.turns(["A", "B"], 1, 0.1) == [("A", 0.1), ("B", 0.1)]
    assert conditioning.turns(["A", "B"], 2, 5) == [("A", 2.5), ("B", 2.5), ("A", 5), ("B", 5)]


def test_model_flags(tmp_path):
    arguments = conditioning.ConditioningArguments(
        tmp_path, "set", 1, transformer_flags="--a 1", video_ada_flags="--b 2", unet_flags="--c 3"
    )
    assert conditioning.model_flags(arguments, ["--d", "4"]) == {
        "Frame-Ada": ["--d", "4", "--conditioning", "frame", "--a", "1"],
        "Video-Ada": ["--d", "4", "--conditioning", "video", "--a", "1", "--b", "2"],
        "LVDM": ["--d", "4", "--model", "unet", "--c", "3"],
    }


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        (conditioning, ["--models", "GAN"], "`models` must be among Frame-Ada, Video-Ada, LVDM, got GAN"),
        (conditioning, ["--rounds", "0"], "`rounds` must be at least 1, got 0"),
        (conditioning, ["--max_train_steps", "5"], "`max_train_steps` must be omitted: `max_train_minutes`"),
        (conditioning, ["--max_train_steps=5"], "`max_train_steps` must be omitted: `max_train_minutes`"),
        (conditioning, ["--unet_flags=--max-train-steps=5"], "`max_train_steps` must be omitted: `max_train_minutes`"),
        (conditioning, ["--timestep_spacing", "trailing"], "`timestep_spacing` requires `scheduler`: also pass"),
        (conditioning, ["--num_clips", "0"], "`num_clips` must be at least 1, got 0"),
        (conditioning, ["--dtype", "int8"], "`dtype` must be one of float32, bfloat16, got 'int8'"),
        (
            conditioning,
            ["--unet_flags=--max_train_steps 5"],
            "`max_train_steps` must be omitted: `max_train_minutes`",
        ),
        (conditioning, ["--unet_flags='"], "No closing quotation"),
        (scaling, ["--sizes", "1x2x12"], "`validation_dataset` is required: the PSNR"),
    ],
)
def test_invalid_flags_raise(tmp_path, monkeypatch, script, flags, message):
    needed = ["--test_dataset", "set", "--max_train_minutes", "1"] if script is conditioning else []
    monkeypatch.setattr("sys.argv", [script.__file__, "--output_dir", str(tmp_path), *needed, *flags])
    with pytest.raises(ValueError, match=message):
        script.main()


def test_models_of_a_seed_are_trained_in_alternating_rounds():
    assert conditioning.turns(["a", "b"], 2, 1.0) == [("a", 0.5), ("b", 0.5), ("a", 1.0), ("b", 1.0)]


def test_episodes_shorter_than_a_window_raise(tmp_path):
    write_robot(tmp_path, 1, cameras=1)
    with pytest.raises(ValueError, match="must have an episode of at least 10 frames, got at most 9"):
        data.measure_decoding(open_dataset(tmp_path), 10, 0.1)
