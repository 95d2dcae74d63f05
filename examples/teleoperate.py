"""Drive the robot of a Space with a gamepad, a VR headset or phone, or recorded actions.

    python examples/teleoperate.py --space http://127.0.0.1:7860 --device gamepad
    python tracker.py | python examples/teleoperate.py --device poses --axes=-z,-x,y --scale 1.5
    python examples/teleoperate.py --device file --actions actions.npy --output drive.mp4

The Space (`python spaces/app.py`, or one on the Hub) predicts the frames. This client converts the input of a device
to actions, shows the frames in the terminal, and saves the recording at the end of the input or at Ctrl-C. See
teleoperate.md.
"""

import base64
import json
import os
import select
import shutil
import socket
import struct
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import PIL.Image
from scipy.spatial.transform import Rotation, Slerp
from transformers import HfArgumentParser

from irasim_diffusers.actions import derive_actions, integrate_actions
from irasim_diffusers.commands import check_output, draw, read_actions
from irasim_diffusers.files import temporary_path
from irasim_diffusers.training import check_ranges, exit_without_extra, run_script

try:
    from gradio_client import Client, handle_file
except ModuleNotFoundError as error:
    exit_without_extra(error, "space")

JOYSTICK_EVENT = struct.Struct("=IhBB")  # Linux's js_event: milliseconds, value, type, number
BUTTON, AXIS, INITIAL = 1, 2, 0x80
# Keys of the Space for the axes and buttons of an Xbox gamepad, in the numbering of Linux, negative direction first: left stick
# (0, 1), right stick (3, 4), directional pad (6, 7), buttons A and B.
STICKS = {
    0: ("ArrowLeft", "ArrowRight"),
    1: ("ArrowUp", "ArrowDown"),
    3: ("o", "u"),
    4: ("r", "f"),
    6: ("j", "l"),
    7: ("i", "k"),
}
BUTTONS = {0: "g", 1: "h"}
MOTIONS = ("relative_planar", "relative_euler", "relative_6d")  # action derivations for which poses can be converted


@dataclass
class TeleoperateArguments:
    device: Literal["gamepad", "poses", "file"] = field(metadata={"help": "source of the actions"})
    space: str = field(default="http://127.0.0.1:7860", metadata={"help": "address or Hub id of the Space"})
    model: str = field(default="push-t", metadata={"help": "model in the Space"})
    frames: str = field(default="frame 1", metadata={"help": "start frame: a name in the Space, or an image file"})
    start: list[float] | None = field(
        default=None, metadata={"help": "action that holds the start position, for absolute action spaces"}
    )
    seed: int = field(default=0, metadata={"help": "random seed"})
    output: Path = field(
        default=Path("drive.mp4"),
        metadata={"help": "mp4 file to write; the actions are written to a .npy file of the same name"},
    )
    chunk_length: int = field(default=2, metadata={"help": "frames per request; at most 16, the limit of the Space"})
    gamepad: Path = field(default=Path("/dev/input/js0"), metadata={"help": "Linux joystick device"})
    dead_zone: float = field(
        default=0.15, metadata={"help": "stick deflection below which a stick counts as at rest, in [0, 1)"}
    )
    speed: float = field(
        default=0.5, metadata={"help": "gamepad speed at full deflection, in normalized actions per frame"}
    )
    udp: int | None = field(
        default=None, metadata={"help": "UDP port that receives the poses (default: standard input)"}
    )
    axes: str = field(
        default="x,y,z",
        metadata={"help": "tracker axes for the robot's x, y, z, such as --axes=-z,-x,y; two for planar spaces"},
    )
    scale: float = field(default=1.0, metadata={"help": "units of the action space per meter"})
    actions: Path = field(
        default=Path("actions.csv"), metadata={"help": ".npy, .csv or .json file of recorded actions"}
    )


