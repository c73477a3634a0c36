"""The report as Markdown: its numbers for machines and reviews, and nothing of a patient's."""

from __future__ import annotations

from pathlib import Path

from report_samples import whole_run

from clinkd.report.html import ReportInputs, build_markdown, marked_down


def test_it_has_the_numbers_of_the_page_and_no_questions_or_answers(tmp_path: Path) -> None:
    run = whole_run()
    text = build_markdown(run, tmp_path / "report.md").read_text(encoding="utf-8")
    parts = ("# tiny", "| mean |", "published, on Med-GRIT", "53.9", "1, kept", "Loss certificate: passed")
    for part in parts:
        assert part in text, part
    for row in run.predictions[:20]:
        assert row["question"] not in text and row["image"] not in text
    tables: dict[int, set[int]] = {}
    number = 0
    for line in text.splitlines():
        number += not line.startswith("|")
        if line.startswith("|"):
            tables.setdefault(number, set()).add(line.replace("\\|", "").count("|"))
    assert len(tables) == 4 and all(len(widths) == 1 for widths in tables.values())  # no torn row


def test_an_empty_run_has_one_too(tmp_path: Path) -> None:
    text = build_markdown(ReportInputs("nothing"), tmp_path / "report.md").read_text(encoding="utf-8")
    assert "It cannot be said" in text and "Loss certificate: none" in text


def test_text_from_outside_stays_in_its_cell() -> None:
    assert marked_down("a|b\n# <b>[x](y)") == r"a\|b \# \<b\>\[x\](y)"
