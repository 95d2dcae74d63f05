"""Datasets as they occur in practice: filtered, renamed, edited, incomplete or damaged."""

import json
import logging

import av
import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_lerobot import edit_table, make_episode, write_folder
from test_release import change, write_release
from test_sources import write_v21
from test_tables import make_table

from irasim_diffusers.data import IRASimFolder, LeRobotFolder, TableEpisodes, open_dataset, write_video

DATA = "data/chunk-000/file-000.parquet"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"


def keep_rows(root, kept, times=None):
    """Keep only the given rows of episode 1, which has 9 rows, optionally with other timestamps."""
    table = pq.read_table(root / DATA)
    other = table.filter(pa.compute.equal(table["episode_index"], 0))
    mine = table.filter(pa.compute.equal(table["episode_index"], 1)).take(kept)
    if times is not None:
        column = pa.array(times, pa.float32())
        mine = mine.set_column(mine.column_names.index("timestamp"), "timestamp", column)
    pq.write_table(pa.concat_tables([other, mine]), root / DATA)

    def shorten(row):
        row["length"] = len(kept) if row["episode_index"] == 1 else row["length"]

    edit_table(root / EPISODES, shorten)


@pytest.mark.parametrize("kept", [[3, 4, 5, 6, 7, 8], [0, 1, 2, 6, 7, 8], [0, 1, 2, 3], [1, 3, 4, 8], [5]])
def test_rows_of_version_3_match_frames_by_timestamp(kept, tmp_path):
    written = write_folder(tmp_path)
    keep_rows(tmp_path, kept)
    source = LeRobotFolder(tmp_path)
    assert np.array_equal(source[1].frames, written[1].frames[kept])
    assert np.array_equal(source[1].actions, written[1].actions[kept])
    for start in range(len(kept)):
        assert np.array_equal(source.window(1, start, 1).frames, written[1].frames[kept[start : start + 1]])
    assert np.array_equal(source[0].frames, written[0].frames)
    assert np.array_equal(source[2].frames, written[2].frames)


def test_rows_of_version_2_1_match_frames_by_timestamp(tmp_path):
    episodes = [make_episode(0, 9)]
    write_v21(tmp_path, episodes, cameras=("left", "right"))
    path, kept = tmp_path / "data/chunk-000/episode_000000.parquet", [2, 3, 4, 7]
    times = pa.array(np.arange(9) / 10, pa.float64())
    pq.write_table(pq.read_table(path).append_column("timestamp", times).take(kept), path)
    (tmp_path / "meta/episodes.jsonl").write_text(json.dumps({"episode_index": 0, "tasks": ["a"], "length": 4}))
    for key, frames in (("left", episodes[0].frames), ("right", 255 - episodes[0].frames)):
        assert np.array_equal(open_dataset(tmp_path, key)[0].frames, frames[kept])


@pytest.mark.parametrize(
    ("kept", "times", "message"),
    [
        ([0, 1, 2], [0, 0.13, 0.2], r"'timestamp' of row 1 is 0\.13 s, which is not a frame time at 10 frames/s"),
        ([0, 1, 2], [0, 0.2, 0.1], r"'timestamp' must increase, got 0\.1 s after 0\.2 s"),
        ([0, 1, 2], [0, 0.1, 0.1], r"'timestamp' must increase, got 0\.1 s after 0\.1 s"),
        ([0, 1, 2], [0, float("nan"), 0.2], r"'timestamp' must be a finite number"),
        ([0, 1, 2], [0, None, 0.2], r"'timestamp' must be a finite number"),
        ([0, 1, 2], [-0.1, 0, 0.1], r"'timestamp' of row 0 is -0\.1 s"),
        ([0, 1, 2], [0.7, 0.8, 0.9], r"timestamp of the last frame .* is 0\.9 s, but the episode has only 0\.9 s"),
    ],
)
def test_invalid_timestamps_raise(kept, times, message, tmp_path):
    write_folder(tmp_path)
    keep_rows(tmp_path, kept, times)
    source = LeRobotFolder(tmp_path)
    assert len(source[0]) == 5
    with pytest.raises(ValueError, match=rf"episode 1 of .*{message}"):
        source[1]


