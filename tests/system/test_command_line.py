"""What every command makes of an error."""

import errno
import os
import subprocess
import sys

import pytest
from running import load_script

import train
from mbn.config import REPOSITORY
from mbn.system.command_line import Parser, entry_point, failure
from mbn.system.errors import ConfigError, UserError
from mbn.system.files import LOCKED


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ConfigError("seed must be 3."), 2, "error: seed must be 3."),
        (UserError("it failed."), 1, "error: it failed."),
        (UserError("it is being trained.", code=LOCKED), LOCKED, "error: it is being trained."),
        # Nothing that a terminal would obey: a file's name or a field of a record may come from anywhere.
        (UserError("no 日本 \x1b[2J\n\t\udc80\u202e."), 1, r"error: no 日本 \x1b[2J\n\t\udc80\u202e."),
        (
            OSError(errno.ENOSPC, "No space left", "file"),
            1,
            "error: cannot write file (No space left): free some space",
        ),
        (
            OSError(errno.EACCES, "no", "/data/x.bin"),
            1,
            "error: cannot use /data/x.bin (no): make it and its folders readable ",
        ),
        (OSError(errno.ENOENT, "no", "x"), 1, "error: cannot use x (no): check that it and its folder are there and "),
        (OSError(errno.EIO, "no", "x"), 1, "error: cannot use x (no): check the disk or the network drive and run "),
        (OSError(errno.ELOOP, "no", "x"), 1, "error: cannot use x (no): mend its links"),
        (OSError(errno.ENAMETOOLONG, "no", "x"), 1, "error: cannot use x (no): choose a shorter path"),
        (OSError(errno.ENOTDIR, "no", "x"), 1, "error: cannot use x (no): move away the file"),
        (OSError(errno.EROFS, "no", "x"), 1, "error: cannot write x (no): choose another folder"),
        (OSError(errno.EMFILE, "no", "x"), 1, "error: cannot use x (no): raise the limit on open files (ulimit -n)"),
        (OSError(errno.ENOTEMPTY, "no", "x"), 1, "error: cannot use x (no): check it and run the command again."),
        (OSError(errno.EIO, "no"), 1, "error: cannot use a file, in tests/system/test_command_line.py, line "),
        (OSError(errno.ENOMEM, "no"), 1, "error: this machine's memory is not enough"),
        # A name that a stranger chose reaches no terminal as it is.
        (OSError(errno.ENOENT, "no", "a\x1b[2J\nb\udce9"), 1, "error: cannot use a\\x1b[2J\\nb\\udce9 (no)"),
        (UserError("a\x1b]0;b\x07."), 1, "error: a\\x1b]0;b\\x07."),
        # A stop is no error.
        (UserError("stopped.", code=75), 75, "stopped."),
        (UserError("stopped.", code=130), 130, "stopped."),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C"),
    ],
)
def test_an_error_that_a_user_can_mend_is_a_sentence_and_an_exit_code(error, code, said, capsys):
    @entry_point
    def main():
        raise error

    assert main() == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(said)
    assert err.endswith(".\n")
    assert err.count("\n") == 1


def test_a_lack_of_memory_is_one_sentence(capsys):
    @entry_point
    def main():
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    assert main() == 1
    assert capsys.readouterr().err == (
        "error: this machine's memory is not enough: try a smaller batch_size or evaluate.batch_size.\n"
    )


