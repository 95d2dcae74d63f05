"""Distributed, resumable evaluation from clips to report."""

from __future__ import annotations

import hashlib
import json
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from tqdm.auto import tqdm

from ..data import EpisodeSource
from ..files import temporary_path, write_text
from ..json_files import read_json_object
from ..metrics import (
    Counterfactuals,
    counterfactual_actions,
    fid,
    future_errors,
    fvd,
    motion,
    sensitivity_maps,
    summarise_faithfulness,
)
from ..version import INSTALL
from .predictors import ClipData, ClipReader, FolderPredictor, Prediction, WorldModelPredictor, save_prediction
from .protocols import Clip, EvaluationProtocol, find_clips, published_figures
from .report import summarise, write_report
from .results import check_result_folder, has_types, read_result
from .scores import Backbones, features_of_clip, score_clip

MAPS = 8
"""Maximum number of clips over which the sensitivity is averaged."""
ERRORS = {"errors": list, "motion": float}
"""Entries of the file that contains the errors of a clip under other actions."""


@dataclass(frozen=True)
class Evaluation:
    """Arguments of an evaluation.

    Args:
        dataset: The dataset.
        protocol: Defines which clips are predicted, and how they are compared.
        predictor: Source of the predictions.
        output: Folder of the report and of the metrics of each clip.
        num_clips: Maximum number of clips, evenly spaced; None for all.
        batch_size: Number of clips per batch; whole episodes are predicted one by one.
        seed: Seed of shuffling and bootstrap. The predictor has its own seed of the noise.
        encode: Function from frames to latents for latent L2; see `score_clip`.
        backbones: Pretrained networks of LPIPS, FID and FVD.
        faithfulness_clips: Maximum number of clips of the faithfulness report, which requires a world model and clips of
            equal length; 0 or 1 omits the report.
        ways: Number of action sequences in the identification test, limited to the number of its clips.
        skip_broken: Skip episodes that cannot be read and list them in the report, instead of raising an error.
        save_predictions: Folder for the predictions, in the format of `FolderPredictor`.
        save_truth: Folder for the true frames, in the format of `FolderPredictor`, for a preference study.
        published: Dataset whose results in the paper are shown for comparison.
        setting: Further JSON-serializable entries of the report. An output folder with other settings is not accepted.
        unchecked: Further entries of the report that may differ when an evaluation is resumed, such as the command and versions.
    """

    dataset: EpisodeSource
    protocol: EvaluationProtocol
    predictor: WorldModelPredictor | FolderPredictor
    output: Path
    num_clips: int | None = None
    batch_size: int = 8
    seed: int = 0
    encode: Callable[[np.ndarray], Any] | None = None
    backbones: Backbones = field(default_factory=Backbones)
    faithfulness_clips: int = 200
    ways: int = 4
    skip_broken: bool = False
    save_predictions: Path | None = None
    save_truth: Path | None = None
    published: str | None = None
    setting: dict[str, Any] = field(default_factory=dict)
    unchecked: dict[str, Any] = field(default_factory=dict)


def evaluate(evaluation: Evaluation) -> dict[str, Any]:
    """Run an evaluation and write its report; see `examples/evaluation.md`.

    Under `accelerate launch`, the processes share the batches, and the first process summarizes the metrics. Running the same
    command again resumes the evaluation.

    Returns:
        The report, as in `report.json`; empty in all processes but the first one.

    Raises:
        ValueError: If an argument is invalid, a package is missing, a prediction or (without `skip_broken`) an episode cannot be
            read, no clip can be read, frames have the wrong size, or the output folder contains another evaluation or other files.
    """
    state, output = PartialState(), evaluation.output
    _check(evaluation)
    broken: dict[int, str] = {}
    clips = find_clips(
        evaluation.dataset, evaluation.protocol, evaluation.num_clips, broken if evaluation.skip_broken else None
    )
    setting = _setting(evaluation, len(clips))
    reader = ClipReader(evaluation.dataset, clips)
    if not evaluation.skip_broken:
        _check_clip(evaluation, reader(0))
    if state.is_main_process:
        check_result_folder(output, setting, "figures", _own_files(evaluation))
        write_text(output / "clips.json", json.dumps([asdict(clip) for clip in clips]))
    state.wait_for_everyone()
    _score(evaluation, reader, setting)
    state.wait_for_everyone()
    figures = [read_json_object(_figures(output, clip), finite=True) for clip in clips]
    broken |= {clip.episode: one["error"] for clip, one in zip(clips, figures, strict=True) if "error" in one}
    scored = [number for number, one in enumerate(figures) if "error" not in one]
    if not scored:
        raise ValueError(f"no clip of {evaluation.dataset.name!r} can be read: {next(iter(broken.values()))}")
    chosen = _faithfulness_clips(evaluation, scored)
    others = _measure_faithfulness(evaluation, reader, chosen)
    state.wait_for_everyone()
    report: dict[str, Any] = {}
    if state.is_main_process:
        report = summarise(
            [figures[number] for number in scored], evaluation.protocol, evaluation.seed, evaluation.published
        )
        report |= {"distances": _distances(output, [clips[number] for number in scored], evaluation.backbones)}
        if evaluation.skip_broken:
            report["skipped_episodes"] = [{"episode": number, "error": broken[number]} for number in sorted(broken)]
        if others is not None:
            report["faithfulness"] = _summarise_faithfulness(evaluation, clips, chosen)
        report["setting"] = setting | evaluation.unchecked
        write_report(report, output, clips, reader, evaluation.predictor)
    state.wait_for_everyone()
    return report


