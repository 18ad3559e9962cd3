"""The settings of scripts that train nothing."""

import subprocess
import sys
from pathlib import Path

import pytest

from mbn.config import REPOSITORY
from mbn.config.folders import data_and_results, results_to_read
from mbn.system.errors import UserError


def test_folders_are_read_as_train_py_reads_them(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert data_and_results([]) == (REPOSITORY / "data", REPOSITORY / "results")
    data, results = data_and_results(["machine.results='a, b'", "machine.data=../in"])
    assert (data.resolve(), results.resolve()) == (tmp_path.parent / "in", tmp_path / "a, b")
    assert results_to_read([f"machine.results={tmp_path}"]) == Path(tmp_path)


@pytest.mark.parametrize("text", ["norm=bn", "machine.threads=2", "results"])
def test_other_settings_are_refused(text):
    with pytest.raises(UserError, match=r"machine\.results=DIR"):
        data_and_results([text])


@pytest.mark.parametrize("script", ["tables.py", "plots.py"])
def test_scripts_that_only_read_need_a_folder_that_is_there(script, tmp_path):
    command = [sys.executable, REPOSITORY / "scripts" / script, f"machine.results={tmp_path / 'no'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: there is no folder {tmp_path / 'no'}")
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "no").exists()
