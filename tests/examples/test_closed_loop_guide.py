"""Run code blocks of examples/closed_loop.md, with smaller numbers."""

import re
from pathlib import Path

TEXT = (Path(__file__).parents[2] / "examples" / "closed_loop.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)


def run(code, capsys):
    exec(code, {})
    return capsys.readouterr().out.splitlines()


def test_gymnasium_blocks(capsys):
    assert run(BLOCKS[0], capsys)[-1] == "(96, 96, 3) (2,) True {'is_success': False}"
    assert not run(BLOCKS[1], capsys)


def test_planning_block(capsys):
    code = next(block for block in BLOCKS if "CEM" in block)
    code = code.replace("horizon=8", "horizon=2").replace("num_candidates=8", "num_candidates=3")
    assert run(code.replace("num_candidates=16", "num_candidates=5"), capsys)[-1] == "torch.Size([2, 2]) True"