@dataclass
class Gamepad:
    """State of the sticks and buttons."""

    axes: dict[int, float] = field(default_factory=dict)  # in [-1, 1]; right and down are positive
    buttons: set[int] = field(default_factory=set)  # numbers of the pressed buttons

    def take(self, events: bytes) -> None:
        """Update the state from joystick events; events of other types are ignored."""
        for _, value, kind, number in JOYSTICK_EVENT.iter_unpack(events):
            if kind & ~INITIAL == AXIS:
                self.axes[number] = max(-1.0, value / 32767)
            elif kind & ~INITIAL == BUTTON:
                (self.buttons.add if value else self.buttons.discard)(number)

    def command(self, controls: list[dict[str, Any]], dead_zone: float) -> np.ndarray:
        """Convert the state of sticks and buttons to a command (A,) in [-1, 1]; see `/start` for `controls`."""
        pushed = dict.fromkeys((BUTTONS[number] for number in self.buttons & BUTTONS.keys()), 1.0)
        for axis, (negative, positive) in STICKS.items():
            value = self.axes.get(axis, 0.0)
            pushed[positive if value > 0 else negative] = max(0.0, (abs(value) - dead_zone) / (1 - dead_zone))
        command = np.zeros(1 + max(control["component"] for control in controls))
        for control in controls:
            command[control["component"]] += control["sign"] * pushed.get(control["key"], 0.0)
        return command


def gamepad_commands(path: Path, space: dict[str, Any], dead_zone: float) -> Iterator[list[float]]:
    """Yield the current command until the gamepad is unplugged."""
    gamepad = Gamepad()
    with path.open("rb", buffering=0) as device:
        while True:
            while select.select([device], [], [], 0)[0]:
                try:
                    events = device.read(JOYSTICK_EVENT.size * 64)
                except OSError:
                    return
                if not events:
                    return
                gamepad.take(events)
            command = np.zeros(len(space["names"]))
            steered = gamepad.command(space["controls"], dead_zone)
            command[: len(steered)] = steered
            yield command.tolist()


def read_pose(line: str, axes: np.ndarray, scale: float) -> tuple[float, np.ndarray]:
    """Read the time and the state (x, y, z, roll, pitch, yaw, gripper) of a pose in JSON.

    Args:
        line: `{"time": seconds, "position": [x, y, z], "rotation": [x, y, z, w], "gripper": 0..1}`, meters. A rotation of three
            numbers is roll, pitch and yaw in radians. Rotation and gripper are optional; the default is 0.
        axes: Matrix (3, 3) from tracker axes to robot axes, see `axes_matrix`.
        scale: Units of the action space per meter.

    Raises:
        ValueError: If the line is not a pose.
    """
    try:
        pose = json.loads(line)
        position = np.asarray(pose["position"], dtype=np.float64).reshape(3)
        rotation = np.asarray(pose.get("rotation", [0, 0, 0, 1]), dtype=np.float64)
        turn = Rotation.from_quat(rotation) if len(rotation) == 4 else Rotation.from_euler("xyz", rotation.reshape(3))
        values = np.array([pose["time"], *position, *turn.as_quat(), pose.get("gripper", 0.0)], dtype=np.float64)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"a pose must be a line of JSON with time, position and optional rotation and gripper, got {line!r:.200}: {error}."
        ) from error
    if not np.isfinite(values).all():
        raise ValueError(f"a pose must contain finite numbers only, got {line!r:.200}.")
    turn = Rotation.from_matrix(axes @ turn.as_matrix() @ axes.T)
    return values[0], np.concatenate([scale * axes @ position, turn.as_euler("xyz"), values[-1:]])


def axes_matrix(axes: str) -> np.ndarray:
    """Return the matrix (3, 3) from tracker axes to robot axes.

    `"-z,-x,y"` is for WebXR, in which y is up and -z is forward.

    Raises:
        ValueError: If `axes` is not x, y and z with signs, or two of them, or the result is left-handed.
    """
    names = axes.split(",")
    rows = [(-1.0 if name.startswith("-") else 1.0) * np.eye(3)["xyz".find(name[-1:])] for name in names]
    if len(rows) == 2:
        rows.append(np.cross(rows[0], rows[1]))
    known = all(name.removeprefix("-") in ("x", "y", "z") for name in names)
    if not known or len(rows) != 3 or np.linalg.det(rows) < 0.5:
        raise ValueError(f"`axes` must be x, y and z, right-handed, or two of them, such as -z,-x,y; got {axes!r}.")
    return np.array(rows)


