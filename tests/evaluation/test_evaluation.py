"""Tests of `irasim evaluate` with tiny models and robot clips, and of its steps."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch
from conftest import tiny_pipeline
from convolutional import ConvolutionalModel

from irasim_diffusers import IRASimPipeline
from irasim_diffusers.cli import _parser, main
from irasim_diffusers.commands.evaluate import run as run_evaluate
from irasim_diffusers.data import open_dataset, write_video
from irasim_diffusers.evaluation import (
    PROTOCOLS,
    Backbones,
    Clip,
    ClipData,
    ClipReader,
    Evaluation,
    EvaluationCounter,
    EvaluationProtocol,
    FolderPredictor,
    PipelinePredictor,
    Prediction,
    WorldModelPredictor,
    evaluate,
    features_of_clip,
    find_clips,
    published_figures,
    score_clip,
)
from irasim_diffusers.evaluation.scores import through_mp4
from irasim_diffusers.metrics import frame_psnr, frame_ssim, gray, latent_l2

CPU_CONFIG = Path(__file__).parents[2] / "examples" / "accelerate_configs" / "cpu.yaml"
CLIPS = Path(os.environ.get("IRASIM_TEST_DATA", "/nonexistent"))
LENGTHS = (34, 16, 9)  # frames of each episode: two clips of 16 frames, one, none


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A tiny model, and episodes of the release with 8x12 pixels and three recorded action components."""
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
    assert evaluated["faithfulness"]["verdict"]["obeys"] is None  # three clips are too few
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
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CPU_CONFIG, "-m"]
    command += ["irasim_diffusers.cli", "evaluate", "--dataset", workspace / "data", "--model", workspace / "model"]
    command += ["--output", workspace / "two", "--ways", 3, "--batch-size", 1]
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    report = load(workspace / "two")
    # each process has one thread, which rounds differently: a pixel may differ by one level of 255
    for name in ("metrics", "last_frame"):
        assert report[name].keys() == evaluated[name].keys()
        for metric, value in report[name].items():
            assert value == pytest.approx(evaluated[name][metric], rel=2e-3)
    for which, clip in report["clips"].items():
        assert clip["name"] == evaluated["clips"][which]["name"]
    assert report["faithfulness"]["identification"] == evaluated["faithfulness"]["identification"]
    assert result.stdout.count("irasim-short, 3 clips: PSNR") == 1


class Stopping(PipelinePredictor):
    """Stops after some batches, and records the names of the predicted clips."""

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
    assert predictor.predicted[0] == "000001-000000"  # the others are for the images
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


def test_convolutional_baseline_is_a_world_model(tmp_path):
    """A frame-by-frame model without a pipeline; the frames match those of its `predict`."""
    torch.manual_seed(0)
    baseline = ConvolutionalModel(width=8).eval()
    torch.nn.init.normal_(baseline.out.weight, std=0.02)
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (2, 17, 96, 96, 3), dtype=np.uint8)
    actions = rng.uniform(0, 512, (2, 15, 2)).astype(np.float32)
    clips = [ClipData(Clip(f"{k}", k, 0, 2, 15), k, frames[k], actions[k], actions[k, 0]) for k in range(2)]
    predictor = WorldModelPredictor(baseline)
    expected = np.stack([baseline.predict(frames[k, :2], actions[k : k + 1])[0] for k in range(2)])
    for found, prediction in zip(predictor.predict(clips), expected, strict=True):
        assert (found.latents, found.network_evaluations) == (None, None)
        assert abs(found.frames.astype(int) - np.rint(prediction * 255)).max() <= 1
    futures = predictor.futures(clips[0], actions)
    np.testing.assert_allclose(futures[0].permute(0, 2, 3, 1), expected[0], atol=1e-5)
    assert np.array_equal(predictor.hold(clips[1]), actions[1, 0])
    small = ClipData(clips[0].clip, 0, frames[0, :, :48, :48], actions[0], actions[0, 0])
    with pytest.raises(ValueError, match=r"frames must be 96x96 .* got 48x48: pass resize=True"):
        predictor.predict([small])
    (resized,) = WorldModelPredictor(baseline, resize=True).predict([small])
    assert resized.frames.shape == (15, 48, 48, 3)


@pytest.mark.parametrize("length", [4, 7])
def test_pipeline_rollout_matches_pipeline_call(length):
    """Including a last chunk that is shorter than the others."""
    pipeline = tiny_pipeline(num_inference_steps=2)
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (length + 2, 8, 12, 3), dtype=np.uint8)
    actions = rng.normal(size=(length, 3))
    data = ClipData(Clip("a", 0, 0, 2, length), 3, frames, actions, actions[0])
    (found,) = PipelinePredictor(pipeline, seed=5).predict([data])
    generator = [torch.Generator().manual_seed(8)]
    latents = pipeline(frames[:2], actions, generator=generator, output_type="latent").frames
    torch.testing.assert_close(found.latents, latents[0])
    assert found.network_evaluations == 3  # PNDM repeats one of the two steps


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


