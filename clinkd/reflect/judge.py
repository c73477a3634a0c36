"""Which answers need correction, and why: the verdict on every training sample of a reflection round.

Decisions:
- Boxes are judged like the published metric, IoU > 0.5 strictly for every target, but an answer with more
  boxes than there are targets loses score: what the metric lets pass should not be learnt.
- Similarity never acquits alone: an exact conflict of laterality, negation, number or named object convicts
  whatever the encoder says ("... contains the liver ..." and "... contains the spleen ..." come out 0.80
  alike).
- ROC is right when it has all the truth's words, as in the published metric but by whole words and in one
  spelling; similarity only lets other words for the same thing through.
- One reason per answer, the first of ``REASONS`` that holds; the numbers are there for the rest.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clinkd.data.boxes import from_qwen, iou, parse_boxes
from clinkd.data.records import TASKS
from clinkd.reflect.checks import (
    laterality_conflict,
    modality_conflict,
    named_overlap,
    negation_conflict,
    number_conflict,
    sides_of,
)
from clinkd.reflect.similarity import TextSimilarity
from clinkd.reflect.words import comparable, content_words

REASONS = (
    "empty", "repetition", "format", "no_box", "laterality", "negation", "number", "wrong_object",
    "low_iou", "low_similarity",
)  # fmt: skip
CONFLICTS = frozenset({"laterality", "negation", "number", "wrong_object"})

_ENDS = re.compile(r"(?:\s*<\|(?:im_end|endoftext)\|>)+\s*$")
_SPECIAL = re.compile(r"<\|[^|<>]*\|>|</?img>|�")
_SPAN = re.compile(r"<box>.*?</box>", re.S)
_BARE = re.compile(r"\(\s*\d+\s*,\s*\d+\s*\)\s*,\s*\(\s*\d+\s*,\s*\d+\s*\)")
_UNIT = re.compile(r"<box>.*?</box>|\w+", re.S)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the judge finds.

    Attributes:
        reason: one of ``REASONS``; None when nothing needs correction.
        iou: overlap with the truth's boxes in [0, 1] (see ``box_overlap``); None when the truth has none.
        similarity: of the texts without boxes, in [0, 1].
        score: see ``score``; halved on a conflict, so that the worst come first in a budget.
    """

    needs_correction: bool
    reason: str | None
    iou: float | None
    similarity: float | None
    score: float


def judge(
    samples: Sequence[Mapping[str, Any]],
    responses: Sequence[str],
    similarity: TextSimilarity,
    *,
    iou_threshold: float = 0.5,
    similarity_threshold: float = 0.75,
    names_threshold: float = 0.5,
    weight: float = 0.5,
) -> list[Verdict]:
    """Judges one response a sample.

    Args:
        samples: each with ``task``, ``question`` and ``answer`` (the truth).
        responses: what the model said, with ``<box>`` spans or Qwen2-VL's tokens.
        iou_threshold: the best overlap of every target must be above it (VG).
        similarity_threshold: the similarity must reach it (RC, MIA; ROC answers in other words).
        names_threshold: how far the organs and findings named must be those of the truth: F1 (ROC, MIA), or
            the shared part of the shorter list (VG, RC).
        weight: of the similarity in the score of an answer with boxes.

    Raises:
        ValueError: not one response a sample, or an unknown task.
    """
    if len(samples) != len(responses):
        raise ValueError(f"judge: {len(samples)} samples but {len(responses)} responses")
    for sample in samples:
        if sample["task"] not in TASKS:
            raise ValueError(f"judge: unknown task {sample['task']!r}; known are {', '.join(TASKS)}")
    answers = [tidy(response) for response in responses]
    alike = similarity.pairs(
        [comparable(s["answer"]) for s in samples], [comparable(answer) for answer in answers]
    )
    verdicts = []
    for sample, answer, near in zip(samples, answers, alike.tolist(), strict=True):
        overlap, worst = box_overlap(sample["answer"], answer)
        reason = fault(sample, answer, worst, iou_threshold=iou_threshold, names_threshold=names_threshold)
        if reason is None and not _alike_enough(sample, answer, near, similarity_threshold):
            reason = "wrong_object" if sample["task"] == "roc" else "low_similarity"
        value = score(near, overlap, weight=weight) * (0.5 if reason in CONFLICTS else 1.0)
        verdicts.append(Verdict(reason is not None, reason, overlap, near, round(value, 6)))
    return verdicts


