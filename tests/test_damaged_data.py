"""Damaged metadata and tables: exit status 2, one line that names the place, and no file written."""

import json
import logging
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_lerobot import CAMERA, write_folder
from test_release import write_release
from test_sources import write_v21
from tiny_models import tiny_pipeline

from irasim_diffusers.cli import main
from irasim_diffusers.data import Episode, LeRobotFolder, write_file, write_lerobot, write_metadata

pytestmark = pytest.mark.usefixtures("offline")

INFO, EPISODES, DATA = "meta/info.json", "meta/episodes/chunk-000/file-000.parquet", "data/chunk-000/file-000.parquet"
ROW, ANNOTATION = "meta/episodes.jsonl", "annotation/train/10.json"
HUGE = 10**400


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """A LeRobotDataset of each version, and a dataset in the IRASim release format."""
    root = tmp_path_factory.mktemp("originals")
    write_folder(root / "v3.0", (5, 4, 3))
    episode = LeRobotFolder(root / "v3.0")[0]
    write_v21(root / "v2.1", [episode])
    write_release(root / "release", "rt1")
    return root


def convert(root, *flags):
    return main(["data", "--dataset", str(root), "--output", str(root.parent / "out"), *flags])


def set_entry(path, place, value):
    """Change an entry, such as `features/action/shape`, of a JSON file or of the first JSON line."""
    first, *rest = path.read_text().split("\n") if path.suffix == ".jsonl" else [path.read_text()]
    content = inner = json.loads(first)
    *parents, last = place.split("/")
    for name in parents:
        inner = inner[name]
    inner[last] = value
    path.write_text("\n".join([json.dumps(content), *rest]))


def set_column(path, name, values):
    """Replace a column of a Parquet file by one that repeats a value, or drop it."""
    table = pq.read_table(path)
    place = table.column_names.index(name)
    column = None if values is None else pa.array([values.as_py()] * len(table), values.type)
    table = table.drop_columns([name]) if column is None else table.set_column(place, name, column)
    pq.write_table(table, path)


