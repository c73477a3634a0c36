"""Which samples the report shows, and how each becomes a card.

Decisions:
- Worst first, then a few of the best, for every modality and task; among equals a hash of the sample's id
  decides, so that one image's questions do not fill the row and the same run gives the same report.
- Cards are encoded rank by rank over the modalities: when the image budget ends, every modality has its worst
  ones.
- A missing or broken image leaves a card with its text and a sentence.
"""

from __future__ import annotations

import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clinkd.data.boxes import iou
from clinkd.data.records import MODALITIES, TASKS, Box, modality_of
from clinkd.report.overlays import Budget, ImageError, Mark
from clinkd.report.tables import answer_boxes, answer_text, number, roc_hit

Images = Callable[[Iterable[str]], dict[str, bytes]]
# Worst and best cards of a modality, by task.
SHOWN = {"vg": (4, 2), "roc": (2, 1), "rc": (1, 1), "mia": (1, 1)}
MOST_MODALITIES = 12  # file names from elsewhere may hold any prefix
MOST_FEEDBACK = 12
MOST_CANDIDATES = 8
MOST_TEXT = 600  # characters of a question or an answer on a card


@dataclass(frozen=True)
class Card:
    """One sample as shown: its texts, its image with boxes (a data URI) or the reason why there is none."""

    sample: str
    task: str
    modality: str
    image: str
    question: str
    truth: str
    answer: str
    score: float
    good: bool
    picture: str | None = None
    problem: str = ""


@dataclass(frozen=True)
class Correction:
    """One row of the feedback: what was wrong, the candidates, what was chosen, and what is said after.

    ``mended``: whether the judge finds ``after`` right; both None where it was not asked.
    """

    sample: str
    task: str
    image: str
    question: str
    truth: str
    wrong: str
    reason: str
    score_wrong: float | None
    chosen: str
    source: str
    after: str | None
    mended: bool | None
    candidates: tuple[Mapping[str, Any], ...]
    left_out: int
    picture: str | None = None
    problem: str = ""


def clip(text: object, most: int = MOST_TEXT) -> str:
    plain = str(text)
    return plain if len(plain) <= most else plain[: most - 1] + "…"


def grounding_score(truths: Sequence[Box], answers: Sequence[Box]) -> float:
    """Mean over the true boxes of the best IoU any answered box has with it."""
    return sum(max((iou(truth, answer) for answer in answers), default=0.0) for truth in truths) / len(truths)


def word_overlap(truth: str, answer: str) -> float:
    """F1 of the two texts' words, counted with their repetitions."""
    a, b = Counter(truth.lower().split()), Counter(answer.lower().split())
    shared = sum((a & b).values())
    return 2 * shared / (a.total() + b.total()) if shared else 0.0


def score(task: str, truth: str, answer: str) -> float | None:
    """How good an answer is in [0, 1]; None when the row cannot be judged (no true box, unknown task)."""
    if task == "vg":
        truths = answer_boxes(truth)
        return grounding_score(truths, answer_boxes(answer)) if truths else None
    if task == "roc":
        return float(roc_hit(truth, answer))
    return word_overlap(truth, answer) if task in TASKS else None


def choose(predictions: Iterable[Mapping[str, Any]]) -> list[Card]:
    """The samples to show: the worst of every modality first, then the second worst of each, and so on."""
    groups: defaultdict[tuple[str, str], list[Card]] = defaultdict(list)
    for row in predictions:
        task, truth, answer = (
            str(row.get("task", "")),
            str(row.get("annotation", "")),
            answer_text(row.get("response")),
        )
        value = score(task, truth, answer)
        if value is None:
            continue
        image = str(row.get("image", ""))
        sample = str(row.get("sample", row.get("id", "")))
        good = value > 0.5 if task == "vg" else value >= 0.5
        groups[modality_of(image), task].append(
            Card(
                sample,
                task,
                modality_of(image),
                image,
                str(row.get("question", "")),
                truth,
                answer,
                value,
                good,
            )
        )
    present = {modality for modality, _ in groups}
    shown = [m for m in MODALITIES if m in present] + sorted(present - set(MODALITIES))
    ranked = [
        (rank, order, TASKS.index(task), card)
        for order, modality in enumerate(shown[:MOST_MODALITIES])
        for task in TASKS
        for rank, card in enumerate(_extremes(groups.get((modality, task), []), *SHOWN[task]))
    ]
    return [card for *_, card in sorted(ranked, key=lambda item: item[:3])]


def _extremes(cards: Sequence[Card], worst: int, best: int) -> list[Card]:
    ordered = sorted(
        cards, key=lambda card: (card.score, not answer_boxes(card.answer), zlib.crc32(card.sample.encode()))
    )
    if len(ordered) <= worst + best:
        return ordered
    return ordered[:worst] + ordered[-best:]


def card_marks(card: Card) -> list[Mark]:
    """The question's box for what is asked about; else true and answered boxes."""
    marks = [Mark(box, "asked", "asked") for box in answer_boxes(card.question)]
    truths, answers = answer_boxes(card.truth), answer_boxes(card.answer)
    marks += [Mark(box, "truth", "truth") for box in truths]
    for box in answers:
        best = max((iou(truth, box) for truth in truths), default=None)
        marks.append(Mark(box, "answer", "answer" if best is None else f"answer {best:.2f}"))
    return marks[:24]


