import ast
import importlib.util
import inspect
import re
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest

import irasim_diffusers
from irasim_diffusers import IRASimPipeline, IRASimTransformer3DModel, UNetTrajectoryModel, training

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "irasim_diffusers"
FREE = {"files", "json_files", "hub", "latents", "safe_load", "version"}  # modules that every part may import
ALLOWED = {
    "actions": set(),
    "action_space": {"actions"},
    "metrics": set(),
    "models": {"action_space"},
    "rollout": {"action_space"},
    "files": set(),
    "json_files": set(),
    "hub": set(),
    "latents": set(),
    "safe_load": set(),
    "devices": set(),
    "version": set(),
    "data": {"actions", "pictures"},
    "data_arguments": set(),
    "pipelines": {"action_space", "models", "pictures", "rollout"},
    "training": {"conversion", "data", "data_arguments", "devices", "metrics", "models", "pipelines"},
    "conversion": {"models"},
    "pictures": set(),
    "driving": {"action_space", "actions", "data", "pipelines", "rollout"},
    "rewards": {"pictures", "rollout"},
    "planning": {"action_space", "rollout"},
    "policies": {"action_space", "devices", "planning", "rollout"},
    "pretrained": {"devices", "models", "pipelines", "rewards"},
    "envs": {"actions", "embedded_checkpoint", "models", "pretrained", "rollout", "starts"},
    "lerobot": {"data", "embedded_checkpoint", "envs"},
    "starts": set(),
    "evaluation": {
        "actions",
        "data",
        "envs",
        "metrics",
        "models",
        "pictures",
        "pipelines",
        "policies",
        "rollout",
        "starts",
    },
    "cli": {"commands", "__version__"},
}


