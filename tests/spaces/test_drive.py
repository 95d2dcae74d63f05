"""The Drive page in a real browser."""

import base64
import io
import json
import re
import urllib.request

import numpy as np
import PIL.Image
import pytest

from irasim_diffusers.data import read_video

OPEN = "frame 46"  # the pusher has room on all sides
TARGET = np.array([64, 30])  # the pusher's target in that frame, pixels


@pytest.fixture
def drive(page, app_url):
    page.goto(app_url)
    page.locator(".begin").wait_for()
    return page


def picture(page):
    url = page.evaluate("document.querySelector('.stage canvas').toDataURL()")
    return np.asarray(PIL.Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))).convert("RGB"))


def pusher(page):
    """Return the center (x, y) of the blue pixels, also if the pusher is partly outside the picture."""
    frame = picture(page).astype(int)
    return np.argwhere(frame[..., 2] - frame[..., 0] > 90).mean(axis=0)[::-1]


def predicted(page):
    found = re.match(r"\d+", page.locator(".count").inner_text() or "0")
    return int(found[0]) if found else 0


def choose(page, name):
    page.get_by_label(f"Start from {name}", exact=True).click()
    page.locator(".begin").wait_for(state="hidden")
    page.locator(".busy").wait_for(state="hidden")


def wait_for_rest(page):
    page.wait_for_function("!document.querySelector('.drive').classList.contains('running')")


def wait_for_frames(page, number):
    page.wait_for_function(
        "number => parseInt(document.querySelector('.count').textContent || '0') >= number", arg=number
    )


def hold(page, press, release, frames=5):
    before = predicted(page)
    press()
    wait_for_frames(page, before + frames)
    release()
    wait_for_rest(page)


def test_start_moves_the_robot(drive):
    before = picture(drive)
    drive.locator(".begin").click()
    wait_for_frames(drive, 3)
    wait_for = "document.querySelector('.drive').figures.shown.length >= 3"
    drive.wait_for_function(wait_for)
    assert np.abs(picture(drive).astype(int) - before).max() > 100
    drive.close()  # while a prediction runs


DIRECTIONS = {"ArrowLeft": (0, -1), "ArrowRight": (0, 1), "ArrowUp": (1, -1), "ArrowDown": (1, 1)}


def test_pusher_moves_in_direction_of_key(drive):
    choose(drive, OPEN)
    drive.get_by_role("slider", name="Speed").fill("0.2")
    for key, (axis, sign) in DIRECTIONS.items():
        hold(drive, lambda key=key: drive.keyboard.down(key), lambda key=key: drive.keyboard.up(key), 6)
        moved = pusher(drive) - TARGET
        assert moved[axis] * sign > 4, key
        assert abs(moved[1 - axis]) < 4, key
        drive.get_by_role("button", name="Reset").click()
        drive.locator(".count").wait_for(state="hidden")
    hold(drive, lambda: drive.keyboard.down("d"), lambda: drive.keyboard.up("d"), 6)
    assert (pusher(drive) - TARGET)[0] > 4


def test_buttons_and_pointer_steer(drive):
    choose(drive, OPEN)
    drive.get_by_role("slider", name="Speed").fill("0.2")
    drive.get_by_label("target_y -").hover()
    hold(drive, drive.mouse.down, drive.mouse.up, 6)
    assert (pusher(drive) - TARGET)[1] < -4
    drive.get_by_role("slider", name="Speed").fill("1")
    box = drive.locator(".stage canvas").bounding_box()
    goal = np.array([0.8, 0.3])  # fractions of the picture
    drive.mouse.move(*(np.array([box["x"], box["y"]]) + goal * [box["width"], box["height"]]))
    before = predicted(drive)
    drive.mouse.down()
    wait_for_frames(drive, before + 2)
    wait_for_rest(drive)  # prediction pauses at the goal
    assert np.linalg.norm(pusher(drive) - goal * 96) < 8
    before, goal = predicted(drive), np.array([0.6, 0.15])  # drag without releasing
    drive.mouse.move(*(np.array([box["x"], box["y"]]) + goal * [box["width"], box["height"]]))
    wait_for_frames(drive, before + 2)
    wait_for_rest(drive)
    drive.mouse.up()
    assert np.linalg.norm(pusher(drive) - goal * 96) < 8
    before, goal = predicted(drive), np.array([0.8, 0.5])  # a single click
    drive.mouse.click(*(np.array([box["x"], box["y"]]) + goal * [box["width"], box["height"]]))
    assert drive.locator(".stage .goal").is_visible()
    wait_for_frames(drive, before + 2)
    wait_for_rest(drive)
    assert drive.locator(".stage .goal").is_hidden()
    assert np.linalg.norm(pusher(drive) - goal * 96) < 8


def test_last_chosen_start_is_used(drive):
    drive.get_by_role("slider", name="Speed").fill("0.2")
    for name in ("frame 1", OPEN):  # the second click comes before the first start has finished
        drive.evaluate(f"document.querySelector('[data-start=\"{name}\"]').click()")
    hold(drive, lambda: drive.keyboard.down("d"), lambda: drive.keyboard.up("d"), 3)
    assert np.linalg.norm(pusher(drive) - TARGET) < 20