def test_a_working_folder_that_was_deleted_is_one_sentence(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert train.main(["--cfg", "job"]) == 1
    said = "error: the folder in which this was started is no longer there: cd to one that is.\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("option", ["--help", "--cfg=job"])
def test_a_page_of_one_run_s_settings_is_refused_for_a_sweep(option, capsys):
    arguments = ["-m", "dataset=digits", *option.replace("--cfg=", "--cfg ").split()]
    assert train.main([*arguments, "seed=0,1"]) == 2
    assert capsys.readouterr().err == (
        "error: --help and --cfg show the settings of one run: leave -m out, with one value each.\n"
    )
    assert train.main([*arguments, "seed=1"]) == 0


def test_other_errors_show_where_they_arose_and_no_code_is_success():
    @entry_point
    def main(error):
        if error:
            raise error

    assert main(None) == 0
    for error in (OSError("a library's own"), ValueError("x"), RuntimeError("shapes")):
        with pytest.raises(type(error)):
            main(error)


# Output that nobody reads, or that cannot be written.

PROGRAM = """
import os, sys, time
sys.path.insert(0, {repository!r})
from pathlib import Path
from tqdm import tqdm
from mbn.system.command_line import entry_point

@entry_point
def main():
    for number in tqdm(range(2000), mininterval=0):
        tqdm.write("a line λ " + "x" * 90, file=sys.stdout)
        if number % 100 == 0:
            sys.stdout.flush()
            time.sleep(0.001)
    print("not good", file=sys.stderr)
    with open(sys.argv[1], "w") as file:
        file.write("done")
        try:
            os.write(1, b"as a library written in C prints")
        except BrokenPipeError:
            pass

sys.exit(main())
"""


@pytest.fixture
def program(tmp_path):
    """A function that runs a program in a shell, as in `PROGRAM | head`; it gives what the shell gave."""
    (tmp_path / "program.py").write_text(PROGRAM.format(repository=str(REPOSITORY)), encoding="utf-8")

    def run(line, **environment):
        line = line.replace("PROGRAM", f"{sys.executable} program.py end")
        shell = ["bash", "-o", "pipefail", "-c", line]
        return subprocess.run(shell, cwd=tmp_path, capture_output=True, env=os.environ | environment)

    return run


@pytest.mark.parametrize(
    "line",
    [
        "PROGRAM | head -1 >/dev/null",
        "PYTHONUNBUFFERED=1 PROGRAM | head -1 >/dev/null",
        "PROGRAM 2>&1 | head -1 >/dev/null",
        "PROGRAM >&-",
        "PROGRAM >&- 2>&-",
        "PROGRAM >&- 2>&- <&-",
        "PROGRAM 2>&- >/dev/null",
    ],
)
def test_a_reader_that_has_gone_ends_no_command(program, tmp_path, line):
    done = program(line)
    assert (tmp_path / "end").read_text() == "done"  # and nothing that was printed went into it
    assert done.returncode == 0, done
    assert b"Traceback" not in done.stderr, done
    assert b"Exception ignored" not in done.stderr, done


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux")  # noqa: PTH110
def test_a_full_disk_under_the_output_is_said_at_the_end(program, tmp_path):
    done = program("PROGRAM >/dev/full")
    assert (tmp_path / "end").read_text() == "done"
    assert done.returncode == 1
    assert done.stderr.endswith(
        b"error: cannot write the output (No space left on device): free some space and run the command again.\n"
    )
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": "latin-1"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
    ids=["latin-1", "C"],
)
def test_a_character_that_the_output_lacks_ends_no_command(program, environment):
    done = program("PROGRAM", **environment)
    assert done.returncode == 0, done
    assert done.stdout.startswith(rb"a line \u03bb x")


def test_streams_are_put_back(capsys):
    before = sys.stdout, sys.stderr

    @entry_point
    def main():
        assert sys.stdout is not before[0]
        raise ValueError("a fault")

    with pytest.raises(ValueError, match="a fault"):
        main()
    assert (sys.stdout, sys.stderr) == before


def test_one_runs_failure_is_a_sentence_with_a_traceback_only_where_the_program_is_at_fault(capsys):
    assert failure(UserError("no.")) == "no."
    assert failure(OSError(errno.EIO, "no", "x")).startswith("cannot use x (no): ")
    assert failure(MemoryError()).startswith("this machine's memory is not enough")
    assert capsys.readouterr().err == ""
    assert failure(KeyError("x\ny")) == "KeyError: 'x\\ny'"
    assert failure(ValueError()) == "ValueError: it says no more"
    assert "KeyError: 'x" in capsys.readouterr().err


