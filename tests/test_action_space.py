import dataclasses
import json

import numpy as np
import pytest
import torch
from tiny_models import tiny_pipeline, tiny_transformer, tiny_unet

from irasim_diffusers import DrivingSession, IRASimPipeline, Steering, embedded_checkpoint
from irasim_diffusers.action_space import ActionSpace

CONFIG = {
    "action_dim": 3,
    "action_scale": [0.5, -2.0, 4.0],
    "action_offset": [1.0, 0.0, -1.0],
    "action_low": [-3.0, None, 0.0],
    "action_high": [5.0, 1.0, None],
    "action_space": "relative",
    "action_derivation": "recorded",
}
SPACE = ActionSpace.from_config(CONFIG)
SHAPES = [(3,), (2, 3), (4, 5, 3), (2, 4, 5, 3)]


def random_actions(shape, kind):
    actions = np.random.default_rng(len(shape)).normal(scale=20, size=shape)
    return torch.from_numpy(actions) if kind == "torch" else actions


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("shape", SHAPES)
def test_normalizing_and_clipping(shape, kind):
    actions = random_actions(shape, kind)
    np.testing.assert_allclose(SPACE.denormalise(SPACE.normalise(actions)), actions)
    np.testing.assert_allclose(SPACE.normalise(SPACE.denormalise(actions)), actions)
    expected = (np.asarray(actions) - [1.0, 0.0, -1.0]) * [0.5, -2.0, 4.0]
    np.testing.assert_allclose(SPACE.normalise(actions), expected)
    clipped = SPACE.clip(actions)
    assert type(clipped) is type(actions)
    np.testing.assert_array_equal(SPACE.clip(clipped), clipped)
    np.testing.assert_array_equal(clipped, np.clip(actions, [-3.0, -np.inf, 0.0], [5.0, 1.0, np.inf]))


@pytest.mark.parametrize("kind", ["numpy", "torch"])
@pytest.mark.parametrize("shape", SHAPES)
def test_hold_of_any_batch(shape, kind):
    actions = random_actions(shape, kind)
    assert not np.asarray(SPACE.hold(actions)).any()
    absolute = dataclasses.replace(SPACE, kind="absolute")
    np.testing.assert_array_equal(absolute.hold(actions), actions)
    assert SPACE.hold(actions).shape == shape


def test_models_and_pipelines_return_their_action_space():
    for model in (tiny_transformer(), tiny_unet()):
        assert model.action_space == ActionSpace.from_config(model.config)
        assert model.action_space.scale == (0.5, 2.0, 1.0)
        assert model.action_space.names == ("action 0", "action 1", "action 2")
    folder = embedded_checkpoint()
    space = ActionSpace.from_config(json.loads((folder / "transformer" / "config.json").read_text()))
    assert (space.names, space.low, space.high) == (("target_x", "target_y"), (0, 0), (512, 512))
    assert space.has_targets


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action_scale": [1.0, 0.0, 1.0]}, "`action_scale` must be finite and not zero"),
        ({"action_scale": float("nan")}, "`action_scale` must be finite"),
        ({"action_offset": float("inf")}, "`action_offset` must be finite"),
        ({"action_low": float("nan")}, "`action_low` must be at most"),
        ({"action_low": 2.0}, "`action_low` must be at most"),
        ({"action_space": "polar"}, "`action_space` must be one of relative, absolute"),
        ({"action_units": ["m"]}, "`action_units` must have `action_dim` = 3 entries"),
    ],
)
def test_bad_configs(change, message):
    with pytest.raises(ValueError, match=message):
        ActionSpace.from_config(CONFIG | change)


@pytest.mark.parametrize("value", [1e38, -1e38, 1e6, -1e5])
@pytest.mark.parametrize("component", [0, 1, 2])
def test_actions_far_outside_the_bounds_raise(value, component):
    actions = np.full((2, 4, 3), 0.5)
    assert SPACE.prepare(actions).shape == (2, 4, 3)
    actions[1, 2, component] = value
    with pytest.raises(ValueError, match=rf"near the bounds .* 'action {component}', got .* at index \(1, 2,"):
        SPACE.prepare(actions)


def test_actions_somewhat_outside_the_bounds_are_accepted():
    wide = ActionSpace.from_config({"action_dim": 1, "action_low": -100.0, "action_high": 300.0})
    assert wide.prepare([[-1099.0], [1299.0]]).shape == (1, 2, 1)
    for far in (-1101.0, 1301.0):
        with pytest.raises(ValueError, match=r"\[-100, 300\] for 'action 0', .* -1100 to 1300 are accepted"):
            wide.prepare([[far]])


