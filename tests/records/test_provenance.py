"""Where a run's numbers come from: commit and dirty, with git and without; the hash of the code; the device."""

import platform
import re
import subprocess
import sys

import pytest
import torch
from running import load_script

import train
from mbn.config import REPOSITORY
from mbn.launch.sweep import sweep
from mbn.records import provenance
from mbn.system.errors import UserError

# What the environment holds where there is no git.
DESCRIBE = ("describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*")


def git(folder, *arguments):
    user = ("-c", "user.name=x", "-c", "user.email=x@x", "-c", "commit.gpgsign=false")
    return subprocess.run(["git", *user, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


def commit(folder):
    git(folder, "init")
    git(folder, "add", ".")
    git(folder, "commit", "-m", "first")
    return git(folder, "rev-parse", "HEAD").strip()


def forget():
    for function in (provenance._origin, provenance._texts, provenance.check_imported, provenance.code):
        function.cache_clear()


@pytest.fixture
def asked(tmp_path, monkeypatch):
    """A function that asks as a new process of the checkout in tmp_path / "checkout" would."""
    monkeypatch.setattr(provenance, "REPOSITORY", tmp_path / "checkout")
    monkeypatch.delenv("MBN_COMMIT", raising=False)

    def ask():
        forget()
        return provenance.commit_and_dirty()

    yield ask
    forget()


@pytest.fixture
def tree(tmp_path, asked):
    """A small checkout's files, without git."""
    files = ("mbn/norm/base.py", "models/nin.py", "scripts/tables.py", "configs/a.yaml", "train.py", "tests/test_a.py")
    for name in (*files, "results/tracked.json", "README.md", "mbn/norm/README.md"):
        path = tmp_path / "checkout" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("1\n")
    (tmp_path / "checkout" / ".gitignore").write_text("__pycache__/\n*.egg-info/\n/data/\n/build/\n.venv/\nhidden*\n")
    return tmp_path / "checkout"


@pytest.fixture
def repository(tree, monkeypatch):
    """A checkout that stands in for this one."""
    commit(tree)
    monkeypatch.setenv("MBN_COMMIT", "f" * 40)  # read only where git is not
    return tree


CHANGES = [
    (None, False),
    ("train.py", True),
    ("tests/test_a.py", True),
    ("results/tracked.json", False),
    ("README.md", False),  # tables.py writes a part of it
    ("mbn/norm/README.md", False),
    # Untracked.
    ("notes.txt", False),
    ("tests/test_b.py", False),
    ("data/x.py", False),
    ("results/x.py", False),
    ("memorized.egg-info/PKG-INFO", False),
    (".venv/lib/torch/__init__.py", False),
    ("mbn/norm/__pycache__/base.cpython-311.pyc", False),
    ("mbn/norm/.DS_Store", False),
    (".#train.py", False),
    ("torch.py", True),
    ("numpy.abi3.so", True),
    ("torch/__init__.py", True),
    ("hidden/__init__.py", True),  # also where git ignores it
    ("mbn/norm/base/__init__.py", True),
    ("mbn/norm/base.so", True),
    ("models/hidden.py", True),
    ("scripts/torch.py", True),
    ("configs/hidden.yaml", False),
]


@pytest.mark.parametrize(("file", "dirty"), CHANGES, ids=[str(file) for file, _ in CHANGES])
def test_changes_and_whatever_could_be_code_are_dirt(repository, asked, file, dirty):
    head = git(repository, "rev-parse", "HEAD").strip()
    if file:
        (repository / file).parent.mkdir(parents=True, exist_ok=True)
        (repository / file).write_text("2")
    assert asked() == (head, dirty)


def test_a_change_in_the_index_is_dirt(repository, asked):
    (repository / "train.py").write_text("2")
    git(repository, "add", ".")
    (repository / "train.py").write_text("1\n")
    assert asked()[1] is True


def test_a_link_to_a_package_is_dirt(repository, asked, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (repository / "mbn" / "norm" / "extra").symlink_to(tmp_path / "elsewhere")
    assert asked()[1] is True


@pytest.mark.parametrize("flag", ["--assume-unchanged", "--skip-worktree"])
def test_a_change_is_dirt_also_where_git_was_told_to_look_away(repository, asked, flag):
    git(repository, "update-index", flag, "train.py", "tests/test_a.py")
    (repository / "tests" / "test_a.py").unlink()  # as in a sparse checkout
    assert asked()[1] is False
    (repository / "train.py").write_text("2")
    assert git(repository, "status", "--porcelain") == ""
    assert asked()[1] is True


def test_the_environment_of_a_hook_names_no_other_repository(repository, asked, tmp_path, monkeypatch):
    expected = asked()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("other")
    assert commit(tmp_path / "other") != expected[0]
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path / "other"))
    monkeypatch.setenv("GIT_INDEX_FILE", str(tmp_path / "other" / ".git" / "index"))
    assert asked() == expected
    (repository / "train.py").write_text("2")
    assert asked() == (expected[0], True)


def test_a_worktree_and_a_link_to_a_checkout_are_checkouts(repository, asked, tmp_path, monkeypatch):
    expected = asked()
    git(repository, "worktree", "add", str(tmp_path / "worktree"))
    (tmp_path / "link").symlink_to(repository)
    for name in ("worktree", "link"):
        monkeypatch.setattr(provenance, "REPOSITORY", tmp_path / name)
        assert asked() == expected == (expected[0], False)


@pytest.mark.parametrize("dirty", [False, True])
def test_without_git_both_come_from_the_environment(repository, asked, monkeypatch, dirty):
    if dirty:
        (repository / "train.py").write_text("2")
    expected = asked()
    monkeypatch.setenv("MBN_COMMIT", git(repository, *DESCRIBE))
    monkeypatch.setenv("PATH", "")
    assert asked() == expected == (expected[0], dirty)


def test_a_tree_unpacked_in_another_repository_is_not_of_that_one(tree, asked, tmp_path, monkeypatch, capsys):
    commit(tmp_path)
    (tree / "train.py").write_text("edited")
    assert asked() == (None, None)
    provenance.ask()
    assert f"lies in the one of {tmp_path}: set MBN_COMMIT" in capsys.readouterr().err
    monkeypatch.setenv("MBN_COMMIT", "a" * 40 + "-dirty")
    assert asked() == ("a" * 40, True)


def fake_git(folder, says):
    (folder / "git").write_text(f"#!/bin/sh\necho '{says}' >&2\nexit 128\n")
    (folder / "git").chmod(0o755)
    return str(folder)


@pytest.mark.parametrize(
    ("git_says", "described", "says"),
    [
        ("fatal: detected dubious ownership in repository at x", "", "git config --global --add safe.directory /"),
        ("fatal: a\x1b[2Jb", "", r"git says: a\x1b[2Jb; set MBN_COMMIT"),
        (None, "", "git cannot be started, No such file or directory: set MBN_COMMIT"),
        (None, "main", "MBN_COMMIT is 'main': set it to"),
        (None, "abcdef", "MBN_COMMIT is 'abcdef': set it to"),
    ],
)
def test_an_unknown_commit_is_said_in_one_line(tree, asked, tmp_path, monkeypatch, capsys, git_says, described, says):
    monkeypatch.setenv("PATH", fake_git(tmp_path, git_says) if git_says else "")
    monkeypatch.setenv("MBN_COMMIT", described)
    assert asked() == (None, None)
    provenance.ask()
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"warning: the commit of this code is unknown \([^\n]*\)[^\n]*\.\n", err)
    assert says in err


