"""Error handling, signal handling and argument checks of the example scripts."""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn, Self

from safetensors import SafetensorError

from ..version import INSTALL

if TYPE_CHECKING:
    from accelerate import Accelerator

OTHER_RANK_DELAY = 5.0
"""Seconds that other processes wait before they print an error that the main process has probably printed."""
REPEATED_SIGNAL_DELAY = 5.0
"""Seconds during which a repeated Ctrl-C counts as the first one: the terminal and the launcher both send it."""


def run_script(main: Callable[[], None]) -> None:
    """Run the main function of a script, and report invalid input and other expected errors in one line.

    Empty values of flags are rejected, because an empty path names the current folder. Under `accelerate launch`, an error that
    occurs in every process is printed once.

    Args:
        main: Function without arguments.

    Raises:
        SystemExit: With status 2 after a ValueError, OSError, FloatingPointError or SafetensorError, 130 after Ctrl-C, 143 after
            SIGTERM.
    """
    handled = (
        threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    )
    if handled:
        signal.signal(signal.SIGTERM, _terminate)  # so that worker processes end, too
    try:
        _check_empty_values(sys.argv[1:])
        main()
    except (ValueError, OSError, FloatingPointError, SafetensorError) as error:
        if int(os.environ.get("RANK", "0")):
            time.sleep(OTHER_RANK_DELAY)  # the launcher stops this process if the main process failed, too
        message = " ".join(str(error).split()) or type(error).__name__
        message = message.replace("Some specified arguments are not used by the HfArgumentParser", "unknown arguments")
        sys.stderr.write(f"{os.path.basename(sys.argv[0])}: error: {message}\n")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        sys.stderr.write(f"{os.path.basename(sys.argv[0])}: interrupted\n")
        raise SystemExit(128 + signal.SIGINT) from None
    finally:
        if handled:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _check_empty_values(argv: list[str]) -> None:
    flag = ""
    for argument in argv:
        name, equals, value = argument.partition("=")
        is_flag = argument.startswith("--")
        flag = name if is_flag else flag
        if not argument or (is_flag and equals and not value):
            shown = f"`{flag.lstrip('-')}`" if flag else "an argument"
            raise ValueError(f"{shown} must not be empty: pass a value, or omit it.")


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    os.write(2, f"\n{os.path.basename(sys.argv[0])}: stopped by SIGTERM\n".encode())
    raise SystemExit(128 + number)


class Interruption:
    """Context in which Ctrl-C and SIGTERM request a stop after the current step.

    A Ctrl-C that comes more than `REPEATED_SIGNAL_DELAY` seconds after the first signal interrupts at once. A later SIGTERM is
    ignored: a preemption sends it to the launcher and to its processes, and the launcher sends it again. After the context, both
    signals have their previous effect. Outside the main thread, where Python does not allow signal handlers, nothing changes.
    """

    def __init__(self) -> None:
        self.number = 0
        self._time = 0.0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if not self.number:
            self.number, self._time = number, time.monotonic()
            if not int(os.environ.get("RANK", "0")):
                delay = f"{REPEATED_SIGNAL_DELAY:g} s"
                again = f"; Ctrl-C again after {delay} stops at once" if number == signal.SIGINT else ""
                message = f"\n{signal.Signals(number).name}: finishing the step and saving a checkpoint{again}\n"
                os.write(2, message.encode())  # `sys.stderr.write` must not be called again while it is running
        elif number == signal.SIGINT and time.monotonic() - self._time > REPEATED_SIGNAL_DELAY:
            raise KeyboardInterrupt

    def requested(self, accelerator: Accelerator) -> int:
        """Return the signal that any process has received, 0 if none; every process must call this method."""
        if accelerator.num_processes == 1:
            return self.number
        import torch

        numbers = accelerator.gather(torch.tensor([self.number], device=accelerator.device))
        return int(numbers.max())


def stop_training(accelerator: Accelerator, number: int, step: int) -> NoReturn:
    """End a run that a signal has stopped, after its checkpoint has been written.

    Args:
        accelerator: Accelerator of the run. Every process must call this function.
        number: Number of the signal, from `Interruption.requested`.
        step: Number of completed steps.

    Raises:
        SystemExit: Always, with status 128 + `number`.
    """
    if accelerator.is_main_process:
        sys.stderr.write(f"stopped by {signal.Signals(number).name} at step {step}; run the same command to resume\n")
    accelerator.end_training()
    raise SystemExit(128 + number)


def check_launch(accelerator: Accelerator) -> None:
    """Check that accelerate has started as many processes as requested.

    Raises:
        ValueError: If `accelerate launch --cpu --num_processes N` has started a single process, or if each of
            several processes would run alone.
    """
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched > 1 and accelerator.num_processes == 1:
        raise ValueError(
            f"{launched} processes were started, but each would train alone: start one process, or check the launcher."
        )
    several = "MASTER_ADDR" in os.environ and os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
    if several and "WORLD_SIZE" not in os.environ and accelerator.num_processes == 1:
        raise ValueError(
            "`accelerate launch --cpu --num_processes N` starts only one process: start several with `--config_file "
            "examples/accelerate_configs/cpu.yaml`, or omit --num_processes."
        )


def exit_without_extra(error: ModuleNotFoundError, extra: str) -> NoReturn:
    """End a script with a one-line error because an optional package cannot be imported.

    Args:
        error: The error of the import.
        extra: Extra of irasim-diffusers that installs the package.

    Raises:
        SystemExit: Always, with status 2.
    """
    script, package = os.path.basename(sys.argv[0]), str(error.name).split(".")[0]
    sys.stderr.write(f"{script}: error: {package} is missing: {INSTALL.format(extra)}.\n")
    raise SystemExit(2) from None


def check_ranges(
    arguments: Any,
    not_negative: Iterable[str] = (),
    at_least_1: Iterable[str] = (),
    positive: Iterable[str] = (),
    fractions: Iterable[str] = (),
    choices: Mapping[str, Iterable[str]] = {},
) -> None:
    """Check the values of arguments one by one. None, the default of many arguments, is always accepted.

    Args:
        arguments: Object with the arguments as attributes. Each number of a list is checked.
        not_negative: Names of arguments that must be at least 0.
        at_least_1: Names of arguments that must be at least 1.
        positive: Names of arguments that must be larger than 0.
        fractions: Names of arguments that must be in [0, 1].
        choices: Accepted values by the name of the argument.

    Raises:
        ValueError: If a value is not finite, out of range or unknown.
    """
    require_finite(vars(arguments))
    tests: tuple[tuple[Iterable[str], str, Any], ...] = (
        (not_negative, "at least 0", lambda value: value >= 0),
        (at_least_1, "at least 1", lambda value: value >= 1),
        (positive, "positive", lambda value: value > 0),
        (fractions, "in [0, 1]", lambda value: 0 <= value <= 1),
    )
    for names, wanted, accepts in tests:
        for name in names:
            given = getattr(arguments, name)
            for value in given if isinstance(given, list) else [given]:
                if value is not None and not accepts(value):
                    raise ValueError(f"`{name}` must be {wanted}, got {value}.")
    for name, known in choices.items():
        value = getattr(arguments, name)
        if value is not None and value not in known:
            raise ValueError(f"`{name}` must be one of {', '.join(known)}, got {value!r}.")


def require_finite(arguments: Mapping[str, Any]) -> None:
    """Check that all numbers of a script's arguments are finite.

    Raises:
        ValueError: If a number is NaN or infinite.
    """
    for name, value in arguments.items():
        for number in value if isinstance(value, list | tuple) else [value]:
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"`{name}` must be finite, got {value}.")
