import math

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module

from irasim_diffusers.conversion import (
    change_action_dim,
    change_autoencoder,
    change_patch_size,
    predict_samples,
    set_state_track,
)
from irasim_diffusers.models import IRASimTransformer3DModel, StateTrack

SPACE = {"bodies": ["point", "pose"], "extent": [0, 0, 512, 512]}
SMALL = SPACE | {"read_channels": 8, "follow_width": 16, "follow_layers": 1, "memory": 4, "draw_width": 16}
SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "action_dim": 2,
    "action_space": "absolute",
}


def trained_track(**changes):
    """A track whose weights all matter."""
    torch.manual_seed(0)
    track = StateTrack(**SMALL | changes).eval()
    for linear in (track.follow_out[1], track.draw_out[1]):
        torch.nn.init.normal_(linear.weight, std=0.1)
    return track


def trained_model(**changes):
    torch.manual_seed(1)
    model = IRASimTransformer3DModel(**SIZES | changes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model = set_state_track(model, trained_track()).eval()
    for parameter in (model.track_embed.weight, model.proj_out.weight):
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(2, 4, 6, 8, 8, generator=generator)
    return latents, torch.tensor([700, 300]), 512 * torch.rand(2, 4, 2, generator=generator)


STATES = torch.tensor([[100.0, 200.0, 256.0, 256.0, 0.5], [400.0, 20.0, 300.0, 100.0, -2.0]])


def test_normalised_states_are_sixteenths_of_the_picture_from_its_middle():
    track = trained_track()
    normalised = track.normalise(STATES)
    assert torch.allclose(normalised[0], torch.tensor([-4.875, -1.75, 0.0, 0.0, 0.5]))
    assert torch.allclose(track.denormalise(normalised), STATES)


def test_a_new_track_lets_bodies_lie(inputs):
    track = StateTrack(**SMALL)
    latents, _, actions = inputs
    states = track(latents[:, :, :2], actions)
    assert states.shape == (2, 6, 5)
    assert torch.allclose(states[:, 2:], states[:, 1:2].expand(-1, 4, -1), atol=1e-3)
    assert (states[:, :, :4] > -512).all()
    assert (states[:, :, :4] < 1024).all()


def test_a_turn_past_a_half_is_a_small_one():
    track = trained_track()
    before = track.normalise(STATES).unsqueeze(1).repeat(1, 2, 1)
    before[:, :, 4] = torch.tensor([3.1, 3.1 + 0.1])
    wrapped = before.clone()
    wrapped[:, 0, 4] -= 2 * math.pi
    actions = torch.full((2, 3, 2), 256.0)
    assert torch.allclose(track.follow(before, actions), track.follow(wrapped, actions), atol=1e-5)
    slower = before.clone()
    slower[:, 0, 4] = 3.2
    assert not torch.allclose(track.follow(before, actions), track.follow(slower, actions), atol=1e-4)


def test_errors_know_whole_turns():
    track = trained_track()
    turned = STATES + torch.tensor([0, 0, 0, 0, 2 * math.pi])
    assert track.errors(turned, STATES).abs().max() < 1e-4
    half = STATES + torch.tensor([0, 0, 0, 0, math.pi])
    assert torch.allclose(track.errors(half, STATES).norm(dim=-1), torch.tensor(8.0))


def test_velocity_and_every_action_matter():
    track = trained_track()
    history = track.normalise(torch.stack([STATES - 10, STATES], dim=1))
    actions = torch.full((2, 4, 2), 256.0)
    follows = track.follow(history, actions)
    assert not torch.allclose(follows, track.follow(history[:, 1:], actions), atol=1e-4)
    actions[:, 2] += 50
    changed = (follows - track.follow(history, actions)).abs().amax(-1) > 1e-4
    assert changed.tolist() == [[False, False, True, True]] * 2


def test_relative_actions_and_further_components():
    track = trained_track(action_dim=3, action_space="relative", action_scale=0.1)
    history = track.normalise(STATES)[:, None]
    still = track.follow(history, torch.zeros(2, 2, 3))
    assert not torch.allclose(still, track.follow(history, torch.tensor([5.0, 0, 0]).expand(2, 2, 3)), atol=1e-4)
    assert not torch.allclose(still, track.follow(history, torch.tensor([0.0, 0, 5.0]).expand(2, 2, 3)), atol=1e-4)


def seen_from_bodies(track, states):
    grid = track._grid(8, 8, 2.0, states.device).unsqueeze(0)  # 64 units each
    return track._seen_from_bodies(track.normalise(states), grid).unflatten(2, (8, 8))


def test_pixels_see_a_body_alike_wherever_it_lies():
    track = trained_track()
    states = torch.tensor([[[256.0, 256.0, 224.0, 160.0, 0.0]]])
    pixels = seen_from_bodies(track, states)
    moved = seen_from_bodies(track, states + torch.tensor([64, 0, 64.0, 0, 0]))
    assert torch.allclose(pixels[:, :, :, :-1], moved[:, :, :, 1:], atol=1e-4)
    # a quarter turn of the block about itself, and of the pixel about the block (three pixels right of it, then below)
    turned = seen_from_bodies(track, states + torch.tensor([0, 0, 0, 0, math.pi / 2]))
    pose = slice(26, None)  # the block's, after the point's
    at_rest, after = pixels[0, 0, 2, 6, pose], turned[0, 0, 5, 3, pose]
    assert torch.allclose(at_rest[2:], after[2:], atol=1e-4)
    assert not torch.allclose(at_rest[:2], after[:2])  # the angle itself


def test_sketches_follow_poses_and_what_was_seen(inputs):
    track = trained_track()
    history, states = inputs[0][:, :, :2], STATES[:, None].repeat(1, 5, 1)
    assert torch.equal(
        StateTrack(**SMALL).draw(history, states), torch.zeros(2, 4, 3, 8, 8)
    )  # a new one draws nothing
    assert track.draw(history, states).abs().max() < 1e-5  # nor does one where nothing moves
    states[:, 2:, 2] += 60
    sketch = track.draw(history, states)
    assert sketch.shape == (2, 4, 3, 8, 8)
    assert torch.allclose(sketch[:, :, 0], sketch[:, :, 2], atol=1e-5)  # the same poses

    def differs(history, states):
        return ((track.draw(history, states) - sketch).abs() > 1e-4).any(dim=1)  # (B, 3, 8, 8)

    moved = states.clone()
    moved[:, 3, 2] += 60
    assert differs(history, moved).any((2, 3)).tolist() == [[False, True, False]] * 2
    moved[:, 3, 2] -= 60
    moved[:, 1, 0] += 60  # where the point was in the last frame seen
    assert differs(history, moved).any((2, 3)).all()
    other = history.clone()
    other[:, :, 0] += 1  # no frame but the last counts
    assert not differs(other, states).any()
    other[:, :, 1, 0, 0] += 1
    corner = torch.zeros(8, 8, dtype=torch.bool)
    corner[:2, :2] = True  # pixels see their neighbours
    assert torch.equal(differs(other, states), corner.expand(2, 3, 8, 8))


def test_pixels_are_drawn_alike_alone_and_together(inputs):
    track = trained_track()
    seen, states = inputs[0][:, :, 1], track.normalise(STATES[:, None].repeat(1, 3, 1))
    states[:, 1:, 2] += 2
    pixels = torch.tensor([[5, 0, 63], [17, 17, 40]])
    whole = track.draw_pixels(track.pixel_features(seen, states))  # (2, 2, 64, 4)
    some = track.draw_pixels(track.pixel_features(seen, states, pixels))
    expected = torch.stack([frames[:, chosen] for frames, chosen in zip(whole, pixels, strict=True)])
    assert some.abs().max() > 0.01
    assert torch.allclose(some, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bodies": ["line"]}, "`bodies` must be some of .*'point', 'pose'"),
        ({"bodies": []}, "`bodies` must be"),
        ({"extent": [0, 0, 0, 1]}, "`extent` must be"),
        ({"action_space": "relatve"}, "`action_space` must be 'absolute' or 'relative', got 'relatve'"),
        ({"action_dim": 1}, "`action_dim` must be at least 2"),
    ],
)
def test_bad_tracks(changes, message):
    with pytest.raises(ValueError, match=message):
        StateTrack(**SMALL | changes)


