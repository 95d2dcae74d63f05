"""Publishing and loading through the Hub's HTTP endpoints, in separate processes like two users."""

import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from fork_server import MODULES, ForkServer
from hub_server import HubServer
from huggingface_hub.errors import LocalEntryNotFoundError
from test_lerobot import CAMERA, NAMES, TASKS, make_episode, write_folder
from test_release import write_release
from test_sources import write_v21
from tiny_models import tiny_vae

from irasim_diffusers.data import LatentClips, LeRobotFolder, cache_latents, write_file, write_metadata, write_video
from irasim_diffusers.hub import missing_reason

START = """
import sys
import numpy as np, torch
from tiny_models import tiny_pipeline
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


def test_unreachable_hub_is_not_a_missing_model():
    error = LocalEntryNotFoundError("not in the cache")
    error.__cause__ = ConnectionRefusedError()
    assert "in the local cache (the Hub cannot be reached)" in missing_reason("lab/robot", error)
    assert "on the Hub or in the local cache" in missing_reason("lab/robot", LocalEntryNotFoundError("not found"))
    assert missing_reason("lab/robot", ValueError("damaged")) is None


@pytest.fixture(scope="module")
def published(hub, tmp_path_factory):
    """Publish a pipeline in float32, as a float16 variant and in float16 shards; return its video's path."""
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