def _check(evaluation: Evaluation) -> None:
    """Check arguments and packages before any work."""
    for package, name in (("skimage", "scikit-image"), ("matplotlib", "matplotlib")):
        if find_spec(package) is None:
            raise ValueError(f"an evaluation requires {name}: {INSTALL.format('evaluation')}.")
    if evaluation.ways < 2:
        raise ValueError(f"`ways` must be at least 2, got {evaluation.ways}.")
    if evaluation.published is not None:
        published_figures(evaluation.protocol, evaluation.published)
    if (evaluation.backbones.inception or evaluation.backbones.i3d) and evaluation.protocol.predicted is None:
        raise ValueError(
            f"FID and FVD require clips of equal length, but the clips of {evaluation.protocol.name} have different lengths: omit "
            "`inception` (--inception) and `i3d` (--i3d)."
        )


def _check_clip(evaluation: Evaluation, data: ClipData) -> None:
    """Check the first clip before anything is written or a progress bar appears."""
    _check_size(evaluation.protocol, data.frames)
    if isinstance(evaluation.predictor, WorldModelPredictor):
        evaluation.predictor.check_clip(data)
    else:
        evaluation.predictor.path(data.clip)


def _setting(evaluation: Evaluation, num_clips: int) -> dict[str, Any]:
    backbones = evaluation.backbones
    measured = {name: getattr(backbones, name) is not None for name in ("lpips", "inception", "i3d")}
    identity = json.dumps(evaluation.dataset.identity, default=str, sort_keys=True)
    return evaluation.setting | {
        "protocol": evaluation.protocol.name,
        "data": hashlib.sha256(identity.encode()).hexdigest()[:16],
        "num_clips": num_clips,
        "batch_size": evaluation.batch_size,
        "seed": evaluation.seed,
        "latent_l2": evaluation.encode is not None,
        "backbones": measured,
        "faithfulness_clips": evaluation.faithfulness_clips,
        "ways": evaluation.ways,
    }


def _score(evaluation: Evaluation, reader: ClipReader, setting: dict[str, Any]) -> None:
    """Predict and score the clips of this process.

    Finished clips are predicted again together with the missing clips of their batch, because the results of a GPU depend on the
    batch.
    """
    size = evaluation.batch_size if evaluation.protocol.predicted is not None else 1
    indices = range(len(reader.clips))
    batches = [indices[first : first + size] for first in range(0, len(indices), size)]
    for batch in _share(batches, "clips", "clip"):
        missing = [index for index in batch if not _is_finished(evaluation, reader.clips[index])]
        if not (readable := _read_clips(evaluation, reader, missing, setting)):
            continue
        finished = _read_clips(evaluation, reader, [index for index in batch if index not in missing], setting)
        data = [one for _, one in sorted((readable | finished).items())]
        for one in data:
            _check_size(evaluation.protocol, one.frames)
        predictions = evaluation.predictor.predict(data)
        for one, prediction in zip(data, predictions, strict=True):
            if one.number in readable:
                _score_clip(evaluation, one, prediction, setting)


def _read_clips(
    evaluation: Evaluation, reader: ClipReader, indices: Sequence[int], setting: dict[str, Any]
) -> dict[int, ClipData]:
    """Read clips by index.

    With `skip_broken`, the error of a broken clip is written in place of its metrics.
    """
    data = {}
    for index in indices:
        try:
            data[index] = reader(index)
        except ValueError as error:
            if not evaluation.skip_broken:
                raise
            clip = reader.clips[index]
            tqdm.write(f"skipped clip {clip.name}: {error}")
            _write_figures(evaluation, clip, {"name": clip.name, "error": str(error)}, setting)
    return data


