import asyncio
import base64
import io
import json
import pickle
import time

import av
import numpy as np
import PIL.Image
import pytest
import torch
from tiny_models import tiny_pipeline

from irasim_diffusers import ActionSpace, IRASimPipeline, embedded_checkpoint
from irasim_diffusers.data import write_video

pytest.importorskip("gradio")
from comparison import (
    Setting,
    align,
    errors,
    name_settings,
    pipeline_of,
    predict,
    predict_whole,
    scheduler_names,
)
from drawing import path_actions, read_path, resample
from poses import read_poses
from scenes import (
    DRAWN,
    FILE,
    RECORDED,
    Scene,
    action_kinds,
    choose_actions,
    default_scale,
    examples,
    known_truth,
    upload_scene,
)
from viewer import videos
from visitor_files import MAX_ACTIONS, read_action_file, read_clip
from worlds import World


@pytest.fixture(scope="module")
def world():
    pipeline = IRASimPipeline.from_pretrained(embedded_checkpoint())
    clip = np.random.default_rng(0).integers(0, 256, (30, 96, 96, 3), dtype=np.uint8)
    return World("push-t", pipeline, clip, np.random.default_rng(1).uniform(0, 512, (28, 2)), 2)


class TestPaths:
    def test_steps_take_equal_times(self):
        """The pen pauses before it moves, and so do the positions."""
        points = np.array([[0.0, 0.5, 100.0], [0.0, 0.5, 200.0], [1.0, 0.0, 300.0]])
        places = resample(points, 4)
        np.testing.assert_allclose(places[:, 0], [0, 0, 0, 0.5, 1])
        np.testing.assert_allclose(places[:, 1], [0.5, 0.5, 0.5, 0.25, 0])

    def test_without_time_segments_take_equal_time(self):
        np.testing.assert_allclose(
            resample(np.array([[0, 0, 7.0], [1, 0, 7.0], [1, 1, 7.0]]), 2), [[0, 0], [1, 0], [1, 1]]
        )
        np.testing.assert_allclose(resample(np.array([[0.3, 0.6, 7.0]]), 2), [[0.3, 0.6]] * 3)

    def test_picture_edges_are_bounds_of_targets(self):
        space = space_of(action_low=[-1.0, 0.0], action_high=[1.0, 8.0])
        actions = path_actions(np.array([[0.9, 0.9], [0, 0], [1, 1], [0.5, 0.25]]), space)
        np.testing.assert_allclose(actions, [[-1, 0], [1, 8], [0, 2]])

    def test_motions_add_up_to_the_path(self):
        places = np.random.default_rng(0).random((6, 2))
        actions = path_actions(places, space_of(action_space="relative"), 3.0)
        np.testing.assert_allclose(places[0] + np.cumsum(actions, axis=0) / 3, places[1:])

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"action_dim": 7}, "7 components"),
            ({"action_low": None}, "does not record the bounds"),
            ({"action_high": [1.0, None]}, "does not record the bounds"),
        ],
    )
    def test_spaces_that_cannot_be_drawn(self, changes, message):
        with pytest.raises(ValueError, match=message):
            path_actions(np.zeros((3, 2)), space_of(**changes))

    def test_default_scale_of_three_components(self):
        pipeline = tiny_pipeline()  # its action scales are 0.5, 2 and 1
        clip = np.zeros((30, *pipeline.frame_size, 3), np.uint8)
        assert default_scale(World("arm", pipeline, clip, np.zeros((28, 3)), 2)) == 10

    @pytest.mark.parametrize(
        ("path", "message"),
        [
            ([], "nothing is drawn yet"),
            ("abc", "must be a list"),
            ([[0, 0, 1]] * 20_001, "at most 20000"),
            ([[0, 0]], "got shape"),
            ([[0, "x", 1]], "all numbers"),
            ([[0, None, 1]], "finite"),
            ([[0, 1.5, 1]], "inside the image"),
        ],
    )
    def test_invalid_paths_are_refused(self, path, message):
        with pytest.raises(ValueError, match=message):
            read_path(path)

    def test_time_does_not_decrease(self):
        assert read_path([[0, 0, 5], [1, 1, 4]])[1, 2] == 5


