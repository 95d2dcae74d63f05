from dataclasses import replace

import numpy as np
import pytest
import torch
from test_lerobot import write_folder
from test_lerobot_writer import write_narrow
from test_release import write_release
from tiny_models import tiny_vae

from irasim_diffusers.actions import integrate_actions
from irasim_diffusers.data import (
    LatentClips,
    LeRobotFolder,
    PreparedEpisodes,
    cache_latents,
    frame_skip_for,
    open_dataset,
    standardised_states,
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("prepared")
    write_folder(root)
    return LeRobotFolder(root)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"frame_skip": 0}, "`frame_skip` must be an integer of at least 1, got 0"),
        ({"frame_skip": -2}, "`frame_skip` must be an integer of at least 1, got -2"),
        ({"frame_skip": 2.0}, "`frame_skip` must be an integer of at least 1, got 2.0"),
        ({"frame_skip": True}, "`frame_skip` must be an integer of at least 1, got True"),
        ({"action_dim": 0}, "`action_dim` must be an integer of at least 1, got 0"),
        ({"action_dim": -1}, "`action_dim` must be an integer of at least 1, got -1"),
        ({"frame_size": (0, 16)}, "each side of `frame_size` must be an integer of at least 1, got 0"),
        ({"frame_size": (16, -16)}, "each side of `frame_size` must be an integer of at least 1, got -16"),
        ({"frame_size": (16, 16.5)}, "`frame_size` must be an integer of at least 1, got 16.5"),
        ({"frame_size": (16,)}, "`frame_size` must be height and width"),
        ({"frame_size": (16, 16, 3)}, "`frame_size` must be height and width"),
        ({"derivation": "none"}, "`derivation` .* must be one of"),
        ({"composition": "recorded"}, "`composition` .* must be one of .*, got 'recorded'"),
        ({"frame_skip": 2}, r"`composition` .* is required with a `frame_skip` \(--frame_skip\) of 2"),
        ({"derivation": "absolute", "state_key": "pose"}, r"`state_key` must be one of \['observation.state'\]"),
    ],
)
def test_out_of_range_arguments_raise(source, options, message):
    with pytest.raises(ValueError, match=message):
        PreparedEpisodes(source, **options)


@pytest.mark.parametrize("fps", [0, -1.0, float("nan"), float("inf")])
def test_out_of_range_frame_rates_raise(fps, tmp_path):
    write_release(tmp_path, "rt1")
    with pytest.raises(ValueError, match=r"`fps` of .* must be a positive finite number, got"):
        PreparedEpisodes(replace(open_dataset(tmp_path, fps=5), fps=fps))


@pytest.mark.parametrize(
    ("source_fps", "target_fps"),
    [
        (10, 0),
        (10, -5),
        (10, float("nan")),
        (10, 3),
        (10, 20),
        (float("nan"), 5),
        (float("inf"), 5),
        (10, 1e-320),
        (0, 5),
    ],
)
def test_frame_rates_that_do_not_divide_raise(source_fps, target_fps):
    with pytest.raises(ValueError, match="`target_fps` must divide the"):
        frame_skip_for(source_fps, target_fps)


def test_frame_rates_that_divide():
    assert [frame_skip_for(30, 10), frame_skip_for(29.97, 9.99), frame_skip_for(5, 5)] == [3, 3, 1]


def test_a_known_derivation_is_the_composition(tmp_path):
    write_release(tmp_path, "rt1")
    source = open_dataset(tmp_path, fps=6)
    assert source.action_derivation == "relative_euler"
    given = PreparedEpisodes(source, frame_skip=2, composition="relative_euler")
    for composition in (None, "absolute"):
        known = PreparedEpisodes(source, frame_skip=2, composition=composition)
        assert (known.identity, known.action_derivation) == (given.identity, "relative_euler")
        assert np.array_equal(known[0].actions, given[0].actions)


def test_flags_of_skipped_frames_are_kept(tmp_path):
    episodes = write_narrow(tmp_path)  # 4, 5 and 6 frames; `next.done` is true in the last frame of each
    source = LeRobotFolder(tmp_path)
    kept = PreparedEpisodes(source, frame_skip=3, composition="absolute")
    assert [kept.flags(number)["next.done"][:, 0].tolist() for number in range(3)] == [[False, True]] * 3
    assert np.array_equal(kept.flags(2)["observation.counts"], episodes[2].states["observation.counts"][::3])
    every = PreparedEpisodes(source, frame_skip=3, composition="absolute", all_phases=True)
    assert np.array_equal(every.flags(1)["next.done"], source.flags(1)["next.done"])


@pytest.mark.parametrize("derivation", ["relative_euler", "relative_6d", "relative_planar", "absolute"])
def test_skipping_frames_composes_actions(derivation, tmp_path):
    _, poses, gripper = write_release(tmp_path, "droid", length=7)
    states = np.concatenate([poses, gripper], axis=1)
    source = open_dataset(tmp_path, "0", fps=6)
    derived = PreparedEpisodes(source, derivation)
    skipping = PreparedEpisodes(source, derivation, frame_skip=3)
    assert (skipping.fps, len(skipping[0])) == (2, 3)
    assert np.array_equal(skipping[0].frames, source[0].frames[::3])
    end = integrate_actions(states[0], skipping[0].actions[:-1], derivation)
    np.testing.assert_allclose(end[:, :3], states[::3, :3], atol=1e-5)
    composed = PreparedEpisodes(derived, frame_skip=3, composition=derivation)
    np.testing.assert_allclose(composed[0].actions[:-1], skipping[0].actions[:-1], atol=1e-5)


