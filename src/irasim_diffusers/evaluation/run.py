"""Distributed, resumable evaluation from clips to report."""

from __future__ import annotations

import hashlib
import json
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
from ..files import temporary_path
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
from .predictors import ClipData, ClipReader, FolderPredictor, PipelinePredictor, Prediction, save_prediction
from .protocols import Clip, Protocol, find_clips, published_figures
from .report import summarise, write_report
from .scores import Backbones, features_of_clip, score_clip

MAPS = 8  # clips of which the sensitivity is averaged


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated, and how.

    Args:
        dataset: The data set.
        protocol: Which clips are predicted, and how they are compared.
        predictor: Where predictions come from.
        output: Folder of the report and of the figures of every clip.
        num_clips: Score that many clips, spread evenly; None for all.
        batch_size: Clips predicted together; whole episodes are predicted one by one.
        seed: Seed of noise, shuffling and bootstrap.
        encode: Latents of frames, for latent L2; see `score_clip`.
        backbones: Pretrained networks of LPIPS, FID and FVD.
        faithfulness_clips: Clips, at most, of the report on obedience to actions, of pipelines and of clips of one length; 0
            leaves it out.
        ways: Action sequences that the identification chooses from.
        save_predictions: Folder for the predictions, for `FolderPredictor`.
        save_truth: Folder for what truly happened, in the same form, for a `PreferenceStudy`.
        published: Data set of the paper's results to show for comparison.
        setting: Further JSON-serialisable entries of the report: names, scheduler, steps. A folder that holds figures of
            another setting is refused.
        unchecked: Further entries that may change when a run is resumed: command and versions.
    """

    dataset: EpisodeSource
    protocol: Protocol
    predictor: PipelinePredictor | FolderPredictor
    output: Path
    num_clips: int | None = None
    batch_size: int = 8
    seed: int = 0
    encode: Callable[[np.ndarray], Any] | None = None
    backbones: Backbones = field(default_factory=Backbones)
    faithfulness_clips: int = 200
    ways: int = 4
    save_predictions: Path | None = None
    save_truth: Path | None = None
    published: str | None = None
    setting: dict[str, Any] = field(default_factory=dict)
    unchecked: dict[str, Any] = field(default_factory=dict)


def evaluate(evaluation: Evaluation) -> dict[str, Any]:
    """Run an evaluation and write its report; see `examples/evaluation.md`.

    Each process of `accelerate launch` takes every n-th batch and writes the figures of each clip; the first one reads them
    all. Running the same command again resumes.

    Returns:
        The report, as in `report.json`.

    Raises:
        ValueError: On bad input, a broken episode, or an output folder that holds another evaluation.
    """
    state, output = PartialState(), evaluation.output
    for package, name in (("skimage", "scikit-image"), ("matplotlib", "matplotlib")):  # before hours of work
        if find_spec(package) is None:
            raise ValueError(f"an evaluation needs {name}: pip install irasim-diffusers[evaluation].")
    if evaluation.ways < 2:
        raise ValueError(f"`ways` must be at least 2, got {evaluation.ways}.")
    if evaluation.published is not None:
        published_figures(evaluation.protocol, evaluation.published)
    if (evaluation.backbones.inception or evaluation.backbones.i3d) and evaluation.protocol.predicted is None:
        raise ValueError("FID and FVD are of short clips: leave them out under irasim-long, as the paper does.")
    clips = find_clips(evaluation.dataset, evaluation.protocol, evaluation.num_clips)
    setting = _setting(evaluation, len(clips))
    if state.is_main_process:
        _claim(output, setting, clips)
    state.wait_for_everyone()
    reader = ClipReader(evaluation.dataset, clips)
    _score(evaluation, reader)
    chosen = _faithfulness_clips(evaluation, clips)
    others = _measure_faithfulness(evaluation, reader, chosen)
    state.wait_for_everyone()
    report: dict[str, Any] = {}
    if state.is_main_process:
        figures = [json.loads(_figures(output, clip).read_text()) for clip in clips]
        report = summarise(figures, evaluation.protocol, evaluation.seed, evaluation.published)
        report |= {"distances": _distances(output, clips, evaluation.backbones)}
        if others is not None:
            report["faithfulness"] = _summarise_faithfulness(evaluation, clips, chosen)
        report["setting"] = setting | evaluation.unchecked
        write_report(report, output, clips, reader, evaluation.predictor)
    state.wait_for_everyone()
    return report


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


def _claim(output: Path, setting: dict[str, Any], clips: Sequence[Clip]) -> None:
    """Make the output folder this evaluation's, or see that it is."""
    path = output / "setting.json"
    if path.is_file() and (output / "figures").is_dir():
        found = json.loads(path.read_text())
        differing = [name for name in setting if found.get(name) != setting[name]]
        if differing:
            first = differing[0]
            raise ValueError(
                f"`output` {str(output)!r} holds the figures of another evaluation; {', '.join(differing)} differ, the first is "
                f"{found.get(first)!r} there and {setting[first]!r} here: choose a new folder."
            )
        return
    _write_json(output / "clips.json", [asdict(clip) for clip in clips])
    _write_json(path, setting)


