"""Robot world models based on IRASim, for the Hugging Face ecosystem."""

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .action_space import ActionSpace
    from .driving import DrivingSession, Steering
    from .models import PRESETS, UNET_PRESETS, IRASimTransformer3DModel, ProprioceptionModel, UNetTrajectoryModel
    from .pipelines import IRASimPipeline, IRASimPipelineOutput
    from .rollout import RolloutState, WorldModel, roll

# modules of the public names; each module is imported on first use, so that `irasim --help` does not wait for torch
_MODULES = {
    "ActionSpace": "action_space",
    "DrivingSession": "driving",
    "IRASimPipeline": "pipelines",
    "IRASimPipelineOutput": "pipelines",
    "IRASimTransformer3DModel": "models",
    "PRESETS": "models",
    "ProprioceptionModel": "models",
    "RolloutState": "rollout",
    "Steering": "driving",
    "UNET_PRESETS": "models",
    "UNetTrajectoryModel": "models",
    "WorldModel": "rollout",
    "roll": "rollout",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


def embedded_checkpoint() -> Path:
    """Return the folder of the Push-T world model in this package, for `IRASimPipeline.from_pretrained`."""
    return Path(__file__).parent / "checkpoints" / "pusht"


__all__ = [
    "PRESETS",
    "UNET_PRESETS",
    "ActionSpace",
    "DrivingSession",
    "IRASimPipeline",
    "IRASimPipelineOutput",
    "IRASimTransformer3DModel",
    "ProprioceptionModel",
    "RolloutState",
    "Steering",
    "UNetTrajectoryModel",
    "WorldModel",
    "__version__",
    "embedded_checkpoint",
    "roll",
]
