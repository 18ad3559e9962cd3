"""What every command makes of an error."""

import errno

import pytest

from mbn.system.command_line import Parser, entry_point
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


def test_other_errors_show_where_they_arose_and_no_code_is_success():
    @entry_point
    def main(error):
        if error:
            raise error

    assert main(None) == 0
    for error in (OSError(errno.ENOENT, "No such file"), ValueError("x"), RuntimeError("shapes")):
        with pytest.raises(type(error)):
            main(error)


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