ENTRIES = [  # format, file, entry, value, message
    ("v3.0", INFO, "fps", 1e30, "'fps' must be at most 100000, got 1e+30"),
    ("v3.0", INFO, "fps", HUGE, "'fps' must be at most"),
    ("v3.0", INFO, "fps", "10", "'fps' must be a positive number, got '10'"),
    ("v3.0", INFO, "fps", True, "'fps' must be a positive number, got True"),
    ("v3.0", INFO, "fps", [10], "'fps' must be a positive number, got [10]"),
    ("v3.0", INFO, "fps", float("nan"), "'fps' must be a positive number, got nan"),
    ("v3.0", INFO, "codebase_version", None, "is a LeRobotDataset of unknown version; v3.0 and v2.1"),
    ("v3.0", INFO, "codebase_version", 3, "is a LeRobotDataset 3; v3.0 and v2.1 are supported"),
    ("v3.0", INFO, "codebase_version", ["v3.0"], "v3.0 and v2.1 are supported"),
    ("v3.0", INFO, "features", [], "'features' must be an object, got []"),
    ("v3.0", INFO, "features", {}, "info.json' has no feature of type 'video' or 'image'"),
    ("v3.0", INFO, "features/action", None, "feature 'action' must be an object with a 'dtype', got None"),
    ("v3.0", INFO, "features/action/dtype", 5, "feature 'action' must be an object with a 'dtype'"),
    ("v3.0", INFO, "features/action/dtype", "text", "no column 'action'"),
    ("v3.0", INFO, "features/action/shape", "three", "feature 'action' must be a list of non-negative integers"),
    ("v3.0", INFO, "features/action/shape", [None], "feature 'action' must be a list of non-negative integers"),
    ("v3.0", INFO, "features/action/shape", [-3], "feature 'action' must be a list of non-negative integers"),
    ("v3.0", INFO, "features/action/shape", [2], "'action' must be 2 numbers in every row, got lengths [3]"),
    ("v3.0", INFO, "features/action/irasim", "x", "'irasim' of the feature 'action' must be an object"),
    ("v3.0", INFO, "features/action/irasim", {"cameras": 3}, "must be rows of feature names, got 3"),
    ("v3.0", INFO, "features/action/irasim", {"cameras": [[]]}, "must be rows of feature names"),
    ("v3.0", INFO, "features/action/irasim", {"action_derivation": "fast"}, "must be one of ('recorded'"),
    ("v3.0", INFO, "features/action/irasim", {"action_derivation": []}, "must be one of ('recorded'"),
    ("v3.0", INFO, "features/action/irasim", {"action_units": [1]}, "must be a list of strings or null, got [1]"),
    ("v3.0", INFO, "splits", "train", "'splits' must be an object, got 'train'"),
    ("v3.0", INFO, "splits", ["train"], "'splits' must be an object"),
    ("v3.0", INFO, "splits/train", 3, "the split 'train' must be two episode indices such as '0:10', got 3"),
    ("v3.0", INFO, "splits/train", "all", "the split 'train' must be two episode indices"),
    ("v3.0", INFO, "splits/train", "0:", "the split 'train' must be two episode indices"),
    ("v3.0", INFO, "splits/train", "7:9", "--split must contain at least one episode of"),
    ("v3.0", INFO, "data_path", 3, "'data_path' must be a path, got 3"),
    ("v3.0", INFO, "data_path", "{chunk_index", "'data_path' must be a path with fields"),
    ("v3.0", INFO, "data_path", "{chunk_index.real}", "'data_path' must be a path with fields"),
    ("v3.0", INFO, "data_path", "{chunk_index:099999999d}", "'data_path' must be a path with fields"),
    ("v3.0", INFO, "data_path", "{0}", "the fields of 'data_path' must be among ['chunk_index', "),
    ("v3.0", INFO, "data_path", "{episode_index}", "'data_path' has an invalid field or path: 'episode_index'"),
    ("v3.0", INFO, "data_path", "a\0b", "'data_path' must be a path"),
    ("v3.0", INFO, "data_path", "/etc/{chunk_index}", "'/etc/0' must be a path inside the dataset"),
    ("v3.0", INFO, "data_path", "data/../../{chunk_index}", "'data/../../0' must be a path inside the dataset"),
    ("v3.0", INFO, "video_path", "../{video_key}", "must be a path inside the dataset"),
    ("v3.0", INFO, "video_path", None, "info.json' has no entry 'video_path'"),
    ("v3.0", INFO, "video_path", {}, "'video_path' must be a path, got {}"),
    ("v2.1", INFO, "chunks_size", 0, "'chunks_size' must be a positive integer, got 0"),
    ("v2.1", INFO, "chunks_size", "x", "'chunks_size' must be a positive integer, got 'x'"),
    ("v2.1", INFO, "video_path", "{video_key:d}", "'video_path' must be a path with fields"),
    ("v2.1", ROW, "episode_index", True, "'episode_index' must be a non-negative integer in every row, got True"),
    ("v2.1", ROW, "episode_index", "0", "'episode_index' must be a non-negative integer in every row, got '0'"),
    ("v2.1", ROW, "episode_index", 7, "episode_000007.parquet"),
    ("v2.1", ROW, "length", None, "'length' is missing in 'meta/episodes'"),
    ("v2.1", ROW, "length", "5", "'length' in 'meta/episodes' must be a non-negative integer below 2**53, got '5'"),
    ("v2.1", ROW, "length", 5.5, "'length' in 'meta/episodes' must be a non-negative integer below 2**53, got 5.5"),
    ("v2.1", ROW, "length", -1, "'length' in 'meta/episodes' must be a non-negative integer below 2**53, got -1"),
    ("v2.1", ROW, "length", [5], "'length' in 'meta/episodes' must be a non-negative integer"),
    ("v2.1", ROW, "length", HUGE, "'length' in 'meta/episodes' must be a non-negative integer"),
    ("v2.1", ROW, "length", float("inf"), "'length' in 'meta/episodes' must be a non-negative integer"),
    ("v2.1", ROW, "length", 0, "'length' in 'meta/episodes' must be at least 1, got 0: remove"),
    ("v2.1", ROW, "tasks", 3, "the task must be a string, got 3"),
    ("v2.1", ROW, "tasks", {"a": 1}, "the task must be a string, got {'a': 1}"),
    ("release", ANNOTATION, "videos", 3, "must name a video"),
    ("release", ANNOTATION, "videos", {"0": "a"}, "must name a video"),
    ("release", ANNOTATION, "videos", [3], "camera 0 has no video_path"),
    ("release", ANNOTATION, "videos", [{"video_path": 3}], "camera 0 has no video_path"),
    ("release", ANNOTATION, "videos", [{"video_path": "a\0b.mp4"}], "10.json"),
    (
        "release",
        ANNOTATION,
        "videos",
        [{"video_path": "/etc/passwd"}],
        "'/etc/passwd' must be a path inside the dataset",
    ),
    ("release", ANNOTATION, "videos", [{"video_path": "videos/../../a.mp4"}], "must be a path inside the dataset"),
    ("release", ANNOTATION, "state", None, "10.json"),
    ("release", ANNOTATION, "state", [HUGE], "'state' must be numbers"),
    ("release", ANNOTATION, "state", [[1e39] * 6] * 6, "'state' must be finite in float32, got"),
    ("release", ANNOTATION, "state", 3.5, "10.json"),
    ("release", ANNOTATION, "state", [[0.0] * 6], "10.json"),
    ("release", ANNOTATION, "state", [[0.0] * 5] * 6, "'state' must be (6, 6), one pose per"),
    ("release", ANNOTATION, "state", [[0.0] * 2] * 6, "10.json"),
    ("release", ANNOTATION, "actions", [], "10.json"),
    ("release", ANNOTATION, "actions", 3, "10.json"),
    ("release", ANNOTATION, "actions", [[1e39]] * 5, "'action' must be finite in float32, got"),
    ("release", ANNOTATION, "texts", [3], "the task must be a string, got 3"),
    ("release", ANNOTATION, "texts", 3, "the task must be a string, got 3"),
]

