"""The page of the documents application shows the result file and nothing else."""

from __future__ import annotations

from scripts import documents_table


def test_the_page_is_up_to_date() -> None:
    assert documents_table.main(["--check"]) == 0, "run python -m scripts.documents_table"
