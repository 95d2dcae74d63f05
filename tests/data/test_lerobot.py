import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from irasim_diffusers.data import Episode, LeRobotFolder, is_written, open_dataset, write_file, write_metadata

CAMERA = "observation.image"
TASKS = ["tidy up", "lay the table"]
NAMES = {"action": ["x", "y", "grip"], "observation.state": ["a", "b"]}


def make_episode(number, length):
    rng = np.random.default_rng(number)
    return Episode(
        frames=rng.integers(0, 256, (length, 10, 14, 3), dtype=np.uint8),
        actions=rng.normal(size=(length, 3)).astype(np.float32),
        states={"observation.state": rng.normal(size=(length, 2)).astype(np.float32)},
        task=TASKS[number % 2],
    )


def write_folder(root, lengths=(5, 9, 7)):
    episodes = [make_episode(number, length) for number, length in enumerate(lengths)]
    shared = {"fps": 10, "camera": CAMERA, "tasks": TASKS}
    write_file(root, 0, episodes[:2], **shared)
    write_file(root, 1, episodes[2:], **shared, first_episode=2, first_frame=sum(lengths[:2]))
    write_metadata(root, fps=10, camera=CAMERA, frame_size=(10, 14), names=NAMES, tasks=TASKS, robot_type="test")
    return episodes


def test_written_data_set_reads_back(tmp_path):
    written = write_folder(tmp_path)
    folder = LeRobotFolder(tmp_path)
    assert (len(folder), folder.fps, folder.cameras) == (3, 10, ((CAMERA,),))
    for before, after in zip(written, folder, strict=True):
        assert np.array_equal(after.frames, before.frames)
        assert np.array_equal(after.actions, before.actions)
        assert np.array_equal(after.states["observation.state"], before.states["observation.state"])
        assert (after.task, len(after)) == (before.task, len(before))


def lengths_of(source):
    return [len(episode) for episode in source]


def test_splits_and_their_parts(tmp_path):
    write_folder(tmp_path)
    for split, lengths in (("train", [5, 9, 7]), ("train[:67%]", [5, 9]), ("train[67%:]", [7]), ("train[1:]", [9, 7])):
        assert lengths_of(LeRobotFolder(tmp_path, split=split)) == lengths
    assert lengths_of(open_dataset(tmp_path, split="train[1:]", max_episodes=1)) == [9]
    assert lengths_of(open_dataset(tmp_path, split=None)) == [5, 9, 7]
    path = tmp_path / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"splits": {"train": "0:2", "test": "2:3"}}))
    assert lengths_of(open_dataset(tmp_path)) == [5, 9]
    assert lengths_of(open_dataset(tmp_path, split="test")) == lengths_of(open_dataset(tmp_path, split=None)) == [7]
    assert lengths_of(LeRobotFolder(tmp_path)) == [5, 9, 7]


def test_parts_of_equal_size_have_different_identities(tmp_path):
    write_folder(tmp_path)
    whole, train, first, second = (
        LeRobotFolder(tmp_path, split=split).identity for split in (None, "train", "train[:1]", "train[1:2]")
    )
    assert whole == train
    assert first == LeRobotFolder(tmp_path, max_episodes=1).identity
    assert first != second


@pytest.mark.parametrize("split", ["test", "train[", "train[90%]", ""])
def test_unknown_splits_raise(tmp_path, split):
    write_folder(tmp_path)
    with pytest.raises(
        ValueError, match=r"`split` must be one of \['train'\] in .*, or a part such as 'train\[:90%\]'"
    ):
        LeRobotFolder(tmp_path, split=split)


def test_empty_parts_raise(tmp_path):
    write_folder(tmp_path)
    with pytest.raises(ValueError, match=r"`split` must contain at least one episode of .*, got 'train\[3:\]'"):
        LeRobotFolder(tmp_path, split="train[3:]")


def test_layout_of_the_format(tmp_path):
    written = write_folder(tmp_path)
    info = json.loads((tmp_path / "meta" / "info.json").read_text())
    assert info["codebase_version"] == "v3.0"
    assert (info["total_episodes"], info["total_frames"], info["total_tasks"]) == (3, 21, 2)
    assert info["features"][CAMERA]["dtype"] == "video"
    assert info["features"]["action"] == {"dtype": "float32", "shape": [3], "names": ["x", "y", "grip"]}
    tasks = pq.read_table(tmp_path / "meta" / "tasks.parquet").to_pandas()
    assert tasks.index.tolist() == TASKS
    assert tasks["task_index"].tolist() == [0, 1]
    rows = [
        row
        for k in range(2)
        for row in pq.read_table(tmp_path / f"meta/episodes/chunk-000/file-00{k}.parquet").to_pylist()
    ]
    assert [(row["dataset_from_index"], row["dataset_to_index"]) for row in rows] == [(0, 5), (5, 14), (14, 21)]
    assert [row[f"videos/{CAMERA}/from_timestamp"] for row in rows] == [0.0, 0.5, 0.0]
    data = pq.read_table(tmp_path / "data/chunk-000/file-001.parquet")
    assert data["index"].to_pylist() == list(range(14, 21))
    assert data["episode_index"].to_pylist() == [2] * 7
    assert np.allclose(data["timestamp"].to_pylist(), np.arange(7) / 10)
    assert str(data.schema.field("action").type) == "fixed_size_list<element: float>[3]"
    statistics = json.loads((tmp_path / "meta" / "stats.json").read_text())
    actions = np.concatenate([episode.actions for episode in written])
    assert np.allclose(statistics["action"]["mean"], actions.mean(0), atol=1e-6)
    assert np.allclose(statistics["action"]["std"], actions.std(0), atol=1e-6)
    assert np.array(statistics[CAMERA]["mean"]).shape == (3, 1, 1)


