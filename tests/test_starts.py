import numpy as np
import pytest
from tiny_models import tiny_pipeline

from irasim_diffusers.envs import WorldModelVectorEnv


@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_automatic_resets_require_starts(mode):
    """The first reset can receive frames as an option; an automatic reset cannot."""
    rows = WorldModelVectorEnv(
        tiny_pipeline(num_inference_steps=1, action_derivation="recorded"), 2, max_episode_steps=1, autoreset_mode=mode
    )
    with pytest.raises(ValueError, match="starts"):
        rows.reset(seed=0)
    rows.reset(seed=0, options={"frames": np.zeros((2, 2, 8, 12, 3), np.uint8)})
    if mode == "NextStep":
        rows.step(np.zeros((2, 3), np.float32))
    with pytest.raises(ValueError, match="`starts` is required to reset finished rows"):
        rows.step(np.zeros((2, 3), np.float32))
