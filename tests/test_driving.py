import numpy as np
import pytest
import torch
from tiny_models import tiny_pipeline

from irasim_diffusers import ActionSpace, DrivingSession, IRASimPipeline, Steering, embedded_checkpoint
from irasim_diffusers.actions import integrate_actions
from irasim_diffusers.commands.keys import key_command, key_controls
from irasim_diffusers.data import read_video

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def pipe():
    pipe = IRASimPipeline.from_pretrained(embedded_checkpoint())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def clip():
    folder = embedded_checkpoint()
    actions = np.loadtxt(folder / "example_actions.csv", delimiter=",", skiprows=1)
    return read_video(folder / "example.mp4"), actions


@pytest.fixture
def session(pipe, clip):
    return DrivingSession(pipe, clip[0][:2], Steering(pipe.action_space, start=clip[1][0]), seed=3)


def drive(session, pressed, num_frames=1):
    """Drive with keys, as `irasim play` does."""
    return session.drive(key_command(session.steering.action_space, pressed), num_frames)


def arm(**changes):
    known = {
        "action_dim": 7,
        "action_space": "relative",
        "action_derivation": "relative_euler",
        "action_names": None,
        "action_scale": 20.0,
        "action_low": [None] * 6 + [0.0],
        "action_high": [None] * 6 + [1.0],
    }
    return ActionSpace.from_config(known | changes)


def test_keys_move_target_within_bounds(pipe):
    steering = Steering(pipe.action_space, speed=2.0, start=[300.0, 30.0])
    step = 2.0 * 32
    assert steering.action(key_command(steering.action_space, {"ArrowLeft"})).tolist() == [300 - step, 30]
    assert steering.action(key_command(steering.action_space, {"D", "s"})).tolist() == [300, 30 + step]
    assert steering.action(key_command(steering.action_space, {"ArrowLeft", "ArrowRight", "q"})).tolist() == [
        300,
        30 + step,
    ]
    for _ in range(9):
        steering.action(key_command(steering.action_space, {"w"}))
    assert steering.hold().tolist() == [300, 0]
    steering.continue_from(None)
    assert steering.hold().tolist() == [300, 30]


def test_arm_moves_while_keys_are_held_and_gripper_stays():
    steering = Steering(arm(action_scale=[20.0] * 6 + [4.0]), speed=0.5)
    assert [control.key for control in key_controls(steering.action_space) if control.component == 0] == [
        "ArrowDown",
        "ArrowUp",
    ]
    moved = steering.action(key_command(steering.action_space, {"w", "g"}))
    assert moved.tolist() == [0.025, 0, 0, 0, 0, 0, 0.125]
    assert steering.hold().tolist() == [0, 0, 0, 0, 0, 0, 0.125]
    for _ in range(9):
        steering.action(key_command(steering.action_space, {"g"}))
    assert steering.hold()[6] == 1


def test_no_key_changes_a_rotation_matrix():
    steering = Steering(arm(action_dim=10, action_derivation="relative_6d", action_low=None, action_high=None))
    assert {control.component for control in key_controls(steering.action_space)} == {0, 1, 2, 9}
    moved = steering.action(key_command(steering.action_space, {"w", "r", "k", "g"}))
    np.testing.assert_allclose(moved, [0.05, 0, 0.05, 1, 0, 0, 0, 1, 0, 0.05])


@pytest.mark.parametrize(("derivation", "size"), [("relative_euler", 7), ("relative_6d", 10), ("relative_planar", 2)])
def test_zero_command_keeps_the_state(derivation, size):
    bounds = {"action_low": 0.01, "action_high": 0.01}  # zero is out of bounds: in the data, every action was 0.01
    config = arm(action_dim=size, action_derivation=derivation, **bounds)
    steering = Steering(config, start=np.zeros(size))
    state = {7: [0.3, 0.1, 0.2, 0.4, -0.3, 1.0, 0.0], 10: [0.3, 0.1, 0.2, 0.4, -0.3, 1.0, 0.0], 2: [0.3, 0.1]}[size]
    held = np.stack([steering.action(np.zeros(size)) for _ in range(3)])
    np.testing.assert_allclose(integrate_actions(np.array(state), held, derivation)[-1], state, atol=1e-9)


