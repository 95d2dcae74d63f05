"""The API of the Space, through gradio_client, plain HTTP and in process."""

import asyncio
import base64
import contextlib
import copy
import http.client
import io
import json
import time
import urllib.error
import urllib.request
from urllib.parse import urlsplit

import gradio_client
import numpy as np
import PIL.Image
import pytest
import torch
from app import build_app
from gradio.utils import get_upload_folder
from sessions import Sessions
from uploads import data_url, uploaded_path
from visitor_files import read_picture
from worlds import Worlds
from zero_gpu import LentPipeline

from irasim_diffusers import DrivingSession, Steering
from irasim_diffusers.data import read_video

SIDEWAYS = [[150.0, 400.0], [200.0, 400.0], [250.0, 400.0]]


def pixels(data_url):
    return np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(data_url.split(",")[1]))).convert("RGB")).astype(int)


@pytest.fixture(scope="module")
def client(app_url):
    return gradio_client.Client(app_url, verbose=False)


@pytest.fixture(scope="module")
def worlds():
    return Worlds(["push-t"])


@pytest.fixture
def session(client):
    name, *_ = client.predict("push-t", "frame 1", None, 0, api_name="/start")
    yield name
    client.predict(name, api_name="/stop")


def test_a_rollout_from_start_to_stop(client):
    session, first, space = client.predict("push-t", "frame 1", None, 0, api_name="/start")
    assert pixels(first).shape == (96, 96, 3)
    assert (space["names"], space["space"], space["fps"]) == (["target_x", "target_y"], "absolute", 10)
    assert (space["low"], space["high"], space["derivation"]) == ([0, 0], [512, 512], "recorded")
    frames = client.predict(session, SIDEWAYS, api_name="/step")
    assert len(frames) == 3
    assert np.abs(pixels(frames[-1]) - pixels(first)).max() > 100
    driven, actions = client.predict(session, [0.5, -1], 2, 0.5, api_name="/drive")
    assert len(driven) == 2
    # the motion starts from the last action; a full command at half speed moves 16 units
    np.testing.assert_allclose(actions, [[258, 384], [266, 368]])
    video, table = client.predict(session, api_name="/record")
    assert read_video(video).shape == (1 + 5, 96, 96, 3)
    np.testing.assert_allclose(np.load(table), [*SIDEWAYS, *actions])
    last, left = client.predict(session, 2, api_name="/undo")
    assert left == 3
    assert last == frames[-1]
    assert client.predict(session, api_name="/reset") == first
    assert client.predict(session, SIDEWAYS, api_name="/step") == frames  # a reset keeps the seed
    assert client.predict(session, api_name="/stop") is True
    assert client.predict(session, api_name="/stop") is False


def test_sessions_are_not_mixed(client):
    right, left = SIDEWAYS, SIDEWAYS[::-1]

    def start():
        return client.predict("push-t", "frame 1", None, 0, api_name="/start")[0]

    def step(session, row):
        return client.predict(session, [row], api_name="/step")[0]

    first = start()
    alone = [step(first, row) for row in right]
    second, third = start(), start()
    beside = [(step(second, one), step(third, other)) for one, other in zip(right, left, strict=True)]
    assert [one for one, _ in beside] == alone
    assert beside[-1][0] != beside[-1][1]
    assert len({first, second, third}) == 3
    assert min(map(len, (first, second, third))) >= 20
    for session in (first, second, third):
        client.predict(session, api_name="/stop")


def test_uploaded_picture_is_resized(client, tmp_path):
    path = tmp_path / "wide.png"
    PIL.Image.new("RGBA", (230, 110), (10, 200, 30, 255)).save(path)
    session, first, space = client.predict("push-t", gradio_client.handle_file(path), [100, 300], 0, api_name="/start")
    assert pixels(first).shape == (96, 96, 3)
    assert space["hold"] == [100, 300]
    assert client.predict(session, api_name="/stop")


