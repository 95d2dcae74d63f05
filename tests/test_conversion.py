import collections
import json
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
from conftest import tiny_transformer, tiny_vae
from diffusers import AutoencoderKL, LatteTransformer3DModel
from safetensors.torch import save_file

from irasim_diffusers import PRESETS, IRASimPipeline, IRASimTransformer3DModel
from irasim_diffusers.cli import main
from irasim_diffusers.conversion import (
    RELEASED_DATASETS,
    ConversionReport,
    change_autoencoder,
    change_patch_size,
    load_latte,
    load_opensora,
    load_released_irasim,
    predict_samples,
)


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
    """Reference of the released network: x (B, F, C, H, W), actions scaled by its data classes."""
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


# Sizes within a case are all different: width, heads, single blocks, patch, frames, channels, patches high and wide
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
    with pytest.raises(ValueError, match="4 tensors cannot be mapped") as raised:
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
        ({"ema": {"x_embedder.proj.weight": 3}}, {}, "contains no weights: it must have a dictionary of tensors"),
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_weights_are_converted_to_float32(dtype, tmp_path):
    _, overrides, state = case("rt1")
    state = {key: value.to(dtype) for key, value in state.items()}
    model = load_released_irasim(write(tmp_path / "a.pt", state, ema=state), "rt1", **overrides)
    assert torch.equal(model.proj_out.weight, state["final_layer.linear.weight"].float())
    state = {
        key: value.to(dtype) for key, value in opensora_state(dim=24, head=6, depth=1, patch=2, channels=4).items()
    }
    save_file(state, tmp_path / "model.safetensors")
    assert load_opensora(tmp_path).fps_embed.linear_1.bias.dtype == torch.float32


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
    assert main(list(map(str, command))) == 2  # the folder exists now
    assert "--output must be a new or empty folder" in capsys.readouterr().err
    command[6], command[-1] = f"{tmp_path}/nowhere", tmp_path / "second"
    assert main(list(map(str, command))) == 2
    assert "--vae must be an AutoencoderKL" in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before


def opensora_state(*, dim, head, depth, patch, channels, seed=0):
    """Random weights with the names of STDiT3, including the text layers."""
    generator = torch.Generator().manual_seed(seed)
    state = {}

    def linear(name, inputs, outputs):
        state[f"{name}.weight"] = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
        state[f"{name}.bias"] = 0.1 * torch.randn(outputs, generator=generator)

    linear("x_embedder.proj", channels * patch**2, dim)
    state["x_embedder.proj.weight"] = state["x_embedder.proj.weight"].reshape(dim, channels, 1, patch, patch)
    for name in ("t_embedder", "fps_embedder"):
        linear(f"{name}.mlp.0", 256, dim)
        linear(f"{name}.mlp.2", dim, dim)
    linear("t_block.1", dim, 6 * dim)
    linear("y_embedder.y_proj.fc1", 8, dim)
    state["y_embedder.y_embedding"] = torch.randn(3, 8, generator=generator)
    for stack in ("spatial_blocks", "temporal_blocks"):
        for index in range(depth):
            name = f"{stack}.{index}"
            state[f"{name}.scale_shift_table"] = torch.randn(6, dim, generator=generator)
            linear(f"{name}.attn.qkv", dim, 3 * dim)
            linear(f"{name}.attn.proj", dim, dim)
            for norm in ("q_norm", "k_norm"):
                state[f"{name}.attn.{norm}.weight"] = 1 + 0.3 * torch.randn(head, generator=generator)
            linear(f"{name}.cross_attn.q_linear", dim, dim)
            linear(f"{name}.mlp.fc1", dim, 4 * dim)
            linear(f"{name}.mlp.fc2", 4 * dim, dim)
    state["final_layer.scale_shift_table"] = torch.randn(2, dim, generator=generator)
    linear("final_layer.linear", dim, patch**2 * channels * 2)
    state["rope.freqs"] = 1 / 10000 ** (torch.arange(0, head, 2) / head)
    return state


