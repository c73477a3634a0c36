"""A round of reflection: the student's misses, what the corrector makes of them, and the data of the
next training.

Decisions:
- Which samples a round asks about is a pure function of (seed, round): whole records, so images are shared.
- The worst misses come first when the budget is smaller than their number.
- Everything is kept in ``feedback.parquet``; what is trained on is only the chosen text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from clinkd.config import ReflectSection
from clinkd.reflect.judge import Verdict, judge
from clinkd.reflect.prompts import correction_prompt
from clinkd.reflect.select import Selection, select_batch
from clinkd.reflect.similarity import TextSimilarity


def choose_records(turns: Sequence[tuple[str, int]], samples: int, seed: int, number: int) -> list[str]:
    """Record ids of a round: drawn without repetition until ``samples`` turns are reached.

    Args:
        turns: (record id, number of turns) of the training split.
    """
    rng = np.random.default_rng([seed, number])
    chosen: list[str] = []
    reached = 0
    for index in rng.permutation(len(turns)):
        if reached >= samples:
            break
        chosen.append(turns[index][0])
        reached += turns[index][1]
    return sorted(chosen)


def misses(
    answered: list[dict[str, Any]], similarity: TextSimilarity, options: ReflectSection
) -> tuple[list[tuple[dict[str, Any], Verdict]], dict[str, int]]:
    """The answers that need correction, worst first within the budget, and all of them counted by reason.

    Args:
        answered: rows of ``evaluate.predict``.
    """
    samples = [_sample(row) for row in answered]
    verdicts = judge(
        samples, [row["responses"][0] for row in answered], similarity,
        iou_threshold=options.iou_threshold, similarity_threshold=options.similarity_threshold,
    )  # fmt: skip
    wrong = [
        (row, verdict) for row, verdict in zip(answered, verdicts, strict=True) if verdict.needs_correction
    ]
    counts = Counter(str(verdict.reason) for _, verdict in wrong)
    wrong.sort(key=lambda item: (item[1].score, item[0]["sample"]))
    return wrong[: options.budget], dict(counts)


def correction_records(
    wrong: list[tuple[dict[str, Any], Verdict]], images: Mapping[str, Sequence[bytes]]
) -> list[dict[str, Any]]:
    """Records that put each miss to the corrector: its question, the truth and the wrong answer.

    Args:
        images: all images of each record, by record id.
    """
    records = []
    for row, _ in wrong:
        prompt = correction_prompt(row["question"], row["annotation"], row["responses"][0])
        turn = {"task": row["task"], "question": prompt, "answer": row["annotation"], "trusted": True}
        first, *more = images[row["sample"].rpartition("#")[0]]
        records.append(
            {"id": row["sample"], "image": row["image"], "png": first, "more_png": more, "turns": [turn]}
        )
    return records


def choose(
    wrong: list[tuple[dict[str, Any], Verdict]],
    corrected: dict[str, list[str]],
    similarity: TextSimilarity,
    options: ReflectSection,
) -> list[dict[str, Any]]:
    """Rows of ``feedback.parquet``; ``corrected`` maps a sample to its candidates."""
    rows = [row for row, _ in wrong]
    chosen = select_batch(
        [_sample(row) for row in rows], [row["responses"][0] for row in rows],
        [corrected[row["sample"]] for row in rows], similarity,
        weight=options.weight, floor=options.floor, iou_threshold=options.iou_threshold,
    )  # fmt: skip
    return [
        _feedback(row, verdict, selection) for (row, verdict), selection in zip(wrong, chosen, strict=True)
    ]


def _sample(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "task": row["task"],
        "question": row["question"],
        "answer": row["annotation"],
        "image": row["image"],
    }


def _feedback(row: dict[str, Any], verdict: Verdict, selection: Selection) -> dict[str, Any]:
    return {
        "sample": row["sample"], "image": row["image"], "task": row["task"], "question": row["question"],
        "truth": row["annotation"], "wrong": row["responses"][0], "reason": verdict.reason,
        "score_wrong": verdict.score,
        "candidates": [
            {"text": item.text, "score": item.score, "similarity": item.similarity, "iou": item.iou,
             "veto": item.veto}
            for item in selection.candidates
        ],
        "chosen": selection.chosen, "source": selection.source,
    }  # fmt: skip


def write_feedback(rows: list[dict[str, Any]], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, number = pa.string(), pa.float64()
    candidate = pa.struct(
        [("text", text), ("score", number), ("similarity", number), ("iou", number), ("veto", text)]
    )
    schema = pa.schema(
        [(name, text) for name in ("sample", "image", "task", "question", "truth", "wrong", "reason")]
        + [("score_wrong", number), ("candidates", pa.list_(candidate)), ("chosen", text), ("source", text)]
    )
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
