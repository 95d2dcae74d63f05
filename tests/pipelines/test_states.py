"""Pipelines whose model follows the poses of bodies."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from conftest import tiny_pipeline

from irasim_diffusers import DrivingSession, Steering

TRACK = {"bodies": ["point", "pose"], "extent": [0, 0, 12, 8], "action_dim": 3, "action_space": "relative"}
SMALL = {"read_channels": 8, "follow_width": 16, "follow_layers": 1, "memory": 4, "draw_width": 16}


@pytest.fixture
def tracked():
    return tiny_pipeline(state_track=TRACK | SMALL, num_inference_steps=2)


def test_states_are_those_that_the_model_follows(tracked, frames, actions):
    states = tracked.predict_states(frames, actions)
    history = tracked.encode_history(tracked.preprocess_frames(frames))
    followed = tracked.transformer.track(history, torch.from_numpy(actions).float()[None])
    assert states.shape == (1, 7, 5)
    torch.testing.assert_close(states, followed[:, 2:])


def test_states_of_several_candidates(tracked, frames, actions):
    other = actions.copy()
    other[4] += 1
    states = tracked.predict_states(frames, np.stack([actions, other]))
    torch.testing.assert_close(states[:1], tracked.predict_states(frames, actions))
    changed = (states[0] - states[1]).abs().amax(-1) > 1e-6
    assert changed.tolist() == [False] * 4 + [True] * 3
    both = tracked.predict_states(np.stack([frames, frames[::-1]]), np.stack([actions, other]))
    torch.testing.assert_close(both[:1], states[:1])
    assert not torch.allclose(both[1], states[1])
    with pytest.raises(ValueError, match="got 2 histories and 3 action sequences"):
        tracked.predict_states(np.stack([frames, frames]), np.stack([actions] * 3))


def test_a_model_without_a_track_has_no_states(pipeline, frames, actions):
    with pytest.raises(ValueError, match="`predict_states` needs a model with a track of poses"):
        pipeline.predict_states(frames, actions)


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_videos_are_the_same_alone_and_in_a_batch(tracked, frames, actions, guidance_scale):
    def run(frames, actions, *seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return tracked(frames, actions, generator=generators, output_type="pt", guidance_scale=guidance_scale).frames

    batch = run(np.stack([frames, frames[::-1]]), np.stack([actions, -actions]), 0, 1)
    torch.testing.assert_close(batch[:1], run(frames, actions, 0), atol=1e-4, rtol=0)
    torch.testing.assert_close(batch[1:], run(frames[::-1].copy(), -actions, 1), atol=1e-4, rtol=0)


def test_poses_are_read_once(tracked, frames, actions):
    """Later windows, chunks and steps go on from the poses followed, not from those that their history shows."""
    reads = []
    tracked.transformer.track.read_in.register_forward_hook(lambda *_: reads.append(1))
    tracked(frames, actions, output_type="latent")  # three windows
    assert len(reads) == 1
    list(tracked.stream(frames, actions, chunk_length=3, output_type="latent"))
    assert len(reads) == 2
    session = DrivingSession(tracked, frames, Steering(tracked.transformer.config), max_frames=3)
    for part in (actions[:3], actions[3:5], actions[5:]):
        session.step(part)
    assert len(reads) == 3


@pytest.mark.parametrize("seen", [1, 2])
@pytest.mark.parametrize("stream", [False, True])
def test_poses_are_handed_on_with_their_frames(tracked, frames, actions, seen, stream):
    sketched = []
    draw = tracked.transformer.track.draw
    tracked.transformer.track.draw = lambda history, states: sketched.append(states) or draw(history, states)
    if stream:
        list(tracked.stream(frames[-seen:], actions, chunk_length=3, output_type="latent"))
    else:
        tracked(frames[-seen:], actions, output_type="latent")
    assert len(sketched) > 1
    for before, after in pairwise(sketched):
        torch.testing.assert_close(after[:, :2], before[:, -2:])  # the model's history is two frames
        assert not torch.allclose(after[:, :2], before[:, :2])


def test_a_window_is_sketched_once(tracked, frames, actions):
    """Whatever the steps, and with guidance too."""
    sketches = []
    tracked.transformer.track.draw_in.register_forward_hook(lambda *_: sketches.append(1))
    tracked(frames, actions[:3], output_type="latent", num_inference_steps=5, guidance_scale=2.0)
    assert len(sketches) == 1


def test_candidates_share_what_is_read(tracked, frames, actions):
    sizes = []
    tracked.transformer.track.read_in.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    candidates = np.stack([actions, -actions, actions])
    tracked(frames, candidates, output_type="latent")
    tracked.predict_states(frames, candidates)
    assert sizes == [2, 2]  # the two frames of the one history


def test_a_session_keeps_poses_with_its_frames(tracked, frames, actions):
    """Also those that are dropped, and those before what is undone."""

    def session(max_frames):
        return DrivingSession(tracked, frames, Steering(tracked.transformer.config), max_frames=max_frames)

    short, long = session(2), session(100)
    for part in (actions[:3], actions[3:5], actions[5:]):
        assert [frame.tobytes() for frame in short.step(part)] == [frame.tobytes() for frame in long.step(part)]
    long.undo(4)
    again = session(100)
    again.step(actions[:3])
    assert [frame.tobytes() for frame in long.step(actions[3:6])] == [
        frame.tobytes() for frame in again.step(actions[3:6])
    ]


def test_streams_follow_poses_too(tracked, frames, actions):
    streamed = list(tracked.stream(frames, actions, chunk_length=3, output_type="latent", generator=torch.Generator()))
    assert len(streamed) == 7
    history = tracked.encode_history(tracked.preprocess_frames(frames))
    first = torch.from_numpy(actions[:3]).float()[None]
    expected = tracked.predict_latents(history, first, generator=torch.Generator())
    torch.testing.assert_close(torch.stack(streamed[:3], dim=1), expected[0])
