"""Run example scripts from benchmarks; completed runs are skipped, interrupted trainings resume."""

import json
import subprocess
import sys
from pathlib import Path

from irasim_diffusers.files import write_text

EXAMPLES = Path(__file__).parents[1]


def run_once(marker: Path, script: str, *arguments: object, config_file: str | None = None) -> None:
    """Run an example script unless it has already been completed with the same arguments.

    Args:
        marker: JSON file with the arguments, written when the run is complete.
        script: Path of the script relative to `examples`.
        arguments: Command-line arguments of the script.
        config_file: Config file of `accelerate launch`. None runs the script in one process.

    Raises:
        CalledProcessError: If the script fails.
    """
    given = [script, *map(str, arguments)]
    if marker.is_file() and json.loads(marker.read_text(encoding="utf-8")) == given:
        return
    launcher = ["-m", "accelerate.commands.launch", "--config_file", config_file] if config_file else []
    subprocess.run([sys.executable, *launcher, str(EXAMPLES / script), *given[1:]], check=True)
    write_text(marker, json.dumps(given))


def train_once(output: Path, *arguments: object, config_file: str | None = None) -> None:
    """Train with `train.py` unless the run is complete.

    An interrupted run resumes from its last checkpoint.
    """
    run_once(output / "done.json", "train.py", "--output_dir", output, *arguments, config_file=config_file)


def write_report(folder: Path, name: str, content: dict, table: str) -> None:
    """Write `<name>.json` and `<name>.md`, and print the table."""
    for suffix, text in ((".json", json.dumps(content, indent=2)), (".md", table)):
        write_text((folder / name).with_suffix(suffix), text)
    print(table)
