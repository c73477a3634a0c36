"""The plan beside what came of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from clinkd.report.html import ReportInputs, build_markdown, build_report
from clinkd.report.planned import FILE, against_plan, read_plan

PLAN = {
    "stages": [
        {"name": "teacher", "steps": 100, "hours": [0.5, 1.0], "total": 2**30, "measured": None},
        {
            "name": "distill",
            "steps": 10,
            "hours": [1, 1],
            "total": 2**30,
            "measured": {"grown_at_end": 2**29},
        },
        {"name": "label", "answers": 5, "hours": [1, 2], "asks": True},
    ]
}
LINES = [
    {
        "stage": "teacher",
        "step": step,
        "seconds": 10.0 * step,
        "memory_gib": 1.0 + step,
        "libraries_gib": 0.75,
    }
    for step in (1, 2)
] + [{"stage": "teacher", "event": "done", "step": 2, "seconds": 900.0}]


def test_a_row_holds_both_sides() -> None:
    assert against_plan(PLAN, LINES) == [
        {"stage": "teacher", "calibrated": False, "steps": 100, "steps_done": 2, "seconds": (18.0, 36.0),
         "seconds_done": 15.0, "memory": 1.0, "memory_done": 2.25}
    ]  # fmt: skip


def test_a_calibrated_plan_is_taken_at_its_measurement() -> None:
    (row,) = against_plan(PLAN, [{"stage": "distill", "step": 1, "seconds": 1.0, "memory_gib": 1.0}])
    assert row["calibrated"] and row["memory"] == 0.5 and row["seconds"] == (360.0, 360.0)


@pytest.mark.parametrize("plan", [{}, {"stages": None}, {"stages": [None, 3, {}]}, {"stages": "x"}])
def test_what_is_no_plan_gives_no_rows(plan: dict) -> None:
    assert against_plan(plan, LINES) == []


def test_a_plan_is_read_where_it_is_whole(tmp_path: Path) -> None:
    assert read_plan(tmp_path) == {}
    for text, wanted in (("{", {}), ("[1]", {}), (json.dumps(PLAN), PLAN)):
        (tmp_path / FILE).write_text(text)
        assert read_plan(tmp_path) == wanted


def test_the_page_shows_it_and_says_nothing_without(tmp_path: Path) -> None:
    page = build_report(ReportInputs("one", metrics=LINES, plan=PLAN), tmp_path / "with.html").read_text()
    table = page[page.index("Planned and taken") :]
    assert "18" in table and "2.25 GiB" in table
    assert (
        "Planned and taken"
        not in build_report(ReportInputs("one", metrics=LINES), tmp_path / "without.html").read_text()
    )
    assert build_markdown(ReportInputs("one", metrics=LINES, plan=PLAN), tmp_path / "r.md").is_file()
