"""The folders for scripts that do not train: where they read and write. Does not import torch."""

from pathlib import Path

from mbn.config.loading import load
from mbn.config.typed_paths import PATHS
from mbn.system.errors import UserError


def data_and_results(settings: list[str]) -> tuple[Path, Path]:
    """machine.data and machine.results of a command line that sets nothing else. Errors: UserError, ConfigError."""
    for text in settings:
        if text.partition("=")[0].lstrip("+") not in PATHS:
            raise UserError(f"cannot set {text} here: set only machine.data=DIR or machine.results=DIR.", code=2)
    machine = load(settings).machine
    return Path(machine.data), Path(machine.results)


def results_to_read(settings: list[str]) -> Path:
    """machine.results for a script that only reads there. Errors: also UserError where there is no such folder."""
    _, results = data_and_results(settings)
    check_there(results)
    return results


def check_there(results: Path) -> None:
    """Check that a folder of results exists. Errors: UserError."""
    if not results.is_dir():
        raise UserError(f"there is no folder {results}: machine.results=DIR must name one that holds records.", code=2)