def pictured(cards: Sequence[Card], images: Mapping[str, bytes], budget: Budget) -> dict[str, list[Card]]:
    """Cards with their pictures by modality, each modality's in the order of tasks and from worst to best."""
    grouped: dict[str, list[Card]] = {}
    for card in cards:
        picture, problem = _picture(card.image, card_marks(card), images, budget)
        made = Card(
            clip(card.sample, 120),
            card.task,
            clip(card.modality, 40),
            clip(card.image, 160),
            clip(card.question),
            clip(card.truth),
            clip(card.answer),
            card.score,
            card.good,
            picture,
            problem,
        )
        grouped.setdefault(made.modality, []).append(made)
    for group in grouped.values():
        group.sort(key=lambda card: (TASKS.index(card.task), card.score))
    return grouped


def _picture(
    name: str, marks: Sequence[Mark], images: Mapping[str, bytes], budget: Budget
) -> tuple[str | None, str]:
    if name not in images:
        return None, "The image was not found in the run's data."
    try:
        picture = budget.embed(images[name], marks)
    except ImageError:
        return None, "The image cannot be read."
    return picture, "" if picture else "Left out to keep this file small."


def choose_feedback(feedback: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """A few corrections, in turn from every (reason, source), those with the best candidates first."""
    groups: defaultdict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for row in feedback:
        groups[str(row.get("source", "")), str(row.get("reason", ""))].append(row)
    for rows in groups.values():
        rows.sort(key=lambda row: (-_best_score(row), zlib.crc32(str(row.get("sample", "")).encode())))
    turns = [
        (rank, key, row)
        for key, rows in sorted(groups.items())
        for rank, row in enumerate(rows[:MOST_FEEDBACK])
    ]
    return [row for *_, row in sorted(turns, key=lambda item: item[:2])][:MOST_FEEDBACK]


def _candidates(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    given = row.get("candidates")
    return [item for item in given if isinstance(item, Mapping)] if given is not None else []


def _best_score(row: Mapping[str, Any]) -> float:
    return max((number(item.get("score")) or 0.0 for item in _candidates(row)), default=0.0)


def corrections(
    rows: Iterable[Mapping[str, Any]], images: Mapping[str, bytes], budget: Budget
) -> list[Correction]:
    """Feedback rows as cards: truth, wrong and chosen boxes on the image, candidates from best to worst."""
    made = []
    for row in rows:
        texts = {
            key: answer_text(row.get(key))
            for key in ("sample", "task", "image", "question", "truth", "wrong")
        }
        chosen, source = answer_text(row.get("chosen")), str(row.get("source", ""))
        marks = [Mark(box, "asked", "asked") for box in answer_boxes(texts["question"])]
        marks += [Mark(box, "truth", "truth") for box in answer_boxes(texts["truth"])]
        marks += [Mark(box, "answer", "wrong") for box in answer_boxes(texts["wrong"])]
        if source == "candidate":
            marks += [Mark(box, "chosen", "chosen") for box in answer_boxes(chosen)]
        after = answer_text(row["after"]) if row.get("after") is not None else None
        marks += [Mark(box, "after", "after") for box in answer_boxes(after or "")]
        picture, problem = _picture(texts["image"], marks[:24], images, budget)
        ordered = sorted(_candidates(row), key=lambda item: -(number(item.get("score")) or 0.0))
        made.append(
            Correction(
                **{key: clip(text) for key, text in texts.items()},
                reason=clip(row.get("reason", ""), 80),
                score_wrong=number(row.get("score_wrong")),
                chosen=clip(chosen),
                source=source,
                after=None if after is None else clip(after),
                mended=row.get("mended"),
                candidates=tuple(_candidate(item, chosen, source) for item in ordered[:MOST_CANDIDATES]),
                left_out=max(0, len(ordered) - MOST_CANDIDATES),
                picture=picture,
                problem=problem,
            )
        )
    return made


def _candidate(item: Mapping[str, Any], chosen: str, source: str) -> dict[str, Any]:
    text = answer_text(item.get("text"))
    return {
        "text": clip(text, 300),
        "veto": clip(item.get("veto") or "", 120),
        "chosen": source == "candidate" and text == chosen and not item.get("veto"),
        **{key: number(item.get(key)) for key in ("score", "similarity", "iou")},
    }


def reflection_rounds(feedback: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Per round: how many answers were corrected, by reason, and how many by a candidate or by the truth."""
    rounds: defaultdict[int, defaultdict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for row in feedback:
        source = "candidate" if row.get("source") == "candidate" else "truth"
        rounds[int(number(row.get("round")) or 1)][clip(row.get("reason", "unknown"), 80)][source] += 1
    made = []
    for index, reasons in sorted(rounds.items()):
        ordered = sorted(reasons.items(), key=lambda item: (-item[1].total(), item[0]))
        rows = [{"reason": reason, "rows": count.total(), **_by_source(count)} for reason, count in ordered]
        made.append(
            {"round": index, "rows": sum(count.total() for _, count in ordered), "reasons": rows[:20]}
        )
    return made


def _by_source(count: Counter[str]) -> dict[str, int]:
    return {"candidate": count["candidate"], "truth": count["truth"]}
