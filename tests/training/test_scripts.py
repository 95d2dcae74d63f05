import argparse
import os
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from irasim_diffusers.training import Interruption, check_launch, launch, run_script, scripts
from irasim_diffusers.training.launch import prepare_output


@pytest.fixture
def interruption():
    with Interruption() as interruption:
        yield interruption


def test_ctrl_c_prints_what_happens_next(interruption, capfd):
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
    expected = "\nSIGINT: finishing the step and saving a checkpoint; Ctrl-C again after 5 s stops at once\n"
    assert capfd.readouterr().err == expected


def test_training_in_another_thread_keeps_the_handlers():
    before = signal.getsignal(signal.SIGTERM)

    def train():
        with Interruption() as interruption:
            return interruption.number, signal.getsignal(signal.SIGTERM)

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(train).result() == (0, before)
    assert signal.getsignal(signal.SIGTERM) == before


def test_processes_that_do_not_belong_together_raise(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were started, but each would train alone"):
        check_launch(argparse.Namespace(num_processes=1))
    check_launch(argparse.Namespace(num_processes=2))


@pytest.mark.parametrize("error", [SafetensorError("Error while serializing: I/O error"), OSError("No space left")])
def test_failed_write_ends_in_one_line(error, monkeypatch, capsys):
    def main():
        raise error

    monkeypatch.setattr("sys.argv", ["folder/train.py"])
    with pytest.raises(SystemExit) as stop:
        run_script(main)
    assert (stop.value.code, capsys.readouterr().err) == (2, f"train.py: error: {error}\n")


@pytest.mark.parametrize("flags", [["--output_dir", ""], ["--output_dir="]])
def test_empty_values_do_not_name_the_current_folder(flags, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py", "--dataset", "set", *flags, "--seed", "1"])
    with pytest.raises(SystemExit) as stop:
        run_script(list)
    message = "train.py: error: `output_dir` must not be empty: pass a value, or omit it.\n"
    assert (stop.value.code, capsys.readouterr().err) == (2, message)
    monkeypatch.setattr("sys.argv", ["train.py", "--hub_model_id=robot="])
    run_script(list)


def test_repeated_sigterm_does_not_prevent_checkpoint(interruption, monkeypatch):
    monkeypatch.setattr(scripts, "REPEATED_SIGNAL_DELAY", 0.0)
    for _ in range(3):
        os.kill(os.getpid(), signal.SIGTERM)
    assert interruption.number == signal.SIGTERM


def test_second_ctrl_c_interrupts_after_delay(interruption, monkeypatch):
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGINT)
    assert interruption.number == signal.SIGINT
    monkeypatch.setattr(scripts, "REPEATED_SIGNAL_DELAY", -1.0)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_handlers_are_restored_after_training():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with Interruption() as interruption:
        os.kill(os.getpid(), signal.SIGTERM)
    assert interruption.number == signal.SIGTERM
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_output_folder_that_cannot_be_created_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        ValueError, match=r"`output_dir` must be a folder that can be created, got '.*run': Not a directory"
    ):
        prepare_output(Accelerator(cpu=True), tmp_path / "file" / "run")


@pytest.mark.parametrize(
    ("launched", "native", "expected"),
    [("no", torch.bfloat16, "bf16"), ("no", torch.float32, "no"), ("fp16", torch.bfloat16, "fp16")],
)
def test_default_precision_is_that_of_the_launcher_or_the_fastest(launched, native, expected, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    monkeypatch.setattr(launch, "fast_dtype", lambda device: native)
    assert launch.default_mixed_precision() == expected