def test_rows_at_every_second_frame_cause_a_warning(tmp_path):
    """Their frames and actions are correct, but the frame rate in the metadata is twice that of the rows."""
    before = write_folder(tmp_path)[1]
    keep_rows(tmp_path, [0, 2, 4, 6, 8])
    with pytest.warns(UserWarning, match="rows are 2 frames apart: the recording has 5 frames per second, not 10"):
        episode = LeRobotFolder(tmp_path)[1]
    assert np.array_equal(episode.frames, before.frames[::2])
    assert np.array_equal(episode.actions, before.actions[::2])


@pytest.mark.parametrize("total", [4, -1, "3"])
def test_other_numbers_of_episodes_cause_a_warning(total, tmp_path):
    write_folder(tmp_path)
    path = tmp_path / "meta" / "info.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"total_episodes": total}))
    with pytest.warns(UserWarning, match=r"has 3 episodes in its 'meta' folder, but 'total_episodes' in info.json is"):
        assert len(LeRobotFolder(tmp_path)) == 3


@pytest.mark.parametrize("part", [DATA, EPISODES])
def test_files_with_too_many_rows_raise(part, tmp_path, monkeypatch):
    """A small compressed file can contain many rows, which would fill the memory."""
    monkeypatch.setattr("irasim_diffusers.data.lerobot.MAX_ROWS", 10)
    write_folder(tmp_path)
    assert len(LeRobotFolder(tmp_path)[0].frames) == 5
    table = pq.read_table(tmp_path / part)
    pq.write_table(pa.concat_tables([table] * 20), tmp_path / part)
    with pytest.raises(ValueError, match=r"file-000\.parquet' must have at most \d+ rows for its episodes, got \d+"):
        LeRobotFolder(tmp_path)[0]


def test_timestamps_late_in_a_long_recording_are_on_the_grid(tmp_path):
    write_folder(tmp_path, lengths=(5, 9, 7))
    source = LeRobotFolder(tmp_path)
    source.info["fps"] = 30
    numbers = 600_000 + np.arange(9)
    times = pa.chunked_array([pa.array(numbers / 30, pa.float32())])
    assert source._numbers(source.rows[1], times).tolist() == numbers.tolist()


def repeat_row(root, **changes):
    rows = pq.read_table(root / EPISODES).to_pylist()
    pq.write_table(pa.Table.from_pylist([*rows, rows[0] | changes]), root / EPISODES)


def test_repeated_episodes_are_read_once(tmp_path):
    written = write_folder(tmp_path)
    repeat_row(tmp_path)
    source = LeRobotFolder(tmp_path)
    assert [len(episode) for episode in source] == [5, 9, 7]
    for before, after in zip(written, source, strict=True):
        assert np.array_equal(after.actions, before.actions)
    repeat_row(tmp_path, length=4)
    with pytest.raises(ValueError, match=r"file-000\.parquet' contradicts .* episode 0 of .* in \['length'\]"):
        len(LeRobotFolder(tmp_path))


def test_repeated_episodes_of_version_2_1(tmp_path):
    write_v21(tmp_path, [make_episode(number, length) for number, length in enumerate((5, 9))])
    path = tmp_path / "meta/episodes.jsonl"
    lines = path.read_text().split("\n")
    path.write_text("\n".join([lines[0], *lines, ""]))
    assert [len(episode) for episode in open_dataset(tmp_path, "left")] == [5, 9]
    path.write_text("\n".join([*lines, lines[0].replace("5", "6")]))
    with pytest.raises(ValueError, match=r"episodes\.jsonl' contradicts .* episode 0"):
        len(open_dataset(tmp_path, "left"))


def test_a_downloaded_table_is_read(tmp_path):
    episodes = [make_episode(number, length) for number, length in enumerate((5, 6, 7))]
    table = make_table(tmp_path, episodes)
    (tmp_path / "set/data").mkdir(parents=True)
    table.select([0, 1]).to_parquet(tmp_path / "set/data/train-00000-of-00001.parquet")
    table.select([2]).to_parquet(tmp_path / "set/data/test-00000-of-00001.parquet")
    (tmp_path / "set/data/._train-00000-of-00001.parquet").write_bytes(b"\x00\x05\x16\x07")
    (tmp_path / "set/README.md").write_text("---\nlicense: mit\n---\n")
    source = open_dataset(tmp_path / "set", "pictures", fps=10)
    assert isinstance(source, TableEpisodes)
    for before, after in zip(episodes[:2], source, strict=True):
        assert np.array_equal(after.frames, before.frames)
    assert len(open_dataset(tmp_path / "set", "pictures", split=None)) == 1
    assert len(open_dataset(tmp_path / "set", "pictures", split="train[1:]")) == 1
    with pytest.raises(ValueError, match=r"cannot read the split 'validation' of the table .*set"):
        open_dataset(tmp_path / "set", "pictures", split="validation")
    assert isinstance(table, datasets.Dataset)


