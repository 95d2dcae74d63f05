import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import threading
import time

import numpy as np
import PIL.Image
import pytest
from poses import read_poses

from irasim_diffusers import DrivingSession, IRASimPipeline, Steering, embedded_checkpoint
from irasim_diffusers.cli import main
from irasim_diffusers.commands.files import read_actions
from irasim_diffusers.commands.play import follow, play
from irasim_diffusers.commands.terminal import HELD, Keys, decode_keys, draw
from irasim_diffusers.data import read_video
from irasim_diffusers.devices import fast_dtype

UP, RIGHT = b"\x1b[A", b"\x1bOC"  # plain, and in the keypad's application mode


class Terminal:
    """Pseudo-terminal with a simulated user, who reads the output and presses keys."""

    def __init__(self):
        self.user, self.program = pty.openpty()
        self.before = termios.tcgetattr(self.program)
        self.written = b""

    def look(self, seconds=0.02):
        while select.select([self.user], [], [], seconds)[0]:
            self.written += os.read(self.user, 65536)

    def seconds_driven(self):
        return float(re.findall(rb"\r\n *([\d.]+) s   ", self.written)[-1])

    def wait(self, text, count=1):
        deadline = time.monotonic() + 120
        while self.written.count(text) < count:
            assert time.monotonic() < deadline, self.written[-2000:]
            self.look()

    def hold(self, key, until):
        """Repeat a held key until the given number of seconds has been driven."""
        deadline = time.monotonic() + 120
        while self.seconds_driven() < until:
            assert time.monotonic() < deadline, self.written[-2000:]
            self.press(key)
            self.look(0.04)

    def press(self, key):
        os.write(self.user, key)


@pytest.fixture
def terminal():
    terminal = Terminal()
    yield terminal
    os.close(terminal.user)
    os.close(terminal.program)


def test_pusher_follows_the_keys_of_a_terminal(terminal, tmp_path):
    command = [sys.executable, "-m", "irasim_diffusers.cli", "play", "--output", str(tmp_path / "drive.mp4")]
    streams = {"stdin": terminal.program, "stdout": terminal.program, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **streams, start_new_session=True) as process:
        terminal.wait(b"press a key to drive")
        assert termios.tcgetattr(terminal.program) != terminal.before
        terminal.hold(UP, until=1.2)
        terminal.hold(RIGHT, until=2.6)
        terminal.press(b"q")
        terminal.wait(b"drive.npy")
        assert process.wait(30) == 0, process.stderr.read()
    assert termios.tcgetattr(terminal.program) == terminal.before
    assert terminal.written.index(b"\x1b[?1049h\x1b[?25l") < terminal.written.index(b"\x1b[?25h\x1b[?1049l")
    video, actions = read_video(tmp_path / "drive.mp4"), np.load(tmp_path / "drive.npy")
    assert len(video) == len(actions) + 1 >= 25
    pusher = read_poses(video).pusher
    turn = np.argmax(np.diff(actions[:, 0]) > 0) + 1
    moves = []
    for phase in (pusher[: turn + 1], pusher[turn + 1 :]):
        found = phase[np.isfinite(phase[:, 0])]  # the pusher is not found while it touches the block
        moves.append(found[-1] - found[0])
    (sideways, up), (right, aside) = moves
    assert up < -10
    assert abs(sideways) < 10
    assert right > 10
    assert abs(aside) < 15


