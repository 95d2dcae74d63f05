import math

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.embeddings import apply_rotary_emb
from tiny_models import ARCHITECTURES, TINY, tiny_transformer

from irasim_diffusers import PRESETS, IRASimTransformer3DModel
from irasim_diffusers.models import noise_process
from irasim_diffusers.models.transformer_irasim import rotate_halves, short_attention


@pytest.fixture
def inputs():
    torch.manual_seed(4)
    return torch.randn(3, 4, 5, 4, 6), torch.tensor([7, 500, 999]), torch.randn(3, 3, 3)


# the paper also counts the fixed position tables: 336 rows of the model's width (RT-1 at 256x320, 16 frames)
@pytest.mark.parametrize(
    ("preset", "count"), [("S", 33_206_416), ("B", 132_178_192), ("L", 461_372_432), ("XL", 679_397_776)]
)
def test_presets_have_parameter_counts_of_the_paper(preset, count):
    with torch.device("meta"):
        model = IRASimTransformer3DModel(**PRESETS[preset])
    width = model.config.num_attention_heads * model.config.attention_head_dim
    assert sum(parameter.numel() for parameter in model.parameters()) + 336 * width == count


def test_matches_reference_implementation(transformer, inputs):
    hidden_states, timestep, actions = inputs
    expected = plain_forward(transformer.state_dict(), hidden_states, timestep, actions)
    torch.testing.assert_close(transformer(*inputs).sample, expected, rtol=1e-4, atol=1e-5)


