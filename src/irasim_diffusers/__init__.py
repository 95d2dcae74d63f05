"""Robot world models based on IRASim, for the Hugging Face ecosystem."""

from pathlib import Path

from diffusers.pipelines.pipeline_loading_utils import ALL_IMPORTABLE_CLASSES, LOADABLE_CLASSES

from .driving import DrivingSession, Steering
from .models import PRESETS, UNET_PRESETS, IRASimTransformer3DModel, ProprioceptionModel, UNetTrajectoryModel
from .pipelines import IRASimPipeline, IRASimPipelineOutput
from .rollout import RolloutState, WorldModel, roll
from .version import __version__

# This entry makes model_index.json name the package instead of a module path, so that it loads from folders and the Hub.
LOADABLE_CLASSES.setdefault(
    "irasim_diffusers",
    {
        "IRASimTransformer3DModel": ["save_pretrained", "from_pretrained"],
        "UNetTrajectoryModel": ["save_pretrained", "from_pretrained"],
    },
)
ALL_IMPORTABLE_CLASSES.update(LOADABLE_CLASSES["irasim_diffusers"])


def embedded_checkpoint() -> Path:
    """Return the folder of the Push-T world model in this package, for `IRASimPipeline.from_pretrained`."""
    return Path(__file__).parent / "checkpoints" / "pusht"


__all__ = [
    "PRESETS",
    "UNET_PRESETS",
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
