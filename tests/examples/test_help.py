import ast
import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SCRIPTS = [path for path in sorted(EXAMPLES.rglob("*.py")) if '__name__ == "__main__"' in path.read_text()]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_help(script, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(script.parent))
    monkeypatch.setattr(sys, "argv", [script.name, "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(script), run_name="__main__")
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("usage:")


@pytest.mark.parametrize("path", sorted(EXAMPLES.rglob("*.py")), ids=lambda path: str(path.relative_to(EXAMPLES)))
def test_files_and_functions_are_short(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


OPTIONAL = ("gradio", "gradio_client", "gym_pusht", "gymnasium", "matplotlib", "pymunk", "shapely", "tensorboard")
APP = EXAMPLES.parent / "spaces" / "app.py"


@pytest.mark.parametrize("script", [*SCRIPTS, APP], ids=lambda path: str(path.relative_to(EXAMPLES.parent)))
def test_missing_extra_ends_in_one_line(script, monkeypatch, capsys):
    """Without optional packages, a script prints its help or one line with the extra, before any work."""
    for name, module in list(sys.modules.items()):
        own = str(getattr(module, "__file__", None) or "").startswith((str(EXAMPLES), str(APP.parent)))
        if own or name == "irasim_diffusers.envs" or name.split(".")[0] in OPTIONAL:
            monkeypatch.delitem(sys.modules, name)
    for name in OPTIONAL:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.syspath_prepend(str(script.parent))
    monkeypatch.setattr(sys, "argv", [script.name, "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(script), run_name="__main__")
    if stop.value.code:
        error = capsys.readouterr().err
        assert stop.value.code == 2
        assert re.fullmatch(rf"{script.name}: error: \w+ is missing: pip install .*\[\w+\].*\n", error)
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith((str(EXAMPLES), str(APP.parent))):
            del sys.modules[name]  # imported without the optional packages
