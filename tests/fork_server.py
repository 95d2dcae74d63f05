"""Start Python processes by forking a server that has already imported the package.

Importing torch, diffusers and the package takes several seconds of CPU time, more than most commands of the tests. A forked
process skips the imports. It has its own files, arguments, environment variables, signals and exit status. It shares the hash seed,
the warning filters and everything that modules read during their import with the server.
"""

import atexit
import contextlib
import functools
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

MODULES = (
    "irasim_diffusers.pipelines.pipeline_irasim",
    "irasim_diffusers.training",
    "irasim_diffusers.evaluation",
    "irasim_diffusers.data",
    "datasets",
    "accelerate.commands.launch",
)


class ForkedProcess:
    """A forked process with methods of `subprocess.Popen`; its output goes to files."""

    def __init__(self, server: "ForkServer", pid: int, folder: Path) -> None:
        self.server, self.pid, self.folder, self.returncode = server, pid, folder, None

    @property
    def stdout(self) -> str:
        return (self.folder / "stdout").read_text(errors="replace")

    @property
    def stderr(self) -> str:
        return (self.folder / "stderr").read_text(errors="replace")

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self.server.request(poll=self.pid)
        return self.returncode

    def kill(self) -> None:
        """Kill the process and its children."""
        if self.poll() is None:
            kill_group(self.pid)

    def wait(self, timeout: float = 300.0) -> int:
        self._wait_until(lambda: False, timeout)
        return self.returncode

    def wait_for(self, text: str, timeout: float = 300.0) -> None:
        """Wait until the process writes `text` to its standard error."""
        self._wait_until(lambda: text in self.stderr, timeout)
        assert text in self.stderr, self.stderr

    def _wait_until(self, reached: Callable[[], bool], timeout: float) -> None:
        """Wait until a condition is true or the process has ended; after `timeout` seconds, kill it and raise."""
        end = time.monotonic() + timeout
        while self.poll() is None and not reached():
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(self.stderr)
            time.sleep(0.02)


class ForkServer:
    """A server that has imported modules and forks a process for each command.

    Args:
        environment: Environment variables of the server and its processes, such as `HF_HOME`.
        modules: Modules that the server imports.
    """

    def __init__(self, environment: Mapping[str, str] | None = None, modules: tuple[str, ...] = MODULES) -> None:
        self.environment, self.folder = dict(environment or {}), tempfile.TemporaryDirectory(prefix="fork-server-")
        # otherwise, `torch.cuda.is_available()` during an import makes CUDA unusable in forked processes
        cuda = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
        self.server = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, *modules],
            env={**os.environ, **cuda, **self.environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        atexit.register(self.close)

    def request(self, **request: Any) -> Any:
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        answer = self.server.stdout.readline()
        assert answer, "the fork server has ended"
        return json.loads(answer)

    def start(
        self, *command: Any, cwd: Path | None = None, variables: Mapping[str, str] | None = None
    ) -> ForkedProcess:
        """Start a process with the current environment variables.

        Args:
            command: Arguments of the Python interpreter: a script, `-c` and code, or `-m` and a module, and their arguments. Code can
                import the modules of the tests.
            cwd: Working directory.
            variables: Additional environment variables.
        """
        folder = Path(tempfile.mkdtemp(dir=self.folder.name))
        for name in ("stdout", "stderr"):
            (folder / name).touch()
        place = {"cwd": str(cwd or Path.cwd()), "folder": str(folder), "path": sys.path}
        environment = {**os.environ, **self.environment, **(variables or {})}
        pid = self.request(command=list(map(str, command)), environment=environment, **place)
        return ForkedProcess(self, pid, folder)

    def run(self, *command: Any, cwd: Path | None = None) -> ForkedProcess:
        """Start a process and wait for it."""
        process = self.start(*command, cwd=cwd)
        process.wait()
        return process

    def run_ranks(self, *command: Any) -> list[ForkedProcess]:
        """Run a command in two ranks on the CPU, without a launcher, and wait for both."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        place |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        ranks = [self.start(*command, variables=place | {"RANK": rank, "LOCAL_RANK": rank}) for rank in "01"]
        for process in ranks:
            process.wait()
        return ranks

    def close(self) -> None:
        """End the server and all its processes."""
        self.server.stdin.close()
        self.server.wait()
        self.server.stdout.close()
        self.folder.cleanup()


@functools.cache
def fork_server() -> ForkServer:
    """Return the server of this test process, which ends with it."""
    return ForkServer()


def run_forked(command: list[str], check: bool) -> None:
    """Run a command of the Python interpreter in a forked process, as `subprocess.run` would in a new one."""
    process = fork_server().run(*command[1:])
    assert process.returncode == 0 or not check, process.stderr


def kill_group(pid: int) -> None:
    """Kill a forked process and its children."""
    for kill in (os.kill, os.killpg):  # a process that has just been forked has no group yet
        with contextlib.suppress(ProcessLookupError):
            kill(pid, signal.SIGKILL)


def serve() -> dict[str, Any]:
    """Answer requests until the client closes the connection; return a request in each forked process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # after Ctrl-C, the client closes the connection
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    running = set()
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
            running.discard(pid)
        elif (answer := os.fork()) == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            answers.close()
            return request
        else:
            running.add(answer)
        print(json.dumps(answer), file=answers, flush=True)
    for pid in running:
        kill_group(pid)
    os._exit(0)


def execute(command: list[str], environment: dict[str, str], cwd: str, folder: str, path: list[str]) -> None:
    """Run a command in this process as the Python interpreter would."""
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for number, name in ((0, os.devnull), (1, f"{folder}/stdout"), (2, f"{folder}/stderr")):
        opened = os.open(name, os.O_RDWR)
        os.dup2(opened, number)
        os.close(opened)
    first, *rest = command
    if first == "-c":
        code, *rest = rest
        sys.argv, sys.path[:] = ["-c", *rest], path
        exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
    elif first == "-m":
        sys.argv, sys.path[0] = rest, cwd
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = command, str(Path(first).parent)
        runpy.run_path(first, run_name="__main__")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        __import__(name)
    assert not sys.modules["torch"].cuda.is_initialized()
    gc.freeze()  # a collection in a child would copy the pages of all imported objects
    execute(**serve())