def plain_forward(state, x, t, actions):
    """Reference forward pass of the tiny Frame-Ada model without diffusers, as in the paper."""
    (batch, channels, frames, height, width), heads, dim = x.shape, 2, 24

    def linear(name, value):
        return value @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def sincos(positions, size):
        omega = 1 / 10000 ** (torch.arange(size // 2, dtype=torch.float64) / (size / 2))
        angles = positions.double()[:, None] * omega
        return torch.cat([angles.sin(), angles.cos()], 1).float()

    patches = x.reshape(batch, channels, frames, height // 2, 2, width // 2, 2).permute(0, 2, 3, 5, 1, 4, 6)
    patches = patches.reshape(batch, frames, -1, channels * 4)
    tokens = patches @ state["patch_embed.proj.weight"].reshape(dim, -1).T + state["patch_embed.proj.bias"]
    rows = torch.arange(height // 2).repeat_interleave(width // 2)
    columns = torch.arange(width // 2).repeat(height // 2)
    tokens = tokens + torch.cat([sincos(columns, dim // 2), sincos(rows, dim // 2)], 1)

    frequencies = torch.exp(-math.log(10000) * torch.arange(128) / 128)
    angles = t.float()[:, None] * frequencies
    time = torch.cat([angles.cos(), angles.sin()], 1)
    time = linear("time_embed.linear_2", F.silu(linear("time_embed.linear_1", time)))
    scaled = (actions - torch.tensor(TINY["action_offset"])) * torch.tensor(TINY["action_scale"])
    embedded = linear("action_embed.linear_2", F.gelu(linear("action_embed.linear_1", scaled), approximate="tanh"))
    null = state["null_action"].expand(batch, frames - actions.shape[1], dim)
    frame_condition = time[:, None] + torch.cat([null, embedded], 1)
    time_condition = time[:, None].expand(batch, frames, dim)

    def attention(name, value):
        q, k, v = (linear(f"{name}.to_{p}", value).unflatten(-1, (heads, -1)).transpose(-2, -3) for p in "qkv")
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        return linear(f"{name}.to_out.0", (weights @ v).transpose(-2, -3).flatten(-2))

    def block(name, value, condition, temporal):
        parts = linear(f"{name}.ada_norm.1", F.silu(condition)).unsqueeze(2).chunk(6, -1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        inner = F.layer_norm(value, (dim,), eps=1e-6) * (1 + scale1) + shift1
        attended = attention(f"{name}.attn1", inner.transpose(1, 2) if temporal else inner)
        value = value + gate1 * (attended.transpose(1, 2) if temporal else attended)
        inner = F.layer_norm(value, (dim,), eps=1e-6) * (1 + scale2) + shift2
        inner = linear(f"{name}.ff.net.2", F.gelu(linear(f"{name}.ff.net.0.proj", inner), approximate="tanh"))
        return value + gate2 * inner

    for index in range(2):
        tokens = block(f"transformer_blocks.{index}", tokens, frame_condition, temporal=False)
        if index == 0:
            tokens = tokens + sincos(torch.arange(frames), dim)[:, None]
        tokens = block(f"temporal_transformer_blocks.{index}", tokens, time_condition, temporal=True)
    shift, scale = linear("ada_norm_out.1", F.silu(time_condition)).unsqueeze(2).chunk(2, -1)
    tokens = linear("proj_out", F.layer_norm(tokens, (dim,), eps=1e-6) * (1 + scale) + shift)
    tokens = tokens.reshape(batch, frames, height // 2, width // 2, 2, 2, channels)
    return tokens.permute(0, 6, 1, 2, 4, 3, 5).reshape(batch, channels, frames, height, width)


def test_new_model_predicts_zero(inputs):
    torch.manual_seed(0)
    assert not IRASimTransformer3DModel(**TINY)(*inputs).sample.any()


def test_exact_gelu_is_close_to_its_approximation(transformer, inputs):
    expected = transformer(*inputs).sample
    exact = tiny_transformer(activation_fn="gelu")
    assert exact.transformer_blocks[0].ff.net[0].approximate == "none"
    assert exact.temporal_transformer_blocks[0].ff.net[0].approximate == "none"
    sample = exact(*inputs).sample
    assert not torch.equal(sample, expected)
    torch.testing.assert_close(sample, expected, rtol=0, atol=5e-3)


def test_action_modulates_only_its_own_frame(transformer, inputs):
    hidden_states, timestep, actions = inputs
    for block in transformer.temporal_transformer_blocks:  # without temporal blocks, frames are independent
        torch.nn.init.zeros_(block.ada_norm[1].weight)
        torch.nn.init.zeros_(block.ada_norm[1].bias)
    changed = actions.clone()
    changed[:, 1] += 1
    difference = transformer(*inputs).sample - transformer(hidden_states, timestep, changed).sample
    touched = difference.abs().amax(dim=(0, 1, 3, 4)) > 1e-6
    assert touched.tolist() == [False, False, False, True, False]


def test_temporal_blocks_carry_actions_to_other_frames(transformer, inputs):
    hidden_states, timestep, actions = inputs
    changed = actions.clone()
    changed[:, 1] += 1
    difference = transformer(*inputs).sample - transformer(hidden_states, timestep, changed).sample
    assert (difference.abs().amax(dim=(0, 1, 3, 4)) > 1e-6).all()


def test_missing_actions_are_null_actions(transformer, inputs):
    hidden_states, timestep, actions = inputs
    nothing = transformer(hidden_states, timestep).sample
    dropped = transformer(hidden_states, timestep, actions, action_mask=torch.zeros(3, 3, dtype=torch.bool)).sample
    torch.testing.assert_close(nothing, dropped)
    keep_one = torch.tensor([[True] * 3, [False] * 3, [True] * 3])
    mixed = transformer(hidden_states, timestep, actions, action_mask=keep_one).sample
    torch.testing.assert_close(mixed[1], nothing[1])
    torch.testing.assert_close(mixed[0], transformer(*inputs).sample[0])


def test_one_timestep_per_frame(transformer, inputs):
    hidden_states, timestep, actions = inputs
    by_frame = timestep[:, None].repeat(1, 5)
    torch.testing.assert_close(transformer(hidden_states, by_frame, actions).sample, transformer(*inputs).sample)
    by_frame[:, 0] = 0
    assert not torch.allclose(transformer(hidden_states, by_frame, actions).sample, transformer(*inputs).sample)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_one_timestep_for_the_batch(transformer, inputs, shape):
    hidden_states, _, actions = inputs
    expected = transformer(hidden_states, torch.full((3,), 500), actions).sample
    torch.testing.assert_close(transformer(hidden_states, torch.full(shape, 500), actions).sample, expected)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"conditioning": "clip"}, "`conditioning` must be one of frame, video, got 'clip'"),
        ({"activation_fn": "silu"}, "`activation_fn` must be one of gelu-approximate, gelu, got 'silu'"),
        ({"action_activation": "relu"}, "`action_activation` must be one of gelu_tanh, None, got 'relu'"),
        ({"action_space": "abs"}, "`action_space` must be one of relative, absolute, got 'abs'"),
        ({"action_scale": [1.0, 2.0]}, "`action_scale` must have `action_dim` = 3 entries, one per component, got 2"),
        ({"action_offset": [0.0] * 4}, "`action_offset` must have .* got 4"),
        ({"action_names": ["x"]}, "`action_names` must have .* got 1"),
        ({"action_units": ["m"] * 2}, "`action_units` must have .* got 2"),
        ({"action_low": [0.0, 2.0, None], "action_high": 1.0}, "`action_low` must be at most .* 2.0 and 1.0 .* 1"),
        ({"prediction_type": "noise"}, "`prediction_type` must be one of epsilon, .* got 'noise'"),
        ({"beta_schedule": "cosine"}, "`beta_schedule` must be one of linear, .* got 'cosine'"),
        ({"ff_conv": "yes"}, "`ff_conv` must be one of False, True, got 'yes'"),
        (
            {"num_attention_heads": "2"},
            "`num_attention_heads` must be an integer of at least 1 and at most 256, got '2'",
        ),
        ({"action_dim": 0}, "`action_dim` must be an integer of at least 1 and at most 1024, got 0"),
        ({"patch_size": 1.5}, "`patch_size` must be an integer of at least 1 and at most 64, got 1.5"),
        ({"num_history_frames": 5}, "`num_history_frames` must be less than `sample_frames` = 5, .* got 5"),
        ({"fps": -3.0}, r"`fps` must be a number in \[0.001, 100000\], got -3.0"),
        ({"cameras": 5}, "`cameras` must be rows of camera names, or None, got 5"),
        ({"cameras": "ab"}, "`cameras` must be rows of camera names, or None, got 'ab'"),
        ({"cameras": [[5]]}, "`cameras` must be rows of camera names"),
        ({"cameras": [[]]}, "`cameras` must be rows of camera names"),
    ],
)
def test_bad_configs(config, message):
    with pytest.raises(ValueError, match=message):
        tiny_transformer(**config)


@pytest.mark.parametrize("shape", [(1, 4, 3, 2, 8), (2, 4, 7, 10, 4)])
def test_any_size_and_number_of_frames(transformer, shape):
    hidden_states = torch.randn(shape)
    sample = transformer(hidden_states, torch.ones(shape[0]), torch.randn(shape[0], shape[2] - 1, 3)).sample
    assert sample.shape == shape
    assert torch.isfinite(sample).all()


@pytest.mark.parametrize(
    ("shape", "actions", "message"),
    [
        ((1, 4, 5, 3, 6), (1, 3, 3), "divisible by the patch size 2, got 3x6"),
        ((1, 4, 5, 4, 6), (1, 3, 2), r"at most 5, 3\), got \(1, 3, 2\)"),
        ((1, 4, 5, 4, 6), (1, 6, 3), r"at most 5, 3\), got \(1, 6, 3\)"),
    ],
)
def test_bad_shapes(transformer, shape, actions, message):
    with pytest.raises(ValueError, match=message):
        transformer(torch.randn(shape), torch.ones(1), torch.randn(actions))


def test_raw_actions_survive_half_precision(transformer, inputs):
    hidden_states, timestep, actions = inputs
    transformer.register_to_config(action_scale=1.0, action_offset=4096.0)
    transformer.to(torch.bfloat16)  # bfloat16 values near 4096 are 32 apart
    samples = [
        transformer(hidden_states.bfloat16(), timestep, torch.full_like(actions, value)).sample
        for value in (4096.0, 4097.0)
    ]
    assert not torch.equal(*samples)


@pytest.mark.parametrize("activation", ["gelu_tanh", None])
def test_video_ada_modulates_every_frame_by_the_whole_trajectory(activation, inputs):
    hidden_states, timestep, actions = inputs
    model = tiny_transformer(conditioning="video", action_activation=activation)
    for block in model.temporal_transformer_blocks:  # without temporal blocks, frames are independent
        torch.nn.init.zeros_(block.ada_norm[1].weight)
        torch.nn.init.zeros_(block.ada_norm[1].bias)
    changed = actions.clone()
    changed[:, 1] += 1
    difference = model(*inputs).sample - model(hidden_states, timestep, changed).sample
    assert (difference.abs().amax(dim=(0, 1, 3, 4)) > 1e-6).all()


def test_video_ada_drops_whole_trajectories(inputs):
    hidden_states, timestep, actions = inputs
    model = tiny_transformer(conditioning="video")
    keep = torch.tensor([[True] * 3, [True, False, True], [True] * 3])
    mixed = model(hidden_states, timestep, actions, action_mask=keep).sample
    torch.testing.assert_close(mixed[1], model(hidden_states, timestep).sample[1])
    torch.testing.assert_close(mixed[0], model(*inputs).sample[0])
    by_frame = timestep[:, None].repeat(1, 5)
    torch.testing.assert_close(model(hidden_states, by_frame, actions).sample, model(*inputs).sample)


def test_video_ada_requires_a_fixed_number_of_actions(inputs):
    hidden_states, timestep, actions = inputs
    model = tiny_transformer(conditioning="video")
    with pytest.raises(ValueError, match=r"3 \(fixed for Video-Ada\), 3\), got \(3, 2, 3\)"):
        model(hidden_states, timestep, actions[:, :2])


def test_final_layer_with_actions(inputs):
    hidden_states, timestep, actions = inputs
    plain, seeing = tiny_transformer(), tiny_transformer(final_frame_ada=True)
    assert not torch.allclose(plain(*inputs).sample, seeing(*inputs).sample)
    nothing = torch.zeros_like(actions) + torch.tensor(TINY["action_offset"])
    for model in (plain, seeing):  # with zero action embeddings, both final layers depend on the timestep alone
        torch.nn.init.zeros_(model.action_embed.linear_2.weight)
        torch.nn.init.zeros_(model.action_embed.linear_2.bias)
        torch.nn.init.zeros_(model.null_action)
    same = [model(hidden_states, timestep, nothing).sample for model in (plain, seeing)]
    torch.testing.assert_close(*same)


def test_action_frequencies_add_sines_and_cosines(inputs):
    _, _, actions = inputs
    model = tiny_transformer(action_frequencies=2)
    seen = (actions - torch.tensor(TINY["action_offset"])) * torch.tensor(TINY["action_scale"])
    angles = torch.stack([2 * math.pi * seen[..., a] / length for a in range(3) for length in (16, 8)], dim=-1)
    expected = model.action_embed(torch.cat([seen, angles.sin(), angles.cos()], dim=-1))
    torch.testing.assert_close(model.encode_actions(actions, 5)[:, 2:], expected)


PUSHT = ARCHITECTURES["Push-T"]


def test_patch_receives_its_offset_from_the_target(inputs):
    """Moving the target by one patch moves the embeddings by one patch.

    History frames and masked actions receive zero.
    """
    model = tiny_transformer(**PUSHT)
    actions = torch.tensor([[[0.3, 0.4, 1.0], [0.0, 2.0, -1.0]]])
    embeddings = model.encode_targets(actions, 5, (2, 3))  # patches of 2 units down and 1 unit across
    assert embeddings.shape == (1, 5, 6, 24)
    assert not embeddings[:, :3].any()
    assert embeddings[:, 3:].any(dim=-1).all()
    moved = model.encode_targets(actions + torch.tensor([1.0, 2.0, 5.0]), 5, (2, 3)).unflatten(2, (2, 3))
    torch.testing.assert_close(moved[:, 3:, 1, 1:], embeddings.unflatten(2, (2, 3))[:, 3:, 0, :2])
    masked = model.encode_targets(actions, 5, (2, 3), torch.tensor([[True, False]]))
    assert masked[:, 3].any()
    assert not masked[:, 4].any()


def test_rotary_attention_depends_only_on_position_differences():
    model = tiny_transformer(**PUSHT)
    cos, sin = model._spatial_rotary_positions(4, 5, torch.device("cpu"))
    assert cos.shape == sin.shape == (20, 12)
    torch.manual_seed(2)
    query, key = torch.randn(2, 12)

    def score(first, second):
        rotated = [
            rotate_halves(value[None, None, None], (cos[place][None], sin[place][None])).flatten()
            for value, place in ((query, first), (key, second))
        ]
        return rotated[0] @ rotated[1]

    rows = torch.randn(2, 20, 3, 12)
    expected = apply_rotary_emb(rows, (cos, sin), use_real_unbind_dim=-2, sequence_dim=1)
    torch.testing.assert_close(rotate_halves(rows, (cos, sin)), expected)
    assert rotate_halves(rows.bfloat16(), (cos, sin)).dtype == torch.bfloat16

    torch.testing.assert_close(score(0, 7), score(6, 13))  # one row down and two columns to the right
    torch.testing.assert_close(score(3, 10), score(4, 11))
    assert (score(0, 7) - score(0, 2)).abs() > 1e-3  # depends on the row
    assert (score(0, 7) - score(0, 5)).abs() > 1e-3  # depends on the column


def test_convolution_mixes_neighboring_patches():
    model = tiny_transformer(**PUSHT)
    block, temb = model.transformer_blocks[0], torch.randn(1, 1, 24)
    torch.nn.init.zeros_(block.attn1.to_out[0].weight)  # without attention, only the convolution mixes patches
    tokens = torch.randn(1, 1, 20, 24)
    changed = tokens.clone()
    changed[:, :, 7] = torch.randn(24)  # row 1, column 2 of 4 rows and 5 columns
    rotary = model._spatial_rotary_positions(4, 5, torch.device("cpu"))
    difference = block(tokens, temb, rotary, None, (4, 5)) - block(changed, temb, rotary, None, (4, 5))
    touched = (difference.abs().amax(dim=(0, 1, 3)) > 1e-6).unflatten(0, (4, 5))
    expected = torch.zeros(4, 5, dtype=torch.bool)
    expected[0:3, 1:4] = True
    assert torch.equal(touched, expected)


def test_scaled_pure_noise_is_almost_zero(inputs):
    hidden_states, _, actions = inputs
    model = tiny_transformer(**PUSHT)
    other = hidden_states.clone()
    other[:, :, 2:] = torch.randn(3, 4, 3, 4, 6)
    for level, effect in ((999, 0.05), (0, 1.0)):
        timestep = torch.full((3,), level)
        before, after = (model(states, timestep, actions).sample for states in (hidden_states, other))
        share = (before - after).abs().mean() / before.abs().mean()
        assert share < effect if level else share > 0.3


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_signal_share_matches_the_noise_process(schedule):
    model = tiny_transformer(**PUSHT, beta_schedule=schedule, num_train_timesteps=50)
    expected = noise_process(model.config).alphas_cumprod.sqrt()
    torch.testing.assert_close(model._signal_share(torch.device("cpu")), expected)


@pytest.mark.parametrize("frames", [2, 3, 4])
def test_short_attention_matches_dispatched_attention(frames):
    torch.manual_seed(1)
    query, key, value = torch.randn(3, 5, frames, 2, 12)
    expected = F.scaled_dot_product_attention(*(part.transpose(1, 2) for part in (query, key, value))).transpose(1, 2)
    torch.testing.assert_close(short_attention(query, key, value), expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"target_extent": [0, 0, 1]},
            r"`target_extent` must be the finite left, top, right and bottom edge.*got \[0, 0, 1\]",
        ),
        ({"target_extent": [1, 0, 0, 1]}, "`target_extent` must be"),
        ({"action_space": "relative"}, "`target_extent` must be .* got .* with `action_space` 'relative'"),
        ({"conditioning": "video"}, "`target_extent` must be .* `conditioning` 'video'"),
        ({"target_extent": [0, 0, float("inf"), 1]}, "`target_extent` must be the finite"),
        ({"attention_head_dim": 6}, "`attention_head_dim` must be divisible by 4"),
        ({"prediction_type": "flow_prediction"}, "`scale_noisy_latents` must be False with flow_prediction"),
    ],
)
def test_bad_target_extents(changes, message):
    with pytest.raises(ValueError, match=message):
        IRASimTransformer3DModel(**TINY | PUSHT | changes)
