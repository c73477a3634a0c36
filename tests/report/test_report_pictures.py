"""Overlays, charts and the choice of samples."""

from __future__ import annotations

import base64
import io
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image
from report_samples import SPEC

from clinkd.data.phantoms import draw
from clinkd.report import gallery, plots
from clinkd.report.overlays import SIDE, STYLES, Budget, ImageError, Mark, overlay


def opened(uri: str) -> Image.Image:
    assert uri.startswith("data:image/jpeg;base64,")
    return Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1])))


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "TIFF" if image.mode in ("I", "F") else "PNG")
    return buffer.getvalue()


def test_a_phantom_is_enlarged_and_its_box_drawn_where_it_lies():
    png, _ = draw(SPEC, 0)
    picture = opened(overlay(png, [Mark((250, 500, 750, 900), "truth")]))
    assert picture.size == (SIDE, SIDE)
    pixel = np.array(picture.getpixel((SIDE // 2, SIDE // 2)), int)
    assert np.abs(pixel - STYLES["truth"][0]).max() < 60  # JPEG is not exact
    inside = np.array(picture.getpixel((SIDE // 2, round(0.7 * SIDE))), int)
    assert np.abs(inside - STYLES["truth"][0]).max() > 60


def test_a_perfect_answer_does_not_hide_the_truth():
    png, _ = draw(SPEC, 0)
    box = (200, 200, 800, 800)
    picture = opened(overlay(png, [Mark(box, "truth"), Mark(box, "answer")]))
    edge = np.asarray(picture, int)[round(0.2 * SIDE), round(0.25 * SIDE) : round(0.75 * SIDE)]
    for kind in ("truth", "answer"):
        assert (np.abs(edge - STYLES[kind][0]).max(axis=1) < 70).sum() > 20


@pytest.mark.parametrize(
    "box", [(0, 0, 1000, 1000), (0, 0, 1, 1), (999, 999, 1000, 1000), (0, 400, 1000, 401)]
)
@pytest.mark.parametrize("kind", list(STYLES))
def test_boxes_at_the_edges_can_be_drawn(box, kind):
    png, _ = draw(SPEC, 1)
    assert opened(overlay(png, [Mark(box, kind, "a word")])).size == (SIDE, SIDE)


@pytest.mark.parametrize(
    "image",
    [
        Image.new("L", (1, 1)),
        Image.new("RGBA", (3, 2000)),
        Image.new("P", (900, 700)),
        Image.fromarray(np.arange(4000, dtype=np.uint16).reshape(50, 80)),
        Image.fromarray(np.full((8, 8), 7, np.int32)),
        Image.fromarray(np.array([[0.0, np.nan], [np.inf, 1.0]], np.float32)),
    ],
)
def test_every_mode_and_size_of_image_becomes_a_picture_of_the_pages_size(image):
    assert (
        max(opened(overlay(encoded(image), [Mark((10, 10, 900, 900), "answer", "answer 0.50")])).size) <= SIDE
    )


def test_sixteen_bit_grey_keeps_its_contrast():
    ramp = Image.fromarray(np.tile(np.linspace(1000, 40000, 64).astype(np.uint16), (64, 1)))
    grey = np.asarray(opened(overlay(encoded(ramp), [])).convert("L"))
    assert grey.min() < 20
    assert grey.max() > 235


@pytest.mark.parametrize("data", [b"", b"no image", draw(SPEC, 0)[0][:200]])
def test_what_is_no_image_is_an_image_error(data):
    with pytest.raises(ImageError):
        overlay(data, [])


def test_a_spent_budget_refuses_and_counts():
    png, _ = draw(SPEC, 0)
    budget = Budget(len(overlay(png, [])) + 10)
    assert budget.embed(png, [])
    assert budget.embed(png, []) is None
    assert budget.refused == 1


def row(task: str, image: str, truth: str, response: str, sample: str = "s#0") -> dict:
    return {"task": task, "image": image, "annotation": truth, "response": response, "sample": sample}


def test_worst_comes_first_and_a_few_of_the_best_are_kept():
    truth = "<box>(0,0),(100,100)</box>"
    rows = [row("vg", "ct_1.png", truth, f"<box>(0,0),(100,{5 * i})</box>", f"s{i}#0") for i in range(1, 21)]
    cards = gallery.choose(rows)
    assert [round(card.score, 2) for card in cards] == [0.05, 0.1, 0.15, 0.2, 0.95, 1.0]
    assert [card.good for card in cards] == [False] * 4 + [True] * 2


def test_every_modality_has_its_worst_before_any_has_its_second():
    rows = [
        row("roc", f"{m}_{i}.png", "Liver", "Spleen", f"{m}{i}")
        for m in ("mr", "ct", "alien")
        for i in range(3)
    ]
    assert [card.modality for card in gallery.choose(rows)] == ["ct", "mr", "alien"] * 3


def test_rows_that_cannot_be_judged_are_not_shown():
    assert (
        gallery.choose([row("vg", "ct_1.png", "no box", "x"), row("other", "ct_1.png", "a", "a"), {}]) == []
    )


def test_the_choice_does_not_depend_on_the_order_of_rows():
    rows = [row("roc", "ct_1.png", "Liver", "Spleen", f"s{i}") for i in range(30)]
    assert gallery.choose(rows) == gallery.choose(rows[::-1])


def test_a_missing_and_a_broken_image_leave_their_texts_and_a_sentence():
    cards = gallery.choose(
        [row("roc", "ct_1.png", "Liver", "Liver"), row("roc", "ct_2.png", "Liver", "Spleen")]
    )
    shown = gallery.pictured(cards, {"ct_2.png": b"broken"}, Budget(10_000))["ct"]
    assert [card.problem for card in shown] == [
        "The image cannot be read.",
        "The image was not found in the run's data.",
    ]
    assert shown[0].answer == "Spleen"


def test_a_vetoed_candidate_is_never_marked_as_chosen():
    same = [{"text": "The liver", "score": 0.4, "veto": "side"}, {"text": "The liver", "score": 0.9}]
    feedback = {"task": "roc", "chosen": "The liver", "source": "candidate", "candidates": np.array(same)}
    (made,) = gallery.corrections([feedback], {}, Budget(0))
    assert [(item["score"], item["chosen"]) for item in made.candidates] == [(0.9, True), (0.4, False)]


def test_reflection_is_counted_by_round_and_reason():
    rows = [
        {"reason": "iou", "source": "candidate"},
        {"reason": "iou", "source": "truth", "round": 1},
        {"reason": "no_box", "source": "truth", "round": 2},
    ]
    first, second = gallery.reflection_rounds(rows)
    assert first["reasons"] == [{"reason": "iou", "rows": 2, "candidate": 1, "truth": 1}]
    assert (second["round"], second["rows"]) == (2, 1)


def test_curves_keep_stages_apart_and_the_last_word_on_a_step():
    rows = [
        {"stage": "teacher", "step": 2, "loss": 3.0},
        {"stage": "teacher", "step": 1, "loss": 4.0},
        {"stage": "teacher", "step": 2, "loss": 2.5},
        {"stage": "reflect", "round": 2, "step": 1, "loss": float("nan")},
        {"stage": "reflect", "round": 2, "step": 2, "loss": 1},
        {"stage": "reflect", "round": 2, "event": "judged"},
        {"stage": "teacher", "step": None, "loss": 1.0},
    ]
    teacher, reflect = plots.curves(rows, "loss")
    assert (teacher.label, teacher.steps.tolist(), teacher.values.tolist()) == ("teacher", [1, 2], [4.0, 2.5])
    assert (reflect.label, reflect.steps.tolist(), reflect.dropped) == ("reflect, round 2", [2], 1)


def test_the_running_mean_is_centred():
    assert plots.running_mean(np.array([0.0, 3.0, 6.0, 3.0]), 3).tolist() == [1.5, 3.0, 4.0, 4.5]
    assert plots.running_mean(np.array([5.0]), 1).tolist() == [5.0]


def test_charts_follow_the_pages_colours_and_are_the_same_each_time():
    line = plots.Curve("<$x_1$ & co>", np.arange(5000), np.linspace(3, 1, 5000))
    svg = plots.chart("one", [line, line], "loss")
    assert svg == plots.chart("one", [line, line], "loss")
    assert "currentColor" in svg
    assert "var(--s1)" in svg
    assert plots.INK not in svg
    assert "http" not in svg
    assert "&lt;$x_1$ &amp; co&gt;" in svg  # as text: neither markup nor mathematics
    assert len(svg) < 60_000
    ids = [value for key, value in _attributes(svg) if key == "id"]
    assert ids
    assert all(value.startswith("one-") for value in ids)


@pytest.mark.parametrize(
    ("last", "ticks"), [(0.1, {"0.2", "0.5", "2", "5"}), (4.0, {"4", "6", "8"}), (-1.0, {"0"})]
)
def test_what_falls_far_is_on_a_logarithmic_axis(last: float, ticks: set[str]):
    values = np.concatenate([np.linspace(9, last, 50), np.full(950, last)])
    line = plots.Curve("teacher", np.arange(1000), values)
    svg = plots.chart("one", [line], "loss")
    said = set(re.findall(r">\s*(-?[\d.]+)\s*</text>", svg))
    assert ticks <= said, said
    assert ("0.2" in said) == (last == 0.1)


def _attributes(svg: str) -> list[tuple[str, str]]:
    root = ElementTree.fromstring(svg.replace("xlink:href", "href"))
    return [pair for element in root.iter() for pair in element.attrib.items()]