def test_keys_act_only_on_the_drive_page_and_not_in_a_slider(drive):
    choose(drive, OPEN)
    drive.get_by_role("slider", name="Speed").focus()
    drive.keyboard.press("ArrowRight")
    assert drive.get_by_role("slider", name="Speed").input_value() == "1.1"
    assert predicted(drive) == 0
    drive.get_by_role("tab", name="Trajectory").click()
    drive.keyboard.down("d")
    drive.wait_for_timeout(400)
    drive.keyboard.up("d")
    drive.get_by_role("tab", name="Drive").click()
    assert predicted(drive) == 0
    hold(drive, lambda: drive.keyboard.down("d"), lambda: drive.keyboard.up("d"), 2)  # while the tab has the focus
    drive.locator("h1").click()
    drive.evaluate("document.activeElement.blur()")
    hold(drive, lambda: drive.keyboard.down("ArrowRight"), lambda: drive.keyboard.up("ArrowRight"), 2)


def hide(page, hidden):
    page.evaluate(
        "hidden => { Object.defineProperty(document, 'hidden', { value: hidden, configurable: true });"
        "document.dispatchEvent(new Event('visibilitychange')); }",
        hidden,
    )


def test_a_session_is_kept_and_a_recording_outlives_it(drive, app_url):
    """The page is told that sessions end after two seconds; the test ends the session on the server."""
    sessions = []

    def start(route):
        answer = route.fetch()
        data = answer.json()["data"]
        sessions.append(data[0])
        route.fulfill(response=answer, json={"data": [*data[:2], data[2] | {"idle_seconds": 2}]})

    kept = []
    drive.on("request", lambda request: request.url.endswith("/run/undo") and kept.append(request))
    drive.route("**/run/start", start)
    choose(drive, OPEN)
    hold(drive, lambda: drive.keyboard.down("w"), lambda: drive.keyboard.up("w"), 4)
    title = drive.title()
    drive.wait_for_timeout(1500)
    assert len(kept) >= 1
    hide(drive, True)
    del kept[:]
    drive.wait_for_function("document.title.startsWith('Session ends in')")
    drive.wait_for_function("document.title.startsWith('Session ended')")
    assert kept == []
    body = json.dumps({"data": sessions}).encode()
    request = urllib.request.Request(f"{app_url}gradio_api/run/stop", body, {"Content-Type": "application/json"})
    urllib.request.urlopen(request).close()
    frames, before = predicted(drive), picture(drive)
    hide(drive, False)
    drive.get_by_text("The recording was restored.").wait_for()
    assert len(sessions) == 2
    assert drive.title() == title
    assert predicted(drive) == frames
    np.testing.assert_array_equal(picture(drive), before)
    hold(drive, lambda: drive.keyboard.down("s"), lambda: drive.keyboard.up("s"), 3)
    drive.get_by_role("button", name="Save video").click()
    with drive.expect_download() as download:
        drive.get_by_role("link", name="Actions (npy)").click()
    actions = np.load(download.value.path())
    assert len(actions) == predicted(drive) >= frames + 3
    assert (np.diff(actions[:4, 1]) < 0).all()  # up, as driven in the first session


def test_recording_undo_and_replay(drive, tmp_path):
    choose(drive, OPEN)
    assert drive.get_by_role("button", name="Save video").is_disabled()
    hold(drive, lambda: drive.keyboard.down("w"), lambda: drive.keyboard.up("w"), 8)
    frames = predicted(drive)
    drive.wait_for_function("number => document.querySelector('.drive').figures.shown.length >= number", arg=frames)
    last = picture(drive)
    drive.get_by_role("button", name="Replay").click()
    drive.get_by_role("button", name="Stop").wait_for()
    drive.get_by_role("button", name="Replay").wait_for()
    np.testing.assert_array_equal(picture(drive), last)
    drive.get_by_role("button", name="Undo").click()
    drive.wait_for_function(
        "number => parseInt(document.querySelector('.count').textContent || '0') === number", arg=max(0, frames - 10)
    )
    kept = predicted(drive)
    drive.get_by_role("button", name="Save video").click()
    for link, suffix in (("Video (mp4)", "mp4"), ("Actions (npy)", "npy")):
        with drive.expect_download() as download:
            drive.get_by_role("link", name=link).click()
        download.value.save_as(tmp_path / f"drive.{suffix}")
    assert read_video(tmp_path / "drive.mp4").shape == (1 + kept, 96, 96, 3)
    actions = np.load(tmp_path / "drive.npy")
    assert actions.shape == (kept, 2)
    assert (np.diff(actions[:4, 1]) < 0).all()  # up


def test_valid_and_invalid_uploads(drive, tmp_path):
    field = drive.locator(".starts input[type=file]")
    for name, content in {"text.png": b"no picture", "empty.png": b""}.items():
        (tmp_path / name).write_bytes(content)
        field.set_input_files(tmp_path / name)
        drive.locator(".message.bad").wait_for()
        choose(drive, OPEN)  # the page still works
    good = tmp_path / "good.png"
    PIL.Image.fromarray(picture(drive)).resize((192, 192)).save(good)
    robot = pusher(drive)
    drive.get_by_role("slider", name="Speed").fill("0.2")
    field.set_input_files(good)
    drive.get_by_text("Click on the robot in the image, then drive.").wait_for()
    box = drive.locator(".stage canvas").bounding_box()
    drive.mouse.click(*(np.array([box["x"], box["y"]]) + (robot + 0.5) / 96 * [box["width"], box["height"]]))
    drive.locator(".message").wait_for(state="hidden")
    hold(drive, lambda: drive.keyboard.down("ArrowDown"), lambda: drive.keyboard.up("ArrowDown"), 8)
    moved = pusher(drive) - robot
    assert moved[1] > 5
    assert abs(moved[0]) < 4


def test_page_fits_a_phone(browser, app_url):
    context = browser.new_context(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    page = context.new_page()
    page.goto(app_url)
    page.locator(".begin").tap()
    wait_for_frames(page, 2)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    box = page.locator(".pad").bounding_box()
    assert box["y"] + box["height"] < 844  # visible without scrolling
    context.close()
