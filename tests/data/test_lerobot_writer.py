import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from test_lerobot import CAMERA, NAMES, TASKS, make_episode, write_folder

from irasim_diffusers.data import Episode, LeRobotFolder, is_written, tile, write_file, write_lerobot, write_metadata
from irasim_diffusers.data.lerobot_statistics import image_statistics, pool, vector_statistics
from irasim_diffusers.data.lerobot_writer import region_layout, tile_regions

QUANTILES = ("q01", "q10", "q50", "q90", "q99")


def narrow_episode(number, length=6):
    """An episode with features of several types, most of them of width 1."""
    rng = np.random.default_rng(number)
    return Episode(
        frames=rng.integers(0, 256, (length, 10, 14, 3), dtype=np.uint8),
        actions=rng.normal(size=(length, 1)).astype(np.float32),
        states={
            "observation.state": rng.normal(size=(length, 1)),
            "next.done": np.arange(length) == length - 1,
            "next.success": np.zeros((length, 1), bool),
            "observation.counts": rng.integers(-5, 5, (length, 2)),
        },
        task=TASKS[number % 2],
    )


def write_narrow(root, count=3):
    episodes = [narrow_episode(number, 4 + number) for number in range(count)]
    write_file(root, 0, episodes, fps=10, camera=CAMERA, tasks=TASKS)
    names = {"action": ["x"], "observation.state": ["a"]}
    write_metadata(root, fps=10, camera=CAMERA, frame_size=(10, 14), names=names, tasks=TASKS, robot_type="test")
    return episodes


def test_features_of_width_one_are_scalars_and_keep_their_types(tmp_path):
    write_narrow(tmp_path)
    schema = pq.read_schema(tmp_path / "data/chunk-000/file-000.parquet")
    types = {name: str(schema.field(name).type) for name in schema.names}
    assert types == {
        "action": "float",
        "observation.state": "float",
        "next.done": "bool",
        "next.success": "bool",
        "observation.counts": "fixed_size_list<element: int64>[2]",
        "timestamp": "float",
        "frame_index": "int64",
        "episode_index": "int64",
        "index": "int64",
        "task_index": "int64",
    }
    features = json.loads((tmp_path / "meta/info.json").read_text())["features"]
    assert features["action"] == {"dtype": "float32", "shape": [1], "names": ["x"]}
    assert features["next.done"] == {"dtype": "bool", "shape": [1], "names": None}
    assert features["observation.counts"] == {"dtype": "int64", "shape": [2], "names": None}
    assert features["frame_index"] == {"dtype": "int64", "shape": [1], "names": None}


def test_bool_and_integer_features_survive_a_copy(tmp_path):
    written = write_narrow(tmp_path / "set")
    copy = write_lerobot(LeRobotFolder(tmp_path / "set"), tmp_path / "copy")
    assert copy.info["features"] == LeRobotFolder(tmp_path / "set").info["features"]
    for number, before in enumerate(written):
        flags = copy.flags(number)
        assert set(flags) == {"next.done", "next.success", "observation.counts"}
        for key, values in flags.items():
            assert values.dtype == before.states[key].dtype
            assert np.array_equal(values, before.states[key].reshape(len(before), -1))
        assert np.array_equal(copy[number].actions, before.actions)


def test_statistics_by_hand():
    """Each integer from 0 to 99 occurs once; quantiles above q01 are upper edges of narrow histogram bins."""
    values = np.arange(100, dtype=np.float32).reshape(-1, 1)
    statistics = vector_statistics(np.concatenate([values, np.full_like(values, 7)], axis=1))
    assert statistics["count"] == [100]
    assert statistics["min"] == [0, 7]
    assert statistics["max"] == [99, 7]
    np.testing.assert_allclose(statistics["mean"], [49.5, 7])
    np.testing.assert_allclose(statistics["std"], [np.sqrt((100**2 - 1) / 12), 0])
    np.testing.assert_allclose([statistics[name][0] for name in QUANTILES[1:]], [9, 49, 89, 98], atol=0.02)
    np.testing.assert_allclose([statistics[name][1] for name in QUANTILES], 7)
    single = vector_statistics(np.array([[3.0, 4.0]]))
    assert [single[name] for name in QUANTILES] == [[3.0, 4.0]] * 5


