"""Bad input of all `irasim` commands but evaluate-policies: exit status 2, one line, no file written.

The file exceeds 500 lines because all inputs are rows of one table.
"""

import json
import os
import shutil
import warnings
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_conversion import released_state
from test_latte import latte_model
from tiny_models import tiny_pipeline

from irasim_diffusers.cli import main
from irasim_diffusers.data import write_video

pytestmark = pytest.mark.usefixtures("offline")

SIZES = ["num_attention_heads=2", "action_dim=3", "sample_height=4", "sample_width=6"]
GOOD = {
    "generate": {"--model": "model", "--frames": "frame.png", "--actions": "actions.npy", "--output": "new.mp4"},
    "play": {"--model": "model", "--frames": "frame.png", "--script": "up*2 hold", "--output": "new.mp4"},
    "plan": {
        "--model": "model",
        "--frames": "frame.png",
        "--goal": "frame.jpg",
        "--horizon": "3",
        "--candidates": "3",
        "--iterations": "1",
        "--output": "new.mp4",
    },
    "adapt": {"--model": "model", "--action-dim": "2", "--output": "new"},
    "convert": {
        "--source": "latte",
        "--checkpoint": "latte",
        "--vae": "model:vae",
        "--config": SIZES,
        "--output": "new",
    },
    "data": {"--dataset": "data", "--split": "test", "--fps": "5", "--output": "new"},
    "evaluate": {"--dataset": "data", "--model": "model", "--split": "test", "--output": "new", "--num-clips": "1"},
}