def space_of(**changes):
    whole = {"action_dim": 2, "action_space": "absolute", "action_low": 0.0, "action_high": 512.0}
    return ActionSpace.from_config(whole | changes)


def npy(array, **kwargs):
    file = io.BytesIO()
    np.save(file, array, **kwargs)
    return file.getvalue()


ACTIONS = np.array([[58.0, 334.0], [60.0, 300.0], [62.5, 280.0]])
HUGE_HEADER = npy(np.zeros(0)).replace(b"(0,), ", b"(9999999999, 2), ")[:128]
BAD_ACTIONS = [
    ("a.npy", npy(np.zeros((3, 7))), "has 7 numbers per row, but the actions of this model have 2 components"),
    ("a.npy", npy(np.array([[1, np.nan]])), "row 1: every number must be finite"),
    ("a.npy", npy(np.array([{"a": 1}], dtype=object), allow_pickle=True), "no table of numbers"),
    ("a.npy", pickle.dumps([[1, 2]]), "no table of numbers"),
    ("a.npy", b"PK\x03\x04 and no more", "no table of numbers"),
    ("a.npy", HUGE_HEADER, "no table of numbers"),
    ("a.npy", npy(np.zeros((MAX_ACTIONS + 1, 2))), "241 actions: upload 1 to 240"),
    ("a.npy", npy(np.zeros((0, 2))), "0 actions: upload 1 to 240"),
    ("a.csv", b"x,y\n1,two\n", "no table of numbers"),
    ("a.csv", b"1,2\n3\n", "no table of numbers"),
    ("a.csv", b'"' + b"1" * 200_000, "no table of numbers"),
    ("a.json", b"{}", "no table of numbers"),
    ("a.json", b"[" * 100_000, "no table of numbers"),
    ("a.json", b"\xff\xfe", "no table of numbers"),
    ("a.txt", b"1,2", "a .npy, .csv or .json file"),
    ("a.csv", b"1,2\n" * 300_000, "too large"),
]