def test_session_matches_stream_of_its_actions(session, pipe, clip):
    actions = clip[1][:7]
    frames = [*session.step(actions[:3]), *session.step(actions[3:])]
    assert len(session) == 7
    np.testing.assert_allclose(session.actions, actions, atol=1e-4)
    others = list(pipe.stream(clip[0][:2], actions, chunk_length=3, generator=torch.Generator().manual_seed(0)))
    assert np.abs(np.stack(frames).astype(int) - np.stack(others)).mean() < 1  # only the noise differs


def test_undo_restores_the_same_future(session):
    drive(session, {"ArrowRight"}, 2)
    once = [np.asarray(frame) for frame in drive(session, {"ArrowUp"}, 3)]
    target = session.steering.hold()
    assert np.array_equal(session.undo(3), session.frames[1])
    twice = [np.asarray(frame) for frame in drive(session, {"ArrowUp"}, 3)]
    np.testing.assert_array_equal(once, twice)
    assert np.array_equal(session.steering.hold(), target)
    assert np.array_equal(session.undo(99), session.first_frame)
    assert len(session) == 0


def test_dropped_frames_do_not_change_later_ones(pipe, clip, session):
    short = DrivingSession(pipe, clip[0][:2], Steering(pipe.action_space, start=clip[1][0]), seed=3, max_frames=1)
    for keys in ({"ArrowLeft"}, {"ArrowDown"}, {"ArrowDown"}, set()):
        np.testing.assert_array_equal(drive(short, keys)[0], drive(session, keys)[0])
    assert len(short) == 1
    short.undo(5)
    session.undo(1)
    np.testing.assert_array_equal(drive(short, {"ArrowUp"})[0], drive(session, {"ArrowUp"})[0])


def test_appended_frames_continue_an_earlier_session(pipe, clip, session):
    drive(session, {"ArrowUp"}, 4)
    later = DrivingSession(pipe, clip[0][:2], Steering(pipe.action_space, start=clip[1][0]), seed=3, max_frames=3)
    later.append(session.frames, session.actions)
    assert len(later) == 3  # the oldest frame is dropped, but still counts as a step, which determines the noise
    np.testing.assert_array_equal(later.steering.hold(), session.steering.hold())
    np.testing.assert_array_equal(later.actions, session.actions[1:])
    expected = [np.asarray(frame, dtype=float) for frame in drive(session, {"ArrowRight"}, 2)]
    actual = [np.asarray(frame, dtype=float) for frame in drive(later, {"ArrowRight"}, 2)]
    assert np.abs(np.subtract(actual, expected)).mean() < 0.5  # the history was rounded to 8 bits
    frame, size = session.frames[0], len(later)
    for frames, actions in (([frame], [[1, 2], [3, 4]]), ([frame.resize((8, 12))], [[1, 2]])):
        with pytest.raises(ValueError, match="`frames` must be one image of 96x96 pixels for each action"):
            later.append(frames, actions)
    assert len(later) == size


def test_appended_frames_of_a_model_of_whole_trajectories():
    """A model of whole trajectories (Video-Ada) requires all its history frames."""
    pipe, frames = tiny_pipeline(conditioning="video", num_inference_steps=1), np.zeros((2, 8, 12, 3), np.uint8)
    session, later = (DrivingSession(pipe, frames, Steering(pipe.action_space)) for _ in range(2))
    session.step(np.ones((2, 3)))
    later.append(session.frames, session.actions)
    expected, actual = (np.asarray(each.step(np.ones((1, 3)))[0], float) for each in (session, later))
    assert np.abs(actual - expected).mean() < 3