def opensora_forward(state, x, t, fps, clean, head):
    """Reference STDiT3 without cross-attention: x (B, C, F, H, W), the first `clean` frames at t = 0."""
    batch, channels, frames, height, width = x.shape
    weight = state["x_embedder.proj.weight"]
    dim, patch = weight.shape[0], weight.shape[-1]
    rows, columns = height // patch, width // patch

    def linear(name, value):
        return F.linear(value, state[f"{name}.weight"], state[f"{name}.bias"])

    def embedder(name, number):
        angles = number.float()[:, None] * torch.exp(-math.log(10000) * torch.arange(128) / 128)
        return linear(f"{name}.mlp.2", F.silu(linear(f"{name}.mlp.0", torch.cat([angles.cos(), angles.sin()], 1))))

    x = F.conv3d(x, weight, state["x_embedder.proj.bias"], stride=(1, patch, patch))
    x = x.flatten(3).permute(0, 2, 3, 1)  # (B, F, S, D)
    scale = ((height * 8) * (width * 8)) ** 0.5 / 512
    side = round((rows * columns) ** 0.5)
    across = (torch.arange(columns) / scale * side / columns).repeat(rows)
    down = (torch.arange(rows) / scale * side / rows).repeat_interleave(columns)
    x = x + torch.cat([table(across, dim // 2), table(down, dim // 2)], 1)

    rate = embedder("fps_embedder", fps)
    now, zero = embedder("t_embedder", t) + rate, embedder("t_embedder", torch.zeros_like(t)) + rate
    condition = torch.stack([zero] * clean + [now] * (frames - clean), 1)  # (B, F, D)
    shared = linear("t_block.1", F.silu(condition)).unflatten(-1, (6, dim))

    def rms(name, value):
        return value * torch.rsqrt(value.square().mean(-1, keepdim=True) + 1e-6) * state[f"{name}.weight"]

    def rotate(value):  # (..., F, head)
        angles = torch.arange(value.shape[-2])[:, None] * state["rope.freqs"]
        even, odd = value[..., 0::2], value[..., 1::2]
        turned = even * angles.cos() - odd * angles.sin(), even * angles.sin() + odd * angles.cos()
        return torch.stack(turned, -1).flatten(-2)

    def block(name, value, temporal):
        parts = (state[f"{name}.scale_shift_table"] + shared)[:, :, :, None].unbind(2)
        inner = F.layer_norm(value, (dim,), eps=1e-6) * (1 + parts[1]) + parts[0]
        inner = inner.transpose(1, 2) if temporal else inner
        q, k, v = linear(f"{name}.attn.qkv", inner).unflatten(-1, (3, dim // head, head)).permute(3, 0, 1, 4, 2, 5)
        q, k = rms(f"{name}.attn.q_norm", q), rms(f"{name}.attn.k_norm", k)
        if temporal:
            q, k = rotate(q), rotate(k)
        attended = ((q @ k.transpose(-1, -2)) / head**0.5).softmax(-1) @ v
        attended = linear(f"{name}.attn.proj", attended.transpose(-2, -3).flatten(-2))
        value = value + parts[2] * (attended.transpose(1, 2) if temporal else attended)
        inner = F.layer_norm(value, (dim,), eps=1e-6) * (1 + parts[4]) + parts[3]
        return value + parts[5] * linear(
            f"{name}.mlp.fc2", F.gelu(linear(f"{name}.mlp.fc1", inner), approximate="tanh")
        )

    for index in range(sum(key.startswith("spatial_blocks") and key.endswith("scale_shift_table") for key in state)):
        x = block(f"spatial_blocks.{index}", x, temporal=False)
        x = block(f"temporal_blocks.{index}", x, temporal=True)
    shift, scale = (state["final_layer.scale_shift_table"] + condition[:, :, None]).unbind(2)
    x = F.layer_norm(x, (dim,), eps=1e-6) * (1 + scale[:, :, None]) + shift[:, :, None]
    x = linear("final_layer.linear", x).unflatten(-1, (patch, patch, 2 * channels)).unflatten(2, (rows, columns))
    return x.permute(0, 6, 1, 2, 4, 3, 5).reshape(batch, 2 * channels, frames, height, width)[:, :channels]


# width, head, pairs, patch, channels; frames, clean frames, patches high and wide, action components
OPENSORA_CASES = [
    (24, 6, 3, 2, 4, 5, 1, 8, 7, 9),
    (16, 8, 1, 2, 3, 5, 4, 6, 7, 9),
    (40, 10, 2, 3, 5, 7, 4, 1, 6, 8),
    (36, 18, 1, 4, 2, 6, 3, 5, 8, 7),
    (20, 4, 2, 1, 5, 8, 6, 3, 7, 9),
]


@pytest.mark.parametrize("values", OPENSORA_CASES)
def test_converted_opensora_matches_stdit3_without_text(values, tmp_path):
    dim, head, depth, patch, channels, frames, clean, rows, columns, action_dim = values
    state = opensora_state(dim=dim, head=head, depth=depth, patch=patch, channels=channels)
    save_file(state, tmp_path / "model.safetensors")
    report = ConversionReport()
    model = load_opensora(
        tmp_path, report=report, action_dim=action_dim, num_history_frames=clean, sample_frames=frames
    )
    torch.manual_seed(6)
    x = torch.randn(2, channels, frames, rows * patch, columns * patch)
    t, fps, actions = (
        torch.tensor([40.0, 913.5]),
        torch.tensor([3.0, 24.0]),
        torch.randn(2, frames - clean, action_dim),
    )
    with torch.no_grad():
        output = model(x, t, actions, fps=fps).sample
    expected = -opensora_forward(state, x, t, fps, clean, head)  # the velocity of diffusers has the opposite sign
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert {reason.split(",")[0] for reason in report.dropped.values()} == {"text", "computed here"}
    assert report.mapped.keys() | report.dropped.keys() == state.keys()
    with pytest.raises(ValueError, match="`fps` must be given"):
        model(x, t, actions)


# heads, head, pairs, patch, channels; frames, patches high and wide, action components
LATTE_CASES = [
    (3, 8, 1, 2, 4, 6, 5, 7, 9),
    (4, 6, 2, 1, 3, 5, 7, 8, 9),
    (2, 10, 3, 4, 5, 7, 1, 6, 8),
    (5, 4, 1, 2, 3, 8, 6, 9, 7),
    (1, 12, 2, 4, 6, 3, 5, 8, 7),
]


def test_sizes_of_a_case_are_distinct():
    released = [(*values, RELEASED_DATASETS[dataset]["action_dim"]) for dataset, _, values in CASES.values()]
    for values in [*released, *OPENSORA_CASES, *LATTE_CASES]:
        assert len(set(values)) == len(values), values


def latte_model(heads, head, depth, patch, channels, frames):
    """Latte of diffusers with random weights, an implementation that is independent of ours."""
    latte = LatteTransformer3DModel(
        num_attention_heads=heads, attention_head_dim=head, in_channels=channels, out_channels=2 * channels,
        num_layers=depth, patch_size=patch, sample_size=64, cross_attention_dim=head * heads, caption_channels=5,
        attention_bias=True, norm_type="ada_norm_single", activation_fn="gelu-approximate",
        norm_elementwise_affine=False, video_length=frames,
    )  # fmt: skip
    for parameter in latte.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    for block in latte.transformer_blocks:
        torch.nn.init.zeros_(block.attn2.to_out[0].weight)
        torch.nn.init.zeros_(block.attn2.to_out[0].bias)
    return latte


@pytest.mark.parametrize("values", LATTE_CASES)
def test_converted_latte_matches_latte_without_text(values, tmp_path):
    heads, head, depth, patch, channels, frames, rows, columns, action_dim = values
    torch.manual_seed(7)
    latte = latte_model(heads, head, depth, patch, channels, frames)
    latte.save_pretrained(tmp_path)
    report = ConversionReport()
    model = load_latte(tmp_path, report=report, num_attention_heads=heads, action_dim=action_dim)
    x, t = torch.randn(2, channels, frames, patch * rows, patch * columns), torch.tensor([12, 640])
    with torch.no_grad():
        expected = latte(x, t, encoder_hidden_states=torch.randn(2, 7, 5)).sample[:, :channels]
        output = model(x, t, torch.randn(2, frames - 1, action_dim)).sample
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert report.mapped.keys() | report.dropped.keys() == latte.state_dict().keys()
    assert set(report.dropped.values()) == {"text"}


def test_latte_lists_problems_and_the_command_converts_it(tmp_path, capsys):
    latte = latte_model(3, 8, 1, 2, 4, 6)
    latte.save_pretrained(tmp_path / "latte")
    tiny_vae().save_pretrained(tmp_path / "vae")
    command = ["convert", "--source", "latte", "--checkpoint", str(tmp_path / "latte"), "--vae", str(tmp_path / "vae")]
    command += ["--output", str(tmp_path / "out"), "--config", "num_attention_heads=3", "action_dim=5"]
    assert main(command) == 0
    assert IRASimPipeline.from_pretrained(tmp_path / "out").transformer.config.spatial_position == "fixed"
    state = latte.state_dict()
    del state["transformer_blocks.0.attn1.to_k.bias"]
    state["temporal_transformer_blocks.0.ff.net.2.weight"] = torch.zeros(3, 4)
    state["surprise"] = torch.zeros(2)
    save_file({key: value.contiguous() for key, value in state.items()}, tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match="3 tensors cannot be mapped") as raised:
        load_latte(tmp_path / "broken.safetensors", num_attention_heads=3)
    for line in (
        "missing tensor transformer_blocks.0.attn1.to_k.bias (24,)",
        "ff.net.2.weight: (3, 4) where",
        "surprise (2,)",
    ):
        assert line in str(raised.value)


def test_open_sora_lists_problems(tmp_path):
    state = opensora_state(dim=24, head=6, depth=1, patch=2, channels=4)
    del state["temporal_blocks.0.mlp.fc1.bias"]
    state["rope.freqs"] = state["rope.freqs"] + 1
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="2 tensors cannot be mapped") as raised:
        load_opensora(tmp_path)
    assert "rope.freqs (3,): unknown" in str(raised.value)
    assert "missing tensor temporal_transformer_blocks.0.ff.net.0.proj.bias (96,)" in str(raised.value)
    with pytest.raises(ValueError, match="must contain Latte weights"):
        load_latte(tmp_path)
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load_opensora(tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match="must be a safetensors file or a folder"):
        load_opensora(tmp_path / "nowhere")


def test_a_folder_of_shards_is_read(tmp_path):
    state = opensora_state(dim=24, head=6, depth=1, patch=2, channels=4)
    whole = tmp_path / "whole.safetensors"
    save_file(state, whole)
    shards = tmp_path / "shards"
    shards.mkdir()
    names = [shards / f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for number, name in enumerate(names):
        save_file(dict(list(state.items())[number::2]), name)
    index = shards / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {key: names[i % 2].name for i, key in enumerate(state)}}))
    expected = load_opensora(whole).state_dict()
    for key, value in load_opensora(shards).state_dict().items():
        assert torch.equal(value, expected[key]) or key.startswith("action_embed.")
    with pytest.raises(ValueError, match=r"for shards, pass the folder instead of the index"):
        load_opensora(index)
    whole.rename(shards / "model.fp16.safetensors")
    with pytest.raises(ValueError, match=f"contains {len(state)} tensors more than once"):
        load_opensora(shards)
    names[0].unlink()
    (shards / "model.fp16.safetensors").unlink()
    with pytest.raises(ValueError, match=r"missing"):
        load_opensora(shards)


def test_the_command_converts_opensora(tmp_path, capsys):
    save_file(opensora_state(dim=24, head=6, depth=1, patch=2, channels=4), tmp_path / "model.safetensors")
    tiny_vae().save_pretrained(tmp_path / "vae")
    command = [
        "convert",
        "--source",
        "opensora",
        "--checkpoint",
        f"{tmp_path}/model.safetensors",
        "--vae",
        f"{tmp_path}/vae",
    ]
    command += [
        "--output",
        f"{tmp_path}/out",
        "--config",
        "action_dim=2",
        "sample_height=8",
        "sample_width=4",
        "fps=5",
    ]
    assert main(command) == 0
    pipeline = IRASimPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.transformer.config.fps == 5
    images = pipeline(np.zeros((16, 8, 3), np.uint8), np.zeros((3, 2)), num_inference_steps=2).frames[0]
    assert len(images) == 3
    shift = (64 * 8 * 4) ** 0.5 / 512 * 16**0.5  # pixels and frames of a window
    assert pipeline.scheduler.config.shift == pytest.approx(shift)
    expected = [shift * s / (1 + (shift - 1) * s) for s in (1.0, 0.5)]
    np.testing.assert_allclose(pipeline.scheduler.sigmas, [*expected, 0.0], rtol=1e-5)
    for wrong in ("action_dims=2", "action_dim"):
        assert main([*command[:7], "--output", f"{tmp_path}/second", "--config", "fps=5", wrong]) == 2
        assert "--config must be KEY=VALUE" in capsys.readouterr().err
    assert main([*command[:1], *command[3:7], "--output", f"{tmp_path}/second"]) == 2
    assert "--source irasim requires --dataset" in capsys.readouterr().err


def test_the_same_patch_size_does_not_change_the_output():
    torch.manual_seed(0)
    model = tiny_transformer(action_frequencies=1)
    more = change_patch_size(model, 2, action_frequencies=3)
    inputs = torch.randn(3, 4, 5, 4, 6), torch.tensor([7, 500, 999]), torch.randn(3, 3, 3)
    torch.testing.assert_close(more(*inputs).sample, model(*inputs).sample)
    assert more.config.action_frequencies == 3


def test_finer_patches_keep_their_position_and_scale():
    model = tiny_transformer(patch_size=3, sample_height=6, sample_width=9)
    fine = change_patch_size(model, 1)
    coarse_places = model._spatial_positions(2, 3)
    torch.testing.assert_close(
        fine._spatial_positions(6, 9).unflatten(1, (6, 9))[:, 1::3, 1::3].flatten(1, 2), coarse_places
    )
    torch.testing.assert_close(fine.patch_embed.proj.weight[..., 0, 0], model.patch_embed.proj.weight[..., 1, 1] * 9)
    for name in ("weight", "bias"):  # the rows of the center of a coarse patch
        coarse_rows = getattr(model.proj_out, name).unflatten(0, (3, 3, 4))
        torch.testing.assert_close(getattr(fine.proj_out, name), coarse_rows[1, 1])
    again = change_patch_size(fine, 2)
    assert again.config.base_patch_size == 3
    assert again(torch.randn(1, 4, 5, 6, 8), torch.tensor([5]), torch.randn(1, 3, 3)).sample.shape == (1, 4, 5, 6, 8)


@pytest.mark.parametrize("changes", [{"conditioning": "video"}, {"spatial_position": "fixed"}])
def test_unsupported_models_cannot_change_their_patch_size(changes):
    with pytest.raises(ValueError, match="the patch size of this model cannot be changed: its `"):
        change_patch_size(tiny_transformer(**changes), 1)


@pytest.mark.parametrize("changes", [{}, {"base_patch_size": 3}, {"conditioning": "video"}])
def test_change_to_an_autoencoder_with_linearly_mapped_latents(changes):
    model = tiny_transformer(**changes)
    latents, noise = torch.randn(200, 4, 4, 6), torch.randn(2, 4, 5, 4, 6)

    def other(latents):  # one channel of twice the size, each quarter scaled
        return torch.nn.functional.pixel_shuffle(latents * torch.tensor([1.0, -1.2, 0.8, 1.1]).view(4, 1, 1), 2)

    changed = change_autoencoder(model, 4, latents, other(latents))
    assert (changed.config.in_channels, changed.config.sample_height, changed.config.sample_width) == (1, 8, 12)
    inputs = torch.tensor([7, 999]), torch.randn(2, 3, 3)
    shuffled = other(noise.transpose(1, 2)).transpose(1, 2)
    expected = other(model(noise, *inputs).sample.transpose(1, 2)).transpose(1, 2)
    assert (changed(shuffled, *inputs).sample - expected).abs().max() < 0.01 * expected.abs().max()


def test_at_the_last_timestep_a_velocity_is_the_negated_sample():
    model = tiny_transformer(prediction_type="v_prediction")
    inputs = torch.randn(2, 4, 5, 4, 6), torch.tensor([999, 999]), torch.randn(2, 3, 3)
    samples = predict_samples(model)
    torch.testing.assert_close(samples(*inputs).sample, -model(*inputs).sample)
    assert samples.config.prediction_type == "sample"
    with pytest.raises(ValueError, match=r"`model` must predict velocities .* got 'sample'"):
        predict_samples(samples)


def test_change_autoencoder_requires_the_same_grid_of_patches():
    latents = torch.randn(9, 4, 4, 6)
    for patch_size, after in ((2, torch.randn(9, 4, 8, 12)), (4, torch.randn(8, 4, 8, 12))):
        with pytest.raises(ValueError, match="`after` must have as many images and patches as `before`"):
            change_autoencoder(tiny_transformer(), patch_size, latents, after)


@pytest.mark.parametrize("name", ["before", "after"])
def test_latents_of_the_autoencoders_must_be_finite(name):
    latents = {"before": torch.randn(9, 4, 4, 6), "after": torch.randn(9, 1, 8, 12)}
    latents[name][3, 0, 2, 5] = torch.nan
    with pytest.raises(ValueError, match=f"`{name}` must be finite latents"):
        change_autoencoder(tiny_transformer(), 4, **latents)


def test_averaged_position_tables_are_accepted(tmp_path):
    """The EMA of the release also averages its fixed position tables, which changes them slightly."""
    _, overrides, state = case("rt1")
    averaged = state | {key: state[key] * (1 - 1.7e-4) for key in ("pos_embed", "temp_embed")}
    report = ConversionReport()
    load_released_irasim(write(tmp_path / "a.pt", state, ema=averaged), "rt1", report=report, **overrides)
    assert report.dropped["temp_embed"] == "computed here, differs by at most 0.0002"


@pytest.mark.parametrize("key", ["blocks.0.scale_shift_table", "blocks.x.attn.qkv.weight"])
def test_keys_of_other_blocks_are_unknown(key, tmp_path):
    _, overrides, state = case("rt1")
    with pytest.raises(ValueError, match=rf"1 tensors cannot be mapped:\n{key} \(3,\): unknown"):
        load_released_irasim(
            write(tmp_path / "a.pt", state | {key: torch.zeros(3)}), "rt1", weights="model", **overrides
        )


def test_torchscript_program_is_not_executed(tmp_path):
    class Program(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    torch.jit.save(torch.jit.script(Program()), tmp_path / "program.pt")
    with pytest.raises(ValueError, match="is a TorchScript program, not a checkpoint"):
        load_released_irasim(tmp_path / "program.pt", "rt1")


def test_open_sora_requires_the_frame_rate(tmp_path, capsys):
    arguments = ["convert", "--source", "opensora", "--checkpoint", str(tmp_path), "--vae", "vae"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 2
    assert "--source opensora requires --config fps=<frames per second>" in capsys.readouterr().err


def test_loader_failure_without_config_names_the_checkpoint(tmp_path, monkeypatch, capsys):
    tiny_vae().save_pretrained(tmp_path / "a:vae")  # also a colon in the name of a folder
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
        (["--dataset", "languagetable"], r"\d+ tensors cannot be mapped"),
        (["--vae", "{folder}/eight"], "--vae must have 4 latent channels to match the weights, got .* with 8"),
        (["--config", "num_attention_heads=x"], "--config num_attention_heads must be int in JSON, got 'x'"),
        (["--config", "action_scale=[1,2"], r"--config action_scale must be float \| list\[float\] in JSON, got"),
        (["--config", "num_attention_heads=0"], "`num_attention_heads` must be an integer of at least 1"),
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
