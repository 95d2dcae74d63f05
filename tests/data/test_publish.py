import json
import weakref
from dataclasses import replace

import numpy as np
import pytest
from test_lerobot import CAMERA, write_folder
from test_release import write_release
from test_sources import break_action

from irasim_diffusers.data import (
    Episode,
    LeRobotFolder,
    PreparedEpisodes,
    open_dataset,
    publish,
    write_dataset_card,
    write_lerobot,
)


class Counted(LeRobotFolder):
    """Count the episodes in memory."""

    def __getitem__(self, number: int) -> Episode:
        held = self.__dict__.setdefault("held", [])
        self.__dict__["most"] = max(self.__dict__.get("most", 0), sum(ref() is not None for ref in held))
        episode = super().__getitem__(number)
        frames = episode.frames
        while frames.base is not None:
            frames = frames.base
        held.append(weakref.ref(frames))
        return episode


class Noted(LeRobotFolder):
    """Write a file into the output folder while an episode is read, as a user might."""

    def __getitem__(self, number: int) -> Episode:
        (self.root.parent / "out" / "notes.txt").write_text("mine")
        return super().__getitem__(number)


def files(root):
    """Return the content of all written files by their relative paths."""
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*.*") if path.is_file()}


def test_only_one_episode_is_in_memory(tmp_path):
    write_folder(tmp_path / "set")
    source = Counted(tmp_path / "set")
    copy = write_lerobot(source, tmp_path / "copy")
    assert (len(source.held), source.most) == (4, 0), "the first episode is read twice, once for its sizes"
    for before, after in zip(LeRobotFolder(tmp_path / "set"), copy, strict=True):
        assert (before.frames == after.frames).all()
        assert (before.actions == after.actions).all()
        assert before.task == after.task


def test_broken_episodes_are_skipped_and_stopped_run_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(publish, "EPISODES_PER_FILE", 1)
    write_folder(tmp_path / "set")
    break_action(tmp_path / "set", 1)
    source = LeRobotFolder(tmp_path / "set")
    whole = write_lerobot(source, tmp_path / "whole", skip_broken=True)
    assert [row["length"] for row in whole.rows] == [5, 7]
    assert json.loads((whole.root / "meta/stats.json").read_text())[CAMERA]["count"] == [12]
    with pytest.raises(ValueError, match="episode 1 of"):
        write_lerobot(source, tmp_path / "stopped")
    assert not list(tmp_path.rglob("*.partial*"))
    write_lerobot(source, tmp_path / "stopped", skip_broken=True)
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")


def test_failed_run_keeps_other_files_and_its_error(tmp_path):
    """The folder is removed only if it is empty; the first error is reported."""
    write_folder(tmp_path / "set")
    break_action(tmp_path / "set", 0)
    root = tmp_path / "out"

    with pytest.raises(ValueError, match="episode 0 of"):
        write_lerobot(LeRobotFolder(tmp_path / "set"), root)
    assert not root.exists()
    source = Noted(tmp_path / "set", cameras=CAMERA)
    with pytest.raises(ValueError, match="episode 0 of"):
        write_lerobot(source, root)
    assert [path.name for path in root.iterdir()] == ["notes.txt"]


def test_derivation_units_and_names_are_kept(tmp_path):
    write_release(tmp_path / "release", "rt1")
    source = open_dataset(tmp_path / "release", fps=5)
    copy = write_lerobot(source, tmp_path / "copy")
    again = write_lerobot(copy, tmp_path / "again")
    for folder in (copy, again, LeRobotFolder(tmp_path / "copy")):
        assert folder.action_derivation == source.action_derivation == "relative_euler"
        assert folder.action_units == ["m", "m", "m", "rad", "rad", "rad", None]
        assert folder.component_names("action") == source.component_names("action")
        assert np.array_equal(folder[0].actions, source[0].actions)
    assert PreparedEpisodes(copy, frame_skip=2).action_derivation == "relative_euler"
    states = LeRobotFolder(tmp_path / "copy", action_column="state")
    assert (states.action_derivation, states.action_units) == ("recorded", None)
    write_dataset_card(copy, "org/arm")
    card = (copy.root / "README.md").read_text()
    assert "Actions (`relative_euler`): motions in the frame of the previous pose" in card
    assert "| `action` | float32 | x (m), y (m), z (m), roll (rad), pitch (rad), yaw (rad), gripper |" in card


@pytest.mark.parametrize("derivation", ["absolute", "relative_planar", "relative_6d"])
def test_derived_actions_are_written_with_their_derivation(derivation, tmp_path):
    write_release(tmp_path / "release", "rt1")
    source = PreparedEpisodes(open_dataset(tmp_path / "release", fps=5), derivation)
    copy = write_lerobot(source, tmp_path / "copy")
    assert copy.action_derivation == derivation
    assert np.array_equal(copy[0].actions, source[0].actions)