def test_pipeline_rejects_far_actions_before_any_work(frames, actions):
    pipeline = tiny_pipeline(action_low=-5.0, action_high=5.0)
    pipeline.vae.encoder.register_forward_pre_hook(lambda *_: pytest.fail("the history was encoded"))
    actions[1, 2] = 1e38
    with pytest.raises(ValueError, match="near the bounds"):
        pipeline(frames, actions)


def test_session_stays_usable_after_a_far_action():
    pipe = IRASimPipeline.from_pretrained(embedded_checkpoint())
    pipe.set_progress_bar_config(disable=True)
    history = np.zeros((2, 96, 96, 3), np.uint8)
    first, second = (DrivingSession(pipe, history, Steering(pipe.action_space, start=[9, 9])) for _ in range(2))
    with pytest.raises(ValueError, match="near the bounds"):
        first.step([[1e38, 0.0]])
    assert len(first) == 0
    np.testing.assert_array_equal(first.step([[9.0, 9.0]])[0], second.step([[9.0, 9.0]])[0])


def test_box():
    spaces = pytest.importorskip("gymnasium").spaces
    box = SPACE.box()
    assert isinstance(box, spaces.Box)
    np.testing.assert_array_equal(box.low, np.float32([-3, -np.inf, 0]))
    np.testing.assert_array_equal(box.high, np.float32([5, 1, np.inf]))


def test_latent_model_without_autoencoder_raises(pipeline, frames, actions):
    alone = IRASimPipeline(None, pipeline.transformer, pipeline.scheduler)
    with pytest.raises(ValueError, match="`vae` must be the autoencoder of this model, whose latents have 4 channels"):
        alone(frames, actions)


def test_message_shows_the_limits_of_unbounded_components():
    space = ActionSpace.from_config({"action_dim": 1, "action_scale": 0.5, "action_offset": 3.0})
    with pytest.raises(ValueError, match=r"\[-19997, 20003\] for 'action 0', got 1e\+38"):
        space.prepare([[1e38]])


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_integer_actions_become_floats(dtype):
    space = ActionSpace.from_config(
        {"action_dim": 2, "action_scale": 0.05, "action_offset": 0.5, "action_low": 0.25, "action_high": [15.5, None]}
    )
    actions = torch.tensor([[10, 20]], dtype=dtype)
    torch.testing.assert_close(space.normalise(actions), torch.tensor([[0.475, 0.975]]))
    torch.testing.assert_close(space.denormalise(actions), torch.tensor([[200.5, 400.5]]))
    torch.testing.assert_close(space.clip(actions * 0 + 17), torch.tensor([[15.5, 17.0]]))
    np.testing.assert_allclose(space.normalise(actions.numpy()), [[0.475, 0.975]])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "`action_dim` must be an integer of at least 1, got None"),
        ({"action_dim": True}, "`action_dim` must be an integer of at least 1, got True"),
        ({"action_dim": 2, "action_scale": "ab"}, "`action_scale` must contain numbers, got 'ab'"),
        ({"action_dim": 2, "action_scale": [1.0, True]}, "`action_scale` must contain numbers, got True"),
        ({"action_dim": 1, "action_low": [[0.0]]}, r"`action_low` must contain numbers, got \[0.0\]"),
        ({"action_dim": 1, "action_high": 10**400}, "`action_high` must contain numbers in the range of a float"),
        ({"action_dim": 2, "action_names": [1, 2]}, "`action_names` must be a list of strings or None, got 1"),
        ({"action_dim": 2, "action_names": "xy"}, "`action_names` must be a list of strings or None, got 'xy'"),
        ({"action_dim": 1, "action_units": [3]}, "`action_units` must be a list of strings or None, got 3"),
        ({"action_dim": 2, "action_derivation": "foo"}, "`action_derivation` must be one of recorded, .*, got 'foo'"),
        ({"action_dim": 2, "action_derivation": [1]}, r"`action_derivation` must be one of .*, got \[1\]"),
        ({"action_dim": 8, "action_derivation": "relative_6d"}, "`action_dim` must be at least 9 for .*, got 8"),
    ],
)
def test_bad_entries_raise(config, message):
    with pytest.raises(ValueError, match=message):
        ActionSpace.from_config(config)


@pytest.mark.parametrize(
    "actions",
    [[["1", "2"]], [[b"1", 2]], [[1j, 2]], torch.ones(1, 2) * 1j, [[10**400, 1]], np.array([["1", 2]], dtype=object)],
)
def test_values_that_are_not_numbers_raise(actions):
    space = ActionSpace.from_config({"action_dim": 2})
    with pytest.raises(ValueError, match=r"`actions` must be \(n, 2\) or \(batch, n, 2\), all numbers"):
        space.prepare(actions)
    assert space.prepare([[True, 2]]).tolist() == [[[1.0, 2.0]]]
