"""Publishing and loading through the Hub's HTTP endpoints, each side in a process of its own, as two users would."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer
from test_lerobot import make_episode, write_folder
from test_sources import write_release, write_v21

START = """
import sys
import numpy as np, torch
from conftest import tiny_pipeline
from irasim_diffusers import IRASimPipeline, IRASimTransformer3DModel

def sample(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    frames = np.arange(2 * 8 * 12 * 3, dtype=np.uint8).reshape(2, 8, 12, 3)
    actions = np.arange(9.0).reshape(3, 3)
    generator = torch.Generator().manual_seed(0)
    return pipeline(frames, actions, num_inference_steps=2, generator=generator, output_type="pt").frames
"""


@pytest.fixture(scope="module")
def hub():
    server = HubServer()
    yield server
    server.close()


@pytest.fixture(scope="module")
def published(hub, tmp_path_factory):
    """A pipeline that one process has pushed: whole, then halved as a variant, then in shards to another repository."""
    folder = tmp_path_factory.mktemp("publisher")
    run(
        hub,
        folder,
        """
        pipeline = tiny_pipeline(action_names=["x", "y", "turn"], action_units=["m", "m", "rad"], fps=7)
        torch.save(sample(pipeline), "expected.pt")
        pipeline.push_to_hub("lab/robot")
        pipeline.to(torch.float16).push_to_hub("lab/robot", variant="fp16")
        pipeline.save_pretrained("shards", max_shard_size="40KB", repo_id="lab/shards", push_to_hub=True)
        """,
    )
    return folder / "expected.pt"


def run(hub, folder: Path, code: str, *arguments: str) -> str:
    """Run code in a fresh process whose Hub is the stand-in and whose cache is empty."""
    lines = [line.removeprefix("        ") for line in code.splitlines()]
    environment = os.environ | {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(folder / "hf"),
        "HF_TOKEN": "hf_local",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]),
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", START + "\n".join(lines), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_is_published_loads_and_gives_the_same_video(hub, published, tmp_path):
    run(
        hub,
        tmp_path,
        """
        from diffusers import AutoModel, DiffusionPipeline
        expected = torch.load(sys.argv[1])
        pipeline = IRASimPipeline.from_pretrained("lab/robot")
        torch.testing.assert_close(sample(pipeline), expected)
        transformer = AutoModel.from_pretrained("lab/robot", subfolder="transformer")
        assert type(transformer) is IRASimTransformer3DModel
        torch.testing.assert_close(sample(IRASimPipeline.from_pretrained("lab/robot", transformer=transformer)), expected)
        generic = DiffusionPipeline.from_pretrained("lab/robot", custom_pipeline="lab/robot", trust_remote_code=True)
        assert type(generic) is IRASimPipeline
        torch.testing.assert_close(sample(generic), expected)
        """,
        str(published),
    )


def test_variant_dtype_and_revision(hub, published, tmp_path):
    hub.repositories["lab/robot"]["v1"] = hub.repositories["lab/robot"]["main"]
    sha = hub.sha("lab/robot", "v1")
    hub.commit("lab/robot", hub.repositories["lab/robot"]["v1"] | {"model_index.json": b"{}"}, "broken")
    run(
        hub,
        tmp_path,
        """
        expected = torch.load(sys.argv[1])
        halved = IRASimPipeline.from_pretrained("lab/robot", variant="fp16", dtype=torch.float16, revision="v1")
        assert halved.transformer.dtype == torch.float16
        assert not torch.equal(sample(halved.to(torch.float32)), expected)
        torch.testing.assert_close(sample(halved), expected, atol=0.01, rtol=0)
        torch.testing.assert_close(sample(IRASimPipeline.from_pretrained("lab/robot", revision=sys.argv[2])), expected)
        for revision in ("broken", "missing"):
            try:
                IRASimPipeline.from_pretrained("lab/robot", revision=revision)
            except Exception as error:
                print(type(error).__name__)
            else:
                raise AssertionError(revision)
        """,
        str(published),
        sha,
    )
    downloaded = [request for request in hub.requests if "resolve" in request and "fp16" in request]
    assert downloaded, "the variant was not asked for"


def test_shards(hub, published, tmp_path):
    names = set(hub.repositories["lab/shards"]["main"])
    assert "transformer/diffusion_pytorch_model.safetensors.index.json" in names
    assert sum(name.startswith("transformer/") and name.endswith(".safetensors") for name in names) > 1
    run(
        hub,
        tmp_path,
        """
        loaded = IRASimPipeline.from_pretrained("lab/shards")
        torch.testing.assert_close(sample(loaded), torch.load(sys.argv[1]), atol=0.01, rtol=0)
        """,
        str(published),
    )


def test_the_card_is_written_from_the_config_and_then_left_alone(hub, published, tmp_path):
    files = hub.repositories["lab/robot"]["main"]
    card = files["README.md"].decode()
    for line in (
        "pipeline_tag: robotics",
        "| turn | rad | -1 | 1 |",
        "| x | m | 1 | 0.5 |",
        "7 frames a second",
        '"lab/robot"',
    ):
        assert line in card
    assert files["pipeline.py"].decode().startswith("from irasim_diffusers import IRASimPipeline")
    hub.commit("lab/other", {"README.md": b"---\nlicense: mit\n---\n# Ours\n"})
    run(hub, tmp_path, 'tiny_pipeline().push_to_hub("lab/other")')
    assert "# Ours" in hub.repositories["lab/other"]["main"]["README.md"].decode()
    assert "model_index.json" in hub.repositories["lab/other"]["main"]


def test_clips_are_published_with_a_card_and_trained_on_by_their_name(hub, tmp_path):
    write_release(tmp_path / "robot", "droid")
    run(
        hub,
        tmp_path,
        """
        from irasim_diffusers.cli import main
        arguments = ["data", "--dataset", "robot", "--cameras", "0", "1", "--fps", "5", "--output", "clips"]
        assert main([*arguments, "--push-to-hub", "lab/clips"]) == 0
        assert main([*arguments, "--push-to-hub", "lab/clips"]) == 0  # goes on, and tags again
        arguments[3:6] = ["--cameras", "1"]
        assert main(arguments) == 2, "other settings do not mix in"
        assert main(["data", "--dataset", "clips", "--output", "other"]) == 0
        assert main(["data", "--dataset", "robot", "--cameras", "0", "--fps", "5", "--output", "robot"]) == 2
        """,
    )
    files = hub.repositories["datasets/lab/clips"]["main"]
    assert hub.repositories["datasets/lab/clips"]["v3.0"] is files  # LeRobot asks for the tag
    assert not any("irasim-source" in name for name in files)
    card = files["README.md"].decode()
    for line in (
        "LeRobot",
        "2 episodes, 12 frames of 20x14 pixels at 5 frames",
        "tiled by rows: 0; 1",
        "yaw, gripper",
    ):
        assert line in card
    (tmp_path / "reader").mkdir()
    run(
        hub,
        tmp_path / "reader",
        """
        from irasim_diffusers.data import LeRobotFolder, open_dataset
        there, here = open_dataset("lab/clips"), open_dataset("../robot", ["0", "1"])
        assert isinstance(there, LeRobotFolder)
        for mine, theirs in zip(here, there, strict=True):
            assert np.array_equal(mine.frames, theirs.frames)
            np.testing.assert_allclose(mine.actions, theirs.actions, atol=1e-6)
            assert mine.task == theirs.task
        """,
    )


def test_only_the_cameras_asked_for_are_downloaded(hub, tmp_path):
    write_v21(tmp_path / "two", [make_episode(number, 5) for number in range(2)])
    files = {str(path.relative_to(tmp_path / "two")): path.read_bytes() for path in (tmp_path / "two").rglob("*.*")}
    hub.commit("datasets/lab/two", files)
    hub.requests.clear()
    run(
        hub,
        tmp_path,
        """
        from irasim_diffusers.data import open_dataset
        assert open_dataset("lab/two", "left")[1].frames.shape == (5, 10, 14, 3)
        """,
    )
    asked = " ".join(hub.requests)
    assert "left/episode_000001.mp4" in asked
    assert "right" not in asked


def test_only_the_first_episodes_asked_for_are_downloaded(hub, tmp_path):
    root = tmp_path / "three"
    write_folder(root)  # the third has files of its own
    files = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.*") if path.is_file()}
    hub.commit("datasets/lab/three", files)
    hub.requests.clear()
    run(
        hub,
        tmp_path,
        """
        from irasim_diffusers.data import open_dataset
        assert [len(episode) for episode in open_dataset("lab/three", max_episodes=2)] == [5, 9]
        """,
    )
    asked = " ".join(hub.requests)
    assert "image/chunk-000/file-000.mp4" in asked
    assert "data/chunk-000/file-000.parquet" in asked
    assert "image/chunk-000/file-001.mp4" not in asked
    assert "data/chunk-000/file-001.parquet" not in asked
