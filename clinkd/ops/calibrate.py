"""A few real steps of the configured stages, in the place of guesses: seconds a step, and peak memory.

Decisions:
- The stages themselves run, with their workers and engine, in a folder that is gone afterwards: what differs
  from the run is how many steps they take and how many questions are asked on the way.
- Of phantoms a few are drawn. Any other source is used as it is: prepare it first if it is large.
- The first steps are left out of the median: they pay for caches, kernels and communicators.
- Memory without a GPU is the growth of a worker's resident pages, at their peak, over what it held with all
  libraries imported and no model built (train/meter.py); on a GPU it is what torch allocated.
"""

from __future__ import annotations

import io
import json
import statistics
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clinkd.config import RunConfig, with_values
from clinkd.ops.memory import GIB

WARM = 2
"""Steps at the beginning that do not count."""
PHANTOMS = 96


@dataclass(frozen=True)
class Measured:
    """Of a stage.

    Args:
        seconds: of a step, the median; mean: likewise; counted: steps of which they are.
        peak: bytes of memory; grown: of them, what the libraries did not hold. steps: all that were taken.
    """

    seconds: float
    mean: float
    counted: int
    peak: float
    grown: float
    steps: int


def measure(config: RunConfig, steps: int) -> dict[str, Measured]:
    """Runs every stage that trains for ``steps``; by stage, "reflect" for all its rounds.

    Raises:
        ConfigError, DataError: as the run would.
    """
    with tempfile.TemporaryDirectory(prefix="clinkd-calibrate-") as root:
        return learn(small(config, steps, Path(root)))


def small(config: RunConfig, steps: int, root: Path) -> RunConfig:
    """The run with ``steps`` in each stage, in ``root``; the batches are the run's."""
    changes: dict[str, Any] = {
        "run.root": str(root), "run.name": "calibrate", "guide.steps": steps, "sft.steps": steps,
        "distill.optim.steps": steps, "reflect.optim.steps": steps, "compute.checkpoint_every": 10**6,
        "distill.cache.root": None, "sinks": {}, "sweep": {},
    }  # fmt: skip
    if config.reflect.exercises is not None:
        changes["reflect.exercises.steps"] = steps
    if config.reflect.rounds:
        few = {"samples": 16, "validation": 8, "budget": 4, "candidates": 2, "rounds": 1}
        changes |= {f"reflect.{key}": value for key, value in few.items()}
    if config.data.source == "phantoms":
        changes["data.phantoms"] = min(PHANTOMS, config.data.phantoms)
        changes |= {"data.test_fraction": 0.1, "data.validation_fraction": 0.1}
    return with_values(config, changes, "calibrate")


def learn(config: RunConfig) -> dict[str, Measured]:
    """Trains all stages of a run and reads what their steps took; nothing is shown."""
    from clinkd.stages import pipeline
    from clinkd.stages.base import open_run

    with open_run(config, stream=io.StringIO()) as run:
        pipeline.learn(run)
        paths = sorted(path for item in run.done.values() for path in item.path.rglob("metrics.jsonl"))
    lines = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    return read(lines)


def read(lines: Iterable[Mapping[str, Any]]) -> dict[str, Measured]:
    """By stage, from the lines of metrics.jsonl; stages without seconds are left out."""
    stages: dict[str, list[Mapping[str, Any]]] = {}
    for line in lines:
        if "seconds" in line and "memory_gib" in line:
            name = str(line["stage"])
            stages.setdefault("reflect" if name.startswith("reflect") else name, []).append(line)
    found = {}
    for name, rows in stages.items():
        counted = [row for row in rows if row["step"] > WARM] or rows
        peak = max(row["memory_gib"] for row in rows)
        base = rows[-1].get("libraries_gib", 0.0)
        seconds = [row["seconds"] for row in counted]
        found[name] = Measured(
            statistics.median(seconds), statistics.mean(seconds), len(counted), peak * GIB,
            max(0.0, peak - base) * GIB, max(row["step"] for row in rows),
        )  # fmt: skip
    return found