def _score_clip(evaluation: Evaluation, data: ClipData, prediction: Prediction, setting: dict[str, Any]) -> None:
    """Write prediction, features and metrics of one clip."""
    clip, output = data.clip, evaluation.output
    if evaluation.save_predictions is not None:
        save_prediction(evaluation.save_predictions, clip, prediction)
    if evaluation.save_truth is not None:
        save_prediction(evaluation.save_truth, clip, Prediction(data.truth))
    features = features_of_clip(data, prediction, evaluation.protocol, evaluation.backbones)
    if features:
        with temporary_path(_features(output, clip)) as partial_path:
            np.savez(partial_path, **features)  # type: ignore[arg-type]
    figures = score_clip(data, prediction, evaluation.protocol, evaluation.encode, evaluation.backbones)
    entry = {"name": clip.name, "file": _file_stamp(evaluation, clip)} | figures
    _write_figures(evaluation, clip, entry, setting)


def _write_figures(evaluation: Evaluation, clip: Clip, entry: dict[str, Any], setting: dict[str, Any]) -> None:
    """Write the metrics of a clip; the first one also writes the settings."""
    check_result_folder(evaluation.output, setting, "figures", write=True)
    write_text(_figures(evaluation.output, clip), json.dumps(entry))


def _is_finished(evaluation: Evaluation, clip: Clip) -> bool:
    """Check whether the metrics of a clip are complete and up to date with its prediction file."""
    saved = [each / f"{clip.name}.npz" for each in (evaluation.save_predictions, evaluation.save_truth) if each]
    if not all(path.is_file() for path in saved):
        return False
    types: dict[str, type] = {"psnr": list, "ssim": list, "clip_psnr": float}
    optional: dict[str, type] = {"latent_l2": float} if evaluation.encode is not None else {}
    optional |= {"lpips": list} if evaluation.backbones.lpips is not None else {}
    found = read_result(_figures(evaluation.output, clip), {"name": str, "last_frame": dict} | types | optional)
    if found is None or found["name"] != clip.name or not has_types(found["last_frame"], types):
        return False
    lists = [
        each[name] for each in (found, found["last_frame"]) for name, expected in types.items() if expected is list
    ]
    if any(len(values) != clip.predicted for values in lists):
        return False
    stamp = _file_stamp(evaluation, clip)
    return stamp is None or found.get("file") == stamp


def _own_files(evaluation: Evaluation) -> set[str]:
    """Return the names in the output folder that an interrupted run may have left."""
    saved = [each for each in (evaluation.save_predictions, evaluation.save_truth) if each is not None]
    inside = [
        each.absolute().relative_to(evaluation.output.absolute()) for each in saved if _is_inside(each, evaluation)
    ]
    return {"clips.json", "features", *(each.parts[0] for each in inside if each.parts)}


def _is_inside(folder: Path, evaluation: Evaluation) -> bool:
    return folder.absolute().is_relative_to(evaluation.output.absolute())


def _file_stamp(evaluation: Evaluation, clip: Clip) -> list[Any] | None:
    """Return name, size and time of a clip's prediction file, to detect changes; None for a world model."""
    if not isinstance(evaluation.predictor, FolderPredictor):
        return None
    path = evaluation.predictor.path(clip)
    return [path.name, path.stat().st_size, path.stat().st_mtime_ns]


def _share(batches: Sequence[Sequence[int]], description: str, unit: str) -> Iterator[Sequence[int]]:
    """Yield the batches of this process, with a progress bar on the first process.

    The batches, and so the metrics, do not depend on the number of processes.
    """
    state = PartialState()
    own = batches[state.process_index :: state.num_processes]
    with tqdm(total=sum(map(len, own)), desc=description, unit=unit, disable=not state.is_main_process) as bar:
        for batch in own:
            yield batch
            bar.update(len(batch))


def _faithfulness_clips(evaluation: Evaluation, scored: Sequence[int]) -> list[int]:
    """Choose the clips of the faithfulness report, evenly spaced; none if it is not possible."""
    possible = isinstance(evaluation.predictor, WorldModelPredictor) and evaluation.protocol.predicted is not None
    count = min(evaluation.faithfulness_clips, len(scored)) if possible else 0
    places = np.linspace(0, len(scored) - 1, count if count >= 2 else 0).round().astype(int)
    return [scored[place] for place in places]