class TestFiles:
    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("a.npy", npy(ACTIONS)),
            ("a.csv", b"x,y\n58,334\n60,300\n62.5,280\n"),
            ("a.json", json.dumps({"actions": ACTIONS.tolist()}).encode()),
        ],
    )
    def test_valid_actions(self, tmp_path, name, content):
        (tmp_path / name).write_bytes(content)
        np.testing.assert_array_equal(read_action_file(tmp_path / name, 2), ACTIONS)

    @pytest.mark.parametrize(("name", "content", "message"), BAD_ACTIONS)
    def test_invalid_actions_are_refused(self, tmp_path, name, content, message):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message) as error:
            read_action_file(tmp_path / name, 2)
        assert str(tmp_path) not in str(error.value)

    def test_clips(self, tmp_path):
        frames = np.full((9, 20, 30, 3), 200, np.uint8)
        write_video(tmp_path / "a.mp4", frames, 10)
        PIL.Image.fromarray(frames[0]).save(tmp_path / "a.png")
        assert read_clip(tmp_path / "a.mp4", (8, 12), 5).shape == (5, 8, 12, 3)
        assert abs(int(read_clip(tmp_path / "a.mp4", (20, 30), 9).mean()) - 200) < 3
        assert read_clip(tmp_path / "a.png", (8, 12), 5).shape == (1, 8, 12, 3)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.mp4", b"no video", "cannot be read"),
            ("a.mp4", b"\0\0\0\x20ftypisom" + b"\0" * 400, "cannot be read"),
            ("a.mp4", b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n", "cannot be read"),
            ("a.png", b"\x89PNG\r\n\x1a\n" + b"\0" * 50, "must be a complete image"),
            ("a.png", b"", "must be a complete image"),
        ],
    )
    def test_invalid_clips_are_refused(self, tmp_path, name, content, message):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_clip(tmp_path / name, (8, 12), 5)

    def test_depth_images_raise(self, tmp_path):
        depth = np.linspace(0, 3000, 32 * 24).reshape(32, 24).astype(np.uint16)
        PIL.Image.fromarray(depth).save(tmp_path / "depth.png")
        with pytest.raises(ValueError, match="has mode 'I;16'; 8-bit RGB or grayscale is required"):
            read_clip(tmp_path / "depth.png", (96, 96), 2)

    def test_huge_pictures_are_not_decoded(self, tmp_path):
        PIL.Image.new("1", (5100, 5000)).save(tmp_path / "a.png")
        with pytest.raises(ValueError, match="at most 25 million pixels, got 5100x5000"):
            read_clip(tmp_path / "a.png", (8, 12), 5)

    def test_pictures_are_rotated_and_cropped(self, tmp_path):
        picture = np.zeros((30, 20, 3), np.uint8)  # green above red above blue, stored rotated
        picture[:, :5], picture[:, 5:15], picture[:, 15:] = (0, 0, 255), (255, 0, 0), (0, 255, 0)
        exif = PIL.Image.Exif()
        exif[0x0112] = 8  # rotate by 90 degrees counter-clockwise
        PIL.Image.fromarray(picture).save(tmp_path / "a.png", exif=exif)
        (clip,) = read_clip(tmp_path / "a.png", (10, 30), 5)
        np.testing.assert_array_equal(clip[2:-2], np.broadcast_to([255, 0, 0], (6, 30, 3)))

    def test_images_and_videos_are_cropped_alike(self, tmp_path):
        """A gray square with a black center, between red margins: only the square is left, undistorted."""
        frames = np.zeros((3, 48, 96, 3), np.uint8)
        frames[:] = (200, 0, 0)
        frames[:, :, 24:72] = 128
        frames[:, 12:36, 36:60] = 0
        write_video(tmp_path / "a.mp4", frames, 10)
        PIL.Image.fromarray(frames[0]).save(tmp_path / "a.png")
        expected = np.full((24, 24, 3), 128)
        expected[6:18, 6:18] = 0
        for name in ("a.png", "a.mp4"):
            clip = read_clip(tmp_path / name, (24, 24), 5).astype(int)
            assert np.abs(clip[:, 1:-1, 1:-1] - expected[1:-1, 1:-1]).mean() < 6, name

    def test_frames_larger_than_the_header_says_are_refused(self, tmp_path):
        with av.open(str(tmp_path / "a.avi"), "w") as container:
            stream = container.add_stream("mjpeg", rate=10, width=16, height=16)
            stream.pix_fmt = "yuvj420p"
            for size in (16, 5000):
                file = io.BytesIO()
                PIL.Image.new("RGB", (size, size)).save(file, "JPEG")
                packet = av.Packet(file.getvalue())
                packet.stream, packet.pts, packet.dts, packet.is_keyframe = stream, size, size, True
                container.mux(packet)
        with pytest.raises(ValueError, match="5000x5000 pixels: upload a video with at most 16 million"):
            read_clip(tmp_path / "a.avi", (8, 12), 5)