@pytest.fixture(scope="module")
def pipe():
    pipe = IRASimPipeline.from_pretrained(embedded_checkpoint(), dtype=fast_dtype("cpu"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def session(pipe):
    folder = embedded_checkpoint()
    start = read_actions(folder / "example_actions.csv")[0]
    return DrivingSession(pipe, read_video(folder / "example.mp4")[:2], Steering(pipe.action_space, 0.5, start))


def drive_as(terminal, monkeypatch, session, user, **options):
    """Run `play` in the terminal while a thread acts as the user."""
    failures = []

    def sit():
        try:
            terminal.wait(b"press a key to drive")
            user()
            while not done.is_set():
                terminal.look()
        except BaseException as error:
            failures.append(error)
            terminal.press(b"q")

    done = threading.Event()
    thread = threading.Thread(target=sit)
    with open(terminal.program, closefd=False) as keys, open(terminal.program, "w", closefd=False) as screen:
        monkeypatch.setattr(sys, "stdin", keys)
        monkeypatch.setattr(sys, "stdout", screen)
        thread.start()
        try:
            return play(session, **options)[0]
        finally:
            done.set()
            thread.join()
            monkeypatch.undo()
            assert failures == []


def test_undo_removes_the_last_second_and_reset_everything(terminal, monkeypatch, session):
    counts = []

    def user():
        for key in (b"u", b"0"):
            standing = terminal.written.count(b"press a key to drive")
            terminal.hold(b"w", until=1.5)
            terminal.press(key)
            terminal.wait(b"press a key to drive", standing + 1)
            counts.append(terminal.seconds_driven())
        terminal.hold(b"d", until=0.2)
        terminal.press(b"\x03")

    assert drive_as(terminal, monkeypatch, session, user) > 0
    assert 0.4 <= counts[0] <= 1.5  # undo removed one second of at least 1.5 s
    assert counts[1] == 0
    assert 0 < len(session) <= 6
    assert session.actions[0, 0] > session.steering.start[0]
    assert termios.tcgetattr(terminal.program) == terminal.before


def test_sigterm_saves_the_recording_like_a_key(terminal, monkeypatch, session):
    def user():
        terminal.hold(b"w", until=0.2)
        os.kill(os.getpid(), signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    drive_as(terminal, monkeypatch, session, user)
    assert len(session) > 0
    assert termios.tcgetattr(terminal.program) == terminal.before
    assert signal.getsignal(signal.SIGTERM) == handler


def test_error_restores_the_terminal(terminal, monkeypatch, session):
    with pytest.raises(ValueError, match=r"`num_frames` must be in \[1, 16\], got 17"):
        drive_as(terminal, monkeypatch, session, lambda: terminal.press(b"w"), chunk_length=17)
    assert termios.tcgetattr(terminal.program) == terminal.before
    assert terminal.written.endswith(b"\x1b[?25h\x1b[?1049l")


def test_key_presses_and_repeats(terminal):
    keys = Keys(terminal.program)
    attributes = termios.tcgetattr(terminal.program)
    attributes[3] &= ~(termios.ICANON | termios.ECHO)
    termios.tcsetattr(terminal.program, termios.TCSANOW, attributes)
    terminal.press(b"w\x1b[")
    assert keys.read(1) == {"w"}
    terminal.press(b"C")
    assert keys.read(1) == {"ArrowRight"}
    assert keys.read(0) == set()
    time.sleep(HELD + 0.05)
    assert keys.held() == {"w", "ArrowRight"}  # pressed since the last call
    assert keys.held() == set()
    terminal.press(b"w")
    keys.read(1)
    assert keys.held() == keys.held() == {"w"}
    keys.release()
    assert keys.held() == set()


@pytest.mark.parametrize(
    ("read", "keys", "rest"),
    [
        (b"wQ0", ["w", "q", "0"], b""),
        (b"\x1b[A\x1b[B\x1b[C\x1b[D", ["ArrowUp", "ArrowDown", "ArrowRight", "ArrowLeft"], b""),
        (b"\x1bOA\x1b[1;2Dw", ["ArrowUp", "ArrowLeft", "w"], b""),
        (b"\x7f\x08\x03", ["Backspace", "Backspace", "\x03"], b""),
        (b"a\x1b", ["a"], b"\x1b"),
        (b"a\x1b[1;", ["a"], b"\x1b[1;"),
        (b"\x1b[3~\x1b[15~q", ["q"], b""),  # Delete, F5
        (b"\x1bq", ["q"], b""),  # Escape, then q
        (b"\x1b\x1b[A", ["ArrowUp"], b""),
        (b"\x1b[\x03", ["[", "\x03"], b""),
        (b"\xc3\xa4", ["\xe3", "\xa4"], b""),
    ],
)
def test_terminal_bytes_are_decoded_to_keys(read, keys, rest):
    found = decode_keys(read)
    assert ([key for key in found[0] if key != "\x1b"], found[1]) == (keys, rest)
    pieces, unread = [], b""
    for byte in read:
        some, unread = decode_keys(unread + bytes([byte]))
        pieces += some
    assert ([key for key in pieces if key != "\x1b"], unread) == (keys, rest)


def pixels_of(rows):
    """Return the picture that rows of half-block characters show."""
    lines = []
    for row in rows:
        colors, upper, lower = {}, [], []
        for ground, *color, _ in re.findall(r"\x1b\[(38|48);2;(\d+);(\d+);(\d+)m|(▀)", row):
            if ground:
                colors[ground] = [int(value) for value in color]
            else:
                upper.append(colors["38"])
                lower.append(colors["48"])
        assert row.endswith("\x1b[0m")
        lines += [upper, lower]
    return np.array(lines)


def test_a_drawn_picture_shows_every_pixel():
    picture = np.random.default_rng(0).integers(0, 256, (8, 12, 3), dtype=np.uint8)
    picture[2:6, 3:9] = 200  # one run of equal pixels
    np.testing.assert_array_equal(pixels_of(draw(PIL.Image.fromarray(picture), 12, 30)), picture)
    odd = draw(PIL.Image.fromarray(picture[:7]), 12, 30)
    np.testing.assert_array_equal(pixels_of(odd), [*picture[:7], picture[6]])


@pytest.mark.parametrize(("columns", "lines"), [(80, 22), (10, 40), (200, 1), (1, 0)])
def test_a_drawn_picture_fits_the_terminal(columns, lines):
    drawn = pixels_of(draw(PIL.Image.new("RGB", (96, 64), "red"), columns, lines))
    assert drawn.shape[1] <= columns
    assert drawn.shape[0] <= 2 * max(lines, 1)
    assert drawn.shape[1] == columns or drawn.shape[0] >= 2 * lines - 1


def test_a_script_gives_the_same_video_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a.mp4", "b.mp4"):
        assert main(["play", "--script", "up+right*5 hold*2 s", "--seed", "3", "--output", name]) == 0
    assert re.search(
        r"^frames predicted: 8, [\d.]+ frames/s; wrote b.mp4 and b.npy$", capsys.readouterr().out, re.MULTILINE
    )
    difference = read_video("a.mp4").astype(int) - read_video("b.mp4")
    assert np.abs(difference).mean() < 0.5  # bfloat16 rounding depends on the memory alignment of the weights
    moved = np.diff(np.load("a.npy"), axis=0)
    np.testing.assert_allclose(moved, [[16, -16]] * 4 + [[0, 0]] * 2 + [[0, 16]], atol=1e-3)


def test_a_script_is_the_same_as_driving_with_its_keys(session):
    follow(session, "left*3 down", chunk_length=2)
    frames = [np.asarray(frame) for frame in session.frames]
    session.reset()
    driven = session.drive([-1, 0], 2) + session.drive([-1, 0], 1) + session.drive([0, 1], 1)
    np.testing.assert_array_equal(frames, [np.asarray(frame) for frame in driven])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "standard input must be a terminal, got a pipe or a file: run in a terminal, or pass --script"),
        (["--script", ""], "--script must not be empty; example: right"),
        (
            ["--script", "jump*3"],
            r"--script must consist of parts .*got 'jump\*3'; the keys are hold, up, down, right, left, w, ",
        ),
        (["--script", "up*0"], r"--script must consist of .*, got 'up\*0'"),
        (["--script", "right up*"], r"--script must consist of .*, got 'up\*'"),
        (["--script", "up", "--chunk-length", "0"], r"--chunk-length must be at least 1, got 0"),
        (["--script", "up", "--chunk-length", "17"], r"--chunk-length must be at most 16, got 17"),
        (["--script", "up", "--speed", "0"], "--speed must be positive and at most 1000, got 0"),
        (["--script", "up", "--speed", "nan"], "--speed must be positive and at most 1000, got nan"),
        (["--script", "up", "--start", "1", "2", "3"], "--start must have 2 values, one per action component, got 3"),
        (["--script", "up", "--start", "1", "nan"], "--start must be 2 finite numbers"),
        (["--script", "up", "--frames", "frame.png"], "--start must be the current position .*target_x, target_y"),
        (["--script", "up", "--steps", "0"], "--steps must be at least 1, got 0"),
        (["--script", "up", "--output", "clip.png"], "--output must end in .mp4, got 'clip.png'"),
        (["--script", "up", "--model", "nowhere", "--frames", "frame.png"], "--model must be a pipeline folder"),
        (["--script", "up", "--model", "nowhere"], "--frames is required with --model: an image or video"),
    ],
)
def test_bad_options_end_in_one_line_and_exit_with_2(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    PIL.Image.new("RGB", (96, 96)).save("frame.png")
    assert main(["play", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert re.match(f"irasim: error: .*{message}", captured.err.strip().splitlines()[-1])
    assert [path.name for path in tmp_path.iterdir()] == ["frame.png"]
