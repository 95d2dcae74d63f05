import functools
import json
import re
import shutil
import signal
from argparse import Namespace

import av
import numpy as np
import PIL.Image
import pytest
import torch
from huggingface_hub import HfApi
from peft import LoraConfig, get_peft_model_state_dict
from safetensors import SafetensorError
from test_latte import latte_model
from tiny_models import tiny_pipeline

from irasim_diffusers import IRASimPipeline, IRASimTransformer3DModel, embedded_checkpoint
from irasim_diffusers.cli import main
from irasim_diffusers.commands.files import read_actions, read_media
from irasim_diffusers.commands.history import history_length
from irasim_diffusers.commands.loading import check_weights
from irasim_diffusers.commands.sampling import DTYPE_REMEDY
from irasim_diffusers.data import read_video, write_video
from irasim_diffusers.metrics import psnr


@pytest.fixture
def workspace(tmp_path, monkeypatch):
    """Current folder of the commands, with a tiny model, and good and bad videos, pictures and actions."""
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


def test_generate_from_video_and_actions(workspace, capsys):
    assert generate("--model", "model", "--frames", "video.mp4", "--actions", "actions.npy", "--steps", "2") == 0
    out = capsys.readouterr().out
    frames = read_video("irasim.mp4")
    assert len(frames) == 6  # history of two, four predicted
    assert PIL.Image.open("irasim.png").size[0] == 12 * 5
    assert re.search(r"PSNR \d+\.\d\d dB over 4 frames", out)
    assert re.search(r"4 frames in .* s, .* frames/s, 6 network evaluations with PNDMScheduler", out)


@pytest.mark.parametrize(
    ("history", "num_frames", "message"),
    [
        (0, 5, "--history must be 2 for this model, got 0"),
        (1, 5, "--history must be 2 for this model, got 1"),
        (3, 5, "--history must be 2 for this model, got 3"),
        (None, 1, r"got 1: use a longer video\.$"),
    ],
)
def test_length_of_a_history_of_video_ada(history, num_frames, message):
    pipeline = tiny_pipeline(conditioning="video")
    arguments = Namespace(history=history, frames=["clip.mp4"])
    with pytest.raises(ValueError, match=message):
        history_length(arguments, pipeline, num_frames)
    assert history_length(Namespace(history=None, frames=["clip.mp4"]), pipeline, 2) == 2


def test_every_format_of_actions_gives_the_same_video(workspace):
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
        pipeline.vae.decoder.conv_in.weight.mul_(1e6)  # exceeds the range of float16, as activations of SDXL's VAE do
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


def test_frame_rate_comes_from_the_video_or_the_model(workspace):
    tiny_pipeline(fps=3).save_pretrained("slow")
    arguments = ["--actions", "actions.npy", "--steps", "1", "--frames"]
    for model, frames, rate in (("slow", "frame.png", 3), ("slow", "video.mp4", 5), ("model", "frame.png", 10)):
        assert generate("--model", model, *arguments, frames) == 0
        assert frame_rate("irasim.mp4") == rate


def test_converted_scheduler_has_noise_process_of_config(workspace, capsys):
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
    for scheduler in ("ddim", "ddpm"):  # schedulers whose `clip_sample` is True by default
        assert generate(*arguments, "--scheduler", scheduler) == 0, capsys.readouterr().err
    assert generate(*arguments) == 2
    assert (
        "--steps must be at least 4 for PNDMScheduler with its Runge-Kutta warm-up, got 3" in capsys.readouterr().err
    )


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


def test_byte_order_mark_of_a_spreadsheet_is_not_a_header(workspace):
    actions = read_actions(workspace / "actions.npy")
    np.savetxt(workspace / "marked.csv", actions, delimiter=",", encoding="utf-8-sig")
    np.testing.assert_allclose(read_actions(workspace / "marked.csv"), actions)


def test_alpha_is_dropped_and_exif_orientation_applied(workspace):
    picture = PIL.Image.open("frame.png")
    exif = picture.getexif()
    exif[0x0112] = 6  # stored with its right side on top
    picture.transpose(PIL.Image.Transpose.ROTATE_90).save("turned.png", exif=exif)
    picture.convert("P", palette=PIL.Image.Palette.ADAPTIVE).save("palette.png")
    expected = read_media(workspace / "frame.png")
    for name in ("rgba.png", "turned.png"):
        np.testing.assert_array_equal(read_media(workspace / name), expected)
    assert np.abs(read_media(workspace / "palette.png") - expected.astype(int)).max() < 8


