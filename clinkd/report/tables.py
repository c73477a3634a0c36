"""The report's numbers: eval.json and predictions turned into rows a template can print.

Decisions:
- Values are fractions inside and percent on the page, CIDEr apart (it runs to 10 and is printed as it is).
- A column shows one metric for all its rows: the published one when it was measured, else the next best, by
  name.
- A task without an interval in the honest part is judged by its value alone, and the report says so.
- Everything may be missing. What is missing becomes None here and a sentence on the page.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clinkd.data.boxes import from_qwen, iou, parse_boxes
from clinkd.data.records import MODALITIES, TASK_NAMES, TASKS, Box
from clinkd.data.templates import size_word

METRIC_NAMES = {
    "recall_at_50": "Recall@0.5",
    "recall": "recall",
    "spice": "SPICE",
    "mbmr": "mBMR",
    "meteor": "METEOR",
    "rouge_l": "ROUGE-L",
    "cider": "CIDEr",
    "bleu_1": "BLEU-1",
    "bleu_2": "BLEU-2",
    "bleu_3": "BLEU-3",
    "bleu_4": "BLEU-4",
}
# The metric of the published table first, then what stands in for it.
HEADLINES = {
    "vg": ("recall_at_50",), "roc": ("recall",),
    "rc": ("spice", "rouge_l", "bleu_4"), "mia": ("mbmr", "rouge_l", "bleu_4"),
}  # fmt: skip
# BiRD on the 30k test of Med-GRIT-270k: the real data set's numbers.
PUBLISHED = {"vg": 0.5392, "roc": 0.6533, "rc": 0.5523, "mia": 0.5217}
TEXT_METRICS = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l", "cider", "spice", "mbmr")
MBMR_PARTS = ("bleu_1", "bleu_2", "bleu_3", "bleu_4", "meteor", "rouge_l")
SIZES = ("small", "medium", "large")
_BARE = re.compile(r"\((\d+),(\d+)\),\((\d+),(\d+)\)")
_END = re.compile(r"<\|(?:im_end|endoftext)\|>")


@dataclass(frozen=True)
class Interval:
    low: float
    high: float
    point: float | None = None  # the honest part's own estimate, which need not be the published mean


def number(value: object) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if math.isfinite(value) else None


def mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def answer_text(value: object) -> str:
    """A response as text: a string or the official files' one-element list; end tokens removed."""
    if isinstance(value, (list, tuple)):
        value = value[0] if value else ""
    return _END.sub("", "" if value is None else str(value)).strip()


def answer_boxes(text: str) -> list[Box]:
    """Boxes as the published protocol finds them: ``<box>`` spans, or else bare ``(x1,y1),(x2,y2)``."""
    text = from_qwen(text)
    if "<box>" not in text:
        text = _BARE.sub(r"<box>(\1,\2),(\3,\4)</box>", text)
    return parse_boxes(text, strict=False)


def metric_value(scores: Mapping[str, Any], metric: str) -> float | None:
    """A metric of a mean or a modality; mBMR is formed from its six parts where it is not given."""
    value = number(scores.get(metric))
    if value is None and metric == "mbmr":
        parts = [number(scores.get(part)) for part in MBMR_PARTS]
        value = None if None in parts else math.fsum(part for part in parts if part is not None) / len(parts)
    return value


def task_mean(part: Mapping[str, Any], metric: str) -> float | None:
    value = metric_value(mapping(part.get("mean")), metric)
    return number(part.get(metric)) if value is None else value  # spice stands beside the mean


def headline(task: str, part: Mapping[str, Any]) -> str:
    """The metric a task is shown by: the first of its list that was measured."""
    return next(
        (metric for metric in HEADLINES[task] if task_mean(part, metric) is not None), HEADLINES[task][0]
    )


def find_interval(honest: Mapping[str, Any], metric: str) -> Interval | None:
    """The 95% interval of a metric in the honest part: of the published mean where it has one."""
    return _as_interval(honest.get(f"{metric}_published")) or _as_interval(honest.get(metric))


def _as_interval(value: object) -> Interval | None:
    """Of {value, low, high}."""
    found = mapping(value)
    low, high = number(found.get("low")), number(found.get("high"))
    return None if low is None or high is None else Interval(low, high, number(found.get("value")))


def why_missing(task: str, part: Mapping[str, Any], metric: str) -> str:
    """The reason eval.json gives for a metric that is not there, or that it gives none."""
    keys = ("text_reason", f"{metric}_reason", "meteor_reason", "spice_reason")
    given = next((str(part[key]) for key in keys if part.get(key)), "")
    return given or f"The evaluation holds no {METRIC_NAMES[metric]} for {TASK_NAMES[task]}."