def test_sessions_of_one_pipeline_do_not_mix(pipe, clip, session):
    alone = [np.asarray(frame) for frame in drive(session, {"ArrowRight"}, 2) + drive(session, set(), 2)]
    session.reset()
    other = DrivingSession(pipe, clip[0][20:22], Steering(pipe.action_space, start=clip[1][20]))
    between = drive(session, {"ArrowRight"}, 2)
    drive(other, {"ArrowLeft"}, 4)
    np.testing.assert_array_equal(alone, [np.asarray(frame) for frame in between + drive(session, set(), 2)])


def test_recording_contains_first_frame_and_every_action(session, tmp_path):
    drive(session, {"ArrowRight"}, 4)
    video, actions = session.save(tmp_path / "drive.mp4")
    assert read_video(video).shape == (5, 96, 96, 3)
    np.testing.assert_allclose(np.load(actions), session.actions, atol=1e-4)


def test_shortened_recording_starts_with_the_frame_before_its_first_action(pipe, clip, tmp_path):
    steering = Steering(pipe.action_space, start=clip[1][0])
    session = DrivingSession(pipe, clip[0][:2], steering, max_frames=2)
    *_, before = session.step([[450.0, 450.0]] * 8)
    session.step([[450.0, 450.0]] * 2)
    assert len(session) == 2
    first = read_video(session.save(tmp_path / "drive.mp4")[0])[0].astype(int)
    assert np.abs(first - np.asarray(before)).mean() < np.abs(first - np.asarray(session.first_frame)).mean()


def test_steps_of_whole_chunks_equal_one_step(pipe, clip):
    """The embedded model predicts two frames per chunk, so that two steps of two actions agree with one of four."""
    two, four = (DrivingSession(pipe, clip[0][:2], Steering(pipe.action_space, start=clip[1][0])) for _ in "12")
    parts = [*two.step(clip[1][1:3]), *two.step(clip[1][3:5])]
    np.testing.assert_array_equal(np.stack(parts), np.stack(four.step(clip[1][1:5])))


def test_failed_step_keeps_the_target(session, monkeypatch):
    drive(session, {"w"})
    target = session.steering.hold()
    monkeypatch.setattr(session.model, "advance", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        drive(session, {"w"})
    np.testing.assert_array_equal(session.steering.hold(), target)


@pytest.mark.parametrize(
    ("do", "message"),
    [
        (lambda session, _: session.step([[1.0, 2.0, 3.0]]), r"`actions` must be \(n, 2\)"),
        (lambda session, _: session.step([[1.0, float("nan")]]), "`actions` must be finite"),
        (lambda session, _: session.step(np.zeros((17, 2))), "at most 16 actions, got"),
        (lambda session, _: session.drive([0.0, 0.0], 0), r"`num_frames` must be in \[1, 16\], got 0"),
        (lambda session, _: session.undo(-1), "`num_frames` must not be negative"),
        (lambda session, folder: session.save(folder / "a.mp4"), "no frames to save: call `drive` or `step` first"),
        (lambda session, _: session.steering.action([0.0, 1.5]), r"`command` must be in \[-1, 1\]"),
        (lambda session, _: session.steering.action([0.0]), "`command` must be 2 finite numbers"),
        (lambda session, _: Steering(session.model.action_space), "`start` must be the current position"),
        (lambda session, _: DrivingSession(session.model, np.zeros((9, 9, 3)), session.steering), "`frames` must be"),
        (
            lambda session, _: DrivingSession(session.model, np.zeros((2, 2, 96, 96, 3)), session.steering),
            "one history, got 2",
        ),
        (
            lambda session, _: DrivingSession(session.model, session.first_frame, session.steering, max_frames=0),
            "at least 1",
        ),
    ],
)
def test_bad_input_raises_and_changes_nothing(session, tmp_path, do, message):
    with pytest.raises(ValueError, match=message):
        do(session, tmp_path)
    assert len(session) == 0
    assert not list(tmp_path.iterdir())
