"""Jobs of the Push-T study: episodes in the simulator, in which planners see predicted frames only.

The simulator executes the actions and measures the outcome. Policies observe the simulator's frame and the position of
the pusher, as on a real robot. World models start from the simulator's frames. Only `SimulatorModel`, the upper bound,
starts from its state.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from collect import TASKS
from expert import outline
from poses import UNIT, read_poses
from simulator import ARENA, SUCCESS, Simulator, State, push_about
from simulator_model import SimulatorModel
from study_models import CoverageScore, Progress, Solved, load_model, load_policy, load_reward

from irasim_diffusers.data import LeRobotFolder, write_video
from irasim_diffusers.envs import WorldModelVectorEnv
from irasim_diffusers.evaluation import PolicyEvaluation, evaluate_policies
from irasim_diffusers.json_files import read_json
from irasim_diffusers.planning import CEM, Disagreement, Gradient, Plan, Rank, Scoring, straight_lines
from irasim_diffusers.policies import ChunkPolicy, PlannerPolicy, Policy
from irasim_diffusers.rewards import GoalImage, pretrained_encoder
from irasim_diffusers.rollout import roll
from irasim_diffusers.training import exit_without_extra

try:
    import gymnasium
    import shapely
except ModuleNotFoundError as error:
    exit_without_extra(error, "pusht")

HISTORY = 2  # history frames of the world models
SIMULATOR = "simulator"  # value of `model` for the upper bound, instead of the folder of a world model
POSITION, ANGLE = 20.0, np.pi / 9  # tolerances of DINO-WM's protocol, arena units and radians
PUSHED, TURNED = 10.0, np.pi / 18  # tolerances of a push to a goal image, arena units and radians
MOVED = 20.0  # minimum movement of the block toward a goal image, arena units
OUTSIDE = 8.0  # smallest depth of an implausible pose in a wall or in the block, arena units; 1.5 pixels


def evaluate_policy(
    *, model: str, base: str, policy: str, rewards: str, threshold: float, seeds: list[int], steps: int, output: str
) -> list[dict[str, Any]]:
    """Run a policy from the same starts in the simulator and in a world model; return the outcomes."""
    rows = min(10, len(seeds))
    real = gymnasium.make_vec(
        "gym_pusht:gym_pusht/PushT-v0",
        rows,
        vectorization_mode="sync",
        obs_type="pixels_agent_pos",
        max_episode_steps=steps,
    )
    environment = WorldModelVectorEnv(
        num_envs=rows,
        reward=CoverageScore(rewards),
        success=Solved(rewards, threshold),
        clip_actions=True,
        max_episode_steps=steps,
        autoreset_mode="Disabled",
        **load_model(model, base),
    )
    network, name = load_policy(policy), Path(policy).name
    actor = ChunkPolicy(lambda observation: network.sample(observation)[:, 0], environment.model.action_space, 8)
    evaluate_policies(PolicyEvaluation({name: actor}, real, environment, Path(output), seeds, steps, num_videos=1))
    folder = Path(output) / "episodes" / name
    return [read_json(folder / f"{seed}.json") for seed in seeds]


def plan_episode(
    *,
    method: str,
    model: str,
    base: str,
    policy: str,
    rewards: str,
    num_candidates: int,
    horizon: int,
    steps: int,
    seed: int,
    guard: str | None = None,
    video: str | None = None,
) -> dict[str, Any]:
    """Run one episode in the simulator with a planner that chooses among samples of a policy.

    Args:
        method: `policy`, `random` (one of the samples), `rank`, or `optimise` (`rank`, then gradient ascent from the best).
        model: Folder of a world model, or `simulator`.
        base: Folder of the pretrained pipeline.
        policy: Folder of the policy.
        rewards: Folder of the reward networks.
        num_candidates: Number of samples K.
        horizon: Number of actions that are predicted and then executed.
        steps: Length of the episode.
        seed: Seed of the start and of the samples.
        guard: Folder of a second world model that must agree with the first; None for no guard.
        video: Path of a video to write; None for no video.

    Returns:
        `score` (largest coverage divided by 0.95, at most 1), `iou` (maximum of the episode), `iou_stopped` (maximum until the
        first success), `success` (0 or 1), and `seconds` per decision.
    """
    real, generator = Simulator(), torch.Generator().manual_seed(seed)
    state, network = real.reset(seed), load_policy(policy)

    def propose(observation: Any) -> torch.Tensor:
        chunks = network.sample(observation, num_candidates, generator)[0, :, :horizon]
        choice = int(torch.randint(num_candidates, (1,), generator=generator))
        return chunks if method in ("rank", "optimise") else chunks[None, choice]

    world = world_of(model, base, real)
    if method in ("rank", "optimise"):
        scoring = Scoring(guard=None if guard is None else Disagreement([world_of(guard, base, real)]))
        planner = Rank(scoring=scoring) if method == "rank" else optimiser(horizon, scoring)
        actor: Policy = PlannerPolicy(world, planner, Progress(rewards), horizon, HISTORY, propose, seed)
    else:
        actor = ChunkPolicy(propose, world.action_space, horizon)
    coverages, frames, seconds = [real.coverage], [real.frame()], 0.0
    for _ in range(steps):
        started = time.perf_counter()
        action = actor.select_action(observation_of(frames[-1], state))[0].numpy()
        seconds += time.perf_counter() - started
        state = real.step(action)
        coverages.append(real.coverage)
        frames.append(real.frame())
    if video:
        write_video(Path(video), np.stack(frames), 10)
    return episode_figures(np.array(coverages)) | {"seconds": seconds * horizon / steps}


def episode_figures(coverages: np.ndarray) -> dict[str, float]:
    """Compute the metrics of an episode from the coverage of the goal at each step (T,)."""
    solved = np.nonzero(coverages > SUCCESS)[0]
    best, stopped = coverages.max(), coverages[: solved[0] + 1].max() if len(solved) else coverages.max()
    return {
        "score": float(min(best / SUCCESS, 1)),
        "iou": float(best / (2 - best)),
        "iou_stopped": float(stopped / (2 - stopped)),
        "success": float(len(solved) > 0),
    }


def world_of(model: str, base: str, real: Simulator) -> Any:
    """Load a world model, or create the upper bound `simulator`, which starts from the state of `real`."""
    loaded = load_model(base if model == SIMULATOR else model, base)["model"]
    return SimulatorModel(real, loaded.action_space) if model == SIMULATOR else loaded


def observation_of(frame: np.ndarray, state: State) -> dict[str, np.ndarray]:
    """Build the observation of a policy from a frame (H, W, 3), uint8, and a state."""
    return {"pixels": frame[None], "agent_pos": state.agent[None].astype(np.float32)}


def optimiser(horizon: int, scoring: Scoring) -> Callable[..., Plan]:
    """Create a planner that improves the best candidate by gradient ascent (GPC-RANK+OPT)."""

    def plan(model: Any, state: Any, objective: Any, init: Any = None) -> Plan:
        best = Rank(scoring=scoring)(model, state, objective, init)
        return Gradient(horizon, num_iterations=3, learning_rate=0.1, scoring=scoring)(
            model, state, objective, best.actions
        )

    return plan


def push_to_image(
    *, model: str, base: str, rewards: str, encoder: str | None, num_candidates: int, seed: int
) -> dict[str, Any]:
    """Rank straight-line candidates by a goal image, and execute the five best (paper, appendix 12).

    All lines start from the same state. The goal image shows the result of a push along a random line that is not
    among the candidates.

    Returns:
        Fractions of lines that reach the goal: `mse` and `features` of the five best, ranked by mean squared error or by
        features, and `random` of all candidates. Empty if none of the lines for the goal image moves the block.
    """
    real, rng = Simulator(), np.random.default_rng(seed)
    frames, state = contact(real, rng, seed)
    world, exact = world_of(model, base, real), world_of(SIMULATOR, base, real)
    start = exact.start(None, [seed])

    def outcomes(lines: torch.Tensor) -> np.ndarray:
        (_, latents), *_ = roll(exact, start.repeat(len(lines)), lines)
        return latents[:, 4:7, -1, 0, 0].numpy()  # (K, 3), pose of the block

    lines = straight_lines(world.action_space, 8, 100.0, num_candidates, state.agent, seed=seed)
    hidden = straight_lines(world.action_space, 8, 100.0, 16, state.agent, seed=seed + 1)
    ends = outcomes(hidden)
    moving = np.nonzero(np.linalg.norm(ends[:, :2] - state.block[:2], axis=1) > MOVED)[0]
    if not len(moving):
        return {}
    goal = ends[moving[0]]
    (_, latents), *_ = roll(exact, start, hidden[moving[:1]])
    image = exact.decode(latents[:, :, -1:])[0, 0]
    reached = pushed_to(outcomes(lines), goal)
    features = load_reward(f"{rewards}/closeness").features if encoder is None else pretrained_encoder(encoder)
    found = {"random": float(reached.mean())}
    for name, objective in (("mse", GoalImage(image)), ("features", GoalImage(image, features))):
        state_of_model = world.start(np.stack(frames), [seed])
        plan = Rank()(world, state_of_model, objective, lines)
        order = plan.scores.argsort(descending=True, stable=True)[:5]
        found[name] = float(reached[order.numpy()].mean())
    return found


def contact(real: Simulator, rng: np.random.Generator, seed: int) -> tuple[list[np.ndarray], State]:
    """Push the block at random for more than 20 steps, until it moves, but at most 200 steps.

    Returns the last frames and the state.
    """
    state = real.reset(seed)
    pusher = push_about(rng, state)
    action, frames = next(pusher), [real.frame()]
    for step in range(200):
        before, state = state, real.step(action)
        frames = [*frames, real.frame()][-HISTORY:]
        if step > 20 and np.linalg.norm(state.block[:2] - before.block[:2]) > 2:
            break
        action = pusher.send(state)
    return frames, state


def pushed_to(poses: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """Return whether blocks at poses (K, 3) are within the tolerances of a goal pose (3,)."""
    turn = (poses[:, 2] - goal[2] + np.pi) % (2 * np.pi) - np.pi
    near = np.linalg.norm(poses[:, :2] - goal[:2], axis=1) < PUSHED
    return near & (np.abs(turn) < TURNED)


def reaching_tasks(dataset: Path, kinds: list[str], number: int, ahead: int) -> list[dict[str, int]]:
    """Choose starts (episode and frame), spread evenly over the held-out episodes of some kinds.

    Raises:
        ValueError: If the dataset has no episode of these kinds, or a chosen episode is too short.
    """
    rng = np.random.default_rng(0)
    tasks = [TASKS[kind] for kind in kinds]
    rows = [(index, row) for index, row in enumerate(LeRobotFolder(dataset).rows) if row["tasks"][0] in tasks]
    if not rows:
        raise ValueError(f"{str(dataset)!r} must have episodes of the kinds {kinds}, got none: collect more episodes.")
    chosen = [rows[int(place)] for place in np.linspace(0, len(rows) - 1, number)]
    for index, row in chosen:
        if row["length"] < HISTORY + ahead:
            raise ValueError(
                f"episodes of {str(dataset)!r} must have at least {HISTORY + ahead} frames, got {row['length']} in episode "
                f"{index}: collect longer episodes."
            )
    return [
        {"episode": index, "frame": int(rng.integers(HISTORY - 1, row["length"] - ahead))} for index, row in chosen
    ]


def reach_goal(
    *,
    model: str,
    base: str,
    dataset: str,
    first_seed: int,
    episode: int,
    frame: int,
    ahead: int,
    budget: int,
    num_candidates: int,
    num_iterations: int,
) -> dict[str, Any]:
    """Reach the frame `ahead` steps later in a held-out trajectory by CEM (DINO-WM's protocol).

    An episode succeeds if, at the end of an executed plan, the positions of pusher and block (4 components) are within 20 arena
    units of the goal, and the angle of the block within 20 degrees.

    Returns:
        `success` (0 or 1), `steps`, and `seconds` per plan. Empty if the start is already within the tolerances.
    """
    actions = LeRobotFolder(Path(dataset))[episode].actions
    real, seed = Simulator(), first_seed + episode
    images, states = real.replay(seed, actions[: frame + ahead])
    goal, image = states[-1], images[-1]
    if at_goal(states[frame], goal):
        return {}
    images, states = real.replay(seed, actions[:frame], first_frame=max(frame - HISTORY + 1, 0))
    history, state = list(images), states[-1]
    world = world_of(model, base, real)
    planner = CEM(ahead, num_candidates, num_iterations, max(2, num_candidates // 5), std=2.0, num_knots=min(5, ahead))
    seconds, executed, plans = 0.0, 0, 0
    while executed < budget and not at_goal(state, goal):
        started = time.perf_counter()
        space = world.action_space
        held = space.hold(space.prepare([state.agent])[0, 0]).repeat(1, ahead, 1)
        lines = straight_lines(space, ahead, 150.0, 8, state.agent, seed=plans)
        rollout = world.start(np.stack(history[-HISTORY:]), [seed + plans])
        plan = planner(world, rollout, GoalImage(image), torch.cat([held, lines]))
        seconds += time.perf_counter() - started
        plans += 1
        for action in plan.actions.numpy():
            state = real.step(action)
            history = [*history, real.frame()][-HISTORY:]
            executed += 1
    return {"success": float(at_goal(state, goal)), "steps": executed, "seconds": seconds / plans}


def at_goal(state: State, goal: State) -> bool:
    """Return whether pusher and block are within the tolerances of DINO-WM's protocol."""
    offset = np.concatenate([state.agent - goal.agent, state.block[:2] - goal.block[:2]])
    turn = (state.block[2] - goal.block[2] + np.pi) % (2 * np.pi) - np.pi
    return bool(np.linalg.norm(offset) < POSITION and abs(turn) < ANGLE)


def push_implausibly(*, model: str, base: str, kind: str, steps: int, seed: int) -> dict[str, Any]:
    """Command targets that no body can reach (paper, section 6.4).

    `wall` pushes the block into a wall; `block` puts the target on the other side of the block.

    Returns:
        `model` and `simulator`, each with the values of `violations`.
    """
    rng, real = np.random.default_rng(seed), Simulator()
    real.reset(seed)
    direction = np.array([(1, 0), (-1, 0), (0, 1), (0, -1)][rng.integers(4)], float)
    across = direction[::-1] * rng.uniform(-60, 60)
    center = ARENA / 2 + across + (direction * 110 if kind == "wall" else 0)
    agent = center - direction * 130
    if kind == "wall":  # the target advances to the edge of the arena
        targets = agent + direction * np.minimum(25.0 * np.arange(1, steps + 1), 400)[:, None]
    else:  # the target jumps to the other side
        targets = np.repeat((center + direction * 130)[None], steps, axis=0)
    angle = rng.uniform(0, 2 * np.pi)
    origin = center - 45 * np.array([-np.sin(angle), np.cos(angle)])  # of the block's frame
    real.restore(np.array([*agent, 0, 0, *origin, angle, 0, 0, 0]))
    world = world_of(model, base, real)
    actions = torch.from_numpy(np.clip(targets, 0, ARENA)).float()[None]
    found = {}
    for name, source in ((SIMULATOR, world_of(SIMULATOR, base, real)), ("model", world)):
        with torch.no_grad():
            chunks = roll(source, source.start(real.frame(), [seed]), actions)
            frames = torch.cat([source.decode(latents) for _, latents in chunks], dim=1)[0]
        found[name] = violations(frames.float().cpu().movedim(1, -1).numpy())
    return found


def violations(frames: np.ndarray) -> dict[str, float]:
    """Measure how many frames (T, 96, 96, 3), in [0, 1], show implausible poses.

    Returns:
        `found`: fraction of frames in which both bodies are found; `outside` and `inside`: of these, the fractions in which a
        part of the block is beyond a wall, and in which the pusher is in the block.
    """
    poses = read_poses(frames)
    outside = inside = 0
    for pusher, block in zip(poses.pusher[poses.found], poses.block[poses.found], strict=True):
        angle = block[2]
        origin = (block[:2] + 0.5) / UNIT - 45 * np.array([-np.sin(angle), np.cos(angle)])
        corners = outline(np.array([*origin, angle]))
        outside += bool((corners < -OUTSIDE).any() or (corners > ARENA + OUTSIDE).any())
        inside += bool(shapely.Polygon(corners).buffer(-OUTSIDE).contains(shapely.Point((pusher + 0.5) / UNIT)))
    count = int(poses.found.sum())
    return {"found": count / len(frames), "outside": outside / max(count, 1), "inside": inside / max(count, 1)}