def summary_cards(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """One card a task: the value, the baseline, the difference, the interval and what follows from them."""
    baselines = mapping(evaluation.get("baselines"))
    cards = []
    for task in TASKS:
        part = mapping(evaluation.get(task))
        metric = headline(task, part)
        value, baseline = task_mean(part, metric), number(baselines.get(task))
        interval = find_interval(mapping(part.get("honest")), metric)
        gain = None if value is None or baseline is None else value - baseline
        cards.append(
            {
                "task": task,
                "name": TASK_NAMES[task],
                "metric": METRIC_NAMES[metric],
                "value": value,
                "baseline": baseline,
                "gain": gain,
                "interval": interval,
                "verdict": verdict(value, baseline, interval),
                "has_baseline": task in ("vg", "roc"),
                "missing": why_missing(task, part, metric) if value is None else "",
            }
        )
    return cards


def verdict(value: float | None, baseline: float | None, interval: Interval | None) -> str:
    """better, worse, unclear with an interval; above, below, level without; unknown if a side is missing."""
    if value is None or baseline is None:
        return "unknown"
    if interval is None:
        return "above" if value > baseline else "below" if value < baseline else "level"
    if interval.low > baseline and value > baseline:
        return "better"
    return "worse" if interval.high < baseline and value < baseline else "unclear"


def overall(cards: Sequence[Mapping[str, Any]]) -> str:
    """One word for VG and ROC together: both, one, none, unclear or unknown."""
    found = [card["verdict"] for card in cards if card["has_baseline"]]
    if "unknown" in found:
        return "unknown"
    good = sum(item in ("better", "above") for item in found)
    if good == len(found):
        return "both"
    return "one" if good else "unclear" if "unclear" in found or "level" in found else "none"


def task_table(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Modalities down, tasks across, then the mean, the baselines and the published row."""
    columns, means, baselines, published = [], [], [], []
    cells: dict[str, list[dict[str, Any]]] = {modality: [] for modality in MODALITIES}
    for task in TASKS:
        part = mapping(evaluation.get(task))
        metric = headline(task, part)
        columns.append({"task": task, "name": TASK_NAMES[task], "metric": METRIC_NAMES[metric]})
        means.append(task_mean(part, metric))
        baselines.append(number(mapping(evaluation.get("baselines")).get(task)))
        published.append({"value": PUBLISHED[task], "metric": METRIC_NAMES[HEADLINES[task][0]]})
        scores = mapping(part.get("modalities"))
        for modality in MODALITIES:
            cells[modality].append(_cell(mapping(scores.get(modality)), metric))
    return {
        "columns": columns,
        "cells": cells,
        "means": means,
        "baselines": baselines,
        "published": published,
    }


def _cell(scores: Mapping[str, Any], metric: str) -> dict[str, Any]:
    rows = next((n for key in ("targets", "rows") if (n := number(scores.get(key))) is not None), None)
    empty = not scores or rows == 0
    return {
        "value": None if empty else metric_value(scores, metric),
        "rows": None if rows is None else int(rows),
    }


def text_table(task: str, part: Mapping[str, Any]) -> dict[str, Any] | None:
    """All text metrics of RC or MIA, a row a modality and the mean; None when none was measured.

    SPICE belongs to RC alone and mBMR to MIA alone, as published.
    """
    scores = {modality: mapping(mapping(part.get("modalities")).get(modality)) for modality in MODALITIES}
    metrics = [metric for metric in TEXT_METRICS if metric != ("mbmr" if task == "rc" else "spice")]
    shown = [
        m
        for m in metrics
        if task_mean(part, m) is not None or any(number(row.get(m)) is not None for row in scores.values())
    ]
    if not shown:
        return None
    rows = [
        (modality, [metric_value(scores[modality], metric) for metric in shown]) for modality in MODALITIES
    ]
    rows.append(("mean", [task_mean(part, metric) for metric in shown]))
    return {"metrics": [(metric, METRIC_NAMES[metric]) for metric in shown], "rows": rows}


def honest_rows(honest: Mapping[str, Any]) -> list[tuple[str, float, Interval | None]]:
    """The honest numbers that were measured as (name, value, interval)."""
    rows = []
    for key, found in honest.items():
        value = number(mapping(found).get("value"))
        if value is not None:
            rows.append((str(key).replace("_", " "), value, _as_interval(found)))
    return rows[:80]


def skipped_rows(evaluation: Mapping[str, Any]) -> list[tuple[str, str, int]]:
    """(task, reason, rows) of every row that was not scored."""
    found = []
    for task in TASKS:
        for reason, rows in mapping(mapping(evaluation.get(task)).get("skipped")).items():
            if number(rows):
                found.append((task, str(reason), int(rows)))
    return found


def recall_by_size(predictions: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """VG Recall@0.5 by the true box's share of the image: small (under 5%), medium, large (over 10%)."""
    hits, targets = Counter[str](), Counter[str]()
    for row in predictions:
        if row.get("task") != "vg":
            continue
        answers = answer_boxes(answer_text(row.get("response")))
        for truth in parse_boxes(str(row.get("annotation", "")), strict=False):
            targets[size_word(truth)] += 1
            hits[size_word(truth)] += any(iou(truth, answer) > 0.5 for answer in answers)
    return [
        {"size": size, "targets": targets[size], "hits": hits[size], "value": hits[size] / targets[size]}
        for size in SIZES
        if targets[size]
    ]


def roc_hit(annotation: str, response: str) -> bool:
    """The published rule: each space-separated token of the truth is part of the answer, in lower case."""
    return all(token in response.lower() for token in annotation.lower().split(" "))


def confusions(predictions: Iterable[Mapping[str, Any]], most: int = 12) -> list[dict[str, Any]]:
    """The most frequent wrong ROC answers: truth, answer, times, asked, and if just the side is wrong."""
    wrong: Counter[tuple[str, str]] = Counter()
    asked: defaultdict[str, int] = defaultdict(int)
    for row in predictions:
        if row.get("task") != "roc":
            continue
        truth, answer = str(row.get("annotation", "")).strip(), answer_text(row.get("response"))
        asked[truth.lower()] += 1
        if not roc_hit(truth, answer):
            wrong[truth.lower(), answer.lower()[:60]] += 1
    ordered = sorted(wrong.items(), key=lambda item: (-item[1], item[0]))[:most]
    return [
        {
            "truth": truth,
            "answer": answer,
            "times": times,
            "asked": asked[truth],
            "side": _other_side(truth) == answer.rstrip("."),
        }
        for (truth, answer), times in ordered
    ]


def _other_side(name: str) -> str | None:
    swapped = re.sub(r"\b(left|right)\b", lambda match: "right" if match[0] == "left" else "left", name)
    return swapped if swapped != name else None
