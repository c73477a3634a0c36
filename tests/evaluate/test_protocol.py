"""The published numbers: equal to the official scripts, quirks and all, and standing where those fall."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prediction_rows import GOLDEN, IMAGES, golden, row

from clinkd.data.boxes import iou
from clinkd.data.records import MODALITIES
from clinkd.evaluate.protocol import clean_response, collect, iou_of_spans, numbers, score_roc, score_vg
from clinkd.evaluate.score import read_predictions, score_task

CLEANUP = json.loads((GOLDEN / "extract_information_expected.json").read_text())
BOX = "<box>(100,100),(500,500)</box>"


@pytest.mark.parametrize("case", CLEANUP, ids=[repr(case["in"]) for case in CLEANUP])
def test_a_response_is_cleaned_up_as_published(case):
    assert clean_response(case["in"]) == case["out"]


@pytest.mark.parametrize(
    ("task", "key", "of"), [("vg", "recall_at_50", "targets"), ("roc", "recall", "rows")]
)
def test_the_golden_rows_score_as_the_official_scripts_score_them(task, key, of):
    expected = golden(f"{task}_expected.json")
    result = score_task(task, read_predictions(GOLDEN / f"{task}.jsonl"))
    for name, (hits, total) in expected["modality_dict"].items():
        assert result["modalities"][name]["hits"] == hits
        assert result["modalities"][name][of] == total
        assert result["modalities"][name][key] == pytest.approx(expected["modality_score"][name], abs=1e-12)
    assert result["mean"][key] == pytest.approx(expected["all_mean_score"], abs=1e-12)
    assert result["rows"] == len(expected["processed_response"])


def test_every_golden_vg_row_has_the_official_hits_and_targets():
    per_item = golden("vg_expected.json")["per_item"]
    for raw in read_predictions(GOLDEN / "vg.jsonl"):
        result, expected = score_vg([raw]), per_item[str(raw["id"])]
        sums = [sum(m[key] for m in result["modalities"].values()) for key in ("hits", "targets")]
        assert sums == [expected["hits"], expected["targets"]], raw["note"]
        assert result["skipped"].get("no_target", 0) == expected["skipped_no_target"]


def test_every_golden_roc_row_hits_as_officially():
    per_item = golden("roc_expected.json")["per_item"]
    for raw in read_predictions(GOLDEN / "roc.jsonl"):
        hits = sum(m["hits"] for m in score_roc([raw])["modalities"].values())
        assert hits == per_item[str(raw["id"])]["hit"], raw["note"]


# What each input that stops (or nearly stops) the official scripts gives: rows read, rows skipped.
CRASHES = {
    "vg_unknown_modality": ("vg", 1, {"unknown_modality": 1}),
    "vg_unknown_modality_no_target": ("vg", 1, {"no_target": 1}),
    "vg_bad_annotation_box": ("vg", 1, {"annotation_box_broken": 1}),
    "vg_bad_annotation_no_pred": ("vg", 1, {}),  # the scripts count a missed target here, and so do we
    "vg_response_list": ("vg", 1, {}),
    "vg_uppercase_prefix": ("vg", 1, {"unknown_modality": 1}),
    "vg_empty_file": ("vg", 0, {}),
    "roc_unknown_modality": ("roc", 1, {"unknown_modality": 1}),
    "roc_empty_file": ("roc", 0, {}),
    "rc_missing_modality": ("rc", 1, {}),
    "rc_duplicate_ids": ("rc", 16, {"duplicate_id": 8}),
    "rc_string_id": ("rc", 8, {"id_not_integer": 8}),
}


@pytest.mark.parametrize("name", sorted(CRASHES))
def test_what_stops_the_official_scripts_is_counted_and_passed_over(name):
    assert set(CRASHES) == set(golden("crash_index.json"))
    task, read, skipped = CRASHES[name]
    result = score_task(task, read_predictions(GOLDEN / f"crash_{name}.jsonl"), text_metrics=False)
    assert (result["rows"], result["skipped"]) == (read, skipped)
    assert set(result["modalities"]) == set(MODALITIES)
    expected = golden("crash_expected.json")[name]
    if "crash" not in expected:
        counts = {m: [value["hits"], value["targets"]] for m, value in result["modalities"].items()}
        assert counts == expected["modality_dict"]
        assert result["mean"]["recall_at_50"] == expected["all_mean_score"]


def test_a_skipped_row_leaves_the_others_at_their_official_numbers():
    good = read_predictions(GOLDEN / "vg.jsonl")
    bad = [row for path in sorted(GOLDEN.glob("crash_vg_*.jsonl")) for row in read_predictions(path)]
    bad = [raw for raw in bad if score_vg([raw])["skipped"]]
    assert len(bad) >= 4
    mixed = score_vg([*bad, *good, *bad])
    assert mixed["modalities"] == score_vg(good)["modalities"]


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ("text", "not_an_object"),
        (None, "not_an_object"),
        ({}, "image_not_text"),
        (row(7, "x"), "annotation_not_text"),
        (row(BOX, None), "response_not_text"),
        (row(BOX, [BOX, BOX]), "response_not_text"),
        (row(BOX, [3]), "response_not_text"),
        (row(BOX, BOX, task="roc"), "other_task"),
        (row(BOX, BOX, image="noprefix.png"), "unknown_modality"),
        (row(BOX + "<box>nine</box>", BOX), "annotation_box_broken"),
    ],
)
def test_each_reason_to_skip_has_its_name(raw, reason):
    assert score_vg([raw])["skipped"] == {reason: 1}


@pytest.mark.parametrize(
    "span", ["", "1", "1,2,3", "1,2,3,4,5", "a,b,c,d", "nan,0,9,9", "inf,0,inf,9", "0,0,0,0"]
)
def test_a_span_that_is_no_box_with_area_hits_nothing(span):
    assert not iou_of_spans([0.0, 0.0, 9.0, 9.0], span) > 0.5


CORNERS = st.tuples(*[st.integers(0, 1000)] * 2, *[st.integers(1, 400)] * 2).map(
    lambda at: [float(at[0]), float(at[1]), float(at[0] + at[2]), float(at[1] + at[3])]
)


@given(target=CORNERS, box=CORNERS)
def test_boxes_with_area_overlap_as_anybody_would_say(target, box):
    span = "({:g},{:g}),({:g},{:g})".format(*box)
    assert iou_of_spans(target, span) == pytest.approx(iou(target, box), abs=1e-12)


def test_a_target_of_another_number_of_corners_is_never_hit():
    for target in ([], [0.0, 0.0, 9.0], [0.0, 0.0, 9.0, 9.0, 9.0]):
        assert iou_of_spans(target, "0,0,9,9") == 0


def test_a_caption_is_one_row_of_which_nothing_is_hit():
    assert collect("rc", [row("a liver", "a liver", task="rc")]).counts == [(0, 1)]


def test_whatever_python_reads_as_a_number_is_one():
    assert numbers(" (1e1, +2),( 3_0 ,.5)") == [10.0, 2.0, 30.0, 0.5]


def test_the_macro_mean_divides_by_eight_whatever_is_there():
    assert score_vg([row(BOX, BOX)])["mean"]["recall_at_50"] == pytest.approx(1 / 8)
    assert score_vg([])["mean"]["recall_at_50"] == 0


PIECES = [
    "<box>", "</box>", "(1,2),(30,40)", "(", ",", "1e400", "nan", "-5", "<|im_end|>", ".<|im_end|>\n", BOX,
    "<|endoftext|>", "\n", "\r", "\u2028", "left kidney", "no", " ||| ", "|||", "\ud800", "٣",
]  # fmt: skip
TEXTS = st.one_of(
    st.text(max_size=40),
    st.lists(
        st.sampled_from(PIECES),
        max_size=8,
    ).map("".join),
)
VALUES = st.one_of(TEXTS, st.none(), st.integers(), st.floats(), st.lists(TEXTS, max_size=2), st.booleans())
ROWS = st.one_of(
    VALUES,
    st.fixed_dictionaries(
        {},
        optional={
            "id": st.one_of(VALUES, st.integers(0, 20)),
            "image": st.one_of(st.sampled_from(sorted(IMAGES.values())), VALUES),
            "annotation": st.one_of(TEXTS, VALUES),
            "response": st.one_of(TEXTS, VALUES),
            "task": st.sampled_from(["vg", "roc", "rc", "mia", None]),
        },
    ),
)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(ROWS, min_size=34, max_size=34), task=st.sampled_from(["vg", "roc", "rc", "mia"]))
def test_no_row_whatever_raises(rows, task):
    # 60 x 34: over two thousand rows
    result = score_task(task, rows, text_metrics=False)
    assert result["rows"] == 34
    assert sum(result["skipped"].values()) <= 34
    json.dumps(result, allow_nan=False)


def test_a_prediction_file_is_read_whatever_its_lines_are(tmp_path: Path):
    path = tmp_path / "p.jsonl"
    good = json.dumps(row(BOX, [BOX])).encode()
    lines = [b"\xef\xbb\xbf" + good, b"", b"{broken", b"[1]", b"\xff\xfe", b"[" * 100_000, b"   ", good]
    path.write_bytes(b"\r\n".join(lines))
    rows = read_predictions(path)
    assert [raw["response"] for raw in rows] == [BOX, BOX]
    assert rows.bad_lines == {"line_not_json": 2, "line_not_utf8": 1, "not_an_object": 1}
    result = score_task("vg", rows)
    assert result["rows"] == 6
    assert result["skipped"] == rows.bad_lines
    assert result["modalities"]["ct"]["hits"] == 2


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="expected one of vg, roc, rc, mia"):
        score_task("segmentation", [])