def clip_data(size=(16, 32), length=15):
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (length + 1, size[0] // 4, size[1] // 4, 3), dtype=np.uint8)
    frames = coarse.repeat(4, axis=1).repeat(4, axis=2)
    return ClipData(Clip("a", 0, 0, 1, length), 0, frames, np.zeros((length, 3)), np.zeros(3))


def test_release_protocol_scores_grey_frames_after_mp4():
    data = clip_data()
    prediction = np.clip(data.truth.astype(int) + 20, 0, 255).astype(np.uint8)
    for attempt in range(5):  # x264 is not deterministic
        found = score_clip(data, Prediction(prediction), PROTOCOLS["irasim-short-release"])
        pair = [gray(through_mp4(data.history, video)) / 255 for video in (prediction, data.truth)]
        assert pair[0].shape == (15, 16, 32, 1)
        if attempt == 4 or np.allclose(found["psnr"], frame_psnr(*pair)):
            break
    np.testing.assert_allclose(found["psnr"], frame_psnr(*pair))
    plain = score_clip(data, Prediction(prediction), PROTOCOLS["irasim-short"])
    assert not np.allclose(found["psnr"], plain["psnr"], atol=0.05)
    assert found["clip_psnr"] == plain["clip_psnr"]
    with pytest.raises(ValueError, match="sides divisible by 16 for irasim-short-release, got 16x24"):
        score_clip(clip_data((16, 24)), Prediction(prediction[:, :, :24]), PROTOCOLS["irasim-short-release"])


def test_predictions_without_latents_are_encoded():
    data = clip_data()

    def encode(frames):
        return torch.from_numpy(frames.copy()).permute(3, 0, 1, 2) / 255

    def network(prediction, truth):
        return (prediction - truth).square().mean(dim=(1, 2, 3), keepdim=True)

    found = score_clip(data, Prediction(data.truth[::-1]), PROTOCOLS["irasim-short"], encode, Backbones(lpips=network))
    error = np.square((data.truth[::-1].astype(float) - data.truth) / 255)
    assert found["latent_l2"] == pytest.approx(error.mean(), rel=1e-5)
    np.testing.assert_allclose(found["lpips"], 4 * error.mean(axis=(1, 2, 3)), rtol=1e-5)


def test_release_protocol_mirrors_true_videos_only():
    data, video = clip_data(), clip_data().truth[::-1]
    backbones = Backbones(
        inception=lambda frames: frames.mean(axis=(1, 2)), i3d=lambda frames: frames.mean(axis=(0, 1, 3))
    )
    plain = features_of_clip(data, Prediction(video), PROTOCOLS["irasim-short"], backbones)
    assert {name: value.shape for name, value in plain.items()} == {
        "fid_prediction": (15, 3),
        "fid_truth": (15, 3),
        "fvd_prediction": (1, 32),
        "fvd_truth": (1, 32),
    }
    released = features_of_clip(data, Prediction(video), PROTOCOLS["irasim-short-release"], backbones)
    assert np.array_equal(released["fvd_truth"], [plain["fvd_truth"][0], plain["fvd_truth"][0, ::-1]])
    assert np.array_equal(released["fvd_prediction"], plain["fvd_prediction"])


class Lengths:
    name, fps = "lengths", None

    def __init__(self, *lengths):
        self.lengths = lengths

    def __len__(self):
        return len(self.lengths)

    def vectors(self, number):
        return {"action": np.zeros((self.lengths[number], 2))}


def starts(clips):
    return [(clip.episode, clip.start, clip.history, clip.predicted) for clip in clips]


def test_clips_of_each_protocol():
    dataset = Lengths(33, 15, 1, 24)
    assert starts(find_clips(dataset, PROTOCOLS["irasim-short"])) == [(0, 0, 1, 15), (0, 16, 1, 15), (3, 0, 1, 15)]
    assert starts(find_clips(dataset, PROTOCOLS["irasim-long"])) == [(0, 0, 1, 32), (1, 0, 1, 14), (3, 0, 1, 23)]
    robonet = [(0, 0, 2, 10), (0, 12, 2, 10), (1, 0, 2, 10), (3, 0, 2, 10), (3, 12, 2, 10)]
    assert starts(find_clips(dataset, PROTOCOLS["robonet"])) == robonet
    assert starts(find_clips(dataset, PROTOCOLS["robonet"], 3)) == robonet[::2]
    with pytest.raises(
        ValueError, match="no episode of 'lengths' is as long as a clip of irasim-short, 1 history frame"
    ):
        find_clips(Lengths(15, 3), PROTOCOLS["irasim-short"])
    with pytest.raises(ValueError, match="`num_clips` must be at least 1, got 0"):
        find_clips(dataset, PROTOCOLS["irasim-short"], 0)


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


def test_published_figures():
    assert published_figures(PROTOCOLS["irasim-short"], "bridge")["IRASim Frame-Ada"]["fvd"] == 20.91
    assert published_figures(PROTOCOLS["irasim-long"], "rt1")["LVDM"] == {"latent_l2": 0.2567, "psnr": 23.573}
    with pytest.raises(ValueError, match=r"`published` must be one of \['robonet'\] for the protocol robonet"):
        published_figures(PROTOCOLS["robonet"], "rt1")


@pytest.mark.parametrize(
    ("cameras", "warned"), [([["0"]], False), ([["1"]], True), ([["0", "1"]], True), (None, False)]
)
def test_other_cameras_cause_a_warning(workspace, caplog, cameras, warned):
    dataset = open_dataset(workspace / "data", split="test")
    assert dataset.cameras == (("0",),)
    PipelinePredictor(tiny_pipeline(cameras=cameras)).check_dataset(dataset)
    message = f"was trained on the cameras {','.join(cameras[0]) if cameras else ''}, but the evaluation uses 0 of "
    assert (message in caplog.text) == warned


BAD = [
    (["--num-clips", "0"], "--num-clips must be at least 1, got 0"),
    (["--batch-size", "0"], "--batch-size must be at least 1, got 0"),
    (["--pad-actions-to", "1000000000"], "--pad-actions-to must be at most 1024, got 1000000000"),
    (["--frame-skip", "0"], "--frame-skip must be at least 1, got 0"),
    (["--height", "8"], "--height and --width must be passed together"),
    (["--height", "16", "--width", "24"], "must be 8x12 .* got 16x24: .*--resize"),
    (["--protocol", "robonet"], r"must be \(256, 256\) .* for the protocol robonet, got \(8, 12\)"),
    (["--protocol", "irasim-short-release"], "sides divisible by 16"),
    (["--published", "robonet"], "`published` must be one of"),
    (["--pad-actions-to", "4"], "action components of .* must be 3 like the model's, got 4: use a dataset or model"),
    (["--split", "train"], "`split` must be one of"),
    (["--dataset", "nowhere"], "`dataset` must be a folder or a Hub id"),
    (["--predictions", "nowhere"], "--predictions must be a folder, got 'nowhere'"),
    (["--i3d", "nowhere.pt"], "`i3d` must be the file i3d_torchscript.pt"),
    (["--ways", "1"], "`ways` must be at least 2, got 1"),
    (["--model", "nowhere"], "--model must be a pipeline folder or Hub id"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_invalid_input_prints_one_line(workspace, tmp_path, capsys, arguments, message):
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
        ({"frames": np.zeros((15, 16, 24, 3), np.uint8)}, "must be 8x12 .* got 16x24: pass --resize"),
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


def write_npz(path, **members):
    """Write an npz file from headers (shape, type) with zeros in place of the values."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, (shape, kind, size) in members.items():
            with file.open(f"{name}.npy", "w", force_zip64=True) as member:
                header = {"descr": kind, "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(member, header)
                member.write(bytes(size))


FRAMES = ((15, 8, 12, 3), "|u1", 15 * 8 * 12 * 3)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            {"frames": ((10**12, 8, 12, 3), "|u1", 0)},
            r"must contain the 15 predicted frames .* got \(1000000000000, 8",
        ),
        ({"frames": ((15, 10**6, 10**6, 3), "|u1", 0)}, r"must contain the 15 predicted frames .* got \(15, 1000000"),
        ({"frames": ((15, 8, 12, 3), "|O", 9)}, "must contain the 15 predicted frames .* got .*object"),
        ({"frames": ((15, 8, 12, 3), "|u1", 9)}, "must be an npz file with an array `frames`"),
        ({"frames": FRAMES, "latents": ((4, 15, 10**6, 10**6), "<f4", 0)}, "`latents` in .* must have kind 'f'"),
        ({"frames": FRAMES, "latents": ((4, 15, 4, 6), "<c8", 8)}, "`latents` in .* must have kind 'f'"),
        ({"frames": FRAMES, "autoencoder": ((10**9,), "<U16", 0)}, "`autoencoder` in .* must have kind 'U'"),
    ],
)
def test_headers_of_predictions_are_checked_before_the_values(tmp_path, members, message):
    """A file of a few kilobytes must not allocate terabytes."""
    write_npz(tmp_path / "a.npz", **members)
    data = clip_data((8, 12))
    with pytest.raises(ValueError, match=message):
        FolderPredictor(tmp_path, resize=True).predict([data])


def test_latents_must_be_finite(tmp_path):
    data = clip_data((8, 12))
    np.savez(tmp_path / "a.npz", frames=data.truth, latents=np.full((4, 15, 4, 6), np.nan, np.float32))
    with pytest.raises(ValueError, match=r"`latents` in .*a.npz' must be finite, got NaN"):
        FolderPredictor(tmp_path).predict([data])


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"name": "000000-000016", "error": 1', "nan", "longer"])
def test_damaged_metrics_are_computed_again(workspace, evaluated, tmp_path, content):
    """An interrupted disk or an editor may leave any file; the report stays the same."""
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
    """The first clip that is scored claims the folder."""
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


def test_counter_removes_its_hook():
    model = torch.nn.Linear(2, 2)
    counter = EvaluationCounter(model)
    model(torch.zeros(2))
    assert counter.count == 0
    with counter:
        model(torch.zeros(2))
    model(torch.zeros(2))
    assert counter.count == 1


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
