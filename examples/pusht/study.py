"""Reproduce the paper's Push-T study: policy evaluation and planning in a world model.

See sections 4.2, 4.3, 6.4 and 12 of the paper.

    python examples/pusht/study.py --datasets data/pusht-train data/pusht-expert --test_dataset data/pusht-test \
        --output_dir runs/study --quick

The first stages train diffusion policies of different quality, reward networks, and world models with P policy
rollouts in their training set. The other stages compare each world model with the simulator: policy evaluation,
planning with K candidates, planning with a goal image, goals 25 steps ahead, and implausible actions. At the end, the
report is written. The same command resumes an interrupted run with the same results. A stage that was computed with
other settings raises an error; `--redo STAGE` computes this stage again, and all stages that use its results.
"""

import functools
import multiprocessing
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import study_episodes as episodes
import torch
from collect import check_states, read_settings
from simulator import SUCCESS, Simulator
from study_jobs import fingerprint, remove_stage, run_jobs, run_stage
from study_models import (
    expert_episodes,
    fine_tune,
    run_example,
    success_threshold,
    write_demonstrations,
    write_random_pipeline,
    write_rollouts,
)
from study_report import write_report
from transformers import HfArgumentParser

from irasim_diffusers import embedded_checkpoint
from irasim_diffusers.data import LeRobotFolder
from irasim_diffusers.json_files import read_json
from irasim_diffusers.training import check_output_dir, check_ranges, run_script

SCRIPTS = Path(__file__).parent
EVALUATION_SEED = 5_000_000  # first seed of the policy evaluation; train_policy.py evaluates on other seeds
PLANNING_SEED = 7_000_000  # first seed of the episodes with planners
IMAGE_SEED = 8_000_000  # first seed of the starts with goal images
CONVOLUTIONAL = "convolutional"


@dataclass(frozen=True)
class Size:
    """Amount of work of each stage; the defaults are the full setting, which needs a GPU."""

    policy_stages: tuple[int, ...] = (100, 250, 500, 1000, 1500, 2000, 3000, 4000, 6000, 8000)
    max_demonstrations: int = 200
    reward_steps: int = 6000
    reward_episodes: int = 1500
    reward_clips: int = 100  # held-out clips and episodes on which the reward networks are evaluated
    num_rollouts: tuple[int, ...] = (0, 100, 1000)  # values of P
    rollout_length: int = 120
    world_model_steps: int = 5000
    evaluation_seeds: int = 50
    evaluation_steps: int = 300
    candidates: tuple[int, ...] = (1, 5, 10, 50)  # values of K
    planning_seeds: int = 100
    planning_steps: int = 300
    horizon: int = 8
    optimise: bool = True
    image_seeds: int = 60
    image_candidates: int = 50
    reaching_tasks: int = 50
    reaching_ahead: int = 25  # steps from a start to its goal
    reaching_budget: int = 50  # steps in which the goal must be reached
    reaching_candidates: int = 100
    reaching_iterations: int = 5
    implausible_seeds: int = 50
    implausible_steps: int = 24


QUICK = Size(
    policy_stages=(50, 100, 200, 300, 500, 700, 1000, 1500),
    reward_steps=800,
    reward_episodes=300,
    reward_clips=20,
    num_rollouts=(0, 100),
    world_model_steps=60,
    evaluation_seeds=8,
    evaluation_steps=200,
    candidates=(1, 10),
    planning_seeds=8,
    planning_steps=100,
    image_seeds=10,
    image_candidates=12,
    reaching_tasks=2,
    reaching_candidates=8,
    reaching_iterations=2,
    implausible_seeds=4,
)


