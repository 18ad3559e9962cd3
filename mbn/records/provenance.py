"""Where a run's numbers come from: the commit, the code, the versions of the libraries, the device."""

import ast
import contextlib
import functools
import hashlib
import importlib
import importlib.machinery
import io
import os
import platform
import re
import shlex
import subprocess
import sys
import tempfile
import tokenize
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mbn import __version__
from mbn.config import REPOSITORY
from mbn.system.errors import UserError, printable

# Parts of mbn that train nothing.
NOT_TRAINING = ("benchmark", "launch", "tables", "grid.py")
# Folders of code, and the endings of files that can be imported. What configs/ sets is in the record.
CODE = ("mbn", "models", "scripts")
IMPORTABLE = tuple(importlib.machinery.all_suffixes())
CPUINFO = Path("/proc/cpuinfo")
# A commit's name, long or short, as a pattern. A repository of git's newer kind has the longest.
COMMIT = "(?:[0-9a-f]{7,40}|[0-9a-f]{64})"


class _Origin(NamedTuple):
    """unknown: why there is no commit."""

    commit: str | None
    dirty: bool | None
    unknown: str = ""


def ask() -> None:
    """Note commit, changes and code now, as long as the files are those that are being imported. A commit or an edit
    made later changes nothing. Says on stderr why the commit is unknown, if it is.
    """
    _texts()
    commit, _ = commit_and_dirty()
    if commit is None:
        print(
            f"warning: the commit of this code is unknown ({_origin().unknown}), so that records made now are imported "
            "with --allow-dirty alone.",
            file=sys.stderr,
        )


def commit_and_dirty() -> tuple[str | None, bool | None]:
    """The commit of the checkout that holds this package, and whether its code differs from it. Asked once in a
    process.

    Changes of tracked files outside results/ count, also hidden ones, and so do untracked files that could be code.
    Without git both come from the environment variable MBN_COMMIT: set it to what
    `git describe --always --dirty --abbrev=40 --exclude '*'` prints where there is git. Without both: (None, None).
    """
    return _origin()[:2]


@functools.cache
def _origin() -> _Origin:
    try:
        top, _, head = _git("rev-parse", "--show-toplevel", "HEAD").rstrip("\n").rpartition("\n")
        if Path(top).samefile(REPOSITORY):
            return _Origin(head, _is_changed())
        reason = f"{REPOSITORY} is no checkout, but lies in the one of {top}: set MBN_COMMIT"
    except subprocess.CalledProcessError as error:
        said = os.fsdecode(error.stderr).strip().partition("\n")[0].removeprefix("fatal: ")
        reason = f"git says: {said or 'nothing'}; set MBN_COMMIT"
        if "dubious ownership" in said:  # a checkout of another user
            reason = f"it is another user's: git config --global --add safe.directory {shlex.quote(str(REPOSITORY))}"
    except OSError as error:
        reason = f"git cannot be started, {error.strerror}: set MBN_COMMIT"
    described = os.environ.get("MBN_COMMIT", "").strip()
    if re.fullmatch(rf"{COMMIT}(-dirty)?", described):
        return _Origin(described.removesuffix("-dirty"), described.endswith("-dirty"))
    if described:
        reason = f"MBN_COMMIT is {described!r}: set it to all digits of a commit, with -dirty if code was changed"
    return _Origin(None, None, printable(reason))


def _git(*arguments: str, **environment: str) -> str:
    """What git prints about REPOSITORY. Variables such as GIT_DIR, which hooks set, would name another one."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "--no-optional-locks", "-c", "core.fsmonitor=false", "-C", str(REPOSITORY), *arguments]
    done = subprocess.run(command, check=True, capture_output=True, env=own | {"LC_ALL": "C"} | environment)
    return os.fsdecode(done.stdout)


def _is_changed() -> bool:
    """Whether the code may be other than the commit's. Results and documents are no code: `tables.py` writes both."""
    code = ("--", ".", ":(exclude)results", ":(exclude)*.md")
    if _git("status", "--porcelain", "--untracked-files=no", *code):
        return True
    listed = [line.partition(" ") for line in _git("ls-files", "-v", "-z").split("\0") if line]
    if any(tag == "S" or tag.islower() for tag, _, _ in listed):
        # Files that git was told to look away from (assume-unchanged, skip-worktree): a fresh index does not know it.
        with tempfile.TemporaryDirectory() as folder:
            index = {"GIT_INDEX_FILE": f"{folder}/index"}
            _git("read-tree", "HEAD", **index)
            different = ("diff", "--no-ext-diff", "--name-only", "--diff-filter=d", "HEAD")
            if _git(*different, *code, **index):
                return True
    tracked = {name for _, _, name in listed}
    return any(path.relative_to(REPOSITORY).as_posix() not in tracked for path in _possible_code())