def test_file_is_written_when_complete(tmp_path):
    assert not is_written(tmp_path, 0)
    write_file(tmp_path, 0, [make_episode(0, 5)], fps=10, camera=CAMERA, tasks=TASKS)
    assert is_written(tmp_path, 0)
    (video,) = tmp_path.rglob("*.mp4")
    video.write_bytes(video.read_bytes()[:-100])
    assert not is_written(tmp_path, 0)
    video.unlink()
    assert not is_written(tmp_path, 0)


def break_version(root):
    info = json.loads((root / "meta" / "info.json").read_text())
    (root / "meta" / "info.json").write_text(json.dumps(info | {"codebase_version": "v1.6"}))


def break_video(root):
    path = root / "videos" / CAMERA / "chunk-000" / "file-001.mp4"
    path.write_bytes(path.read_bytes()[:100])


def break_rows(root):
    path = root / "data" / "chunk-000" / "file-001.parquet"
    pq.write_table(pq.read_table(path).slice(0, 4), path)


def edit_table(path, change):
    """Change the rows of a parquet file."""
    rows = pq.read_table(path).to_pylist()
    for row in rows:
        change(row)
    pq.write_table(pa.Table.from_pylist(rows), path)


def edit_episode(name, value):
    """Return a function that sets an entry of episode 1, which shares files with episode 0."""

    def change(row):
        row[name] = value if row["episode_index"] == 1 else row[name]

    return lambda root: edit_table(root / "meta/episodes/chunk-000/file-000.parquet", change)


def edit_vectors(key, value):
    """Return a function that sets a vector in frame 4 of episode 1."""

    def change(row):
        row[key] = value if row["index"] == 9 else row[key]

    return lambda root: edit_table(root / "data/chunk-000/file-000.parquet", change)


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        (lambda root: (root / "meta" / "info.json").unlink(), r"is not a LeRobotDataset folder"),
        (break_version, r"is a LeRobotDataset v1\.6; v3\.0 and v2\.1 are supported"),
        (break_video, r"file-001\.mp4"),
        (break_rows, r"episode 2 of .* expected 7 frames, found 4 rows in .*file-001\.parquet"),
        (edit_episode(f"videos/{CAMERA}/chunk_index", None), r"episode 1 of .*image/chunk_index' is missing in 'meta"),
        (edit_episode(f"videos/{CAMERA}/from_timestamp", None), r"episode 1 of .*from_timestamp' is missing in 'meta"),
        (
            edit_episode(f"videos/{CAMERA}/to_timestamp", 1.0),
            r"episode 1 of .* expected 9 frames, found 5 in .*000\.mp4' according to 'meta/episodes': remove",
        ),
        (
            edit_episode(f"videos/{CAMERA}/file_index", float("nan")),
            r"episode 1 of .*file_index' in 'meta/episodes' must be a non-negative integer below 2\*\*53, got nan",
        ),
        (edit_episode("data/file_index", None), r"episode 1 of .*'data/file_index' is missing in 'meta/episodes'"),
        (edit_episode("length", None), r"episode 1 of .*'length' is missing"),
        (edit_episode("length", 0), r"episode 1 of .*'length' in 'meta/episodes' must be at least 1, got 0: remove"),
        (
            edit_vectors("action", [1.0]),
            r"episode 1 of .*file-000\.parquet': 'action' must be 3 numbers .* got lengths \[3, 1\]",
        ),
        (
            edit_vectors("observation.state", None),
            r"episode 1 of .*'observation.state' must be 2 numbers .* got lengths \[2, missing\]",
        ),
        (
            lambda root: (root / "data/chunk-000/file-000.parquet").write_bytes(b"PAR1"),
            r"episode 0 of .*file-000\.parquet",
        ),
    ],
)
def test_broken_folders_raise(tmp_path, breakage, message):
    write_folder(tmp_path)
    breakage(tmp_path)
    with pytest.raises(ValueError, match=message):
        list(LeRobotFolder(tmp_path))


def test_unknown_camera(tmp_path):
    write_folder(tmp_path)
    with pytest.raises(ValueError, match=r"`cameras` must be among \['observation.image'\]"):
        LeRobotFolder(tmp_path, "wrist")