def test_a_wrong_option_is_a_sentence():
    with pytest.raises(UserError, match=r"--nonsense; --help shows how it is used\.") as caught:
        Parser().parse_args(["--nonsense"])
    assert caught.value.code == 2


@pytest.mark.parametrize("arguments", ["--data DIR", "--data=DIR", "norm=bn --seeds 3 --data DIR", "--results ./x"])
def test_a_folder_given_as_an_option_is_a_sentence_that_names_the_setting(arguments):
    parser = Parser()
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--seeds", type=int)
    name = "data" if "data" in arguments else "results"
    with pytest.raises(UserError, match=rf"^there is no option --{name}: machine\.{name}=DIR[^.]*\.$") as caught:
        parser.parse_intermixed_args(arguments.split())
    assert caught.value.code == 2


@pytest.mark.parametrize("arguments", ["--database x", "--seeds"])
def test_a_program_without_settings_and_other_options_are_not_sent_there(arguments):
    with_settings = Parser()
    with_settings.add_argument("settings", nargs="*")
    for parser, line in ((Parser(), "--data x"), (with_settings, arguments)):
        with pytest.raises(UserError, match="--help shows how it is used"):
            parser.parse_intermixed_args(line.split())


# Folders that cannot be used. An administrator, who often runs tests in a container, may read everything; but not this.


@pytest.mark.parametrize("results", ["a circle of links", "a long name", "a file"])
@pytest.mark.parametrize(
    "line",
    [
        "train dataset=digits machine.results={}",
        "train -m dataset=digits norm=bn,mbn machine.results={}",
        "reproduce --status machine.results={}",
        "reproduce table6 --seed 0 --jobs 1 norm.memory=10 machine.results={}",
        "tables machine.results={}",
        "plots machine.results={}",
        "evaluate {}/checkpoint.pt",
        "evaluate {}",
    ],
)
def test_a_folder_that_cannot_be_used_is_named_in_one_sentence(tmp_path, capsys, monkeypatch, results, line):
    path = tmp_path / ("x" * 300 if results == "a long name" else "results")
    if results == "a circle of links":
        path.symlink_to(path)
    elif results == "a file":
        path.touch()
    name, *arguments = line.format(path).split()
    code = (train if name == "train" else load_script(name)).main(arguments)
    out, err = capsys.readouterr()
    said = [text for text in err.splitlines() if text.startswith("error: ")]
    assert code in (1, 2), out + err
    assert said, out + err
    assert str(path) in err
    assert "Traceback" not in err


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("what", ["data", "record"])
def test_data_and_records_that_cannot_be_read_are_one_sentence(tmp_path, capsys, monkeypatch, number, what):
    def refuse(*_):
        raise OSError(number, os.strerror(number), f"{tmp_path}/file")

    if what == "data":
        monkeypatch.setattr("mbn.data.datasets.digits", refuse)
    else:
        monkeypatch.setattr("mbn.records.record.read", refuse)
        monkeypatch.setattr("pathlib.Path.exists", lambda _: True)
    assert train.main(["dataset=digits", f"machine.results={tmp_path}", "machine.mode=eager"]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"error: cannot use {tmp_path}/file ({os.strerror(number)}): ")
    assert err.count("\n") == 1


@pytest.mark.parametrize("script", ["tables", "plots"])
@pytest.mark.parametrize(
    ("option", "value"),
    [
        *[("--seeds", v) for v in ("0", "-1", "1.5", "٣", "10001", "")],
        *[("--scale", v) for v in ("0", "nan", "inf", "x")],
    ],
)
def test_which_runs_a_page_shows_is_within_limits(script, option, value, capsys):
    assert load_script(script).main([f"{option}={value}"]) == 2
    kind = "whole number from 1 to 10000" if option == "--seeds" else "number above 0"
    assert f"argument {option}: must be a {kind}, not '{value}'" in capsys.readouterr().err