class TestScenes:
    def test_examples_have_ground_truth(self, world):
        for scene in examples(world):
            end = 30 - len(scene.truth)
            np.testing.assert_array_equal(scene.history, world.clip[end - 2 : end])
            np.testing.assert_array_equal(scene.recorded, world.clip_actions[end - 2 :])
            assert len(scene.truth) == len(scene.recorded) >= 12

    def test_uploaded_video_is_ground_truth_of_uploaded_actions(self, world, tmp_path):
        path = write_video(tmp_path / "a.mp4", world.clip, 10)
        scene = upload_scene(path, world)
        assert (len(scene.history), len(scene.truth)) == (2, 28)
        assert len(known_truth(FILE, scene)) == 28
        assert len(known_truth(DRAWN, scene)) == 0
        assert action_kinds(world, scene) == [DRAWN, FILE]
        example = examples(world)[0]
        assert len(known_truth(RECORDED, example)) == 28
        assert len(known_truth(FILE, example)) == 0

    @pytest.mark.parametrize(
        ("kind", "length", "message"),
        [
            (FILE, 5, "Upload a file"),
            (RECORDED, 5, "Nothing is recorded"),
            (DRAWN, 5, "nothing is drawn"),
            (DRAWN, 61, "1 to 60"),
        ],
    )
    def test_missing_actions_are_reported(self, world, kind, length, message):
        scene = Scene(world.clip[:2], world.clip[:0])
        with pytest.raises(ValueError, match=message):
            choose_actions(kind, scene, world, [], None, length, 1.0)


class TestSettings:
    def test_compatible_schedulers_with_own_first(self, world):
        names = scheduler_names(world.pipeline)
        assert names[0] == "DDIMScheduler"
        assert {"PNDMScheduler", "EulerDiscreteScheduler"} < set(names)
        assert "EDMEulerScheduler" not in names
        view = pipeline_of(Setting(world, "EulerDiscreteScheduler", 3, 0))
        assert type(view.scheduler).__name__ == "EulerDiscreteScheduler"
        assert view.transformer is world.pipeline.transformer
        assert type(world.pipeline.scheduler).__name__ == "DDIMScheduler"
        assert pipeline_of(Setting(world, "DDIMScheduler", 3, 0)).scheduler is not world.pipeline.scheduler

    def test_settings_are_named_by_their_differences(self, world):
        first = Setting(world, "DDIMScheduler", 2, 0)
        assert list(name_settings(first, None)) == ["Prediction"]
        assert list(name_settings(first, Setting(world, "DDIMScheduler", 1, 5))) == [
            "A: 2 steps, seed 0",
            "B: 1 step, seed 5",
        ]
        with pytest.raises(ValueError, match="Both settings are the same"):
            name_settings(first, first)
        for bad in (Setting(world, "EDMEulerScheduler", 2, 0), Setting(world, "DDIMScheduler", 101, 0)):
            with pytest.raises(ValueError, match=r"does not accept the scheduler|Steps must be"):
                pipeline_of(bad)

    def test_windows_equal_one_call(self, world):
        setting = Setting(world, "DDIMScheduler", 1, 3)
        history, actions = world.clip[:2], world.clip_actions[:16]

        async def windows():
            return [part async for part in predict(pipeline_of(setting), setting, history, actions)]

        parts = asyncio.run(windows())
        generator = torch.Generator().manual_seed(3)
        (whole,) = predict_whole(pipeline_of(setting), setting, history, actions, generator)
        assert [len(part) for part in parts] == [2] * 8
        assert np.abs(np.concatenate(parts)[:14].astype(int) - whole[:14]).max() <= 1
        assert whole.shape == (16, 96, 96, 3)

    def test_errors_cover_the_ground_truth(self):
        truth = np.full((2, 4, 6, 3), 100, np.uint8)
        prediction = np.concatenate([truth, truth[:1]]) + np.array([0, 51, 0], np.uint8)[:, None, None, None]
        values = errors(prediction, truth)
        assert np.isnan(values[0])
        assert values[1] == pytest.approx(-20 * np.log10(0.2))
        assert len(values) == 2
        assert {part.shape for part in align({"a": truth, "b": prediction}).values()} == {(3, 4, 6, 3)}

    def test_viewer_sheet_contains_every_frame(self):
        frames = np.random.default_rng(0).integers(0, 256, (7, 5, 9, 3), dtype=np.uint8)
        (panel,) = videos({"a": frames}, 10)["panels"]
        sheet = np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(panel["sheet"].split(",")[1]))))
        for number, frame in enumerate(frames):
            row, column = divmod(number, panel["columns"])
            np.testing.assert_array_equal(sheet[row * 5 : row * 5 + 5, column * 9 : column * 9 + 9], frame)