@dataclass
class StudyArguments:
    datasets: list[Path] = field(
        metadata={"help": "training LeRobotDataset folders made by collect.py; they must contain expert episodes"}
    )
    test_dataset: Path = field(metadata={"help": "held-out LeRobotDataset folder made by collect.py"})
    output_dir: Path = field(metadata={"help": "folder of all results"})
    quick: bool = field(
        default=False,
        metadata={"help": "small setting, which takes about 30 minutes on two CPU cores with --policies"},
    )
    base_model: Path | None = field(
        default=None, metadata={"help": "pipeline folder that is fine-tuned (default: the embedded model)"}
    )
    from_scratch: bool = field(
        default=False,
        metadata={
            "help": "start all world models from the same random weights. Otherwise P0 has seen failures, because the base model "
            "was trained on random play"
        },
    )
    policies: Path | None = field(
        default=None,
        metadata={
            "help": "folder written by train_policy.py with two or more evaluated stages (default: train policies)"
        },
    )
    rewards: Path | None = field(
        default=None,
        metadata={
            "help": "folder with `iou` and `closeness` of train_reward.py with --test_dataset; missing ones are trained there "
            "(default: train both)"
        },
    )
    convolutional: Path | None = field(
        default=None, metadata={"help": "folder written by convolutional.py that is also compared (default: none)"}
    )
    encoder: str | None = field(
        default=None,
        metadata={
            "help": "vision model of transformers for goal images, such as microsoft/resnet-50 (default: the reward network)"
        },
    )
    evaluation_seeds: int | None = field(
        default=None, metadata={"help": "starts of each policy in the evaluation (default: 50, or 8 with --quick)"}
    )
    planning_seeds: int | None = field(
        default=None, metadata={"help": "starts of each planner (default: 100, or 8 with --quick)"}
    )
    candidates: list[int] = field(
        default_factory=list,
        metadata={"help": "values of K, with at least one above 1 (default: 1 5 10 50, or 1 10 with --quick)"},
    )
    stages: list[str] = field(
        default_factory=list,
        metadata={"help": "stages to run, after the stages whose results they use (default: all)"},
    )
    redo: list[str] = field(
        default_factory=list,
        metadata={"help": "stages to compute again, together with the stages that use their results"},
    )
    num_workers: int = field(
        default_factory=lambda: 1 if torch.cuda.is_available() else multiprocessing.cpu_count(),
        metadata={"help": "number of processes (default: one per CPU core, or one with a GPU)"},
    )
    seed: int = field(default=0, metadata={"help": "random seed"})