FILM = f"videos/{CAMERA}"
COLUMNS = [  # file, column, value of all rows (None drops the column), message
    (EPISODES, "episode_index", None, "'episode_index' must be a non-negative integer"),
    (
        EPISODES,
        "episode_index",
        pa.scalar("0"),
        "'episode_index' must be a non-negative integer in every row, got '0'",
    ),
    (
        EPISODES,
        "episode_index",
        pa.scalar(1.0),
        "'episode_index' must be a non-negative integer in every row, got 1.0",
    ),
    (EPISODES, "length", None, "'length' is missing in 'meta/episodes'"),
    (EPISODES, "length", pa.scalar("5"), "'meta/episodes' must be a non-negative integer below 2**53, got '5'"),
    (EPISODES, "length", pa.scalar([5]), "'meta/episodes' must be a non-negative integer below 2**53, got [5]"),
    (EPISODES, "data/file_index", None, "'data/file_index' is missing in 'meta/episodes'"),
    (
        EPISODES,
        "data/file_index",
        pa.scalar(2**62),
        "'data/file_index' in 'meta/episodes' must be a non-negative integer",
    ),
    (
        EPISODES,
        "data/chunk_index",
        pa.scalar({"a": 1}),
        "'data/chunk_index' in 'meta/episodes' must be a non-negative integer",
    ),
    (
        EPISODES,
        f"{FILM}/file_index",
        pa.scalar(-1),
        f"'{FILM}/file_index' in 'meta/episodes' must be a non-negative integer",
    ),
    (EPISODES, f"{FILM}/from_timestamp", pa.scalar("0"), "must be a number of seconds from 0 to 1e+07, got '0'"),
    (EPISODES, f"{FILM}/from_timestamp", pa.scalar(1e300), "must be a number of seconds from 0 to 1e+07, got 1e+300"),
    (EPISODES, f"{FILM}/to_timestamp", pa.scalar(float("nan")), "seconds from 0 to 1e+07, got nan"),
    (EPISODES, f"{FILM}/to_timestamp", pa.scalar(-1.0), "must be a number of seconds from 0 to 1e+07, got -1.0"),
    (EPISODES, "tasks", pa.scalar(3), "the task must be a string, got 3"),
    (EPISODES, "tasks", pa.scalar([[1]]), "the task must be a string, got [1]"),
    (DATA, "action", None, "file-000.parquet"),
    (DATA, "action", pa.scalar([1e39, 0.0, 0.0]), "'action' must be finite in float32, got [1e+39, 0.0, 0.0]"),
    (DATA, "action", pa.scalar([None, 0.0, 0.0]), "'action' must be finite in float32, got [nan, 0.0, 0.0]"),
    (DATA, "action", pa.scalar(["1", "2", "3"]), "'action' must contain numbers, got string"),
    (DATA, "action", pa.scalar([[1.0], [2.0], [3.0]]), "'action' must contain numbers, got list<"),
    (DATA, "action", pa.scalar(0.5), "'action' must be 3 numbers in every row, got lengths [1]"),
    (DATA, "action", pa.scalar([], pa.list_(pa.float32())), "must be 3 numbers in every row, got lengths [0]"),
    (DATA, "action", pa.scalar(None, pa.list_(pa.float32())), "must be 3 numbers in every row, got lengths [missing]"),
    (DATA, "action", pa.scalar({"x": 1.0}), "'action' must be 3 numbers in every row"),
    (DATA, "observation.state", pa.scalar("ab"), "'observation.state' must be 2 numbers in every row"),
    (DATA, "observation.state", pa.scalar([1e39, 0.0]), "'observation.state' must be finite in float32, got"),
    (DATA, "episode_index", None, "file-000.parquet"),
    (DATA, "episode_index", pa.scalar("0"), "'episode_index' must contain integers, got string"),
    (DATA, "episode_index", pa.scalar(True), "'episode_index' must contain integers, got bool"),
    (DATA, "episode_index", pa.scalar(None, pa.int64()), "expected 5 frames, found 0 rows"),
    (DATA, "timestamp", pa.scalar("0.0"), "'timestamp' must contain numbers, got string"),
    (DATA, "timestamp", pa.scalar([0.0]), "'timestamp' must contain numbers, got list<"),
    (DATA, "timestamp", pa.scalar(None, pa.float32()), "'timestamp' must be a finite number of seconds"),
    (DATA, "timestamp", pa.scalar(-0.1), "'timestamp' of row 0 is -0.1 s"),
    (DATA, "timestamp", pa.scalar(1e300), "'timestamp' of row 0 is 1e+300 s, which is not a frame time"),
    (DATA, "timestamp", pa.scalar(1e7), "'timestamp' of row 0 is 1e+07 s, which is not a frame time"),
    (DATA, "timestamp", pa.scalar(0.0), "'timestamp' must increase, got 0 s after 0 s"),
]

