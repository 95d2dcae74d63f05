import pytest
import torch
from diffusers.models.attention_dispatch import attention_backend
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from tiny_models import tiny_transformer, tiny_unet

from irasim_diffusers import UNET_PRESETS, UNetTrajectoryModel
from irasim_diffusers.models import noise_process
from irasim_diffusers.models.unet_trajectory import UNetTrajectoryAttention
from irasim_diffusers.training import diffusion_loss


@pytest.fixture
def unet():
    return tiny_unet()


@pytest.fixture
def inputs():
    torch.manual_seed(4)
    return torch.randn(3, 4, 5, 4, 6), torch.tensor([7, 500, 999]), torch.randn(3, 3, 3)


# 40M and 687M in the paper; the docstring of the class explains the difference
@pytest.mark.parametrize(("preset", "count"), [("VDM", 44_518_595), ("LVDM", 687_572_260)])
def test_presets_have_sizes_of_the_paper(preset, count):
    with torch.device("meta"):
        model = UNetTrajectoryModel(**UNET_PRESETS[preset])
    assert model.num_parameters() == count
    assert f"{count:,}" in UNetTrajectoryModel.__doc__


@pytest.mark.parametrize("shape", [(1, 4, 3, 1, 1), (2, 4, 7, 10, 5), (1, 4, 5, 9, 16)])
def test_any_size_and_number_of_frames(unet, shape):
    hidden_states = torch.randn(shape)
    sample = unet(hidden_states, torch.ones(shape[0]), torch.randn(shape[0], 3, 3)).sample
    assert sample.shape == shape
    assert torch.isfinite(sample).all()


def test_temporal_attention_depends_only_on_differences_of_positions():
    attention = UNetTrajectoryAttention(6, 2, 8, temporal=True)
    cos, sin = get_1d_rotary_pos_embed(8, 9, use_real=True)
    features = torch.randn(4, 6, 2, 3)
    first, later, reversed_ = (
        attention(features, 4, (cos[places], sin[places])) for places in (range(4), range(5, 9), range(3, -1, -1))
    )
    torch.testing.assert_close(first, later)
    assert not torch.allclose(first, reversed_)


def test_same_result_alone_and_in_a_batch(unet, inputs):
    together = unet(*inputs).sample
    for index in range(3):
        alone = unet(*(value[index : index + 1] for value in inputs)).sample
        torch.testing.assert_close(alone[0], together[index], rtol=1e-4, atol=1e-4)


def test_action_frequencies_add_sines_and_cosines(inputs):
    model = tiny_unet(action_frequencies=2)
    actions = inputs[2]
    scale, offset = (torch.tensor(model.config[name]) for name in ("action_scale", "action_offset"))
    phases = [((actions - offset) * scale * torch.pi / 8 * octave) for octave in (1, 2)]
    waves = [wave(torch.stack(phases, -1)).flatten(-2) for wave in (torch.sin, torch.cos)]
    features = torch.cat([(actions - offset) * scale, *waves], -1)
    torch.testing.assert_close(model.encode_actions(actions), model.action_embed(features.flatten(1)))


def test_attention_in_parts_matches_full_attention(unet, inputs, monkeypatch):
    whole = unet(*inputs).sample
    monkeypatch.setattr("irasim_diffusers.models.unet_trajectory.MAX_SEQUENCES", 7)
    torch.testing.assert_close(unet(*inputs).sample, whole)


def test_linear_attention_matches_its_definition(unet):
    attn = unet.down_blocks[0].attention.attn
    tokens = torch.randn(2, 9, 8)
    query, key, value = (
        torch.nn.functional.linear(tokens, layer.weight, layer.bias).unflatten(-1, (2, 4)).transpose(1, 2)
        for layer in (attn.to_q, attn.to_k, attn.to_v)
    )
    weights = query.softmax(-1) @ key.softmax(-2).mT / 2  # (B, heads, S, S), which the layer never builds
    expected = attn.to_out[0]((weights @ value).transpose(1, 2).flatten(-2))
    torch.testing.assert_close(attn(tokens), expected)


def test_only_temporal_attention_mixes_frames_and_depends_on_their_order(unet, inputs):
    hidden_states, timestep, _ = inputs
    order = [0, 2, 1, 3, 4]
    plain, swapped = unet(hidden_states, timestep).sample, unet(hidden_states[:, :, order], timestep).sample
    assert not torch.allclose(plain[:, :, order], swapped, atol=1e-4)
    for module in unet.modules():
        if isinstance(module, UNetTrajectoryAttention) and module.temporal:
            torch.nn.init.zeros_(module.attn.to_out[0].weight)
            torch.nn.init.zeros_(module.attn.to_out[0].bias)
    changed = hidden_states.clone()
    changed[:, :, 1] += 1
    difference = unet(changed, timestep).sample - unet(hidden_states, timestep).sample
    touched = difference.abs().amax(dim=(0, 1, 3, 4)) > 1e-6
    assert touched.tolist() == [False, True, False, False, False]


