import json
import weakref

import pytest
from test_lerobot import CAMERA, write_folder
from test_sources import break_action

from irasim_diffusers.data import Episode, LeRobotFolder, publish, write_lerobot


class Counted(LeRobotFolder):
    """Keeps count of the episodes that are held at a time."""

    def __getitem__(self, number: int) -> Episode:
        held = self.__dict__.setdefault("held", [])
        self.__dict__["most"] = max(self.__dict__.get("most", 0), sum(ref() is not None for ref in held))
        episode = super().__getitem__(number)
        frames = episode.frames
        while frames.base is not None:
            frames = frames.base
        held.append(weakref.ref(frames))
        return episode


def files(root):
    """What was written, less when."""
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*.*") if path.is_file()}


def test_one_episode_is_held_at_a_time(tmp_path):
    write_folder(tmp_path / "set")
    source = Counted(tmp_path / "set")
    copy = write_lerobot(source, tmp_path / "copy")
    assert (len(source.held), source.most) == (4, 0), "the first is read for its sizes and for itself"
    for before, after in zip(LeRobotFolder(tmp_path / "set"), copy, strict=True):
        assert (before.frames == after.frames).all()
        assert (before.actions == after.actions).all()
        assert before.task == after.task


def test_files_of_broken_episodes_are_left_out_and_a_stopped_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(publish, "EPISODES_PER_FILE", 1)
    write_folder(tmp_path / "set")
    break_action(tmp_path / "set", 1)
    source = LeRobotFolder(tmp_path / "set")
    whole = write_lerobot(source, tmp_path / "whole", skip_broken=True)
    assert [row["length"] for row in whole.rows] == [5, 7]
    assert json.loads((whole.root / "meta/stats.json").read_text())[CAMERA]["count"] == [2]
    with pytest.raises(ValueError, match="episode 1 of"):
        write_lerobot(source, tmp_path / "stopped")
    assert not list(tmp_path.rglob("*.partial*"))
    write_lerobot(source, tmp_path / "stopped", skip_broken=True)
    assert files(tmp_path / "stopped") == files(tmp_path / "whole")
