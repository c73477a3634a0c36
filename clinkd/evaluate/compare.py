"""Two runs, or two groups of runs, on the same questions: how far apart they are, and how surely.

Decisions:
- Only questions that all runs answered in a way the protocol can score are compared, by sample name; what is
  left out is counted.
- Images are drawn, the same ones for every run (a paired bootstrap): what is hard about an image is hard for
  all and does not blur the difference.
- Of several runs on a side (seeds) the mean is compared. Its interval is over images, not over seeds; how far
  seeds lie apart stands beside it as ``spread``.
- ``p`` is two-sided: twice the share of draws on the far side of no difference, with one added (Davison and
  Hinkley, 1997), so that it is never 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from clinkd.data.records import TASKS
from clinkd.evaluate.bootstrap import Ratio
from clinkd.evaluate.grounding import ratios
from clinkd.evaluate.protocol import collect

Rows = Sequence[dict[str, Any]]


def compare(first: Sequence[Rows], second: Sequence[Rows]) -> dict[str, Any]:
    """``second`` minus ``first``, each a group of runs' prediction rows.

    Returns:
        ``tasks``: of each task the runs have in common, its metrics with ``first``, ``second``,
        ``difference``, ``low`` and ``high`` (95%), ``p``, and ``spread`` (standard deviation over each side's
        runs; null for one); ``rows`` and ``left_out`` by task.

    Raises:
        ValueError: a side without a run, or runs without a question in common.
    """
    if not first or not second:
        raise ValueError("compare: a run is wanted on either side")
    result: dict[str, Any] = {"tasks": {}, "rows": {}, "left_out": {}}
    for task in TASKS:
        sides = [[_scorable(task, run) for run in side] for side in (first, second)]
        shared = sorted(set.intersection(*(set(run) for side in sides for run in side)))
        if not shared:
            continue
        read = [sum(row.get("task", task) == task for row in run) for run in (*first, *second)]
        result["rows"][task], result["left_out"][task] = len(shared), max(read) - len(shared)
        scored = [[collect(task, [run[name] for name in shared]) for run in side] for side in sides]
        measured = [[ratios(task, run) for run in side] for side in scored]
        result["tasks"][task] = {
            name: _difference([[run[name] for run in side] for side in measured]) for name in measured[0][0]
        }
    if not result["tasks"]:
        raise ValueError("compare: the runs have no question in common")
    return result


def _scorable(task: str, run: Rows) -> dict[str, dict[str, Any]]:
    """The task's rows that the protocol can score, by their questions."""
    rows = (row for row in run if row.get("task", task) == task)
    return {_name(row): row for row in rows if collect(task, [row]).rows}


def _name(row: dict[str, Any]) -> str:
    """Of the question; the official files have an id alone."""
    return str(row["sample"] if "sample" in row else f"{row.get('task', '')}:{row.get('id')}")


def _difference(sides: list[list[Ratio]]) -> dict[str, Any]:
    values = [[run.value for run in side if run.value is not None] for side in sides]
    if not all(values):
        return dict.fromkeys(("first", "second", "difference", "low", "high", "p", "spread"))
    first, second = (float(np.mean(side)) for side in values)
    drawn = [np.mean([run.draws for run in side], axis=0) for side in sides]
    apart = drawn[1] - drawn[0]
    apart = apart[~np.isnan(apart)]
    found: dict[str, Any] = {"first": first, "second": second, "difference": second - first}
    found |= dict.fromkeys(("low", "high", "p"))
    if len(apart):
        low, high = np.percentile(apart, [2.5, 97.5])
        far = min(int((apart <= 0).sum()), int((apart >= 0).sum()))
        found |= {"low": float(low), "high": float(high), "p": min(1.0, 2 * (far + 1) / (len(apart) + 1))}
    spread = [float(np.std(side, ddof=1)) if len(side) > 1 else None for side in values]
    return found | {"spread": spread}
