"""Arguments, clips and metrics of the Push-T evaluation, and arguments of the baseline."""

import convolutional
import evaluate
import numpy as np
import pytest

from irasim_diffusers.data import Episode


class Recording(list):
    """Episodes of frames and states, with the interface of a dataset that `evaluate` uses."""

    name = "recording"

    def vectors(self, number):
        return {"action": self[number].actions, **self[number].states}


def recording(length):
    """One episode in which the block moves by 10 units per frame."""
    states = {"observation.state": np.zeros((length, 2)), "observation.environment_state": np.zeros((length, 3))}
    states["observation.environment_state"][:, 0] = 10 * np.arange(length)
    frames = np.arange(length, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    return Recording([Episode(frames, np.arange(2.0 * length).reshape(-1, 2), states)])


def test_clip_that_fits_exactly_is_scored():
    frames, actions, states = evaluate.held_out_clips(recording(6), 5, 3, 1, moving=True)
    assert frames[:, :, 0, 0, 0].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert actions[:, :, 0].tolist() == [[0, 2], [6, 8]]
    assert states[:, 2].tolist() == [20, 50]


def test_history_before_the_last_possible_future_is_used():
    (task,) = evaluate.identification_tasks(recording(36), 1, 17, 2, 0, 15.0)
    assert (task.start, task.start + task.num_actions) == (20, 35)
    assert evaluate.identification_tasks(recording(35), 1, 17, 2, 0, 15.0) == []


def test_metrics_without_data_are_omitted(capsys):
    white = np.full((1, 60, 96, 96, 3), 255, np.uint8)
    assert evaluate.driving_figures(white / 255, white, np.zeros((1, 60, 5)), np.random.default_rng(0), 15.0) == {}
    arguments = evaluate.EvaluationArguments(model="none", dataset="none", num_histories=1)
    still = Recording([])
    evaluation = evaluate.Evaluation(arguments, still, None, None, 1, [], np.random.default_rng(0))
    assert evaluation.identification() == {}
    assert (
        "identification: omitted, because no history has 8 different futures in which the block moves"
        in capsys.readouterr().out
    )


def test_num_seen_frames_below_history_raises(tmp_path, monkeypatch):
    flags = ["--model", tmp_path, "--dataset", tmp_path, "--num_history_frames", 2, "--num_seen_frames", 1]
    monkeypatch.setattr("sys.argv", ["evaluate.py", *map(str, flags)])
    with pytest.raises(ValueError, match=r"`num_seen_frames` must be at least `num_history_frames` \(2\), got 1"):
        evaluate.main()


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        (convolutional, ["--channels", 0], "`channels` must be at least 1, got 0"),
        (convolutional, ["--max_train_minutes", "nan"], "`max_train_minutes` must be finite, got nan"),
        (
            convolutional,
            ["--terminal_share", 0.5],
            "`terminal_share` does not apply to the convolutional baseline: omit it.",
        ),
        (
            convolutional,
            ["--optimizer", "muon"],
            "`optimizer` must be adamw or adamw8bit, got 'muon': the convolutional",
        ),
        (convolutional, ["--vae", "folder"], "`vae` does not apply to the convolutional baseline: omit it."),
        (evaluate, ["--batch_size", 0], "`batch_size` must be at least 1, got 0"),
        (evaluate, ["--num_clips", 0], "`num_clips` must be at least 1, got 0"),
        (evaluate, ["--dtype", "int8"], "`dtype` must be one of float32, bfloat16, got 'int8'"),
    ],
)
def test_invalid_arguments_raise_before_any_work(tmp_path, monkeypatch, script, flags, message):
    output = {convolutional: ["--output_dir", tmp_path / "out"], evaluate: ["--model", "none", "--output", "none"]}
    command = [script.__name__, "--dataset", "none", *output[script], *flags]
    monkeypatch.setattr("sys.argv", [*map(str, command)])
    with pytest.raises(ValueError, match=message):
        script.main()
    assert not (tmp_path / "out").exists()
