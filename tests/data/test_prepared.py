from dataclasses import replace

import numpy as np
import pytest
from test_lerobot import write_folder
from test_lerobot_writer import write_narrow
from test_sources import write_release

from irasim_diffusers.data import LeRobotFolder, PreparedEpisodes, frame_skip_for, open_dataset


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
        ({"frame_size": (0, 16)}, "`frame_size` must be an integer of at least 1, got 0"),
        ({"frame_size": (16, -16)}, "`frame_size` must be an integer of at least 1, got -16"),
        ({"frame_size": (16, 16.5)}, "`frame_size` must be an integer of at least 1, got 16.5"),
        ({"frame_size": (16,)}, "`frame_size` must be height and width"),
        ({"frame_size": (16, 16, 3)}, "`frame_size` must be height and width"),
        ({"derivation": "none"}, "`derivation` .* must be one of"),
        ({"composition": "recorded"}, "`composition` .* got 'recorded' and 'recorded'|`composition`"),
        ({"frame_skip": 2}, "`composition` .* is required with frame_skip=2"),
        ({"derivation": "absolute", "state_key": "pose"}, r"`state_key` must be one of \['observation.state'\]"),
    ],
)
def test_out_of_range_arguments_raise(source, options, message):
    with pytest.raises(ValueError, match=message):
        PreparedEpisodes(source, **options)


@pytest.mark.parametrize("fps", [0, -1.0, float("nan"), float("inf")])
def test_out_of_range_frame_rates_raise(fps, tmp_path):
    write_release(tmp_path, "rt1")
    with pytest.raises(ValueError, match=r"`fps` of .* must be a positive number, got"):
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
    episodes = write_narrow(tmp_path)  # 4, 5 and 6 frames; `next.done` is true in the last one
    source = LeRobotFolder(tmp_path)
    kept = PreparedEpisodes(source, frame_skip=3, composition="absolute")
    assert [kept.flags(number)["next.done"][:, 0].tolist() for number in range(3)] == [[False, True]] * 3
    assert np.array_equal(kept.flags(2)["observation.counts"], episodes[2].states["observation.counts"][::3])
    every = PreparedEpisodes(source, frame_skip=3, composition="absolute", all_phases=True)
    assert np.array_equal(every.flags(1)["next.done"], source.flags(1)["next.done"])