FRAME = data_url(PIL.Image.new("RGB", (96, 96)))
BAD = [
    ("/start", ("nope", "frame 1", None, 0), "`model` must be one of push-t, got 'nope'"),
    ("/start", (["push-t"], "frame 1", None, 0), "`model` must be one of"),
    ("/start", ("push-t", "frame 1000", None, 0), "`frames` must be an upload or one of frame 1"),
    ("/start", ("push-t", {"path": "/etc/passwd"}, None, 0), "`frames` must be the name of an example or an uploaded"),
    ("/start", ("push-t", 5, None, 0), "`frames` must be the name of an example or an uploaded"),
    ("/start", ("push-t", "frame 1", [1, 2, 3], 0), "must be"),
    ("/start", ("push-t", "frame 1", None, -1), "`seed` must be a whole number"),
    ("/start", ("push-t", "frame 1", None, "x"), "`seed` must be a whole number"),
    ("/step", ("guess", SIDEWAYS), "`session` must be a name that `start` returned"),
    ("/step", (None, [[1, 2, 3]]), r"`actions` must be \(n, 2\)"),
    ("/step", (None, [[1, None]]), "`actions` must be finite"),
    ("/step", (None, "forward"), "`actions` must be"),
    ("/step", (None, []), "`actions` must be"),
    ("/step", (None, [[1, 2]] * 17), "`actions` must be one sequence of at most 16"),
    ("/drive", (None, [2, 0], 1, 1), r"`command` must be in \[-1, 1\]"),
    ("/drive", (None, [0], 1, 1), "must be"),
    ("/drive", (None, [0, 0], 0, 1), "`frames` must be a whole number"),
    ("/drive", (None, [0, 0], 1.5, 1), "`frames` must be a whole number"),
    ("/drive", (None, [0, 0], 1, 0), "`speed` must be in"),
    ("/restore", (None, "all", []), "`frames` must be a list of 1 to 64"),
    ("/restore", (None, ["data:,"] * 65, []), "`frames` must be a list of 1 to 64"),
    ("/restore", (None, ["data:,"], [[1, 2]]), "`frames` must be WebP data URLs of 96x96"),
    ("/restore", (None, ["data:image/webp;base64,AAAA"], [[1, 2]]), "`frames` must be WebP data URLs of 96x96"),
    (
        "/restore",
        (None, [data_url(PIL.Image.new("RGB", (97, 96)))], [[1, 2]]),
        "`frames` must be WebP data URLs of 96x96",
    ),
    ("/restore", (None, [FRAME], [[1, 2], [3, 4]]), "`frames` must be one image of 96x96 pixels for each action"),
    ("/restore", (None, [FRAME], [[1, 1e30]]), "`actions` must be near the bounds"),
    ("/undo", (None, -1), "`frames` must be a whole number"),
    ("/record", (None,), "no frames to save: call `drive` or `step` first"),
]


@pytest.mark.parametrize(("endpoint", "arguments", "message"), BAD)
def test_invalid_input_is_reported(client, session, endpoint, arguments, message):
    arguments = [session if index == 0 and value is None else value for index, value in enumerate(arguments)]
    with pytest.raises(gradio_client.exceptions.AppError, match=message):
        client.predict(*arguments, api_name=endpoint)


def test_files_outside_uploads_are_not_served(app_url, client):
    for path in ("/etc/passwd", "../../../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd", __file__):
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(f"{app_url}gradio_api/file={path}")
        assert error.value.code in (403, 404)
    disguised = {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}
    status, answer = post(app_url, "start", json.dumps(["push-t", disguised, None, 0]))
    assert status == 500
    assert b"root:" not in answer


def test_plain_http(app_url):
    status, answer = post(app_url, "start", '["push-t", "frame 1", null, 0]')
    assert status == 200
    session = json.loads(answer)["data"][0]
    status, answer = post(app_url, "step", json.dumps([session, SIDEWAYS]))
    assert (status, len(json.loads(answer)["data"][0])) == (200, 3)
    status, answer = post(app_url, "step", json.dumps([session, [[1, float("nan")]]]))
    assert status == 500
    assert b"must be finite, got nan" in answer
    for garbage in ("[]", "[1, 2, 3, 4, 5]", "no JSON"):
        assert post(app_url, "step", garbage)[0] in (422, 500)
    assert json.loads(post(app_url, "stop", json.dumps([session]))[1])["data"] == [True]


def post(app_url, endpoint, data):
    body = f'{{"data": {data}}}'.encode()
    request = urllib.request.Request(f"{app_url}gradio_api/run/{endpoint}", body, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def save(path, name):
    picture = PIL.Image.new("1", (5100, 5000) if name == "huge" else (300, 200))
    picture.save(path, "GIF" if name == "animation" else "PNG")
    content = path.read_bytes()
    if name == "cut":
        path.write_bytes(content[: len(content) - 30])
    elif name == "text":
        path.write_text("no picture")
    elif name == "heavy":
        path.write_bytes(content + bytes(10_000_001))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("huge", "at most 25 million pixels, got 5100x5000"),
        ("heavy", "at most 10 MB"),
        ("cut", "cannot read"),
        ("text", "must be a complete image"),
        ("animation", "must be a complete image"),
    ],
)
def test_invalid_pictures_are_refused(tmp_path, name, message):
    save(tmp_path / "picture", name)
    with pytest.raises(ValueError, match=message):
        read_picture(tmp_path / "picture", (96, 96))


