"""Tests of `irasim evaluate` and its parts with tiny models and robot clips."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from fork_server import fork_server
from tiny_models import tiny_pipeline

from irasim_diffusers import IRASimPipeline
from irasim_diffusers.cli import _parser, main
from irasim_diffusers.commands.evaluate import run as run_evaluate
from irasim_diffusers.data import PreparedEpisodes, open_dataset, write_video
from irasim_diffusers.evaluation import (
    PROTOCOLS,
    ClipReader,
    Evaluation,
    EvaluationProtocol,
    PipelinePredictor,
    evaluate,
    find_clips,
)
from irasim_diffusers.metrics import frame_psnr, frame_ssim, latent_l2

CLIPS = Path(os.environ.get("IRASIM_TEST_DATA", "/nonexistent"))
LENGTHS = (34, 16, 9)  # frames of the episodes, which contain two, one and no clips of 16 frames


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A tiny model, and random episodes in the release format: 8x12 pixels, three action components."""
    root = tmp_path_factory.mktemp("evaluation")
    tiny_pipeline(num_inference_steps=1).save_pretrained(root / "model")
    rng = np.random.default_rng(0)
    (root / "data" / "annotation" / "test").mkdir(parents=True)
    for number, length in enumerate(LENGTHS):
        frames = rng.integers(0, 256, (length, 8, 12, 3), dtype=np.uint8)
        write_video(root / "data" / "videos" / f"{number}.mp4", frames, 5, lossless=True)
        annotation = {"actions": rng.normal(size=(length - 1, 3)).tolist(), "video_path": f"videos/{number}.mp4"}
        (root / "data" / "annotation" / "test" / f"{number}.json").write_text(json.dumps(annotation))
    return root


def run(workspace, output, *arguments):
    command = ["evaluate", "--dataset", workspace / "data", "--output", output, "--device", "cpu"]
    return main([str(argument) for argument in (*command, *arguments)])


def load(folder):
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def evaluated(workspace):
    arguments = ["--model", workspace / "model", "--ways", 3, "--save-predictions", workspace / "predictions"]
    arguments += ["--save-truth", workspace / "truth"]
    assert run(workspace, workspace / "report", *arguments, "--published", "rt1") == 0
    return load(workspace / "report")


def test_report_contains_metrics_and_settings(workspace, evaluated):
    assert evaluated["protocol"]["name"] == "irasim-short"
    assert evaluated["n"] == 3
    for name in ("psnr", "ssim", "clip_psnr", "latent_l2"):
        figure = evaluated["metrics"][name]
        assert figure["low"] <= figure["mean"] <= figure["high"]
        assert figure["n"] == 3
    assert len(evaluated["horizon"]["model"]) == 15
    assert evaluated["network_evaluations_per_window"] == 1
    assert evaluated["faithfulness"]["verdict"]["obeys"] is None  # three clips are too few for a verdict
    assert evaluated["faithfulness"]["sensitivity"]["n"] == 3
    setting = evaluated["setting"]
    assert (setting["scheduler"], setting["num_inference_steps"], setting["seed"]) == ("PNDMScheduler", 1, 0)
    assert setting["command"].startswith("irasim evaluate --dataset")
    assert set(setting["versions"]) == {"irasim_diffusers", "diffusers", "torch"}
    page = (workspace / "report" / "report.md").read_text(encoding="utf-8")
    assert "| PSNR, mean of frames (dB) | 3 |" in page
    assert "IRASim Frame-Ada (reported)" in page
    assert "26.048" in page
    for name in ("horizon", "sensitivity", "best", "median", "worst"):
        assert f"({name}.png)" in page
        assert PIL.Image.open(workspace / "report" / f"{name}.png").size[0] > 50