def user_environment(endpoint: str, home: Path) -> dict[str, str]:
    """Return the environment variables of a user of the local Hub server with the cache in `home`."""
    return {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(home),
        "HF_TOKEN": "hf_local",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


@functools.cache
def user_server(endpoint: str) -> tuple[ForkServer, Path]:
    """Start a server for processes that use the local Hub server; return it and the path of their cache."""
    home = Path(tempfile.mkdtemp(prefix="home-")) / "hf"
    return ForkServer(user_environment(endpoint, home), ("tiny_models", *MODULES)), home


def run(hub, folder: Path, code: str, *arguments: str) -> str:
    """Run code in a new process that uses the local Hub server and the cache in `folder`."""
    lines = [line.removeprefix("        ") for line in code.splitlines()]
    server, home = user_server(hub.endpoint)
    (folder / "hf").mkdir(exist_ok=True)
    home.unlink(missing_ok=True)
    home.symlink_to(folder / "hf")
    done = server.run("-c", START + "\n".join(lines), *arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_published_pipeline_gives_same_video(hub, published, tmp_path):
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


def test_subfolder_gets_no_card_or_code(hub, tmp_path):
    run(hub, tmp_path, 'tiny_pipeline().push_to_hub("lab/robots", subfolder="arm")')
    names = set(hub.repositories["lab/robots"]["main"])
    assert "arm/model_index.json" in names
    assert not {"arm/README.md", "arm/pipeline.py"} & names


def test_variant_dtype_and_revision(hub, published, tmp_path):
    hub.repositories["lab/robot"]["v1"] = hub.repositories["lab/robot"]["main"]
    sha = hub.sha("lab/robot", "v1")
    hub.commit("lab/robot", hub.repositories["lab/robot"]["v1"] | {"model_index.json": b"{}"}, "broken")
    run(
        hub,
        tmp_path,
        """
        expected = torch.load(sys.argv[1])
        half = IRASimPipeline.from_pretrained("lab/robot", variant="fp16", dtype=torch.float16, revision="v1")
        assert half.transformer.dtype == torch.float16
        assert not torch.equal(sample(half.to(torch.float32)), expected)
        torch.testing.assert_close(sample(half), expected, atol=0.01, rtol=0)
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
    assert downloaded, "the variant was not downloaded"


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


def test_model_card_is_written_once(hub, published, tmp_path):
    files = hub.repositories["lab/robot"]["main"]
    card = files["README.md"].decode()
    for line in (
        "pipeline_tag: robotics",
        "| turn | rad | -1 | 1 |",
        "| x | m | 1 | 0.5 |",
        "7 frames per second",
        '"lab/robot"',
    ):
        assert line in card
    assert files["pipeline.py"].decode().startswith("from irasim_diffusers import IRASimPipeline")
    hub.commit("lab/other", {"README.md": b"---\nlicense: mit\n---\n# Ours\n"})
    run(hub, tmp_path, 'tiny_pipeline().push_to_hub("lab/other")')
    assert "# Ours" in hub.repositories["lab/other"]["main"]["README.md"].decode()
    assert "model_index.json" in hub.repositories["lab/other"]["main"]


def test_published_dataset_has_card_and_loads_by_repo_id(hub, tmp_path):
    write_release(tmp_path / "robot", "droid")
    run(
        hub,
        tmp_path,
        """
        from irasim_diffusers.cli import main
        arguments = ["data", "--dataset", "robot", "--cameras", "0", "1", "--fps", "5", "--output", "clips"]
        assert main([*arguments, "--push-to-hub", "lab/clips"]) == 0
        assert main([*arguments, "--push-to-hub", "lab/clips"]) == 0  # resumes, and moves the tag
        arguments[3:6] = ["--cameras", "1"]
        assert main(arguments) == 2, "other settings are rejected"
        assert main(["data", "--dataset", "clips", "--output", "other"]) == 0
        assert main(["data", "--dataset", "robot", "--cameras", "0", "--fps", "5", "--output", "robot"]) == 2
        """,
    )
    files = hub.repositories["datasets/lab/clips"]["main"]
    assert hub.repositories["datasets/lab/clips"]["v3.0"] is files  # LeRobot requires the tag
    assert not any("irasim-source" in name for name in files)
    card = files["README.md"].decode()
    for line in (
        "LeRobot",
        "2 episodes with 12 frames of 20x14 pixels (height x width)",
        "5 frames per second",
        "tiled by rows: observation.images.0; observation.images.1",
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


def on_the_hub(hub, root, repository):
    """Publish a folder; return the sizes of its video and Parquet files."""
    files = {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.*") if path.is_file()}
    hub.commit(f"datasets/{repository}", files)
    return {name: len(data) for name, data in files.items() if not name.startswith("meta")}


def test_only_requested_cameras_are_downloaded(hub, tmp_path):
    write_v21(tmp_path / "two", [make_episode(number, 5) for number in range(2)])
    on_the_hub(hub, tmp_path / "two", "lab/two")
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


def test_only_requested_episodes_are_downloaded(hub, tmp_path):
    write_folder(tmp_path / "three")  # the third episode is in separate files
    on_the_hub(hub, tmp_path / "three", "lab/three")
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


ENCODE = """
        import os, signal
        from multiprocessing import get_context
        from pathlib import Path
        import torch.distributed
        from tiny_models import tiny_vae
        from irasim_diffusers.data import cache_latents, open_dataset

        assets, most = Path(os.environ["HF_HOME"]) / "assets", int(sys.argv[1])

        def encode(rank, processes, last):
            meeting = f"file://{Path(f'meeting-{processes}').absolute()}"
            torch.distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=processes)
            vae, encoded = tiny_vae(), []

            def on_disk():
                try:
                    return sum(path.stat().st_size for path in assets.rglob("file-*.*") if path.suffix != ".metadata")
                except FileNotFoundError:  # the other process has just deleted one
                    return on_disk()

            def look(*_):
                held = on_disk()
                assert 0 < held <= most * processes, f"{held} bytes on disk"
                encoded.append(held)
                if len(encoded) == last:
                    os.kill(os.getpid(), signal.SIGKILL)

            vae.encoder.register_forward_hook(look)
            cache_latents(
                open_dataset("lab/large", streaming=True), vae, "cache", episodes_per_file=2, process_index=rank,
                num_processes=processes, wait_for_everyone=torch.distributed.barrier,
            )

        def run(*jobs):
            processes = [get_context("fork").Process(target=encode, args=job) for job in jobs]
            for process in processes:
                process.start()
            for process in processes:
                process.join()
            return [process.exitcode for process in processes]

        assert run((0, 1, 3)) == [-signal.SIGKILL]
        assert len(list(assets.rglob("*.mp4"))) == 1, "the second video was in use"
        assert len(list(Path("cache").rglob("*.safetensors"))) == 1
        assert run((0, 2, 0), (1, 2, 0)) == [0, 0]
        assert not list(assets.rglob("*.*")), "all files are deleted, including those of the killed process"
"""


def test_streamed_dataset_is_encoded_file_by_file(hub, tmp_path):
    root, episodes = tmp_path / "large", [make_episode(number, 5 + number) for number in range(8)]
    starts = np.cumsum([0, *(len(episode) for episode in episodes)]).tolist()
    for file in range(4):
        place = {"first_episode": 2 * file, "first_frame": starts[2 * file]}
        write_file(root, file, episodes[2 * file : 2 * file + 2], fps=10, camera=CAMERA, tasks=TASKS, **place)
    write_metadata(root, fps=10, camera=CAMERA, frame_size=(10, 14), names=NAMES, tasks=TASKS, robot_type="test")
    sizes = on_the_hub(hub, root, "lab/large")
    most = sum(max(size for name, size in sizes.items() if name.endswith(kind)) for kind in (".mp4", ".parquet"))
    assert sum(sizes.values()) > 3 * most
    hub.requests.clear()
    run(hub, tmp_path, ENCODE, str(most))
    fetched = [request.split("/")[-1] for request in hub.requests if request.startswith("GET") and ".mp4" in request]
    assert sorted(fetched) == ["file-000.mp4", "file-001.mp4", "file-001.mp4", "file-002.mp4", "file-003.mp4"]

    clips = LatentClips(next(tmp_path.glob("cache/*")), 5)
    here = LatentClips(cache_latents(LeRobotFolder(root), tiny_vae(), tmp_path / "here"), 5)
    assert list(clips.windows) == list(here.windows)
    for index in range(len(here)):
        assert torch.equal(clips[index]["latents"], here[index]["latents"])
        assert torch.equal(clips[index]["actions"], here[index]["actions"])


def publish_table(hub, folder, episodes, repository, card=True):
    """Publish Parquet files with embedded videos, two episodes per file, as written by `datasets`."""
    files = {}
    features = {"video": {"_type": "Video"}, "actions": {"_type": "List", "feature": {"_type": "List"}}}
    features["actions"]["feature"]["feature"] = {"dtype": "float32", "_type": "Value"}
    for number in range(0, len(episodes), 2):
        videos = [
            write_video(folder / "video.mp4", episode.frames, 10, lossless=True).read_bytes()
            for episode in episodes[number : number + 2]
        ]
        actions = [episode.actions.tolist() for episode in episodes[number : number + 2]]
        table = pa.table({"video": [{"bytes": video, "path": "video.mp4"} for video in videos], "actions": actions})
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        pq.write_table(table, folder / "part.parquet")
        files[f"data/train-{number // 2:05d}.parquet"] = (folder / "part.parquet").read_bytes()
    if card:
        rows = {"name": "train", "num_bytes": 1, "num_examples": len(episodes)}
        files["README.md"] = f"---\ndataset_info:\n  splits:\n  - {json.dumps(rows)}\n---\n".encode()
    hub.commit(f"datasets/{repository}", files)


def test_cached_table_opens_offline(hub, tmp_path):
    publish_table(hub, tmp_path, [make_episode(number, 5 + number) for number in range(3)], "lab/cached")
    read = "from irasim_diffusers.data import open_dataset\n"
    read += "assert [len(episode) for episode in open_dataset('lab/cached')] == [5, 6, 7]"
    run(hub, tmp_path, read)
    hub.requests.clear()
    environment = os.environ | user_environment(hub.endpoint, tmp_path / "hf") | {"HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", read], env=environment, check=True)
    assert not hub.requests


def test_streaming_other_formats_keeps_disk_usage_small(hub, tmp_path):
    episodes = [make_episode(number, 5 + number) for number in range(6)]
    write_v21(tmp_path / "v21", episodes)
    (tmp_path / "v21/videos/chunk-000/left/episode_000001.mp4").unlink()
    on_the_hub(hub, tmp_path / "v21", "lab/v21")
    publish_table(hub, tmp_path, episodes, "lab/table")
    publish_table(hub, tmp_path, episodes, "lab/uncounted", card=False)
    hub.requests.clear()
    run(
        hub,
        tmp_path,
        """
        import os
        from pathlib import Path
        from irasim_diffusers.data import open_dataset

        def error_of(action):
            try:
                action()
            except ValueError as error:
                return str(error)

        home = Path(os.environ["HF_HOME"])
        def sizes(pattern="*"):
            return [path.stat().st_size for path in home.rglob(pattern) if path.is_file()]

        source = open_dataset("lab/v21", ["left", "right"], streaming=True)
        for number in (0, 2, 3, 4, 5):
            assert len(source[number]) == 5 + number
            assert source.window(number, 2, 3).frames.shape == (3, 20, 14, 3)
            assert len(sizes("*.mp4")) == 2, "one file per camera"
        assert "episode 1 of 'lab/v21': 'videos/chunk-000/left/episode_000001.mp4' does not exist on the Hub" in error_of(
            lambda: source[1]
        )
        del source
        assert not sizes("*.mp4")

        before = sum(sizes())
        table = open_dataset("lab/table", streaming=True)
        assert table.identity["fingerprint"].startswith("lab/table at ")
        assert [len(episode) for episode in table] == [5, 6, 7, 8, 9, 10]
        assert np.array_equal(table.window(1, 2, 3).frames, table[1].frames[2:5])  # back to the start
        assert table.vectors(4)["action"].shape == (9, 3)
        assert sum(sizes()) - before < 2000, "only the card is stored"
        assert "`max_episodes` (--max_train_episodes) must be given" in error_of(lambda: open_dataset("lab/uncounted", streaming=True))
        assert len(open_dataset("lab/uncounted", streaming=True, max_episodes=6)[5]) == 10
        beyond = open_dataset("lab/uncounted", streaming=True, max_episodes=7)
        assert "the dataset has only 6 rows" in error_of(lambda: beyond[6])
        """,
    )
