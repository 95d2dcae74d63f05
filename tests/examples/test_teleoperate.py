import itertools
import json
import struct
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

pytest.importorskip("gradio_client")

from teleoperate import (
    Gamepad,
    TeleoperateArguments,
    actions_of_poses,
    at_rate,
    axes_matrix,
    check_arguments,
    gamepad_commands,
    pose_actions,
    read_pose,
    requests,
    save,
)

from irasim_diffusers import ActionSpace, Steering
from irasim_diffusers.actions import integrate_actions
from irasim_diffusers.commands.keys import key_controls

SIZES = {"relative_planar": 2, "relative_euler": 7, "relative_6d": 10}


class Config(dict):
    __getattr__ = dict.__getitem__


def space(derivation="relative_euler", kind="relative", low=None, high=None):
    """Action space as returned by the /start endpoint of the Space."""
    size = SIZES[derivation]
    config = Config(
        action_dim=size,
        action_space=kind,
        action_derivation=derivation,
        action_names=None,
        action_scale=20.0,
        action_low=low,
        action_high=high,
    )
    steering = Steering(ActionSpace.from_config(config), start=[100.0, 40.0] if size == 2 else None)
    return {
        "names": list(steering.action_space.names),
        "space": kind,
        "derivation": derivation,
        "low": [low] * size,
        "high": [high] * size,
        "hold": steering.hold().tolist(),
        "controls": [vars(control) for control in key_controls(steering.action_space)],
        "fps": 5,
    }


def event(number, value, kind=2, initial=False):
    return struct.pack("=IhBB", 0, value, kind | 0x80 * initial, number)


def test_centered_gamepad_holds_for_any_rest_position():
    gamepad = Gamepad()
    assert not gamepad.command(space()["controls"], 0.15).any()
    gamepad.take(b"".join(event(axis, 4000, initial=True) for axis in range(8)) + event(2, -32767))
    assert not gamepad.command(space()["controls"], 0.15).any()
    assert gamepad.command(space()["controls"], 0.05).any()


def test_sticks_match_keys():
    planar, arm = space("relative_planar", "absolute"), space()
    gamepad = Gamepad()
    gamepad.take(event(0, 32767) + event(1, -32768))  # right and up
    assert gamepad.command(planar["controls"], 0.15).tolist() == [1, -1]
    assert gamepad.command(arm["controls"], 0.15).tolist() == [1, -1, 0, 0, 0, 0, 0]
    gamepad.take(event(0, 0) + event(1, 0) + event(4, -32767) + event(0, 1, kind=1))
    assert gamepad.command(arm["controls"], 0.15).tolist() == [0, 0, 1, 0, 0, 0, 1]
    gamepad.take(event(0, 0, kind=1) + event(4, 0))
    assert not gamepad.command(arm["controls"], 0.15).any()


def test_command_increases_beyond_dead_zone():
    gamepad, commands = Gamepad(), []
    for value in range(0, 32768, 1000):
        gamepad.take(event(0, value))
        commands.append(gamepad.command(space("relative_planar", "absolute")["controls"], 0.2)[0])
    assert np.all(np.diff(commands) >= 0)
    assert commands[6] == 0 < commands[7] < 0.03
    gamepad.take(event(0, 32767))
    assert gamepad.command(space("relative_planar", "absolute")["controls"], 0.2)[0] == 1


def test_gamepad_commands_end_with_device(tmp_path):
    (tmp_path / "js0").write_bytes(event(0, 32767))
    assert list(gamepad_commands(tmp_path / "js0", space(), 0.1)) == []  # the device file ends after one event


def trajectory(length=9):
    rng = np.random.default_rng(0)
    return np.cumsum(rng.normal(scale=0.1, size=(length, 7)), axis=0)


def lines_of(states, fps, quaternions=True):
    for number, state in enumerate(states):
        turn = Rotation.from_euler("xyz", state[3:6]).as_quat() if quaternions else state[3:6]
        pose = {"time": 7 + number / fps, "position": list(state[:3]), "rotation": list(turn), "gripper": state[6]}
        yield json.dumps(pose)


def arguments(**changes):
    return TeleoperateArguments(device="poses", chunk_length=3, **changes)


@pytest.mark.parametrize("derivation", ["relative_euler", "relative_6d"])
@pytest.mark.parametrize("quaternions", [True, False])
def test_pose_stream_reproduces_trajectory(derivation, quaternions):
    states, arm = trajectory(), space(derivation)
    actions = np.concatenate(list(pose_actions(lines_of(states, 5, quaternions), arguments(), arm)))
    assert actions.shape == (8, SIZES[derivation])
    np.testing.assert_allclose(integrate_actions(states[0], actions, derivation), states, atol=1e-9)


def test_planar_targets_follow_hand_within_bounds():
    states, plane = trajectory(), space("relative_planar", "absolute", 0.0, 120.0)
    made = list(pose_actions(lines_of(states, 5), arguments(axes="z,-y", scale=50.0), plane))
    wanted = [100, 40] + 50 * (states[1:, [2, 1]] - states[0, [2, 1]]) * [1, -1]
    np.testing.assert_allclose(np.concatenate(made), wanted, atol=1e-9)
    far = pose_actions(lines_of(states, 5), arguments(scale=1e4), plane)
    assert np.concatenate(list(far)).max() == 120


def test_constant_pose_holds():
    still = np.repeat(trajectory()[-1:], 6, axis=0)
    for kind in (space(), space("relative_6d"), space("relative_planar", "absolute")):
        actions = np.concatenate(list(pose_actions(lines_of(still, 5), arguments(), kind)))
        moving = slice(None, -1) if len(kind["names"]) > 2 else slice(None)  # the gripper follows the hand
        np.testing.assert_allclose(actions[:, moving], [kind["hold"][moving]] * 5, atol=1e-9)