CONTENTS = [
    (form, file, content)
    for form, files in {"v3.0": [INFO], "v2.1": [INFO, ROW], "release": [ANNOTATION]}.items()
    for file in files
    for content in (b"", b"{", b"null", b"3", b'"text"', b"\xff\xfe", b"[" * 100_000, b"\0" * 20, b'{"a": ')
] + [("v3.0", file, content) for file in (EPISODES, DATA) for content in (b"", b"PAR1", b"\0" * 500, b"PAR1" * 9)]


PROBLEMS = (  # reasons why a file cannot be read at all
    "is not valid JSON",
    "the file is not JSON in UTF-8",
    "must contain a JSON object",
    "must be a JSON object",
    "must name a video",
    "Parquet",
    "Invalid",
    "has no episode in its 'meta' folder",
)


def refused(root, captured, message, name=None):
    """Check that a command has printed one line with the message and a name, and has written nothing."""
    lines = captured.err.splitlines()
    assert len(lines) == 1, captured.err
    assert lines[0].startswith("irasim: error: ")
    assert message in lines[0]
    assert (name or root.name) in lines[0]
    assert captured.out == ""
    assert sorted(path.name for path in root.parent.iterdir()) == [root.name]


def copy(originals, form, tmp_path):
    return shutil.copytree(originals / form, tmp_path / "set")