def _score(evaluation: Evaluation, reader: ClipReader) -> None:
    """Predict and score this process' share of the clips."""
    size = evaluation.batch_size if evaluation.protocol.predicted is not None else 1
    numbers = range(len(reader.clips))
    batches = [numbers[first : first + size] for first in range(0, len(numbers), size)]
    for batch in _share(batches, "clips", "clip"):
        missing = [number for number in batch if not _is_finished(evaluation, reader.clips[number])]
        data = [reader(number) for number in missing]
        for one in data:
            _check_size(evaluation.protocol, one.frames)
        predictions = evaluation.predictor.predict(data) if data else []
        for one, prediction in zip(data, predictions, strict=True):
            if evaluation.save_predictions is not None:
                save_prediction(evaluation.save_predictions, one.clip, prediction)
            if evaluation.save_truth is not None:
                save_prediction(evaluation.save_truth, one.clip, Prediction(one.truth))
            features = features_of_clip(one, prediction, evaluation.protocol, evaluation.backbones)
            if features:
                with temporary_path(_features(evaluation.output, one.clip)) as partial:
                    np.savez(partial, **features)  # type: ignore[arg-type]
            figures = score_clip(one, prediction, evaluation.protocol, evaluation.encode, evaluation.backbones)
            names = {"name": one.clip.name, "file": _file_stamp(evaluation, one.clip)}
            _write_json(_figures(evaluation.output, one.clip), names | figures)


def _is_finished(evaluation: Evaluation, clip: Clip) -> bool:
    """Check whether the metrics of a clip are complete and up to date with its prediction file."""
    figures = _figures(evaluation.output, clip)
    saved = [each / f"{clip.name}.npz" for each in (evaluation.save_predictions, evaluation.save_truth) if each]
    if not all(path.is_file() for path in (figures, *saved)):
        return False
    stamp = _file_stamp(evaluation, clip)
    return stamp is None or json.loads(figures.read_text())["file"] == stamp


def _file_stamp(evaluation: Evaluation, clip: Clip) -> list[Any] | None:
    """Name, size and time of the file that a clip's prediction is read from, by which another one is told."""
    if not isinstance(evaluation.predictor, FolderPredictor):
        return None
    path = evaluation.predictor.path(clip)
    return [path.name, path.stat().st_size, path.stat().st_mtime_ns]


def _share(batches: Sequence[Sequence[int]], description: str, unit: str) -> Iterator[Sequence[int]]:
    """This process' batches, with a bar that counts their clips on the first process.

    Batches do not depend on the number of processes, so that neither do the figures.
    """
    state = PartialState()
    own = batches[state.process_index :: state.num_processes]
    with tqdm(total=sum(map(len, own)), desc=description, unit=unit, disable=not state.is_main_process) as bar:
        for batch in own:
            yield batch
            bar.update(len(batch))


def _faithfulness_clips(evaluation: Evaluation, clips: Sequence[Clip]) -> list[int]:
    """Numbers of the clips whose actions are changed, spread evenly; none where that cannot be."""
    possible = isinstance(evaluation.predictor, PipelinePredictor) and evaluation.protocol.predicted is not None
    count = min(evaluation.faithfulness_clips, len(clips)) if possible else 0
    return [] if count < 2 else np.linspace(0, len(clips) - 1, count).round().astype(int).tolist()