def test_cameras_are_tiled_by_the_layout_of_the_model(workspace):
    parts = {"left": (0, 0, 5, 3), "right": (5, 0, 12, 3), "bottom": (0, 3, 12, 8)}
    for name, box in parts.items():
        PIL.Image.open("frame.png").crop(box).save(f"{name}.png")
    tiny_pipeline(cameras=[["left", "right"], ["bottom"]]).save_pretrained("cameras")
    arguments = ["--actions", "actions.npy", "--steps", "1"]
    assert generate("--model", "model", *arguments, "--frames", "frame.png") == 0
    expected = read_video("irasim.mp4")
    for model, frames in (
        ("cameras", ["left.png", "right.png", "bottom.png"]),
        ("cameras", ["frame.png"]),  # already tiled
        ("model", ["left.png,right.png", "bottom.png"]),
    ):
        assert generate("--model", model, *arguments, "--frames", *frames) == 0
        np.testing.assert_array_equal(read_video("irasim.mp4"), expected)


def test_lora_from_a_folder_or_file_is_applied(workspace, capsys):
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False)
    pipeline = tiny_pipeline()
    torch.manual_seed(0)
    pipeline.transformer.add_adapter(config)
    layers = get_peft_model_state_dict(pipeline.transformer)
    metadata = {"transformer_lora_adapter_metadata": config.to_dict()}
    pipeline.save_lora_weights("lora", transformer_lora_layers=layers, **metadata)
    arguments = ["--model", "model", "--frames", "frame.png", "--actions", "actions.npy", "--steps", "1"]
    videos = []
    for lora in ([], ["--lora", "lora"], ["--lora", "lora/pytorch_lora_weights.safetensors"]):
        assert generate(*arguments, *lora) == 0, capsys.readouterr().err
        videos.append(read_video("irasim.mp4"))
    assert not np.array_equal(videos[0], videos[1])
    np.testing.assert_array_equal(videos[1], videos[2])
    generator = torch.Generator().manual_seed(0)
    frames = pipeline(
        PIL.Image.open("frame.png"),
        np.load("actions.npy"),
        num_inference_steps=1,
        generator=generator,
        output_type="np",
    ).frames[0]
    shown = videos[1][-4:, ::36, ::36] / 255.0
    assert psnr(shown, frames) > 25  # lossy video


