"""Measure how well guards detect plans that exploit the errors of a world model.

    python examples/pusht/guard.py --dataset data/pusht-test --others runs/pusht-convolutional --output runs/guard.json

From states in which the block partly covers the goal, a planner without a guard searches for the actions with the
highest IoU. The frame regressor predicts this IoU from the predicted frames. The simulator then executes the same
actions. A plan exploits the model if the predicted IoU exceeds the true IoU by more than `--margin`. Each guard
measures the spread of the scores of several members; see `Disagreement`. The limit of a guard is the 95 % quantile of
the spread over recorded action sequences, which no planner has optimized. The report contains the recall (fraction of
exploiting plans above the limit), the false-alarm rate (fraction of other plans above the limit) and the area under
the ROC curve (AUC). The same command resumes an interrupted run.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import convolutional  # noqa: F401 - diffusers loads only classes of imported modules
import numpy as np
import torch
from collect import check_states
from simulator import Simulator
from tqdm import tqdm
from train_reward import BLOCK, ious
from transformers import HfArgumentParser

from irasim_diffusers import WorldModel, embedded_checkpoint
from irasim_diffusers.commands import check_output
from irasim_diffusers.data import open_dataset
from irasim_diffusers.envs import load_world_model
from irasim_diffusers.files import write_text
from irasim_diffusers.json_files import read_json_object
from irasim_diffusers.metrics import bootstrap
from irasim_diffusers.planning import CEM, Disagreement, Scoring
from irasim_diffusers.rewards import FrameRegressor
from irasim_diffusers.training import check_ranges, run_script

SCORING = Scoring(batch_size=32)
COVERED = (0.05, 0.8)  # range of the IoU of block and goal in start states


@dataclass
class GuardArguments:
    dataset: str = field(metadata={"help": "held-out LeRobotDataset folder made by collect.py"})
    output: Path = field(metadata={"help": "JSON report to write"})
    reward: str | None = field(
        default=None,
        metadata={
            "help": "folder or Hub id of a FrameRegressor of the IoU (default: the reward of the embedded model)"
        },
    )
    model: str = field(
        default=str(embedded_checkpoint()),
        metadata={"help": "world model in which the planner searches, folder or Hub id"},
    )
    others: list[str] = field(
        default_factory=list,
        metadata={"help": "other world models, folders or Hub ids; for each, one guard compares it with --model"},
    )
    first_seed: int = field(default=1_000_000, metadata={"help": "seed of the first episode of the dataset"})
    num_states: int = field(default=24, metadata={"help": "maximum number of start states, one per episode"})
    horizon: int = field(default=10, metadata={"help": "number of actions of a plan"})
    num_candidates: int = field(default=24, metadata={"help": "number of candidates per iteration"})
    num_iterations: int = field(default=4, metadata={"help": "number of iterations of the cross-entropy method"})
    margin: float = field(
        default=0.1,
        metadata={"help": "excess of the predicted over the true IoU above which a plan exploits the model"},
    )
    seed: int = field(default=0, metadata={"help": "random seed"})


def true_iou(seed: int, actions: np.ndarray) -> float:
    """Return the IoU of block and goal in the simulator after actions (n, 2) from the start of an episode."""
    simulator = Simulator()
    state = simulator.reset(seed)
    for action in actions:
        state = simulator.step(action)
    return float(ious(state.block[None])[0])


def plans_of_episode(number: int, dataset: Any, model: WorldModel, guards: dict, reward: Any, arguments: Any) -> list:
    """Score a recorded and an optimized plan from one state of an episode, in the model and the simulator.

    The list is empty if no state of the episode is suitable.
    """
    episode = dataset[number]
    overlap = ious(episode.states[BLOCK].astype(np.float64))[1 : -arguments.horizon]
    places = np.nonzero((overlap > COVERED[0]) & (overlap < COVERED[1]))[0] + 1
    if not len(places):
        return []
    place = int(np.random.default_rng([arguments.seed, number]).choice(places))
    state = model.start(torch.from_numpy(episode.frames[place - 1 : place + 1]).movedim(-1, 1)[None] / 255, [number])
    recorded = torch.from_numpy(episode.actions[place : place + arguments.horizon]).float()
    search = CEM(
        arguments.horizon,
        arguments.num_candidates,
        arguments.num_iterations,
        num_elites=max(1, arguments.num_candidates // 6),
        num_knots=min(4, arguments.horizon),
        std=2.0,
        scoring=SCORING,
    )
    plans = {"recorded": recorded, "cem": search(model, state, reward, recorded).actions}
    batch = torch.stack(list(plans.values()))
    predicted = SCORING(model, state, batch, reward)
    members = {
        name: torch.stack([SCORING(member, own, batch, reward) for member, own in guard.members(model, state)])
        for name, guard in guards.items()
    }
    rows = []
    for index, (name, plan) in enumerate(plans.items()):
        true = true_iou(arguments.first_seed + number, np.concatenate([episode.actions[:place], plan.numpy()]))
        row = {"plan": name, "before": float(overlap[place - 1]), "predicted": float(predicted[index]), "true": true}
        spread = {guard: float(scores[:, index].std(correction=0)) for guard, scores in members.items()}
        rows.append(row | {"spread": spread})
    return rows


def summarise(plans: list[dict[str, Any]], margin: float, seed: int) -> dict[str, Any]:
    """Summarize the scores of the plans; compute limit, recall, false-alarm rate and AUC of each guard.

    Scores and rates have intervals and counts.
    """
    rng = np.random.default_rng(seed)
    recorded, optimized = ([row for row in plans if (row["plan"] == "recorded") == kind] for kind in (True, False))
    exploits = np.array([row["predicted"] - row["true"] > margin for row in optimized])
    report: dict[str, Any] = {
        name: bootstrap(np.array([row[name] for row in optimized]), rng) for name in ("before", "predicted", "true")
    }
    report["exploits"] = bootstrap(exploits.astype(float), rng)
    report["guards"] = {}
    for guard in plans[0]["spread"]:
        limit = float(np.quantile([row["spread"][guard] for row in recorded], 0.95))
        spread = np.array([row["spread"][guard] for row in optimized])
        figures: dict[str, Any] = {"limit": limit}
        for name, part in (("recall", spread[exploits]), ("false_alarms", spread[~exploits])):
            figures[name] = bootstrap((part > limit).astype(float), rng) if len(part) else None
        if 0 < exploits.sum() < len(exploits):
            figures["auc"] = float((spread[exploits][:, None] > spread[~exploits]).mean())
        report["guards"][guard] = figures
    return report


def main() -> None:
    (arguments,) = HfArgumentParser(GuardArguments).parse_args_into_dataclasses()
    check_ranges(
        arguments,
        not_negative=("first_seed", "seed"),
        at_least_1=("num_states", "horizon", "num_candidates", "num_iterations"),
        positive=("margin",),
    )
    check_output(arguments.output, ".json")
    setting = {name: value for name, value in asdict(arguments).items() if name not in ("output", "num_states")}
    done: dict[str, list] = {}
    report: dict[str, Any] = {}
    if arguments.output.is_file():
        stored = read_json_object(arguments.output)
        if stored.get("setting") != setting:
            raise ValueError(f"`output` {str(arguments.output)!r} was written with other settings: choose a new file.")
        done, report = stored["plans"], stored["report"]
    dataset = open_dataset(arguments.dataset)
    check_states(dataset, states=(BLOCK,))
    model = load_world_model(arguments.model, "cpu")["model"]
    reward = FrameRegressor.from_pretrained(
        arguments.reward or embedded_checkpoint(), subfolder=None if arguments.reward else "reward"
    ).eval()
    guards = {"seeds": Disagreement(num_seeds=4)}
    guards |= {Path(path).name: Disagreement([load_world_model(path, "cpu")["model"]]) for path in arguments.others}
    for number in tqdm(range(len(dataset)), unit="episode"):
        if sum(bool(rows) for rows in done.values()) >= arguments.num_states:
            break
        if str(number) in done:
            continue
        done[str(number)] = plans_of_episode(number, dataset, model, guards, reward, arguments)
        plans = [row for rows in done.values() for row in rows]
        report = summarise(plans, arguments.margin, arguments.seed) if plans else {}
        write_text(arguments.output, json.dumps({"report": report, "setting": setting, "plans": done}, indent=2))
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    run_script(main)
