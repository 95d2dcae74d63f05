"""Fixtures and hooks of all tests.

The module imports no torch, because pytest-xdist imports it in its main process before the workers start.
"""

import gc
import os

import numpy as np
import pytest
from space_browser import app_url, browser, page  # noqa: F401 (fixtures)

if "PYTEST_XDIST_WORKER" in os.environ:  # workers share the CPU cores
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(autouse=True)
def ordinary_scheduling():
    """Undo the real-time priority that the SVT-AV1 encoder gives its calling thread under root.

    The encoder sets SCHED_FIFO, which child processes inherit. Two child processes that wait in a loop would occupy
    both cores of a small machine indefinitely.
    """
    yield
    if hasattr(os, "sched_getscheduler") and os.sched_getscheduler(0) != os.SCHED_OTHER:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def pytest_collection_finish():
    """Exclude the imported modules from garbage collection, which otherwise takes a sixth of the time of the tests."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)


def pytest_collection_modifyitems(items):
    gpu_tests = [item for item in items if "gpu" in item.keywords]
    if gpu_tests:
        import torch

        if not torch.cuda.is_available():
            for item in gpu_tests:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture
def transformer():
    from tiny_models import tiny_transformer

    return tiny_transformer()


@pytest.fixture
def pipeline():
    from tiny_models import tiny_pipeline

    return tiny_pipeline()


@pytest.fixture
def frames():
    """History of two frames, uint8."""
    return np.random.default_rng(2).integers(0, 256, (2, 8, 12, 3), dtype=np.uint8)


@pytest.fixture
def actions():
    """Seven actions, more than two windows of three."""
    return np.random.default_rng(3).normal(size=(7, 3))


@pytest.fixture
def offline(monkeypatch):
    """Work offline: a name that is not a folder fails at once instead of after a timeout."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
