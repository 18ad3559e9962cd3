"""The journals in results/journals, on which findings rest, are those of their records."""

import json

import pytest

from mbn.config import REPOSITORY
from mbn.records import record
from mbn.records.curves import curves

JOURNALS = REPOSITORY / "results" / "journals"


@pytest.mark.parametrize("path", sorted(JOURNALS.rglob("*.jsonl")), ids=lambda path: path.stem)
def test_a_committed_journal_gives_the_curves_and_the_result_of_its_record(path):
    name = path.relative_to(JOURNALS).with_suffix("").as_posix()
    one = record.read(record.path_of(REPOSITORY / "results", name))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [row for row in rows if row["kind"] in ("train", "epoch")]
    found = curves(rows)
    assert {key: found[key] for key in one["curves"]} == one["curves"]
    assert rows[-1]["test_error"] == one["test_error"]
