"""Where a training step's time goes: timers for a bare loop and around the loop's Worker (train_step.py)."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PARTS = ("batch", "all-reduce", "forward", "backward", "optimiser", "log")


@dataclass
class Times:
    """Seconds of each step by the clock and of CPU, and of its parts by the clock."""

    steps: list[tuple[float, float]] = field(default_factory=list)
    parts: list[dict[str, float]] = field(default_factory=list)
    _now: dict[str, float] = field(default_factory=lambda: defaultdict(float))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Times what is inside; what a part inside it takes counts there alone."""
        start, before = time.perf_counter(), sum(self._now.values())
        yield
        inside = sum(self._now.values()) - before
        self._now[name] += time.perf_counter() - start - inside

    @contextmanager
    def step(self) -> Iterator[None]:
        start, used = time.perf_counter(), time.process_time()
        yield
        self.steps.append((time.perf_counter() - start, time.process_time() - used))
        self.parts.append(dict(self._now))
        self._now.clear()

    def write(self, out: Path) -> None:
        (out / "times.json").write_text(json.dumps({"steps": self.steps, "parts": self.parts}))


def timed_worker(base: Any, out: Path) -> Any:
    """The loop's Worker with a timer around each part; made in the worker, of the class it finds."""

    class Engine:
        def __init__(self, engine: Any, times: Times) -> None:
            self.engine, self.times = engine, times

        def __getattr__(self, name: str) -> Any:
            return getattr(self.engine, name)

        def __call__(self, **arguments: Any) -> Any:
            with self.times.part("forward"):
                return self.engine(**arguments)

        def backward(self, loss: Any) -> None:
            with self.times.part("backward"):
                self.engine.backward(loss)

        def step(self) -> None:
            with self.times.part("optimiser"):
                self.engine.step()

    class TimedWorker(base):
        engine: Any

        def __init__(self, *arguments: Any) -> None:
            import torch.distributed as dist

            super().__init__(*arguments)
            self.times, reduce = Times(), dist.all_reduce

            def all_reduce(*given: Any, **named: Any) -> Any:
                with self.times.part("all-reduce"):
                    return reduce(*given, **named)

            dist.all_reduce = all_reduce  # the loop's two and DeepSpeed's, which ends here too

        def _begin(self, *arguments: Any, **named: Any) -> None:
            super()._begin(*arguments, **named)
            self.engine = Engine(self.engine, self.times)

        def _micro_batches(self) -> Any:
            with self.times.part("batch"):
                return list(super()._micro_batches())

        def _train_step(self) -> Any:
            self.open = self.times.step()
            self.open.__enter__()
            return super()._train_step()

        def _log(self, *arguments: Any) -> None:
            with self.times.part("log"):
                super()._log(*arguments)
            self.open.__exit__(None, None, None)

        def _finish(self) -> None:
            self.times.write(out)
            super()._finish()

    return TimedWorker