def test_a_damaged_table_is_named(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data/train.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(ValueError, match=rf"cannot read the split 'train' of the table '{tmp_path}'"):
        open_dataset(tmp_path)


def test_hidden_files_are_not_read_as_annotations(tmp_path):
    write_release(tmp_path, "rt1")
    for path in list((tmp_path / "annotation/train").iterdir()):
        path.with_name(f"._{path.name}").write_bytes(bytes.fromhex("0005160700020000") + b"\xb0" * 30)
    source = open_dataset(tmp_path)
    assert [len(episode) for episode in source] == [6, 6]
    identity = source.identity
    next((tmp_path / "annotation/train").glob("._*")).unlink()
    assert open_dataset(tmp_path).identity == identity


def truncate(path, size):
    path.write_bytes(path.read_bytes()[:-size])


@pytest.mark.parametrize(
    ("form", "name", "content", "message"),
    [
        (
            "v3.0",
            EPISODES,
            -600,
            r"cannot read .*meta/episodes.*file-000\.parquet': .*stopped before the file was closed",
        ),
        ("v3.0", DATA, -600, r"episode 0 of .*cannot read .*data/chunk-000/file-000\.parquet': .*stopped before"),
        ("v3.0", "meta/info.json", "{\n  'fps': 3", r"info\.json', line 2, is not valid JSON"),
        ("v3.0", "meta/info.json", "[]", r"info\.json' must contain a JSON object, got list"),
        ("v3.0", "meta/info.json", '{"codebase_version": "v3.0"}', r"info\.json' has no entry 'fps'"),
        (
            "v3.0",
            "meta/info.json",
            '{"codebase_version": "v3.0", "fps": 0, "features": {}, "data_path": ""}',
            r"info\.json': 'fps' must be a positive number, got 0",
        ),
        (
            "v3.0",
            "meta/info.json",
            '{"codebase_version": "v3.0", "fps": 10, "features": {"a": 3}, "data_path": ""}',
            r"info\.json': feature 'a' must be an object with a 'dtype', got 3",
        ),
        (
            "v2.1",
            "meta/episodes.jsonl",
            '{"episode_index": 0}\n\n{"epi',
            r"episodes\.jsonl', line 3, is not valid JSON",
        ),
        ("v2.1", "meta/episodes.jsonl", "[1]", r"episodes\.jsonl', line 1: must be a JSON object, got list"),
        ("v2.1", "meta/episodes.jsonl", "{}", r"episodes\.jsonl': 'episode_index' must be a non-negative integer"),
        (
            "v2.1",
            "meta/episodes.jsonl",
            b'\n{"a": "\xff"}',
            r"episodes\.jsonl', line 2: the file is not JSON in UTF-8",
        ),
        (
            "release",
            "annotation/train/10.json",
            '{\n"texts": [""],\n"states": [',
            r"10\.json', line 3, is not valid JSON",
        ),
    ],
)
def test_unreadable_files_are_named_with_the_line(form, name, content, message, tmp_path):
    if form == "v3.0":
        write_folder(tmp_path)
    elif form == "v2.1":
        write_v21(tmp_path, [make_episode(0, 5)], cameras=("left", "right"))
    else:
        write_release(tmp_path, "rt1")
    path = tmp_path / name
    if isinstance(content, int):
        truncate(path, -content)
    else:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message):
        list(open_dataset(tmp_path, "left" if form == "v2.1" else None))