@pytest.mark.parametrize(
    ("number", "status", "message"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_signals_end_in_one_line(workspace, monkeypatch, capfd, request, number, status, message):
    if number == signal.SIGINT:  # background jobs of a shell ignore SIGINT
        request.addfinalizer(functools.partial(signal.signal, number, signal.getsignal(number)))
        signal.signal(number, signal.default_int_handler)
    before, handler, forward = sorted(workspace.rglob("*")), signal.getsignal(number), IRASimTransformer3DModel.forward

    def interrupt(*arguments, **options):
        signal.raise_signal(number)
        return forward(*arguments, **options)

    monkeypatch.setattr(IRASimTransformer3DModel, "forward", interrupt)
    assert generate("--model", "model", "--frames", "frame.png", "--actions", "actions.npy", "--steps", "2") == status
    captured = capfd.readouterr()
    assert captured.err.splitlines()[-1] == f"irasim: {message}"
    assert "Traceback" not in captured.err
    assert sorted(workspace.rglob("*")) == before
    assert signal.getsignal(number) == handler


def test_recording_is_saved_when_sigterm_ends_a_script(workspace, monkeypatch, capsys):
    forward, calls = IRASimTransformer3DModel.forward, []

    def interrupt(*arguments, **options):
        calls.append(1)
        if len(calls) == 4:
            signal.raise_signal(signal.SIGTERM)
        return forward(*arguments, **options)

    monkeypatch.setattr(IRASimTransformer3DModel, "forward", interrupt)
    arguments = [
        "--model",
        "model",
        "--frames",
        "frame.png",
        "--steps",
        "1",
        "--script",
        "up*90",
        "--dtype",
        "float32",
    ]
    assert main(["play", *arguments]) == 143
    assert capsys.readouterr().err == "irasim: terminated\n"
    assert len(read_video("drive.mp4")) == len(np.load("drive.npy")) + 1 > 1


def test_sigterm_leaves_no_incomplete_pipeline(workspace, monkeypatch, capsys):
    latte_model(heads=2, head=6, depth=1, patch=2, channels=4, frames=4).save_pretrained("latte")
    before, save = sorted(workspace.rglob("*")), IRASimPipeline.save_pretrained

    def save_and_terminate(*arguments, **options):
        save(*arguments, **options)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(IRASimPipeline, "save_pretrained", save_and_terminate)
    sizes = ["num_attention_heads=2", "action_dim=3", "sample_height=4", "sample_width=6"]
    arguments = ["--source", "latte", "--checkpoint", "latte", "--vae", "model:vae", "--output", "converted"]
    assert main(["convert", *arguments, "--config", *sizes]) == 143
    assert capsys.readouterr().err == "irasim: terminated\n"
    assert sorted(workspace.rglob("*")) == before


def test_no_repository_is_created_for_bad_data(workspace, monkeypatch):
    created = []
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **_: created.append(name))
    monkeypatch.setattr(HfApi, "upload_folder", lambda *_, **__: None)
    monkeypatch.setattr(HfApi, "delete_tag", lambda *_, **__: None)
    monkeypatch.setattr(HfApi, "create_tag", lambda *_, **__: None)
    folder = workspace / "data" / "annotation" / "train"
    folder.mkdir(parents=True)
    arguments = ["data", "--dataset", "data", "--fps", "5", "--output", "written", "--push-to-hub", "lab/robot"]
    (folder / "0.json").write_text(json.dumps({"actions": [[0.0] * 3] * 5, "video_path": "missing.mp4"}))
    assert main(arguments) == 2
    assert created == []
    shutil.copy(workspace / "video.mp4", workspace / "data")
    (folder / "0.json").write_text(json.dumps({"actions": [[0.0] * 3] * 5, "video_path": "video.mp4"}))
    assert main(arguments) == 0
    assert set(created) == {"lab/robot"}


def test_resize(workspace):
    arguments = ["--model", "model", "--frames", "large.png", "--actions", "actions.npy", "--steps", "1"]
    assert generate(*arguments, "--resize") == 0


GOOD = {"--model": "model", "--frames": "frame.png", "--actions": "actions.npy", "--steps": "2"}
BAD = [
    ({"--actions": "wide.npy"}, r"--actions must be \(n, 3\) .* got \(4, 2\)"),
    ({"--actions": "flat.npy"}, r"--actions must be \(n, A\), one row per frame, got \(3,\)"),
    ({"--actions": "empty.npy"}, "nothing to predict"),
    ({"--actions": "nan.npy"}, r"--actions must be finite, got nan at index \(2, 1\)"),
    ({"--actions": "inf.npy"}, "--actions must be finite, got inf"),
    ({"--actions": "objects.npy"}, "--actions must be a table of numbers"),
    ({"--actions": "text.csv"}, "--actions must be a table of numbers.* line 2: 'three'"),
    ({"--actions": "broken.json"}, "--actions must be a table of numbers"),
    ({"--actions": "actions.txt"}, "--actions must be a .npy, .csv or .json file, got 'actions.txt'"),
    ({"--actions": "missing.npy"}, "--actions must be a file, got 'missing.npy', which does not exist"),
    ({"--actions": None}, "--frames requires --actions"),
    ({"--frames": "large.png"}, r"must be 8x12 .* got 20x24: .*--resize"),
    ({"--frames": "gray16.png"}, "--frames must be a readable image: image 'gray16.png' has mode 'I;16'"),
    ({"--frames": "broken.png"}, "--frames must be a readable image: cannot read image 'broken.png'"),
    ({"--frames": "broken.mp4"}, "--frames must be a readable image or video: .*broken.mp4"),
    ({"--frames": "missing.mp4"}, "--frames must be an image or video file, got 'missing.mp4'"),
    ({"--frames": "short.mp4"}, r"--frames must contain at least 2 frames \(the history\), got 1"),
    ({"--frames": "video.mp4", "--history": "0"}, "--history must be at least 1, got 0"),
    ({"--frames": "frame.png", "--history": "-1"}, "--history must be at least 1, got -1"),
    ({"--output": "folder.mp4"}, "--output must be a file, but 'folder.mp4' is a folder"),
    ({"--output": "clip.txt"}, "--output must end in .mp4, got 'clip.txt'"),
    ({"--output": "/proc/clip.mp4"}, "--output must be writable, got '/proc/clip.mp4'"),
    ({"--model": "nowhere"}, "--model must be a pipeline folder or Hub id, got 'nowhere'"),
    ({"--scheduler": "flow-euler"}, "--scheduler flow-euler is not compatible with the model: `scheduler` must have"),
    ({"--steps": "0"}, "--steps must be at least 1, got 0"),
    ({"--frames": "video.mp4", "--history": "3"}, "--history must be at most 2 for this model, got 3"),
    ({"--device": "abacus"}, "--device must be a device of this machine, got 'abacus'"),
]


@pytest.mark.parametrize(("change", "message"), BAD)
def test_bad_input_ends_in_one_line_and_exits_with_2(workspace, capsys, change, message):
    before = sorted(workspace.rglob("*"))
    arguments = [text for name, value in (GOOD | change).items() if value is not None for text in (name, value)]
    assert generate(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert re.match(f"irasim: error: .*{message}", lines[-1])
    assert "Traceback" not in captured.err
    assert sorted(workspace.rglob("*")) == before


@pytest.mark.parametrize("name", ["out.mp4", "out.png"])
def test_folder_in_the_place_of_an_output_is_named(workspace, tmp_path, capsys, name):
    """The message names the video, or the strip, which is written next to it without a flag."""
    (tmp_path / name).mkdir()
    assert generate("--output", str(tmp_path / "out.mp4")) == 2
    expected = f"--output must be a file, but '{tmp_path / name}' is a folder: choose another name."
    assert expected in capsys.readouterr().err


def test_full_disk_is_one_line(monkeypatch, capsys):
    """A full disk raises `SafetensorError`, which is not an OSError."""

    def fail(_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("irasim_diffusers.commands.generate.run", fail)
    assert main(["generate"]) == 2
    assert capsys.readouterr().err == "irasim: error: I/O error: No space left on device (os error 28)\n"


def test_only_commands_with_the_flag_advise_dtype():
    weights = torch.nn.Linear(2, 2)
    weights.bias.data.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"use an earlier checkpoint.$"):
        check_weights({"model": weights}, [])
    with pytest.raises(ValueError, match=r"use an earlier checkpoint, or --dtype float32 if .* float16.$"):
        check_weights({"model": weights}, [], DTYPE_REMEDY)


def test_unknown_scheduler_raises(workspace, capsys):
    with pytest.raises(SystemExit) as stop:
        generate("--scheduler", "runge")
    assert stop.value.code == 2
    assert "argument --scheduler: invalid choice: 'runge'" in capsys.readouterr().err


def test_unknown_flag_prints_the_usage_of_the_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["evaluate", "--model", "model", "--dataset", "data", "--num_clips", "4"])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("usage: irasim evaluate ")
    assert message.endswith("irasim evaluate: error: unrecognized arguments: --num_clips 4\n")


def test_the_embedded_model_predicts_its_held_out_clip(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert generate() == 0
    out = capsys.readouterr().out
    found = re.search(r"PSNR ([\d.]+) dB over 60 frames .*last-frame baseline: ([\d.]+) dB", out)
    assert float(found[1]) > float(found[2]) + 1
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


def test_quantized_weights_are_accepted():
    class Quantized(torch.Tensor):
        """Tensor for which `torch.isfinite` is not implemented, like some quantized tensors."""

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is torch.isfinite:
                raise NotImplementedError
            return super().__torch_function__(function, types, args, kwargs or {})

    model = torch.nn.Module()
    model.register_buffer("weight", torch.ones(2).as_subclass(Quantized))
    model.register_buffer("number", torch.ones(2, dtype=torch.int8))
    check_weights({"transformer": model}, [])
    model.register_buffer("other", torch.tensor([1.0, float("nan")]))
    with pytest.raises(ValueError, match=r"got NaN or infinity in transformer\.other"):
        check_weights({"transformer": model}, [])


def test_messages_name_the_flags_of_the_commands(tmp_path, capsys, monkeypatch):
    """The library names its arguments, and flags with underscores as in the examples."""

    def fail(arguments):
        raise ValueError(
            "`composition` (--action_composition) is required with `frame_skip` (--frame_skip) for 'data--of_mine/--x_y', "
            "omit `crop`: see --help and --rollout_chunks."
        )

    monkeypatch.setattr("irasim_diffusers.commands.evaluate.run", fail)
    assert main(["evaluate", "--dataset", str(tmp_path), "--model", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert (
        "error: --action-composition is required with --frame-skip for 'data--of_mine/--x_y', omit `crop`: see --help and "
        "--rollout-chunks." in error
    )
