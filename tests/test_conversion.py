import collections
import math
import os
import pickle
import re
from pathlib import Path

import numpy as np
import omegaconf
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from tiny_models import tiny_vae

from irasim_diffusers import PRESETS, IRASimPipeline, IRASimTransformer3DModel
from irasim_diffusers.cli import main
from irasim_diffusers.conversion import RELEASED_DATASETS, ConversionReport, load_released_irasim


def table(positions, size):
    omega = 1 / 10000 ** (torch.arange(size // 2, dtype=torch.float64) / (size / 2))
    angles = positions.double()[:, None] * omega
    return torch.cat([angles.sin(), angles.cos()], 1).float()


def grid_table(rows, columns, dim):
    down = torch.arange(rows).repeat_interleave(columns)
    across = torch.arange(columns).repeat(rows)
    return torch.cat([table(across, dim // 2), table(down, dim // 2)], 1)


def released_state(dataset, video, *, dim, depth, patch, frames, channels, rows, columns, seed=0):
    """Random weights with the names of the release; `depth` counts single blocks."""
    generator = torch.Generator().manual_seed(seed)
    state = {}

    def linear(name, inputs, outputs):
        state[f"{name}.weight"] = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
        state[f"{name}.bias"] = 0.1 * torch.randn(outputs, generator=generator)

    state["pos_embed"] = grid_table(rows, columns, dim)[None]
    state["temp_embed"] = table(torch.arange(frames), dim)[None]
    linear("x_embedder.proj", channels * patch**2, dim)
    state["x_embedder.proj.weight"] = state["x_embedder.proj.weight"].reshape(dim, channels, patch, patch)
    linear("t_embedder.mlp.0", 256, dim)
    linear("t_embedder.mlp.2", dim, dim)
    if dataset == "languagetable":
        linear("embed_arm_state", 2, 4 * dim)
        linear("embed_state", 4 * dim, dim)
        if video:
            linear("mlp.fc1", (frames - 1) * dim, (frames - 1) * dim)
            linear("mlp.fc2", (frames - 1) * dim, dim)
    else:
        linear("embed_state.fc1", 7 * (frames - 1 if video else 1), 4 * dim)
        linear("embed_state.fc2", 4 * dim, dim)
    state["mask_emb_fn.weight"] = torch.randn(1, dim, generator=generator)
    for index in range(depth):
        linear(f"blocks.{index}.attn.qkv", dim, 3 * dim)
        linear(f"blocks.{index}.attn.proj", dim, dim)
        linear(f"blocks.{index}.mlp.fc1", dim, 4 * dim)
        linear(f"blocks.{index}.mlp.fc2", 4 * dim, dim)
        linear(f"blocks.{index}.adaLN_modulation.1", dim, 6 * dim)
    linear("final_layer.adaLN_modulation.1", dim, 2 * dim)
    linear("final_layer.linear", dim, patch**2 * channels)
    return state


def released_forward(state, x, t, actions, *, heads, dataset, video, final_frame_ada=False):
    """Reference of the released network for x (B, F, C, H, W) and actions as scaled by its data classes."""
    batch, frames, channels, height, width = x.shape
    dim, _, patch, _ = state["x_embedder.proj.weight"].shape
    rows, columns = height // patch, width // patch

    def linear(name, value):
        return F.linear(value, state[f"{name}.weight"], state[f"{name}.bias"])

    def gelu(value):
        return F.gelu(value, approximate="tanh")

    x = F.conv2d(x.flatten(0, 1), state["x_embedder.proj.weight"], state["x_embedder.proj.bias"], stride=patch)
    x = x.flatten(2).transpose(1, 2) + state["pos_embed"]  # (B F, S, D)
    angles = t.float()[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
    time = linear("t_embedder.mlp.2", F.silu(linear("t_embedder.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))))

    if dataset == "languagetable":
        states = linear("embed_state", linear("embed_arm_state", actions))
        if video:
            states = linear("mlp.fc2", gelu(linear("mlp.fc1", states.flatten(1))))
    else:
        states = linear("embed_state.fc2", gelu(linear("embed_state.fc1", actions.flatten(1) if video else actions)))
    if not video:
        states = torch.cat([state["mask_emb_fn.weight"].expand(batch, 1, dim), states], 1).flatten(0, 1)
    by_frame = time.repeat_interleave(frames, 0)
    by_place = time.repeat_interleave(rows * columns, 0)
    spatial = by_frame + (states.repeat_interleave(frames, 0) if video else states)
    temporal = by_place + states.repeat_interleave(rows * columns, 0) if video else by_place

    def modulated(value, shift, scale):
        return F.layer_norm(value, (dim,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]

    def block(name, value, condition):
        parts = linear(f"{name}.adaLN_modulation.1", F.silu(condition)).chunk(6, 1)
        inner = modulated(value, parts[0], parts[1])
        qkv = linear(f"{name}.attn.qkv", inner).reshape(*inner.shape[:2], 3, heads, dim // heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = ((q @ k.transpose(-1, -2)) / (dim // heads) ** 0.5).softmax(-1) @ v
        value = value + parts[2][:, None] * linear(f"{name}.attn.proj", attended.transpose(1, 2).flatten(2))
        inner = modulated(value, parts[3], parts[4])
        return value + parts[5][:, None] * linear(f"{name}.mlp.fc2", gelu(linear(f"{name}.mlp.fc1", inner)))

    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    for index in range(0, depth, 2):
        x = block(f"blocks.{index}", x, spatial)
        x = x.unflatten(0, (batch, frames)).transpose(1, 2).flatten(0, 1)  # (B S, F, D)
        if index == 0:
            x = x + state["temp_embed"]
        x = block(f"blocks.{index + 1}", x, temporal)
        x = x.unflatten(0, (batch, rows * columns)).transpose(1, 2).flatten(0, 1)
    shift, scale = linear(
        "final_layer.adaLN_modulation.1", F.silu(spatial if video or final_frame_ada else by_frame)
    ).chunk(2, 1)
    x = linear("final_layer.linear", modulated(x, shift, scale))
    x = x.reshape(batch, frames, rows, columns, patch, patch, channels).permute(0, 1, 6, 2, 4, 3, 5)
    return x.reshape(batch, frames, channels, height, width)


# all sizes of a case differ: width, heads, single blocks, patch size, frames, channels, patch rows and columns
SIZES = ("dim", "heads", "depth", "patch", "frames", "channels", "rows", "columns")
CASES = {
    "rt1": ("rt1", False, (24, 3, 4, 2, 5, 1, 6, 8)),
    "bridge": ("bridge", False, (16, 4, 2, 1, 3, 5, 6, 9)),
    "languagetable": ("languagetable", False, (20, 5, 6, 3, 4, 8, 1, 9)),
    "rt1-video": ("rt1", True, (32, 8, 4, 2, 6, 3, 5, 1)),
    "languagetable-video": ("languagetable", True, (12, 3, 6, 4, 7, 1, 8, 5)),
}


def case(name):
    dataset, video, values = CASES[name]
    sizes = {"dataset": dataset, "video": video} | dict(zip(SIZES, values, strict=True))
    heads = sizes.pop("heads")
    overrides = {
        "num_attention_heads": heads,
        "sample_height": sizes["rows"] * sizes["patch"],
        "sample_width": sizes["columns"] * sizes["patch"],
    }
    return sizes, overrides, released_state(**sizes)


def write(path, state, **others):
    """Write a file like the release: weights, optimizer state, and settings as an OmegaConf object."""
    settings = omegaconf.OmegaConf.create(
        {"model": "IRASim-XL/2", "extras": 3, "video_size": [256, 320], "nested": {"a": None}}
    )
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2, 3))])
    torch.save({"model": state, "opt": optimizer.state_dict(), "args": settings} | others, path)
    return path


@pytest.mark.parametrize("final_frame_ada", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_released_weights_give_the_released_outputs(name, final_frame_ada, tmp_path):
    sizes, overrides, state = case(name)
    path = write(tmp_path / "0300000.pt", {key: value + 1 for key, value in state.items()}, ema=state)
    report = ConversionReport()
    dataset, frames = sizes["dataset"], sizes["frames"]
    model = load_released_irasim(path, dataset, final_frame_ada=final_frame_ada, report=report, **overrides)
    torch.manual_seed(3)
    x = torch.randn(2, frames, sizes["channels"], overrides["sample_height"], overrides["sample_width"])
    t, actions = torch.tensor([3, 871]), 0.05 * torch.randn(2, frames - 1, model.config.action_dim)
    scaled = actions * torch.tensor(RELEASED_DATASETS[dataset]["action_scale"])
    expected = released_forward(
        state, x, t, scaled, heads=model.config.num_attention_heads, dataset=dataset, video=sizes["video"],
        final_frame_ada=final_frame_ada,
    )  # fmt: skip
    with torch.no_grad():
        output = model(x.transpose(1, 2), t, actions).sample.transpose(1, 2)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert report.mapped.keys() | report.dropped.keys() == state.keys()
    assert sorted(report.dropped) == ["pos_embed", "temp_embed"]
    assert "blocks.1.attn.qkv.weight -> temporal_transformer_blocks.0.attn1.to_q.weight" in str(report)


def test_the_config_is_complete(tmp_path):
    _, overrides, state = case("languagetable-video")
    config = load_released_irasim(write(tmp_path / "a.pt", state, ema=state), "languagetable", **overrides).config
    assert (config.conditioning, config.sample_frames, config.num_layers, config.patch_size) == ("video", 7, 3, 4)
    assert (config.action_scale, config.action_names, config.fps) == ([20.0, 20.0], ["x", "y"], 10.0)


@pytest.mark.parametrize("weights", ["ema", "model"])
def test_ema_or_raw_weights_or_weights_alone(weights, tmp_path):
    _, overrides, state = case("rt1")
    raw = {f"module.{key}": value for key, value in (state | {"mask_emb_fn.weight": torch.zeros(1, 24)}).items()}
    path = write(tmp_path / "a.pt", raw, ema=state)
    null = load_released_irasim(path, "rt1", weights=weights, **overrides).null_action
    assert torch.equal(null, state["mask_emb_fn.weight"][0] if weights == "ema" else torch.zeros(24))
    torch.save(collections.OrderedDict(state), tmp_path / "b.pt")
    alone = load_released_irasim(tmp_path / "b.pt", "rt1", weights=weights, **overrides)
    assert torch.equal(alone.null_action, state["mask_emb_fn.weight"][0])


def test_every_problem_is_listed(tmp_path):
    _, overrides, state = case("rt1")
    del state["blocks.2.mlp.fc2.bias"]
    state["blocks.0.attn.proj.weight"] = torch.zeros(5, 5)
    state["surprise"] = torch.zeros(1)
    state["pos_embed"] = state["pos_embed"] + 1
    with pytest.raises(ValueError, match=r"cannot be converted \(problems: 4\)") as raised:
        load_released_irasim(write(tmp_path / "a.pt", state, ema=state), "rt1", **overrides)
    message = str(raised.value)
    assert "missing tensor transformer_blocks.1.ff.net.2.bias (24,)" in message
    assert "blocks.0.attn.proj.weight: (5, 5) where transformer_blocks.0.attn1.to_out.0.weight is (24, 24)" in message
    assert "surprise (1,): unknown" in message
    assert "pos_embed (1, 48, 24): unknown, or different from what the model computes" in message


class Attack:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_file_is_never_executed(legacy, tmp_path):
    _, overrides, state = case("rt1")
    content = {"ema": state, "args": Attack(tmp_path / "run")}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"one zip archive|it refers to 'posix.system'"):
        load_released_irasim(tmp_path / "a.pt", "rt1", **overrides)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ({"ema": {"a": torch.zeros(1)}}, {}, "must contain IRASim weights"),
        ({"other": 3}, {}, r"contains no 'ema' weights, only \['other'\]"),
        ({"model": {"a": torch.zeros(1)}}, {}, r"contains no 'ema' weights, only \['model'\]"),
        (
            {"ema": {"x_embedder.proj.weight": 3}},
            {},
            "contains no weights: it must contain a dictionary of tensors by name",
        ),
        ({}, {"path": Path(__file__).parent}, "must be a checkpoint file, got .*, a folder"),
        (pickle.dumps(3), {}, "not a checkpoint that can be read safely"),
        (None, {}, "does not exist"),
        ({}, {"dataset": "droid"}, "`dataset` must be one of"),
        ({}, {"weights": "best"}, "`weights` must be ema or model"),
    ],
)
def test_bad_files(content, arguments, message, tmp_path):
    path = tmp_path / "a.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(ValueError, match=message):
        load_released_irasim(**{"path": path, "dataset": "rt1"} | arguments)


@pytest.mark.parametrize("legacy", [False, True])
def test_damaged_files_raise(legacy, tmp_path):
    _, overrides, state = case("rt1")
    torch.save({"ema": state}, tmp_path / "a.pt", _use_new_zipfile_serialization=not legacy)
    content, rng = (tmp_path / "a.pt").read_bytes(), np.random.default_rng(0)
    refused = 0
    for length in rng.integers(0, len(content), 20):
        damaged = bytearray(content[:length])
        for place in rng.integers(0, min(len(damaged), 3000), 3) if len(damaged) % 2 else ():
            damaged[place] = rng.integers(256)
        (tmp_path / "a.pt").write_bytes(damaged)
        try:
            load_released_irasim(tmp_path / "a.pt", "rt1", **overrides)
        except ValueError:
            refused += 1
    assert refused == 20


def test_weights_of_another_data_set_are_listed(tmp_path):
    _, overrides, state = case("rt1")
    with pytest.raises(ValueError, match=r"embed_state.fc1.weight: \(96, 7\) where action_embed.linear_1.weight is"):
        load_released_irasim(write(tmp_path / "a.pt", state, ema=state), "languagetable", **overrides)


def test_unknown_width_requires_number_of_heads(tmp_path):
    _, _, state = case("rt1")
    with pytest.raises(
        ValueError, match=r"`num_attention_heads` is required for width 24, which is not a preset of the paper"
    ):
        load_released_irasim(write(tmp_path / "a.pt", state, ema=state), "rt1", sample_height=4, sample_width=14)


def test_the_command_writes_a_pipeline(tmp_path, capsys):
    state = released_state("rt1", False, dim=24, depth=2, patch=2, frames=4, channels=4, rows=16, columns=20)
    path = write(tmp_path / "a.pt", state, ema=state)
    tiny_vae().save_pretrained(tmp_path / "weights" / "vae")
    command = ["convert", "--checkpoint", path, "--dataset", "rt1", "--vae", f"{tmp_path}/weights:vae"]
    command += ["--config", "num_attention_heads=3", "--output", tmp_path / "out"]
    assert main(list(map(str, command))) == 0
    assert "mapped, 2 dropped" in capsys.readouterr().out
    pipeline = IRASimPipeline.from_pretrained(tmp_path / "out")
    config = pipeline.transformer.config
    assert (config.action_scale, config.fps, config.sample_frames) == ([20.0] * 6 + [1.0], 3.0, 4)
    calls = []
    pipeline.transformer.register_forward_hook(lambda *_: calls.append(1))
    pipeline(np.zeros((64, 80, 3), np.uint8), np.zeros((3, 7)), num_inference_steps=50)
    assert len(calls) == 59  # with the Runge-Kutta warm-up, like the release
    before = sorted(tmp_path.iterdir())
    assert main(list(map(str, command))) == 2  # the output folder now exists
    assert "--output must be a new or empty folder" in capsys.readouterr().err
    command[6], command[-1] = f"{tmp_path}/nowhere", tmp_path / "second"
    assert main(list(map(str, command))) == 2
    assert "--vae must be the folder or Hub id of an AutoencoderKL" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def test_averaged_position_tables_are_accepted(tmp_path):
    """The EMA of the release also averages its fixed position tables, which changes them slightly."""
    _, overrides, state = case("rt1")
    averaged = state | {key: state[key] * (1 - 1.7e-4) for key in ("pos_embed", "temp_embed")}
    report = ConversionReport()
    load_released_irasim(write(tmp_path / "a.pt", state, ema=averaged), "rt1", report=report, **overrides)
    assert report.dropped["temp_embed"] == "computed here, differs by at most 0.0002"


def test_torchscript_program_is_not_executed(tmp_path):
    class Program(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    torch.jit.save(torch.jit.script(Program()), tmp_path / "program.pt")
    with pytest.raises(ValueError, match="is a TorchScript program, not a checkpoint"):
        load_released_irasim(tmp_path / "program.pt", "rt1")


def test_loader_failure_without_config_names_the_checkpoint(tmp_path, monkeypatch, capsys):
    tiny_vae().save_pretrained(tmp_path / "a:vae")  # names of folders may contain a colon
    monkeypatch.setattr("irasim_diffusers.conversion.load_latte", raising(RuntimeError("out of memory")))
    flags = ["--checkpoint", str(tmp_path), "--vae", str(tmp_path / "a:vae"), "--output", str(tmp_path / "out")]
    assert main(["convert", "--source", "latte", *flags]) == 2
    expected = f"irasim: error: --checkpoint '{tmp_path}' cannot be loaded: out of memory\n"
    assert capsys.readouterr().err == expected
    assert main(["convert", "--source", "latte", *flags, "--config", "action_dim=2"]) == 2
    assert "--config must define a model, got 'action_dim=2': out of memory" in capsys.readouterr().err


def raising(error):
    def fail(*_, **__):
        raise error

    return fail


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset", "rt2"], "invalid choice: 'rt2'"),
        (["--checkpoint", "{folder}"], "must be a checkpoint file, got .*, a folder"),
        (["--checkpoint", "{folder}/cut.pt"], "is not a checkpoint that can be read safely"),
        (["--checkpoint", "{folder}/alone.pt", "--weights", "ema"], "contains no 'ema' weights"),
        (["--dataset", "languagetable"], r"cannot be converted \(problems: \d+\)"),
        (["--vae", "{folder}/eight"], "--vae must have 4 latent channels to match the weights, got .* with 8"),
        (["--config", "num_attention_heads=x"], "--config num_attention_heads must be int in JSON, got 'x'"),
        (["--config", "action_scale=[1,2"], r"--config action_scale must be float \| list\[float\] in JSON, got"),
        (["--config", "num_attention_heads=0"], "--config num_attention_heads must be an integer of at least 1"),
        (["--config", "num_attention_heads=3", "action_dim=0"], "`action_dim` must be an integer of at least 1"),
    ],
)
def test_command_errors_are_one_line(arguments, message, tmp_path, capsys):
    state = released_state("rt1", False, dim=24, depth=2, patch=2, frames=4, channels=4, rows=16, columns=20)
    write(tmp_path / "a.pt", state, ema=state)
    write(tmp_path / "alone.pt", state)
    (tmp_path / "cut.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:2000])
    tiny_vae().save_pretrained(tmp_path / "vae")
    AutoencoderKL(norm_num_groups=4, block_out_channels=(4,), latent_channels=8).save_pretrained(tmp_path / "eight")
    given = {"--checkpoint": f"{tmp_path}/a.pt", "--dataset": "rt1", "--vae": f"{tmp_path}/vae"}
    command = ["convert", *(word for pair in given.items() for word in pair), "--output", f"{tmp_path}/out"]
    command += ["--config", "num_attention_heads=3", *(word.format(folder=tmp_path) for word in arguments)]
    before = sorted(tmp_path.iterdir())
    try:
        status = main(command)
    except SystemExit as stop:  # argparse
        status = stop.code
    error = capsys.readouterr().err
    assert status == 2
    assert re.search(message, error)
    assert "Traceback" not in error
    assert error.count("\n") == 1 or error.startswith("usage")
    assert sorted(tmp_path.iterdir()) == before


def test_the_sizes_in_the_guide():
    text = (Path(__file__).parents[1] / "examples" / "convert.md").read_text()
    rows = dict(re.findall(r"^\| (.+?) \|.*\| ([\d,]+) \|$", text, flags=re.MULTILINE))
    names = {"rt1": "RT-1", "bridge": "Bridge", "languagetable": "Language-Table"}
    single = {"num_attention_heads": 16, "attention_head_dim": 72, "num_layers": 28, "norm_type": "ada_norm_single"}
    models = {
        f"{names[dataset]}, {conditioning.title()}-Ada": PRESETS["XL"] | known | {"conditioning": conditioning}
        for dataset, known in RELEASED_DATASETS.items()
        for conditioning in ("frame", "video")
    } | {
        "Open-Sora 1.2, STDiT3": single | {"qk_norm": "rms_norm", "temporal_position": "rope", "use_fps": True},
        "Latte-1": single,
    }
    assert rows.keys() == models.keys()
    for name, config in models.items():
        with torch.device("meta"):
            model = IRASimTransformer3DModel(**config)
        assert rows[name] == f"{sum(parameter.numel() for parameter in model.parameters()):,}", name


@pytest.mark.parametrize("key", ["blocks.0.scale_shift_table", "blocks.x.attn.qkv.weight"])
def test_keys_of_other_blocks_are_unknown(key, tmp_path):
    _, overrides, state = case("rt1")
    with pytest.raises(ValueError, match=rf"cannot be converted \(problems: 1\):\n{key} \(3,\): unknown"):
        load_released_irasim(
            write(tmp_path / "a.pt", state | {key: torch.zeros(3)}), "rt1", weights="model", **overrides
        )
