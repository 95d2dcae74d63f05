"""Latent cache: encode every frame of a dataset once."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from ..files import remove_abandoned, temporary_path
from ..json_files import read_json_object
from ..latents import Autoencoder, check_latent_scaling, encode_images, latent_scaling, unscale_latents
from .content_hash import tensors_hash
from .episode import Episode, EpisodeSource, check_equal_size

FORMAT = 1
"""Version of the cached values; increment it whenever decoding, tiling or resizing changes."""

FRAMES_AT_ONCE = 256
"""Maximum number of frames decoded at a time, unless `batch_size` is larger."""


def cache_latents(
    dataset: EpisodeSource,
    vae: Autoencoder | None,
    cache_dir: str | os.PathLike,
    *,
    batch_size: int = 40,
    mixed_precision: bool = False,
    skip_broken: bool = False,
    recorded: bool = False,
    frame_size: tuple[int, int] | None = None,
    episodes_per_file: int = 50,
    process_index: int = 0,
    num_processes: int = 1,
    wait_for_everyone: Callable[[], None] = lambda: None,
) -> Path:
    """Encode every frame of a dataset once; an interrupted run resumes at the first missing file.

    Files that exist are verified, and damaged ones are encoded again. A file that has not changed since the cache was
    completed is verified by its size and modification time alone, any other file by its checksum.

    Args:
        dataset: The dataset.
        vae: The frozen autoencoder, on the device that encodes. None caches the frames as uint8, for pixel-space models.
        cache_dir: Parent folder of the cache, whose name depends on the dataset, the autoencoder and the options of its content.
        batch_size: Number of frames per call of the autoencoder.
        mixed_precision: Encode under bfloat16 autocast.
        skip_broken: Skip episodes that cannot be read, have no finite latents or another frame size, and list them in the manifest.
        recorded: Use the latents that are stored with the videos (`IRASimFolder`), scaled by the factor of `vae`.
        frame_size: Height and width that the frames of all episodes must have; None accepts any.
        episodes_per_file: Number of episodes per file. A file is the unit of work of a process and of an interrupted run.
        process_index: Index of this process.
        num_processes: Number of processes that encode together. Each encodes its share of the files.
        wait_for_everyone: Barrier of these processes. Every process calls it twice.

    Returns:
        The folder of the cache. Its safetensors files contain `latents.<episode>` (T, C, h, w), float16 and unscaled (uint8 without
        an autoencoder), and `actions.<episode>` (T, A), float32. `manifest.json` lists the files and the errors of broken episodes.

    Raises:
        ValueError: If an argument is invalid, `cache_dir` cannot be created, an episode cannot be read, has no finite latents or
            another frame size and `skip_broken` is False (also if an earlier run skipped it), or no episode is left.
    """
    _check_arguments(vae, recorded, batch_size, episodes_per_file, process_index, num_processes)
    identity = _identity(dataset, vae, recorded, mixed_precision, episodes_per_file)
    folder = _create_folder(cache_dir, dataset, identity)
    manifest = _read_manifest(folder)
    if process_index == 0:
        remove_abandoned(folder)
        if not manifest and (folder / "manifest.json").is_file():
            tqdm.write(f"{str(folder / 'manifest.json')!r} is damaged and is written again.")
    files = _files(folder, len(dataset), episodes_per_file)
    ours = partial(_encode_episode, dataset, vae, batch_size, mixed_precision, frame_size)
    encode = partial(_encode_recorded, dataset, vae) if recorded else ours
    share = [list(files)[index] for index in np.array_split(range(len(files)), num_processes)[process_index]]
    _encode_share({path: files[path] for path in share}, manifest, encode, skip_broken, process_index > 0)
    wait_for_everyone()
    if process_index == 0:
        _write_manifest(folder, files, identity, manifest, vae, len(dataset))
    wait_for_everyone()
    return _checked(folder, skip_broken)


def _create_folder(cache_dir: str | os.PathLike, dataset: EpisodeSource, identity: dict[str, Any]) -> Path:
    """Create the folder of a cache before anything is encoded."""
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(cache_dir) / f"{Path(dataset.name).name}-{digest}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"`cache_dir` must be a folder that can be created and written, got {str(cache_dir)!r}: {error.strerror}."
        ) from error
    return folder


def _files(folder: Path, num_episodes: int, episodes_per_file: int) -> dict[Path, range]:
    """Return the episodes of each file."""
    episodes = range(num_episodes)
    return {
        folder / f"latents-{index:05d}.safetensors": episodes[start : start + episodes_per_file]
        for index, start in enumerate(episodes[::episodes_per_file])
    }


def _encode_share(
    files: dict[Path, range],
    manifest: dict[str, Any],
    encode: Callable[[int], tuple[torch.Tensor, np.ndarray]],
    skip_broken: bool,
    quiet: bool,
) -> None:
    """Encode the files of one process that are missing or damaged."""
    total = sum(map(len, files.values()))
    with tqdm(total=total, desc="caching episodes", unit="episode", disable=quiet) as bar:
        for path in files:
            if _is_intact(path, files[path], manifest.get("files", {})):
                bar.update(len(files[path]))
                continue
            if path.is_file() or manifest:
                state = "damaged" if path.is_file() else "missing"
                bar.write(f"{str(path)!r} is {state}: its {len(files[path])} episodes are encoded again.")
            _write_file(path, *_encode_episodes(files[path], encode, skip_broken, bar))


def _check_arguments(
    vae: Autoencoder | None,
    recorded: bool,
    batch_size: int,
    episodes_per_file: int,
    process_index: int,
    num_processes: int,
) -> None:
    if vae is None and recorded:
        raise ValueError("`recorded` must be False without `vae`: recorded latents require their autoencoder.")
    counts = {"batch_size": batch_size, "episodes_per_file": episodes_per_file, "num_processes": num_processes}
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"`{name}` must be at least 1, got {count}.")
    if not 0 <= process_index < num_processes:
        raise ValueError(f"`process_index` must be in [0, {num_processes - 1}], got {process_index}.")
    if vae is not None:
        check_latent_scaling(vae)


def _identity(
    dataset: EpisodeSource,
    vae: Autoencoder | None,
    recorded: bool,
    mixed_precision: bool,
    episodes_per_file: int,
) -> dict[str, Any]:
    """Return everything that determines the content of the cache, as JSON types."""
    identity = {
        "format": FORMAT,
        "data": dataset.identity,
        "vae": None if vae is None else tensors_hash(vae.state_dict(), torch.float32),
        "recorded": latent_scaling(vae) if vae is not None and recorded else None,
        "mixed_precision": mixed_precision and not recorded and vae is not None,
        "episodes_per_file": episodes_per_file,
    }
    return json.loads(json.dumps(identity))


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest, or an empty one if it is missing or damaged."""
    try:
        content = read_json_object(folder / "manifest.json")
    except ValueError:
        return {}
    return content if isinstance(content.get("files"), dict) else {}