def test_metrics_match_pipeline_output(workspace, evaluated):
    """The history is not scored, the clip's index seeds the noise, and latents are not re-encoded."""
    pipeline = IRASimPipeline.from_pretrained(workspace / "model")
    pipeline.set_progress_bar_config(disable=True)
    episode = open_dataset(workspace / "data", split="test")[0]
    latents = pipeline(
        episode.frames[16:17],
        episode.actions[16:31],
        generator=torch.Generator().manual_seed(1),
        output_type="latent",
    ).frames
    with torch.no_grad():
        pixels = (pipeline.decode_latents(latents) / 2 + 0.5).clamp(0, 1)[0].permute(1, 2, 3, 0)
        truth = episode.frames[17:32]
        encoded = pipeline.encode_history(torch.from_numpy(truth).permute(0, 3, 1, 2)[None] / 127.5 - 1)
    prediction = np.rint(pixels.numpy() * 255) / 255
    figures = json.loads((workspace / "report" / "figures" / "000000-000016.json").read_text(encoding="utf-8"))
    np.testing.assert_allclose(figures["psnr"], frame_psnr(prediction, truth / 255), rtol=1e-4)
    np.testing.assert_allclose(figures["ssim"], frame_ssim(prediction, truth / 255), rtol=1e-3, atol=1e-5)
    assert figures["latent_l2"] == pytest.approx(latent_l2(latents, encoded).item(), rel=1e-4)
    repeated = np.broadcast_to(episode.frames[16], truth.shape) / 255
    np.testing.assert_allclose(figures["last_frame"]["psnr"], frame_psnr(repeated, truth / 255))


def test_saved_predictions_have_scores_of_model(workspace, evaluated):
    files = sorted(path.name for path in (workspace / "predictions").iterdir())
    assert files == ["000000-000000.npz", "000000-000016.npz", "000001-000000.npz"]
    arguments = ["--predictions", workspace / "predictions", "--model", workspace / "model"]
    arguments += ["--save-predictions", workspace / "copies"]
    assert run(workspace, workspace / "rescored", *arguments) == 0
    again = load(workspace / "rescored")
    assert again["metrics"] == evaluated["metrics"]
    assert "faithfulness" not in again
    for name in files:  # the copies keep the hash of the autoencoder
        one, other = np.load(workspace / "predictions" / name), np.load(workspace / "copies" / name)
        assert one["autoencoder"] == other["autoencoder"] != ""


def test_saved_truth_is_recording(workspace, evaluated):
    episode = open_dataset(workspace / "data", split="test")[0]
    assert np.array_equal(np.load(workspace / "truth" / "000000-000016.npz")["frames"], episode.frames[17:32])


def test_videos_of_another_model_are_scored(workspace, evaluated, capsys):
    folder = workspace / "videos"
    dataset = open_dataset(workspace / "data", split="test")
    for clip in find_clips(dataset, PROTOCOLS["irasim-short"]):
        frames = dataset[clip.episode].frames[clip.start + 1 : clip.start + 16]
        write_video(folder / f"{clip.name}.mp4", frames, 5, lossless=True)
    assert run(workspace, workspace / "perfect", "--predictions", folder) == 0
    report = load(workspace / "perfect")
    assert report["metrics"]["ssim"]["mean"] == pytest.approx(1)
    assert report["metrics"]["psnr"]["mean"] == pytest.approx(10 * np.log10(255**2 * 8 * 12 * 3))
    assert "latent_l2" not in report["metrics"]
    write_video(folder / "000001-000000.mp4", np.zeros((15, 8, 12, 3), np.uint8), 5, lossless=True)
    assert run(workspace, workspace / "perfect", "--predictions", folder) == 0
    assert load(workspace / "perfect")["clips"]["worst"]["name"] == "000001-000000"  # the new file is scored
    (folder / "000000-000016.mp4").unlink()
    assert run(workspace, workspace / "lacking", "--predictions", folder) == 2
    message = "must contain 000000-000016.npz or 000000-000016.mp4, with 15 frames from frame 17 of episode 0"
    assert message in capsys.readouterr().err
    assert len(json.loads((workspace / "lacking" / "clips.json").read_text(encoding="utf-8"))) == 3


def test_whole_episodes_are_rolled_out(workspace, evaluated, capsys):
    arguments = ["--model", workspace / "model", "--protocol", "irasim-long", "--num-clips", 2]
    assert run(workspace, workspace / "long", *arguments) == 0
    report = load(workspace / "long")
    assert [
        clip["predicted"] for clip in json.loads((workspace / "long" / "clips.json").read_text(encoding="utf-8"))
    ] == [33, 8]
    assert [report["horizon"]["model"][k]["n"] for k in (0, 7, 8, 32)] == [2, 2, 1, 1]
    assert report["network_evaluations_per_window"] == 1
    assert "faithfulness" not in report