def test_motions_are_relative_to_previous_pose():
    turned = Rotation.from_euler("xyz", [0.3, -0.4, 2.0])
    states = trajectory()
    elsewhere = states.copy()
    elsewhere[:, :3] = turned.apply(states[:, :3]) + np.array([5, 6, 7])
    elsewhere[:, 3:6] = (turned * Rotation.from_euler("xyz", states[:, 3:6])).as_euler("xyz")
    one, other = (actions_of_poses(each, np.zeros(7), space()) for each in (states, elsewhere))
    np.testing.assert_allclose(one, other, atol=1e-9)


def test_tracker_axes_are_mapped_to_robot_axes():
    line = json.dumps({"time": 1, "position": [1, 2, 3], "rotation": [0.0, 0.5, 0.0]})  # WebXR: y up, -z ahead
    _, state = read_pose(line, axes_matrix("-z,-x,y"), 2.0)
    np.testing.assert_allclose(state, [-6, -2, 4, 0, 0, 0.5, 0], atol=1e-12)
    np.testing.assert_array_equal(axes_matrix("z,x"), axes_matrix("z,x,y"))


def test_unusable_output_raises_before_the_first_request(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"--output must be writable, got '.*file/drive.mp4'"):
        check_arguments(TeleoperateArguments(device="keyboard", output=tmp_path / "file" / "drive.mp4"))


@pytest.mark.parametrize("rate", [3, 5, 17, 90])
def test_streams_are_resampled_to_model_rate(rate):
    motion = np.array([0.1, -0.2, 0.3, 0.0, 0.0, 0.4, 0.05])
    poses = ((number / rate, motion * number / rate) for number in range(2 * rate + 1))
    states = np.stack(list(at_rate(poses, 5)))
    np.testing.assert_allclose(states, motion * np.arange(11)[:, None] / 5, atol=1e-9)


def test_file_is_sent_in_chunks(tmp_path):
    table = np.arange(14.0).reshape(7, 2)
    np.save(tmp_path / "actions.npy", table)
    sent = list(requests(TeleoperateArguments("file", actions=tmp_path / "actions.npy", chunk_length=3), space()))
    assert [endpoint for endpoint, _ in sent] == ["/step"] * 3
    assert list(itertools.chain.from_iterable(rows for _, (rows,) in sent)) == table.tolist()


def test_failed_download_keeps_the_earlier_recording(tmp_path, monkeypatch):
    class Recordings:
        def predict(self, session, api_name):
            return "downloaded.mp4", "downloaded.npy"

    def fill_disk(source, target):
        Path(target).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("shutil.copyfile", fill_disk)
    (tmp_path / "drive.mp4").write_bytes(b"earlier")
    with pytest.raises(OSError, match="no space left"):
        save(Recordings(), "session", tmp_path / "drive.mp4")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("drive.mp4", b"earlier")]


POSE = {"time": 1, "position": [1, 2, 3], "rotation": [0, 0, 0, 1]}


@pytest.mark.parametrize(
    ("do", "message"),
    [
        (lambda: read_pose("no", np.eye(3), 1), "a pose must be a line of JSON .* got 'no'"),
        (lambda: read_pose("[1]", np.eye(3), 1), "a pose must be a line of JSON"),
        (lambda: read_pose(json.dumps(POSE | {"position": [1, 2]}), np.eye(3), 1), "a pose must be"),
        (lambda: read_pose(json.dumps(POSE | {"rotation": [1, 2]}), np.eye(3), 1), "a pose must be"),
        (lambda: read_pose(json.dumps(POSE | {"rotation": [0, 0, 0, 0]}), np.eye(3), 1), "a pose must be"),
        (
            lambda: read_pose(json.dumps(POSE | {"time": None}), np.eye(3), 1),
            "a pose must contain finite numbers only",
        ),
        (lambda: read_pose(json.dumps(POSE | {"gripper": float("nan")}), np.eye(3), 1), "finite numbers"),
        (lambda: axes_matrix("x,y,-z"), "`axes` must be x, y and z, right-handed"),
        (lambda: axes_matrix("x,x,y"), "`axes` must be"),
        (lambda: axes_matrix("x"), "`axes` must be"),
        (lambda: axes_matrix("x,y,up"), "`axes` must be .*; got 'x,y,up'"),
        (lambda: list(at_rate([(1, np.zeros(7)), (1, np.zeros(7))], 5)), "the times of poses must increase"),
        (lambda: actions_of_poses(np.zeros((2, 7)), np.zeros(5), {"names": list("abcde")}), "components, got 5"),
        (
            lambda: actions_of_poses(np.zeros((2, 7)), np.zeros(7), space() | {"derivation": "recorded"}),
            "planar targets of 2 components, got 7 components of derivation 'recorded'",  # recorded actions may be joint positions
        ),
        (lambda: check_arguments(TeleoperateArguments("file")), "--actions must be a file, got 'actions.csv'"),
        (lambda: check_arguments(TeleoperateArguments("gamepad", gamepad=Path("no"))), "plug"),
        (lambda: check_arguments(TeleoperateArguments("poses", dead_zone=1)), r"`dead_zone` must be in \[0, 1\)"),
        (lambda: check_arguments(TeleoperateArguments("poses", chunk_length=0)), "`chunk_length` must be at least 1"),
        (lambda: check_arguments(TeleoperateArguments("poses", udp=99999)), r"`udp` must be a port in \[1, 65535\]"),
        (lambda: check_arguments(TeleoperateArguments("poses", scale=0)), "`scale` must be positive, got 0"),
    ],
)
def test_invalid_input_raises(do, message):
    with pytest.raises(ValueError, match=message):
        do()
