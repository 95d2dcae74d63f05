"""Converted Open-Sora weights, compared with an independent forward pass of STDiT3."""

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from test_conversion import CASES, case, table, write
from test_latte import LATTE_CASES
from tiny_models import tiny_vae

from irasim_diffusers import IRASimPipeline
from irasim_diffusers.cli import main
from irasim_diffusers.conversion import (
    RELEASED_DATASETS,
    ConversionReport,
    load_latte,
    load_opensora,
    load_released_irasim,
)


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


# width, head width, block pairs, patch size, channels; frames, clean frames, patch rows and columns, action components
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


def test_open_sora_lists_problems(tmp_path):
    state = opensora_state(dim=24, head=6, depth=1, patch=2, channels=4)
    del state["temporal_blocks.0.mlp.fc1.bias"]
    state["rope.freqs"] = state["rope.freqs"] + 1
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"cannot be converted \(problems: 2\)") as raised:
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
    found = load_opensora(shards).state_dict()
    converted = [key for key in expected if not key.startswith("action_embed.")]  # the action encoder is random
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in converted)
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


def test_open_sora_requires_the_frame_rate(tmp_path, capsys):
    arguments = ["convert", "--source", "opensora", "--checkpoint", str(tmp_path), "--vae", "vae"]
    assert main([*arguments, "--output", str(tmp_path / "out")]) == 2
    assert "--source opensora requires --config fps=<frames per second>" in capsys.readouterr().err


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


def test_sizes_of_a_case_are_distinct():
    released = [(*values, RELEASED_DATASETS[dataset]["action_dim"]) for dataset, _, values in CASES.values()]
    for values in [*released, *OPENSORA_CASES, *LATTE_CASES]:
        assert len(set(values)) == len(values), values
