"""Converted Latte weights, compared with the model in diffusers."""

import pytest
import torch
from diffusers import LatteTransformer3DModel
from safetensors.torch import save_file
from tiny_models import tiny_vae

from irasim_diffusers import IRASimPipeline
from irasim_diffusers.cli import main
from irasim_diffusers.conversion import ConversionReport, load_latte

# heads, head width, block pairs, patch size, channels; frames, patch rows and columns, action components
LATTE_CASES = [
    (3, 8, 1, 2, 4, 6, 5, 7, 9),
    (4, 6, 2, 1, 3, 5, 7, 8, 9),
    (2, 10, 3, 4, 5, 7, 1, 6, 8),
    (5, 4, 1, 2, 3, 8, 6, 9, 7),
    (1, 12, 2, 4, 6, 3, 5, 8, 7),
]


def latte_model(heads, head, depth, patch, channels, frames):
    """Diffusers' Latte, an independent implementation, with random weights and no effect of the text."""
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
    with pytest.raises(ValueError, match=r"cannot be converted \(problems: 3\)") as raised:
        load_latte(tmp_path / "broken.safetensors", num_attention_heads=3)
    for line in (
        "missing tensor transformer_blocks.0.attn1.to_k.bias (24,)",
        "ff.net.2.weight: (3, 4) where",
        "surprise (2,)",
    ):
        assert line in str(raised.value)
