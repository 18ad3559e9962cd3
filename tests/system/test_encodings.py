"""Text files are UTF-8 and paths are bytes, whatever the locale says."""

import ast
import os
import shutil
import subprocess
import sys

import pytest

from mbn.config import REPOSITORY

LATIN1 = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "latin-1"}
# Functions that open a text unless their mode has a b.
OPENERS = ("open", "fdopen", "NamedTemporaryFile", "TemporaryFile")
# Modules whose function open is for other things than texts.
OTHERS = ("os", "Image", "tarfile", "zipfile", "lzma", "gzip", "bz2")


def without_encoding(text):
    """Lines of a program that read or write a text without naming its encoding."""
    for node in (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)):
        called = ast.unparse(node.func)
        name = called.rpartition(".")[2]
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        arguments = ast.walk(ast.Tuple([*node.args, keywords.get("mode", ast.Constant(""))]))
        modes = {part.value for part in arguments if isinstance(part, ast.Constant)}
        opens = name in OPENERS and called.partition(".")[0] not in OTHERS and not modes & {"rb", "wb", "ab"}
        if (opens or "text" in keywords or name in ("read_text", "write_text")) and "encoding" not in keywords:
            yield node.lineno


@pytest.mark.parametrize(
    ("line", "found"),
    [
        *((line, True) for line in ("open(p)", "p.open('w')", "p.read_text()", "p.open(mode)", "run(c, text=True)")),
        *((line, False) for line in ("open(p, 'rb')", "p.open('wb')", "open(p, encoding='utf-8')", "os.open(p, 3)")),
        ("Image.open(p)", False),
    ],
)
def test_the_search_finds_what_it_should(line, found):
    assert bool([*without_encoding(line)]) == found


def test_every_text_is_read_and_written_with_its_encoding():
    folders = [REPOSITORY / part for part in ("mbn", "scripts", "models")]
    files = [REPOSITORY / "train.py", *(path for folder in folders for path in folder.rglob("*.py"))]
    assert len(files) > 90
    assert [(str(p), n) for p in files for n in without_encoding(p.read_text(encoding="utf-8"))] == []


def in_latin1(*command):
    """What a command prints in a locale without UTF-8; none of our files is opened with the locale's encoding."""
    done = subprocess.run(
        [sys.executable, "-X", "warn_default_encoding", *command],
        env={**os.environ, **LATIN1},
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert f"{REPOSITORY}".encode() not in done.stderr
    return done.stdout


def test_tables_have_the_same_bytes_in_another_locale(tmp_path):
    """Their text has a λ, which Latin-1 lacks; the folder's name is no text in any encoding."""
    results = tmp_path / os.fsdecode(b"\xff \xce\xbb")
    shutil.copytree(REPOSITORY / "results" / "records", results / "records")
    out = in_latin1(REPOSITORY / "scripts" / "tables.py", f"machine.results={results}")
    assert b"wrote " + os.fsencode(results / "tables") in out
    written = {path.name: path.read_bytes() for path in (results / "tables").iterdir()}
    assert written == {path.name: path.read_bytes() for path in (REPOSITORY / "results" / "tables").iterdir()}
    assert any("λ".encode() in content for content in written.values())


def test_a_command_of_a_dry_run_has_the_paths_own_bytes(tmp_path):
    results = tmp_path / os.fsdecode(b"\xff\xce\xbb")
    setting = f"machine.results={results}"
    out = in_latin1(REPOSITORY / "scripts" / "reproduce.py", "table6", "--seeds", "1", "--dry-run", setting)
    assert b"'" + os.fsencode(setting) + b"'" in out


def test_letters_that_stdout_lacks_are_shown_as_escapes():
    code = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\nfrom mbn.system import command_line as c\n"
    code += "c.entry_point(lambda: print('\\xe9 \\u03bb \\udcff'))()"
    assert in_latin1("-c", code) == b"\xe9 \\u03bb \xff\n"