def test_statistics_of_pictures_by_hand():
    frames = np.zeros((250, 4, 4, 3), np.uint8)
    frames[:, :2, :, 1] = 255
    statistics = image_statistics(frames)
    assert statistics["count"] == [100]
    assert statistics["mean"] == [[[0.0]], [[0.5]], [[0.0]]]
    assert statistics["std"] == [[[0.0]], [[0.5]], [[0.0]]]
    assert statistics["max"] == [[[0.0]], [[1.0]], [[0.0]]]
    assert image_statistics(np.zeros((7, 4, 4, 3), np.uint8))["count"] == [7]


def test_a_folder_written_twice_has_each_task_once(tmp_path):
    write_folder(tmp_path / "set", lengths=(5, 4, 6, 3))
    source = LeRobotFolder(tmp_path / "set")
    for _ in range(2):
        write_lerobot(source, tmp_path / "copy")
        tasks = pq.read_table(tmp_path / "copy/meta/tasks.parquet").to_pandas()
        assert (tasks.index.tolist(), tasks["task_index"].tolist()) == (TASKS, [0, 1])
    index = pq.read_table(tmp_path / "copy/data/chunk-000/file-000.parquet")
    found = dict(zip(index["episode_index"].to_pylist(), index["task_index"].to_pylist(), strict=True))
    assert found == {0: 0, 1: 1, 2: 0, 3: 1}


def test_repeated_or_missing_tasks_raise(tmp_path):
    with pytest.raises(ValueError, match=r"`tasks` must contain the task .* tasks without 'tidy up'"):
        write_file(tmp_path / "set", 0, [make_episode(0, 5)], fps=10, camera=CAMERA, tasks=["another"])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    write_file(tmp_path, 0, [make_episode(0, 5)], fps=10, camera=CAMERA, tasks=TASKS)
    settings = {"fps": 10, "camera": CAMERA, "frame_size": (10, 14), "names": NAMES, "robot_type": "test"}
    with pytest.raises(ValueError, match=r"`tasks` must be unique, got '.*' more than once"):
        write_metadata(tmp_path, tasks=["tidy up", "tidy up"], **settings)
    with pytest.raises(ValueError, match="`action_derivation` must be one of"):
        write_metadata(tmp_path, tasks=TASKS, action_derivation="relative", **settings)
    with pytest.raises(ValueError, match="has no episode"):
        write_metadata(tmp_path / "empty", tasks=TASKS, **settings)


def test_damaged_file_is_not_written(tmp_path):
    write_file(tmp_path, 0, [make_episode(0, 5)], fps=10, camera=CAMERA, tasks=TASKS)
    path = tmp_path / "meta/episodes/chunk-000/file-000.parquet"
    path.write_bytes(path.read_bytes()[:-1])
    assert not is_written(tmp_path, 0)


@pytest.mark.parametrize(
    "layout", [(("a",), ("b",)), (("a", "b"),), (("a",), ("b", "c")), (("b", "c"), ("a",)), (("c", "b"), ("a",))]
)
def test_regions_match_the_tiled_pictures(layout):
    sizes = {"a": (4, 10), "b": (3, 10) if len(layout[-1]) == 1 and len(layout[0]) == 1 else (3, 6), "c": (3, 4)}
    if layout == (("a", "b"),):
        sizes["b"] = (4, 5)
    rng = np.random.default_rng(0)
    views = {name: rng.integers(0, 256, (2, *size, 3), dtype=np.uint8) for name, size in sizes.items()}
    frames = tile(layout, views)
    regions = tile_regions(layout, sizes)
    for name, (rows, columns) in regions.items():
        assert np.array_equal(frames[:, rows, columns], views[name])
    assert region_layout(regions) == layout


@pytest.fixture(scope="module")
def lerobot():
    """LeRobot's dataset class; skipped without LeRobot, which requires Python 3.12."""
    pytest.importorskip("lerobot")
    pytest.MonkeyPatch().setenv("HF_HUB_OFFLINE", "1")
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    return LeRobotDataset


