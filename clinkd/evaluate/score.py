"""Predictions to the numbers of one task, in the shape ``clinkd evaluate`` prints.

Decisions:
- ``rows`` is what was read; rows left out are in ``skipped`` by reason (``no_target`` is no fault, the others
  are).
- A line of a prediction file that cannot be read is counted like a row that cannot be scored.
- Several tasks scored together share one METEOR process.
"""

from __future__ import annotations

import functools
import json
import platform
from collections import Counter
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from clinkd.data.records import MODALITIES, TASKS
from clinkd.evaluate.grounding import honest
from clinkd.evaluate.java import java_version
from clinkd.evaluate.protocol import Scored, collect, recall
from clinkd.evaluate.text_metrics import NO_JARS, TextScorer, TextScores, published_means


class Predictions(list[dict[str, Any]]):
    """Prediction rows, and how many lines of their file could not be read, by reason."""

    bad_lines: dict[str, int]


def read_predictions(path: Path | str) -> Predictions:
    """Rows of a JSONL file, ours or the official one (integer ids, response a text or a list of one).

    Lines that are no row are counted in ``.bad_lines``: ``line_not_utf8``, ``line_not_json`` or
    ``not_an_object``. Blank lines are nothing. A response in a list of one is taken out of it.

    Raises:
        OSError: the file cannot be read.
    """
    rows, bad = Predictions(), Counter[str]()
    with open(path, "rb") as file:
        for line in file:
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError:
                bad["line_not_utf8"] += 1
                continue
            except (ValueError, RecursionError):
                bad["line_not_json"] += 1
                continue
            if not isinstance(row, dict):
                bad["not_an_object"] += 1
                continue
            response = row.get("response")
            if isinstance(response, list) and len(response) == 1:
                row["response"] = response[0]
            rows.append(row)
    rows.bad_lines = dict(bad)
    return rows


def score_task(
    task: str,
    rows: Iterable[object],
    *,
    spice_jars: Path | None = None,
    text_metrics: bool = True,
    scorer: TextScorer | None = None,
) -> dict[str, Any]:
    """Scores the rows of one task; a row never raises.

    Args:
        task: ``vg``, ``roc``, ``rc`` or ``mia``.
        rows: prediction rows (``image``, ``annotation``, ``response``; RC and MIA also ``id``). Rows
            that name another ``task`` are skipped.
        spice_jars: directory with Stanford CoreNLP 3.6.0 for SPICE (RC only); without it SPICE is null.
        text_metrics: False leaves the Java programs of RC and MIA alone; their metrics are null then.
        scorer: one to share between calls; the caller closes it.

    Returns:
        ``{"task", "modalities", "mean", "rows", "skipped", "honest", "spice", "versions"}``; RC and MIA also
        ``spice_reason``, ``text_reason`` and ``meteor_reason`` (null where there is nothing to say).

    Raises:
        ValueError: ``task`` is none of the four.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}: expected one of {', '.join(TASKS)}")
    scored = collect(task, rows)
    result: dict[str, Any] = {"task": task}
    if task == "vg":
        result |= recall(scored, "recall_at_50", "targets") | {"honest": honest(task, scored), "spice": None}
    elif task == "roc":
        result |= recall(scored, "recall", "rows") | {"honest": honest(task, scored), "spice": None}
    else:
        result |= _score_text(task, scored, spice_jars, text_metrics, scorer)
    result |= {"rows": scored.read, "skipped": scored.skipped, "versions": versions(task in ("rc", "mia"))}
    return result


def score_tasks(
    rows: Mapping[str, Iterable[object]], *, spice_jars: Path | None = None, text_metrics: bool = True
) -> dict[str, dict[str, Any]]:
    """`score_task` for every task given, with one METEOR process for all."""
    with TextScorer() as scorer:
        return {
            task: score_task(task, part, spice_jars=spice_jars, text_metrics=text_metrics, scorer=scorer)
            for task, part in rows.items()
        }


def _score_text(
    task: str, scored: Scored, spice_jars: Path | None, text_metrics: bool, scorer: TextScorer | None
) -> dict[str, Any]:
    groups = {
        name: [(row.annotation, row.response) for row in scored.rows if row.modality == name]
        for name in MODALITIES
    }
    jars = spice_jars if task == "rc" else None
    if not text_metrics:
        scores = TextScores({}, {}, {"text": "text metrics were not asked for", "spice": NO_JARS})
    elif scorer is not None:
        scores = scorer.score(groups, jars)
    else:
        with TextScorer() as own:
            scores = own.score(groups, jars)
    means = published_means(scores, mbmr=task == "mia", with_spice=task == "rc")
    for name, row in means["modalities"].items():
        row["rows"] = len(groups[name])
    reasons = scores.reasons
    return {
        **means,
        "honest": honest(task, scored),
        "spice": means["mean"].get("spice"),
        "spice_reason": "SPICE belongs to RC" if task == "mia" else reasons.get("spice", reasons.get("text")),
        "text_reason": reasons.get("text"),
        "meteor_reason": reasons.get("meteor", reasons.get("text")),
    }


def versions(with_java: bool = False) -> dict[str, str | None]:
    """Versions of what the numbers depend on; null for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in ("clinkd", "numpy", "scipy", "pycocoevalcap"):
        found[package] = _version(package)
    if with_java:
        java = TextScorer().java
        found["java"] = java_version(java) if java else None
    return found


@functools.cache
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
