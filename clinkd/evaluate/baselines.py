"""What a model that never looks at the image reaches: the best constant box and the most frequent answer.

Decisions:
- Both are fitted on the training rows given and measured on the test rows by the published protocol itself.
- The box is sought for the published measure, the macro mean, so each target weighs 1 / (targets of its
  modality): a coarse grid over all boxes first, then ever finer steps around the best.
- Overlap separates into x and y, so a grid of k intervals a side costs k matrix products, not k² box
  comparisons.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from clinkd.data.boxes import GRID, format_box
from clinkd.data.records import MODALITIES, Box
from clinkd.evaluate.grounding import boxes
from clinkd.evaluate.protocol import RowError, collect, read_row, score_roc, score_vg, target_spans

# Many boxes hit the same targets; the one that overlaps them best will hit most of the unseen.
_TIE = 1e-6
Rows = Iterable[Mapping[str, Any]]
"""Dicts with ``image`` and ``annotation``; a ``response`` is not looked at."""


def constant_box(train: Rows, *, step: int = 50, most: int = 3000, seed: int = 0) -> Box | None:
    """The box that hits most training targets (IoU > 0.5, macro over modalities); None without targets.

    Args:
        step: spacing of the first grid, on the 0-1000 grid.
        most: targets used in the search; more are thinned out at random.
    """
    targets, weights = _targets(train)
    if not len(targets):
        return None
    if len(targets) > most:
        keep = np.random.default_rng(seed).choice(len(targets), most, replace=False)
        targets, weights = targets[keep], weights[keep]
    edges = np.arange(0, GRID + 1, step)
    spans = np.array([(a, b) for a in edges for b in edges if a < b])
    box, score = _search(spans, spans, targets, weights)
    while step > 1:
        step = max(1, step // 3)
        around = [np.clip(corner + step * np.arange(-3, 4), 0, GRID) for corner in box]
        xs, ys = (np.array([(a, b) for a in around[i] for b in around[i + 2] if a < b]) for i in (0, 1))
        finer, finer_score = _search(xs, ys, targets, weights)
        if finer_score > score:
            box, score = finer, finer_score
    return box


def _targets(rows: Rows) -> tuple[np.ndarray, np.ndarray]:
    """[n, 4] target boxes with area and the weight of each, 1 / targets of its modality."""
    found: list[np.ndarray] = []
    kinds: list[str] = []
    for raw in rows:
        try:
            row = read_row({**raw, "response": ""})
        except RowError:
            continue
        spans = target_spans(row.annotation) if row.modality in MODALITIES else []
        found.extend(boxes(spans))
        kinds.extend([row.modality] * len(spans))
    if not found:
        return np.zeros((0, 4)), np.zeros(0)
    targets, names = np.array(found), np.array(kinds)
    with np.errstate(invalid="ignore"):
        good = np.isfinite(targets).all(axis=1) & (targets[:, :2] < targets[:, 2:]).all(axis=1)
    _, index, counts = np.unique(names, return_inverse=True, return_counts=True)
    return targets[good], (1.0 / counts[index])[good]


def _search(xs: np.ndarray, ys: np.ndarray, targets: np.ndarray, weights: np.ndarray) -> tuple[Box, float]:
    """Best of the boxes ``xs`` x ``ys`` ([k, 2] intervals each); of those that hit as much, by mean IoU."""
    wide, high = (
        (np.minimum(s[:, 1:], targets[:, i + 2]) - np.maximum(s[:, :1], targets[:, i]))
        .clip(min=0)
        .astype(np.float32)
        for s, i in ((xs, 0), (ys, 1))
    )  # [k, n] overlaps in x and in y
    areas = (targets[:, 2] - targets[:, 0]) * (targets[:, 3] - targets[:, 1])
    best, box = -1.0, (0, 0, 0, 0)
    for (left, right), overlap in zip(xs.tolist(), wide, strict=True):
        near = np.flatnonzero(overlap)
        inter = overlap[near] * high[:, near]
        ious = inter / (areas[near] + (right - left) * (ys[:, 1] - ys[:, 0])[:, None] - inter)
        scores = ((ious > 0.5) + _TIE * ious) @ weights[near]
        index = int(scores.argmax())
        if scores[index] > best:
            best, box = float(scores[index]), (int(left), int(ys[index, 0]), int(right), int(ys[index, 1]))
    return box, best


def constant_box_recall(train: Rows, test: Rows) -> dict[str, Any]:
    """``{"recall_at_50", "box"}``: the box fitted on ``train``, Recall@0.5 as published on ``test``."""
    box = constant_box(train)
    response = format_box(box) if box else ""
    score = score_vg({**row, "response": response} for row in test)["mean"]["recall_at_50"]
    return {"recall_at_50": score, "box": list(box) if box else None}


def frequent_answer(train: Rows) -> str | None:
    """The training annotation found most often, ties by alphabet; None without rows."""
    scored = collect("roc", ({**row, "response": ""} for row in train))
    counts = Counter(row.annotation for row in scored.rows)
    return min(counts, key=lambda answer: (-counts[answer], answer)) if counts else None


def frequent_answer_recall(train: Rows, test: Rows) -> dict[str, Any]:
    """``{"recall", "answer"}``: the answer fitted on ``train``, ROC recall as published on ``test``."""
    answer = frequent_answer(train)
    score = score_roc({**row, "response": answer or ""} for row in test)["mean"]["recall"]
    return {"recall": score, "answer": answer}


def baselines(vg_train: Rows, vg_test: Rows, roc_train: Rows, roc_test: Rows) -> dict[str, Any]:
    """The ``baselines`` part of ``eval.json``: ``{"vg", "roc", "vg_box", "roc_answer"}``."""
    box, answer = constant_box_recall(vg_train, vg_test), frequent_answer_recall(roc_train, roc_test)
    return {
        "vg": box["recall_at_50"], "roc": answer["recall"],
        "vg_box": box["box"], "roc_answer": answer["answer"],
    }  # fmt: skip
