"""The published evaluation (BiRD's and ClinKD's scripts): clean-up of responses, Recall@0.5 and ROC recall.

Decisions:
- Quirks are kept: one prediction may hit several targets, extra boxes are free, substrings count, 1e-8 stands
  in every denominator, the macro mean divides by eight whatever is there. The honest numbers are in
  `grounding`.
- Where the scripts end in an exception, the row is left out and counted under a stable reason; the numbers on
  the rows that remain are the scripts' own. An annotation with a broken box stops them only when there is a
  prediction to compare with; without one its targets are missed, and so they are here.
- A row without a target box leaves the denominator and is counted too (``no_target``).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from clinkd.data.records import MODALITIES, modality_of

EPSILON = 1e-8
_TAGGED = re.compile(r"<box>(.*?)</box>")  # a newline inside a span hides it: the dot does not match one
_BARE = re.compile(r"\(\d+,\d+\),\(\d+,\d+\)")
_STOP = ".<|im_end|>"


class RowError(ValueError):
    """A prediction row that cannot be scored; ``reason`` is the key it is counted under."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Row:
    """One prediction: ``response`` cleaned up, ``annotation`` as it came."""

    id: Any
    image: str
    annotation: str
    response: str

    @property
    def modality(self) -> str:
        return modality_of(self.image)


@dataclass(frozen=True)
class Scored:
    """Rows that were scored, in order; how many were read; those left out, by reason."""

    rows: list[Row]
    counts: list[tuple[int, int]]  # (hits, denominator) of each row
    read: int
    skipped: dict[str, int]


def clean_response(text: str) -> str:
    """A raw answer as the scripts read it: end tokens cut, of three lines or more the second, stripped."""
    if _STOP in text:
        text = text.split(_STOP, 1)[0] + "."
    text = text.replace("<|im_end|>\n", "")
    if text.count("\n") >= 2:
        text = text.split("\n", 2)[1]
    return text.replace("<|endoftext|>", "").strip()


def read_row(raw: object, task: str | None = None) -> Row:
    """A raw prediction (``image``, ``annotation``, ``response`` as text or as a list of one text) as a `Row`.

    Raises:
        RowError: ``not_an_object``, ``other_task`` (the row names another than ``task``), ``image_not_text``,
            ``annotation_not_text`` or ``response_not_text``.
    """
    if not isinstance(raw, Mapping):
        raise RowError("not_an_object")
    if task is not None and raw.get("task") not in (None, task):
        raise RowError("other_task")
    response = raw.get("response")
    if isinstance(response, list) and len(response) == 1:
        response = response[0]
    for name, value in (
        ("image", raw.get("image")),
        ("annotation", raw.get("annotation")),
        ("response", response),
    ):
        if not isinstance(value, str):
            raise RowError(f"{name}_not_text")
    return Row(raw.get("id"), raw["image"], raw["annotation"], clean_response(str(response)))


def target_spans(annotation: str) -> list[str]:
    return _TAGGED.findall(annotation)


def predicted_spans(response: str) -> list[str]:
    """Insides of the ``<box>`` spans; without any, bare ``(int,int),(int,int)`` written without spaces."""
    return _TAGGED.findall(response) or _BARE.findall(response)


def numbers(span: str) -> list[float]:
    """The comma-separated numbers of a span, brackets dropped; whatever ``float`` reads is a number.

    Raises:
        ValueError: a part is no number.
    """
    return [float(part) for part in span.replace("(", "").replace(")", "").split(",")]


def iou_of_spans(target: list[float], span: str) -> float:
    """IoU of a target and a predicted span; 0 where the scripts catch an exception or divide 0 by 0."""
    try:
        box = numbers(span)
    except ValueError:
        return 0.0
    if len(target) != 4 or len(box) != 4:
        return 0.0
    area, box_area = ((b[2] - b[0]) * (b[3] - b[1]) for b in (target, box))
    width = max(min(target[2], box[2]) - max(target[0], box[0]), 0.0)
    height = max(min(target[3], box[3]) - max(target[1], box[1]), 0.0)
    union = area + box_area - width * height
    # A nan in any corner makes an area nan, so comparing the quotient is enough.
    return width * height / union if union else 0.0


