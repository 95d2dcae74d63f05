"""The IRASim pipeline and its output."""

from .pipeline_irasim import IRASimPipeline
from .pipeline_output import IRASimPipelineOutput

__all__ = ["IRASimPipeline", "IRASimPipelineOutput"]