def test_a_model_that_gets_a_track_predicts_as_before(inputs):
    torch.manual_seed(1)
    plain = IRASimTransformer3DModel(**SIZES)
    for parameter in plain.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    assert torch.equal(set_state_track(plain, trained_track())(*inputs).sample, plain(*inputs).sample)


@pytest.mark.parametrize("relative", [True, False])
def test_a_model_of_samples_that_gets_a_track_predicts_its_sketch(inputs, relative):
    torch.manual_seed(1)
    plain = IRASimTransformer3DModel(**SIZES, prediction_type="sample", relative_latents=relative)
    torch.nn.init.normal_(plain.proj_out.weight)
    model = set_state_track(plain, trained_track())
    latents, _, actions = inputs
    history = latents[:, :, :2]
    sketch = model.track.draw(history, model.track(history, actions))
    wanted = sketch if relative else sketch + history[:, :, -1:]
    assert torch.allclose(model(*inputs).sample[:, :, 2:], wanted, atol=1e-6)


def test_the_sketch_of_a_frame_is_shown_to_it(inputs):
    model = trained_model()
    latents, _, actions = inputs
    followed = model.track(latents[:, :, :2], actions)
    assert torch.allclose(model(*inputs).sample, model(*inputs, states=followed).sample)
    for block in model.temporal_transformer_blocks:  # frames by themselves
        for parameter in block.parameters():
            torch.nn.init.zeros_(parameter)
    other = followed.clone()
    other[:, 4, 2] += 60
    changed = (model(*inputs).sample - model(*inputs, states=other).sample).abs().amax((1, 3, 4)) > 1e-4
    assert changed.tolist() == [[False] * 4 + [True, False]] * 2


