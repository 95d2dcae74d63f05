import time

import psutil
import pytest
import torch
from fork_server import fork_server
from safetensors.torch import load, save, save_file
from test_lerobot import CAMERA, write_folder
from tiny_models import tiny_vae

from irasim_diffusers.data import LatentClips, LeRobotFolder, cache_latents, write_video

ENCODE = """
import sys, time
from tiny_models import tiny_vae
from irasim_diffusers.data import LeRobotFolder, cache_latents

vae = tiny_vae()
vae.encoder.register_forward_hook(lambda *_: time.sleep(float(sys.argv[1])))
cache_latents(LeRobotFolder("set"), vae, "cache", episodes_per_file=1)
"""


@pytest.fixture
def dataset(tmp_path):
    write_folder(tmp_path / "set", lengths=(5, 9, 7))
    return LeRobotFolder(tmp_path / "set")


@pytest.mark.parametrize("kind", ["file", "loop", "dangling"])
def test_unusable_folder_raises_before_encoding(dataset, tmp_path, kind):
    place, (vae, encoded) = tmp_path / "cache", counting_vae()
    if kind == "file":
        place.touch()
    else:
        place.symlink_to(place if kind == "loop" else tmp_path / "nowhere")
    with pytest.raises(
        ValueError, match=r"`cache_dir` must be a folder that can be created and written, got .*cache'"
    ):
        cache_latents(dataset, vae, place)
    assert not encoded


def test_frames_of_another_size_raise_at_their_episode(dataset, tmp_path):
    video = tmp_path / "set/videos" / CAMERA / "chunk-000/file-001.mp4"
    write_video(video, dataset[2].frames[:, ::2, ::2], 10, lossless=True)
    message = "frames of episode 2 of .*set' must be 10x14 .* like those of earlier episodes, got 5x7: resize all"
    source, flags = LeRobotFolder(tmp_path / "set"), {"episodes_per_file": 1, "frame_size": (10, 14)}
    for _ in range(2):  # also if earlier episodes are already in the cache
        with pytest.raises(ValueError, match=message):
            cache_latents(source, tiny_vae(), tmp_path / "cache", **flags)
    (folder,) = (tmp_path / "cache").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["latents-00000.safetensors", "latents-00001.safetensors"]
    rest = cache_latents(source, tiny_vae(), tmp_path / "cache", skip_broken=True, **flags)
    assert list(LatentClips(rest, 5).episodes) == [0, 1]


def counting_vae():
    vae, encoded = tiny_vae(), []
    vae.encoder.register_forward_hook(lambda _, inputs, __: encoded.append(len(inputs[0])))
    return vae, encoded


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def zero_the_end(path):
    content = path.read_bytes()
    path.write_bytes(content[:-50] + bytes(50))


def swap_for_another_episode(path):
    path.write_bytes(path.with_name("latents-00000.safetensors").read_bytes())


def drop_the_metadata(path):
    path.write_bytes(save(load(path.read_bytes())))


DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "zeros at the end": zero_the_end,
    "one bit": flip_a_bit,
    "text": lambda path: path.write_text("<html>404</html>"),
    "another episode": swap_for_another_episode,
    "no metadata": drop_the_metadata,
}


@pytest.mark.parametrize("complete", [True, False])
def test_only_damaged_files_are_encoded_again(dataset, tmp_path, capfd, complete):
    vae, encoded = counting_vae()
    folder = cache_latents(dataset, vae, tmp_path / "cache", episodes_per_file=1)
    files = sorted(folder.glob("*.safetensors"))
    original = [load(path.read_bytes()) for path in files]
    for name, damage in DAMAGES.items():
        if not complete:
            (folder / "manifest.json").unlink()
        damage(files[1])
        encoded.clear()
        capfd.readouterr()
        assert cache_latents(dataset, vae, tmp_path / "cache", episodes_per_file=1) == folder
        assert encoded == [9], name
        messages = capfd.readouterr().out.splitlines()
        assert messages == [f"{str(files[1])!r} is damaged: its 1 episodes are encoded again."], name
        for path, tensors in zip(files, original, strict=True):
            assert all(torch.equal(tensor, tensors[key]) for key, tensor in load(path.read_bytes()).items()), name
    assert len(LatentClips(folder, 5).episodes) == 3


def test_a_missing_file_is_encoded_again(dataset, tmp_path, capfd):
    vae, encoded = counting_vae()
    folder = cache_latents(dataset, vae, tmp_path / "cache", episodes_per_file=1)
    (folder / "latents-00002.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"cannot read .*latents-00002\.safetensors.*re-run the training, or `cache_latents`"
    ):
        LatentClips(folder, 5)
    encoded.clear()
    cache_latents(dataset, vae, tmp_path / "cache", episodes_per_file=1)
    assert encoded == [7]
    assert "latents-00002.safetensors' is missing: its 1 episodes are encoded again." in capfd.readouterr().out
    assert len(LatentClips(folder, 5).episodes) == 3


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"files": 3}', "\x00\x00"])
def test_a_damaged_manifest_is_written_again(dataset, tmp_path, content, capfd):
    vae, encoded = counting_vae()
    folder = cache_latents(dataset, vae, tmp_path / "cache")
    original = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(content)
    encoded.clear()
    cache_latents(dataset, vae, tmp_path / "cache")
    assert encoded == []
    assert capfd.readouterr().out.splitlines() == [
        f"{str(folder / 'manifest.json')!r} is damaged and is written again."
    ]
    assert (folder / "manifest.json").read_text() == original


