import json
import re

import av
import numpy as np
import PIL.Image
import pytest
import torch
from conftest import tiny_pipeline
from test_conversion import latte_model

from irasim_diffusers import IRASimPipeline, embedded_checkpoint
from irasim_diffusers.cli import main
from irasim_diffusers.commands.files import read_actions
from irasim_diffusers.data import read_video, write_video
from irasim_diffusers.metrics import psnr


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """A folder with a tiny model, a video, a picture and actions; the current folder of the command."""
    monkeypatch.chdir(tmp_path)
    tiny_pipeline().save_pretrained("model")
    rng = np.random.default_rng(0)
    video = rng.integers(0, 256, (6, 8, 12, 3), dtype=np.uint8)
    write_video("video.mp4", video, 5, lossless=True)
    write_video("short.mp4", video[:1], 5, lossless=True)
    PIL.Image.fromarray(video[0]).save("frame.png")
    PIL.Image.fromarray(video[0]).convert("RGBA").save("rgba.png")
    PIL.Image.fromarray(video[0]).convert("L").save("gray.png")
    PIL.Image.fromarray(video[0, ..., 0].astype(np.uint16)).save("gray16.png")
    PIL.Image.fromarray(video[0]).resize((24, 20)).save("large.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    (tmp_path / "folder.mp4").mkdir()
    actions = rng.normal(size=(4, 3))
    np.save("actions.npy", actions)
    np.save("flat.npy", actions[0])
    np.save("wide.npy", np.zeros((4, 2)))
    np.save("empty.npy", np.zeros((0, 3)))
    np.save("nan.npy", np.where(np.arange(12).reshape(4, 3) == 7, np.nan, actions))
    np.save("inf.npy", np.where(np.arange(12).reshape(4, 3) == 7, np.inf, actions))
    np.save("objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savetxt("actions.csv", actions, delimiter=",", header="x,y,z", comments="")
    (tmp_path / "text.csv").write_text("x,y,z\n1,2,three\n")
    (tmp_path / "actions.json").write_text(json.dumps({"actions": actions.tolist()}))
    (tmp_path / "plain.json").write_text(json.dumps(actions.tolist()))
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "actions.txt").write_text("1 2 3")
    return tmp_path


def generate(*arguments):
    return main(["generate", *arguments])


def test_video_and_actions_of_a_user(workspace, capsys):
    assert generate("--model", "model", "--frames", "video.mp4", "--actions", "actions.npy", "--steps", "2") == 0
    out = capsys.readouterr().out
    frames = read_video("irasim.mp4")
    assert len(frames) == 6  # history of two, four predicted
    assert PIL.Image.open("irasim.png").size[0] == 12 * 5
    assert re.search(r"PSNR \d+\.\d\d dB over 4 frames", out)
    assert re.search(r"4 frames in .* s, .* frames/s, 6 network evaluations with PNDMScheduler", out)


def test_picture_and_every_kind_of_actions_give_the_same_video(workspace):
    videos = []
    for kind in ("npy", "csv", "json"):
        arguments = ["--model", "model", "--frames", "frame.png", "--actions", f"actions.{kind}", "--steps", "2"]
        assert generate(*arguments, "--output", f"{kind}.mp4", "--scheduler", "ddim") == 0
        videos.append(read_video(f"{kind}.mp4"))
    assert np.array_equal(videos[0], videos[1])
    assert np.array_equal(videos[0], videos[2])
    assert np.allclose(read_actions(workspace / "plain.json"), read_actions(workspace / "actions.npy"))


def test_seed_and_scheduler_change_the_video(workspace):
    videos = []
    for number, extra in enumerate([[], ["--seed", "1"], ["--scheduler", "euler"]]):
        arguments = ["--model", "model", "--frames", "frame.png", "--actions", "actions.npy", "--steps", "2", *extra]
        assert generate(*arguments, "--output", f"{number}.mp4") == 0
        videos.append(read_video(f"{number}.mp4"))
    assert not np.array_equal(videos[0], videos[1])
    assert not np.array_equal(videos[0], videos[2])


def test_float16_leaves_the_vae_in_float32(workspace):
    pipeline = tiny_pipeline()
    with torch.no_grad():
        pipeline.vae.decoder.conv_in.weight.mul_(1e6)  # beyond float16, as inside SDXL's
    pipeline.save_pretrained("large")
    arguments = ["--model", "large", "--frames", "frame.png", "--actions", "actions.npy", "--steps", "2"]
    videos = []
    for dtype in ("float32", "float16"):
        assert generate(*arguments, "--dtype", dtype, "--output", f"{dtype}.mp4") == 0
        videos.append(read_video(f"{dtype}.mp4").astype(int))
    assert abs(videos[0] - videos[1]).mean() < 1


def frame_rate(path):
    with av.open(str(path)) as container:
        return container.streams.video[0].average_rate


def test_frames_come_at_the_rate_of_the_video_or_of_the_model(workspace):
    tiny_pipeline(fps=3).save_pretrained("slow")
    arguments = ["--actions", "actions.npy", "--steps", "1", "--frames"]
    for model, frames, rate in (("slow", "frame.png", 3), ("slow", "video.mp4", 5), ("model", "frame.png", 10)):
        assert generate("--model", model, *arguments, frames) == 0
        assert frame_rate("irasim.mp4") == rate


def test_a_converted_scheduler_has_the_noise_process_of_the_config(workspace, capsys):
    latte_model(heads=2, head=6, depth=1, patch=2, channels=4, frames=4).save_pretrained("latte")
    arguments = ["--source", "latte", "--checkpoint", "latte", "--vae", "model:vae", "--output", "converted"]
    process = {"prediction_type": "v_prediction", "num_train_timesteps": 500, "beta_end": 0.01, "beta_start": 0.001}
    sizes = {"num_attention_heads": 2, "action_dim": 3, "sample_height": 4, "sample_width": 6}
    config = [f"{name}={json.dumps(value)}" for name, value in (process | sizes).items()]
    assert main(["convert", *arguments, "--config", *config]) == 0, capsys.readouterr().err
    pipeline = IRASimPipeline.from_pretrained("converted")
    pipeline.check_scheduler()
    assert {name: pipeline.scheduler.config[name] for name in process} == process
    arguments = ["--model", "converted", "--frames", "frame.png", "--actions", "actions.npy", "--steps", "3"]
    for scheduler in ("ddim", "ddpm"):  # which clip unless told not to
        assert generate(*arguments, "--scheduler", scheduler) == 0, capsys.readouterr().err
    assert generate(*arguments) == 2
    assert "at least 4 for PNDMScheduler with its Runge-Kutta warm-up, got 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0,1\n58.0,33.5\n54.5,31.0\n", [[58, 33.5], [54.5, 31]]),  # the header of a pandas table without names
        ("0\n0.5\n0.25\n", [[0.5], [0.25]]),
        ("0\n1\n0\n", [[0], [1], [0]]),  # a gripper that closes and opens
        ("0,2\n1,3\n", [[0, 2], [1, 3]]),
        ("x,y\n1,2\n", [[1, 2]]),
    ],
)
def test_headers_of_csv_files_are_not_actions(tmp_path, text, expected):
    (tmp_path / "actions.csv").write_text(text, encoding="utf-8")
    assert read_actions(tmp_path / "actions.csv").tolist() == expected