def test_two_processes_match_one(workspace, evaluated):
    command = ["-m", "irasim_diffusers.cli", "evaluate", "--dataset", workspace / "data"]
    command += ["--model", workspace / "model", "--output", workspace / "two", "--ways", 3, "--batch-size", 1]
    results = fork_server().run_ranks(*command)
    assert [result.returncode for result in results] == [0, 0], [result.stderr[-3000:] for result in results]
    report = load(workspace / "two")
    # each process uses one thread, which changes the rounding: a pixel may differ by one level of 255
    for name in ("metrics", "last_frame"):
        assert report[name].keys() == evaluated[name].keys()
        for metric, value in report[name].items():
            assert value == pytest.approx(evaluated[name][metric], rel=2e-3)
    for which, clip in report["clips"].items():
        assert clip["name"] == evaluated["clips"][which]["name"]
    assert report["faithfulness"]["identification"] == evaluated["faithfulness"]["identification"]
    assert [result.stdout.count("irasim-short, 3 clips: PSNR") for result in results] == [1, 0]


class Stopping(PipelinePredictor):
    """Predictor that stops after some batches and records the names of the predicted clips."""

    def __init__(self, pipeline, batches):
        super().__init__(pipeline, 1)
        self.batches, self.predicted = batches, []

    def predict(self, clips):
        if not self.batches:
            raise KeyboardInterrupt
        self.batches -= 1
        self.predicted += [clip.clip.name for clip in clips]
        return super().predict(clips)


def test_interrupted_evaluation_resumes(workspace, tmp_path):
    dataset = open_dataset(workspace / "data", split="test")
    pipeline = IRASimPipeline.from_pretrained(workspace / "model")
    pipeline.set_progress_bar_config(disable=True)

    def start(batches):
        predictor = Stopping(pipeline, batches)
        options = {"batch_size": 1, "faithfulness_clips": 0}
        return predictor, Evaluation(dataset, PROTOCOLS["irasim-short"], predictor, tmp_path, **options)

    predictor, evaluation = start(2)
    with pytest.raises(KeyboardInterrupt):
        evaluate(evaluation)
    assert len(predictor.predicted) == 2
    assert not (tmp_path / "report.json").exists()
    assert not list(tmp_path.rglob("*.partial*"))
    predictor, evaluation = start(9)
    evaluate(evaluation)
    assert predictor.predicted[0] == "000001-000000"  # the other predictions are for the images of the report
    assert len(predictor.predicted) == 4


def test_other_setting_requires_new_folder(workspace, evaluated, capsys):
    arguments = ["--model", workspace / "model", "--ways", 3]
    assert run(workspace, workspace / "report", *arguments, "--seed", 1) == 2
    assert "contains an evaluation with other settings: seed was 0, now 1: choose" in capsys.readouterr().err
    shutil.copytree(workspace / "model", workspace / "trained")
    pipeline = IRASimPipeline.from_pretrained(workspace / "trained")
    pipeline.transformer.null_action.data += 1
    pipeline.save_pretrained(workspace / "trained")
    assert run(workspace, workspace / "report", "--model", workspace / "trained", "--ways", 3) == 2
    assert "contains an evaluation with other settings: model was" in capsys.readouterr().err


def test_broken_episodes_are_skipped(workspace, evaluated, tmp_path, capsys):
    shutil.copytree(workspace / "data", tmp_path / "data")
    (tmp_path / "data" / "videos" / "1.mp4").write_bytes(b"broken")
    (tmp_path / "data" / "annotation" / "test" / "2.json").write_text("{")
    arguments = ["--dataset", tmp_path / "data", "--model", workspace / "model", "--ways", 2]
    assert run(workspace, tmp_path / "out", *arguments) == 2
    assert "2.json" in capsys.readouterr().err
    for _ in range(2):  # the second run resumes
        assert run(workspace, tmp_path / "out", *arguments, "--skip-broken") == 0
        report = load(tmp_path / "out")
        assert report["n"] == report["faithfulness"]["identification"]["all"]["n"] == 2
        first, second = report["skipped_episodes"]
        assert (first["episode"], second["episode"]) == (1, 2)
        assert "2.json" in second["error"]
    assert "2 episodes could not be read" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")
    found, expected = (
        json.loads((folder / "figures" / "000000-000016.json").read_text(encoding="utf-8"))
        for folder in (tmp_path / "out", workspace / "report")
    )
    assert found["psnr"] == pytest.approx(expected["psnr"], rel=1e-3)
    (tmp_path / "data" / "videos" / "0.mp4").write_bytes(b"broken")
    assert run(workspace, tmp_path / "nothing", *arguments, "--skip-broken") == 2
    assert "no clip of " in capsys.readouterr().err


