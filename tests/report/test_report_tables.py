"""What the report says about the numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_samples import evaluation

from clinkd.evaluate.score import score_task
from clinkd.report import tables
from clinkd.report.tables import Interval


@pytest.mark.parametrize(
    ("value", "baseline", "interval", "said"),
    [
        (0.5, 0.1, Interval(0.4, 0.6), "better"),
        (0.5, 0.45, Interval(0.4, 0.6), "unclear"),
        (0.1, 0.5, Interval(0.05, 0.2), "worse"),
        (0.5, 0.1, None, "above"),
        (0.1, 0.5, None, "below"),
        (0.5, 0.5, None, "level"),
        (None, 0.5, None, "unknown"),
        (0.5, None, Interval(0.4, 0.6), "unknown"),
        # The interval is of the honest estimate: it does not overrule a published value on the other side.
        (0.1, 0.2, Interval(0.3, 0.4), "unclear"),
    ],
)
def test_the_verdict_claims_no_more_than_the_interval_allows(value, baseline, interval, said):
    assert tables.verdict(value, baseline, interval) == said


@pytest.mark.parametrize(("task", "metric"), [("vg", "recall_at_50"), ("roc", "recall")])
def test_the_interval_is_that_of_the_published_mean(task, metric):
    box = "<box>(10,10),(400,400)</box>"
    rows = [
        {"image": f"ct_00--P--{at}--2d.png", "annotation": box, "response": box if at % 3 else "no"}
        for at in range(60)
    ]
    result = score_task(task, rows)
    found = tables.find_interval(result["honest"], metric)
    assert found is not None and found.point == pytest.approx(result["mean"][metric])
    assert found.low < found.point < found.high


@pytest.mark.parametrize(
    "honest", [{}, {"recall": 0.6}, {"recall": [0.5, 0.7]}, {"recall": "high"}, {"recall": {"low": 1}}]
)
def test_no_interval_is_made_up(honest):
    assert tables.find_interval(honest, "recall") is None


def test_without_spice_the_column_shows_rouge_l_and_says_so():
    table = tables.task_table(evaluation())
    assert [column["metric"] for column in table["columns"]] == ["Recall@0.5", "recall", "ROUGE-L", "mBMR"]
    assert table["cells"]["ct"][2]["value"] == 0.7
    assert table["published"][2] == {"value": 0.5523, "metric": "SPICE"}


def test_mbmr_of_a_modality_is_formed_from_its_six_parts():
    table = tables.task_table(evaluation())
    assert table["cells"]["ct"][3]["value"] == pytest.approx((0.7 + 0.6 + 0.5 + 0.4 + 0.35 + 0.7) / 6)
    assert tables.metric_value({"bleu_1": 0.5}, "mbmr") is None


def test_a_modality_without_targets_is_empty_not_zero():
    scores = {
        "vg": {"mean": {"recall_at_50": 0.1}, "modalities": {"ct": {"recall_at_50": 0.0, "targets": 0}}}
    }
    table = tables.task_table(scores)
    assert table["cells"]["ct"][0] == {"value": None, "rows": 0}


def test_a_missing_metric_gives_the_evaluations_own_reason():
    part = {"spice_reason": "no jars", "text_reason": None, "meteor_reason": "METEOR ended"}
    assert tables.why_missing("rc", part, "spice") == "no jars"
    assert tables.why_missing("rc", part | {"text_reason": "no Java on PATH"}, "spice") == "no Java on PATH"
    assert "no SPICE for referring captioning" in tables.why_missing("rc", {}, "spice")


def test_answers_are_read_as_they_come():
    assert tables.answer_text(["<box>(1,2),(3,4)</box><|im_end|>"]) == "<box>(1,2),(3,4)</box>"
    assert tables.answer_text(None) == tables.answer_text([]) == ""
    assert tables.answer_boxes("<|box_start|>(1,2),(3,4)<|box_end|>") == [(1, 2, 3, 4)]
    assert tables.answer_boxes("at (1,2),(3,4)") == [(1, 2, 3, 4)]
    assert (
        tables.answer_boxes("<box>(9,9),(1,1)</box> (1,2),(3,4)") == []
    )  # a span, though bad: no bare boxes


def test_recall_by_size_counts_every_target():
    small, large = "<box>(0,0),(100,100)</box>", "<box>(0,0),(500,500)</box>"
    rows = [
        {"task": "vg", "annotation": small + large, "response": large},
        {"task": "vg", "annotation": large, "response": "nothing"},
        {"task": "roc", "annotation": "Liver", "response": large},
    ]
    assert tables.recall_by_size(rows) == [
        {"size": "small", "targets": 1, "hits": 0, "value": 0.0},
        {"size": "large", "targets": 2, "hits": 1, "value": 0.5},
    ]


def test_confusions_name_the_wrong_side():
    rows = [
        {"task": "roc", "annotation": "Left kidney", "response": "right kidney."},
        {"task": "roc", "annotation": "Left kidney", "response": "The left kidney"},
        {"task": "roc", "annotation": "Liver", "response": "Spleen"},
    ]
    sided, other = tables.confusions(rows)
    assert (sided["truth"], sided["times"], sided["asked"], sided["side"]) == ("left kidney", 1, 2, True)
    assert (other["truth"], other["side"]) == ("liver", False)


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers(-5, 5) | st.text("a_0", max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("a_0", max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)
parts = st.dictionaries(
    st.sampled_from(["mean", "modalities", "honest", "skipped", "recall", "ct", "reasons", "spice"]),
    json_values | st.dictionaries(st.sampled_from(["recall", "ct", "recall_at_50", "bleu_1"]), json_values),
)


@given(st.dictionaries(st.sampled_from(["vg", "roc", "rc", "mia", "baselines"]), parts | json_values))
def test_no_shape_of_eval_json_is_an_exception(shape):
    cards = tables.summary_cards(shape)
    assert tables.overall(cards) in {"both", "one", "none", "unclear", "unknown"}
    tables.task_table(shape)
    tables.skipped_rows(shape)
    for task in ("rc", "mia"):
        part = tables.mapping(shape.get(task))
        tables.text_table(task, part)
        tables.honest_rows(tables.mapping(part.get("honest")))