@dataclass(frozen=True)
class Study:
    """The stages of the study, with their arguments and sizes."""

    arguments: StudyArguments
    size: Size

    @property
    def base(self) -> Path:
        """Folder of the pretrained pipeline."""
        return self.arguments.base_model or embedded_checkpoint()

    def folder(self, stage: str) -> Path:
        """Folder of a stage."""
        return self.arguments.output_dir / stage

    def run(self, stage: str, work: Callable[[], Any], sizes: list[str], **inputs: Any) -> Any:
        """Return the result of a stage; entries of `Size`, the seed and `inputs` determine it."""
        setting = {name: value for name, value in asdict(self.size).items() if name in sizes}
        return run_stage(self.folder(stage), setting | {"seed": self.arguments.seed} | inputs, work)

    def jobs(self, stage: str, function: Callable[..., Any], jobs: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Run the jobs of a stage; see `run_jobs`."""
        return run_jobs(self.folder(stage), function, jobs, self.arguments.num_workers)

    @functools.cached_property
    def policies(self) -> dict[str, Any]:
        """Stage: policies of different quality, and the policy that planners improve."""
        trained = self.arguments.policies
        root = trained or self.folder("policies") / "training"

        def work() -> dict[str, Any]:
            if trained is None:
                run_example(
                    *(SCRIPTS / "train_policy.py", "--datasets", *self.arguments.datasets, "--output_dir", root),
                    *("--stages", *self.size.policy_stages, "--max_demonstrations", self.size.max_demonstrations),
                    *("--num_episodes", 20, "--seed", self.arguments.seed),
                )
            report = read_json(root / "report.json")
            ious = {name: figures["max_iou"]["mean"] for name, figures in report.items() if name != "setting"}
            if len(ious) < 2:
                raise ValueError(
                    f"`policies` must contain at least two evaluated stages of train_policy.py, got {len(ious)} in {str(root)!r}."
                )
            planned = min(ious, key=lambda name: abs(ious[name] - 0.6))  # the paper's policy has an IoU of 0.637
            paths = {name: str(root / f"checkpoint-{name}") for name in ious}
            return {"paths": paths, "ious": ious, "planned": planned}

        sizes = ["policy_stages", "max_demonstrations"] if trained is None else []
        return self.run("policies", work, sizes, trained=trained and fingerprint_all(trained))

    @functools.cached_property
    def rewards(self) -> dict[str, Any]:
        """Stage: networks that predict IoU and closeness from a frame, and the IoU that counts as success."""
        arguments = self.arguments
        root = arguments.rewards or self.folder("rewards")

        def work() -> dict[str, Any]:
            found: dict[str, Any] = {"folder": str(root)}
            numbers = expert_episodes(arguments.test_dataset)[: self.size.reward_clips]  # before the training
            for target in ("iou", "closeness"):
                if not (root / target / "report.json").is_file():
                    run_example(
                        *(SCRIPTS / "train_reward.py", "--dataset", arguments.datasets[0], "--target", target),
                        *("--test_dataset", arguments.test_dataset, "--output_dir", root / target),
                        *("--model", self.base, "--max_train_steps", self.size.reward_steps),
                        *("--max_episodes", self.size.reward_episodes, "--seed", arguments.seed),
                        *("--num_clips", self.size.reward_clips),
                    )
                found[target] = read_json(root / target / "report.json")
            found["success"] = success_threshold(root / "iou", arguments.test_dataset, numbers)
            return found

        sizes = ["reward_clips", *([] if arguments.rewards else ["reward_steps", "reward_episodes"])]
        trained = arguments.rewards and fingerprint(arguments.rewards)
        return self.run("rewards", work, sizes, base=fingerprint(self.base), trained=trained)

    @functools.cached_property
    def world_models(self) -> dict[str, str]:
        """Stage: folders of the world models `P0`, `P100` and so on, and of a convolutional baseline, if any."""
        root, size, other = self.folder("world_models"), self.size, self.arguments.convolutional

        def work() -> dict[str, str]:
            write_demonstrations(root / "demonstrations", self.arguments.datasets, size.max_demonstrations)
            start, found = self.base, {}
            if self.arguments.from_scratch:
                start = root / "random"
                write_random_pipeline(start, self.base, self.arguments.seed)
            for number in size.num_rollouts:
                datasets, name = [root / "demonstrations"], f"P{number}"
                if number:
                    paths = list(self.policies["paths"].values())
                    write_rollouts(root / f"rollouts-{number}", paths, number, size.rollout_length, size.horizon)
                    datasets.append(root / f"rollouts-{number}")
                if not (root / name / "proprioception").is_dir():
                    fine_tune(
                        root / name, start, datasets, size.world_model_steps, root / "latents", self.arguments.seed
                    )
                found[name] = str(root / name)
            return found | ({CONVOLUTIONAL: str(other)} if other else {})

        sizes = ["num_rollouts", "rollout_length", "world_model_steps", "max_demonstrations", "horizon"]
        return self.run(
            "world_models",
            work,
            sizes,
            base=fingerprint(self.base),
            from_scratch=self.arguments.from_scratch or None,
            policies=self.policies["paths"],
            convolutional=other and fingerprint(other),
        )

    def starts(self, first: int, number: int) -> tuple[list[int], int]:
        """Return seeds of episodes that are not solved at the start, and the number of excluded seeds."""
        simulator, seed = Simulator(), first
        seeds: list[int] = []
        while len(seeds) < number:
            simulator.reset(seed)
            if simulator.coverage <= SUCCESS:
                seeds.append(seed)
            seed += 1
        return seeds, seed - first - number

    def common(self, model: str) -> dict[str, Any]:
        """Return the arguments that every job has."""
        return {"model": self.world_models.get(model, model), "base": str(self.base)}

    def inputs(self) -> dict[str, Any]:
        """Return the fingerprints of all inputs of the comparisons."""
        weights = {name: fingerprint(Path(path)) for name, path in self.world_models.items()}
        return {"world_models": weights, "base": fingerprint(self.base), "planned": self.policies["planned"]} | {
            "rewards": fingerprint(Path(self.rewards["folder"])),
            "policies": {name: fingerprint(Path(path)) for name, path in self.policies["paths"].items()},
        }

    def evaluation(self) -> Any:
        """Stage: run each policy from the same starts in the simulator and in each world model."""
        rewards, folder = self.rewards, self.folder("evaluation")
        seeds, excluded = self.starts(EVALUATION_SEED, self.size.evaluation_seeds)

        def work() -> Any:
            shared = {"rewards": self.rewards["folder"], "threshold": rewards["success"]["threshold"]}
            shared |= {"seeds": seeds, "steps": self.size.evaluation_steps}
            jobs = {
                f"{model}-{name}": self.common(model)
                | shared
                | {"policy": path, "output": str(folder / "episodes" / model / name)}
                for model in self.world_models
                for name, path in self.policies["paths"].items()
            }
            found = self.jobs("evaluation", episodes.evaluate_policy, jobs)
            return {"excluded": excluded, "episodes": found, "models": list(self.world_models)}

        return self.run("evaluation", work, ["evaluation_seeds", "evaluation_steps"], **self.inputs())

    def planning(self) -> Any:
        """Stage: choose among K samples of a policy, with upper bound, baselines, optimization and guard."""
        size, folder, models = self.size, self.folder("planning"), list(self.world_models)
        seeds, excluded = self.starts(PLANNING_SEED, size.planning_seeds)
        planned, most = self.policies["paths"][self.policies["planned"]], max(size.candidates)
        cells: dict[str, dict[str, Any]] = {"policy": {"method": "policy", "model": episodes.SIMULATOR}}
        cells["random"] = {"method": "random", "model": episodes.SIMULATOR, "num_candidates": most}
        for number in (number for number in size.candidates if number > 1):
            for model in [*models, episodes.SIMULATOR]:
                cells[f"{model}-K{number}"] = {"method": "rank", "model": model, "num_candidates": number}
        small = min(number for number in size.candidates if number > 1)
        if size.optimise:
            cells["optimised"] = {"method": "optimise", "model": f"P{size.num_rollouts[-1]}", "num_candidates": small}
        if len(models) > 1:  # the guard compares with the convolutional network, if there is one
            cells["guarded"] = {"method": "rank", "model": models[0], "num_candidates": most, "guard": models[-1]}

        def work() -> Any:
            shared = {"policy": planned, "rewards": self.rewards["folder"], "horizon": size.horizon}
            jobs = {}
            for cell, options in cells.items():
                changes = self.common(options["model"])
                if "guard" in options:
                    changes["guard"] = self.world_models[options["guard"]]
                for seed in seeds:
                    video = str(folder / "videos" / f"{cell}.mp4") if seed == seeds[0] else None
                    jobs[f"{cell}-{seed}"] = (
                        {"num_candidates": 1} | options | shared | changes | {"seed": seed, "video": video}
                    ) | {"steps": size.planning_steps}
            found = self.jobs("planning", episodes.plan_episode, jobs)
            results = {cell: [found[f"{cell}-{seed}"] for seed in seeds] for cell in cells}
            return {"excluded": excluded, "cells": cells, "results": results}

        sizes = ["candidates", "planning_seeds", "planning_steps", "horizon", "optimise"]
        return self.run("planning", work, sizes, **self.inputs())

    def goal_images(self) -> Any:
        """Stage: choose among straight lines by a goal image."""
        size, encoder = self.size, self.arguments.encoder
        models = [*self.world_models, episodes.SIMULATOR]

        def work() -> Any:
            shared: dict[str, Any] = {"rewards": self.rewards["folder"], "encoder": encoder}
            shared["num_candidates"] = size.image_candidates
            jobs = {
                f"{model}-{seed}": self.common(model) | shared | {"seed": seed}
                for model in models
                for seed in range(IMAGE_SEED, IMAGE_SEED + size.image_seeds)
            }
            return {"results": group(self.jobs("goal_images", episodes.push_to_image, jobs))}

        return self.run("goal_images", work, ["image_seeds", "image_candidates"], encoder=encoder, **self.inputs())

    def reaching(self) -> Any:
        """Stage: reach a frame 25 steps ahead in held-out trajectories of the expert and of random pushers."""
        size, dataset = self.size, self.arguments.test_dataset
        settings = read_settings(dataset)
        kinds = {"expert": ["expert", "noisy"], "random": ["aimless", "keys", "jumps"]}
        models = [*self.world_models, episodes.SIMULATOR]

        def work() -> Any:
            shared: dict[str, Any] = {
                "dataset": str(dataset),
                "first_seed": settings["first_seed"],
                "ahead": size.reaching_ahead,
                "budget": size.reaching_budget,
            }
            shared |= {"num_candidates": size.reaching_candidates, "num_iterations": size.reaching_iterations}
            jobs = {}
            for kind, tasks in kinds.items():
                starts = episodes.reaching_tasks(dataset, tasks, size.reaching_tasks, size.reaching_ahead)
                for place, start in enumerate(starts):
                    for model in models:
                        jobs[f"{kind}-{model}-{place}"] = self.common(model) | shared | start
            return {"results": group(self.jobs("reaching", episodes.reach_goal, jobs))}

        sizes = [f"reaching_{name}" for name in ("tasks", "ahead", "budget", "candidates", "iterations")]
        return self.run("reaching", work, sizes, test_dataset=settings, **self.inputs())

    def implausible(self) -> Any:
        """Stage: command targets beyond walls and through the block."""

        def work() -> Any:
            jobs = {
                f"{kind}-{model}-{seed}": self.common(model)
                | {"kind": kind, "steps": self.size.implausible_steps, "seed": seed}
                for kind in ("wall", "block")
                for model in self.world_models
                for seed in range(self.size.implausible_seeds)
            }
            return {"results": group(self.jobs("implausible", episodes.push_implausibly, jobs))}

        return self.run("implausible", work, ["implausible_seeds", "implausible_steps"], **self.inputs())


STAGES = ("policies", "rewards", "world_models", "evaluation", "planning", "goal_images", "implausible", "reaching")
USED_BY = {"policies": STAGES[2:], "rewards": STAGES[3:], "world_models": STAGES[3:]}  # stages that use a result


def group(results: dict[str, Any]) -> dict[str, list[Any]]:
    """Group the results of jobs `<cell>-<number>` by cell."""
    cells: dict[str, list[Any]] = {}
    for name, result in results.items():
        cells.setdefault(name.rsplit("-", 1)[0], []).append(result)
    return cells


def fingerprint_all(folder: Path) -> dict[str, str]:
    """Return the fingerprint of each policy in a folder written by train_policy.py."""
    return {path.name: fingerprint(path) for path in sorted(folder.glob("checkpoint-*"))}


def run_study(arguments: StudyArguments, size: Size) -> None:
    """Run the stages that are not complete, and write the report of all complete stages.

    Raises:
        ValueError: If an argument is out of range, a stage is unknown, `output_dir` cannot be written, an input does not exist or
            lacks required states, episodes or policies, a stage was computed with other settings, or a script fails.
    """
    counts = ("num_workers", "evaluation_seeds", "planning_seeds", "candidates")
    check_ranges(arguments, not_negative=("seed",), at_least_1=counts)
    given = {name: getattr(arguments, name) for name in ("evaluation_seeds", "planning_seeds")}
    given["candidates"] = tuple(sorted(set(arguments.candidates)))
    size = replace(size, **{name: value for name, value in given.items() if value})
    if size.candidates[-1] < 2:
        raise ValueError("`candidates` must contain a number above 1, got only 1.")
    for name in ("stages", "redo"):
        unknown = sorted(set(getattr(arguments, name)) - set(STAGES))
        if unknown:
            raise ValueError(f"`{name}` must be among {', '.join(STAGES)}, got {', '.join(unknown)}.")
    check_output_dir(arguments.output_dir)
    for path in [*arguments.datasets, arguments.test_dataset]:
        if not (path / "meta" / "info.json").is_file():
            raise ValueError(f"{str(path)!r} must be a complete LeRobotDataset folder: create it with collect.py.")
        check_states(LeRobotFolder(path))
    if arguments.policies and not (arguments.policies / "report.json").is_file():
        raise ValueError(
            f"`policies` must be a folder written by train_policy.py with report.json, got {str(arguments.policies)!r}."
        )
    study = Study(arguments, size)
    for name in {later for stage in arguments.redo for later in (stage, *USED_BY.get(stage, ()))}:
        remove_stage(study.folder(name))
    for name in arguments.stages or STAGES:
        stage = getattr(study, name)
        if callable(stage):
            stage()
    write_report(arguments.output_dir, STAGES)


def main() -> None:
    (arguments,) = HfArgumentParser(StudyArguments).parse_args_into_dataclasses()
    run_study(arguments, QUICK if arguments.quick else Size())


if __name__ == "__main__":
    run_script(main)