class ChannelMeans(torch.nn.Module):
    """Network with the signature of the I3D of StyleGAN-V."""

    def forward(self, videos: torch.Tensor, rescale: bool, resize: bool, return_features: bool) -> torch.Tensor:
        return videos.float().mean(dim=(3, 4)).flatten(1)


def test_distances_of_features(workspace, tmp_path):
    torch.jit.script(ChannelMeans()).save(str(tmp_path / "i3d.pt"))
    assert run(workspace, tmp_path / "out", "--model", workspace / "model", "--i3d", tmp_path / "i3d.pt") == 0
    report = load(tmp_path / "out")
    assert report["distances"]["fvd"]["n"] == 3
    assert report["distances"]["fvd"]["value"] > 0
    assert "| FVD | 3 |" in (tmp_path / "out" / "report.md").read_text(encoding="utf-8")


def test_clip_contains_previous_action(workspace):
    dataset = open_dataset(workspace / "data", split="test")
    reader = ClipReader(dataset, find_clips(dataset, EvaluationProtocol("any", "", 2, 5, 6)))
    data, episode = reader(1), dataset[0]
    assert np.array_equal(data.history, episode.frames[6:8])
    assert np.array_equal(data.truth, episode.frames[8:13])
    assert np.array_equal(data.actions, episode.actions[7:12])
    assert np.array_equal(data.action_before, episode.actions[6])


@pytest.mark.parametrize("page", ["README.md", "examples/evaluation.md"])
def test_documented_commands_are_valid(page):
    text = (Path(__file__).parents[2] / page).read_text(encoding="utf-8")
    commands = re.findall(r"^irasim evaluate (.*)$", text, re.MULTILINE)
    assert commands
    for command in commands:
        arguments = _parser().parse_args(["evaluate", *shlex.split(command, comments=True)])
        assert arguments.run is run_evaluate


@pytest.mark.parametrize(
    ("cameras", "warned"), [([["0"]], False), ([["1"]], True), ([["0", "1"]], True), (None, False)]
)
def test_other_cameras_cause_a_warning(workspace, caplog, cameras, warned):
    dataset = open_dataset(workspace / "data", split="test")
    assert dataset.cameras == (("0",),)
    PipelinePredictor(tiny_pipeline(cameras=cameras)).check_dataset(dataset)
    message = f"was trained on the cameras {','.join(cameras[0]) if cameras else ''}, but the evaluation uses 0 of "
    assert (message in caplog.text) == warned


@pytest.mark.parametrize(
    ("fps", "skip", "remedy"),
    [
        (5.0, 1, "got 10.0: use --frame-skip 2"),
        (5.0 / 3, 2, "got 5.0: use --frame-skip 6"),
        (4.0, 1, "got 10.0: use a dataset or model with the same"),
    ],
)
def test_frames_can_be_skipped_only_at_integer_ratios(workspace, fps, skip, remedy):
    dataset = open_dataset(workspace / "data", split="test", fps=10.0)
    dataset = PreparedEpisodes(dataset, frame_skip=skip, composition="absolute")
    with pytest.raises(ValueError, match=f"frames per second of .* must be {fps} like the model's, {remedy}"):
        PipelinePredictor(tiny_pipeline(fps=fps, action_derivation="absolute")).check_dataset(dataset)


def test_remedy_for_derived_actions_depends_on_the_model(workspace):
    dataset = PreparedEpisodes(open_dataset(workspace / "data", split="test"), composition="absolute")
    for derivation, remedy in (
        ("recorded", "recorded actions, or a dataset"),
        ("relative_planar", "--action-derivation"),
    ):
        with pytest.raises(ValueError, match=f"must be {derivation} like the model's, got absolute: use {remedy}"):
            PipelinePredictor(tiny_pipeline(action_derivation=derivation)).check_dataset(dataset)