def test_dropped_actions_hide_the_poses(inputs):
    model = trained_model()
    latents, timestep, actions = inputs
    mask = torch.zeros(2, 4, dtype=torch.bool)
    other = model(latents, timestep, 512 - actions, action_mask=mask).sample
    assert torch.allclose(model(*inputs, action_mask=mask).sample, other)
    assert not torch.allclose(model(*inputs).sample, model(latents, timestep, 512 - actions).sample)
    assert torch.allclose(model(latents, timestep).sample, other, atol=1e-5)  # no actions at all


def test_actions_move_the_picture_by_poses_alone(inputs):
    """A planner's gradient goes through the track."""
    model = trained_model()
    torch.nn.init.zeros_(model.action_embed.linear_2.weight)
    latents, timestep, actions = inputs
    actions.requires_grad_()
    model(latents, timestep, actions).sample[:, :, -1].sum().backward()
    assert (actions.grad.abs().amax(-1) > 0).all()


def test_a_model_with_a_track_is_saved_whole(inputs, tmp_path):
    model = trained_model()
    model.save_pretrained(tmp_path)
    loaded = IRASimTransformer3DModel.from_pretrained(tmp_path)
    assert torch.equal(loaded(*inputs).sample, model(*inputs).sample)
    half = IRASimTransformer3DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    latents, timestep, actions = inputs
    assert half(latents.bfloat16(), timestep, actions).sample.dtype == torch.bfloat16
    states = model.track(latents[:, :, :2], actions)
    assert (half.track(latents[:, :, :2].bfloat16(), actions) - states)[..., :4].abs().median() < 5  # of 512


def test_a_track_is_exchanged_for_another(inputs):
    model = trained_model(prediction_type="sample")
    other = trained_track(follow_width=32)
    exchanged = set_state_track(model, other)
    for name, value in model.state_dict().items():
        assert name.startswith("track.") or torch.equal(exchanged.state_dict()[name], value), name
    for name, value in other.state_dict().items():
        assert torch.equal(exchanged.track.state_dict()[name], value), name
    without = set_state_track(model, None)
    assert without.config.state_track is None
    assert not any("track" in name for name in without.state_dict())


def test_a_track_goes_with_the_actions_it_follows(inputs):
    model = change_action_dim(trained_model(), 3)
    assert model.config.state_track is None
    latents, timestep, _ = inputs
    assert model(latents, timestep, torch.zeros(2, 4, 3)).sample.isfinite().all()


def test_finer_patches_and_another_autoencoder(inputs):
    latents, timestep, actions = inputs
    model = trained_model(relative_latents=True)
    finer = change_patch_size(model, 1)
    assert finer.track_embed.weight.shape == (24, 4, 1, 1)
    assert finer(latents, timestep, actions).sample.isfinite().all()
    pictures = torch.randn(32, 4, 8, 8)
    assert change_autoencoder(model, 2, pictures, pictures).config.state_track is None
    with pytest.raises(ValueError, match="`model` must have no track of poses yet"):
        predict_samples(trained_model(prediction_type="v_prediction"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"action_dim": 3}, "`action_dim` 3, got 2"),
        ({"action_space": "relative"}, "`action_space` 'relative', got 'absolute'"),
        ({"conditioning": "video", "sample_frames": 6, "num_history_frames": 2}, "of Frame-Ada"),
    ],
)
def test_tracks_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        set_state_track(IRASimTransformer3DModel(**SIZES | changes), trained_track())


def test_a_model_with_a_track_wants_history(inputs):
    latents, timestep, actions = inputs
    with pytest.raises(ValueError, match="`actions` must leave one frame of history"):
        trained_model()(latents[:, :, :4], timestep, actions)


@pytest.mark.gpu
def test_a_track_on_another_device(inputs):
    model = trained_model()
    expected = model(*inputs).sample
    for part in (model.track, model.track_embed):
        add_hook_to_module(part.to("cuda"), AlignDevicesHook("cuda"))
    torch.testing.assert_close(model(*inputs).sample, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
def test_layers_of_a_track_come_to_the_device_one_by_one(inputs):
    model = trained_model()
    expected = model(*inputs).sample
    model.enable_group_offload(torch.device("cuda"), offload_type="leaf_level")
    sample = model(*(value.to("cuda") for value in inputs)).sample
    torch.testing.assert_close(sample.cpu(), expected, rtol=1e-3, atol=1e-4)