def _write_manifest(
    folder: Path,
    files: Iterable[Path],
    identity: dict[str, Any],
    written: dict[str, Any],
    vae: Autoencoder | None,
    episodes: int,
) -> None:
    """Write the manifest of a complete cache, unless it is equal to `written`, the existing one."""
    name = None if vae is None else str(vae.config.get("_name_or_path") or type(vae).__name__)
    dtype = "uint8" if vae is None else "float16"
    content = identity | {"episodes": episodes, "broken": {}, "autoencoder": name, "dtype": dtype, "files": {}}
    for path in files:
        content["broken"] |= _metadata(path)[1]
        content["files"][path.name] = _file_state(path)
    if content != written:
        with temporary_path(folder / "manifest.json") as temporary:
            temporary.write_text(json.dumps(content, indent=2), encoding="utf-8")


def _is_intact(path: Path, episodes: range, known: dict[str, Any]) -> bool:
    """Return whether a file is complete and undamaged.

    `known` maps file names to their states in the manifest.
    """
    if not path.is_file():
        return False
    if known.get(path.name) == _file_state(path):
        return True
    try:
        checksum, broken = _metadata(path)
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, TypeError, ValueError):
        return False
    found = {name.split(".")[-1] for name in tensors} | set(broken)
    return found == {str(number) for number in episodes} and _checksum(tensors) == checksum


def _file_state(path: Path) -> dict[str, int]:
    """Return the size and modification time of a verified file, which change with the file."""
    status = path.stat()
    return {"size": status.st_size, "modified": status.st_mtime_ns}


def _write_file(path: Path, tensors: dict[str, torch.Tensor], broken: dict[int, str]) -> None:
    """Write the latents and actions of some episodes, the errors of broken ones, and a checksum."""
    metadata = {"checksum": str(_checksum(tensors)), "broken": json.dumps(broken)}
    with temporary_path(path) as temporary:
        save_file(tensors, temporary, metadata=metadata)


def _metadata(path: Path) -> tuple[int, dict[str, str]]:
    """Return the checksum of a file's tensors, and the error messages of its broken episodes by index."""
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    return int(metadata["checksum"]), json.loads(metadata["broken"])


def _checksum(tensors: dict[str, torch.Tensor]) -> int:
    checksum = 0
    for name, tensor in sorted(tensors.items()):
        checksum = zlib.crc32(tensor.numpy().data, zlib.crc32(name.encode(), checksum))
    return checksum


