"""What is reached without looking at the image."""

import time

import numpy as np
from prediction_rows import row

from clinkd.data.boxes import format_box, iou
from clinkd.data.phantoms import PhantomSpec, draw
from clinkd.data.records import MODALITIES
from clinkd.evaluate.baselines import (
    baselines,
    constant_box,
    constant_box_recall,
    frequent_answer,
    frequent_answer_recall,
)  # fmt: skip


def test_the_constant_box_finds_where_all_targets_lie():
    rng = np.random.default_rng(0)
    shifts = rng.integers(-8, 9, (60, 2))
    train = [row(format_box((413 + x, 207 + y, 601 + x, 388 + y)), "ignored") for x, y in shifts]
    box = constant_box(train)
    assert iou(box, (413, 207, 601, 388)) > 0.8
    result = constant_box_recall(train, [row(format_box((413, 207, 601, 388)), "also ignored")])
    assert result == {"recall_at_50": 1 / (1 + 1e-8) / 8, "box": list(box)}


def test_a_crowded_modality_does_not_outvote_the_others():
    crowd = [row(format_box((0, 0, 200, 200)), "") for _ in range(50)]
    others = [row(format_box((600, 600, 900, 900)), "", name) for name in MODALITIES[1:4]]
    assert iou(constant_box(crowd + others), (600, 600, 900, 900)) > 0.5


def test_the_found_box_is_as_good_as_any_on_its_grid():
    rng = np.random.default_rng(3)
    drawn = rng.integers((0, 0, 200, 200), (500, 500, 500, 500), (40, 4))
    targets = [(x, y, x + w, y + h) for x, y, w, h in drawn]
    train = [row(format_box(t), "") for t in targets]
    found = sum(iou(constant_box(train, step=200), t) > 0.5 for t in targets)
    edges = range(0, 1001, 200)
    grid = [(a, b, c, d) for a in edges for b in edges for c in edges for d in edges if a < c and b < d]
    assert found >= max(sum(iou(box, t) > 0.5 for t in targets) for box in grid)


def test_the_most_frequent_answer_is_taken_from_training_rows():
    train = [row("Liver", ""), row("Spleen", ""), row("Liver", ""), row("Spleen", ""), row("Heart", "")]
    assert frequent_answer(train) == "Liver"  # of two as frequent, the first by alphabet
    result = frequent_answer_recall(train, [row("liver", "never read"), row("Heart", "")])
    assert result == {"recall": 1 / (2 + 1e-8) / 8, "answer": "Liver"}


def test_rows_that_cannot_be_used_are_left_alone():
    bad = [{}, row(3, ""), row("", "", image="q.png")]
    bad += [row("<box>bad</box>", ""), row("<box>(9,9),(1,1)</box>", "")]
    assert constant_box(bad) is None
    assert constant_box_recall(bad, bad[:2]) == {"recall_at_50": 0.0, "box": None}
    assert baselines([], [], [], []) == {"vg": 0.0, "roc": 0.0, "vg_box": None, "roc_answer": None}


def test_phantoms_give_little_to_either_and_the_search_is_quick():
    parts = []
    for indices in (range(120), range(1000, 1040)):
        turns = [(draw(PhantomSpec(0, size=48), i)[1], i) for i in indices]
        parts += [
            [row(t.answer, "", image=r.image, id=i) for r, i in turns for t in r.turns if t.task == task]
            for task in ("vg", "roc")
        ]
    start = time.perf_counter()
    result = baselines(parts[0], parts[2], parts[1], parts[3])
    assert time.perf_counter() - start < 10
    assert 0 < result["vg"] < 0.25
    assert 0 < result["roc"] < 0.25