BAD = [
    (["--num-clips", "0"], "--num-clips must be at least 1, got 0"),
    (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
    (["--pad-actions-to", "1000000000"], "--pad-actions-to must be at most 1024, got 1000000000"),
    (["--frame-skip", "0"], "--frame-skip must be at least 1, got 0"),
    (["--height", "8"], "--height and --width must be passed together"),
    (["--height", "16", "--width", "24"], "must be 8x12 .* got 16x24: .*--resize"),
    (["--protocol", "robonet"], r"must be \(256, 256\) .* for the protocol robonet, got \(8, 12\)"),
    (["--protocol", "irasim-short-release"], "sides divisible by 16"),
    (["--published", "robonet"], "--published must be one of"),
    (["--pad-actions-to", "4"], "action components of .* must be 3 like the model's, got 4: use a dataset or model"),
    (["--split", "train"], "--split must be one of"),
    (["--dataset", "nowhere"], "--dataset must be a folder or a Hub id"),
    (["--predictions", "nowhere"], "--predictions must be a folder, got 'nowhere'"),
    (["--i3d", "nowhere.pt"], "--i3d must be a TorchScript file such as i3d_torchscript.pt"),
    (["--ways", "1"], "--ways must be at least 2, got 1"),
    (["--model", "nowhere"], "--model must be a pipeline folder or Hub id"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_invalid_input_ends_in_one_line(workspace, tmp_path, capsys, arguments, message):
    assert run(workspace, tmp_path / "out", "--model", workspace / "model", *arguments) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert re.search(message, lines[-1]), lines[-1]
    assert not (tmp_path / "out" / "report.json").exists()


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        (
            {"frames": np.zeros((16, 8, 12, 3), np.uint8)},
            r"must contain the 15 predicted frames .* got \(16, 8, 12, 3\)",
        ),
        ({"frames": np.zeros((15, 8, 12, 3))}, "uint8, without the history, got .* float64"),
        ({"frames": np.zeros((15, 16, 24, 3), np.uint8)}, "must be 8x12 .* got 16x24: pass resize=True .--resize on"),
        ({"video": np.zeros((15, 8, 12, 3), np.uint8)}, "must be an npz file with an array `frames`"),
    ],
)
def test_invalid_predictions_raise(workspace, evaluated, tmp_path, capsys, arrays, message):
    shutil.copytree(workspace / "predictions", tmp_path / "predictions")
    np.savez(tmp_path / "predictions" / "000000-000016.npz", **arrays)
    assert run(workspace, tmp_path / "out", "--predictions", tmp_path / "predictions") == 2
    assert re.search(f"000000-000016.npz.*{message}", capsys.readouterr().err)


def test_truncated_prediction_raises(workspace, evaluated, tmp_path, capsys):
    shutil.copytree(workspace / "predictions", tmp_path / "predictions")
    path = tmp_path / "predictions" / "000000-000016.npz"
    path.write_bytes(path.read_bytes()[:-200])
    assert run(workspace, tmp_path / "out", "--predictions", tmp_path / "predictions") == 2
    assert "000000-000016.npz' must be an npz file" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"name": "000000-000016", "error": 1', "nan", "longer"])
def test_damaged_metrics_are_computed_again(workspace, evaluated, tmp_path, content):
    """A crash or an editor may leave any content in the files; the report stays the same."""
    shutil.copytree(workspace / "report", tmp_path / "out")
    figures = tmp_path / "out" / "figures" / "000000-000016.json"
    errors = tmp_path / "out" / "faithfulness" / "000000-000016.json"
    changes = {"nan": {"clip_psnr": float("nan")}, "longer": {"psnr": [30.0] * 500}}.get(content)
    damaged = content if changes is None else json.dumps(json.loads(figures.read_text()) | changes)
    for path in (figures, errors):
        path.write_text(damaged)
    arguments = ["--model", workspace / "model", "--ways", 3, "--published", "rt1"]
    assert run(workspace, tmp_path / "out", *arguments) == 0
    again = load(tmp_path / "out")
    assert {name: again[name] for name in again if name != "setting"} == {
        name: evaluated[name] for name in evaluated if name != "setting"
    }


def test_failed_evaluation_leaves_its_folder_to_the_corrected_one(workspace, evaluated, tmp_path, capsys):
    """The settings are written with the first clip that is scored."""
    shutil.copytree(workspace / "predictions", tmp_path / "predictions")
    broken = tmp_path / "predictions" / "000000-000000.npz"
    whole = broken.read_bytes()
    broken.write_bytes(b"broken")
    arguments = ["--predictions", tmp_path / "predictions"]
    assert run(workspace, tmp_path / "out", *arguments) == 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["clips.json"]
    broken.write_bytes(whole)
    assert run(workspace, tmp_path / "out", *arguments, "--seed", 5) == 0


def test_batches_are_predicted_whole_after_an_interruption(workspace, evaluated, tmp_path):
    """The results of a GPU depend on the composition of a batch."""
    pipeline = IRASimPipeline.from_pretrained(workspace / "model")
    pipeline.set_progress_bar_config(disable=True)
    dataset = open_dataset(workspace / "data", split="test")
    for names in (["000000-000000", "000000-000016", "000001-000000"],) * 2:
        predictor = Stopping(pipeline, 99)
        options = {"batch_size": 3, "faithfulness_clips": 0}
        evaluate(Evaluation(dataset, PROTOCOLS["irasim-short"], predictor, tmp_path, **options))
        assert predictor.predicted[:3] == names
        (tmp_path / "figures" / "000000-000016.json").unlink()


def test_replaced_predictions_are_scored_again(workspace, evaluated, tmp_path):
    arguments = ["--predictions", tmp_path / "predictions"]
    shutil.copytree(workspace / "predictions", tmp_path / "predictions")
    assert run(workspace, tmp_path / "out", *arguments) == 0
    before = load(tmp_path / "out")["metrics"]["psnr"]
    for path in (tmp_path / "predictions").iterdir():
        np.savez(path, frames=np.zeros((15, 8, 12, 3), np.uint8))
        os.utime(path, (1, 1))
    assert run(workspace, tmp_path / "out", *arguments) == 0
    assert load(tmp_path / "out")["metrics"]["psnr"] != before


def test_latents_of_other_autoencoder_are_ignored(workspace, evaluated, tmp_path):
    """The frames are encoded instead."""
    pipeline = tiny_pipeline(1)
    pipeline.vae.register_to_config(scaling_factor=7.0)
    pipeline.save_pretrained(tmp_path / "other")
    shutil.copytree(workspace / "predictions", tmp_path / "frames")
    for path in (tmp_path / "frames").iterdir():
        np.savez(path, frames=np.load(path)["frames"])
    found = []
    for predictions in (workspace / "predictions", tmp_path / "frames"):
        output = tmp_path / predictions.name
        assert run(workspace, output / "out", "--predictions", predictions, "--model", tmp_path / "other") == 0
        found.append(load(output / "out")["metrics"]["latent_l2"]["mean"])
    assert found[0] == found[1]


def test_changed_config_requires_new_folder(workspace, evaluated, tmp_path, capsys):
    shutil.copytree(workspace / "model", tmp_path / "model")
    assert run(workspace, tmp_path / "out", "--model", tmp_path / "model", "--faithfulness-clips", 0) == 0
    path = tmp_path / "model" / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"action_scale": 9.0}))
    assert run(workspace, tmp_path / "out", "--model", tmp_path / "model", "--faithfulness-clips", 0) == 2
    assert "contains an evaluation with other settings: weights was" in capsys.readouterr().err