def test_recorded_actions_have_no_entry(tmp_path):
    write_folder(tmp_path / "set")
    copy = write_lerobot(LeRobotFolder(tmp_path / "set"), tmp_path / "copy")
    assert (copy.action_derivation, copy.action_units) == ("recorded", None)
    assert copy.info["features"]["action"] == {"dtype": "float32", "shape": [3], "names": ["x", "y", "grip"]}
    write_dataset_card(copy, "org/arm")
    assert (
        "Actions (`recorded`): as recorded; their relation to the states is unknown"
        in (copy.root / "README.md").read_text()
    )


@pytest.mark.parametrize("layout", [["0", "1"], [["1", "0"]]])
def test_single_cameras_are_kept(layout, tmp_path):
    write_release(tmp_path / "release", "droid")
    source = open_dataset(tmp_path / "release", layout, fps=5)
    copy = write_lerobot(source, tmp_path / "copy")
    assert copy.cameras == tuple(tuple(f"observation.images.{name}" for name in row) for row in source.cameras)
    for camera in ("0", "1"):
        alone = replace(source, cameras=camera)
        assert np.array_equal(LeRobotFolder(copy.root, f"observation.images.{camera}")[1].frames, alone[1].frames)
    for again in (copy, open_dataset(tmp_path / "copy"), write_lerobot(copy, tmp_path / "again")):
        assert len(again) == 2
        for before, after in zip(source, again, strict=True):
            assert np.array_equal(after.frames, before.frames)
    write_dataset_card(copy, "org/arm")
    assert "| `observation.images.1` | 10 x 14 |" in (copy.root / "README.md").read_text()


def test_resized_cameras_stay_one_picture(tmp_path):
    write_release(tmp_path / "release", "droid")
    source = PreparedEpisodes(open_dataset(tmp_path / "release", ["0", "1"], fps=5), frame_size=(16, 16))
    copy = write_lerobot(source, tmp_path / "copy")
    assert copy.cameras == (("observation.image",),)
    assert np.array_equal(copy[0].frames, source[0].frames)


def test_repaired_data_set_is_written_after_a_failure(tmp_path):
    write_folder(tmp_path / "set")
    good = {path: path.read_bytes() for path in tmp_path.rglob("*.parquet")}
    break_action(tmp_path / "set", 0)
    with pytest.raises(ValueError, match="episode 0 of"):
        write_lerobot(LeRobotFolder(tmp_path / "set"), tmp_path / "copy")
    assert not files(tmp_path / "copy"), "no file is left"
    for path, content in good.items():
        path.write_bytes(content)
    (tmp_path / "set/meta/tasks.parquet").touch()
    assert len(write_lerobot(LeRobotFolder(tmp_path / "set"), tmp_path / "copy")) == 3


def test_folder_without_a_complete_file_is_reused(tmp_path):
    """The run was killed before its first file was complete."""
    write_folder(tmp_path / "set")
    write_folder(tmp_path / "other", lengths=(4, 4, 4))
    video = tmp_path / "copy/videos/wrist/chunk-000/file-000.mp4"
    video.parent.mkdir(parents=True)
    video.write_bytes(b"half")
    (tmp_path / "copy" / publish.SOURCE_FILE).write_text('{"data": ')
    copy = write_lerobot(LeRobotFolder(tmp_path / "set"), tmp_path / "copy")
    assert len(copy) == 3
    assert not video.exists()
    with pytest.raises(ValueError, match="is not empty and was not written from this dataset with these settings"):
        write_lerobot(LeRobotFolder(tmp_path / "other"), tmp_path / "copy")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="is not empty and was not written from this dataset"):
        write_lerobot(LeRobotFolder(tmp_path / "set"), tmp_path / "mine")
    assert (tmp_path / "mine/thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("fps", [None, 0, -5, float("nan"), float("inf")])
def test_out_of_range_frame_rates_raise(fps, tmp_path):
    write_release(tmp_path / "release", "rt1")
    source = replace(open_dataset(tmp_path / "release", fps=5), fps=fps)
    with pytest.raises(
        ValueError, match=f"must have a positive finite frame rate, got {'none' if fps is None else fps}"
    ):
        write_lerobot(source, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()


def test_frames_of_another_size_raise(tmp_path, monkeypatch):
    monkeypatch.setattr(publish, "EPISODES_PER_FILE", 1)
    write_folder(tmp_path / "set")
    source = LeRobotFolder(tmp_path / "set")
    read = LeRobotFolder.__getitem__
    wider = np.zeros((9, 10, 16, 3), np.uint8)
    change = lambda self, number: replace(read(self, number), **({"frames": wider} if number == 1 else {}))  # noqa: E731
    monkeypatch.setattr(LeRobotFolder, "__getitem__", change)
    with pytest.raises(
        ValueError,
        match=r"frames of episode 1 of .* must be 10x14 \(height x width\) like those of earlier episodes, got 10x16",
    ):
        write_lerobot(source, tmp_path / "copy")
    assert len(write_lerobot(source, tmp_path / "copy", skip_broken=True)) == 2