def _possible_code() -> Iterator[Path]:
    """The files that could be code, whatever git ignores: what can be imported, in CODE and at the top.

    Names that begin with a dot belong to editors and systems, and __pycache__ to Python.
    """
    top = [path for path in REPOSITORY.iterdir() if path.name not in (*CODE, "configs", "data", "results")]
    for path in (file for one in top for file in (one.glob("__init__.*") if one.is_dir() else [one])):
        if path.name.endswith(IMPORTABLE) and not path.name.startswith("."):
            yield path
    for name in CODE:
        for folder, folders, files in os.walk(REPOSITORY / name):
            links = [name for name in folders if (Path(folder) / name).is_symlink()]
            folders[:] = [name for name in folders if name != "__pycache__" and not name.startswith(".")]
            importable = [name for name in files if name.endswith(IMPORTABLE)]
            yield from (Path(folder) / name for name in (*importable, *links) if not name.startswith("."))


def _read() -> dict[str, bytes]:
    """By their names, the files of models/ and mbn/ without NOT_TRAINING, as they are now."""
    paths = (path for folder in ("mbn", "models") for path in (REPOSITORY / folder).rglob("*.py"))
    named = {path.relative_to(REPOSITORY): path for path in paths if not path.name.startswith(".") and path.is_file()}
    return {
        name.as_posix(): path.read_bytes() for name, path in sorted(named.items()) if name.parts[1] not in NOT_TRAINING
    }


@functools.cache
def _texts() -> dict[str, bytes]:
    """The files, read once in a process."""
    return _read()


@functools.cache
def check_imported() -> None:
    """Check, once in a process, that no file was edited between `ask` and now, when all that trains is imported: what
    `code` and the commit stand for would not be what trains. Errors: UserError.
    """
    before, now = _texts(), _read()
    edited = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
    if edited:
        raise UserError(f"{edited[0]} was edited while the code was loaded: run the command again to train with it.")


def import_all() -> None:
    """Import the code that trains. A command with several runs does so before the first one: a module that the fifth
    run imports first, after an edit, would not be the one that `code` stands for. Errors: as for `check_imported`.
    """
    for name in _texts():
        with contextlib.suppress(Exception):  # of a file that no run needs
            importlib.import_module(name.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    check_imported()


@functools.cache
def code() -> str:
    """SHA-256 of the code that trains: models/ and mbn/ without NOT_TRAINING, comments, docstrings and blank lines.

    The files are read once in a process, near its start, because the hash stands for the code that was imported.
    """
    digest = hashlib.sha256()
    for name, content in _texts().items():
        try:
            text = statements(content.decode())
        except (ValueError, SyntaxError, tokenize.TokenError):  # no Python, such as a file that is half written
            text = str(content)
        digest.update(f"{name}\n{text}\n".encode())
    return digest.hexdigest()


def statements(text: str) -> str:
    """A module's lines without comments, docstrings and blank lines, the same under every version of Python."""
    lines = text.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            first, last = node.body[0].lineno, node.body[0].end_lineno or 0
            lines[first - 1 : last] = [""] * (last - first + 1)
    return "\n".join(line.rstrip() for line in lines if line.strip())


def described(made_by: Mapping[str, Any]) -> str:
    """The commit of a record or a checkpoint, and whether there were changes. Example: 0123456 and changes."""
    return (made_by["commit"] or "unknown")[:7] + " and changes" * bool(made_by["dirty"])


def with_code(made_by: Mapping[str, Any]) -> str:
    """Example: commit 0123456 and changes, code 89abcde."""
    return f"commit {described(made_by)}, code {(made_by['code'] or 'unknown')[:7]}"


def versions() -> dict[str, str]:
    import numpy
    import PIL
    import torch
    import torchvision

    return {
        "mbn": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # a class of its own, which no checkpoint may hold
        "torchvision": torchvision.__version__,
        "numpy": numpy.__version__,
        "pillow": PIL.__version__,
    }


def device_name(device: Any) -> str:
    """The device's name, such as 'cpu: AMD EPYC' or 'cuda: NVIDIA H100 80GB HBM3'."""
    import torch

    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = CPUINFO.read_text(encoding="utf-8", errors="replace").split("\n")
        model = next((line.partition(":")[2] for line in lines if "model name" in line), model)
    return f"{device.type}: {printable(model.strip())}"
