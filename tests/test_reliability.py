"""The table of figures keeps the rows of tests that do not run again."""

import re

import pytest
import reliability


def test_a_row_is_replaced_by_its_command_and_the_others_stay(tmp_path):
    path = tmp_path / "reliability.md"
    reliability.put("2", "Kills", "500 of 500", 61.2, "pytest --long a", path)
    reliability.put("10", "Soak", "1 of 1", 9, "pytest --long c", path)
    before = reliability.read(path)
    reliability.put("1", "Kills | of\nruns", "3 of 3", 2, "pytest --long b", path)
    reliability.put("2", "Kills", "499 of 500", 60, "pytest --long a", path)
    rows = reliability.read(path)
    assert [row["item"] for row in rows.values()] == ["1", "2", "10"]
    assert rows["`pytest --long c`"] == before["`pytest --long c`"]
    assert rows["`pytest --long a`"]["figure"] == "499 of 500"
    assert rows["`pytest --long b`"]["what"] == "Kills / of runs"


def test_a_file_that_is_no_such_table_is_not_written_over(tmp_path):
    path = tmp_path / "reliability.md"
    path.write_text("| a | b |\n")
    with pytest.raises(ValueError, match="restore it from git"):
        reliability.put("1", "a", "1 of 1", 1, "pytest", path)
    assert path.read_text() == "| a | b |\n"


def test_the_committed_table_can_be_read():
    for command, row in reliability.read().items():
        assert re.match(r"`pytest --long '?tests/\w+/test_", command)
        assert row["figure"]
