import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from irasim_diffusers import files
from irasim_diffusers.files import remove_abandoned, temporary_folder, temporary_path

WRITE_AND_WAIT = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])  # only this module, which is faster than importing the package
from files import temporary_folder, temporary_path

with temporary_path("out/clip.bin") as file, temporary_folder("out/model") as folder:
    file.write_bytes(b"half")
    (folder / "weights").write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(60)
"""


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_files_of_killed_processes_are_removed_and_of_running_ones_kept(tmp_path):
    command = [sys.executable, "-c", WRITE_AND_WAIT, str(Path(files.__file__).parent)]
    killed, running = (subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) for _ in range(2))
    try:
        assert [process.stdout.readline() for process in (killed, running)] == ["writing\n"] * 2
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        (tmp_path / "out/.notes.partial").write_text("of somebody else")
        assert len(names(tmp_path / "out")) == 5
        remove_abandoned(tmp_path / "out")
        left = names(tmp_path / "out")
        assert left[-1] == ".notes.partial"
        assert len(left) == 3
        assert all(f".{running.pid}-" in name for name in left[:2])
    finally:
        for process in (killed, running):
            process.kill()
            process.wait()
            process.stdout.close()
    remove_abandoned(tmp_path / "out")
    assert names(tmp_path / "out") == [".notes.partial"]


def test_a_process_with_a_reused_id_does_not_protect_old_files(tmp_path):
    old, new = (tmp_path / f".clip.{os.getpid()}-{files._host()}-0000000{digit}.partial.bin" for digit in (0, 1))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    remove_abandoned(tmp_path)
    assert names(tmp_path) == [new.name]


def test_files_of_other_machines_are_removed_after_a_day(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = "00000000" if files._host() != "00000000" else "11111111"
    old, new = (tmp_path / f".clip.{dead.pid}-{host}-0000000{digit}.partial.bin" for digit in (0, 1))
    for path, hours in ((old, 25), (new, 23)):
        path.write_bytes(b"half")
        os.utime(path, (time.time() - hours * 3600,) * 2)
    remove_abandoned(tmp_path)
    assert names(tmp_path) == [new.name]


def test_content_is_flushed_before_the_rename(tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: steps.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    with temporary_path(tmp_path / "clip.bin") as partial:
        partial.write_bytes(b"whole")
    assert steps == [str(partial), str(tmp_path)]
    steps.clear()
    with temporary_folder(tmp_path / "model") as partial:
        (partial / "vae").mkdir()
        (partial / "vae/weights").write_bytes(b"whole")
    assert set(steps[:-2]) == {str(partial / "vae"), str(partial / "vae/weights")}
    assert steps[-2:] == [str(partial), str(tmp_path)]


def test_two_writers_of_one_path_do_not_mix(tmp_path):
    both = threading.Barrier(2)

    def write(content):
        with temporary_path(tmp_path / "clip.bin") as partial, partial.open("wb") as file:
            for _ in range(3):
                both.wait()
                file.write(content)
                file.flush()

    threads = [threading.Thread(target=write, args=(content,)) for content in (b"aaaa", b"bbbb")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "clip.bin").read_bytes() in (b"a" * 12, b"b" * 12)
    assert names(tmp_path) == ["clip.bin"]


def fail(write, path):
    with write(path) as partial:
        if write is temporary_path:
            partial.write_bytes(b"half")
        raise RuntimeError


@pytest.mark.parametrize("write", [temporary_path, temporary_folder])
def test_nothing_is_left_after_an_error(write, tmp_path):
    with pytest.raises(RuntimeError):
        fail(write, tmp_path / "result")
    assert names(tmp_path) == []


def test_long_names(tmp_path):
    path = tmp_path / ("x" * 250 + ".json")
    with temporary_path(path) as partial:
        partial.write_text("{}")
    assert names(tmp_path) == [path.name]


def test_second_process_cannot_lock_a_folder(tmp_path):
    code = f"import sys; sys.path.insert(0, {str(Path(files.__file__).parent)!r}); from pathlib import Path; import files\n"
    code += f"with files.locked_folder(Path({str(tmp_path)!r})): pass"
    with files.locked_folder(tmp_path):
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 1
    assert (
        f"ValueError: {str(tmp_path)!r} is being written by another process: wait until it has finished."
        in found.stderr
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), RuntimeError("I/O: No space left on device")]
)
@pytest.mark.parametrize("writer", [temporary_path, temporary_folder])
def test_full_disk_names_the_path(tmp_path, error, writer):
    path = tmp_path / "model"
    with pytest.raises(OSError, match=rf"No space left on device: '{path}'"), writer(path):
        raise error
    assert names(tmp_path) == []


def test_folder_of_another_process_is_kept(tmp_path):
    path = tmp_path / "model"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "weights").touch()
    with pytest.raises(ValueError, match="must be a new or empty folder, but contains files"), temporary_folder(path):
        shutil.copytree(tmp_path / "other", path)
    assert names(tmp_path) == ["model", "other"]
    assert names(path) == ["weights"]


def test_commands_remove_what_killed_commands_left(tmp_path):
    from irasim_diffusers.commands.files import check_output, check_output_folder

    for check in (check_output_folder, lambda path: check_output(path.with_suffix(".mp4"), ".mp4")):
        (tmp_path / ".model.999999.partial").mkdir()
        check(tmp_path / "model")
        assert names(tmp_path) == []