def test_pictures_outside_uploads_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    PIL.Image.new("RGB", (20, 20)).save(tmp_path / "secret.png")
    (tmp_path / "uploads").mkdir()
    (tmp_path / "uploads" / "link.png").symlink_to(tmp_path / "secret.png")
    assert get_upload_folder() == str(tmp_path / "uploads")
    for path in ("secret.png", "uploads/../secret.png", "uploads/link.png"):
        with pytest.raises(ValueError, match="uploaded image"):
            uploaded_path({"path": str(tmp_path / path)})


def new_session(world):
    start = world.starts["frame 1"]
    steering = Steering(world.pipeline.action_space, start=start.action)
    return DrivingSession(world.pipeline, start.frames, steering, max_frames=5)


def test_sessions_are_limited_and_deleted_when_idle(worlds):
    world = worlds["push-t"]
    sessions = Sessions(most=2, idle_seconds=0.5)

    async def visitors():
        first = await sessions.open(world, lambda: new_session(world))
        with sessions.use(first):
            await sessions.open(world, lambda: new_session(world))
            with pytest.raises(ValueError, match="all 2 sessions are in use"):
                await sessions.open(world, lambda: new_session(world))
            with pytest.raises(ValueError, match="another request of this session is running"), sessions.use(first):
                pass
            await asyncio.sleep(1)
            assert len(sessions) == 1  # only the other session was idle
        await asyncio.sleep(1.2)
        assert len(sessions) == 0
        with pytest.raises(ValueError, match="has ended or was idle"), sessions.use(first):
            pass

    asyncio.run(visitors())


def test_starting_and_stopping_sessions_count(worlds):
    world = worlds["push-t"]
    sessions = Sessions(most=3, most_each=2)

    async def open_for(visitor):
        return await sessions.open(world, lambda: new_session(world), visitor)

    async def visitors():
        answers = await asyncio.gather(*(open_for(visitor) for visitor in "aaabb"), return_exceptions=True)
        assert [str(answer)[:24] for answer in answers if isinstance(answer, ValueError)] == [
            "this address already has",
            "all 3 sessions are in us",
        ]
        with sessions.use(answers[0]):
            assert sessions.close(answers[0])
            assert not sessions.close(answers[0])
            with pytest.raises(ValueError, match="all 3 sessions are in use"):
                await open_for("b")
            with pytest.raises(ValueError, match="has ended"), sessions.use(answers[0]):
                pass
        with pytest.raises(ZeroDivisionError):
            await sessions.open(world, lambda: 1 / 0, "a")
        await open_for("b")
        assert len(sessions) == 3

    asyncio.run(visitors())


def test_an_ended_session_is_restored(client):
    """The restored rollout predicts almost the same frames."""
    first, *_ = client.predict("push-t", "frame 1", None, 0, api_name="/start")
    frames = client.predict(first, SIDEWAYS, api_name="/step")
    following = client.predict(first, SIDEWAYS[::-1], api_name="/step")
    client.predict(first, api_name="/stop")
    second, *_ = client.predict("push-t", "frame 1", None, 0, api_name="/start")
    assert client.predict(second, frames[:2], SIDEWAYS[:2], api_name="/restore") == 2
    assert client.predict(second, frames[2:], SIDEWAYS[2:], api_name="/restore") == 3
    restored = client.predict(second, SIDEWAYS[::-1], api_name="/step")
    for one, other in zip(restored, following, strict=True):  # frames are stored with 8 bits
        assert np.abs(pixels(one) - pixels(other)).mean() < 1
    assert client.predict(second, 4, api_name="/undo") == (frames[1], 2)
    client.predict(second, api_name="/stop")


def test_requests_are_served_in_order_of_arrival(worlds):
    world, done = worlds["push-t"], []

    async def visitors():
        async def visit(number):
            await world.run(time.sleep, 0.01)
            done.append(number)

        await asyncio.gather(*(visit(number) for number in range(20)))

    asyncio.run(visitors())
    assert done == list(range(20))


