"""What was planned against what came: steps, seconds of a step and memory, stage by stage.

Decisions:
- The plan is the one that ``clinkd plan --save`` left in the run's folder. Without one there is no table.
- A plan says seconds as a band; measured beforehand, the band is a point. Beside it stands the mean of all
  steps, the first ones too.
- On a CPU the plan is of what a worker holds beside its libraries: these are taken off what came.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from clinkd.report.tables import mapping, number

FILE = "plan.json"
GIB = 2**30
MOST_STAGES = 40


def read_plan(folder: Path) -> dict[str, Any]:
    """The saved plan; empty where there is none, or none that can be read."""
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def against_plan(plan: Mapping[str, Any], metrics: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows {stage, steps, seconds, memory, steps_done, seconds_done, memory_done, calibrated}.

    ``seconds`` is (least, most) of a step; memory in GiB. Of stages that are in both; None: not known.
    """
    logged: dict[str, list[Mapping[str, Any]]] = {}
    for line in metrics:
        if number(line.get("seconds")) is not None and number(line.get("memory_gib")) is not None:
            logged.setdefault(str(line.get("stage")), []).append(line)
    rows = []
    for said in _stages(plan):
        lines, steps = logged.get(str(said.get("name")), []), number(said.get("steps"))
        if lines and steps:
            rows.append(_row(said, steps, lines))
    return rows[:MOST_STAGES]


def _stages(plan: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found = plan.get("stages")
    return [mapping(row) for row in found] if isinstance(found, list) else []


def _row(said: Mapping[str, Any], steps: float, lines: list[Mapping[str, Any]]) -> dict[str, Any]:
    measured = mapping(said.get("measured"))
    memory = number(measured.get("grown_at_end", said.get("total")))
    given = said.get("hours")
    hours = (
        [number(value) for value in given] if isinstance(given, list) and len(given) == 2 else [None, None]
    )
    low, high = (None if value is None else 3600 * value / steps for value in hours)
    taken = [float(line["seconds"]) for line in lines]
    held = max(float(line["memory_gib"]) - (number(line.get("libraries_gib")) or 0.0) for line in lines)
    return {
        "stage": str(said["name"]),
        "calibrated": bool(measured),
        "steps": int(steps),
        "steps_done": len({line.get("step") for line in lines}),
        "seconds": None if low is None or high is None else (low, high),
        "seconds_done": sum(taken) / len(taken),
        "memory": None if memory is None else memory / GIB,
        "memory_done": held,
    }
