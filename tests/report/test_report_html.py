"""The report as a file: whole, small, self-contained, safe with hostile text, clear about what is missing."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from report_samples import evaluation, metrics_rows, whole_run

from clinkd.report.html import ReportInputs, boxed, build_report, duration, points

HOSTILE = '<script>alert(1)</script><img src="http://evil.example/x" onerror=alert(2)>'


class Found(HTMLParser):
    """Every tag with its attributes, and all visible text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def made(run: ReportInputs, folder: Path) -> tuple[str, Found]:
    page = build_report(run, folder / "report.html").read_text(encoding="utf-8")
    return page, Found(page)


def assert_self_contained(page: str, found: Found) -> None:
    for tag, attributes in found.tags:
        for name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("#", "data:")), (tag, name, value)
    for style in re.findall(r"<style>(.*?)</style>", page, re.S) + [
        a["style"] or "" for _, a in found.tags if "style" in a
    ]:
        assert "@import" not in style
        assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", style))
    assert not [tag for tag, _ in found.tags if tag in ("iframe", "object", "embed", "base")]


def test_the_whole_report_is_one_small_file_that_loads_nothing(report: Path):
    page = report.read_text(encoding="utf-8")
    assert_self_contained(page, Found(page))
    assert report.stat().st_size < 5_000_000
    assert sorted(item.name for item in report.parent.iterdir()) == ["report.html"]  # nothing left beside it


def test_it_answers_first_whether_the_student_is_better_and_by_how_much(report: Path):
    text = " ".join(Found(report.read_text(encoding="utf-8")).text.split())
    start = text.index("Is the student better than the baselines?")
    said = text[start : text.index("Four tasks, eight modalities")]
    assert "Yes, than both." in said
    assert "57.5% (95% interval 51.0 to 63.0) against 6.0%, +51.5 points." in said
    assert "no interval for referring object classification" in said


def test_the_published_row_is_marked_as_the_real_data_sets(report: Path):
    text = " ".join(Found(report.read_text(encoding="utf-8")).text.split())
    assert re.search(
        r"BiRD, as published ?real data: Med-GRIT-270k test, not this run's images ?53\.92", text
    )
    for value in ("65.33", "55.23", "52.17"):
        assert value in text


def test_every_part_of_the_run_is_on_the_page(report: Path):
    page = report.read_text(encoding="utf-8")
    for part in (
        "Round 1:",
        "Round 2:",
        "candidates",
        "Errors of the student as the judge counts them",
        "Errors by reason",
        "said after the round",
        "ClinKD&#39;s released code",
        "This run",
        "prepare",
        "clinkd run run.yaml",
    ):
        assert part in page or part.replace("&#39;", "'") in page, part
    assert page.count("data:image/jpeg") > 80
    assert page.count('class="chart"') == 3 + 2 + 2 + 3 + 6


def test_the_curriculum_stands_beside_what_distillation_learned(report: Path):
    found = Found(report.read_text(encoding="utf-8"))
    said = [attributes.get("aria-label") or "" for tag, attributes in found.tags if tag == "svg"]
    assert any(text.startswith("share of samples over steps. distill: from 0.5 to 0.994") for text in said)
    assert any(text.startswith("mean p1 - p2 over steps. distill: from 0.8 to 0.405") for text in said)


def test_throughput_is_a_row_for_each_stage(report: Path):
    text = " ".join(Found(report.read_text(encoding="utf-8")).text.split())
    table = text[text.index("Throughput of training") :]
    assert re.search(r"teacher ?120 ?40\.\d ?1,798 ?0\.0125 ?1\.31 GiB ?distill ?80", table)


def test_a_run_that_measured_little_has_a_report(tmp_path: Path):
    old = metrics_rows(np.random.default_rng(3), measured=False)
    page, found = made(whole_run(metrics=old), tmp_path)
    text = " ".join(found.text.split())
    assert page.count('class="chart"') == 3 + 2 + 3 + 6
    assert re.search(r"teacher ?120 ?40\.\d ?— ?— ?— ?distill", text[text.index("Throughput of training") :])
    assert "reaches the bar" not in text


def test_text_from_outside_is_shown_not_run(tmp_path: Path):
    run = whole_run()
    predictions = [
        {**row, "response": HOSTILE, "question": HOSTILE, "image": row["image"], "sample": HOSTILE}
        for row in run.predictions
    ]
    predictions.append({**predictions[0], "image": HOSTILE + "_1.png"})
    scores = evaluation()
    scores["rc"]["spice_reason"] = scores["baselines"]["roc_answer"] = HOSTILE
    scores["vg"]["skipped"] = {HOSTILE: 3}
    hostile = {"text": HOSTILE, "score": 1.0, "veto": HOSTILE}
    changed = whole_run(
        name=HOSTILE,
        predictions=predictions,
        evaluation=scores,
        feedback=[
            {
                **run.feedback[0],
                "wrong": HOSTILE,
                "reason": HOSTILE,
                "chosen": HOSTILE,
                "candidates": [hostile],
            }
        ],
        metrics=[
            {"stage": HOSTILE, "step": 1, "loss": 1.0, "samples_per_s": 2.0, "admitted_share": 0.5},
            {"stage": "reflect", "event": HOSTILE, HOSTILE: HOSTILE},
        ],
        stages=[{"stage": HOSTILE, "fingerprint": HOSTILE, "counts": {HOSTILE: [HOSTILE]}}],
        sweep=[{HOSTILE: HOSTILE}],
        config=HOSTILE,
        versions={HOSTILE: HOSTILE},
        commands=[(HOSTILE, HOSTILE)],
        guide={HOSTILE: 0.5},
        guide_samples=[
            {**row, "question": HOSTILE, "sample": HOSTILE, "task": HOSTILE, "image": image}
            for row, image in zip(run.guide_samples, [HOSTILE, run.guide_samples[1]["image"]], strict=False)
        ],
        guidance={"mode": HOSTILE, "gamma": HOSTILE},
    )
    page, found = made(changed, tmp_path)
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert [tag for tag, _ in found.tags].count("script") == 1
    assert not [
        attributes for _, attributes in found.tags if any(name.startswith("on") for name in attributes)
    ]
    assert_self_contained(page, found)


