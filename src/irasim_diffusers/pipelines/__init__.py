"""Pipelines."""

from .pipeline_irasim import IRASimPipeline, IRASimPipelineOutput

__all__ = ["IRASimPipeline", "IRASimPipelineOutput"]