def test_windows_of_skipped_frames_start_at_any_frame(tmp_path):
    written = write_folder(tmp_path / "set", lengths=(5, 9, 7))
    source, vae = LeRobotFolder(tmp_path / "set"), tiny_vae()
    dense = PreparedEpisodes(source, frame_skip=3, composition="relative_planar", all_phases=True)
    assert (dense.fps, len(dense[1])) == (10 / 3, 9)
    folder = cache_latents(dense, vae, tmp_path / "cache")
    (states,) = standardised_states([dense], ["observation.state"])
    clips = LatentClips(folder, 3, frame_skip=3, skip_short=True, states=states)
    assert (list(clips.windows), clips.short) == ([(1, 0), (1, 1), (1, 2), (2, 0)], [0])
    every = LatentClips(cache_latents(source, vae, tmp_path / "cache"), 5).episodes
    for index, (number, start) in enumerate(clips.windows):
        assert torch.equal(clips[index]["latents"], every[number][0][start : start + 7 : 3].float().transpose(0, 1))
        assert torch.equal(clips[index]["states"], states[number][start : start + 7 : 3])
        between = written[number].actions[start : start + 6].reshape(2, 3, 3).sum(1)
        np.testing.assert_allclose(clips[index]["actions"], between, atol=1e-6)
        if start == 0:
            first_phase = PreparedEpisodes(source, frame_skip=3, composition="relative_planar")[number]
            assert np.array_equal(clips[index]["actions"], first_phase.actions[:2])
    assert len(clips.actions) == 9 - 3 + 7 - 3, "the last three actions of an episode lead beyond its end"
    with pytest.raises(
        ValueError, match=r"at least as long as a window of 3 frames with `frame_skip` 3, but 1 of \d+ are shorter"
    ):
        LatentClips(folder, 3, frame_skip=3)
    plain = PreparedEpisodes(source)
    assert PreparedEpisodes(source, all_phases=True).identity == plain.identity, (
        "without skipped frames, `all_phases` has no effect"
    )
    assert dense.identity != PreparedEpisodes(source, frame_skip=3, composition="relative_planar").identity


@pytest.mark.parametrize("derivation", ["relative_euler", "relative_6d", "relative_planar", "absolute"])
def test_last_action_of_an_episode_holds_the_pose(derivation, tmp_path):
    _, poses, gripper = write_release(tmp_path, "droid", length=4)
    last = np.concatenate([poses, gripper], axis=1)[-1]
    for skip in (1, 2, 5):  # with a skip of 5, a single frame remains
        episode = PreparedEpisodes(open_dataset(tmp_path, "0"), derivation, frame_skip=skip)[0]
        start = episode.states["state"][-1]
        after = integrate_actions(start, episode.actions[-1:], derivation)[-1]
        np.testing.assert_allclose(after[[0, 1, 2, 6]], start[[0, 1, 2, 6]], atol=1e-6)
        assert len(episode.actions) == len(episode)
    assert np.isfinite(last).all()


def test_actions_are_padded(tmp_path):
    write_release(tmp_path, "planar")
    padded = PreparedEpisodes(open_dataset(tmp_path), action_dim=5)
    assert padded[0].actions.shape == (6, 5)
    assert not padded[0].actions[:, 2:].any()
    assert padded.component_names("action") == ["x", "y", "unused 2", "unused 3", "unused 4"]
    with pytest.raises(ValueError, match=r"`action_dim` \(--pad_actions_to\) must be at least 2"):
        PreparedEpisodes(open_dataset(tmp_path), action_dim=1)[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"derivation": "guess"}, r"`derivation` \(--action_derivation\) must be one of"),
        (
            {"frame_skip": 2},
            r"`composition` \(--action_composition\) is required with a `frame_skip` \(--frame_skip\) of 2",
        ),
        ({"frame_skip": 0}, "`frame_skip` must be an integer of at least 1"),
        ({"derivation": "absolute", "state_key": "pose"}, r"`state_key` must be one of \['observation.state'\]"),
    ],
)
def test_bad_preparations(changes, message, tmp_path):
    write_folder(tmp_path)
    with pytest.raises(ValueError, match=message):
        PreparedEpisodes(LeRobotFolder(tmp_path), **changes)


def test_recorded_actions_use_the_given_composition(tmp_path):
    write_folder(tmp_path / "lerobot")
    source = LeRobotFolder(tmp_path / "lerobot")
    said = PreparedEpisodes(source, composition="absolute")
    assert (PreparedEpisodes(source).action_derivation, said.action_derivation) == ("recorded", "absolute")
    assert np.array_equal(said[1].actions, source[1].actions)
    assert said.identity == PreparedEpisodes(source).identity, "the latents do not depend on the derivation"
    write_release(tmp_path / "release", "rt1")
    known = PreparedEpisodes(open_dataset(tmp_path / "release"), composition="absolute")
    assert known.action_derivation == "relative_euler"


@pytest.mark.parametrize(("source", "target", "skip"), [(30, 10, 3), (10, 10, 1), (29.97, 9.99, 3), (30.0002, 15, 2)])
def test_frame_skip_for_a_rate(source, target, skip):
    assert frame_skip_for(source, target) == skip


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (30, 20, "`target_fps` must divide the 30 frames per second of the data, got 20"),
        (10, 30, "must divide the 10 frames .* got 30"),
        (30, 0, "got 0"),
        (None, 5, "`target_fps` 5 requires the frame rate of the data"),
    ],
)
def test_rates_that_are_not_divisors_raise(source, target, message):
    with pytest.raises(ValueError, match=message):
        frame_skip_for(source, target)
