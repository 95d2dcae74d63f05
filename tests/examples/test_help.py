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


OPTIONAL = ("gradio", "gradio_client", "gym_pusht", "gymnasium", "matplotlib", "pymunk", "shapely", "tensorboard")
APP = EXAMPLES.parent / "spaces" / "app.py"
EXTRAS = {  # extras of the scripts that require them even to print their help
    "examples/benchmark/closed_loop.py": "envs",
    "examples/benchmark/scaling.py": "benchmark",
    "examples/benchmark/space.py": "space",
    "examples/pusht/collect.py": "pusht",
    "examples/pusht/convolutional.py": "pusht",
    "examples/pusht/evaluate.py": "pusht",
    "examples/pusht/guard.py": "pusht",
    "examples/pusht/improve_policy.py": "pusht",
    "examples/pusht/study.py": "pusht",
    "examples/pusht/train_policy.py": "pusht",
    "examples/pusht/train_reward.py": "pusht",
    "examples/teleoperate.py": "space",
    "spaces/app.py": "space",
}


@pytest.mark.parametrize("script", [*SCRIPTS, APP], ids=lambda path: str(path.relative_to(EXAMPLES.parent)))
def test_missing_extra_ends_in_one_line(script, monkeypatch, capsys):
    """Without optional packages, a script prints its help, or one line with the extra before any work."""
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
    printed, extra = capsys.readouterr(), EXTRAS.get(script.relative_to(EXAMPLES.parent).as_posix())
    if extra is None:
        assert stop.value.code == 0
        assert printed.out.startswith("usage:")
    else:
        assert stop.value.code == 2
        expected = rf"{script.name}: error: \w+ is missing: pip install .*\[{extra}\].*\n"
        assert re.fullmatch(expected, printed.err)
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith((str(EXAMPLES), str(APP.parent))):
            del sys.modules[name]  # the module was imported without the optional packages
