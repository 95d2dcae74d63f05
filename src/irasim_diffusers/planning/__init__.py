"""Planners: choose actions by scoring the futures that a world model predicts.

    state = model.start(frames, seeds=[0])
    plan = CEM(horizon=15)(model, state, GoalImage(goal), init=hold_actions)
    robot.execute(plan.actions)

Every planner has the signature `planner(model, state, objective, init=None) -> Plan`. Candidates stay within the bounds of the
action space and are compared under the same noise. `CEM` and `MPPI` sample them in normalized units.
"""

from .planners import CEM, MPPI, Gradient, Rank, straight_lines
from .scoring import Disagreement, NoPlanError, Plan, Scoring

__all__ = ["CEM", "MPPI", "Disagreement", "Gradient", "NoPlanError", "Plan", "Rank", "Scoring", "straight_lines"]