def test_drivers_are_served_between_network_evaluations(worlds):
    """Each request waits for at most one evaluation of a long prediction; the prediction does not change."""
    world = worlds["push-t"]
    session, pipeline = new_session(world), copy.copy(world.pipeline)
    pipeline.scheduler = copy.deepcopy(world.pipeline.scheduler)
    evaluations, waits = [], []

    def predict():
        generator = torch.Generator().manual_seed(0)
        sampling = {"num_inference_steps": 12, "generator": generator, "output_type": "pt"}
        return pipeline(world.starts["frame 1"].frames, [[100.0, 300.0]], **sampling).frames

    alone = predict()

    async def drive():
        for _ in range(3):
            while len(evaluations) < 3 * (len(waits) + 1):
                await asyncio.sleep(0.001)
            asked = len(evaluations)
            served = await world.run(lambda: (len(evaluations), session.drive([1.0, 0.0])))
            waits.append(served[0] - asked)

    async def visitors():
        return (await asyncio.gather(world.run_long(predict), drive()))[0]

    hook = world.pipeline.transformer.register_forward_hook(lambda *_: evaluations.append(None))
    try:
        predicted = asyncio.run(visitors())
    finally:
        hook.remove()
    assert len(waits) == 3
    assert max(waits) <= 1
    torch.testing.assert_close(predicted, alone, rtol=0, atol=0)


def test_a_failing_request_does_not_stop_a_long_prediction(worlds):
    world = worlds["push-t"]

    async def visitors():
        def long():
            return world.pipeline(world.starts["frame 1"].frames, [[100.0, 300.0]], output_type="pt").frames.shape

        return await asyncio.gather(world.run_long(long), world.run(lambda: 1 / 0), return_exceptions=True)

    answer, error = asyncio.run(visitors())
    assert answer == (1, 1, 3, 96, 96)
    assert isinstance(error, ZeroDivisionError)


def test_memory_of_a_session_is_bounded(worlds):
    frames = Sessions(bytes_each=10**6).max_frames(worlds["push-t"])
    assert frames == 10**6 // (96 * 96 * 3 + 96 * 96 * 3 * 4)


def test_lent_pipeline_predicts_same_frames(worlds):
    world = worlds["push-t"]
    lent = LentPipeline("push-t", world.pipeline)
    start = world.starts["frame 1"]
    frames = [
        DrivingSession(pipe, start.frames, Steering(pipe.action_space, start=start.action)).drive([1.0, 0.0], 2)
        for pipe in (world.pipeline, lent)
    ]
    np.testing.assert_array_equal(np.stack(frames[0]), np.stack(frames[1]))


def test_lent_pipeline_advances_state(worlds):
    world = worlds["push-t"]
    lent = LentPipeline("push-t", world.pipeline)
    actions = torch.tensor([[[200.0, 200.0]]]).repeat(2, 1, 1)
    decoded = []
    for pipe in (world.pipeline, lent):
        with torch.no_grad():
            state, latents = pipe.advance(pipe.start(world.starts["frame 1"].frames, [3, 4]), actions=actions)
            decoded.append(pipe.decode(latents))
        assert state.step.tolist() == [1, 1]
    torch.testing.assert_close(decoded[0], decoded[1], rtol=0, atol=0)


def test_page_shows_models_that_cannot_be_loaded(worlds):
    broken = Worlds(["/no/such/<b>model</b>"])
    assert list(broken.failures) == ["/no/such/<b>model</b>"]
    with pytest.raises(ValueError, match="none could be loaded"):
        broken.named("push-t")
    texts = str(build_app(broken, Sessions()).get_config_file()["components"])
    assert "&lt;b&gt;model&lt;/b&gt; cannot be loaded" in texts


def chunked(app_url, path, size):
    """POST a body without its length, in chunks of 100 kB; return the status."""
    connection = http.client.HTTPConnection(urlsplit(app_url).netloc)
    with contextlib.suppress(OSError):  # the server responds and closes the connection before the whole body is sent
        connection.request("POST", path, (b"[" * 100_000 for _ in range(size // 100_000)), encode_chunked=True)
    status = connection.getresponse().status
    connection.close()
    return status


def test_bodies_are_limited_except_for_uploads(app_url, client, tmp_path):
    too_long = json.dumps([None, [[1.0, 2.0]] * 100_000])
    assert post(app_url, "step", too_long)[0] == 413
    assert chunked(app_url, "/gradio_api/run/step", 2_000_000) == 413
    assert chunked(app_url, "/gradio_api/queue/join", 2_000_000) == 413
    assert chunked(app_url, "/gradio_api/run/gradio_api/upload", 2_000_000) == 413
    # a body of 0.6 MB reaches the endpoint, which refuses it
    assert post(app_url, "step", json.dumps([None, [[1.0, 2.0]] * 50_000]))[0] == 500
    path = tmp_path / "noise.png"
    noise = np.random.default_rng(0).integers(0, 256, (800, 800, 3), dtype=np.uint8)
    PIL.Image.fromarray(noise).save(path)
    assert path.stat().st_size > 1_900_000
    session, *_ = client.predict("push-t", gradio_client.handle_file(path), [100, 300], 0, api_name="/start")
    assert client.predict(session, api_name="/stop")