def test_resize(workspace, evaluated, tmp_path):
    shutil.copytree(workspace / "predictions", tmp_path / "predictions")
    grown = np.full((15, 16, 24, 3), 7, np.uint8)
    np.savez(tmp_path / "predictions" / "000000-000016.npz", frames=grown)
    assert run(workspace, tmp_path / "out", "--predictions", tmp_path / "predictions", "--resize") == 0
    size = ["--height", 16, "--width", 24, "--resize", "--faithfulness-clips", 0]
    assert run(workspace, tmp_path / "model", "--model", workspace / "model", *size) == 0


@pytest.mark.skipif(not CLIPS.is_dir(), reason="IRASIM_TEST_DATA is not a folder of robot clips")
@pytest.mark.parametrize(
    ("name", "split", "space", "expected"),
    [
        ("droid", "val", {"action_dim": 7, "action_derivation": "relative_euler"}, 2),
        ("language_table", "test", {"action_dim": 2}, 1),
    ],
)
def test_real_robot_clips(tmp_path, name, split, space, expected):
    scaling = {"action_scale": 1.0, "action_offset": 0.0}
    tiny_pipeline(1, sample_height=12, sample_width=20, **scaling, **space).save_pretrained(tmp_path / "model")
    arguments = ["--dataset", CLIPS / name, "--split", split, "--cameras", 0, "--height", 24, "--width", 40]
    arguments += ["--model", tmp_path / "model", "--output", tmp_path / "out", "--num-clips", 2, "--device", "cpu"]
    assert main(["evaluate", *map(str, arguments)]) == 0
    report = load(tmp_path / "out")
    assert report["n"] == expected
    assert ("faithfulness" in report) == (expected > 1)