def test_a_commit_or_an_edit_made_later_changes_nothing(repository, asked, capsys):
    before = asked()
    provenance.ask()
    assert capsys.readouterr() == ("", "")
    (repository / "models" / "nin.py").write_text("2\n")
    git(repository, "commit", "-am", "second")
    assert provenance.commit_and_dirty() == before
    code = provenance.code()
    assert asked()[0] != before[0]
    assert provenance.code() != code


@pytest.mark.parametrize("file", ["mbn/norm/base.py", "models/nin.py", "models/new.py"])
def test_code_that_is_edited_while_it_is_imported_trains_nothing(repository, asked, file):
    asked()
    provenance.ask()
    before = (repository / file).read_text() if (repository / file).exists() else None
    (repository / file).write_text("2\n")
    with pytest.raises(UserError, match=rf"^{file} was edited [^.]*: run the command again[^.]*\.$"):
        provenance.check_imported()
    if before is None:
        (repository / file).unlink()
    else:
        (repository / file).write_text(before)
    provenance.check_imported()
    (repository / file).write_text("2\n")  # while it trains, after all was imported
    provenance.check_imported()


# The code.

MODULE = """
'''A module.'''
X = 1  # one


class A:
    '''A class,
    in two lines.'''

    def f(self, a="# not a comment"):
        '''A method.'''
        return a


def g():
    '''Nothing else.'''
"""
BARE = 'X = 1\nclass A:\n    def f(self, a="# not a comment"):\n        return a\ndef g():'