def test_a_spreadsheets_byte_order_mark_is_no_heading(workspace):
    actions = read_actions(workspace / "actions.npy")
    np.savetxt(workspace / "marked.csv", actions, delimiter=",", encoding="utf-8-sig")
    np.testing.assert_allclose(read_actions(workspace / "marked.csv"), actions)


def test_resize(workspace):
    arguments = ["--model", "model", "--frames", "large.png", "--actions", "actions.npy", "--steps", "1"]
    assert generate(*arguments, "--resize") == 0


GOOD = {"--model": "model", "--frames": "frame.png", "--actions": "actions.npy", "--steps": "2"}
BAD = [
    ({"--actions": "wide.npy"}, r"`actions` must be \(n, 3\) .* got \(4, 2\)"),
    ({"--actions": "flat.npy"}, r"--actions must be \(n, A\), a row a frame, got \(3,\)"),
    ({"--actions": "empty.npy"}, "nothing to predict"),
    ({"--actions": "nan.npy"}, r"`actions` must be finite, got nan at index \(2, 1\)"),
    ({"--actions": "inf.npy"}, "`actions` must be finite, got inf"),
    ({"--actions": "objects.npy"}, "--actions must be a table of numbers"),
    ({"--actions": "text.csv"}, "--actions must be a table of numbers.* line 2: 'three'"),
    ({"--actions": "broken.json"}, "--actions must be a table of numbers"),
    ({"--actions": "actions.txt"}, "--actions must be a .npy, .csv or .json file, got 'actions.txt'"),
    ({"--actions": "missing.npy"}, "--actions must be a file, got 'missing.npy', which does not exist"),
    ({"--actions": None}, "--frames needs --actions"),
    ({"--frames": "large.png"}, r"must be 8x12 .* got 20x24: .*--resize"),
    ({"--frames": "gray16.png"}, "--frames must be an RGB image, got mode I;16"),
    ({"--frames": "gray.png"}, "--frames must be an RGB image, got mode L"),
    ({"--frames": "broken.png"}, "--frames must be a readable image, got 'broken.png'"),
    ({"--frames": "broken.mp4"}, "--frames must be a readable image or video: .*broken.mp4"),
    ({"--frames": "missing.mp4"}, "--frames must be an image or video file, got 'missing.mp4'"),
    ({"--frames": "short.mp4"}, "--frames must hold at least the history of 2 frames, got 1"),
    ({"--frames": "video.mp4", "--history": "0"}, "--history must be at least 1, got 0"),
    ({"--frames": "frame.png", "--history": "-1"}, "--history must be at least 1, got -1"),
    ({"--output": "folder.mp4"}, "--output must be a file, got the directory 'folder.mp4'"),
    ({"--output": "clip.txt"}, "--output must end in .mp4, got 'clip.txt'"),
    ({"--output": "/proc/clip.mp4"}, "--output must be writable, got '/proc/clip.mp4'"),
    ({"--model": "nowhere"}, "--model must be a pipeline folder or Hub id, got 'nowhere'"),
    ({"--scheduler": "flow-euler"}, "`scheduler` must have"),
    ({"--steps": "0"}, "--steps must be at least 1, got 0"),
    ({"--frames": "video.mp4", "--history": "3"}, "--history must be at most 2 for this model, got 3"),
    ({"--device": "abacus"}, "--device must be a device of this machine, got 'abacus'"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input_is_one_line_and_status_2(workspace, capsys, change, message):
    before = sorted(workspace.rglob("*"))
    arguments = [text for name, value in (GOOD | change).items() if value is not None for text in (name, value)]
    assert generate(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert re.match(f"irasim: error: .*{message}", lines[-1])
    assert "Traceback" not in captured.err
    assert sorted(workspace.rglob("*")) == before


def test_unknown_scheduler_is_refused_by_name(workspace, capsys):
    with pytest.raises(SystemExit) as stop:
        generate("--scheduler", "runge")
    assert stop.value.code == 2
    assert "argument --scheduler: invalid choice: 'runge'" in capsys.readouterr().err


def test_the_embedded_model_predicts_its_held_out_clip(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert generate() == 0
    out = capsys.readouterr().out
    found = re.search(r"PSNR ([\d.]+) dB over 60 frames .* last seen frame: ([\d.]+) dB", out)
    assert float(found[1]) > float(found[2]) + 2
    frames = read_video("irasim.mp4")
    assert len(frames) >= 61
    assert frames.shape[2] == 2 * frames.shape[1]


def test_the_embedded_model_follows_actions():
    pipeline = IRASimPipeline.from_pretrained(embedded_checkpoint())
    pipeline.set_progress_bar_config(disable=True)
    video = read_video(embedded_checkpoint() / "example.mp4")
    actions = read_actions(embedded_checkpoint() / "example_actions.csv")
    history = pipeline.transformer.config.num_history_frames
    count = pipeline.transformer.config.sample_frames - history
    truth = video[history : history + count] / 255.0
    candidates = np.stack([actions[:count], actions[count : 2 * count], 512 - actions[:count]])
    frames = pipeline(video[:history], candidates, num_inference_steps=20, output_type="np").frames
    errors = [psnr(candidate, truth) for candidate in frames]
    assert np.argmax(errors) == 0