def test_files_are_utf_8(tmp_path):
    task = "推到目标\u2028 und zurück"
    write_v21(tmp_path, [make_episode(0, 5)])
    row = json.dumps({"episode_index": 0, "tasks": [task], "length": 5}, ensure_ascii=False)
    (tmp_path / "meta/episodes.jsonl").write_text(row + "\r\n", encoding="utf-8")
    info = (tmp_path / "meta/info.json").read_bytes()
    (tmp_path / "meta/info.json").write_bytes(b"\xef\xbb\xbf" + info)  # editors on Windows may add a byte order mark
    assert open_dataset(tmp_path, "left")[0].task == task


def test_surplus_last_frame_is_ignored_and_reported_once(tmp_path, caplog):
    frames, *_ = write_release(tmp_path, "droid")
    longer = np.concatenate([frames, frames[:1]])
    write_video(tmp_path / "videos/train/0.mp4", longer, 5, lossless=True)
    write_video(tmp_path / "videos/train/1.mp4", 255 - frames, 5, lossless=True)
    change(tmp_path, video_length=7)
    source = open_dataset(tmp_path, ["0", "1"], fps=5)
    with caplog.at_level(logging.WARNING):
        for number in range(2):
            assert np.array_equal(source[number].frames[:, :10], frames)
            assert np.array_equal(source.window(number, 3, 3).frames[:, :10], frames[3:])
            assert len(source[number].actions) == 6
    assert len([record for record in caplog.records if "one more frame than the 6" in record.message]) == 1
    write_video(tmp_path / "videos/train/0.mp4", np.concatenate([longer, frames[:1]]), 5, lossless=True)
    with pytest.raises(
        ValueError, match=r"10\.json': 8 frames must have 7 actions .* got 5, in .*0\.mp4' \('video_length' is 7\)"
    ):
        source[1]


def put(root, key, value):
    def alter(row):
        row[key] = value if row["index"] == 9 else row[key]

    edit_table(root / DATA, alter)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300, None])
@pytest.mark.parametrize("key", ["action", "observation.state"])
def test_values_must_be_finite_in_float32(key, value, tmp_path):
    write_folder(tmp_path / "lerobot")
    put(tmp_path / "lerobot", key, [value, *([0.5] * (2 if key == "action" else 1))])
    source = LeRobotFolder(tmp_path / "lerobot")
    assert len(source[0]) == 5
    with pytest.raises(
        ValueError, match=rf"episode 1 of .*file-000\.parquet': '{key}' must be finite in float32, got .* at frame 4"
    ):
        source.vectors(1)
    if value is not None:
        write_release(tmp_path / "release", "rt1")
        change(tmp_path / "release", continuous_gripper_state=[0, 0, 0, value, 0, 0])
        with pytest.raises(ValueError, match=r"10\.json': 'state' must be finite in float32, got .* at frame 3"):
            open_dataset(tmp_path / "release")[1]


def test_nan_in_an_unselected_feature_raises(tmp_path):
    write_folder(tmp_path)
    put(tmp_path, "observation.state", [float("nan"), 0.5])
    source = LeRobotFolder(tmp_path, action_column=["action"], state_columns=["action"])
    with pytest.raises(
        ValueError, match=r"episode 1 of .*'observation\.state' must be of type float32 in every row, and not NaN"
    ):
        source.flags(1)


@pytest.mark.parametrize(
    ("task", "result"), [(None, ""), ([], ""), (["a"], "a"), ("a", "a"), ([None], None), ([3], None)]
)
def test_tasks_are_strings(task, result, tmp_path):
    write_v21(tmp_path / "lerobot", [make_episode(0, 5)])
    row = {"episode_index": 0, "tasks": task, "length": 5}
    (tmp_path / "lerobot/meta/episodes.jsonl").write_text(json.dumps(row))
    write_release(tmp_path / "release", "rt1")
    change(tmp_path / "release", texts=task)
    for read in (lambda: open_dataset(tmp_path / "lerobot", "left")[0], lambda: open_dataset(tmp_path / "release")[1]):
        if result is None:
            with pytest.raises(ValueError, match=r"the task must be a string, got (None|3)"):
                read()
        else:
            assert read().task == result


def test_episode_without_all_cameras_raises(tmp_path):
    write_release(tmp_path, "droid")
    change(tmp_path, videos=[{"video_path": "videos/train/0.mp4"}])
    source = open_dataset(tmp_path, ["0", "1"])
    assert len(source[0]) == 6
    with pytest.raises(ValueError, match=r"10\.json': camera 1 has no video_path"):
        source[1]


