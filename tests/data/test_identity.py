"""Identities of datasets, which name their cached latents."""

import dataclasses
import json
import os
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from test_faults import DATA
from test_lerobot import CAMERA, edit_table, make_episode, write_folder
from test_release import change, write_release
from test_sources import put_pictures_into_parquet, sources_of_every_form
from test_tables import make_table

from irasim_diffusers.data import LeRobotFolder, TableEpisodes, open_dataset, write_video


def test_changed_files_change_the_identity(tmp_path):
    frames, *_ = write_release(tmp_path, "droid")
    before = {camera: open_dataset(tmp_path, camera).identity for camera in ("0", "1")}
    assert open_dataset(tmp_path, "0").identity == before["0"]
    write_video(tmp_path / "videos/train/0.mp4", frames, 5)
    assert open_dataset(tmp_path, "0").identity != before["0"]
    assert open_dataset(tmp_path, "1").identity == before["1"], "the video of camera 1 has not changed"
    annotation = tmp_path / "annotation/train/10.json"
    text = annotation.read_text()
    digit = text.index(".") + 1
    annotation.write_text(text[:digit] + str(9 - int(text[digit])) + text[digit + 1 :])
    assert open_dataset(tmp_path, "1").identity != before["1"], "one digit differs"
    annotation.write_text(text)
    assert open_dataset(tmp_path, "1").identity == before["1"], "the file has the same content again"
    for broken in ("{", '{"videos": [{"video_path": "\\x"}, {"video_path": 3}]}'):
        annotation.write_text(broken)
        assert open_dataset(tmp_path, "1").identity != before["1"]


def change_statistics(root):
    edit_table(root / "meta/episodes/chunk-000/file-000.parquet", lambda row: row["stats/action/mean"].reverse())


@pytest.mark.parametrize(
    ("form", "changes"),
    [
        ("v3.0", [change_statistics, lambda root: (root / "videos" / CAMERA / "chunk-000/file-001.mp4").unlink()]),
        ("v2.1", [lambda root: (root / "meta/episodes_stats.jsonl").write_text("other")]),
        ("release", [lambda root: change(root, texts=["drop it"])]),
    ],
)
def test_moved_folder_keeps_its_identity(form, changes, tmp_path):
    source = sources_of_every_form(tmp_path / "here", form)
    for number, breakage in enumerate(changes):
        moved = dataclasses.replace(source, root=shutil.copytree(tmp_path / "here", tmp_path / f"{number}" / "there"))
        assert json.dumps(moved.identity) == json.dumps(source.identity)
        breakage(moved.root)
        assert dataclasses.replace(moved).identity != source.identity


def in_place(path, old, new):
    """Replace bytes in a file by the same number of other bytes."""
    content = path.read_bytes()
    assert len(old) == len(new)
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))


def test_edited_actions_change_the_identity(tmp_path):
    written = write_folder(tmp_path / "video")
    write_folder(tmp_path / "image")
    names = [f"data/chunk-000/file-00{number}.parquet" for number in range(2)]
    put_pictures_into_parquet(tmp_path / "image", CAMERA, {names[0]: written[:2], names[1]: written[2:]})
    for form in ("video", "image"):
        source = LeRobotFolder(tmp_path / form)
        before = source.identity
        assert LeRobotFolder(tmp_path / form).identity == before
        path = tmp_path / form / DATA
        table = pq.read_table(path)
        pq.write_table(table, path, compression="none", use_dictionary=False, write_statistics=False)
        before = LeRobotFolder(tmp_path / form).identity
        status = path.stat()
        value = table["action"].to_pylist()[3][0]
        in_place(path, np.float32(value).tobytes(), np.float32(value + 1).tobytes())
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert path.stat().st_size == status.st_size
        after = LeRobotFolder(tmp_path / form)
        assert after[0].actions[3, 0] == np.float32(value + 1)
        assert after.identity != before, form


def test_edited_videos_change_the_identity(tmp_path):
    write_folder(tmp_path)
    path = tmp_path / "videos" / CAMERA / "chunk-000/file-000.mp4"
    before = LeRobotFolder(tmp_path).identity
    content, status = path.read_bytes(), path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert LeRobotFolder(tmp_path).identity == before
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert LeRobotFolder(tmp_path).identity != before
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert LeRobotFolder(tmp_path).identity != before


def test_links_into_the_hub_cache_are_identified_by_blob(tmp_path):
    write_folder(tmp_path / "snapshot")
    path = tmp_path / "snapshot/videos" / CAMERA / "chunk-000/file-000.mp4"
    (tmp_path / "blobs").mkdir()
    path.rename(tmp_path / "blobs/0123")
    path.symlink_to(tmp_path / "blobs/0123")
    before = LeRobotFolder(tmp_path / "snapshot").identity
    os.utime(tmp_path / "blobs/0123", ns=(1, 1))
    assert LeRobotFolder(tmp_path / "snapshot").identity == before, "the time of the download does not matter"
    path.unlink()
    (tmp_path / "blobs/0123").rename(tmp_path / "blobs/4567")
    path.symlink_to(tmp_path / "blobs/4567")
    assert LeRobotFolder(tmp_path / "snapshot").identity != before


def test_edited_tables_change_the_identity(tmp_path):
    table = make_table(tmp_path, [make_episode(number, length) for number, length in enumerate((5, 6))])
    before = [TableEpisodes(table, camera).identity for camera in ("video", "pictures")]
    assert [TableEpisodes(table, camera).identity for camera in ("video", "pictures")] == before
    os.utime(tmp_path / "0.mp4", ns=(1, 1))
    assert TableEpisodes(table, "video").identity != before[0]
    assert TableEpisodes(table, "pictures").identity == before[1]
    table.save_to_disk(str(tmp_path / "table"))
    saved = open_dataset(tmp_path / "table").identity
    assert open_dataset(tmp_path / "table").identity == saved
    (arrow,) = (tmp_path / "table").glob("*.arrow")
    value = make_episode(0, 5).actions[2, 1]
    in_place(arrow, value.tobytes(), np.float32(value + 1).tobytes())
    edited = open_dataset(tmp_path / "table")
    assert edited[0].actions[2, 1] == np.float32(value + 1)
    assert edited.identity != saved
