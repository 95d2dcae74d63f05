import os
import signal

import pytest

from irasim_diffusers.training import Interruption, scripts


@pytest.fixture
def interruption():
    with Interruption() as interruption:
        yield interruption


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
