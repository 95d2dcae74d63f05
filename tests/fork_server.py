"""Start Python processes by forking a server that has already imported the package.

Importing torch, diffusers and the package takes several seconds of CPU time, more than most commands of the tests. A forked
process skips the imports; otherwise it behaves like a new process with its own files, signals and exit status.
"""

import functools
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
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
    """A forked process with the methods of `subprocess.Popen` that the tests use; its output goes to files."""

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

    def wait(self, timeout: float = 600.0) -> int:
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                self.kill()
                raise subprocess.TimeoutExpired(str(self.folder), timeout)
            time.sleep(0.02)
        return self.returncode

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait_for(self, text: str) -> None:
        """Wait until the process writes `text` to its standard error."""
        while text not in self.stderr:
            assert self.poll() is None, self.stderr
            time.sleep(0.02)


class ForkServer:
    """A server process.

    Args:
        environment: Environment variables that the imported modules read, such as `HF_HOME`.
        modules: Modules that the server imports.
    """

    def __init__(self, environment: Mapping[str, str] = {}, modules: tuple[str, ...] = MODULES) -> None:
        self.server = subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, *modules],
            env={**os.environ, **environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def request(self, **request: Any) -> Any:
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def start(self, *command: Any, cwd: Path | None = None) -> ForkedProcess:
        """Start a process.

        Args:
            command: Arguments of the Python interpreter: a script, `-c` and code, or `-m` and a module, and their arguments. Code can
                import the modules of the tests.
            cwd: Working directory.
        """
        folder = Path(tempfile.mkdtemp(prefix="process-"))
        for name in ("stdout", "stderr"):
            (folder / name).touch()
        place = {"cwd": str(cwd or Path.cwd()), "folder": str(folder), "path": sys.path}
        pid = self.request(command=list(map(str, command)), **place)
        return ForkedProcess(self, pid, folder)

    def run(self, *command: Any, cwd: Path | None = None) -> ForkedProcess:
        """Start a process and wait for it."""
        process = self.start(*command, cwd=cwd)
        process.wait()
        return process

    def close(self) -> None:
        self.server.stdin.close()
        self.server.wait()
        self.server.stdout.close()


@functools.cache
def fork_server() -> ForkServer:
    """Return the server of this test process, which ends with it."""
    return ForkServer()


def serve() -> dict[str, Any]:
    """Answer requests until the client closes the connection; return a request in each forked process."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in iter(sys.stdin.readline, ""):
        request = json.loads(line)
        if "poll" in request:
            pid, status = os.waitpid(request["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif (answer := os.fork()) == 0:
            answers.close()
            return request
        print(json.dumps(answer), file=answers, flush=True)
    os._exit(0)


def execute(command: list[str], cwd: str, folder: str, path: list[str]) -> None:
    """Run a command in this process as the Python interpreter would."""
    os.setsid()
    os.chdir(cwd)
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
    gc.freeze()  # a collection in a child would copy the pages of all imported objects
    execute(**serve())
