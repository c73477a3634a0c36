"""The honest numbers: what the published ones forgive is not forgiven here."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prediction_rows import row

from clinkd.data.boxes import format_box, iou
from clinkd.data.records import MODALITIES
from clinkd.evaluate.bootstrap import resample
from clinkd.evaluate.grounding import boxes, honest, iou_matrix, matched
from clinkd.evaluate.language import laterality_error, negated, negation_error, whole_words
from clinkd.evaluate.protocol import collect

A, B, FAR = format_box((0, 0, 100, 100)), format_box((5, 5, 105, 105)), format_box((800, 800, 900, 900))


def vg(*rows):
    return honest("vg", collect("vg", rows))


def test_one_box_cannot_hit_two_targets():
    result = vg(row(A + B, A))
    assert result["recall_at_50"]["value"] == 0.5
    assert result["recall_at_50_published"]["value"] == pytest.approx(1 / 8)  # the published measure lets it
    assert result["f1_one_to_one"]["value"] == pytest.approx(2 / 3)


def test_needless_boxes_cost_f1_and_not_recall():
    result = vg(row(A, A + FAR + FAR))
    assert result["recall_at_50"]["value"] == 1
    assert result["f1_one_to_one"]["value"] == pytest.approx(2 / (1 + 3))


def test_the_matching_is_the_best_one_and_not_the_first():
    # The first prediction overlaps both targets; taking it for the better one would lose a match.
    overlap = np.array([[0.6, 0.55], [0.58, 0.0]])
    total, above = matched(overlap)
    assert total == pytest.approx(0.55 + 0.58)
    assert above == [2, 2, 0]


def test_thresholds_are_strict_and_ordered():
    result = vg(row(A, format_box((0, 0, 100, 50))))  # IoU exactly 0.5
    assert [result[f"recall_at_{t}"]["value"] for t in (25, 50, 75)] == [1, 0, 0]
    assert result["iou_mean"]["value"] == pytest.approx(0.5)


def test_an_answer_without_a_box_is_counted_as_such():
    result = vg(row(A, "I see nothing."), row(A, "<box>bad</box>"), row(A, A), row(A, "(0,0),(100,100)"))
    assert result["no_box_rate"]["value"] == 0.25
    assert result["no_box_rate"]["count"] == 1


def test_nothing_measured_is_null_and_not_zero():
    for result in (vg(), honest("roc", collect("roc", [])), honest("rc", collect("rc", []))):
        assert all(found["value"] is None and found["low"] is None for found in result.values())


corners = st.tuples(*[st.integers(0, 40)] * 4)


@settings(deadline=None)
@given(st.lists(corners, max_size=4), st.lists(corners, max_size=4))
def test_the_iou_matrix_agrees_with_the_plain_function_on_boxes_with_area(targets, predictions):
    sound = [[b for b in group if b[0] < b[2] and b[1] < b[3]] for group in (targets, predictions)]
    arrays = [boxes([",".join(map(str, b)) for b in group]) for group in sound]
    overlap = iou_matrix(*arrays)
    assert overlap.shape == (len(sound[0]), len(sound[1]))
    expected = [[iou(a, b) for b in sound[1]] for a in sound[0]]
    assert np.allclose(overlap, np.array(expected).reshape(overlap.shape), atol=1e-12)


def test_broken_spans_overlap_nothing():
    arrays = boxes(["0,0,9,9"]), boxes(["bad", "1,2", "nan,0,9,9", "9,9,0,0", "inf,inf,inf,inf", "0,0,9,9"])
    assert iou_matrix(*arrays)[0].tolist() == [0, 0, 0, 0, 0, 1]


@pytest.mark.parametrize(
    ("annotation", "response", "hit"),
    [
        ("rib", "cribriform plate", False),
        ("Sacrum.", "the sacrum", True),
        ("end", "nothing<|im_end|>", False),
        ("a", "brain tumor", False),
        ("left kidney", "Kidney, left", True),
        ("", "anything", None),
    ],
)
def test_whole_words_are_asked_for(annotation, response, hit):
    assert whole_words(annotation, response) is hit


@pytest.mark.parametrize(
    ("annotation", "response", "error"),
    [
        ("Left kidney", "Right kidney", True),
        ("Left kidney", "left kidney.", False),
        ("Left kidney", "kidney", False),  # incomplete, yet on no wrong side
        ("Left kidney", "liver", False),
        ("The lesion is on the left.", "The lesion is on the right.", True),
        ("A left-sided effusion", "A right-sided effusion", True),
        ("the left kidney and the right lung", "the right kidney and the right lung", True),
        ("the left kidney and the right lung", "the left kidney and the right lung", False),
        ("the left kidney and the right kidney", "the left kidney", None),
        ("the liver", "the right lung", None),
        ("shown, from left to right, the liver and the heart", "shown, from right to left", None),
        ("a cyst in the upper left of the image", "a cyst in the upper right of the image", None),
        (A, "right", None),
    ],
)
def test_left_and_right_are_told_apart(annotation, response, error):
    assert laterality_error(annotation, response) is error


@pytest.mark.parametrize(
    ("annotation", "response", "error"),
    [
        ("No pneumothorax.", "There is a pneumothorax.", True),
        ("No pneumothorax.", "The lungs are free of pneumothorax.", False),
        ("A mass.", "There isn't a mass.", True),
        ("A nodule.", "A node.", False),
        ("A mass.", "", None),
    ],
)
def test_a_finding_affirmed_or_denied(annotation, response, error):
    assert negation_error(annotation, response) is error


def test_words_that_only_look_negative_are_not():
    assert not negated("The nose, the notch and another node are not only normal")


def test_intervals_hold_the_value_and_come_out_the_same_again():
    rng = np.random.default_rng(1)
    rows = [
        row(A, A if rng.random() < 0.6 else FAR, MODALITIES[i % 8], image=f"{MODALITIES[i % 8]}_{i // 2}.png")
        for i in range(400)
    ]
    first, again = vg(*rows), vg(*rows)
    assert first == again
    for name in ("recall_at_50", "recall_at_50_published", "iou_mean"):
        found = first[name]
        assert found["low"] < found["value"] < found["high"]
        assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * (0.24 / 400) ** 0.5, rel=0.35)


def test_images_are_drawn_and_not_rows():
    hits = [1.0, 0.0] * 20

    def width(images):
        sums = resample({"hit": hits, "one": [1.0] * 40}, images, ["ct"] * 40)
        found = sums.pooled("hit", "one").estimate()
        return found.high - found.low

    apart = width([f"ct_{i}" for i in range(40)])
    together = width([f"ct_{i % 2}_{i // 20}" for i in range(40)])  # four images, all hit or all missed
    assert together > 2 * apart


def test_one_image_gives_no_interval():
    found = vg(row(A, A), row(A, FAR))["recall_at_50"]
    assert (found["value"], found["low"], found["high"]) == (0.5, None, None)
