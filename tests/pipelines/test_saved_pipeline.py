"""A pipeline with random weights, saved by an earlier version together with its prediction.

Its transformer has the architecture options of the embedded model, in latent space.
"""

from pathlib import Path

import numpy as np
import torch

from irasim_diffusers import IRASimPipeline

SAVED = Path(__file__).parents[1] / "saved_pipeline"


def test_saved_pipeline_loads_and_predicts_the_same_video(frames):
    pipeline = IRASimPipeline.from_pretrained(SAVED)
    pipeline.set_progress_bar_config(disable=True)
    actions = np.random.default_rng(3).normal(size=(7, 3)).clip(-1, 1)
    video = pipeline(frames, actions, generator=torch.Generator().manual_seed(4), output_type="np").frames[0]
    expected = np.load(SAVED / "video.npy")  # (7, 8, 12, 3), float16
    assert np.abs(video - expected).max() < 2e-3
    assert expected.std() > 0.1


def test_saved_pipeline_keeps_its_settings():
    pipeline = IRASimPipeline.from_pretrained(SAVED)
    assert pipeline.config.num_inference_steps == 3
    assert pipeline.config.timesteps == [999, 600, 200]
    assert pipeline.chunk_length == 4 - pipeline.transformer.config.num_history_frames
    assert pipeline.transformer.config.cameras == [["top"]]
    assert pipeline.action_space.names == ("x", "y", "grip")
    assert pipeline.transformer.config.fps == 5.0


def test_saving_again_changes_no_config(tmp_path):
    IRASimPipeline.from_pretrained(SAVED).save_pretrained(tmp_path)
    again = IRASimPipeline.from_pretrained(tmp_path)
    first = IRASimPipeline.from_pretrained(SAVED)
    for name in ("vae", "transformer", "scheduler"):
        old, new = (getattr(pipeline, name).config for pipeline in (first, again))
        assert {key: value for key, value in old.items() if key[0] != "_"}.items() <= new.items()
