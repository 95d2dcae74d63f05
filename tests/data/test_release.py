"""Annotations and videos of the IRASim release."""

import json
import zipfile

import numpy as np
import pytest
import torch

from irasim_diffusers.actions import derive_actions
from irasim_diffusers.data import IRASimFolder, open_dataset, write_video


def write_release(root, flavor, length=6):
    """Write two equal episodes in IRASim's format; return their frames, poses and gripper openings."""
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
    assert [path.stem for path in data.files] == ["2", "10"]  # sorted as numbers, not as text
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