def test_comments_docstrings_and_blank_lines_do_not_count():
    assert provenance.statements(MODULE) == BARE


@pytest.fixture
def code(tree):
    """A function that hashes the code of a small checkout, with a file changed or added."""

    def hashed(name=None, text=""):
        for path in ("mbn/norm/base.py", "mbn/methods.py", "mbn/tables/page.py", "models/nin.py", "train.py"):
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).write_text("a = 1\n")
        if name:
            (tree / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        forget()
        return provenance.code()

    return hashed


@pytest.mark.parametrize(
    ("name", "text", "counts"),
    [
        ("mbn/norm/base.py", "a = 2\n", True),
        ("mbn/norm/base.py", "# why\n\na = 1  # how\n", False),
        ("mbn/methods.py", "b = 1\n", True),
        ("models/nin.py", "\n", True),
        ("models/another.py", "a = 1\n", True),
        ("mbn/tables/page.py", "a = 2\n", False),
        ("train.py", "a = 2\n", False),
        ("mbn/norm/README.md", "text", False),
        ("mbn/norm/._base.py", b"\xff\0", False),  # macOS's, which Python cannot import
        ("mbn/norm/half.py", b"\xff\0", True),
        ("mbn/norm/half.py", "def f(:", True),
        ("mbn/norm/half.py", '"' * 3, True),
    ],
)
def test_the_code_that_trains_counts(code, name, text, counts):
    before = code()
    assert len(before) == 64
    assert (code(name, text) != before) == counts


@pytest.mark.parametrize(
    ("info", "name"),
    [
        (b"flags: x\nmodel name\t: Odd \xff CPU\x1b[2J\nmodel name\t: second\n", "cpu: Odd \ufffd CPU\\x1b[2J"),
        (b"", "cpu: plain"),
        (None, "cpu: plain"),
    ],
)
def test_odd_or_no_words_of_the_processor_end_no_run(tmp_path, monkeypatch, info, name):
    if info is None:
        (tmp_path / "cpuinfo").mkdir()  # as unreadable as can be, for root too
    else:
        (tmp_path / "cpuinfo").write_bytes(info)
    monkeypatch.setattr(provenance, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(platform, "processor", lambda: "plain")
    assert provenance.device_name(torch.device("cpu")) == name


# The commands.


class FirstError(Exception):
    pass


@pytest.mark.parametrize(
    ("command", "arguments", "asks"),
    [
        (train, ["seed=1"], True),
        (train, ["-m", "seed=1,2"], True),
        (train, ["--help"], False),
        (train, ["--cfg", "job"], False),
        (load_script("reproduce"), ["table4"], True),
        (load_script("reproduce"), ["--import", "x", "table4"], True),
        (load_script("reproduce"), ["--import", "x"], False),
        (load_script("reproduce"), ["table4", "--dry-run"], False),
        (load_script("reproduce"), ["--status"], False),
    ],
)
def test_a_command_that_trains_asks_before_it_reads_a_configuration(command, arguments, asks, monkeypatch):
    def first(what):
        def call(*_, **__):
            raise FirstError(what)

        return call

    monkeypatch.setattr(provenance, "ask", first("asks"))
    for name in ("load", "compose", "sweep_lines"):
        home = command.configuration if command is train else command
        monkeypatch.setattr(home, name, first("reads"), raising=False)
    with pytest.raises(FirstError) as caught:
        command.main(arguments)
    assert str(caught.value) == ("asks" if asks else "reads")


def test_a_command_with_several_runs_imports_all_code_before_the_first_one(monkeypatch):
    """Otherwise a network of a later run would be imported after an edit, under the hash of before."""
    code = "import sys\nfrom mbn.records import provenance as p\np.import_all()\nprint(*sys.modules, *p._texts())"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, check=True, capture_output=True, text=True)
    names = set(done.stdout.split())
    files = {name for name in names if name.endswith(".py")}
    assert len(files) > 60
    modules = {name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in files}
    assert modules <= names
    order = []
    monkeypatch.setattr(provenance, "import_all", lambda: order.append("import"))
    sweep(["dataset=digits", "seed=3,4", "machine.results=nowhere"], lambda config, _: order.append(config.seed))
    assert order == ["import", 3, 4]
