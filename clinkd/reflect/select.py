"""Semantic-aware selective generation: which of a corrector's candidates becomes the target, if any.

Decisions:
- A candidate is first judged like an answer: what would itself need correction cannot be one. Only the
  similarity's threshold gives way to ``floor``, since a correction may be put in other words.
- Parroting is refused because it is the truth with extra steps; the truth is the fallback anyway and has no
  typing errors.
- Where the truth has no box (a name, a caption), one that points elsewhere than the question does is wrong: a
  corrector that was trained on groundings says such things, and the student would learn them.
- A candidate that speaks of the exercise ("the previous answer", "the reference") is of the wrong format:
  the student never saw it.
- Every candidate is kept with its numbers and the one veto that met it first, in the order of generation.
- Nothing depends on the order of candidates or on what else is in the batch: best score first, then the
  text.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from clinkd.data.boxes import iou, parse_boxes
from clinkd.reflect.judge import REASONS, box_overlap, fault, score, tidy
from clinkd.reflect.similarity import TextSimilarity
from clinkd.reflect.words import FILLER, comparable, content_words

VETOES = (
    *(reason for reason in REASONS if reason != "low_similarity"),
    "unchanged",
    "parrot",
    "floor",
    "duplicate",
)
SAME_BOX = 0.95  # IoU from which two boxes are one: a step or two on the 0-1000 grid
SAME_WORDS = 0.9  # shared share of content words from which two candidates are one

_OF_THE_EXERCISE = re.compile(
    r"\b(?:student|(?:reference|previous|first|given|wrong|incorrect|correct|right|your) (?:answer|response)"
    r"|(?:answer|response) (?:is|was) (?:\w+ )?(?:wrong|incorrect|correct|right)|ground truth)\b", re.I
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class ScoredCandidate:
    """A candidate with its numbers in [0, 1]; ``veto``: one of ``VETOES``, None where it may be chosen."""

    text: str
    score: float
    similarity: float
    iou: float | None
    veto: str | None


@dataclass(frozen=True, slots=True)
class Selection:
    """The target text, where it comes from ("candidate" or "truth"), and all candidates as generated."""

    chosen: str
    source: str
    candidates: tuple[ScoredCandidate, ...]


def select(
    sample: Mapping[str, Any],
    wrong: str,
    candidates: Sequence[str],
    similarity: TextSimilarity,
    **options: float,
) -> Selection:
    """``select_batch`` for one sample."""
    return select_batch([sample], [wrong], [candidates], similarity, **options)[0]


def select_batch(
    samples: Sequence[Mapping[str, Any]],
    wrongs: Sequence[str],
    candidates: Sequence[Sequence[str]],
    similarity: TextSimilarity,
    *,
    weight: float = 0.5,
    floor: float = 0.6,
    iou_threshold: float = 0.5,
    names_threshold: float = 0.5,
) -> list[Selection]:
    """Chooses a target for every sample; all similarities are computed in one call.

    Args:
        samples: each with ``task``, ``question`` and ``answer`` (the truth).
        wrongs: the model's own answers, which were found wrong.
        candidates: the corrector's answers, any number a sample.
        weight: of the similarity to the truth against the IoU, where the truth has boxes.
        floor: the least score of a target.
        iou_threshold, names_threshold: as in ``judge``.

    Raises:
        ValueError: the three lists differ in length, or weight or floor is outside [0, 1].
    """
    if not len(samples) == len(wrongs) == len(candidates):
        raise ValueError(
            f"select: {len(samples)} samples, {len(wrongs)} wrong answers, {len(candidates)} candidate lists"
        )
    if not (0 <= weight <= 1 and 0 <= floor <= 1):
        raise ValueError(f"select: weight {weight} and floor {floor} must lie in [0, 1]")
    texts = [[tidy(text) for text in group] for group in candidates]
    truths = [
        comparable(sample["answer"]) for sample, group in zip(samples, texts, strict=True) for _ in group
    ]
    alike = iter(similarity.pairs(truths, [comparable(text) for group in texts for text in group]).tolist())
    selections = []
    for sample, wrong, group in zip(samples, wrongs, texts, strict=True):
        scored = []
        for text in group:
            near = next(alike)
            overlap, worst = box_overlap(sample["answer"], text)
            value = round(score(near, overlap, weight=weight), 6)
            veto = fault(sample, text, worst, iou_threshold=iou_threshold, names_threshold=names_threshold)
            veto = (
                veto
                or ("low_iou" if _elsewhere(sample, text, iou_threshold) else None)
                or _worthless(sample["answer"], tidy(wrong), text)
                or ("floor" if value < floor else None)
            )
            scored.append(ScoredCandidate(text, value, near, overlap, veto))
        selections.append(_choose(sample["answer"], scored))
    return selections


def _elsewhere(sample: Mapping[str, Any], text: str, threshold: float) -> bool:
    """Whether a text points where neither the truth, which has no box, nor the question does."""
    if parse_boxes(sample["answer"], strict=False):
        return False  # judged by its IoU
    asked = parse_boxes(sample["question"], strict=False)
    return any(
        max((iou(box, other) for other in asked), default=0.0) < threshold
        for box in parse_boxes(text, strict=False)
    )


def _worthless(truth: str, wrong: str, text: str) -> str | None:
    """Why a faultless candidate still teaches nothing, if so."""
    if _OF_THE_EXERCISE.search(text):
        return "format"
    if says_the_same(text, wrong):
        return "unchanged"
    return "parrot" if says_the_same(text, truth) else None


def _choose(truth: str, scored: list[ScoredCandidate]) -> Selection:
    kept: list[ScoredCandidate] = []
    for index in sorted(range(len(scored)), key=lambda i: (-scored[i].score, scored[i].text, i)):
        candidate = scored[index]
        if candidate.veto is not None:
            continue
        if any(_near_duplicate(candidate.text, other.text) for other in kept):
            scored[index] = replace(candidate, veto="duplicate")
        else:
            kept.append(candidate)
    if kept:
        return Selection(kept[0].text, "candidate", tuple(scored))
    return Selection(truth, "truth", tuple(scored))


def says_the_same(a: str, b: str) -> bool:
    """The same words up to order, case, spelling, stop words and filler, around the same boxes."""
    return _bag(a) == _bag(b) and _same_boxes(a, b)


def _near_duplicate(a: str, b: str) -> bool:
    first, second = _bag(a), _bag(b)
    shared, either = (first & second).total(), (first | second).total()
    return (not either or shared / either >= SAME_WORDS) and _same_boxes(a, b)


def _bag(text: str) -> Counter[str]:
    return Counter(word for word in content_words(text) if word not in FILLER)


def _same_boxes(a: str, b: str) -> bool:
    first, second = (sorted(parse_boxes(text, strict=False)) for text in (a, b))
    return len(first) == len(second) and all(
        iou(p, q) >= SAME_BOX for p, q in zip(first, second, strict=True)
    )
