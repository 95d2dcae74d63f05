"""Tables of the `datasets` library as sources of episodes."""

import io

import numpy as np
import PIL.Image
import pytest
from test_lerobot import make_episode

from irasim_diffusers.data import TableEpisodes, open_dataset, write_video


def make_table(folder, episodes):
    """A table with a column of videos, one of pictures, actions between frames, and states."""
    datasets = pytest.importorskip("datasets")
    columns = {
        "video": [
            str(write_video(folder / f"{number}.mp4", episode.frames, 10, lossless=True))
            for number, episode in enumerate(episodes)
        ],
        "pictures": [[PIL.Image.fromarray(frame) for frame in episode.frames] for episode in episodes],
        "actions": [episode.actions[:-1].tolist() for episode in episodes],
        "state": [episode.states["observation.state"].tolist() for episode in episodes],
    }
    numbers = datasets.List(datasets.List(datasets.Value("float32")))
    features = datasets.Features(
        video=datasets.Video(), pictures=datasets.List(datasets.Image()), actions=numbers, state=numbers
    )
    return datasets.Dataset.from_dict(columns, features=features)


def test_streamed_tables_require_a_length(tmp_path):
    table = make_table(tmp_path, [make_episode(0, 5)]).to_iterable_dataset()
    with pytest.raises(
        ValueError, match="`length` and `origin` are required for an `IterableDataset`, got no length and origin"
    ):
        TableEpisodes(table)
    with pytest.raises(ValueError, match="the dataset has only 1 rows"):
        list(TableEpisodes(table, length=2, origin="here"))


def test_tables_with_videos_and_with_pictures(tmp_path):
    episodes = [make_episode(number, length) for number, length in enumerate((5, 6))]
    table = make_table(tmp_path, episodes)
    table.save_to_disk(str(tmp_path / "table"))
    for camera in ("video", "pictures"):
        data = open_dataset(tmp_path / "table", camera, max_episodes=2)
        assert isinstance(data, TableEpisodes)
        for before, after in zip(episodes, data, strict=True):
            assert np.array_equal(after.frames, before.frames)
            np.testing.assert_allclose(after.actions[:-1], before.actions[:-1])
    with pytest.raises(ValueError, match="column 'wrist' does not exist"):
        open_dataset(tmp_path / "table", "wrist")
    with pytest.raises(ValueError, match="must contain a video or a list of images"):
        open_dataset(tmp_path / "table", "actions")
    feature, ragged = table.features["actions"], [[[1.0], [2.0, 3.0]], None]
    ragged = table.remove_columns("actions").add_column("actions", ragged, feature=feature)
    for number in range(2):
        with pytest.raises(ValueError, match=rf"episode {number} of "):
            TableEpisodes(ragged).vectors(number)


def test_unreadable_content_of_a_table_is_named():
    datasets = pytest.importorskip("datasets")
    numbers = datasets.List(datasets.List(datasets.Value("float32")))
    picture = io.BytesIO()
    PIL.Image.new("RGB", (12, 8)).save(picture, "PNG")
    bad = b"nothing" * 100
    for path, name in ((None, "column 'video'"), ("a.mp4", "'a.mp4'")):
        features = datasets.Features(
            video=datasets.Video(decode=False), pictures=datasets.List(datasets.Image(decode=False)), actions=numbers
        )
        row = {
            "video": {"bytes": bad, "path": path},
            "pictures": [{"bytes": content, "path": path} for content in (picture.getvalue(), bad, bad)],
            "actions": [[0.0, 1.0]] * 2,
        }
        table = datasets.Dataset.from_list([row], features=features)
        source = TableEpisodes(table)
        for read in (source.__getitem__, source.vectors, lambda number, source=source: source.window(number, 0, 2)):
            with pytest.raises(ValueError, match=rf"episode 0 of .*: cannot read {name} as a video: Invalid data"):
                read(0)
        source = TableEpisodes(table, "pictures")
        for read, frame in ((source.__getitem__, 1), (lambda number, source=source: source.window(number, 2, 1), 2)):
            with pytest.raises(
                ValueError, match=rf"cannot read image 'pictures' at frame {frame}: its format is unknown"
            ):
                read(0)


def test_saved_table_is_read_from_its_folder(tmp_path):
    episodes = [make_episode(number, length) for number, length in enumerate((5, 6))]
    folder = tmp_path / "table"
    make_table(tmp_path, episodes).save_to_disk(str(folder))
    files = sorted(folder.iterdir())
    folder.chmod(0o555)
    try:
        source = open_dataset(folder, "pictures", state_columns=["state"], max_episodes=2)
        assert np.array_equal(source[1].frames, episodes[1].frames)
    finally:
        folder.chmod(0o755)
    assert sorted(folder.iterdir()) == files


def test_saved_table_of_another_split_raises(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = make_table(tmp_path, [make_episode(0, 5)])
    datasets.DatasetDict(test=table, tail=table).save_to_disk(str(tmp_path / "dict"))
    assert len(open_dataset(tmp_path / "dict", split="tail")) == 1
    with pytest.raises(ValueError, match=r"`split` must be one of \['tail', 'test'\] in .*dict', got 'train'"):
        open_dataset(tmp_path / "dict")
    for split, fits in ((None, ("train", "test")), ("test", ("test",)), ("test[:10]", ("test",))):
        named = datasets.Dataset(table.data, split=split and datasets.NamedSplit(split))
        folder = tmp_path / f"alone-{split}"
        named.save_to_disk(str(folder))
        for asked in ("train", "test"):
            if asked in fits:
                assert len(open_dataset(folder, split=asked)) == 1
            else:
                with pytest.raises(ValueError, match=r"`split` must be one of \['test'\] in .*, got 'train'"):
                    open_dataset(folder, split=asked)
