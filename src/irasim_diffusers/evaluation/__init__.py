"""Evaluation of world models on recorded clips, by named protocols, and of policies in a world model."""

from .policies import (
    Episodes,
    PolicyEvaluation,
    evaluate_policies,
    policies_markdown,
    run_episodes,
    summarise_policies,
)
from .predictors import (
    ClipData,
    ClipReader,
    EvaluationCounter,
    FolderPredictor,
    PipelinePredictor,
    Prediction,
    WorldModelPredictor,
    save_prediction,
)
from .protocols import PROTOCOLS, PUBLISHED_DATASETS, Clip, EvaluationProtocol, find_clips, published_figures
from .report import markdown, summarise, write_report
from .run import Evaluation, evaluate
from .scores import Backbones, features_of_clip, score_clip

__all__ = [
    "PROTOCOLS",
    "PUBLISHED_DATASETS",
    "Backbones",
    "Clip",
    "ClipData",
    "ClipReader",
    "Episodes",
    "Evaluation",
    "EvaluationCounter",
    "EvaluationProtocol",
    "FolderPredictor",
    "PipelinePredictor",
    "PolicyEvaluation",
    "Prediction",
    "WorldModelPredictor",
    "evaluate",
    "evaluate_policies",
    "features_of_clip",
    "find_clips",
    "markdown",
    "policies_markdown",
    "published_figures",
    "run_episodes",
    "save_prediction",
    "score_clip",
    "summarise",
    "summarise_policies",
    "write_report",
]