def vg_counts(row: Row) -> tuple[int, int]:
    """(targets hit, targets) of one row, a hit being IoU > 0.5 with any prediction.

    Raises:
        RowError: ``no_target``, ``annotation_box_broken`` or ``unknown_modality``.
    """
    spans, predictions = target_spans(row.annotation), predicted_spans(row.response)
    if not spans:
        raise RowError("no_target")
    if row.modality not in MODALITIES:
        raise RowError("unknown_modality")
    if not predictions:
        return 0, len(spans)
    try:
        targets = [numbers(span) for span in spans]
    except ValueError:
        raise RowError("annotation_box_broken") from None
    hits = sum(any(iou_of_spans(target, span) > 0.5 for span in predictions) for target in targets)
    return hits, len(targets)


def roc_counts(row: Row) -> tuple[int, int]:
    """(1 or 0, 1): whether every space-separated token of the annotation occurs anywhere in the response.

    Raises:
        RowError: ``unknown_modality``.
    """
    if row.modality not in MODALITIES:
        raise RowError("unknown_modality")
    response = row.response.lower()
    return int(all(token in response for token in row.annotation.lower().split(" "))), 1


def text_counts(row: Row, seen: set[tuple[str, int]]) -> tuple[int, int]:
    """(0, 1) for a row that can be scored as a caption; ``seen`` takes up its modality and number.

    Raises:
        RowError: ``unknown_modality``, ``id_not_integer``, or ``duplicate_id`` within the modality.
    """
    if row.modality not in MODALITIES:
        raise RowError("unknown_modality")
    try:
        key = row.modality, int(row.id)
    except (TypeError, ValueError, OverflowError):
        raise RowError("id_not_integer") from None
    if key in seen:
        raise RowError("duplicate_id")
    seen.add(key)
    return 0, 1


def collect(task: str, raws: Iterable[object]) -> Scored:
    """Reads and counts the rows of a task; no row raises.

    Args:
        task: ``vg``, ``roc``, ``rc`` or ``mia``.
        raws: prediction rows; ``raws.bad_lines`` (see `score.read_predictions`), if there, counts as skipped.
    """
    seen: set[tuple[str, int]] = set()
    rows, counts, skipped = [], [], Counter(getattr(raws, "bad_lines", {}))
    read = skipped.total()
    for raw in raws:
        read += 1
        try:
            row = read_row(raw, task)
            if task == "vg":
                counts.append(vg_counts(row))
            else:
                counts.append(roc_counts(row) if task == "roc" else text_counts(row, seen))
            rows.append(row)
        except RowError as error:
            skipped[error.reason] += 1
    return Scored(rows, counts, read, dict(sorted(skipped.items())))


def recall(scored: Scored, key: str, denominator: str) -> dict[str, dict[str, Any]]:
    """Recall per modality, macro: ``{"modalities": {"ct": {key, "hits", denominator}}, "mean": {key}}``."""
    sums = {modality: [0, 0] for modality in MODALITIES}
    for row, (hits, total) in zip(scored.rows, scored.counts, strict=True):
        sums[row.modality][0] += hits
        sums[row.modality][1] += total
    modalities = {
        name: {key: hits / (total + EPSILON), "hits": hits, denominator: total}
        for name, (hits, total) in sums.items()
    }
    return {
        "modalities": modalities,
        "mean": {key: sum(m[key] for m in modalities.values()) / len(MODALITIES)},
    }


def score_vg(raws: Iterable[object]) -> dict[str, Any]:
    """Recall@0.5: ``{"modalities", "mean": {"recall_at_50"}, "rows" (read), "skipped": {reason: n}}``."""
    scored = collect("vg", raws)
    return {**recall(scored, "recall_at_50", "targets"), "rows": scored.read, "skipped": scored.skipped}


def score_roc(raws: Iterable[object]) -> dict[str, Any]:
    """ROC recall: ``{"modalities", "mean": {"recall"}, "rows" (read), "skipped": {reason: n}}``."""
    scored = collect("roc", raws)
    return {**recall(scored, "recall", "rows"), "rows": scored.read, "skipped": scored.skipped}
