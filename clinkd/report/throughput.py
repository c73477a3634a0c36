"""What training cost, stage by stage, from the lines of metrics.jsonl.

Decisions:
- Rates are medians over steps: a mean would count the first step's warm-up.
- A stage is listed once any rate of it was logged. Runs of older versions logged samples a second alone; what
  they did not log is None.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

from clinkd.report.tables import number

FIELDS = {"samples": "samples_per_s", "tokens": "tokens_per_s", "tflops": "tflops_per_s"}
MOST_STAGES = 40


def throughput(metrics: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows {stage, steps, samples, tokens, tflops, memory}: steps logged, median rates a second, peak GiB.

    In the order in which stages appear, at most ``MOST_STAGES``.
    """
    stages: dict[str, list[Mapping[str, Any]]] = {}
    for line in metrics:
        if any(number(line.get(field)) is not None for field in FIELDS.values()):
            stages.setdefault(str(line.get("stage", "run")), []).append(line)
    rows = []
    for stage, lines in list(stages.items())[:MOST_STAGES]:
        row: dict[str, Any] = {"stage": stage, "steps": len({line.get("step") for line in lines})}
        row |= {name: _middle(lines, field) for name, field in FIELDS.items()}
        memory = _numbers(lines, "memory_gib")
        rows.append(row | {"memory": max(memory) if memory else None})
    return rows


def _numbers(lines: Iterable[Mapping[str, Any]], field: str) -> list[float]:
    return [value for line in lines if (value := number(line.get(field))) is not None]


def _middle(lines: Iterable[Mapping[str, Any]], field: str) -> float | None:
    found = _numbers(lines, field)
    return median(found) if found else None
