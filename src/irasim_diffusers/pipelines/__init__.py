"""The IRASim pipeline, its output, and the conversion of its history frames."""

from .inputs import stack_frames
from .pipeline_irasim import IRASimPipeline
from .pipeline_output import IRASimPipelineOutput

__all__ = ["IRASimPipeline", "IRASimPipelineOutput", "stack_frames"]