def _checked(folder: Path, skip_broken: bool) -> Path:
    """Return the folder of a cache.

    Raises:
        ValueError: If the cache contains no episode, or episodes are broken and `skip_broken` is False.
    """
    content = read_json_object(folder / "manifest.json")
    broken = content["broken"]
    if len(broken) == content["episodes"]:
        raise ValueError(f"no episode can be read: {next(iter(broken.values()), 'the dataset is empty.')}")
    if broken and not skip_broken:
        raise ValueError(
            f"{len(broken)} episodes were skipped as broken, the first: {next(iter(broken.values()))} Skip them again with "
            f"`skip_broken` (--skip_broken), or repair them and delete {str(folder)!r}."
        )
    return folder


def _encode_episodes(
    numbers: range,
    encode: Callable[[int], tuple[torch.Tensor, np.ndarray]],
    skip_broken: bool,
    bar: tqdm,
) -> tuple[dict[str, torch.Tensor], dict[int, str]]:
    """Return the latents and actions of some episodes, and the error messages of the broken ones."""
    tensors: dict[str, torch.Tensor] = {}
    broken: dict[int, str] = {}
    for number in numbers:
        try:
            latents, actions = encode(number)
        except ValueError as error:
            if not skip_broken:
                raise
            broken[number] = str(error)
            bar.write(f"skipped: {error}")
        else:
            tensors[f"latents.{number}"] = latents
            tensors[f"actions.{number}"] = torch.from_numpy(np.ascontiguousarray(actions))
        bar.update()
    return tensors, broken


def _encode_episode(
    dataset: EpisodeSource,
    vae: Autoencoder | None,
    batch_size: int,
    mixed_precision: bool,
    frame_size: tuple[int, int] | None,
    number: int,
) -> tuple[torch.Tensor, np.ndarray]:
    """Encode one episode; return latents (T, C, h, w) and actions (T, A)."""
    latents, actions = [], []
    for part in _parts(dataset, number, batch_size):
        if frame_size is not None:
            check_equal_size(frame_size, part.frames, f"episode {number} of {dataset.name!r}")
        latents.append(_encode(vae, part.frames, batch_size, mixed_precision))
        actions.append(part.actions)
    remedy = "use float32 weights, or weights that are stable in half precision"
    return _finite(torch.cat(latents), dataset, number, remedy), np.concatenate(actions)


def _encode_recorded(dataset: EpisodeSource, vae: Autoencoder, number: int) -> tuple[torch.Tensor, np.ndarray]:
    """Return the unscaled latents (T, C, h, w) stored with the video, and actions (T, A) of one episode."""
    latents = dataset.latents(number) if hasattr(dataset, "latents") else None
    if latents is None:
        raise ValueError(
            f"episode {number} of {dataset.name!r} has no recorded latents of its frames: use `recorded=False` (omit "
            "--recorded_latents) to encode the frames."
        )
    unscaled = unscale_latents(vae, latents)
    remedy = "use `recorded=False` (omit --recorded_latents) to encode the frames"
    return _finite(unscaled.half(), dataset, number, remedy), dataset.vectors(number)["action"]


def _finite(latents: torch.Tensor, dataset: EpisodeSource, number: int, remedy: str) -> torch.Tensor:
    """Return latents (T, C, h, w) unchanged; raise ValueError if a value is not finite."""
    finite = torch.isfinite(latents).flatten(1).all(1)
    if not finite.all():
        frame = int(torch.nonzero(~finite)[0])
        raise ValueError(f"episode {number} of {dataset.name!r}: latents of frame {frame} are not finite: {remedy}.")
    return latents


def _parts(dataset: EpisodeSource, number: int, batch_size: int) -> Iterator[Episode]:
    """Yield an episode, divided into whole batches if it is long, because its frames may be large."""
    length, size = len(dataset.vectors(number)["action"]), max(FRAMES_AT_ONCE // batch_size, 1) * batch_size
    if length <= size:
        yield dataset[number]
    else:
        for start in range(0, length, size):
            yield dataset.window(number, start, min(size, length - start))


@torch.no_grad()
def _encode(vae: Autoencoder | None, frames: np.ndarray, batch_size: int, mixed_precision: bool) -> torch.Tensor:
    """Encode frames (T, H, W, 3), uint8, to latents (T, C, h, w), float16.

    Without `vae`, the frames (T, 3, H, W) themselves are returned.
    """
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)
    if vae is None:
        return pixels.contiguous()
    latents = []
    for batch in pixels.split(batch_size):
        batch = batch.to(vae.device).to(vae.dtype) / 127.5 - 1
        with torch.autocast(vae.device.type, torch.bfloat16, enabled=mixed_precision):
            latents.append(encode_images(vae, batch).to("cpu", torch.float16))
    return torch.cat(latents).contiguous()
