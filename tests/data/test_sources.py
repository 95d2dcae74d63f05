"""Every form of data set gives the same episodes."""

import dataclasses
import io
import json
import os
import re
import shutil
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from conftest import tiny_vae
from test_lerobot import CAMERA, edit_table, make_episode, write_folder

from irasim_diffusers.actions import derive_actions, integrate_actions
from irasim_diffusers.data import (
    IRASimFolder,
    LatentClips,
    LeRobotFolder,
    MixedClips,
    PreparedEpisodes,
    TableEpisodes,
    action_normalisation,
    cache_latents,
    check_mixture,
    first_readable,
    frame_skip_for,
    open_dataset,
    read_frames,
    standardised_states,
    write_video,
)

SHARED = Path(os.environ.get("IRASIM_TEST_DATA", "/nonexistent"))
needs_clips = pytest.mark.skipif(not SHARED.is_dir(), reason="IRASIM_TEST_DATA is not a folder of robot clips")


def write_v21(root, episodes, cameras=("left", "right")):
    """Write a LeRobotDataset v2.1 with a file per episode; camera 2 shows the negative of camera 1."""
    vector = {"dtype": "float32", "shape": [3], "names": {"motors": ["x", "y", "grip"]}}
    info = {
        "codebase_version": "v2.1",
        "fps": 10,
        "chunks_size": 2,
        "data_path": "data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        "video_path": "videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4",
        "features": {key: {"dtype": "video", "shape": [10, 14, 3]} for key in cameras} | {"action": vector},
    }
    (root / "meta").mkdir(parents=True)
    (root / "meta" / "info.json").write_text(json.dumps(info))
    rows = [
        {"episode_index": number, "tasks": [episode.task], "length": len(episode)}
        for number, episode in enumerate(episodes)
    ]
    (root / "meta" / "episodes.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    for number, episode in enumerate(episodes):
        place = {"episode_chunk": number // 2, "episode_index": number}
        path = root / info["data_path"].format(**place)
        path.parent.mkdir(parents=True, exist_ok=True)
        table = {"action": list(episode.actions), "episode_index": [number] * len(episode)}
        pq.write_table(pa.table(table), path)
        for camera, frames in zip(cameras, (episode.frames, 255 - episode.frames), strict=True):
            write_video(root / info["video_path"].format(video_key=camera, **place), frames, 10, lossless=True)


def test_version_2_1_with_two_cameras(tmp_path):
    episodes = [make_episode(number, length) for number, length in enumerate((5, 9, 7))]
    write_v21(tmp_path, episodes)
    stacked = open_dataset(tmp_path, ["left", "right"])
    beside = open_dataset(tmp_path, ["right,left"])
    assert stacked.cameras == (("left",), ("right",))
    assert beside.cameras == (("right", "left"),)
    assert stacked.component_names("action") == ["x", "y", "grip"]
    for number, episode in enumerate(episodes):
        negative = 255 - episode.frames
        assert np.array_equal(stacked[number].frames, np.concatenate([episode.frames, negative], axis=1))
        assert np.array_equal(beside[number].frames, np.concatenate([negative, episode.frames], axis=2))
        assert np.array_equal(stacked[number].actions, episode.actions)
        assert stacked[number].task == episode.task
    with pytest.raises(ValueError, match=r"`cameras` must name one or more of \['left', 'right'\]"):
        open_dataset(tmp_path)


def test_videos_of_version_2_1_that_do_not_match_vectors_raise(tmp_path):
    episodes = [make_episode(number, length) for number, length in enumerate((5, 9, 7))]
    write_v21(tmp_path, episodes)
    video = tmp_path / "videos/chunk-000/left/episode_000001.mp4"
    longer = np.concatenate([episodes[1].frames, episodes[1].frames[:1]])
    write_video(video, longer, 10, lossless=True)
    with pytest.raises(ValueError, match=r"episode 1 of .*left/episode_000001\.mp4' continues after the 9 frames"):
        open_dataset(tmp_path, "left")[1]
    video.unlink()
    with pytest.raises(ValueError, match=r"episode 1 of .*left/episode_000001\.mp4"):
        open_dataset(tmp_path, "left")[1]
    assert np.array_equal(open_dataset(tmp_path, "right")[1].frames, 255 - episodes[1].frames)


def put_pictures_into_parquet(root, camera, files):
    """Move the frames of a camera from videos into the given Parquet files."""
    info = json.loads((root / "meta" / "info.json").read_text())
    info["features"][camera]["dtype"] = "image"
    (root / "meta" / "info.json").write_text(json.dumps(info | {"video_path": None}))
    (root / "videos").rename(root / "gone")

    def encoded(frame):
        file = io.BytesIO()
        PIL.Image.fromarray(frame).save(file, "png")
        return {"bytes": file.getvalue(), "path": "frame.png"}

    for name, part in files.items():
        pictures = [encoded(frame) for episode in part for frame in episode.frames]
        pq.write_table(pq.read_table(root / name).append_column(camera, [pictures]), root / name)


def test_pictures_inside_parquet(tmp_path):
    written = write_folder(tmp_path)
    names = [f"data/chunk-000/file-00{number}.parquet" for number in range(2)]
    put_pictures_into_parquet(tmp_path, CAMERA, {names[0]: written[:2], names[1]: written[2:]})
    for before, after in zip(written, open_dataset(tmp_path), strict=True):
        assert np.array_equal(after.frames, before.frames)

    def lose_picture(row):
        row[CAMERA] = None if row["index"] == 9 else row[CAMERA]

    edit_table(tmp_path / names[0], lose_picture)
    assert len(open_dataset(tmp_path)[0]) == 5
    with pytest.raises(ValueError, match=rf"episode 1 of .*file-000\.parquet' has no image '{CAMERA}' at frame 4"):
        open_dataset(tmp_path)[1]
    pq.write_table(pq.read_table(tmp_path / names[1]).drop_columns([CAMERA]), tmp_path / names[1])
    with pytest.raises(ValueError, match=r"episode 2 of .*file-001\.parquet': No match for .*image"):
        open_dataset(tmp_path)[2]


def test_pictures_inside_parquet_of_version_2_1(tmp_path):
    episodes = [make_episode(number, length) for number, length in enumerate((5, 9, 7))]
    write_v21(tmp_path, episodes)
    names = [f"data/chunk-00{number // 2}/episode_00000{number}.parquet" for number in range(3)]
    put_pictures_into_parquet(tmp_path, "left", {name: [part] for name, part in zip(names, episodes, strict=True)})
    for before, after in zip(episodes, open_dataset(tmp_path, "left"), strict=True):
        assert np.array_equal(after.frames, before.frames)
        assert np.array_equal(after.actions, before.actions)


@pytest.mark.parametrize("codec", ["libsvtav1", "libx264"])
def test_part_of_a_video_matches_the_whole(codec, tmp_path):
    ramp = np.arange(40, dtype=np.uint8)[:, None, None, None] * 6 + np.zeros((40, 64, 64, 3), dtype=np.uint8)
    with av.open(str(tmp_path / "clip.mp4"), mode="w") as container:
        stream = container.add_stream(codec, rate=30, options={"g": "16", "crf": "20"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for frame in ramp:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    for start, count in ((0, 3), (15, 2), (16, 5), (37, 3)):
        frames = read_frames(tmp_path / "clip.mp4", start, count, 30)
        assert np.abs(frames.astype(int) - ramp[start : start + count]).max() <= 4
    with pytest.raises(ValueError, match=r"clip.mp4' ends early: 5 frames required from index 37, 3 found"):
        read_frames(tmp_path / "clip.mp4", 37, 5, 30)


def write_release(root, flavor, length=6):
    """Write two episodes in IRASim's format; return their frames and annotations."""
    generator = np.random.default_rng(3)
    poses = np.concatenate([generator.normal(size=(length, 3)), generator.uniform(-3, 3, (length, 3))], axis=1)
    gripper = generator.uniform(size=(length, 1))
    frames = generator.integers(0, 256, (length, 10, 14, 3), dtype=np.uint8)
    annotation = {
        "planar": {"actions": poses[:-1, :2].tolist(), "video_path": "videos/train/0.mp4"},
        "rt1": {
            "state": poses.tolist(),
            "continuous_gripper_state": gripper[:, 0].tolist(),
            "videos": [{"video_path": "videos/train/0.mp4"}],
        },
        "droid": {
            "states": np.concatenate([poses, gripper], axis=1).tolist(),
            "videos": [{"video_path": "videos/train/0.mp4"}, {"video_path": "videos/train/1.mp4"}],
            "texts": ["pick it up"],
        },
    }[flavor]
    write_video(root / "videos/train/0.mp4", frames, 5, lossless=True)
    write_video(root / "videos/train/1.mp4", 255 - frames, 5, lossless=True)
    folder = root / "annotation" / "train"
    folder.mkdir(parents=True)
    for number in (2, 10):
        (folder / f"{number}.json").write_text(json.dumps(annotation))
    return frames, poses, gripper


@pytest.mark.parametrize("flavor", ["planar", "rt1", "droid"])
def test_all_variants_of_the_release_format(flavor, tmp_path):
    frames, poses, gripper = write_release(tmp_path, flavor)
    data = open_dataset(tmp_path, "0" if flavor == "droid" else None, fps=5)
    assert isinstance(data, IRASimFolder)
    assert [path.stem for path in data.files] == ["2", "10"]  # by number, not by letter
    episode = data[0]
    assert np.array_equal(episode.frames, frames)
    if flavor == "planar":
        np.testing.assert_allclose(episode.actions[:-1], poses[:-1, :2], rtol=1e-6)
        assert not episode.actions[-1].any()
    else:
        states = np.concatenate([poses, gripper], axis=1)
        np.testing.assert_allclose(episode.actions[:-1], derive_actions(states, "relative_euler"), atol=1e-6)
        assert not episode.actions[-1, :6].any()
        np.testing.assert_allclose(episode.states["state"], states, rtol=1e-6)
        assert data.component_names("action")[-1] == "gripper"
    if flavor == "droid":
        assert episode.task == "pick it up"
        assert open_dataset(tmp_path, ["0", "1"])[0].frames.shape == (6, 20, 14, 3)


def change(root, **changes):
    """Change the annotation of the last episode; None removes an entry."""
    path = root / "annotation" / "train" / "10.json"
    annotation = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in annotation.items() if value is not None}))


def lose(root, key):
    change(root, **{key: None})


@pytest.mark.parametrize(
    ("breakage", "message"),
    [
        (
            lambda root: lose(root, "continuous_gripper_state"),
            r"10\.json': an annotation must have 'actions', 'states', or 'state'",
        ),
        (lambda root: lose(root, "videos"), r"10\.json' must name a video"),
        (lambda root: change(root, videos=[{"path": "0.mp4"}]), r"10\.json': camera 0 has no video_path"),
        (
            lambda root: change(root, state=[[1, 2], [3]]),
            r"10\.json': 'state' must be numbers in rows of equal length",
        ),
        (lambda root: change(root, state=[{"x": 1}]), r"10\.json': 'state' must be numbers in rows of equal length"),
        (
            lambda root: change(root, actions=[[1, 2], [3]]),
            r"10\.json': 'actions' must be numbers in rows of equal length",
        ),
        (lambda root: (root / "annotation/train/10.json").write_text("[]"), r"10\.json' must name a video"),
        (
            lambda root: (root / "annotation/train/10.json").write_bytes(b"\xff"),
            r"10\.json'.* (is not valid JSON|is not JSON in UTF-8)",
        ),
        (lambda root: (root / "videos/train/0.mp4").write_bytes(b"nothing"), r"json': cannot read .*0\.mp4"),
        (
            lambda root: (root / "annotation/train/10.json").write_text("{"),
            r"10\.json'.* (is not valid JSON|is not JSON in UTF-8)",
        ),
        (
            lambda root: write_video(root / "videos/train/0.mp4", np.zeros((4, 10, 14, 3), np.uint8), 5),
            "4 frames must have 3",
        ),
    ],
)
def test_broken_release_files_raise(breakage, message, tmp_path):
    write_release(tmp_path, "rt1")
    breakage(tmp_path)
    with pytest.raises(ValueError, match=message):
        list(open_dataset(tmp_path))


@pytest.mark.parametrize(
    ("entry", "content", "message"),
    [
        ([], torch.zeros(6, 4, 2, 3), None),
        ([{"latent_video_path": "10.pt"}], torch.zeros(6, 4, 2, 3), None),
        ([{"latent_video_path": "10.pt"}], {"obs": torch.zeros(6, 4, 2, 3)}, None),
        ([{}], torch.zeros(6, 4, 2, 3), r"10\.json': camera 0 has no latent_video_path"),
        ([{"latent_video_path": "10.pt"}], {"latents": torch.zeros(6)}, r"10\.json'.*10\.pt' .* got no tensor"),
        ([{"latent_video_path": "10.pt"}], torch.zeros(5, 4, 2, 3), r"10\.pt' must contain latents \(6, C, h, w\)"),
        ([{"latent_video_path": "10.pt"}], torch.zeros(6), r"10\.pt' .* got \(6,\)"),
        (
            [{"latent_video_path": "10.pt"}],
            torch.zeros(6, 4, 2, 3, dtype=torch.int64),
            r"floating-point latents .* torch\.int64",
        ),
        ([{"latent_video_path": "10.pt"}], torch.zeros(6, 4, 2, 3, dtype=torch.complex64), "got torch.complex64"),
        (
            [{"latent_video_path": "10.pt"}],
            torch.full((6, 4, 2, 3), torch.nan),
            "must contain finite latents, got NaN",
        ),
        ([{"latent_video_path": "10.pt"}], torch.full((6, 4, 2, 3), 1e39, dtype=torch.float64), "must contain finite"),
        ([{"latent_video_path": "10.pt"}], torch.zeros(1).expand(6, 4, 2, 3), "declares a tensor"),
    ],
)
def test_recorded_latents(entry, content, message, tmp_path):
    write_release(tmp_path, "rt1")
    change(tmp_path, latent_videos=entry)
    torch.save(content, tmp_path / "10.pt")
    data = open_dataset(tmp_path)
    assert data.latents(0) is None
    if message is None:
        assert (data.latents(1) is not None) == bool(entry)
    else:
        with pytest.raises(ValueError, match=message):
            data.latents(1)


def test_compressed_latents_raise(tmp_path):
    """A small archive of deflated records could fill the memory."""
    write_release(tmp_path, "rt1")
    change(tmp_path, latent_videos=[{"latent_video_path": "10.pt"}])
    torch.save(torch.zeros(6, 4, 2, 3), tmp_path / "stored.pt")
    with (
        zipfile.ZipFile(tmp_path / "stored.pt") as source,
        zipfile.ZipFile(tmp_path / "10.pt", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    with pytest.raises(ValueError, match=r"10\.json'.*10\.pt' is not a checkpoint that can be read safely"):
        open_dataset(tmp_path).latents(1)


def test_changed_files_change_the_identity(tmp_path):
    frames, *_ = write_release(tmp_path, "droid")
    before = {camera: open_dataset(tmp_path, camera).identity for camera in ("0", "1")}
    assert open_dataset(tmp_path, "0").identity == before["0"]
    write_video(tmp_path / "videos/train/0.mp4", frames, 5)
    assert open_dataset(tmp_path, "0").identity != before["0"]
    assert open_dataset(tmp_path, "1").identity == before["1"], "the other camera's video is the same"
    annotation = tmp_path / "annotation/train/10.json"
    text = annotation.read_text()
    digit = text.index(".") + 1
    annotation.write_text(text[:digit] + str(9 - int(text[digit])) + text[digit + 1 :])
    assert open_dataset(tmp_path, "1").identity != before["1"], "a number of the same length"
    annotation.write_text(text)
    assert open_dataset(tmp_path, "1").identity == before["1"], "written again with the same content"
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


def test_first_readable_episode_is_searched_among_the_first(tmp_path):
    write_release(tmp_path, "rt1")
    broken = [tmp_path / "annotation/train" / f"{number}.json" for number in (0, 1)]
    broken[0].write_text("{")
    broken[1].write_text("[]")
    data = open_dataset(tmp_path)
    assert len(first_readable(data, data.__getitem__)) == 6
    with pytest.raises(
        ValueError, match=r"none of the first 2 episodes .*0\.json'.* (is not valid JSON|is not JSON in UTF-8)"
    ):
        first_readable(data, data.vectors, attempts=2)
    for number in range(25):
        (tmp_path / "annotation/train" / f"{number}.json").write_text("{")
    with pytest.raises(
        ValueError, match=r"none of the first 20 episodes .*0\.json'.* (is not valid JSON|is not JSON in UTF-8)"
    ):
        open_dataset(tmp_path)


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


def sources_of_every_form(folder, form):
    """One source of each format, with two or three short episodes."""
    episodes = [make_episode(number, length) for number, length in enumerate((5, 9, 7))]
    if form == "v3.0":
        write_folder(folder)
        return LeRobotFolder(folder)
    if form == "v2.1":
        write_v21(folder, episodes)
        return LeRobotFolder(folder, ["left", "right"])
    if form == "pictures":
        write_v21(folder, episodes)
        names = [f"data/chunk-00{number // 2}/episode_00000{number}.parquet" for number in range(3)]
        put_pictures_into_parquet(folder, "left", {name: [part] for name, part in zip(names, episodes, strict=True)})
        return LeRobotFolder(folder, "left")
    if form == "release":
        write_release(folder, "droid", length=9)
        return IRASimFolder(folder, cameras=["0,1"], fps=5)
    folder.mkdir()
    table = make_table(folder, episodes)
    if form == "stream":
        return TableEpisodes(table.to_iterable_dataset(), "video", length=3, origin="here")
    return TableEpisodes(table, form.split()[1], state_columns=["state"])


@pytest.mark.parametrize("form", ["v3.0", "v2.1", "pictures", "release", "table video", "table pictures", "stream"])
def test_windows_match_the_whole_episode(form, tmp_path):
    source = sources_of_every_form(tmp_path / "set", form)
    resized = PreparedEpisodes(source, frame_size=(20, 28))
    skipping = PreparedEpisodes(source, frame_skip=2, composition="absolute")
    dense = PreparedEpisodes(source, frame_skip=2, composition="absolute", all_phases=True)
    for data in (source, resized, skipping, dense):
        for number in range(len(data)):
            whole = data[number]
            assert {key: len(value) for key, value in data.vectors(number).items()} == dict.fromkeys(
                ["action", *whole.states], len(whole)
            )
            for start in range(len(whole)):
                length = min(3, len(whole) - start)
                part, window = slice(start, start + length), data.window(number, start, length)
                assert np.array_equal(window.frames, whole.frames[part]), (number, start)
                assert np.array_equal(window.actions, whole.actions[part])
                assert window.task == whole.task
                assert window.states.keys() == whole.states.keys()
                assert all(np.array_equal(window.states[key], whole.states[key][part]) for key in whole.states)
    for start, length in ((-1, 2), (0, 0), (4, 50), (99, 1)):
        with pytest.raises(ValueError, match=rf"a window must be within .* `start` {start}, `length` {length}"):
            source.window(0, start, length)
        with pytest.raises(ValueError, match="a window must be within"):
            skipping.window(0, start, length)


def test_streamed_tables_require_a_length(tmp_path):
    table = make_table(tmp_path, [make_episode(0, 5)]).to_iterable_dataset()
    with pytest.raises(ValueError, match="`length` and `origin` are required"):
        TableEpisodes(table)
    with pytest.raises(ValueError, match="the dataset has only 1 rows"):
        list(TableEpisodes(table, length=2, origin="here"))


def test_a_mistyped_folder_is_named(tmp_path, monkeypatch):
    (tmp_path / "data" / "pusht-train").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"which is not a folder \(did you mean '.*data/pusht-train'\?\)"):
        open_dataset(tmp_path / "data" / "pusht-trian")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=r"which is not a folder \(did you mean 'data/pusht-train'\?\), on the Hub"):
        open_dataset("data/pusht-trian")


def test_unknown_split_and_folder(tmp_path):
    write_release(tmp_path, "rt1")
    with pytest.raises(ValueError, match=r"`split` must be one of \['train'\] in .* got 'test'"):
        open_dataset(tmp_path, split="test")
    with pytest.raises(ValueError, match="contains no supported dataset"):
        open_dataset(tmp_path / "videos")
    with pytest.raises(ValueError, match="which is not a folder"):
        open_dataset(tmp_path / "nowhere")


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
    assert len(clips.actions) == 9 - 3 + 7 - 3, "none that leads out of an episode"
    with pytest.raises(ValueError, match=r"1 episodes .* shorter than a window of 3 frames, every 3th, the first"):
        LatentClips(folder, 3, frame_skip=3)
    plain = PreparedEpisodes(source)
    assert PreparedEpisodes(source, all_phases=True).identity == plain.identity, "without a skip nothing changes"
    assert dense.identity != PreparedEpisodes(source, frame_skip=3, composition="relative_planar").identity


@pytest.mark.parametrize("derivation", ["relative_euler", "relative_6d", "relative_planar", "absolute"])
def test_last_action_of_an_episode_is_hold(derivation, tmp_path):
    _, poses, gripper = write_release(tmp_path, "droid", length=4)
    last = np.concatenate([poses, gripper], axis=1)[-1]
    for skip in (1, 2, 5):  # a single frame remains of five
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
        ({"frame_skip": 2}, r"`composition` \(--action_composition\) is required with frame_skip=2"),
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
    assert said.identity == PreparedEpisodes(source).identity, "nothing is changed that latents depend on"
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


@pytest.fixture
def mixture(tmp_path):
    """Data sets with 10 frames per second and one camera: three named actions, and two with padding."""
    write_folder(tmp_path / "lerobot")
    write_release(tmp_path / "planar", "planar")
    padded = PreparedEpisodes(open_dataset(tmp_path / "planar", fps=10), action_dim=3)
    return LeRobotFolder(tmp_path / "lerobot"), padded


def test_matching_data_sets_can_be_mixed(mixture):
    check_mixture(mixture)
    check_mixture(mixture[:1])


def test_different_data_sets_cannot_be_mixed(mixture, tmp_path):
    lerobot, _ = mixture
    write_v21(tmp_path / "two", [make_episode(0, 5)])
    write_folder(tmp_path / "renamed")
    info = json.loads((tmp_path / "renamed/meta/info.json").read_text())
    info["features"]["action"]["names"] = ["x", "z", "grip"]
    (tmp_path / "renamed/meta/info.json").write_text(json.dumps(info))
    left, right = (open_dataset(tmp_path / "two", cameras) for cameras in (["left,right"], ["right,left"]))
    for sources, message in [
        ([lerobot, lerobot, PreparedEpisodes(lerobot, "absolute", frame_skip=2)], "frames per second are 10 and 5"),
        ([left, right], r"cameras are \(\('left', 'right'\),\) and \(\('right', 'left'\),\)"),
        ([lerobot, left], "cameras are single and"),
        ([lerobot, LeRobotFolder(tmp_path / "renamed")], r"action components are \['x', 'y', 'grip'\] and \['x', 'z'"),
        ([lerobot, PreparedEpisodes(lerobot, composition="absolute")], "action derivations are recorded and absolute"),
    ]:
        with pytest.raises(ValueError, match=rf"{tmp_path}.* and .*{tmp_path}.* cannot be mixed: their {message}"):
            check_mixture(sources)


def break_action(root, episode):
    """Put a NaN into the second action of an episode of `write_folder`."""
    path = root / "data" / "chunk-000" / "file-000.parquet"
    table = pq.read_table(path)
    actions = table["action"].to_pylist()
    actions[table["episode_index"].to_pylist().index(episode) + 1] = [float("nan")] * 3
    column = pa.FixedSizeListArray.from_arrays(pa.array(np.ravel(actions).astype(np.float32)), 3)
    pq.write_table(table.set_column(table.column_names.index("action"), "action", column), path)


def test_broken_episodes_are_skipped_and_listed(tmp_path):
    write_folder(tmp_path / "set")
    break_action(tmp_path / "set", 1)
    data = LeRobotFolder(tmp_path / "set")
    with pytest.raises(ValueError, match=r"episode 1 of .* 'action' at frame 1 is"):
        cache_latents(data, tiny_vae(), tmp_path / "cache")
    folder = cache_latents(data, tiny_vae(), tmp_path / "cache", skip_broken=True)
    assert list(json.loads((folder / "manifest.json").read_text())["broken"]) == ["1"]
    clips = LatentClips(folder, 5)
    assert {number for number, _ in clips.windows} == {0, 2}
    derived = PreparedEpisodes(data, "absolute", "observation.state")  # though an episode is broken
    assert derived.vectors(0)["action"].shape == (5, 2)
    (states,) = standardised_states([data], ["observation.state"], numbers=[clips.episodes])
    assert set(states) == {0, 2}
    with pytest.raises(ValueError, match=r"1 episodes were skipped as broken, the first: episode 1 of"):
        cache_latents(data, tiny_vae(), tmp_path / "cache")


def test_every_kind_of_broken_episode_raises_or_is_skipped(tmp_path):
    root = tmp_path / "set"
    episodes = [make_episode(number, length) for number, length in enumerate((9, 8, 7, 9, 8, 3))]
    write_v21(root, episodes)
    (root / "videos/chunk-000/right/episode_000001.mp4").unlink()  # a missing camera
    truncated = root / "videos/chunk-001/left/episode_000002.mp4"
    truncated.write_bytes(truncated.read_bytes()[:-200])
    table = root / "data/chunk-001/episode_000003.parquet"
    pq.write_table(pq.read_table(table).slice(0, 8), table)  # fewer actions than frames

    def lose(row):
        row["action"] = [1.0, float("nan"), 2.0]

    edit_table(root / "data/chunk-002/episode_000004.parquet", lose)
    messages = {
        1: r"episode 1 of .*right/episode_000001\.mp4",
        2: r"episode 2 of .*cannot read .*left/episode_000002\.mp4",
        3: r"episode 3 of .* expected 9 frames, found 8 rows in .*episode_000003\.parquet",
        4: r"episode 4 of .* 'action' at frame 0 is \[1\.0, nan, 2\.0\]",
    }
    data = LeRobotFolder(root, ["left", "right"])
    for number, message in messages.items():
        for read in (lambda number: data[number], lambda number: data.window(number, 1, 2)):
            with pytest.raises(ValueError, match=message):
                read(number)
    with pytest.raises(ValueError, match=messages[1]):
        cache_latents(data, tiny_vae(), tmp_path / "cache")
    folder = cache_latents(data, tiny_vae(), tmp_path / "cache", skip_broken=True)
    broken = json.loads((folder / "manifest.json").read_text())["broken"]
    assert list(broken) == [str(number) for number in messages]
    for number, message in messages.items():
        assert re.search(message, broken[str(number)])
    with pytest.raises(
        ValueError, match=r"1 episodes .* shorter than a window of 5 frames, the first episode 5 with 3"
    ):
        LatentClips(folder, 5)
    clips = LatentClips(folder, 5, skip_short=True)
    assert (list(clips.episodes), clips.short) == ([0], [5])


def test_no_readable_episode_raises(tmp_path):
    write_folder(tmp_path / "set")
    for episode in (0, 1):
        break_action(tmp_path / "set", episode)
    with pytest.raises(ValueError, match=r"no episode can be read: episode 0 of"):
        cache_latents(
            LeRobotFolder(tmp_path / "set", max_episodes=2), tiny_vae(), tmp_path / "cache", skip_broken=True
        )


def test_each_process_encodes_its_share(tmp_path):
    write_folder(tmp_path / "set")
    data, vae = LeRobotFolder(tmp_path / "set"), tiny_vae()
    encoded: list[int] = []
    vae.encoder.register_forward_hook(lambda _, inputs, __: encoded.append(len(inputs[0])))
    alone = LatentClips(cache_latents(data, vae, tmp_path / "alone", episodes_per_file=1), 5)
    assert sum(encoded) == 21
    encoded.clear()
    barrier = threading.Barrier(2)
    with ThreadPoolExecutor(2) as pool:
        folders = list(
            pool.map(
                lambda index: cache_latents(
                    *(data, vae, tmp_path / "together"),
                    episodes_per_file=1,
                    process_index=index,
                    num_processes=2,
                    wait_for_everyone=barrier.wait,
                ),
                range(2),
            )
        )
    assert folders[0] == folders[1]
    assert sum(encoded) == 21, "no episode was encoded twice"
    together = LatentClips(folders[0], 5)
    assert list(together.windows) == list(alone.windows)
    assert all(torch.equal(together[index]["latents"], alone[index]["latents"]) for index in range(len(alone)))


class Windows:
    """Windows that contain their own index."""

    def __init__(self, first, size, width=2):
        self.first, self.size, self.width = first, size, width

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return {"actions": torch.full((self.width,), self.first + range(self.size)[index])}


def test_data_sets_are_mixed_by_weight():
    def drawn(mixed):
        return [int(mixed[index]["actions"][0]) for index in range(len(mixed))]

    mixed = MixedClips([Windows(0, 30), Windows(100, 10)], [1, 3])
    first = drawn(mixed)
    assert (len(first), sum(number >= 100 for number in first)) == (40, 30)
    assert {number for number in first if number >= 100} == set(range(100, 110))
    mixed.set_epoch(1)
    second = drawn(mixed)
    assert {number for number in first if number < 100} != {number for number in second if number < 100}
    mixed.set_epoch(0)
    assert drawn(mixed) == first
    assert sorted(drawn(MixedClips([Windows(0, 30), Windows(100, 10)]))) == [*range(30), *range(100, 110)]
    with pytest.raises(ValueError, match="`weights` must be 2 positive numbers"):
        MixedClips([Windows(0, 3), Windows(5, 1)], [1, 0])
    with pytest.raises(ValueError, match="`clips` must have windows of the same shapes"):
        MixedClips([Windows(0, 3), Windows(5, 1, width=7)])


def test_normalisation_of_actions():
    actions = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([2.0, 0.01, 0.0]) + 5
    offset, scale = (torch.tensor(values) for values in action_normalisation(actions))
    seen = (actions - offset) * scale
    torch.testing.assert_close(seen.mean(0), torch.zeros(3), atol=1e-3, rtol=0)
    torch.testing.assert_close(seen[:, :2].std(0, correction=0), torch.ones(2), atol=1e-3, rtol=0)
    assert scale[2] == 1
    offset, scale = (torch.tensor(values) for values in action_normalisation(actions, "quantile"))
    inside = (((actions - offset) * scale)[:, :2].abs() <= 1).float().mean(0)
    torch.testing.assert_close(inside, torch.full((2,), 0.98), atol=0.005, rtol=0)
    with pytest.raises(ValueError, match=r"`kind` \(--action_normalisation\) must be std or quantile"):
        action_normalisation(actions, "max")


def test_frames_are_resized(tmp_path):
    frames, *_ = write_release(tmp_path, "planar")
    resized = PreparedEpisodes(open_dataset(tmp_path), frame_size=(20, 28))[0].frames
    assert resized.shape == (6, 20, 28, 3)
    assert abs(resized.mean() - frames.mean()) < 2


def test_frames_at_another_rate_raise(tmp_path):
    write_video(tmp_path / "clip.mp4", np.zeros((8, 16, 16, 3), np.uint8), 20)
    with pytest.raises(ValueError, match=r"has no frame 2 at 10 frames/s"):
        read_frames(tmp_path / "clip.mp4", 0, 4, 10)


@needs_clips
def test_real_droid_clips():
    one, three = (open_dataset(SHARED / "droid", cameras, fps=5) for cameras in ("0", ["0", "1", "2"]))
    assert (len(one), len(open_dataset(SHARED / "droid", "0", split="val"))) == (7, 4)
    episode = three[0]
    assert episode.frames.shape[1:] == (576, 320, 3)
    assert np.array_equal(episode.frames[:, :192], one[0].frames)
    assert episode.actions.shape == (len(episode), 7)
    assert np.abs(episode.actions[:, :3]).max() < 0.3  # meters in a fifth of a second
    back = integrate_actions(episode.states["state"][0], episode.actions[:-1], "relative_euler")
    np.testing.assert_allclose(back[:, :3], episode.states["state"][:, :3], atol=1e-4)


@needs_clips
def test_real_language_table_clip_and_its_latents():
    data = open_dataset(SHARED / "language_table", split="test", fps=10)
    episode = data[0]
    assert (len(episode), episode.actions.shape) == (18, (18, 2))
    latents = data.latents(0)
    assert latents.shape == (18, 4, 36, 64)
    assert 0.5 < latents.std() < 1.5  # scaled already
    assert torch.isfinite(latents).all()
