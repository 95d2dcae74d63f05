"""examples/teleoperate.py with a running Space."""

import io
import json
import os
import re
import signal
import struct
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gradio_client")

from poses import read_poses
from teleoperate import TeleoperateArguments, teleoperate

from irasim_diffusers import embedded_checkpoint
from irasim_diffusers.commands.files import read_actions
from irasim_diffusers.data import read_video

START = read_actions(embedded_checkpoint() / "example_actions.csv")[0]


def pusher_of(video):
    pusher = read_poses(video).pusher
    return pusher[np.isfinite(pusher[:, 0])]


def test_actions_of_file_return_video(app_url, tmp_path):
    table = np.stack([np.full(7, 58.0), np.linspace(330, 200, 7)], axis=1)
    np.savetxt(tmp_path / "actions.csv", table, delimiter=",", header="x,y", comments="")
    arguments = TeleoperateArguments(
        "file", app_url, actions=tmp_path / "actions.csv", output=tmp_path / "out" / "a.mp4"
    )
    video, actions = teleoperate(arguments)
    assert read_video(video).shape == (8, 96, 96, 3)
    np.testing.assert_allclose(np.load(actions), table, atol=1e-4)


def test_pusher_follows_hand_poses(app_url, tmp_path, monkeypatch):
    heights = np.linspace(1.0, 1.25, 121)  # 90 poses per second; y points up, as in headsets
    lines = (json.dumps({"time": n / 90, "position": [0, height, 0]}) for n, height in enumerate(heights))
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    arguments = TeleoperateArguments("poses", app_url, axes="x,-y", scale=800.0, output=tmp_path / "hand.mp4")
    video, actions = teleoperate(arguments)
    np.testing.assert_allclose(np.load(actions)[:, 0], START[0], atol=1e-3)
    # 10 actions per second, one for 9 poses
    np.testing.assert_allclose(np.diff(np.load(actions)[:, 1]), -800 * 0.25 / 120 * 9, atol=1e-2)
    pusher = pusher_of(read_video(video))
    assert pusher[-1, 1] < pusher[0, 1] - 15


def test_pusher_follows_gamepad_until_ctrl_c(app_url, tmp_path):
    os.mkfifo(tmp_path / "js0")

    def push():
        with open(tmp_path / "js0", "wb", buffering=0) as stick:
            stick.write(struct.pack("=IhBB", 0, -32767, 2, 1))  # left stick up
            time.sleep(3)
            os.kill(os.getpid(), signal.SIGINT)
            done.wait(60)

    done, thread = threading.Event(), threading.Thread(target=push, daemon=True)
    thread.start()
    arguments = TeleoperateArguments(
        "gamepad", app_url, gamepad=tmp_path / "js0", speed=0.25, output=tmp_path / "stick.mp4"
    )
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore SIGINT
    try:
        video, actions = teleoperate(arguments)
    finally:
        done.set()
        thread.join(5)
        signal.signal(signal.SIGINT, handler)
    targets = np.load(actions)
    np.testing.assert_allclose(targets[:, 0], START[0], atol=1e-3)
    moved = np.diff(np.concatenate([[START[1]], targets[:, 1]]))
    up = np.argmax(moved < -1)  # the first request may precede the stick event
    np.testing.assert_allclose(moved[:up], 0, atol=1e-3)
    np.testing.assert_allclose(moved[up:], -8, atol=1e-3)
    assert len(read_video(video)) == len(targets) + 1


def test_errors_of_the_space_reach_the_client(app_url, tmp_path):
    np.save(tmp_path / "wide.npy", np.zeros((3, 5)))
    arguments = TeleoperateArguments("file", app_url, actions=tmp_path / "wide.npy", output=tmp_path / "a.mp4")
    with pytest.raises(Exception, match=r"`actions` must be \(n, 2\)"):
        teleoperate(arguments)
    assert not (tmp_path / "a.mp4").exists()


def test_python_code_of_guide_runs(app_url):
    guide = (Path(__file__).parents[2] / "examples" / "teleoperate.md").read_text()
    code = re.search(r"```python\n(.*?)```", guide, re.DOTALL)[1]
    known: dict = {}
    exec(compile(code.replace("http://127.0.0.1:7860", app_url), "teleoperate.md", "exec"), known)
    assert known["first_frame"].startswith("data:image/")
    assert len(known["frames"]) == 2
    assert len(read_video(known["video"])) == 4  # the first frame and two of each call, without the undone frame
