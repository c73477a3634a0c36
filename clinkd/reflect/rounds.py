"""A round of reflection: the student's misses, what the corrector makes of them, and what became of them.

Decisions:
- Which samples a round asks about is a pure function of (seed, round): whole records, so images are shared.
- The worst misses come first when the budget is smaller than their number.
- Everything is kept in ``feedback.parquet``: all candidates with their numbers, what was chosen, and hashes
  of the prompt and of both models. What is trained on is only the chosen text.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clinkd.config import ReflectSection
from clinkd.data.correction import correction_prompt
from clinkd.reflect.judge import Verdict, judge
from clinkd.reflect.select import Selection, select_batch
from clinkd.reflect.similarity import TextSimilarity

Row = dict[str, Any]


def choose_records(turns: np.ndarray, samples: int, seed: int, number: int) -> np.ndarray:
    """Records of a round, ascending: drawn without repetition until ``samples`` turns are reached.

    Args:
        turns: [records] how many each has.
    """
    order = np.random.default_rng([seed, number]).permutation(len(turns))
    before = np.cumsum(turns[order]) - turns[order]
    return np.sort(order[before < samples])


def generations(options: ReflectSection, validation: int) -> dict[str, int]:
    """The most answers that are generated: by the student and by the corrector in a round, and in all.

    Args:
        validation: samples of the validation split that are answered.
    """
    misses = min(options.budget, options.samples)
    student, corrector = 2 * options.samples + validation, misses * options.candidates
    if options.target == "distribution":
        corrector = 0
    whole = options.rounds * (student + corrector) + validation
    return {"student": student, "corrector": corrector, "whole": whole if options.rounds else 0}


def judged(answered: Sequence[Row], similarity: TextSimilarity, options: ReflectSection) -> list[Verdict]:
    """The verdict on each answer; ``answered``: rows of ``evaluate.predict``."""
    return judge(
        [_sample(row) for row in answered], [row["responses"][0] for row in answered], similarity,
        iou_threshold=options.iou_threshold, similarity_threshold=options.similarity_threshold,
    )  # fmt: skip


def worst(answered: Sequence[Row], verdicts: Sequence[Verdict], budget: int) -> list[tuple[Row, Verdict]]:
    """The answers that need correction, the worst first, no more than ``budget``."""
    pairs = zip(answered, verdicts, strict=True)
    wrong = [(row, verdict) for row, verdict in pairs if verdict.needs_correction]
    wrong.sort(key=lambda item: (item[1].score, item[0]["sample"]))
    return wrong[:budget]


def tally(
    answered: Sequence[Row], verdicts: Sequence[Verdict], before: Mapping[str, bool] | None = None
) -> dict[str, Any]:
    """Answers counted: ``answered, wrong, error_rate, reasons``; so in ``by_task`` and ``by_modality`` too.

    Args:
        before: whether each sample was right before; then ``fixed`` and ``broke`` are counted too.
    """
    pairs = list(zip(answered, verdicts, strict=True))
    found = _count(pairs, before)
    for group in ("task", "modality"):
        names = sorted({row[group] for row in answered})
        found[f"by_{group}"] = {
            name: _count([pair for pair in pairs if pair[0][group] == name], before) for name in names
        }
    return found


def _count(pairs: list[tuple[Row, Verdict]], before: Mapping[str, bool] | None) -> dict[str, Any]:
    wrong = [verdict for _, verdict in pairs if verdict.needs_correction]
    found: dict[str, Any] = {
        "answered": len(pairs), "wrong": len(wrong),
        "error_rate": round(len(wrong) / len(pairs), 6) if pairs else None,
        "reasons": dict(sorted(Counter(str(verdict.reason) for verdict in wrong).items())),
    }  # fmt: skip
    if before is not None:
        known = [(before[row["sample"]], not verdict.needs_correction) for row, verdict in pairs]
        found["fixed"] = sum(not was and now for was, now in known)
        found["broke"] = sum(was and not now for was, now in known)
    return found


def right(answered: Sequence[Row], verdicts: Sequence[Verdict]) -> dict[str, bool]:
    """Whether each sample was answered rightly."""
    pairs = zip(answered, verdicts, strict=True)
    return {row["sample"]: not verdict.needs_correction for row, verdict in pairs}


def best_round(errors: Sequence[float | None]) -> int:
    """The round (0: before the first) with the fewest errors on the validation split; the first of equals.

    Where nothing was there to validate with, the last.
    """
    known = [(rate, number) for number, rate in enumerate(errors) if rate is not None]
    return min(known)[1] if known else len(errors) - 1


def finished(errors: Sequence[float | None], patience: int) -> bool:
    """Whether ``patience`` rounds have passed since the best one; never without a validation split."""
    return errors[-1] is not None and len(errors) - 1 - best_round(errors) >= patience


def correction_turn(row: Row) -> dict[str, Any]:
    """The turn that puts a miss to the corrector: its question, the truth and the wrong answer."""
    return {"task": row["task"], "question": _prompt(row), "answer": row["annotation"], "trusted": True}


def choose(
    wrong: Sequence[tuple[Row, Verdict]],
    corrected: Mapping[str, Sequence[str]],
    similarity: TextSimilarity,
    options: ReflectSection,
    models: Mapping[str, str],
) -> list[Row]:
    """Rows of ``feedback.parquet``.

    Args:
        corrected: the candidates of each sample.
        models: hashes of ``student`` and ``corrector``.
    """
    rows = [row for row, _ in wrong]
    chosen = select_batch(
        [_sample(row) for row in rows], [row["responses"][0] for row in rows],
        [corrected[row["sample"]] for row in rows], similarity,
        weight=options.weight, floor=options.floor, iou_threshold=options.iou_threshold,
    )  # fmt: skip
    return [
        _feedback(row, verdict, selection, models)
        for (row, verdict), selection in zip(wrong, chosen, strict=True)
    ]


def _prompt(row: Row) -> str:
    return correction_prompt(row["question"], row["annotation"], row["responses"][0])


def _sample(row: Row) -> Row:
    return {
        "task": row["task"],
        "question": row["question"],
        "answer": row["annotation"],
        "image": row["image"],
    }


def _feedback(row: Row, verdict: Verdict, selection: Selection, models: Mapping[str, str]) -> Row:
    return {
        "sample": row["sample"], "image": row["image"], "task": row["task"], "modality": row["modality"],
        "question": row["question"], "truth": row["annotation"], "wrong": row["responses"][0],
        "reason": verdict.reason, "score_wrong": verdict.score,
        "candidates": [
            {"text": item.text, "score": item.score, "similarity": item.similarity, "iou": item.iou,
             "veto": item.veto}
            for item in selection.candidates
        ],
        "chosen": selection.chosen, "source": selection.source,
        "prompt_hash": hashlib.sha256(_prompt(row).encode()).hexdigest()[:16],
        "student_hash": models["student"], "corrector_hash": models["corrector"],
    }  # fmt: skip


def write_feedback(rows: list[Row], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, number = pa.string(), pa.float64()
    candidate = pa.struct(
        [("text", text), ("score", number), ("similarity", number), ("iou", number), ("veto", text)]
    )
    texts = ("sample", "image", "task", "modality", "question", "truth", "wrong", "reason")
    hashes = ("prompt_hash", "student_hash", "corrector_hash")
    schema = pa.schema(
        [(name, text) for name in texts]
        + [("score_wrong", number), ("candidates", pa.list_(candidate)), ("chosen", text), ("source", text)]
        + [(name, text) for name in hashes]
    )
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