def command_line(command, change):
    """Return the arguments of a command with changes: None removes a flag, a list passes several values."""
    arguments = [command]
    for flag, value in (GOOD[command] | change).items():
        if value is not None:
            arguments += [flag, *(value if isinstance(value, list) else [value])]
    return arguments


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A folder with good and bad inputs; no test changes it."""
    root = tmp_path_factory.mktemp("bad-input")
    rng = np.random.default_rng(0)
    tiny_pipeline(num_inference_steps=1).save_pretrained(root / "model")
    write_models(root)
    write_lora(root)
    write_frames(root, rng)
    write_actions(root, rng)
    write_episodes(root, rng)
    write_checkpoints(root)
    (root / "full").mkdir()
    (root / "full" / "notes.txt").write_text("mine", encoding="utf-8")
    (root / "file").write_text("mine", encoding="utf-8")
    (root / "empty").mkdir()
    (root / "folder.mp4").mkdir()
    os.symlink("loop", root / "loop")
    return root


def write_models(root):
    def copy(name):
        return shutil.copytree(root / "model", root / name)

    weights = "transformer/diffusion_pytorch_model.safetensors"
    (copy("no-index") / "model_index.json").unlink()
    (copy("list-index") / "model_index.json").write_text("[]", encoding="utf-8")
    (copy("cut-index") / "model_index.json").write_text('{"_class_name": ', encoding="utf-8")
    (copy("latin-index") / "model_index.json").write_bytes(b'{"_class_name": "\xe9"}')
    shutil.rmtree(copy("no-vae") / "vae")
    shutil.rmtree(copy("no-scheduler") / "scheduler")
    (copy("no-weights") / weights).unlink()
    (copy("no-config") / "transformer" / "config.json").unlink()
    (copy("cut-config") / "transformer" / "config.json").write_text("{", encoding="utf-8")
    (copy("null-config") / "transformer" / "config.json").write_text("null", encoding="utf-8")
    (copy("list-vae") / "vae" / "config.json").write_text("[]", encoding="utf-8")
    cut = copy("cut-weights") / weights
    cut.write_bytes(cut.read_bytes()[:1000])
    (copy("empty-weights") / weights).write_bytes(b"")
    (copy("text-weights") / weights).write_text("weights", encoding="utf-8")
    tensors = load_file(root / "model" / weights)
    key = next(iter(tensors))
    for name, value in (("nan", float("nan")), ("infinite", float("inf"))):
        copy(name)
        bad = {**tensors, key: torch.full_like(tensors[key], value)}
        save_file(bad, root / name / weights, metadata={"format": "pt"})
    save_file(
        {**tensors, key: tensors[key][..., :1].clone()}, copy("other-shape") / weights, metadata={"format": "pt"}
    )
    few = dict(list(tensors.items())[3:])
    save_file(few, copy("missing-tensor") / weights, metadata={"format": "pt"})
    for name, entries in (
        ("other-size", {"num_layers": 1}),
        ("word-size", {"num_attention_heads": "two"}),
        ("negative-size", {"num_layers": -1}),
        ("nan-scale", {"action_scale": [float("nan"), 1.0, 1.0]}),
    ):
        path = copy(name) / "transformer" / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | entries), encoding="utf-8")
    tiny_pipeline(num_inference_steps=1, cameras=[["left", "right"], ["top"]], sample_height=8).save_pretrained(
        root / "three-cameras"
    )


def write_lora(root):
    layer = "transformer.transformer_blocks.0.attn1.to_q.lora_{}.weight"
    good = {layer.format("A"): torch.zeros(2, 24), layer.format("B"): torch.zeros(24, 2)}
    for name, tensors in (
        ("good", good),
        ("nan", {key: torch.full_like(value, float("nan")) for key, value in good.items()}),
        ("other-model", {key.replace("to_q", "to_other"): value for key, value in good.items()}),
        ("other-size", {layer.format("A"): torch.zeros(2, 7), layer.format("B"): torch.zeros(24, 2)}),
        ("no-layer", {"weight": torch.zeros(2)}),
    ):
        (root / "lora" / name).mkdir(parents=True)
        save_file(tensors, root / "lora" / name / "pytorch_lora_weights.safetensors", metadata={"format": "pt"})
    (root / "lora" / "cut.safetensors").write_bytes(b"\x99\x00\x00")
    (root / "lora" / "empty").mkdir()


def write_frames(root, rng):
    video = rng.integers(0, 256, (6, 8, 12, 3), dtype=np.uint8)
    write_video(root / "video.mp4", video, 5, lossless=True)
    write_video(root / "short.mp4", video[:1], 5, lossless=True)
    picture = PIL.Image.fromarray(video[0])
    picture.save(root / "frame.png")
    picture.save(root / "frame.jpg")
    others = [PIL.Image.fromarray(frame) for frame in video[1:3]]
    for name in ("moving.png", "moving.webp"):
        picture.save(root / name, save_all=True, append_images=others)
    shutil.copy(root / "moving.webp", root / "webp-named.png")
    PIL.Image.fromarray(video[0, ..., 0].astype(np.uint16)).save(root / "depth.png")
    picture.resize((24, 20)).save(root / "large.png")
    (root / "cut.png").write_bytes((root / "frame.png").read_bytes()[:100])
    (root / "cut.mp4").write_bytes((root / "video.mp4").read_bytes()[:200])
    (root / "text.png").write_text("no picture", encoding="utf-8")
    (root / "text.mp4").write_text("no video", encoding="utf-8")
    (root / "empty.png").write_bytes(b"")
    (root / "empty.mp4").write_bytes(b"")
    PIL.Image.new("RGB", (1, 1)).save(root / "dot.png")


def write_actions(root, rng):
    actions = rng.normal(size=(4, 3))
    np.save(root / "actions.npy", actions)
    for name, value in (
        ("flat", actions[0]),
        ("wide", np.zeros((4, 2))),
        ("deep", np.zeros((2, 4, 3))),
        ("none", np.zeros((0, 3))),
        ("nan", np.where(np.arange(12).reshape(4, 3) == 7, np.nan, actions)),
        ("inf", np.where(np.arange(12).reshape(4, 3) == 7, np.inf, actions)),
        ("huge", np.where(np.arange(12).reshape(4, 3) == 7, 1e38, actions)),
        ("beyond", np.where(np.arange(12).reshape(4, 3) == 7, 1e39, actions)),  # exceeds the range of float32
        ("words", np.array([["1", "2", "3"]])),
        ("complex", np.ones((4, 3), dtype=complex)),
        ("bool", np.ones((4, 3), dtype=bool)),
    ):
        np.save(root / f"{name}.npy", value)
    np.save(root / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.savez(root / "archive.npz", actions)
    (root / "archive.npz").rename(root / "archive.npy")
    (root / "cut.npy").write_bytes((root / "actions.npy").read_bytes()[:150])
    for name, start in (("nested", b"("), ("unclosed", b"{'descr': (")):
        header = start * 50
        (root / f"{name}.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    header = b"{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000, 3), }"
    (root / "claims.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
    (root / "empty.npy").write_bytes(b"")
    for name, text in (
        ("text.csv", "x,y,z\n1,2,3\n1,2,three\n"),
        ("ragged.csv", "1,2,3\n1,2\n"),
        ("semicolons.csv", "x;y;z\n1;2;3\n"),
        ("half-header.csv", "x,2,3\n1,2,3\n"),
        ("header.csv", "x,y,z\n"),
        ("empty.csv", ""),
        ("nul.csv", "1,2,3\n1,\0,3\n"),
        ("gap.csv", "1,2,3\n1,,3\n"),
        ("nan.csv", "1,2,3\nnan,2,3\n"),
        ("underscore.csv", "1,2,3\n1_000,2,3\n"),
        ("arabic.csv", "1,2,3\n\u0661,2,3\n"),
        ("wide-digits.csv", "1,2,3\n\uff11,2,3\n"),
        ("bool.json", "[[1, 2, 3], [true, 2, 3]]"),
        ("twice.json", '{"actions": [[1, 2, 3]], "actions": [[9, 9, 9]]}'),
        ("cut.json", '{"actions": [[1, 2, 3], '),
        ("other.json", '{"action": [[1, 2, 3]]}'),
        ("ragged.json", "[[1, 2, 3], [1, 2]]"),
        ("words.json", '[["1", "2", "3"]]'),
        ("null.json", "[[1, null, 3]]"),
        ("number.json", "3"),
        ("flat.json", "[1, 2, 3]"),
        ("nan.json", "[[1, 2, NaN]]"),
        ("large.json", f"[[1, 2, {10**400}]]"),
        ("deep.json", "[" * 100_000),
        ("empty.json", ""),
        ("actions.txt", "1 2 3"),
    ):
        (root / name).write_text(text, encoding="utf-8")
    (root / "latin.csv").write_bytes("1,2,3\nµ,2,3\n".encode("latin-1"))
    (root / "latin.json").write_bytes(b'[[1, 2, 3],\n ["\xe9"]]')
    (root / "folder.npy").mkdir()
    (root / "Übung 動作.csv").write_text("1,2,drei\n", encoding="utf-8")


def write_episodes(root, rng):
    def write(name, lengths, change=lambda annotation: annotation):
        folder = root / name / "annotation" / "test"
        folder.mkdir(parents=True)
        for number, length in enumerate(lengths):
            frames = rng.integers(0, 256, (length, 8, 12, 3), dtype=np.uint8)
            write_video(root / name / "videos" / f"{number}.mp4", frames, 5, lossless=True)
            annotation = {"actions": rng.normal(size=(length - 1, 3)).tolist(), "video_path": f"videos/{number}.mp4"}
            path = folder / f"{number}.json"
            path.write_text(json.dumps(change(annotation)), encoding="utf-8")
        return root / name

    write("data", (34, 16))
    write("short", (5,))
    (write("cut-annotation", (16,)) / "annotation" / "test" / "0.json").write_text('{"actions"', encoding="utf-8")
    (write("latin-annotation", (16,)) / "annotation" / "test" / "0.json").write_bytes(b'{"task": "\xe9"}')
    (write("list-annotation", (16,)) / "annotation" / "test" / "0.json").write_text("[]", encoding="utf-8")
    (write("no-video", (16,)) / "videos" / "0.mp4").unlink()
    (write("cut-video", (16,)) / "videos" / "0.mp4").write_bytes(b"no video")
    write("no-actions", (16,), lambda annotation: {"video_path": annotation["video_path"]})
    for name, place in (("nan-actions", float("nan")), ("word-actions", "one")):
        write(name, (16,), lambda a, place=place: a | {"actions": [[place, 0, 0], *a["actions"][1:]]})
    write("ragged-actions", (16,), lambda a: a | {"actions": [[0], *a["actions"][1:]]})
    write("few-actions", (16,), lambda a: a | {"actions": a["actions"][:5]})
    write("outside", (16,), lambda a: a | {"video_path": "../../../etc/passwd"})
    (root / "no-episodes" / "annotation" / "test").mkdir(parents=True)
    assert (
        main(
            [
                "data",
                "--dataset",
                str(root / "data"),
                "--split",
                "test",
                "--fps",
                "5",
                "--output",
                str(root / "lerobot"),
            ]
        )
        == 0
    )

    def copy(name):
        return shutil.copytree(root / "lerobot", root / name)

    (copy("cut-info") / "meta" / "info.json").write_text("{", encoding="utf-8")
    (copy("latin-info") / "meta" / "info.json").write_bytes(b'{"\xe9": 1}')
    (copy("list-info") / "meta" / "info.json").write_text("[]", encoding="utf-8")
    (copy("no-features") / "meta" / "info.json").write_text('{"codebase_version": "v3.0"}', encoding="utf-8")
    shutil.rmtree(copy("no-data") / "data")
    shutil.rmtree(copy("no-videos") / "videos")
    shutil.rmtree(copy("no-meta-episodes") / "meta" / "episodes")
    for path in (copy("cut-parquet") / "data").rglob("*.parquet"):
        path.write_bytes(path.read_bytes()[:100])
    for path in (copy("cut-videos") / "videos").rglob("*.mp4"):
        path.write_bytes(b"no video")


def write_checkpoints(root):
    torch.manual_seed(0)
    latte_model(heads=2, head=6, depth=1, patch=2, channels=4, frames=4).save_pretrained(root / "latte")
    state = released_state("rt1", False, dim=24, depth=2, patch=2, frames=4, channels=4, rows=16, columns=20)
    torch.save({"ema": state}, root / "released.pt")
    (root / "cut.pt").write_bytes((root / "released.pt").read_bytes()[:500])
    (root / "empty.pt").write_bytes(b"")
    (root / "text.pt").write_text("weights", encoding="utf-8")
    torch.save({"model": state}, root / "no-ema.pt")
    torch.save([1, 2], root / "list.pt")
    key = "x_embedder.proj.weight"
    torch.save({"ema": state | {key: state[key] * float("nan")}}, root / "nan.pt")
    (root / "cut-latte").mkdir()
    (root / "cut-latte" / "diffusion_pytorch_model.safetensors").write_bytes(b"\x99\x00\x00")


RELEASED = {"--source": None, "--dataset": "rt1", "--checkpoint": "released.pt", "--config": ["num_attention_heads=2"]}

MODEL_ROWS = [  # models, for `generate`, `evaluate` and `adapt`
    ({"--model": "nowhere"}, "--model must be a pipeline folder or Hub id, got 'nowhere'"),
    ({"--model": ""}, "--model must be"),
    ({"--model": "empty"}, "--model must be a pipeline folder or Hub id, got 'empty'"),
    ({"--model": "file"}, "--model must be a pipeline folder or Hub id, got 'file'"),
    ({"--model": "loop"}, "--model must be a pipeline folder or Hub id, got 'loop'"),
    ({"--model": "a\0b"}, "--model must be a path without NUL"),
    ({"--model": "no-index"}, "model_index.json"),
    ({"--model": "list-index"}, "model_index.json' must contain a JSON object, got list"),
    ({"--model": "null-config"}, "transformer/config.json' must contain a JSON object, got NoneType"),
    ({"--model": "list-vae"}, "vae/config.json' must contain a JSON object, got list"),
    ({"--model": "cut-index"}, "model_index.json"),
    ({"--model": "latin-index"}, "model_index.json"),
    ({"--model": "no-vae"}, "no file named config.json found in directory"),
    ({"--model": "no-scheduler"}, "no file named scheduler_config.json found in directory"),
    ({"--model": "no-weights"}, "no file named diffusion_pytorch_model.bin found in directory"),
    ({"--model": "no-config"}, "no file named config.json found in directory no-config/transformer"),
    ({"--model": "cut-config"}, "transformer/config.json' is not a valid JSON file"),
    ({"--model": "cut-weights"}, "--model must be a pipeline folder"),
    ({"--model": "empty-weights"}, "--model must be a pipeline folder"),
    ({"--model": "text-weights"}, "--model must be a pipeline folder"),
    ({"--model": "other-shape"}, "--model must be a pipeline folder"),
    ({"--model": "missing-tensor"}, "the weights file does not contain transformer."),
    ({"--model": "other-size"}, "the config does not match the weights"),
    ({"--model": "word-size"}, "num_attention_heads"),
    ({"--model": "negative-size"}, "`num_layers` must be an integer of at least 1 and at most 256, got -1"),
]

VALUE_ROWS = [  # models with values that are not finite
    ({"--model": "nan-scale"}, "`action_scale` must be finite and not zero, got [nan, 1.0, 1.0]"),
    ({"--model": "nan"}, "`transformer` must have finite weights, got NaN or infinite values"),
    ({"--model": "infinite"}, "`transformer` must have finite weights, got NaN or infinite values"),
]

LORA_ROWS = [
    ({"--lora": "nowhere"}, "--lora must be a folder, file or Hub id of LoRA weights for this model, got 'nowhere'"),
    ({"--lora": "lora/empty"}, "no file named pytorch_lora_weights.safetensors found"),
    ({"--lora": "lora/cut.safetensors"}, "Error while deserializing header: header too small"),
    ({"--lora": "lora/nan"}, "weights must be finite"),
    ({"--lora": "lora/other-model"}, "the LoRA weights do not match this model: no modules for"),
    ({"--lora": "lora/other-size"}, "size mismatch for transformer_blocks.0.attn1.to_q.lora_A"),
    ({"--lora": "lora/no-layer"}, "must contain LoRA layers of the pipeline's transformer"),
    ({"--lora": "frame.png"}, "Error while deserializing header: header too large"),
    ({"--lora": "a\0b"}, "--lora must be a path without NUL"),
]

SAMPLER_ROWS = [
    ({"--steps": "0"}, "--steps must be at least 1, got 0"),
    ({"--steps": "-3"}, "--steps must be at least 1, got -3"),
    ({"--steps": "1000000000"}, "--steps must be at most 1000, the number of training timesteps, got 1000000000"),
    ({"--steps": "1000"}, "--steps must be less than 1000 for the PNDMScheduler of this model"),
    ({"--steps": "100", "--scheduler": "lcm"}, "--steps 100 is not supported by LCMScheduler"),
    ({"--steps": "two"}, "argument --steps: invalid int value: 'two'"),
    ({"--steps": "2.5"}, "argument --steps: invalid int value: '2.5'"),
    ({"--seed": "-1"}, "--seed must be in [0, 2**63), got -1"),
    ({"--seed": str(2**63)}, "--seed must be in [0, 2**63)"),
    ({"--seed": "nan"}, "argument --seed: invalid int value: 'nan'"),
    ({"--scheduler": "runge"}, "argument --scheduler: invalid choice: 'runge'"),
    ({"--scheduler": "flow-euler"}, "--scheduler flow-euler is not compatible with the model"),
    ({"--device": "abacus"}, "--device must be a device of this machine, got 'abacus'"),
    ({"--device": "cpu:x"}, "--device must be a device of this machine, got 'cpu:x'"),
    ({"--device": "meta"}, "--device must be a device of this machine, got 'meta'"),
    ({"--dtype": "int8"}, "argument --dtype: invalid choice: 'int8'"),
]

FILE_ROWS = [  # frames, for `generate`, `play` and `plan`
    ({"--frames": "missing.png"}, "--frames must be an image or video file, got 'missing.png', which does not exist"),
    ({"--frames": "empty"}, "--frames must be an image or video file, got 'empty'"),
    ({"--frames": "loop"}, "--frames must be an image or video file, got 'loop'"),
    ({"--frames": "a\0b.png"}, "--frames must be a path without NUL"),
    ({"--frames": "x" * 300 + ".png"}, "File name too long"),
    ({"--frames": "moving.png"}, "--frames must be a readable image: image 'moving.png' is animated (3 frames)"),
    ({"--frames": "moving.webp"}, "--frames must be a readable image: image 'moving.webp' is animated (3 frames)"),
    ({"--frames": "webp-named.png"}, "image 'webp-named.png' is animated (3 frames): convert it to a video"),
    ({"--frames": "depth.png"}, "--frames must be a readable image: image 'depth.png' has mode 'I;16'"),
    ({"--frames": "large.png"}, "--frames must be 8x12 (height x width) for this checkpoint, got 20x24"),
    ({"--frames": "dot.png"}, "--frames must be 8x12 (height x width) for this checkpoint, got 1x1"),
    ({"--frames": "cut.png"}, "--frames must be a readable image: cannot read image 'cut.png'"),
    ({"--frames": "text.png"}, "--frames must be a readable image: cannot read image 'text.png'"),
    ({"--frames": "empty.png"}, "--frames must be a readable image: cannot read image 'empty.png'"),
    ({"--frames": "cut.mp4"}, "--frames must be a readable image or video"),
    ({"--frames": "text.mp4"}, "--frames must be a readable image or video"),
    ({"--frames": "empty.mp4"}, "--frames must be a readable image or video"),
    ({"--frames": "actions.npy"}, "--frames must be a readable image or video"),
    ({"--frames": "short.mp4"}, "--frames must contain at least 2 frames (the history), got 1"),
]

CAMERA_ROWS = [
    ({"--frames": ["frame.png", "frame.png"]}, "must be 8x12 (height x width) for this checkpoint, got 16x12"),
    ({"--frames": ["frame.png", "large.png"]}, "form a rectangle when tiled, got 8x12, "),
    (
        {"--frames": ["frame.png", "video.mp4"]},
        "--frames must have the same number of frames for each camera, got 1, 6",
    ),
    ({"--frames": "frame.png,missing.png"}, "got 'missing.png', which does not exist"),
    (
        {"--model": "three-cameras", "--frames": ["frame.png", "frame.png"]},
        "--frames must be one file for each camera of the model, left, right, top, got 2 files",
    ),
    ({"--frames": []}, "argument --frames: expected at least one argument"),
]

HISTORY_ROWS = [
    ({"--history": "0"}, "--history must be at least 1, got 0"),
    ({"--history": "-1"}, "--history must be at least 1, got -1"),
    ({"--history": "3"}, "--history must be at most 2 for this model, got 3"),
    ({"--history": "99999999999999999999"}, "--history must be at most 2 for this model"),
    ({"--history": "2"}, "--frames must contain at least 2 frames (the history), got 1"),
]

OUTPUT_ROWS = [
    ({"--output": "folder.mp4"}, "--output must be a file, but 'folder.mp4' is a folder: choose another name"),
    ({"--output": "new.txt"}, "--output must end in .mp4, got 'new.txt'"),
    ({"--output": "new"}, "--output must end in .mp4, got 'new'"),
    ({"--output": "/proc/new.mp4"}, "--output must be writable, got '/proc/new.mp4'"),
    ({"--output": "file/new.mp4"}, "--output must be writable, got 'file/new.mp4'"),
    ({"--output": "loop/new.mp4"}, "--output must be writable, got 'loop/new.mp4'"),
    ({"--output": "a\0b.mp4"}, "--output must be a path without NUL"),
    ({"--output": "x" * 300 + ".mp4"}, "File name too long"),
    ({"--frames": "video.mp4", "--output": "video.mp4"}, "--output must not overwrite the input 'video.mp4'"),
    ({"--unknown": "1"}, "unrecognized arguments: --unknown 1"),
]

SAMPLING_ROWS = LORA_ROWS + SAMPLER_ROWS
FRAME_ROWS = FILE_ROWS + CAMERA_ROWS + HISTORY_ROWS + OUTPUT_ROWS

ACTION_ROWS = [
    ("wide.npy", "--actions must be (n, 3)"),
    ("flat.npy", "--actions must be (n, A), one row per frame, got (3,)"),
    ("deep.npy", "--actions must be (n, A), one row per frame, got (2, 4, 3)"),
    ("none.npy", "nothing to predict"),
    ("nan.npy", "--actions must be finite, got nan at index (2, 1)"),
    ("inf.npy", "--actions must be finite, got inf"),
    ("huge.npy", "--actions must be near the bounds of this checkpoint"),
    ("beyond.npy", "--actions must be finite, got inf at index (2, 1)"),
    ("words.npy", "its values have the type <U1"),
    ("complex.npy", "its values have the type complex128"),
    ("bool.npy", "its values have the type bool"),
    ("nested.npy", "the header of the file is damaged"),
    ("unclosed.npy", "the header of the file is damaged"),
    ("underscore.csv", "line 2: '1_000' is not a number"),
    ("arabic.csv", "line 2: '\u0661' is not a number"),
    ("wide-digits.csv", "line 2: '\uff11' is not a number"),
    ("bool.json", "row 2: True is not a number"),
    ("twice.json", "the key 'actions' occurs more than once in an object"),
    ("objects.npy", "--actions must be a table of numbers"),
    ("archive.npy", "the file is an archive of several arrays"),
    ("cut.npy", "--actions must be a table of numbers"),
    ("claims.npy", "--actions must be a table of numbers"),
    ("empty.npy", "--actions must be a table of numbers"),
    ("folder.npy", "--actions must be a file, got 'folder.npy'"),
    ("missing.npy", "--actions must be a file, got 'missing.npy', which does not exist"),
    ("a\0b.npy", "--actions must be a path without NUL"),
    ("actions.txt", "--actions must be a .npy, .csv or .json file, got 'actions.txt'"),
    ("text.csv", "line 3: 'three' is not a number"),
    ("ragged.csv", "line 2 has 2 values, line 1 has 3"),
    ("semicolons.csv", "line 2: '1;2;3' is not a number"),
    ("half-header.csv", "line 1: 'x' is not a number"),
    ("header.csv", "--actions must be"),
    ("empty.csv", "--actions must be"),
    ("nul.csv", "line 2: '\\x00' is not a number"),
    ("gap.csv", "line 2: '' is not a number"),
    ("nan.csv", "--actions must be finite, got nan"),
    ("latin.csv", "line 2 is not UTF-8"),
    ("latin.json", "line 2 is not UTF-8"),
    ("Übung 動作.csv", "in 'Übung 動作.csv': line 1: 'drei' is not a number"),
    ("cut.json", "line 1 column 25"),
    ("other.json", "the object has no entry 'actions'"),
    ("ragged.json", "row 2 has 2 values, row 1 has 3"),
    ("words.json", "row 1: '1' is not a number"),
    ("null.json", "row 1: None is not a number"),
    ("number.json", "the content must be a list of rows, got "),
    ("flat.json", "the content must be a list of rows, got "),
    ("nan.json", "--actions must be finite, got nan"),
    ("large.json", "--actions must be a table of numbers"),
    ("deep.json", "--actions must be a table of numbers"),
    ("empty.json", "line 1 column 1"),
]

ROWS = [
    *(("generate", change, message) for change, message in MODEL_ROWS + VALUE_ROWS + SAMPLING_ROWS + FRAME_ROWS),
    *(("generate", {"--actions": name}, message) for name, message in ACTION_ROWS),
    ("generate", {"--actions": None}, "--frames requires --actions"),
    ("generate", {"--output": "frame.mp4"}, "--output must not overwrite the input 'frame.png'"),
    *(("play", change, message) for change, message in FILE_ROWS + CAMERA_ROWS + OUTPUT_ROWS + SAMPLING_ROWS),
    ("play", {"--model": "nowhere"}, "--model must be a pipeline folder or Hub id, got 'nowhere'"),
    ("play", {"--script": ""}, "--script must not be empty; example: right*10"),
    ("play", {"--script": "jump*3"}, "--script must consist of parts"),
    ("play", {"--script": "up*0"}, "--script must consist of parts"),
    ("play", {"--script": "up*-1"}, "--script must consist of parts"),
    ("play", {"--script": "up*9999999999"}, "--script must consist of parts"),
    ("play", {"--script": "*"}, "--script must consist of parts"),
    ("play", {"--script": "up\0"}, "--script must consist of parts"),
    ("play", {"--script": None}, "standard input must be a terminal"),
    ("play", {"--chunk-length": "0"}, "--chunk-length must be at least 1, got 0"),
    ("play", {"--chunk-length": "17"}, "--chunk-length must be at most 16, got 17"),
    ("play", {"--chunk-length": "-1"}, "--chunk-length must be at least 1, got -1"),
    ("play", {"--speed": "0"}, "--speed must be"),
    ("play", {"--speed": "-1"}, "--speed must be"),
    ("play", {"--speed": "nan"}, "--speed must be"),
    ("play", {"--speed": "inf"}, "--speed must be"),
    ("play", {"--speed": "1e38"}, "--speed must be"),
    ("play", {"--start": ["1", "2"]}, "--start must have 3 values, one per action component, got 2"),
    ("play", {"--start": ["1", "nan", "2"]}, "--start must be 3 finite numbers"),
    ("play", {"--start": ["1", "1e38", "2"]}, "--start must be near the bounds"),
    ("play", {"--start": ["1", "one", "2"]}, "argument --start: invalid float value: 'one'"),
    ("convert", {"--source": "pixart"}, "argument --source: invalid choice: 'pixart'"),
    ("convert", {"--checkpoint": None}, "the following arguments are required: --checkpoint"),
    ("convert", {"--checkpoint": "nowhere"}, "--checkpoint must be an existing file or folder, got 'nowhere'"),
    (
        "convert",
        {"--checkpoint": "empty"},
        "--checkpoint must be a safetensors file or a folder that contains such files",
    ),
    ("convert", {"--checkpoint": "loop"}, "--checkpoint must be an existing file or folder, got 'loop'"),
    ("convert", {"--checkpoint": "a\0b"}, "--checkpoint must be a path without NUL"),
    ("convert", {"--checkpoint": "cut-latte"}, "is not a safetensors file (for shards"),
    ("convert", {"--checkpoint": "frame.png"}, "is not a safetensors file (for shards"),
    ("convert", {"--checkpoint": "model/transformer"}, "the file must contain Latte weights, got 71 tensors"),
    ("convert", {"--vae": None}, "the following arguments are required: --vae"),
    (
        "convert",
        {"--vae": "nowhere"},
        "--vae must be the folder or Hub id of an AutoencoderKL or AutoencoderTiny, got 'nowhere': the folder does not exist",
    ),
    (
        "convert",
        {"--vae": "model"},
        "--vae must be the folder or Hub id of an AutoencoderKL or AutoencoderTiny, got 'model'",
    ),
    ("convert", {"--vae": "model:nowhere"}, "got 'model:nowhere': there is no subfolder 'nowhere'"),
    ("convert", {"--vae": ":vae"}, "got ':vae': the name before the colon is empty"),
    ("convert", {"--config": "num_layers=" + 5000 * "["}, "--config num_layers must be int in JSON, got '[["),
    ("convert", {"--config": "num_layers=" + 5000 * "1"}, "--config num_layers must be int in JSON, got '11"),
    ("convert", {"--vae": "model:transformer"}, "--vae must be the folder or Hub id of an AutoencoderKL"),
    ("convert", {"--vae": "cut-weights:vae:x"}, "--vae must be the folder or Hub id of an AutoencoderKL"),
    ("convert", {"--vae": "empty"}, "--vae must be the folder or Hub id of an AutoencoderKL"),
    ("convert", {"--vae": "a\0b"}, "--vae must be a path without NUL"),
    ("convert", {"--config": ["action_dim"]}, "--config must be KEY=VALUE"),
    ("convert", {"--config": ["unknown=1"]}, "--config must be KEY=VALUE with a key of the model's config"),
    ("convert", {"--config": ["self=1"]}, "--config must be KEY=VALUE"),
    ("convert", {"--config": [*SIZES, "num_attention_heads=x"]}, "--config num_attention_heads must be int in JSON"),
    ("convert", {"--config": [*SIZES, "num_attention_heads=0"]}, "--config num_attention_heads must be"),
    ("convert", {"--config": [*SIZES, "num_attention_heads=-2"]}, "--config num_attention_heads must be"),
    ("convert", {"--config": [*SIZES, "num_attention_heads=1e9"]}, "and at most 256 that divides the width 12"),
    ("convert", {"--config": [*SIZES, "num_attention_heads=null"]}, "divides the width 12 of the weights, got None"),
    (
        "convert",
        {"--config": [*SIZES, "action_dim=[1]"]},
        "`action_dim` must be an integer of at least 1 and at most 1024",
    ),
    ("convert", {"--config": [*SIZES, "action_scale=NaN"]}, "finite in float32, got nan"),
    ("convert", {"--config": [*SIZES, "action_scale=[1,2"]}, "--config action_scale must be"),
    (
        "convert",
        {"--config": [*SIZES, "sample_height=5"]},
        "sample_height and sample_width must be divisible by the patch size 2",
    ),
    ("convert", {"--config": [*SIZES, "fps=-1"]}, "`fps` must be a number in [0.001, "),
    ("convert", {"--config": [*SIZES, 'action_names=["a"]']}, "`action_names` must have `action_dim` = 3 entries"),
    ("convert", {"--output": None}, "the following arguments are required: --output"),
    ("convert", {"--output": "full"}, "--output must be a new or empty folder, got 'full'"),
    ("convert", {"--output": "file"}, "--output must be a new or empty folder, got the file 'file'"),
    ("convert", {"--output": "/proc/new"}, "--output must be writable"),
    ("convert", {"--output": "loop/new"}, "--output must be writable"),
    ("convert", {"--output": "a\0b"}, "--output must be a path without NUL"),
    ("convert", RELEASED | {"--dataset": None}, "--source irasim requires --dataset"),
    ("convert", RELEASED | {"--dataset": "rt2"}, "argument --dataset: invalid choice: 'rt2'"),
    ("convert", RELEASED | {"--weights": "best"}, "argument --weights: invalid choice: 'best'"),
    ("convert", {"--dataset": "rt1"}, "--dataset must be omitted with --source latte"),
    ("convert", {"--weights": "ema"}, "--weights must be omitted with --source latte"),
    (
        "convert",
        RELEASED | {"--checkpoint": "nowhere.pt"},
        "--checkpoint must be an existing file or folder, got 'nowhere.pt'",
    ),
    ("convert", RELEASED | {"--checkpoint": "latte"}, "--checkpoint must be a checkpoint file, got 'latte', a folder"),
    ("convert", RELEASED | {"--checkpoint": "cut.pt"}, "is not a checkpoint that can be read safely"),
    ("convert", RELEASED | {"--checkpoint": "empty.pt"}, "it is not one zip archive of torch.save"),
    ("convert", RELEASED | {"--checkpoint": "text.pt"}, "it is not one zip archive of torch.save"),
    (
        "convert",
        RELEASED | {"--checkpoint": "list.pt"},
        "contains no weights: it must contain a dictionary of tensors by name",
    ),
    ("convert", RELEASED | {"--checkpoint": "nan.pt"}, "NaN or infinite values"),
    ("convert", RELEASED | {"--checkpoint": "no-ema.pt"}, "contains no 'ema' weights"),
    ("convert", RELEASED | {"--dataset": "languagetable"}, "the weights cannot be converted"),
    ("convert", {"--source": "opensora"}, "--source opensora requires --config fps"),
]

DATA_ROWS = [  # datasets and outputs, for `data` and `evaluate`
    ({"--dataset": None}, "the following arguments are required: --dataset"),
    ({"--dataset": "nowhere"}, "--dataset must be a folder or a Hub id"),
    (
        {"--dataset": "lerobot", "--split": "train", "--fps": "7"},
        "--fps must be omitted for 'lerobot', which stores 5 fps",
    ),
    ({"--dataset": ""}, "--dataset must be a folder or a Hub id such as org/name, got an empty name"),
    ({"--dataset": "empty"}, "'empty' contains no supported dataset"),
    ({"--dataset": "file"}, "'file' contains no supported dataset"),
    ({"--dataset": "loop"}, "--dataset must be a folder"),
    ({"--dataset": "a\0b"}, "--dataset must be a path without NUL"),
    ({"--dataset": "no-episodes"}, "'no-episodes' has no annotation 'annotation/<split>/<id>.json'"),
    ({"--dataset": "cut-annotation"}, "0.json', line 1, is not valid JSON: Expecting ':' delimiter"),
    ({"--dataset": "latin-annotation"}, "0.json', line 1: the file is not JSON in UTF-8"),
    ({"--dataset": "list-annotation"}, "0.json' must name a video in 'video_path' or 'videos'"),
    ({"--dataset": "no-video"}, "0.mp4' as a video: No such file or directory"),
    ({"--dataset": "cut-video"}, "0.mp4' as a video: Invalid data found"),
    ({"--dataset": "no-actions"}, "0.json': an annotation must have 'actions', 'states', or 'state'"),
    ({"--dataset": "nan-actions"}, "'action' must be finite in float32, got [nan, 0.0, 0.0] at frame 0"),
    ({"--dataset": "word-actions"}, "'actions' must be numbers in rows of equal length, got values of type <U32"),
    ({"--dataset": "ragged-actions"}, "'actions' must be numbers in rows of equal length: "),
    ({"--dataset": "outside"}, "passwd' must be a path inside the dataset"),
    ({"--dataset": "no-data", "--split": "train"}, "file-000.parquet': [Errno 2]"),
    ({"--dataset": "no-videos", "--split": "train"}, "file-000.mp4' as a video: No such file or directory"),
    ({"--dataset": "no-meta-episodes", "--split": "train"}, "has no episode in its 'meta' folder"),
    ({"--dataset": "cut-parquet", "--split": "train"}, "file-000.parquet': Parquet magic bytes not found in footer"),
    ({"--dataset": "cut-videos", "--split": "train"}, "file-000.mp4' as a video: Invalid data found"),
    ({"--split": "train"}, "--split must be one of"),
    ({"--split": ""}, "--split must be the name of a split, got an empty name"),
    ({"--split": "test[90%:"}, "--split must be one of ['test'] in 'data'"),
    (
        {"--dataset": "lerobot", "--split": "validation"},
        "--split must be one of ['train'] in 'lerobot', or a part such as",
    ),
    (
        {"--dataset": "lerobot", "--split": "train[200%:]"},
        "--split must be one of ['train'] in 'lerobot', or a part such as",
    ),
    (
        {"--dataset": "lerobot", "--split": "train[x:]"},
        "--split must be one of ['train'] in 'lerobot', or a part such as",
    ),
    (
        {"--dataset": "lerobot", "--split": "train", "--cameras": "wrist"},
        "--cameras must be among ['observation.image'] in 'lerobot', got 'wrist'",
    ),
    ({"--cameras": "wrist"}, "--cameras must be among ['0'] in 'data/annotation/test', got 'wrist'"),
    ({"--cameras": ","}, "--cameras must be among ['0'] in 'data/annotation/test', got ''"),
    ({"--fps": "0"}, "--fps must be positive and finite, got 0"),
    ({"--fps": "-5"}, "--fps must be positive and finite, got -5"),
    ({"--fps": "nan"}, "--fps must be positive and finite, got nan"),
    ({"--fps": "inf"}, "--fps must be positive and finite, got inf"),
    ({"--fps": "fast"}, "argument --fps: invalid float value: 'fast'"),
    ({"--output": "file"}, "--output must be a folder, got the file 'file'"),
    ({"--output": "/proc/new"}, "--output must be writable"),
    ({"--output": "file/new"}, "--output must be writable"),
    ({"--output": "loop/new"}, "--output must be writable"),
    ({"--output": "a\0b"}, "--output must be a path without NUL"),
]

ROWS += [
    *(("data", change, message) for change, message in DATA_ROWS),
    ("generate", {"--frames": None}, "--frames is required with --model"),
    ("data", {"--output": "data"}, "--output must differ from --dataset, got 'data' for both"),
    ("data", {"--output": None}, "the following arguments are required: --output"),
    *((name, {"--output": ""}, "argument --output: must be a path, got an empty value") for name in GOOD),
    ("data", {"--output": "full"}, "'full' is not empty and was not written from this dataset"),
    ("data", {"--robot-type": None, "--push-to-hub": "a/b/c"}, "--push-to-hub must be ORG/NAME, got 'a/b/c'"),
    ("data", {"--push-to-hub": "../name"}, "--push-to-hub must be ORG/NAME"),
    ("data", {"--push-to-hub": ""}, "--push-to-hub must be ORG/NAME"),
    *(("evaluate", change, message) for change, message in DATA_ROWS),
    *(("evaluate", change, message) for change, message in MODEL_ROWS + VALUE_ROWS + SAMPLING_ROWS),
    ("data", {"--dataset": "few-actions"}, "16 frames must have 15 actions between them, got 5"),
    ("evaluate", {"--dataset": "few-actions"}, "is as long as a clip of irasim-short"),
    ("evaluate", {"--dataset": "short"}, "is as long as a clip of irasim-short"),
    ("evaluate", {"--protocol": "best"}, "--protocol must be one of irasim-short"),
    ("evaluate", {"--protocol": "robonet"}, "frames must be (256, 256) (height, width) for the protocol robonet"),
    ("evaluate", {"--num-clips": "0"}, "--num-clips must be at least 1, got 0"),
    ("evaluate", {"--num-clips": "-1"}, "--num-clips must be at least 1, got -1"),
    ("evaluate", {"--batch-size": "0"}, "--batch-size must be at least 1, got 0"),
    ("evaluate", {"--batch-size": "-8"}, "--batch-size must be at least 1, got -8"),
    ("evaluate", {"--faithfulness-clips": "-1"}, "--faithfulness-clips must be at least 0, got -1"),
    ("evaluate", {"--ways": "1"}, "--ways must be at least 2, got 1"),
    ("evaluate", {"--ways": "-4"}, "--ways must be at least 2, got -4"),
    ("evaluate", {"--height": "8"}, "--height and --width must be passed together"),
    ("evaluate", {"--height": "0", "--width": "12"}, "--height must be at least 1, got 0"),
    ("evaluate", {"--height": "8", "--width": "-1"}, "--width must be at least 1, got -1"),
    ("evaluate", {"--height": "16", "--width": "24"}, "frames must be 8x12 (height x width)"),
    ("evaluate", {"--height": "1000000000", "--width": "1000000000"}, "--height must be at most 8192, got 1000000000"),
    ("evaluate", {"--frame-skip": "0"}, "--frame-skip must be at least 1, got 0"),
    ("evaluate", {"--frame-skip": "-2"}, "--frame-skip must be at least 1, got -2"),
    ("evaluate", {"--frame-skip": "1000"}, "--action-composition is required with a --frame-skip of 1000"),
    ("evaluate", {"--pad-actions-to": "2"}, "--pad-actions-to must be at least 3 for"),
    ("evaluate", {"--pad-actions-to": "4"}, "must be 3 like the model's, got 4: use a dataset or model"),
    ("evaluate", {"--pad-actions-to": "0"}, "--pad-actions-to must be at least 1, got 0"),
    ("evaluate", {"--action-derivation": "absolut"}, "--action-derivation must be one of recorded"),
    ("evaluate", {"--action-derivation": "relative_euler"}, "--action-derivation 'relative_euler' requires states"),
    ("evaluate", {"--action-composition": "recorded"}, "--action-composition must be one of relative_euler"),
    (
        "evaluate",
        {"--state-key": "pose", "--action-derivation": "absolute"},
        "--action-derivation 'absolute' requires states",
    ),
    ("evaluate", {"--published": "robonet"}, "--published must be one of"),
    ("evaluate", {"--predictions": "nowhere"}, "--predictions must be a folder, got 'nowhere'"),
    ("evaluate", {"--predictions": "file"}, "--predictions must be a folder, got 'file'"),
    ("evaluate", {"--predictions": "a\0b"}, "--predictions must be a path without NUL"),
    ("evaluate", {"--save-predictions": "file"}, "--save-predictions must be a folder, got the file 'file'"),
    ("evaluate", {"--save-predictions": "/proc/new"}, "--save-predictions must be writable"),
    ("evaluate", {"--save-truth": "file"}, "--save-truth must be a folder, got the file 'file'"),
    ("evaluate", {"--i3d": "nowhere.pt"}, "--i3d must be a TorchScript file such as i3d_torchscript.pt"),
    ("evaluate", {"--i3d": "frame.png"}, "--i3d must be a TorchScript file, got 'frame.png'"),
    ("evaluate", {"--lpips": "nowhere.pth"}, "lpips"),
    ("evaluate", {"--inception": "nowhere.pth"}, "--inception must be a file, or org/name:file on the Hub"),
    ("evaluate", {"--inception": "a/b/c:d"}, "--inception must be a file, or org/name:file on the Hub"),
    ("evaluate", {"--inception": "a\0b"}, "--inception must be a file, or org/name:file on the Hub"),
    ("evaluate", {"--lpips": "a\0b"}, "lpips"),
    ("evaluate", {"--i3d": "a\0b"}, "--i3d must be a TorchScript file such as i3d_torchscript.pt"),
    ("evaluate", {"--predictions": "empty"}, "--predictions must contain"),
    ("evaluate", {"--predictions": "loop"}, "--predictions must be a folder, got 'loop'"),
    ("evaluate", {"--output": "full"}, "--output must be a new folder or one of an earlier run, got 'full'"),
    ("evaluate", {"--output": "model"}, "--output must be a new folder or one of an earlier run, got 'model'"),
    ("evaluate", {"--save-predictions": "a\0b"}, "--save-predictions must be a path without NUL"),
]


ROWS += [
    *(("plan", change, message) for change, message in FILE_ROWS + HISTORY_ROWS + OUTPUT_ROWS + SAMPLING_ROWS),
    ("plan", {"--frames": None}, "--frames is required"),
    ("plan", {"--goal": None}, "pass exactly one of --goal and --reward"),
    ("plan", {"--goal": "missing.png"}, "--goal must be an image or video file, got 'missing.png'"),
    ("plan", {"--goal": "depth.png"}, "--goal must be a readable image: image 'depth.png' has mode 'I;16'"),
    ("plan", {"--goal": "moving.png"}, "--goal must be a readable image: image 'moving.png' is animated"),
    ("plan", {"--goal": "large.png"}, "--goal must be 8x12"),
    ("plan", {"--goal": "text.png"}, "--goal must be a readable image"),
    ("plan", {"--goal": "a\0b.png"}, "--goal must be an image or video file"),
    ("plan", {"--output": "frame.mp4"}, "--output must not overwrite the input 'frame.png'"),
    ("plan", {"--goal": None, "--reward": "nowhere"}, "--reward must be a FrameRegressor, got 'nowhere'"),
    ("plan", {"--goal": None, "--reward": "model"}, "--reward must be a FrameRegressor, got 'model'"),
    ("plan", {"--goal": None, "--reward": "empty"}, "--reward must be a FrameRegressor, got 'empty'"),
    ("plan", {"--encoder": "nowhere"}, "--encoder must be a vision model, got 'nowhere'"),
    ("plan", {"--encoder": "model"}, "--encoder must be a vision model, got 'model'"),
    ("plan", {"--planner": "guess"}, "argument --planner: invalid choice: 'guess'"),
    ("plan", {"--planner": "lines", "--iterations": None}, "--planner lines requires --radius"),
    (
        "plan",
        {"--planner": "lines", "--iterations": None, "--radius": "nan"},
        "--radius must be positive and finite, got nan",
    ),
    (
        "plan",
        {"--planner": "lines", "--iterations": None, "--radius": "-1"},
        "--radius must be positive and finite, got -1.0",
    ),
    ("plan", {"--planner": "lines"}, "--iterations is not supported by --planner lines"),
    ("plan", {"--horizon": "0"}, "--horizon must be at least 1, got 0"),
    ("plan", {"--horizon": "-1"}, "--horizon must be at least 1, got -1"),
    ("plan", {"--candidates": "0"}, "--candidates must be at least 1, got 0"),
    ("plan", {"--iterations": "0"}, "--iterations must be at least 1, got 0"),
    ("plan", {"--std": "nan"}, "--std must be positive and finite, got nan"),
    ("plan", {"--std": "-1"}, "--std must be positive and finite, got -1.0"),
    ("plan", {"--std": "inf"}, "--std must be positive and finite, got inf"),
    ("plan", {"--knots": "0"}, "--knots must be at least 1, got 0"),
    ("plan", {"--batch-size": "0"}, "--batch-size must be at least 1, got 0"),
    ("plan", {"--position": "1,2"}, "--position must be 3 finite numbers"),
    ("plan", {"--position": "1,2,x"}, "--position must be 3 finite numbers"),
    ("plan", {"--position": "1,2,nan"}, "--position must be 3 finite numbers"),
    ("plan", {"--position": "1,2,1e38"}, "--position must be near the bounds"),
    *(("adapt", change, message) for change, message in MODEL_ROWS),
    ("adapt", {"--action-dim": None}, "at least one change is required"),
    ("adapt", {"--action-dim": "0"}, "--action-dim must be at least 1, got 0"),
    ("adapt", {"--action-dim": "two"}, "argument --action-dim: invalid int value: 'two'"),
    ("adapt", {"--patch-size": "0"}, "--patch-size must be at least 1, got 0"),
    ("adapt", {"--patch-size": "4"}, "--patch-size must divide the sides of the latents"),
    ("adapt", {"--action-frequencies": "-1"}, "--action-frequencies must be at least 0, got -1"),
    ("adapt", {"--moving-layers": "0"}, "--moving-layers must be at least 1, got 0"),
    ("adapt", {"--moving-layers": "2"}, "--moving-layers predicts frames from the last history frame: it requires"),
    ("adapt", {"--prediction-type": "flow"}, "argument --prediction-type: invalid choice: 'flow'"),
    ("adapt", {"--vae": "model:vae"}, "--vae and --dataset must be passed together"),
    ("adapt", {"--dataset": "data"}, "--vae and --dataset must be passed together"),
    (
        "adapt",
        {"--vae": "nowhere", "--dataset": "data", "--split": "test"},
        "--vae must be the folder or Hub id of an AutoencoderKL",
    ),
    ("adapt", {"--vae": "model:vae", "--dataset": "empty"}, "'empty' contains no supported dataset"),
    ("adapt", {"--vae": "model:vae", "--dataset": "cut-video", "--split": "test"}, "'cut-video' can be read"),
    ("adapt", {"--height": "8"}, "--height and --width must be passed together"),
    ("adapt", {"--output": "full"}, "--output must be a new or empty folder, got 'full'"),
    ("adapt", {"--output": "file"}, "--output must be a new or empty folder, got the file 'file'"),
    ("adapt", {"--output": "/proc/new"}, "--output must be writable"),
    ("adapt", {"--output": "a\0b"}, "--output must be a path without NUL"),
]


def listing(root):
    """Names of all folders, and names, sizes and times of all files below a folder, which must not change."""
    found = {}
    for folder, folders, files in os.walk(root):
        found |= dict.fromkeys(os.path.join(folder, name) for name in folders)
        for path in (os.path.join(folder, name) for name in files):
            status = os.lstat(path)
            found[path] = status.st_size, status.st_mtime_ns
    return found


def lines_of(err):
    """Return the lines of stderr without argparse's usage."""
    lines = err.splitlines()
    start = 0
    if lines and lines[0].startswith("usage:"):
        start = next(number for number, line in enumerate(lines) if line.startswith("irasim"))
    return lines[start:]