def test_one_timestep_per_frame(unet, inputs):
    hidden_states, timestep, actions = inputs
    by_frame = timestep[:, None].repeat(1, 5)
    torch.testing.assert_close(unet(hidden_states, by_frame, actions).sample, unet(*inputs).sample)
    by_frame[:, 0] = 0
    assert not torch.allclose(unet(hidden_states, by_frame, actions).sample, unet(*inputs).sample)


def test_one_dropped_action_drops_the_trajectory(unet, inputs):
    hidden_states, timestep, actions = inputs
    keep = torch.tensor([[True] * 3, [True, False, True], [True] * 3])
    mixed = unet(hidden_states, timestep, actions, action_mask=keep).sample
    torch.testing.assert_close(mixed[1], unet(hidden_states, timestep).sample[1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mixed[0], unet(*inputs).sample[0], rtol=1e-4, atol=1e-4)


def test_raw_actions_survive_half_precision(unet, inputs):
    hidden_states, timestep, actions = inputs
    unet.register_to_config(action_scale=1.0, action_offset=4096.0)
    unet.to(torch.bfloat16)  # bfloat16 values near 4096 are 32 apart
    samples = [
        unet(hidden_states.bfloat16(), timestep, torch.full_like(actions, value)).sample for value in (4096.0, 4097.0)
    ]
    assert not torch.equal(*samples)


def test_actions_matter_after_one_training_step(inputs):
    hidden_states, timestep, actions = inputs
    torch.manual_seed(0)
    unet = UNetTrajectoryModel(**{name: value for name, value in tiny_unet().config.items() if name[0] != "_"})
    assert not unet(*inputs).sample.any()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    loss = diffusion_loss(
        unet, noise_process(unet.config), hidden_states, actions, timesteps=timestep, noise=torch.randn(3, 4, 3, 4, 6)
    )
    loss["loss"].backward()
    optimizer.step()
    difference = unet(*inputs).sample - unet(hidden_states, timestep, actions + 1).sample
    assert (difference.abs().amax(dim=(1, 3, 4)) > 0).all()


def test_gradient_checkpointing_changes_no_gradient(unet, inputs):
    unet.train()
    gradients = []
    for checkpointing in (False, True):
        unet.zero_grad()
        if checkpointing:
            unet.enable_gradient_checkpointing()
        calls: list[int] = []
        hook = unet.mid_block.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        unet(*inputs).sample.square().mean().backward()
        hook.remove()
        assert len(calls) == (2 if checkpointing else 1)
        gradients.append([parameter.grad for name, parameter in unet.named_parameters() if name != "null_action"])
    torch.testing.assert_close(*gradients)


def test_fused_projections_and_other_backend_agree(unet, inputs):
    expected = unet(*inputs).sample
    with attention_backend("_native_math"):
        torch.testing.assert_close(unet(*inputs).sample, expected, rtol=1e-4, atol=1e-4)
    unet.fuse_qkv_projections()
    torch.testing.assert_close(unet(*inputs).sample, expected, rtol=1e-4, atol=1e-4)


def test_save_and_load_round_trip(unet, inputs, tmp_path):
    unet.save_pretrained(tmp_path)
    loaded = UNetTrajectoryModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(*inputs).sample, unet(*inputs).sample)
    assert {key: loaded.config[key] for key in ("action_scale", "block_out_channels", "action_space")} == {
        "action_scale": [0.5, 2.0, 1.0],
        "block_out_channels": [8, 16],
        "action_space": "relative",
    }


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"conditioning": "frame"}, "`conditioning` must be video, got 'frame'"),
        ({"block_out_channels": [8, 12]}, r"`block_out_channels` must be multiples of 8, .* got \[8, 12\]"),
        ({"action_space": "abs"}, "`action_space` must be one of relative, absolute, got 'abs'"),
        ({"action_offset": [0.0] * 4}, "`action_offset` must have `action_dim` = 3 entries, .* got 4"),
    ],
)
def test_bad_configs(config, message):
    with pytest.raises(ValueError, match=message):
        tiny_unet(**config)


@pytest.mark.parametrize(
    ("frames", "actions"), [(5, (1, 2, 3)), (5, (1, 4, 3)), (5, (1, 3, 2)), (2, (1, 3, 3)), (5, (3, 3))]
)
def test_other_number_of_actions_raises(unet, frames, actions):
    with pytest.raises(ValueError, match=r"`actions` must be \(batch, 3, 3\) for a window of at least 3 frames, got"):
        unet(torch.randn(1, 4, frames, 4, 6), torch.ones(1), torch.randn(actions))


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("prediction_type", "zzz"),
        ("beta_schedule", "zzz"),
        ("num_history_frames", 5),
        ("sample_frames", 0),
        ("fps", 10**400),
        ("fps", "x"),
        ("num_layers", 10**7),
        ("num_layers", "2"),
    ],
)
def test_bad_config_raises(entry, value):
    build = tiny_transformer if entry == "num_layers" else tiny_unet
    with pytest.raises(ValueError, match=f"`{entry}` must be"):
        build(**{entry: value})
