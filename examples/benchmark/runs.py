"""Runs of the examples as benchmarks start them: each once, and on from where it stopped."""

import json
import subprocess
import sys
from pathlib import Path

from irasim_diffusers.files import temporary_path

EXAMPLES = Path(__file__).parents[1]


def run_once(marker: Path, script: str, *arguments: object, config_file: str | None = None) -> None:
    """Run an example unless it is done with these arguments.

    Args:
        marker: File that is written when it is done, and holds its arguments.
        script: Path of the script below `examples`.
        arguments: What it is given.
        config_file: Config for `accelerate launch`; None runs the script in one process.
    """
    given = [script, *map(str, arguments)]
    if marker.is_file() and json.loads(marker.read_text()) == given:
        return
    launcher = ["-m", "accelerate.commands.launch", "--config_file", config_file] if config_file else []
    subprocess.run([sys.executable, *launcher, str(EXAMPLES / script), *given[1:]], check=True)
    with temporary_path(marker) as partial:
        partial.write_text(json.dumps(given))


def train_once(output: Path, *arguments: object, config_file: str | None = None) -> None:
    """Train with `train.py` into a folder unless that is done; a run that was stopped goes on from its checkpoint."""
    run_once(output / "done.json", "train.py", "--output_dir", output, *arguments, config_file=config_file)


def write_report(folder: Path, name: str, content: dict, table: str) -> None:
    """Write `<name>.json` and `<name>.md`, and print the table."""
    for suffix, text in ((".json", json.dumps(content, indent=2)), (".md", table)):
        with temporary_path((folder / name).with_suffix(suffix)) as partial:
            partial.write_text(text)
    print(table)