def imported_parts(path):
    """Yield the parts of the package that a module imports, from its syntax tree."""
    package = path.relative_to(PACKAGE).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            target = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            yield from [target[0]] if target[0] else [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "irasim_diffusers":
            yield from node.module.split(".")[1:2] or [name.name for name in node.names]


LONG_FILES = {  # their docstrings give the reasons
    PACKAGE / "models" / "transformer_irasim.py",
    PACKAGE / "pipelines" / "pipeline_irasim.py",
    ROOT / "tests" / "test_bad_input.py",
}


def test_package_has_exactly_the_parts_of_the_layout():
    parts = {path.name.removesuffix(".py") for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    parts.discard("__pycache__")
    assert parts == ALLOWED.keys() | {"__init__", "checkpoints", "commands"}


def files_of(*folders):
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("folder", ["src", "examples", "spaces", "tests"])
def test_files_and_functions_are_short(folder):
    for path in files_of(folder):
        text = path.read_text(encoding="utf-8")
        reasons = ast.get_docstring(ast.parse(text)) if path in LONG_FILES else ""
        assert len(text.splitlines()) <= 500 or "exceeds 500 lines because" in reasons, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                tables = [] if folder == "tests" else node.decorator_list  # parameters of a test may be a long table
                first = min([node.lineno, *(decorator.lineno for decorator in tables)])
                assert node.end_lineno - first < 60 or f"{node.name}`" in reasons, f"{path}: {node.name}"


def test_long_files_give_the_reason():
    for path in LONG_FILES:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) > 500, f"{path} is short"
        assert "The file exceeds 500 lines because" in ast.get_docstring(ast.parse(text)), path


def test_summaries_of_docstrings_are_short():
    for path in files_of("src", "examples", "spaces"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                summary = (ast.get_docstring(node) or "").split("\n")[0]
                assert len(summary) <= 100, f"{path}: {summary}"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_allowed_directions(path):
    part = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part in ("__init__", "commands"):  # these may import every part except `cli` and, for `__init__`, `commands`
        assert not set(imported_parts(path)) & {"cli", "commands"} - {part}
        return
    assert set(imported_parts(path)) - {part} <= ALLOWED[part] | FREE


def test_module_paths_of_public_classes():
    assert IRASimTransformer3DModel.__module__ == "irasim_diffusers.models.transformer_irasim"
    assert UNetTrajectoryModel.__module__ == "irasim_diffusers.models.unet_trajectory"
    assert IRASimPipeline.__module__ == "irasim_diffusers.pipelines.pipeline_irasim"


def test_no_subpackage_has_name_of_diffusers_pipeline():
    modules = {path.name for path in (Path(diffusers.__file__).parent / "pipelines").iterdir()}
    assert not modules & {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}


FIRST_USE = """
import sys
sys.modules["torchao"] = None  # installed only for tests, and emits its own warnings
from irasim_diffusers import IRASimPipeline, __version__, embedded_checkpoint
print(__version__)
IRASimPipeline.from_pretrained(embedded_checkpoint())
from irasim_diffusers.cli import main
sys.exit(main(["generate", "--steps", "1"]))
"""


def test_first_use_prints_no_warnings(tmp_path):
    result = subprocess.run(
        [sys.executable, "-W", "default", "-c", FIRST_USE], capture_output=True, text=True, cwd=tmp_path
    )
    version, *rest = result.stdout.splitlines()
    assert version == irasim_diffusers.__version__
    assert [line.split()[0] for line in rest] == ["PSNR", "60", "wrote"]
    bar = r"(Loading pipeline components\.\.\.: +)?\d+%\|.*\| \d+/\d+ \[.*\]"
    for line in re.split("[\r\n]+", result.stderr):
        assert re.fullmatch(bar, line.strip()) or not line.strip(), line


def test_help_imports_no_torch():
    code = (
        "import sys\nfrom irasim_diffusers.cli import _parser\nprint(_parser().format_help(), 'torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.endswith("False\n"), result.stderr


def test_reading_data_imports_no_diffusers():
    """Nor do scripts that do not train, such as the worker processes of `collect.py`."""
    imports = (
        "import sys\nimport irasim_diffusers.data\nfrom irasim_diffusers.training import check_ranges, run_script\n"
    )
    code = imports + "print('diffusers' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "False\n", result.stderr


@pytest.mark.parametrize("package", [irasim_diffusers, training])
def test_public_names_exist(package):
    for name in package.__all__:
        assert not inspect.ismodule(getattr(package, name))
    assert set(package._MODULES) <= set(package.__all__) <= set(dir(package))


def test_auto_model_loads_from_pipeline_folder(tmp_path, pipeline):
    pipeline.save_pretrained(tmp_path)
    model = diffusers.AutoModel.from_pretrained(str(tmp_path), subfolder="transformer")
    assert type(model) is IRASimTransformer3DModel


def imported_names(path):
    """Yield a script's imports from the package as (module, name); `import module` gives the name None."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "irasim_diffusers":
            yield from ((node.module, alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((each.name, None) for each in node.names if each.name.split(".")[0] == "irasim_diffusers")


@pytest.mark.parametrize("folder", ["examples", "spaces"])
def test_examples_use_only_public_names(folder):
    """Modules directly in the package are public, and the names in `__all__` of it and its subpackages."""
    found = [(path, *each) for path in (ROOT / folder).rglob("*.py") for each in imported_names(path)]
    assert len(found) > 20
    for path, module, name in found:
        assert module.count(".") <= 1, f"{path}: {module}"
        imported = importlib.import_module(module)
        public = getattr(imported, "__all__", None) if hasattr(imported, "__path__") else None
        is_module = module == "irasim_diffusers" and importlib.util.find_spec(f"{module}.{name}") is not None
        if name is not None and public is not None and not is_module:
            assert name in public, f"{path}: {module}.{name}"
        assert name is None or not name.startswith("_") or name == "__version__", f"{path}: {module}.{name}"


def test_readme_python_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "future.gif").stat().st_size > 1000