def test_an_empty_run_says_what_is_missing(tmp_path: Path):
    _, found = made(ReportInputs("nothing"), tmp_path / "not" / "there" / "yet")
    text = " ".join(found.text.split())
    for sentence in (
        "It cannot be said.",
        "The evaluation holds no Recall@0.5 for visual grounding.",
        "There are no text metrics for referring captioning.",
        "No stage wrote a loss",
        "No distillation terms",
        "There is no feedback in this run",
        "There are no predictions to show.",
        "No numbers of the Med-CLIP guide were kept in this run.",
        "No sample of the run can be laid out, so the prompt drawn is invented",
        "The guide's relevance of single patches was kept for no sample of this run.",
        "The run's own parameters were not given.",
        "No stages were recorded.",
        "This run belongs to no sweep.",
        "No stage logged how fast it trained.",
        "The configuration was not kept",
        "No loss certificate was kept with this run.",
        "No software versions were recorded.",
    ):
        assert sentence in text, sentence


def test_without_java_the_reason_stands_where_the_numbers_would(tmp_path: Path):
    scores = evaluation()
    scores["rc"] = scores["mia"] = {
        "mean": {"bleu_1": None},
        "modalities": {},
        "text_reason": "Java is not installed.",
    }
    _, found = made(whole_run(evaluation=scores), tmp_path)
    assert "There are no text metrics for referring captioning. Java is not installed." in " ".join(
        found.text.split()
    )


def test_missing_images_and_odd_rows_leave_a_report(tmp_path: Path):
    odd = [
        {},
        {"task": "vg"},
        {"task": "vg", "annotation": "<box>(1,2),(3,4)</box>", "response": None, "image": None},
    ]
    run = whole_run(
        images=lambda names: {}, predictions=odd, feedback=[{}, {"candidates": None, "chosen": None}]
    )
    page, _ = made(run, tmp_path)
    assert "The image was not found in the run&#39;s data." in page


def test_a_huge_run_stays_under_five_megabytes(tmp_path: Path):
    run = whole_run()
    long = "word " * 20_000
    predictions = [{**row, "response": long + row["response"], "question": long} for row in run.predictions]
    changed = whole_run(
        predictions=predictions,
        config=long,
        metrics=[{"stage": f"s{i % 40}", "step": i, "loss": 1.0 / (i + 1)} for i in range(20_000)],
        sweep=[{f"k{j}": long for j in range(60)} for _ in range(500)],
        stages=[{"stage": long, "counts": {f"c{j}": long for j in range(50)}} for _ in range(400)],
        feedback=[
            {**row, "truth": long, "candidates": [{"text": long, "score": 0.1}] * 50} for row in run.feedback
        ],
        versions={f"package {i}": long for i in range(1000)},
        guide_samples=[
            {
                **row,
                "question": long,
                "grid": [100, 150],
                "merged": [140, 140],
                "before": 900,
                "after": 9000,
                "relevance": np.random.default_rng(0).random(15_000).tolist(),
            }
            for row in run.guide_samples
        ],
    )
    assert build_report(changed, tmp_path / "r.html").stat().st_size < 5_000_000


def test_the_same_run_gives_the_same_file(report: Path, tmp_path: Path):
    assert build_report(whole_run(), tmp_path / "again.html").read_bytes() == report.read_bytes()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("at <box>(1,2),(3,4)</box>.", 'at <code class="box">1,2 3,4</code>.'),
        ("<|box_start|>(1,2),(3,4)<|box_end|>", '<code class="box">1,2 3,4</code>'),
        ("<box>(1,2)</box><b>", "&lt;box&gt;(1,2)&lt;/box&gt;&lt;b&gt;"),
    ],
)
def test_boxes_in_text_are_set_apart_and_the_rest_is_escaped(text, shown):
    assert str(boxed(text)) == shown


def test_numbers_are_written_for_people():
    assert [duration(value) for value in (None, 3.21, 59.99, 75, 7384)] == [
        "—",
        "3.2 s",
        "60.0 s",
        "1 min 15 s",
        "2 h 03 min",
    ]
    assert [points(value) for value in (None, 0.123, -0.05)] == ["—", "+12.3", "−5.0"]
