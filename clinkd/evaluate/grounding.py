"""The honest numbers beside the published ones, each with a bootstrap 95% interval by image.

Decisions:
- Boxes are matched one to one (`scipy.optimize.linear_sum_assignment`), so a box is used once and needless
  boxes cost F1.
- They are pooled over all rows (a modality weighs as much as it has); the published macro number is repeated
  with its interval under its own name.
- The boxes are those the published protocol reads; a span that is no box counts as a prediction of overlap 0.
- A rate is null where nothing was there to measure, never 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from clinkd.data.records import MODALITIES
from clinkd.evaluate.bootstrap import DRAWS, SEED, Ratio, Resampled, resample
from clinkd.evaluate.language import laterality_error, negation_error, whole_words, words
from clinkd.evaluate.protocol import EPSILON, Row, Scored, numbers, predicted_spans, target_spans

THRESHOLDS = (0.25, 0.5, 0.75)
Honest = dict[str, Ratio]
RATES: dict[str, Callable[[str, str], bool | None]] = {
    "laterality_errors": laterality_error,
    "negation_errors": negation_error,
}
"""Faults that words tell, of every task: (annotation, response) -> whether it is there, None where it could
not be. Each becomes a rate with its interval in eval.json, in the report and in `clinkd compare`."""


def boxes(spans: Sequence[str]) -> np.ndarray:
    """[n, 4] corners; a span that is no box becomes a row of nan."""
    rows = np.full((len(spans), 4), np.nan)
    for index, span in enumerate(spans):
        try:
            values = numbers(span)
        except ValueError:
            continue
        if len(values) == 4:
            rows[index] = values
    return rows


def iou_matrix(targets: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """IoU of [n, 4] with [m, 4] corners as [n, m]; 0 for boxes that are broken, inverted or without area."""
    a, b = targets[:, None], predictions[None]
    with np.errstate(all="ignore"):
        size = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
        inter = size.clip(min=0).prod(axis=-1)
        areas = [(box[..., 2] - box[..., 0]) * (box[..., 3] - box[..., 1]) for box in (a, b)]
        overlap = inter / (areas[0] + areas[1] - inter)
    return np.where(np.isfinite(overlap) & (overlap > 0), overlap, 0.0)


def matched(overlap: np.ndarray) -> tuple[float, list[int]]:
    """(largest sum of IoU, most pairs above each of THRESHOLDS) over one-to-one matchings of [n, m]."""
    if not overlap.any():
        return 0.0, [0] * len(THRESHOLDS)
    if 1 in overlap.shape:
        best = float(overlap.max())
        return best, [int(best > threshold) for threshold in THRESHOLDS]
    pairs = linear_sum_assignment(overlap, maximize=True)
    above = [overlap > threshold for threshold in THRESHOLDS]
    return float(overlap[pairs].sum()), [int(a[linear_sum_assignment(a, maximize=True)].sum()) for a in above]


def honest(task: str, scored: Scored) -> dict[str, dict[str, float | None]]:
    """The honest numbers of a task as eval.json has them: each with its interval."""
    return {name: ratio.estimate().as_dict() for name, ratio in ratios(task, scored).items()}


def ratios(task: str, scored: Scored, draws: int = DRAWS, seed: int = SEED) -> Honest:
    """The honest numbers of a task with all their draws, which are of the same images for the same rows."""
    measure = {"vg": honest_vg, "roc": honest_roc}.get(task, honest_text)
    return measure(scored, draws, seed)


def honest_vg(scored: Scored, draws: int = DRAWS, seed: int = SEED) -> Honest:
    """IoU mean, Recall@{0.25, 0.5, 0.75} and F1 one to one, no-box rate, and what the words get wrong.

    ``iou_mean`` is over targets, an unmatched one counting 0; ``f1_one_to_one`` is
    2·matched/(targets + predictions) at IoU > 0.5.
    """
    names = ("iou", "at_25", "at_50", "at_75", "targets", "boxes", "no_box")
    columns: dict[str, list[float]] = {name: [] for name in names}
    for row in scored.rows:
        targets, predictions = boxes(target_spans(row.annotation)), boxes(predicted_spans(row.response))
        total, above = matched(iou_matrix(targets, predictions))
        found = (total, *above, len(targets), len(targets) + len(predictions), len(predictions) == 0)
        for name, value in zip(names, found, strict=True):
            columns[name].append(float(value))
    sums = _resample(scored, columns, draws, seed)
    return {
        "recall_at_50_published": _published(sums),
        "iou_mean": sums.pooled("iou", "targets"),
        **{f"recall_at_{at}": sums.pooled(f"at_{at}", "targets") for at in (25, 50, 75)},
        "f1_one_to_one": sums.pooled("at_50", "boxes", times=2),
        "no_box_rate": sums.pooled("no_box", "one"),
        **_language(sums),
    }


def honest_roc(scored: Scored, draws: int = DRAWS, seed: int = SEED) -> Honest:
    """The published recall with its interval, recall by whole words, rate of wordless answers, errors."""
    columns = _column_pair("whole", [whole_words(row.annotation, row.response) for row in scored.rows])
    columns["empty"] = [float(not words(row.response)) for row in scored.rows]
    sums = _resample(scored, columns, draws, seed)
    return {
        "recall_published": _published(sums),
        "recall_whole_word": sums.pooled("whole", "whole_of"),
        "empty_rate": sums.pooled("empty", "one"),
        **_language(sums),
    }


def honest_text(scored: Scored, draws: int = DRAWS, seed: int = SEED) -> Honest:
    """ROUGE-L over plain words (without Java, so not the published one), rate of empty answers, errors."""
    from pycocoevalcap.rouge.rouge import Rouge

    pairs = [(" ".join(words(row.annotation)), " ".join(words(row.response))) for row in scored.rows]
    # An empty text splits into one empty word, and two of them would be alike.
    rouge = [Rouge().calc_score([answer], [truth]) if truth and answer else 0.0 for truth, answer in pairs]
    columns = {"rouge": rouge, "empty": [float(not answer) for _, answer in pairs]}
    sums = _resample(scored, columns, draws, seed)
    return {
        "rouge_l_words": sums.pooled("rouge", "one"),
        "empty_rate": sums.pooled("empty", "one"),
        **_language(sums),
    }


def _published(sums: Resampled) -> Ratio:
    return sums.macro("hits", "of", len(MODALITIES), EPSILON)


def _language(sums: Resampled) -> Honest:
    return {name: sums.pooled(name, f"{name}_of") for name in RATES}


def _resample(scored: Scored, columns: dict[str, list[float]], draws: int, seed: int) -> Resampled:
    rows: list[Row] = scored.rows
    every: dict[str, Sequence[float]] = {
        **columns,
        "hits": [hits for hits, _ in scored.counts],
        "of": [total for _, total in scored.counts],
        "one": [1.0] * len(rows),
    }
    for name, fault in RATES.items():
        every |= _column_pair(name, [fault(row.annotation, row.response) for row in rows])
    return resample(every, [row.image for row in rows], [row.modality for row in rows], draws, seed)


def _column_pair(name: str, found: Sequence[bool | None]) -> dict[str, list[float]]:
    """A rate's numerator, and under ``<name>_of`` whether the row was there to measure."""
    return {name: [float(bool(f)) for f in found], f"{name}_of": [float(f is not None) for f in found]}