def at_rate(poses: Iterable[tuple[float, np.ndarray]], fps: float) -> Iterator[np.ndarray]:
    """Resample a stream of poses to states (7,) every 1 / fps seconds by interpolation.

    Raises:
        ValueError: If the times do not increase.
    """
    before, first, count = None, 0.0, 0
    for now, state in poses:
        if before is None:
            first = now
        elif now <= before[0]:
            raise ValueError(f"the times of poses must increase, got {now:g} after {before[0]:g}.")
        while first + count / fps <= now + 1e-9:
            yield state if before is None else _between(before, (now, state), first + count / fps)
            count += 1
        before = now, state


def _between(before: tuple[float, np.ndarray], after: tuple[float, np.ndarray], time: float) -> np.ndarray:
    share = min(1.0, (time - before[0]) / (after[0] - before[0]))
    state = (1 - share) * before[1] + share * after[1]
    turns = Rotation.from_euler("xyz", np.stack([before[1][3:6], after[1][3:6]]))
    state[3:6] = Slerp([0.0, 1.0], turns)(share).as_euler("xyz")
    return state


def actions_of_poses(states: np.ndarray, last: np.ndarray, space: dict[str, Any]) -> np.ndarray:
    """Compute actions (n, A) from the states (n + 1, 7) of a hand.

    Each motion is expressed in the frame of the previous pose; a planar motion is a difference of positions. Actions are clipped
    to the bounds of the space.

    Args:
        states: States from `at_rate`, in the units of the space.
        last: Action (A,) before these states, from which absolute targets start.
        space: Description of the action space from `/start`.

    Raises:
        ValueError: If the action space contains neither motions of a hand nor target positions in a plane.
    """
    size, derivation = len(space["names"]), space.get("derivation", "recorded")
    if derivation == "recorded" and space.get("space") == "absolute" and size == 2:
        derivation = "relative_planar"  # two target components are a position in a plane, as in Push-T
    if derivation not in MOTIONS:
        raise ValueError(
            f"poses can be converted to {', '.join(MOTIONS)} actions, or to planar targets of 2 components, got {size} "
            f"components of derivation {derivation!r}: send actions from a file."
        )
    states = states[:, :size] if size < 7 else states
    actions = derive_actions(states, derivation)
    if space["space"] == "absolute":
        actions = integrate_actions(last, actions, derivation)[1:]
    low = [-np.inf if bound is None else bound for bound in space["low"]]
    high = [np.inf if bound is None else bound for bound in space["high"]]
    return np.clip(actions, low, high)


def pose_actions(lines: Iterable[str], arguments: TeleoperateArguments, space: dict[str, Any]) -> Iterator[np.ndarray]:
    """Yield chunks of actions (n, A) as soon as their poses have arrived."""
    axes, last = axes_matrix(arguments.axes), np.array(space["hold"])
    poses = (read_pose(line, axes, arguments.scale) for line in lines if line.strip())
    states: list[np.ndarray] = []
    for state in at_rate(poses, space["fps"]):
        states.append(state)
        if len(states) > arguments.chunk_length:
            yield (actions := actions_of_poses(np.stack(states), last, space))
            states, last = states[-1:], actions[-1]
    if len(states) > 1:
        yield actions_of_poses(np.stack(states), last, space)