def test_damaged_cache_error_names_file_and_remedy(dataset, tmp_path):
    folder = cache_latents(dataset, tiny_vae(), tmp_path / "cache")
    path = folder / "latents-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        ValueError, match=r"cannot read .*latents-00000\.safetensors.*re-run the training, or `cache_latents`"
    ):
        LatentClips(folder, 5)


def test_two_processes_build_one_cache_after_a_kill(dataset, tmp_path):
    """One process is killed while both write; the other one completes the cache."""
    processes = [fork_server().start("-c", ENCODE, seconds, cwd=tmp_path) for seconds in (0.3, 0.5)]
    try:
        while not list(tmp_path.glob("cache/*/latents-*.safetensors")):
            assert all(process.poll() is None for process in processes)
            time.sleep(0.02)
        processes[0].kill()
        assert processes[1].wait(timeout=120) == 0
    finally:
        for process in processes:
            process.kill()
            process.wait()
    vae, encoded = counting_vae()
    folder = cache_latents(dataset, vae, tmp_path / "cache", episodes_per_file=1)
    assert encoded == [], "the cache is complete"
    assert not list(folder.glob(".*")), "no temporary file is left"
    alone = LatentClips(cache_latents(dataset, tiny_vae(), tmp_path / "alone", episodes_per_file=1), 5)
    together = LatentClips(folder, 5)
    assert len(together) == len(alone)
    for index in range(len(alone)):
        assert torch.equal(together[index]["latents"], alone[index]["latents"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "`batch_size` must be at least 1, got 0"),
        ({"episodes_per_file": -1}, "`episodes_per_file` must be at least 1, got -1"),
        ({"num_processes": 0}, "`num_processes` must be at least 1, got 0"),
        ({"process_index": 1}, r"`process_index` must be in \[0, 0\], got 1"),
        ({"scaling_factor": 0}, "`scaling_factor` of the autoencoder must be a number in .*, got 0"),
        ({"scaling_factor": -0.2}, "`scaling_factor` of the autoencoder must be a number in .*, got -0.2"),
        ({"scaling_factor": float("nan")}, "`scaling_factor` of the autoencoder must be a number in .*, got nan"),
        ({"scaling_factor": float("inf")}, "`scaling_factor` of the autoencoder must be a number in .*, got inf"),
        ({"scaling_factor": None}, "`scaling_factor` of the autoencoder must be a number in .*, got None"),
    ],
)
def test_out_of_range_arguments_raise_before_any_work(dataset, tmp_path, options, message):
    vae = tiny_vae()
    if "scaling_factor" in options:
        vae.register_to_config(scaling_factor=options.pop("scaling_factor"))
    with pytest.raises(ValueError, match=message):
        cache_latents(dataset, vae, tmp_path / "cache", **options)
    assert not (tmp_path / "cache").exists()


def test_non_finite_latents_raise(dataset, tmp_path):
    vae = tiny_vae()
    with torch.no_grad():
        vae.quant_conv.bias[0] = 1e6  # exceeds the range of float16
    with pytest.raises(ValueError, match=r"episode 0 of .*: latents of frame 0 are not finite: use float32 weights"):
        cache_latents(dataset, vae, tmp_path / "cache")
    assert not list(tmp_path.glob("cache/*/*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample_frames": 1}, "`sample_frames` must be at least 2, got 1"),
        ({"stride": 0}, "`stride` must be at least 1, got 0"),
        ({"frame_skip": 0}, "`frame_skip` must be at least 1, got 0"),
    ],
)
def test_out_of_range_windows_raise(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        LatentClips(tmp_path, **options)


def test_files_are_memory_mapped(tmp_path):
    """A window of a large cache is read without reading other latents."""
    latents = torch.zeros(4000, 4, 48, 48, dtype=torch.float16)
    save_file({"latents.0": latents, "actions.0": torch.zeros(4000, 2)}, tmp_path / "latents-00000.safetensors")
    (tmp_path / "manifest.json").write_text("{}")
    before = psutil.Process().memory_info().rss
    clips = LatentClips(tmp_path, 16)
    windows = [clips[index] for index in range(0, len(clips), 1000)]
    grown = psutil.Process().memory_info().rss - before
    assert len(windows) == 4
    assert grown < latents.numpy().nbytes / 3
