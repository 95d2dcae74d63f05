import re

import numpy as np
import PIL.Image
import pytest
import torch
from tiny_models import tiny_pipeline
from transformers import ResNetConfig, ResNetModel

from irasim_diffusers import IRASimPipeline, embedded_checkpoint
from irasim_diffusers.cli import main
from irasim_diffusers.commands.files import read_actions
from irasim_diffusers.data import read_video, write_video
from irasim_diffusers.rewards import FrameRegressor

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with tiny models, pictures, a video, regressors and an encoder."""
    root = tmp_path_factory.mktemp("plan")
    tiny_pipeline(num_inference_steps=1).save_pretrained(root / "model")
    bounds = {"action_low": [-9.0, -9.0, -9.0], "action_high": [9.0, 9.0, 9.0]}
    tiny_pipeline(num_inference_steps=1, action_space="absolute", **bounds).save_pretrained(root / "absolute")
    rng = np.random.default_rng(0)
    video = rng.integers(0, 256, (4, 8, 12, 3), dtype=np.uint8)
    PIL.Image.fromarray(video[0]).save(root / "frame.png")
    PIL.Image.fromarray(video[1]).save(root / "goal.png")
    PIL.Image.fromarray(video[1]).resize((24, 20)).save(root / "large.png")
    PIL.Image.fromarray(video[1, ..., 0].astype(np.uint16)).save(root / "depth.png")
    write_video(root / "video.mp4", video, 5, lossless=True)
    torch.manual_seed(0)
    FrameRegressor(8, 12, channels=(4,), feature_dim=3).save_pretrained(root / "reward")
    FrameRegressor(16, 16, channels=(4,), feature_dim=3).save_pretrained(root / "other")
    sizes = {"embedding_size": 4, "hidden_sizes": [4], "depths": [1], "layer_type": "basic"}
    ResNetModel(ResNetConfig(**sizes)).save_pretrained(root / "encoder")
    return root


SMALL = {"--model": "model", "--frames": "frame.png", "--goal": "goal.png", "--horizon": "5", "--candidates": "3"}
SMALL |= {"--iterations": "2"}


def plan(folder, monkeypatch, output, **changes):
    monkeypatch.chdir(folder)
    flags = SMALL | {"--" + name.replace("_", "-"): value for name, value in changes.items()}
    flags["--output"] = str(output)
    return main(["plan", *(text for name, value in flags.items() if value is not None for text in (name, value))])


CASES = {
    "cem": {},
    "cem-knots": {"knots": "2"},
    "mppi": {"planner": "mppi", "frames": "video.mp4"},
    "gradient": {"planner": "gradient", "candidates": None},
    "lines": {"planner": "lines", "radius": "2", "iterations": None},
    "reward": {"goal": None, "reward": "reward"},
    "encoder": {"encoder": "encoder"},
    "absolute": {"model": "absolute", "position": "1,2,3"},
}


@pytest.mark.parametrize("name", CASES)
def test_plan_writes_actions_video_and_strip(name, folder, tmp_path, monkeypatch, capsys):
    output = tmp_path / "out.mp4"
    assert plan(folder, monkeypatch, output, **CASES[name]) == 0
    printed = capsys.readouterr()
    found = re.match(r"score (-?[\d.]+), best of (\d+) candidates of 5 actions", printed.out)
    counts = {"gradient": 1, "lines": 3}
    assert int(found[2]) == counts.get(name, 1 + 2 * 3 + 1)  # the start, both iterations and the final mean
    scored = {"gradient": 1 + 2}.get(name, int(found[2]))
    assert f" {scored}/{scored} [" in printed.err
    actions = read_actions(tmp_path / "out.csv")
    assert actions.shape == (5, 3)
    seen = 2 if name == "mppi" else 1
    assert len(read_video(output)) == seen + 5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.csv", "out.mp4", "out.png"]


def test_plan_of_the_embedded_model_is_executed_by_generate(tmp_path, monkeypatch, capsys):
    """Drive the pusher: the goal is a frame that the model predicts itself."""
    monkeypatch.chdir(tmp_path)
    video = read_video(embedded_checkpoint() / "example.mp4")
    targets = read_actions(embedded_checkpoint() / "example_actions.csv")
    pipeline = IRASimPipeline.from_pretrained(embedded_checkpoint())
    history = pipeline.transformer.config.num_history_frames
    goal = pipeline(video[:history], targets[:2]).frames[0][-1]
    goal.save("goal.png")
    PIL.Image.fromarray(video[0]).save("frame.png")
    position = ",".join(str(value) for value in targets[0])
    flags = ["--frames", "frame.png", "--horizon", "2"]
    flags += ["--goal", "goal.png", "--position", position, "--candidates", "8", "--iterations", "2", "--knots", "1"]
    assert main(["plan", *flags]) == 0
    score = float(re.match(r"score (-?[\d.]+)", capsys.readouterr().out)[1])
    frame = np.asarray(PIL.Image.open("frame.png")) / 255
    assert score > -0.5 * ((frame - np.asarray(goal) / 255) ** 2).mean()
    assert main(["generate", "--frames", "frame.png", "--actions", "irasim-plan.csv", "--output", "run.mp4"]) == 0
    assert len(read_video("run.mp4")) == 3


BAD = [
    ({"frames": None}, "--frames is required"),
    ({"frames": "missing.png"}, "--frames must be an image or video file, got 'missing.png'"),
    ({"horizon": "1000000000"}, "--horizon must be at most 1000, got 1000000000"),
    ({"candidates": "1000000000"}, "--candidates must be at most 10000, got 1000000000"),
    ({"goal": None}, "pass exactly one of --goal and --reward"),
    ({"reward": "reward"}, "pass exactly one of --goal and --reward"),
    ({"goal": "missing.png"}, "--goal must be an image or video file, got 'missing.png'"),
    ({"goal": "depth.png"}, "--goal must be a readable image: image 'depth.png' has mode 'I;16'"),
    ({"goal": "large.png"}, "--goal must be 8x12 .* got 20x24: pass --resize"),
    ({"goal": None, "reward": "nowhere"}, "--reward must be a FrameRegressor, got 'nowhere'"),
    ({"goal": None, "reward": "model"}, "--reward must be a FrameRegressor, got 'model'"),
    ({"goal": None, "reward": "other"}, "--reward must be for frames of 8x12"),
    ({"goal": None, "reward": "reward", "encoder": "encoder"}, "--encoder requires --goal"),
    ({"encoder": "nowhere"}, "--encoder must be a vision model, got 'nowhere'"),
    ({"horizon": "0"}, "--horizon must be at least 1, got 0"),
    ({"candidates": "0"}, "--candidates must be at least 1, got 0"),
    (
        {"candidates": "0", "planner": "lines", "radius": "1", "iterations": None},
        "--candidates must be at least 1, got 0",
    ),
    ({"iterations": "0"}, "--iterations must be at least 1, got 0"),
    ({"std": "nan"}, "--std must be positive and finite, got nan"),
    ({"std": "-1"}, "--std must be positive and finite"),
    ({"knots": "9"}, r"--knots must be None or in \[1, 5\], got 9"),
    ({"batch_size": "0"}, "--batch-size must be at least 1, got 0"),
    ({"planner": "lines", "iterations": None}, "--planner lines requires --radius"),
    ({"planner": "lines", "radius": "0", "iterations": None}, "--radius must be positive and finite, got 0"),
    ({"planner": "lines", "radius": "nan", "iterations": None}, "--radius must be positive and finite, got nan"),
    (
        {"planner": "gradient", "candidates": "-5"},
        "--candidates is not supported by --planner gradient .*cem, mppi",
    ),
    ({"planner": "gradient", "candidates": None, "std": "nan"}, "--std is not supported by --planner gradient"),
    ({"planner": "gradient", "candidates": None, "knots": "-3"}, "--knots is not supported by --planner gradient"),
    ({"radius": "-1"}, "--radius is not supported by --planner cem .only by lines"),
    ({"knots": "-3"}, "--knots must be at least 1, got -3"),
    ({"model": "absolute"}, "--position is required for absolute targets"),
    ({"position": "1,2"}, "--position must be 3 finite numbers separated by commas, got '1,2'"),
    ({"position": "1,2,x"}, "--position must be 3 finite numbers"),
    ({"position": "1,2,nan"}, "--position must be 3 finite numbers"),
    ({"position": "1,2,1e30"}, "--position must be near the bounds of this checkpoint"),
    *(
        (
            {"model": "absolute", "position": f"1,2,{value}"},
            f"--position must be inside the bounds of its components, .-9, 9., .-9, 9., .-9, 9., got '1,2,{value}'",
        )
        for value in ("10", "1e30")
    ),
    ({"steps": "0"}, "--steps must be at least 1, got 0"),
    (
        {"model": "nowhere"},
        "--model must be .* got 'nowhere': the folder does not exist, and the model is not .{,60}$",
    ),
    ({"model": "runs/nothing"}, "--model must be .*: the folder does not exist, and the model is not .{,60}$"),
    ({"model": "a/b/c"}, "--model must be .* is neither a valid local path nor a valid repo id"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input_ends_in_one_line_and_exits_with_2(change, message, folder, tmp_path, monkeypatch, capsys):
    assert plan(folder, monkeypatch, tmp_path / "out.mp4", **change) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.match(f"irasim: error: .*{message}", captured.err.strip().splitlines()[-1])
    assert "Traceback" not in captured.err
    assert not list(tmp_path.iterdir())