def flags_of(form):
    return {"v3.0": (), "v2.1": ("--cameras", "left"), "release": ("--fps", "5")}[form]


@pytest.mark.parametrize(("form", "file", "place", "value", "message"), ENTRIES)
def test_entries_of_json(originals, tmp_path, capfd, form, file, place, value, message):
    root = copy(originals, form, tmp_path)
    set_entry(root / file, place, value)
    if file == ANNOTATION:
        for other in (root / file).parent.iterdir():
            if other.name != "10.json":
                other.unlink()
    assert convert(root, *flags_of(form)) == 2
    refused(root, capfd.readouterr(), message)


@pytest.mark.parametrize(("file", "column", "value", "message"), COLUMNS)
@pytest.mark.filterwarnings("error")
def test_columns_of_tables(originals, tmp_path, capfd, file, column, value, message):
    root = copy(originals, "v3.0", tmp_path)
    set_column(root / file, column, value)
    assert convert(root) == 2
    refused(root, capfd.readouterr(), message)


@pytest.mark.parametrize(("form", "file", "content"), CONTENTS)
def test_contents_of_files(originals, tmp_path, capfd, form, file, content):
    root = copy(originals, form, tmp_path)
    (root / file).write_bytes(content)
    if file == ANNOTATION:
        for other in (root / file).parent.iterdir():
            if other.name != "10.json":
                other.unlink()
    assert convert(root, *flags_of(form)) == 2
    captured = capfd.readouterr()
    assert any(problem in captured.err for problem in PROBLEMS), captured.err
    refused(root, captured, "'meta'" if file == ROW and "has no episode" in captured.err else file.rsplit("/", 1)[-1])


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (INFO, lambda path: path.write_bytes(b"{"), "info.json', line 1, is not valid JSON"),
        (INFO, lambda path: path.unlink(), "must contain 'meta/info.json' like every LeRobotDataset"),
        (INFO, lambda path: set_entry(path, "splits", []), "'splits' must be an object, got []"),
        (INFO, lambda path: set_entry(path, "features/action/shape", {}), "list of non-negative integers, got {}"),
        (EPISODES, lambda path: path.write_bytes(b"PAR1"), "file-000.parquet': Parquet"),
        (EPISODES, lambda path: set_column(path, "length", pa.scalar("5")), "integer below 2**53, got '5'"),
        (DATA, lambda path: set_column(path, "action", pa.scalar([1e39, 0.0, 0.0])), "must be finite in float32"),
    ],
)
@pytest.mark.parametrize("command", ["evaluate", "adapt"])
def test_other_commands(originals, tmp_path, tmp_path_factory, capfd, command, file, change, message):
    root, model = copy(originals, "v3.0", tmp_path), tmp_path_factory.mktemp("model")
    if file != INFO:  # readable episodes of a second file would be used instead
        (root / file.replace("000.parquet", "001.parquet")).unlink()
    change(root / file)
    tiny_pipeline(num_inference_steps=1).save_pretrained(model)
    flags = ["--vae", f"{model}:vae"] if command == "adapt" else ["--num-clips", "1"]
    flags = [command, "--model", str(model), "--dataset", str(root), "--split", "train", *flags]
    assert main([*flags, "--output", str(tmp_path / "out")]) == 2
    captured = capfd.readouterr()
    unread = command == "adapt" and "can be read" in captured.err
    refused(root, captured, "none of the first" if unread else message)