def _measure_faithfulness(evaluation: Evaluation, reader: ClipReader, chosen: Sequence[int]) -> Counterfactuals | None:
    """Errors under other actions, and sensitivity maps, of this process' share of the clips chosen."""
    if not chosen:
        return None
    predictor: Any = evaluation.predictor
    last_frames, actions, holds = [], [], []
    for data in map(reader, chosen):
        last_frames.append(data.history[-1].copy())  # a view would keep the whole episode
        actions.append(data.actions)
        holds.append(predictor.hold(data))
    ways = min(evaluation.ways, len(chosen))
    others = counterfactual_actions(np.stack(last_frames), np.stack(actions), np.stack(holds), ways, evaluation.seed)
    steps = others.true.std(axis=(0, 1))
    for (place,) in _share([[place] for place in range(len(chosen))], "other actions", "clip"):
        clip = reader.clips[chosen[place]]
        errors, maps = _errors(evaluation.output, clip), _map(evaluation.output, clip)
        if errors.is_file():  # written last
            continue
        data = reader(chosen[place])
        predict = partial(_futures, predictor, data)
        if place < MAPS:
            with temporary_path(maps) as partial_map:
                np.save(partial_map, sensitivity_maps(predict, data.history, data.actions, steps))
        found = future_errors(predict, data.history, others.of_clip(place), data.truth)
        _write_json(errors, {"errors": found.tolist(), "motion": motion(data.history[-1], data.truth)})
    return others


def _futures(predictor: PipelinePredictor, data: ClipData, _: np.ndarray, sequences: np.ndarray) -> torch.Tensor:
    """`IRASimPipeline.predict` for one clip, whose history is known."""
    return predictor.futures(data, sequences)


def _summarise_faithfulness(evaluation: Evaluation, clips: Sequence[Clip], chosen: Sequence[int]) -> dict[str, Any]:
    found = [json.loads(_errors(evaluation.output, clips[number]).read_text()) for number in chosen]
    errors, motions = (np.array([one[name] for one in found]) for name in ("errors", "motion"))
    summary = summarise_faithfulness(errors, motions, min(evaluation.ways, len(chosen)), evaluation.seed)
    maps = np.mean([np.load(_map(evaluation.output, clips[number])) for number in chosen[:MAPS]], axis=0)
    with temporary_path(evaluation.output / "sensitivity.npy") as partial:
        np.save(partial, maps)
    names = evaluation.dataset.component_names("action") or [f"action {index}" for index in range(len(maps))]
    means = {name: float(values.mean() * 255) for name, values in zip(names, maps, strict=True)}
    return summary | {"sensitivity": {"grey_levels_per_deviation": means, "n": len(chosen[:MAPS])}}


def _distances(output: Path, clips: Sequence[Clip], backbones: Backbones) -> dict[str, dict[str, float]]:
    """FID and FVD over all clips, where their networks are given."""
    found: dict[str, dict[str, float]] = {}
    for name, wanted, distance in (("fid", backbones.inception, fid), ("fvd", backbones.i3d, fvd)):
        if wanted is not None:
            pairs = [_read_features(_features(output, clip), name) for clip in clips]
            predicted, true = (np.concatenate(part) for part in zip(*pairs, strict=True))
            found[name] = {"value": distance(predicted, true), "n": len(predicted)}
    return found


def _read_features(path: Path, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Features of one clip, predicted and true; the file is closed, for there may be thousands."""
    with np.load(path) as file:
        return file[f"{name}_prediction"], file[f"{name}_truth"]


def _check_size(protocol: Protocol, frames: np.ndarray) -> None:
    if protocol.frame_size not in (None, frames.shape[1:3]):
        raise ValueError(
            f"frames must be {protocol.frame_size} (height, width) under the protocol {protocol.name}, got "
            f"{frames.shape[1:3]}: take data of that size."
        )


def _figures(output: Path, clip: Clip) -> Path:
    return output / "figures" / f"{clip.name}.json"


def _features(output: Path, clip: Clip) -> Path:
    return output / "features" / f"{clip.name}.npz"


def _errors(output: Path, clip: Clip) -> Path:
    return output / "faithfulness" / f"{clip.name}.json"


def _map(output: Path, clip: Clip) -> Path:
    return output / "faithfulness" / f"{clip.name}.npy"


def _write_json(path: Path, content: Any) -> None:
    with temporary_path(path) as partial:
        partial.write_text(json.dumps(content))
