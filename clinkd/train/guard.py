"""What goes wrong in training without an error: noticed, said with what to do, and handled by policy.

Decisions:
- Every rank sees the same totals, so all decide alike without asking each other; only rank 0 says it.
- A step whose gradients are not finite is left out. ZeRO-1 to 3 find that out by the norm that clipping
  takes, before the weights change; ZeRO-0 changes them, so that the last checkpoint is loaded and the step
  passed over. So it is with a loss that explodes, where ``watch.on_explosion`` is ``rollback``.
- What a rank took for a step before it waited for the others travels with the counts of the next one.
- A standing complaint is said once in a hundred steps. Warnings are lines of events.jsonl, beside the
  metrics, and so is each return to a checkpoint.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clinkd import metrics
from clinkd.config import WatchSection
from clinkd.data.shards import DataError

EVENTS = "events.jsonl"
AGAIN = 100  # steps before the same is said again
HISTORY, ENOUGH = 50, 20  # steps that a median is over, and is worth something from
FAILING = 3  # steps in a row that make an explosion; rollbacks that a job may take
LAG = 2.0  # times the median rank's time


class Rollback(Exception):
    """The weights are spoilt: ``steps`` are to be passed over from the last checkpoint on."""

    def __init__(self, steps: list[int]) -> None:
        super().__init__(f"steps {steps} spoil the weights")
        self.steps = steps


@dataclass
class Guard:
    """Watches one job on one rank.

    Args:
        events: file of the warnings, which rank 0 writes; None on other ranks.
    """

    options: WatchSection
    stage: str
    events: Path | None
    _losses: deque[float] = field(default_factory=lambda: deque(maxlen=HISTORY))
    _seconds: deque[float] = field(default_factory=lambda: deque(maxlen=HISTORY))
    _high: list[int] = field(default_factory=list)
    _left_out: int = 0
    _lag: dict[int, int] = field(default_factory=dict)
    _rollbacks: int = 0
    _said: dict[str, int] = field(default_factory=dict)

    def step(self, step: int, loss: float, seconds: float, waits: list[float], applied: bool) -> None:
        """Looks at a step that all ranks have taken; ``waits``: seconds of each rank's own work, before it.

        Raises:
            DataError: to stop by policy. Rollback: to go back to the last checkpoint.
        """
        self._look_at_time(step, seconds, waits)
        if not math.isfinite(loss) or not applied:
            self._not_finite(step, applied)
            return
        self._left_out = 0
        if self.events is not None:  # rank 0's, for all
            metrics.TRAIN_FINITE.set(time.time())
        self._look_at_loss(step, loss)

    def _not_finite(self, step: int, applied: bool) -> None:
        self._left_out += 1
        if self.events is not None:
            metrics.TRAIN_NONFINITE.add(1)
            metrics.TRAIN_NONFINITE_AT.set(time.time())
        what = f"step {step}: the loss or its gradients are not finite"
        if self.options.nonfinite == "stop" or self._left_out > self.options.patience:
            raise DataError(
                f"{self.stage}: {what}"
                + (f", {self._left_out} times in a row" if self._left_out > 1 else "")
                + "; lower the learning rate or lengthen the warm-up (optim.lr, optim.warmup), then run again"
            )
        if applied:
            self._back("nonfinite", f"{what}", [step])
        self.say("nonfinite", step, f"{what}; the step is left out", always=True)

    def _look_at_loss(self, step: int, loss: float) -> None:
        usual = statistics.median(self._losses) if len(self._losses) >= ENOUGH else None
        if usual is None or loss <= self.options.explosion * max(usual, 1e-6):
            self._high = []
            self._losses.append(loss)
            return
        self._high.append(step)
        if len(self._high) < FAILING:
            return
        steps, self._high = self._high, []
        what = f"step {step}: loss {loss:.4g}, {loss / max(usual, 1e-6):.0f} times its median"
        if self.options.on_explosion == "stop":
            raise DataError(f"{self.stage}: {what}; lower the learning rate, then run again")
        if self.options.on_explosion == "rollback":
            self._back("explosion", what, steps)
        self.say("explosion", step, f"{what}; a lower learning rate may help, or watch.on_explosion=rollback")

    def _back(self, kind: str, what: str, steps: list[int]) -> None:
        self._rollbacks += 1
        if self._rollbacks > FAILING:
            raise DataError(
                f"{self.stage}: {what}, after {FAILING} returns to a checkpoint; lower the learning rate"
            )
        self.say(kind, steps[-1], f"{what}; back to the last checkpoint, past these steps", always=True)
        raise Rollback(steps)

    def _look_at_time(self, step: int, seconds: float, waits: list[float]) -> None:
        if len(self._seconds) >= ENOUGH:
            usual = statistics.median(self._seconds)
            if seconds > self.options.slow_step * usual:
                times = seconds / usual
                self.say("slow", step, f"step {step} took {seconds:.3g} s, {times:.0f} times the median")
        self._seconds.append(seconds)
        if len(waits) < 2:
            return
        usual = statistics.median_low(waits)
        for rank, took in enumerate(waits):
            self._lag[rank] = self._lag.get(rank, 0) + 1 if took > LAG * usual else 0
            if self._lag[rank] >= ENOUGH:
                self.say(
                    f"lag-{rank}", step, f"rank {rank} falls behind: {took:.3g} s a step where others take "
                    f"{usual:.3g}; look at its node",
                )  # fmt: skip

    def resources(self, step: int, folder: Path, needed: int) -> None:
        """Disk and main memory, before a checkpoint; ``needed``: bytes of the last one."""
        import psutil

        free = shutil.disk_usage(folder).free
        if free < 2 * needed:
            self.say(
                "disk", step, f"{folder}: {free / 2**30:.2f} GiB free, a checkpoint takes "
                f"{needed / 2**30:.2f}; make room",
            )  # fmt: skip
        memory = psutil.virtual_memory()
        if memory.percent >= 95:
            self.say(
                "memory", step, f"{memory.percent:.0f}% of the node's memory is used; fewer workers or "
                "images a step keep Ray from ending them",
            )  # fmt: skip

    def resumed(self, step: int, total: int, workers: int, zero_stage: int) -> None:
        """A job goes on from a checkpoint, by the same command or after a worker was lost."""
        who = f"{workers} worker{'s' * (workers > 1)} under ZeRO-{zero_stage}"
        self.say("resumed", step, f"goes on from step {step} of {total}: {who}", always=True)

    def say(self, kind: str, step: int, text: str, always: bool = False) -> None:
        """A line of the events, unless the same was said lately."""
        last = self._said.get(kind)
        if self.events is None or (last is not None and step - last < AGAIN and not always):
            return
        self._said[kind] = step
        line: dict[str, Any] = {"stage": self.stage, "event": kind.split("-")[0], "step": step, "said": text}
        with self.events.open("a") as lines:
            lines.write(json.dumps(line) + "\n")