def test_broken_rows_can_be_skipped(originals, tmp_path, capfd):
    root = copy(originals, "v3.0", tmp_path)
    rows = pq.read_table(root / EPISODES).to_pylist()
    rows[0]["length"] = -5
    pq.write_table(pa.Table.from_pylist(rows), root / EPISODES)
    assert convert(root, "--skip-broken") == 0
    captured = capfd.readouterr()
    assert ": 2; skipped: 1" in captured.out
    assert "'length' in 'meta/episodes' must be a non-negative integer below 2**53, got -5" in captured.out


def test_integral_floats_are_integers(originals, tmp_path):
    """pandas turns integers into floats when a value is missing."""
    root = copy(originals, "v3.0", tmp_path)
    before = [episode.frames for episode in LeRobotFolder(root)]
    for name in ("length", "data/file_index", f"{FILM}/chunk_index"):
        table = pq.read_table(root / EPISODES)
        column = table[name].cast(pa.float64())
        pq.write_table(table.set_column(table.column_names.index(name), name, column), root / EPISODES)
    for frames, episode in zip(before, LeRobotFolder(root), strict=True):
        np.testing.assert_array_equal(frames, episode.frames)


def test_strings_are_kept_and_other_features_are_named(tmp_path, caplog):
    """`irasim data` keeps columns of strings, and names the features that it leaves out."""
    source, length = tmp_path / "source", 5
    frames = np.random.default_rng(0).integers(0, 256, (length, 10, 14, 3), dtype=np.uint8)
    subtasks = np.array([["reach"], ["reach"], ["推到目标"], [""], ["done"]], dtype=object)
    states = {"subtask": subtasks, "next.done": np.arange(length)[:, None] == 4}
    actions = np.zeros((length, 2), np.float32)
    write_file(source, 0, [Episode(frames, actions, states, "push")], fps=10, camera=CAMERA, tasks=["push"])
    metadata = {"names": {"action": ["x", "y"]}, "tasks": ["push"], "robot_type": "test"}
    write_metadata(source, fps=10, camera=CAMERA, frame_size=(10, 14), **metadata)
    table = pq.read_table(source / DATA)
    pq.write_table(table.append_column("map", pa.array([[[1.0, 2.0]]] * length)), source / DATA)
    set_entry(source / INFO, "features/map", {"dtype": "float32", "shape": [1, 2], "names": None})
    set_entry(source / INFO, "features/events", {"dtype": "language", "shape": [1], "names": None})
    with caplog.at_level(logging.WARNING):
        folder = write_lerobot(LeRobotFolder(source), tmp_path / "out")
    warned = [record.message for record in caplog.records]
    assert len(warned) == 1
    assert "omitted: 'map' (float32, shape [1, 2]), 'events' (language, shape [1])." in warned[0]
    written = pq.read_table(tmp_path / "out" / DATA)
    assert written["subtask"].to_pylist() == subtasks[:, 0].tolist()
    assert written["next.done"].to_pylist() == [False] * 4 + [True]
    assert folder.info["features"]["subtask"] == {"dtype": "string", "shape": [1], "names": None}
    assert "map" not in folder.info["features"]
    assert "subtask" not in json.loads((tmp_path / "out/meta/stats.json").read_text())
    set_column(source / DATA, "subtask", pa.scalar(3))
    with pytest.raises(ValueError, match=r"episode 0 of .*'subtask' must be of type string in every row"):
        LeRobotFolder(source).flags(0)
    set_column(source / DATA, "next.done", pa.scalar(None, pa.bool_()))
    set_column(source / DATA, "subtask", pa.scalar("a"))
    with pytest.raises(ValueError, match=r"episode 0 of .*'next.done' must be of type bool in every row"):
        LeRobotFolder(source).flags(0)