def received_lines(port: int) -> Iterator[str]:
    """Yield the lines of the datagrams that arrive at a port of this machine."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("", port))
        while True:
            yield from receiver.recv(65536).decode(errors="replace").splitlines()


def requests(arguments: TeleoperateArguments, space: dict[str, Any]) -> Iterator[tuple[str, list[Any]]]:
    """Yield requests to the Space: an endpoint, and its arguments without the session."""
    if arguments.device == "gamepad":
        for command in gamepad_commands(arguments.gamepad, space, arguments.dead_zone):
            yield "/drive", [command, arguments.chunk_length, arguments.speed]
    elif arguments.device == "poses":
        lines = sys.stdin if arguments.udp is None else received_lines(arguments.udp)
        for actions in pose_actions(lines, arguments, space):
            yield "/step", [actions.tolist()]
    else:
        actions = read_actions(arguments.actions)
        for first in range(0, len(actions), arguments.chunk_length):
            yield "/step", [actions[first : first + arguments.chunk_length].tolist()]


def show(frame: str) -> None:
    """Draw a frame (a data URL) in the terminal."""
    picture = PIL.Image.open(BytesIO(base64.b64decode(frame.partition(",")[2])))
    columns, lines = shutil.get_terminal_size()
    print("\x1b[H" + "\x1b[K\n".join(draw(picture, columns, lines - 1)) + "\x1b[J", flush=True)


def teleoperate(arguments: TeleoperateArguments) -> tuple[Path, Path] | None:
    """Drive until the input ends or Ctrl-C is pressed; return the paths of the video and its actions.

    The result is None if no frame was predicted.

    Raises:
        ValueError: If the Space is not running or reports an error, or the input of the device is invalid.
    """
    try:
        client = Client(arguments.space, verbose=False)
    except Exception as error:  # the client raises errors of many types
        raise ValueError(f"`space` must be a running Space, got {arguments.space!r}: {error}") from error
    picture = handle_file(arguments.frames) if os.path.isfile(arguments.frames) else arguments.frames
    session, first, space = client.predict(
        arguments.model, picture, arguments.start, arguments.seed, api_name="/start"
    )
    drawn, count, due = sys.stdout.isatty(), 0, time.monotonic()
    try:
        if drawn:
            show(first)
        for endpoint, values in requests(arguments, space):
            answer = ask(client, session, *values, api_name=endpoint)
            frames = answer[0] if endpoint == "/drive" else answer
            count += len(frames)
            for frame in frames if drawn else ():
                show(frame)
                due = wait(due, space["fps"])
            if arguments.device == "gamepad" and not drawn:  # drive in real time also without a terminal
                due = wait(due, space["fps"] / len(frames))
    except KeyboardInterrupt:
        pass
    finally:
        written = save(client, session, arguments.output) if count else None
        client.predict(session, api_name="/stop")
    return written


def ask(client: Client, *values: Any, api_name: str) -> Any:
    """Return the answer of an endpoint.

    After Ctrl-C, the answer is still awaited, because a session accepts only one request at a time.
    """
    job = client.submit(*values, api_name=api_name)
    try:
        return job.result()
    except KeyboardInterrupt:
        job.result()
        raise


def wait(due: float, fps: float) -> float:
    """Sleep until the next frame is due; return the time at which it was due."""
    due = max(due + 1 / fps, time.monotonic())
    time.sleep(max(0.0, due - time.monotonic()))
    return due


def save(client: Client, session: str, output: Path) -> tuple[Path, Path]:
    """Download the recording of a session; return the paths of the video and its actions."""
    video, actions = client.predict(session, api_name="/record")
    paths = output.with_suffix(".mp4"), output.with_suffix(".npy")
    for source, path in zip((video, actions), paths, strict=True):
        with temporary_path(path) as partial:
            shutil.copyfile(source, partial)
    return paths


def check_arguments(arguments: TeleoperateArguments) -> None:
    """Check the arguments before the first request to the Space.

    Raises:
        ValueError: If a value is invalid, a file or device does not exist, or `output` cannot be written.
    """
    check_ranges(arguments, not_negative=("seed",), at_least_1=("chunk_length",), positive=("speed", "scale"))
    if arguments.udp is not None and not 1 <= arguments.udp <= 65535:
        raise ValueError(f"`udp` must be a port in [1, 65535], got {arguments.udp}.")
    if not 0 <= arguments.dead_zone < 1:
        raise ValueError(f"`dead_zone` must be in [0, 1), got {arguments.dead_zone:g}.")
    if arguments.device == "file":
        read_actions(arguments.actions)
    if arguments.device == "gamepad" and not arguments.gamepad.exists():
        raise ValueError(
            f"`gamepad` must be a joystick device, got {str(arguments.gamepad)!r}, which does not exist: plug in a gamepad."
        )
    axes_matrix(arguments.axes)
    for suffix in (".mp4", ".npy"):
        check_output(arguments.output.with_suffix(suffix), suffix)


def main() -> None:
    (arguments,) = HfArgumentParser(TeleoperateArguments).parse_args_into_dataclasses()
    check_arguments(arguments)
    written = teleoperate(arguments)
    print(f"wrote {' and '.join(map(str, written))}" if written else "no frames were predicted; nothing was written")


if __name__ == "__main__":
    run_script(main)