@pytest.fixture
def trajectory(page, app_url):
    page.goto(app_url)
    page.get_by_role("tab", name="Trajectory").click()
    page.locator("#trajectory-pad .starts button").first.wait_for()
    return page


def set_length(page, frames):
    page.locator("#trajectory-length input[type=number]").fill(str(frames))
    page.locator("#trajectory-length input[type=number]").press("Tab")


def shown_frames(page):
    """Return the last frame of each video, (N, 96, 96, 3)."""
    slider = page.locator("#trajectory-view .frame")
    slider.fill(slider.get_attribute("max"))
    urls = page.locator("#trajectory-view canvas").evaluate_all("all => all.map(one => one.toDataURL())")
    return np.stack(
        [np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGB")) for url in urls]
    )


def upload(page, name, content):
    file = {"name": name, "mimeType": "application/octet-stream", "buffer": content}
    page.locator("#trajectory-file input[type=file]").set_input_files(file)
    page.locator("#trajectory-file").get_by_text(name.split(".")[0]).first.wait_for()


def set_steps(page, steps):
    page.locator("#trajectory-steps-a input").fill(str(steps))
    page.locator("#trajectory-steps-a input").press("Tab")


def draw_up(page):
    page.locator("#trajectory-pad .stage").scroll_into_view_if_needed()
    box = page.locator("#trajectory-pad .stage").bounding_box()
    page.mouse.move(box["x"] + 0.12 * box["width"], box["y"] + 0.65 * box["height"])
    page.mouse.down()
    for y in np.linspace(0.65, 0.25, 12):
        page.mouse.move(box["x"] + 0.12 * box["width"], box["y"] + y * box["height"])
        time.sleep(0.01)
    page.mouse.up()


def test_pusher_follows_drawn_path(trajectory):
    page = trajectory
    set_length(page, 12)
    draw_up(page)
    page.locator("#trajectory-status").get_by_text("12 frames in").wait_for()
    ((x, y),) = read_poses(shown_frames(page)).pusher
    assert abs(x - 0.12 * 96) < 3
    assert 0.2 * 96 < y < 0.4 * 96  # the pusher starts at 0.65 and lags behind its target


def test_new_path_replaces_running_prediction(trajectory):
    page = trajectory
    page.locator("#trajectory-settings > button, #trajectory-settings .label-wrap").first.click()
    for frames, steps in [(60, 40), (6, 2)]:
        set_length(page, frames)
        set_steps(page, steps)
        draw_up(page)
        page.locator("#trajectory-stop").wait_for()
    page.locator("#trajectory-status").get_by_text("6 frames in").wait_for(timeout=30_000)
    page.locator("#trajectory-run").wait_for()


def test_valid_and_invalid_action_files(trajectory):
    page = trajectory
    page.get_by_label("From a file").check()
    page.locator("#trajectory-run").click()
    page.locator("#trajectory-status").get_by_text("No prediction: Upload a file of actions first.").wait_for()
    for name, content, message in [
        ("bad-0.npy", *BAD_ACTIONS[0][1:]),
        ("bad-2.npy", *BAD_ACTIONS[2][1:]),
        ("good.csv", b"60,330\n65,320\n70,310\n", "3 frames in"),
    ]:
        upload(page, name, content)
        page.locator("#trajectory-run").click()
        page.locator("#trajectory-status").get_by_text(message).wait_for()
        if message != "3 frames in":
            assert_idle(page)
            page.locator("#trajectory-file").get_by_label("Clear").or_(
                page.locator("#trajectory-file").get_by_label("Remove this file")
            ).first.click()
    with page.expect_download() as download:
        page.locator("#trajectory-table").click()
    assert download.value.path().read_text() == "target_x,target_y\n60,330\n65,320\n70,310\n"


def test_two_seeds_next_to_ground_truth(trajectory):
    page = trajectory
    set_length(page, 6)  # recorded actions are the default
    page.locator("#trajectory-settings > button, #trajectory-settings .label-wrap").first.click()
    page.get_by_label("Compare with a second setting").check()
    page.locator("#trajectory-seed-b input").fill("7")
    page.locator("#trajectory-seed-b input").press("Tab")
    page.locator("#trajectory-run").click()
    page.locator("#trajectory-status").get_by_text("12 frames in").wait_for()
    assert page.locator("#trajectory-view figcaption").all_inner_texts() == ["Truth", "A: seed 0", "B: seed 7"]
    truth, first, second = shown_frames(page).astype(float)
    assert 0 < np.abs(first - second).mean() < np.abs(first - 128).mean()
    assert np.abs(first - truth).mean() < 5
    page.locator("#trajectory-errors").wait_for()


def test_invalid_starts_are_refused(trajectory, tmp_path):
    page = trajectory
    PIL.Image.new("1", (5100, 5000)).save(tmp_path / "huge.png")
    (tmp_path / "broken.mp4").write_bytes(b"\0\0\0\x20ftypisom" + b"\0" * 400)
    PIL.Image.new("RGB", (60, 40), "red").save(tmp_path / "red.png")
    before = page.locator("#trajectory-pad .stage img").get_attribute("src")
    for name, message in [("huge.png", "at most 25 million"), ("broken.mp4", "cannot be read")]:
        with page.expect_file_chooser() as chooser:
            page.locator("#trajectory-upload").click()
        chooser.value.set_files(tmp_path / name)
        page.locator("#trajectory-status").get_by_text(message).wait_for()
        assert page.locator("#trajectory-pad .stage img").get_attribute("src") == before
    with page.expect_file_chooser() as chooser:
        page.locator("#trajectory-upload").click()
    chooser.value.set_files(tmp_path / "red.png")
    page.wait_for_function("before => document.querySelector('#trajectory-pad .stage img').src !== before", arg=before)


def assert_idle(page):
    """Check that Predict is visible, no prediction is running, and no earlier result is shown."""
    page.locator("#trajectory-run").wait_for()
    page.locator("#trajectory-stop").wait_for(state="hidden")
    for part in ("errors", "strip", "picture", "video", "table"):
        assert page.locator(f"#trajectory-{part}").is_hidden(), part
    page.locator("#trajectory-status .error, #trajectory-status .progress-text").wait_for(state="detached")


def test_long_prediction_can_be_stopped(trajectory):
    page = trajectory
    page.get_by_label("Recorded").check()
    set_length(page, 3)
    page.locator("#trajectory-run").click()
    page.locator("#trajectory-status").get_by_text("3 frames in").wait_for()
    page.locator("#trajectory-table").wait_for()
    set_length(page, 60)
    page.locator("#trajectory-settings > button, #trajectory-settings .label-wrap").first.click()
    set_steps(page, 40)
    page.locator("#trajectory-run").click()
    page.locator("#trajectory-stop").wait_for()
    assert page.locator("#trajectory-table").is_hidden()
    assert "3 frames in" not in page.locator("#trajectory-status").inner_text()
    page.locator("#trajectory-stop").click()
    page.get_by_text("Stopped.").wait_for()
    assert_idle(page)
    page.wait_for_function("document.activeElement.id === 'trajectory-run'")
    frames = page.locator("#trajectory-view .frame").get_attribute("max")
    page.wait_for_timeout(2000)
    assert page.locator("#trajectory-view .frame").get_attribute("max") == frames
    assert page.locator("#trajectory-status").get_by_text("Stopped.").is_visible()
    assert_idle(page)