def _measure_faithfulness(evaluation: Evaluation, reader: ClipReader, chosen: Sequence[int]) -> Counterfactuals | None:
    """Write the errors under other actions and the sensitivity maps of the chosen clips of this process."""
    if not chosen:
        return None
    predictor: Any = evaluation.predictor
    last_frames, actions, holds = [], [], []
    for data in map(reader, chosen):
        last_frames.append(data.history[-1].copy())  # a view would keep the whole episode in memory
        actions.append(data.actions)
        holds.append(predictor.hold(data))
    ways = min(evaluation.ways, len(chosen))
    others = counterfactual_actions(np.stack(last_frames), np.stack(actions), np.stack(holds), ways, evaluation.seed)
    steps = others.true.std(axis=(0, 1))
    for (place,) in _share([[place] for place in range(len(chosen))], "other actions", "clip"):
        clip = reader.clips[chosen[place]]
        errors, maps = _errors(evaluation.output, clip), _map(evaluation.output, clip)
        if read_result(errors, ERRORS) is not None and (place >= MAPS or _is_array(maps)):
            continue
        data = reader(chosen[place])
        predict = partial(_futures, predictor, data)
        if place < MAPS:
            with temporary_path(maps) as partial_map:
                np.save(partial_map, sensitivity_maps(predict, data.history, data.actions, steps))
        found = future_errors(predict, data.history, others.of_clip(place), data.truth)
        write_text(errors, json.dumps({"errors": found.tolist(), "motion": motion(data.history[-1], data.truth)}))
    return others


def _futures(predictor: WorldModelPredictor, data: ClipData, _: np.ndarray, sequences: np.ndarray) -> torch.Tensor:
    """Predict the futures of a clip, with the arguments of `metrics.faithfulness.Predict`."""
    return predictor.futures(data, sequences)


def _summarise_faithfulness(evaluation: Evaluation, clips: Sequence[Clip], chosen: Sequence[int]) -> dict[str, Any]:
    found = [read_json_object(_errors(evaluation.output, clips[number]), finite=True) for number in chosen]
    errors, motions = (np.array([one[name] for one in found]) for name in ("errors", "motion"))
    summary = summarise_faithfulness(errors, motions, min(evaluation.ways, len(chosen)), evaluation.seed)
    maps = np.mean([np.load(_map(evaluation.output, clips[number])) for number in chosen[:MAPS]], axis=0)
    with temporary_path(evaluation.output / "sensitivity.npy") as partial_path:
        np.save(partial_path, maps)
    names = evaluation.dataset.component_names("action") or [f"action {index}" for index in range(len(maps))]
    means = {name: float(values.mean() * 255) for name, values in zip(names, maps, strict=True)}
    return summary | {"sensitivity": {"grey_levels_per_deviation": means, "n": len(chosen[:MAPS])}}


def _is_array(path: Path) -> bool:
    """Check whether a file contains a complete array of an earlier run."""
    try:
        return bool(np.isfinite(np.load(path, mmap_mode="r", allow_pickle=False)).all())
    except (OSError, ValueError, EOFError, TypeError):
        return False


def _distances(output: Path, clips: Sequence[Clip], backbones: Backbones) -> dict[str, dict[str, float]]:
    """Compute FID and FVD over all clips, if their networks are given."""
    found: dict[str, dict[str, float]] = {}
    for name, wanted, distance in (("fid", backbones.inception, fid), ("fvd", backbones.i3d, fvd)):
        if wanted is not None:
            pairs = [_read_features(_features(output, clip), name) for clip in clips]
            predicted, true = (np.concatenate(part) for part in zip(*pairs, strict=True))
            found[name] = {"value": distance(predicted, true), "n": len(predicted)}
    return found


def _read_features(path: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Read predicted and true features of one clip; close the file, because there may be thousands."""
    try:
        with np.load(path) as file:
            return file[f"{name}_prediction"], file[f"{name}_truth"]
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{str(path)!r} must contain the features of a clip: {error}; choose a new folder."
        ) from error


def _check_size(protocol: EvaluationProtocol, frames: np.ndarray) -> None:
    if protocol.frame_size not in (None, frames.shape[1:3]):
        raise ValueError(
            f"frames must be {protocol.frame_size} (height, width) for the protocol {protocol.name}, got "
            f"{frames.shape[1:3]}: use data of that size, or resize them with --height and --width."
        )


def _figures(output: Path, clip: Clip) -> Path:
    return output / "figures" / f"{clip.name}.json"


def _features(output: Path, clip: Clip) -> Path:
    return output / "features" / f"{clip.name}.npz"


def _errors(output: Path, clip: Clip) -> Path:
    return output / "faithfulness" / f"{clip.name}.json"


def _map(output: Path, clip: Clip) -> Path:
    return output / "faithfulness" / f"{clip.name}.npy"
