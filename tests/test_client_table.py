"""The table of tests in other people's software: its rows are those tests, and its cases stand together."""

import ast
from types import SimpleNamespace

import client_table


def case(parameters, figure, passed=True, client="timm", file="tests/clients/test_timm.py"):
    nodeid = f"{file}::test_a_network_converts" + (f"[{parameters}]" if parameters else "")
    said = [("client", client), ("version", "1.0"), ("figure", figure)]
    return SimpleNamespace(nodeid=nodeid, user_properties=said, passed=passed, duration=0.5)


def test_cases_with_the_same_figure_stand_together_and_a_failed_one_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(client_table, "PATH", tmp_path / "clients.md")
    client_table.update([case("bn", "same"), case("brn", "same"), case("mbn[1]", "FAILED: a | b", passed=False)])
    (row,) = client_table.read()
    assert row["what holds"] == "A network converts"
    assert (row["passed"], row["figure"]) == ("2 of 3", "bn, brn: same; mbn[1]: FAILED: a / b")
    assert (row["client"], row["version"], row["seconds"]) == ("timm", "1.0", "1.5")


def test_rows_of_other_files_stay_while_the_file_is_there(tmp_path, monkeypatch):
    monkeypatch.setattr(client_table, "PATH", tmp_path / "clients.md")
    client_table.update([case("", "a"), case("", "b", file="tests/clients/conftest.py"), case("", "c", file="gone.py")])
    client_table.update([case("", "d"), case("", "e", client="torch")])
    assert [row["figure"] for row in client_table.read()] == ["b", "d", "e"]


def test_the_committed_table_has_a_row_for_each_test_and_all_passed():
    there = {
        f"{path.relative_to(client_table.REPOSITORY)}::{node.name}"
        for path in (client_table.REPOSITORY / "tests" / "clients").glob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    rows = client_table.read()
    assert {row["test"].strip("`") for row in rows} == there, "run pytest tests/clients --clients and commit its table"
    for row in rows:
        passed, of = row["passed"].split(" of ")
        assert passed == of, row