@pytest.mark.parametrize("command", GOOD)
def test_commands_succeed_without_the_change(workspace, tmp_path, monkeypatch, command):
    monkeypatch.chdir(workspace)
    suffix = Path(GOOD[command]["--output"]).suffix
    assert main(command_line(command, {"--output": str(tmp_path / f"new{suffix}")})) == 0


def test_messages_state_a_reason():
    """Expected messages must not be parts of the arguments, which error messages repeat."""
    for command, change, message in ROWS:
        values = [value for entry in change.values() for value in (entry if isinstance(entry, list) else [entry])]
        assert not any(message in (value or "") for value in values), (command, change)
        # the message about lpips depends on the installed packages
        assert len(message) > 8 or "lpips" in message, (command, change)


def identifier(row):
    command, change, _ = row
    return f"{command} {' '.join(f'{flag}={value}' for flag, value in change.items())}"[:80]


@pytest.fixture(scope="module")
def before(workspace):
    return listing(workspace)


@pytest.mark.parametrize(("command", "change", "message"), ROWS, ids=map(identifier, ROWS))
def test_bad_input_prints_one_line_and_changes_nothing(
    workspace, before, monkeypatch, capfd, command, change, message
):
    monkeypatch.chdir(workspace)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's default outside tests
        try:
            status = main(command_line(command, change))
        except SystemExit as stop:
            status = stop.code
    captured = capfd.readouterr()
    assert [str(warning.message) for warning in shown] == []
    assert (status, captured.out) == (2, ""), captured.err
    assert "Traceback" not in captured.err
    (line,) = lines_of(captured.err)
    assert line.startswith("irasim")
    assert message in line
    assert listing(workspace) == before
