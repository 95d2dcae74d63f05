"""Invalid input and results of `irasim adapt`; tests/examples/test_train.py trains adapted models."""

import numpy as np
import pytest
from tiny_models import tiny_pipeline, tiny_transformer, tiny_unet

from irasim_diffusers import ActionSpace, IRASimPipeline
from irasim_diffusers.cli import main
from irasim_diffusers.conversion.surgery import change_action_dim
from irasim_diffusers.models import noise_process

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapt") / "model"
    tiny_pipeline(prediction_type="v_prediction").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "at least one change is required: --prediction-type, --vae, --patch-size"),
        (["--patch-size", "0"], "--patch-size must be at least 1, got 0"),
        (["--patch-size", "3"], "--patch-size must divide the sides of the latents, 4x6, got 3"),
        (["--action-dim", "-1"], "--action-dim must be at least 1, got -1"),
        (["--action-frequencies", "-1"], "--action-frequencies must be at least 0, got -1"),
        (["--action-dim", "1000000000"], "--action-dim must be at most 1024, got 1000000000"),
        (["--action-frequencies", "1000000"], "--action-frequencies must be at most 32, got 1000000"),
        (["--vae", "vae"], "--vae and --dataset must be passed together"),
        (["--action-dim", "2", "--height", "8"], "--height and --width must be passed together"),
        (["--action-dim", "2", "--model", "nowhere"], "--model must be a pipeline folder or Hub id, got 'nowhere'"),
        (
            ["--vae", "nowhere", "--dataset", "nowhere"],
            "--vae must be the folder or Hub id of an AutoencoderKL or AutoencoderTiny, got 'nowhere': the folder does not exist",
        ),
    ],
)
def test_invalid_flags_end_in_one_line(model, tmp_path, capsys, flags, message):
    assert main(["adapt", "--model", str(model), "--output", str(tmp_path / "out"), *flags]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_invalid_models_and_outputs_are_named(model, tmp_path, capsys):
    unet = tiny_unet()
    IRASimPipeline(None, unet, noise_process(unet.config)).save_pretrained(tmp_path / "unet")
    flags = ["--output", str(tmp_path / "out"), "--action-dim", "2"]
    assert main(["adapt", "--model", str(tmp_path / "unet"), *flags]) == 2
    assert "--model must be a pipeline with a transformer, got UNetTrajectoryModel" in capsys.readouterr().err
    assert main(["adapt", "--model", str(model), "--output", str(model), "--action-dim", "2"]) == 2
    assert "--output must be a new or empty folder" in capsys.readouterr().err


def test_prediction_type_and_frequencies(model, tmp_path):
    flags = ["--prediction-type", "sample", "--action-frequencies", "2"]
    assert main(["adapt", "--model", str(model), "--output", str(tmp_path / "out"), *flags]) == 0
    pipeline = IRASimPipeline.from_pretrained(tmp_path / "out")
    config = pipeline.transformer.config
    assert (config.prediction_type, config.action_frequencies) == ("sample", 2)
    pipeline.check_scheduler()


def test_the_actions_of_another_robot_are_recorded():
    """A change of `action_dim` resets the derivation and the action space."""
    model = tiny_transformer(action_dim=10, action_derivation="relative_6d", action_scale=1.0, action_offset=0.0)
    adapted = change_action_dim(model, 2)
    assert (adapted.config.action_derivation, adapted.config.action_space) == ("recorded", "relative")
    space = ActionSpace.from_config(adapted.config)
    assert space.hold(np.ones((1, 2))).tolist() == [[0.0, 0.0]]
