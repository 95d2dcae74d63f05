"""Run the code blocks of examples/features.md, except those that other tests cover."""

import re
from functools import partialmethod
from pathlib import Path

import pytest
import torch

TEXT = (Path(__file__).parents[2] / "examples" / "features.md").read_text()
START, *BLOCKS = re.findall(r"```python ?(\w*)\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.mark.parametrize(
    ("needs", "code"), [pytest.param(*b, marks=[pytest.mark.gpu] * (b[0] == "gpu")) for b in BLOCKS]
)
def test_block(needs, code, tmp_path, monkeypatch):
    if needs == "hub":
        pytest.skip("covered by tests/test_hub.py with a local Hub server")
    if needs == "torchrun":
        pytest.skip("covered by tests/models/test_context_parallel.py")
    if "torchao" in code:
        pytest.importorskip("torchao")
    monkeypatch.chdir(tmp_path)
    # traces the whole graph, but generates no code
    monkeypatch.setattr(torch.nn.Module, "compile", partialmethod(torch.nn.Module.compile, backend="aot_eager"))
    namespace: dict = {}
    exec(START[1], namespace)
    namespace["actions"] = namespace["actions"][:4]  # the guide predicts 28 frames
    exec(code, namespace)
    assert len(namespace["video"]) == 4