def test_depth_pictures_in_data_sets_raise(tmp_path):
    depth = PIL.Image.fromarray(np.full((10, 14), 700, np.uint16))
    features = datasets.Features(
        pictures=datasets.List(datasets.Image()), actions=datasets.List(datasets.List(datasets.Value("float32")))
    )
    table = datasets.Dataset.from_dict({"pictures": [[depth] * 2], "actions": [[[0.0], [1.0]]]}, features=features)
    with pytest.raises(ValueError, match=r"episode 0 of .* has mode 'I;16'"):
        TableEpisodes(table, "pictures")[0]


def test_pictures_of_different_sizes_raise():
    features = datasets.Features(
        pictures=datasets.List(datasets.Image()), actions=datasets.List(datasets.List(datasets.Value("float32")))
    )
    pictures = [PIL.Image.new("RGB", size) for size in ((8, 6), (8, 6), (4, 6))]
    table = datasets.Dataset.from_dict({"pictures": [pictures], "actions": [[[0.0]] * 3]}, features=features)
    with pytest.raises(
        ValueError,
        match=r"frames of 'pictures' must have one size, got 6x8 and, at frame 2, 6x4 .*: remove the episode",
    ):
        TableEpisodes(table, "pictures")[0]


def test_numbers_of_episodes_must_be_positive(tmp_path):
    write_folder(tmp_path)
    for number in (0, -1):
        for opened in (open_dataset, LeRobotFolder, IRASimFolder):
            with pytest.raises(
                ValueError, match=rf"`max_episodes` \(--max_train_episodes\) must be at least 1, got {number}"
            ):
                opened(tmp_path, max_episodes=number)


def test_videos_without_packets_raise(tmp_path):
    write_release(tmp_path, "planar")
    path = tmp_path / "videos/train/0.mp4"
    with av.open(str(path), "w", format="avi") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height = 16, 16
        container.start_encoding()
    source = IRASimFolder(tmp_path)
    table = datasets.Dataset.from_dict({"video": [str(path)], "actions": [[[0.0]]]})
    for read in (
        lambda: source[0],
        lambda: TableEpisodes(table.cast_column("video", datasets.Video())).vectors(0),
    ):
        with pytest.raises(ValueError, match=r"0\.mp4' contains no video frame"):
            read()


@pytest.mark.parametrize(
    ("frames", "actions", "message"),
    [
        (1, 0, "one frame requires one action, got 0 in 'actions': remove the episode"),
        (4, 2, "4 frames require 4 actions, or one fewer, got 2 in 'actions': remove the episode"),
        (0, 2, "a video or an image is missing: add the file, or remove the episode"),
    ],
)
def test_wrong_numbers_of_actions_in_tables_raise(frames, actions, message):
    picture = PIL.Image.new("RGB", (8, 8))
    features = datasets.Features(
        pictures=datasets.List(datasets.Image()), actions=datasets.List(datasets.List(datasets.Value("float32")))
    )
    columns = {"pictures": [[picture] * frames], "actions": [[[0.0]] * actions]}
    source = TableEpisodes(datasets.Dataset.from_dict(columns, features=features), "pictures")
    for read in (source.vectors, source.__getitem__, lambda number: source.window(number, 0, 1)):
        with pytest.raises(ValueError, match=f"episode 0 of .*: {message}"):
            read(0)


@pytest.mark.parametrize("value", [5, None, [[10**400] * 7] * 3, {"a": 1}])
@pytest.mark.parametrize("key", ["actions", "states", "videos"])
def test_wrong_entries_of_annotations_name_the_file(key, value, tmp_path):
    write_release(tmp_path, "planar")
    first = sorted((tmp_path / "annotation/train").glob("*.json"))[0]
    annotation = json.loads(first.read_text())
    dropped = {"actions": (), "states": ("actions",), "videos": ("video_path", "videos")}[key]
    first.write_text(
        json.dumps({name: each for name, each in annotation.items() if name not in dropped} | {key: value})
    )
    source = open_dataset(tmp_path, cameras="0", split="train", fps=5)
    number = [file.name for file in source.files].index(first.name)
    with pytest.raises(ValueError, match=first.name):
        source[number]