def score(similarity: float, overlap: float | None, *, weight: float = 0.5) -> float:
    """w·similarity + (1 − w)·IoU in [0, 1]; similarity alone for a truth without boxes (``overlap`` None)."""
    return similarity if overlap is None else weight * similarity + (1 - weight) * overlap


def tidy(response: str) -> str:
    """A response without its closing control tokens and with ``<box>`` tags."""
    return from_qwen(_ENDS.sub("", response)).strip()


def box_overlap(truth: str, answer: str) -> tuple[float | None, float]:
    """How well an answer's boxes cover the truth's.

    Returns:
        (overlap, worst): every target's best IoU, summed and divided by the number of targets or of
        distinct answered boxes, whichever is larger; and the least of these IoUs.
        (None, 1.0) when the truth has no box.
    """
    targets = parse_boxes(truth, strict=False)
    if not targets:
        return None, 1.0
    found = set(parse_boxes(answer, strict=False)) or set(_bare_boxes(answer))
    best = [max((iou(target, box) for box in found), default=0.0) for target in targets]
    return round(sum(best) / max(len(best), len(found)), 6), min(best)


def _bare_boxes(text: str) -> list[tuple[int, int, int, int]]:
    """Corners without tags, which the published protocol reads too when there is no tag at all."""
    if "<box>" in text:
        return []
    return parse_boxes("".join(f"<box>{span}</box>" for span in _BARE.findall(text)), strict=False)


def fault(
    sample: Mapping[str, Any],
    answer: str,
    worst: float,
    *,
    iou_threshold: float = 0.5,
    names_threshold: float = 0.5,
) -> str | None:
    """The first of ``REASONS`` that holds without asking the similarity.

    Args:
        answer: as ``tidy`` leaves it.
        worst: the second value of ``box_overlap``.
    """
    task, truth = sample["task"], sample["answer"]
    if not any(char.isalnum() for char in answer):
        return "empty"
    if repeats(answer) and not repeats(truth):
        return "repetition"
    grounded = task == "vg" and bool(parse_boxes(truth, strict=False))
    if malformed(answer) or (grounded and _bare_boxes(answer)):
        return "format"
    if grounded and not parse_boxes(answer, strict=False):
        return "no_box"
    conflict = _conflict(task, truth, answer, names_threshold)
    if conflict is None and grounded and worst <= iou_threshold:
        return "low_iou"
    return conflict


def _conflict(task: str, truth: str, answer: str, names_threshold: float) -> str | None:
    if laterality_conflict(truth, answer) or (task == "roc" and _side_missed(truth, answer)):
        return "laterality"
    if negation_conflict(truth, answer):
        return "negation"
    if number_conflict(truth, answer):
        return "number"
    overlap = named_overlap(truth, answer)
    # ROC asks for one name and MIA for all of them, so that others count against it; VG and RC may name more.
    if overlap is not None and overlap[1 if task in ("roc", "mia") else 0] < names_threshold:
        return "wrong_object"
    if modality_conflict(truth, answer):
        return "wrong_object"
    return None


def _side_missed(truth: str, answer: str) -> bool:
    """A classification that should say a side, and says none or both."""
    wanted = sides_of(truth)
    return len(wanted) == 1 and sides_of(answer) != wanted


def _alike_enough(sample: Mapping[str, Any], answer: str, similarity: float, threshold: float) -> bool:
    if sample["task"] == "vg" and parse_boxes(sample["answer"], strict=False):
        return True  # the boxes are the answer
    if sample["task"] == "roc":
        wanted = set(content_words(sample["answer"]))
        if wanted and wanted <= set(content_words(answer)):
            return True
    return similarity >= threshold


def malformed(answer: str) -> bool:
    """Control tokens inside, or a ``<box>`` that is not closed or holds no usable box."""
    if _SPECIAL.search(answer):
        return True
    spans = len(_SPAN.findall(answer))
    if not spans == answer.count("<box>") == answer.count("</box>"):
        return True
    return len(parse_boxes(answer, strict=False)) != spans


def repeats(text: str) -> bool:
    """A loop: one or two words four times on end, or three to twelve words three times (a box is a word)."""
    units = _UNIT.findall(text.lower())
    for size in range(1, 13):
        needed = size * (3 if size < 3 else 2)
        run = 0
        for first, second in zip(units, units[size:], strict=False):
            run = run + 1 if first == second else 0
            if run >= needed:
                return True
    return False