def test_lerobot_reads_written_data_sets(lerobot, tmp_path):
    written = write_narrow(tmp_path / "set")
    write_lerobot(LeRobotFolder(tmp_path / "set"), tmp_path / "copy")
    write_lerobot(LeRobotFolder(tmp_path / "set"), tmp_path / "copy")
    for folder in (tmp_path / "set", tmp_path / "copy"):
        data = lerobot("local/set", root=folder, video_backend="pyav")
        assert len(data) == sum(map(len, written))
        place = 0
        for episode in written:
            for frame in range(len(episode)):
                item = data[place]
                place += 1
                assert item["task"] == episode.task
                assert float(item["action"]) == episode.actions[frame, 0]
                assert float(item["observation.state"]) == np.float32(episode.states["observation.state"][frame, 0])
                assert bool(item["next.done"]) == episode.states["next.done"][frame]
                assert item["observation.counts"].tolist() == episode.states["observation.counts"][frame].tolist()
                picture = item[CAMERA].permute(1, 2, 0).mul(255).round().numpy()
                assert np.array_equal(picture, episode.frames[frame])


def test_lerobot_computes_the_same_statistics(lerobot, tmp_path):
    from lerobot.datasets.compute_stats import aggregate_stats, compute_episode_stats
    from PIL import Image

    rng = np.random.default_rng(0)
    features = {
        CAMERA: {"dtype": "image", "shape": (3, 302, 306)},
        "action": {"dtype": "float32", "shape": (3,)},
        "observation.counts": {"dtype": "int64", "shape": (2,)},
        "next.done": {"dtype": "bool", "shape": (1,)},
    }
    ours, theirs = [], []
    for length in (1, 12, 130):
        frames = rng.integers(0, 256, (length, 302, 306, 3), dtype=np.uint8) if length < 130 else None
        if frames is None:
            frames = rng.integers(0, 40, (length, 1, 1, 3), dtype=np.uint8).repeat(302, 1).repeat(306, 2)
        vectors = {
            "action": (rng.normal(size=(length, 3)) * [1, 1e-3, 0] + [0, 0, 2]).astype(np.float32),
            "observation.counts": rng.integers(-5, 5, (length, 2)),
            "next.done": np.arange(length).reshape(-1, 1) == length - 1,
        }
        paths = [str(tmp_path / f"{length}-{number}.png") for number in range(length)]
        for path, frame in zip(paths, frames, strict=True):
            Image.fromarray(frame).save(path, compress_level=0)
        theirs.append(compute_episode_stats({CAMERA: paths, **vectors}, features))
        ours.append({CAMERA: image_statistics(frames)} | {key: vector_statistics(v) for key, v in vectors.items()})
    for expected, found in zip([*theirs, aggregate_stats(theirs)], [*ours, None], strict=True):
        found = found or {key: pool([part[key] for part in ours]) for key in features}
        for key in features:
            assert set(found[key]) == set(expected[key])
            for name, value in expected[key].items():
                inexact = key == CAMERA and name in ("mean", "std")  # LeRobot sums millions of pixels in float32
                tolerance = 5e-3 if inexact else 1e-5
                np.testing.assert_allclose(found[key][name], value, tolerance, tolerance, err_msg=f"{key} {name}")


def test_lerobot_opens_several_cameras_and_keeps_the_derivation(lerobot, tmp_path):
    from test_release import write_release

    from irasim_diffusers.data import open_dataset

    write_release(tmp_path / "release", "droid")
    source = open_dataset(tmp_path / "release", [["0", "1"]], fps=5)
    written = write_lerobot(source, tmp_path / "set")
    data = lerobot("local/set", root=tmp_path / "set", video_backend="pyav")
    assert set(data.meta.video_keys) == {"observation.images.0", "observation.images.1"}
    pictures = [data[0][f"observation.images.{camera}"].permute(1, 2, 0).mul(255).round().numpy() for camera in (0, 1)]
    assert np.array_equal(np.concatenate(pictures, axis=1), source[0].frames[0])
    from lerobot.datasets.io_utils import write_info

    write_info(data.meta.info, tmp_path / "set")  # LeRobot's tools rewrite info.json
    again = LeRobotFolder(tmp_path / "set")
    assert (again.action_derivation, again.cameras) == (source.action_derivation, written.cameras)
