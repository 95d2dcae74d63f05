import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from irasim_diffusers.actions import derive_actions, hold_action, integrate_actions


def trajectories(count=300):
    """Random poses with a gripper; one pose in every third trajectory has (nearly) singular Euler angles."""
    generator = np.random.default_rng(7)
    for number in range(count):
        states = np.concatenate(
            [generator.normal(size=(6, 3)), generator.uniform(-np.pi, np.pi, (6, 3)), generator.uniform(size=(6, 1))],
            1,
        )
        if number % 3 == 0:
            states[generator.integers(6), 4] = generator.choice([-1, 1]) * (
                np.pi / 2 - generator.choice([0, 1e-9, 1e-6])
            )
        yield states


@pytest.mark.parametrize("derivation", ["relative_euler", "relative_6d", "relative_planar", "absolute"])
def test_from_absolute_to_relative_and_back(derivation):
    for states in trajectories():
        actions = derive_actions(states, derivation)
        assert len(actions) == len(states) - 1
        back = integrate_actions(states[0], actions, derivation)
        np.testing.assert_allclose(back[:, :3], states[:, :3], atol=1e-6)
        np.testing.assert_allclose(back[:, 6], states[:, 6], atol=1e-6)
        matrices = [Rotation.from_euler("xyz", poses[:, 3:6]).as_matrix() for poses in (back, states)]
        np.testing.assert_allclose(*matrices, atol=1e-6)


def test_relative_euler_is_the_papers_formula():
    def matrix(angles):  # written out: rotations about the fixed x, y and z axes, in this order
        (cx, cy, cz), (sx, sy, sz) = np.cos(angles), np.sin(angles)
        about_x = np.array([[1, 0, 0], [0, cx, -sx], [0, sx, cx]])
        about_y = np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
        about_z = np.array([[cz, -sz, 0], [sz, cz, 0], [0, 0, 1]])
        return about_z @ about_y @ about_x

    states = next(trajectories())
    actions = derive_actions(states, "relative_euler")
    for before, after, action in zip(states, states[1:], actions, strict=False):
        rotation = matrix(before[3:6])
        np.testing.assert_allclose(action[:3], rotation.T @ (after[:3] - before[:3]), atol=1e-12)
        np.testing.assert_allclose(matrix(action[3:6]), rotation.T @ matrix(after[3:6]), atol=1e-12)
        assert action[6] == after[6]


def test_no_motion_gives_the_hold_action():
    states = np.repeat(next(trajectories())[:1], 3, axis=0)
    for derivation in ("relative_euler", "relative_6d", "relative_planar", "absolute"):
        still = derive_actions(states, derivation)[:1]
        # the pose moves, and the gripper does not
        last = still + np.pad(np.ones((1, still.shape[1] - 1)), ((0, 0), (0, 1)))
        space = "absolute" if derivation == "absolute" else "relative"
        held = hold_action(torch.from_numpy(still if space == "absolute" else last)[None], space, derivation)
        if derivation == "relative_planar":
            still[:] = 0
        np.testing.assert_allclose(held[0].numpy(), still, atol=1e-12)
    last = torch.tensor([[[3.0, 4.0]]])
    assert torch.equal(hold_action(last, "absolute"), last)
    assert not hold_action(last, "relative").any()


@pytest.mark.parametrize(
    ("states", "derivation", "message"),
    [
        (np.zeros((4, 7)), "euler", "`derivation` must be one of"),
        (np.zeros((4, 7)), "recorded", "`derivation` must be one of"),
        (np.zeros((4, 5)), "relative_euler", r"`states` must be \(T, 6 or more\) for 'relative_euler', got \(4, 5\)"),
        (np.zeros(7), "absolute", r"`states` must be \(T, 1 or more\)"),
        (np.array([[0.0], [np.nan]]), "absolute", "`states` must be finite, got .* at frame 1"),
    ],
)
def test_bad_states(states, derivation, message):
    with pytest.raises(ValueError, match=message):
        derive_actions(states, derivation)


def test_bad_first_state():
    with pytest.raises(ValueError, match=r"`state` must be \(6 or more,\) for 'relative_6d', got \(5,\)"):
        integrate_actions(np.zeros(5), np.zeros((2, 9)), "relative_6d")
