"""Evaluation of world models on recorded clips, by named protocols."""

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
    "Evaluation",
    "EvaluationCounter",
    "EvaluationProtocol",
    "FolderPredictor",
    "PipelinePredictor",
    "Prediction",
    "WorldModelPredictor",
    "evaluate",
    "features_of_clip",
    "find_clips",
    "markdown",
    "published_figures",
    "save_prediction",
    "score_clip",
    "summarise",
    "write_report",
]
