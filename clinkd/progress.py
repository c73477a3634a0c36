"""Progress: a live bar on a terminal, plain lines elsewhere, and every number also in metrics.jsonl.

Decisions:
- Plain lines come at most once each ``interval`` seconds and at the end of a stage: logs stay readable.
- A line of metrics.jsonl is one append of whole bytes, so driver and training worker can share the file. Time
  left is not written: it follows from step and total.
- Lines that a worker wrote to the very file this view writes to are shown, not written again.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

SHOWN = ("loss", "samples_per_s", "tokens_per_s")  # numbers a bar has room for; the rest is for metrics.jsonl


class Progress:
    """The view of one command; a context manager, safe to feed from several threads.

    Args:
        metrics: the metrics.jsonl to append to; None writes none.
        stream: where to show, standard error by default: standard output is for results.
        live: a bar that moves; None asks the stream whether it is a terminal.
        interval: fewest seconds between plain lines.
        clock: seconds, for tests.

    ``also`` may be set to a function that gets every line of metrics.jsonl, whoever wrote it; ``run_left`` to
    one that returns the seconds left of the run, from those that the steps of the present stage still need.
    """

    also: Callable[[Mapping[str, Any]], None] | None = None
    run_left: Callable[[float], float] | None = None

    def __init__(
        self,
        metrics: Path | None = None,
        *,
        stream: IO[str] | None = None,
        live: bool | None = None,
        interval: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.metrics = Path(metrics).absolute() if metrics is not None else None
        self._stream = stream or sys.stderr
        self._live = self._stream.isatty() if live is None else live
        self._interval, self._clock = interval, clock
        self._lock = threading.RLock()
        self._bar: Any = None
        self._task: Any = None
        self._stage, self._step = "", 0
        self._total: int | None = None
        self._started, self._shown = 0.0, 0.0
        self._from: tuple[int, float] | None = (
            None  # the first step seen and when: time left is reckoned from it
        )
        self._numbers: dict[str, Any] = {}

    def __enter__(self) -> Progress:
        if self._live:
            self._bar = _rich_bar(self._stream)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:
            if self._bar is not None:
                self._bar.stop()
                self._bar = None

    def start(self, stage: str, total: int | None = None, first: int = 0) -> None:
        """A stage begins; ``first`` is the step it resumes from."""
        with self._lock:
            self._stage, self._total, self._step, self._from = stage, total, first, None
            self._numbers, self._started = {}, self._clock()
            self._shown = self._started
            if self._bar is not None:
                if self._task is not None:
                    self._bar.remove_task(self._task)
                self._task = self._bar.add_task(stage, total=total, completed=first, numbers="")
            else:
                of = f", {total} steps" if total is not None else ""
                self._print(f"{stage}: started{of}" + (f", goes on at {first}" if first else ""))

    def update(self, step: int, *, total: int | None = None, record: bool = True, **numbers: Any) -> None:
        """Shows a step and its numbers (loss, samples_per_s, ...); all of them go to metrics.jsonl."""
        with self._lock:
            self._step, self._total = step, self._total if total is None else total
            self._from = self._from or (step, self._clock())
            self._numbers.update(numbers)
            if record:
                self._append({"stage": self._stage, "step": step, **numbers})
            if self._bar is not None and self._task is not None:
                shown = filter(None, [_numbers(self._numbers), self._run_left()])
                self._bar.update(self._task, completed=step, total=self._total, numbers=", ".join(shown))
            elif self._clock() - self._shown >= self._interval:
                self._shown = self._clock()
                self._print(self._line())

    def finish(self, **numbers: Any) -> None:
        """The stage is done; its line stays on the terminal."""
        with self._lock:
            seconds = self._clock() - self._started
            self._numbers.update(numbers)
            done = {"stage": self._stage, "event": "done", "step": self._step, "seconds": round(seconds, 3)}
            self._append(done | numbers)
            if self._bar is not None and self._task is not None:
                self._bar.remove_task(self._task)
                self._task = None
            shown = ", ".join(filter(None, [_numbers(self._numbers), duration(seconds)]))
            steps = f" {self._step} steps" if self._total is not None else ""
            self._print(f"{self._stage}: done{steps} ({shown})")

    def skipped(self, stage: str, seconds: float) -> None:
        """A stage whose artifact is whole: ``skipped teacher (whole, 34 s saved)``."""
        self._append({"stage": stage, "event": "skipped", "seconds_saved": round(seconds, 3)})
        self.say(f"skipped {stage} (whole, {duration(seconds)} saved)")

    def say(self, text: str) -> None:
        """One line above the bar."""
        with self._lock:
            self._print(text)

    def record(self, **fields: Any) -> None:
        """A line for metrics.jsonl that is not a step: ``stage=..., event=...``."""
        self._append(fields)

    def show(self, line: dict[str, Any], record: bool) -> None:
        """A line of a worker's metrics.jsonl: a step is shown; of other lines nothing is but kept."""
        with self._lock:
            if not record and self.also is not None:
                self.also(line)
            step, stage = line.get("step"), line.get("stage", self._stage)
            if not isinstance(step, int) or "event" in line:
                if record:
                    self._append(line)
                if "said" in line:
                    self._print(f"{stage}: {line['said']}")
                return
            if stage != self._stage:
                self.start(str(stage), line.get("total"))
            if record:
                self._append(line)
            rest = {
                key: value for key, value in line.items() if key not in ("stage", "step", "total", "record")
            }
            self.update(step, total=line.get("total"), record=False, **rest)

    def _line(self) -> str:
        total = "" if self._total is None else f"/{self._total}"
        seconds = self._stage_left()
        left = "" if seconds is None else f"{duration(seconds)} left"
        shown = [f"{self._stage}: step {self._step}{total}", _numbers(self._numbers), left, self._run_left()]
        return ", ".join(filter(None, shown))

    def _stage_left(self) -> float | None:
        """Return the seconds that the stage's steps still need; None before its second step.

        Before its first step a stage starts workers; that time says nothing about the steps to come.
        """
        if self._total is None or self._from is None or self._step <= self._from[0]:
            return None
        pace = (self._clock() - self._from[1]) / (self._step - self._from[0])
        return (self._total - self._step) * pace

    def _run_left(self) -> str:
        if self.run_left is None:
            return ""
        return f"run: {duration(self.run_left(self._stage_left() or 0.0))} left"

    def _print(self, text: str) -> None:
        if self._bar is not None:
            self._bar.console.print(text, markup=False, highlight=False)
            return
        with contextlib.suppress(BrokenPipeError):  # work goes on when nobody reads any more
            print(text, file=self._stream, flush=True)

    def _append(self, line: dict[str, Any]) -> None:
        if self.also is not None:
            self.also(line)
        if self.metrics is None:
            return
        self.metrics.parent.mkdir(parents=True, exist_ok=True)
        data = (json.dumps(line, ensure_ascii=False) + "\n").encode()
        handle = os.open(self.metrics, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(handle, data)
        finally:
            os.close(handle)


def tail_metrics(
    path: Path, progress: Progress, stop_event: threading.Event, poll: float = 0.5
) -> threading.Thread:
    """Follows a metrics.jsonl that a training worker writes, from its present end, and feeds ``progress``.

    The file need not be there yet. One that shrinks (a resumed stage took back lines after its checkpoint) is
    read again; lines already shown are left out. Set ``stop_event`` and join: the last lines are read first.

    Returns:
        The thread, started.
    """
    path = Path(path).absolute()
    tail = _Tail(path)
    tail.lines()  # what a former attempt left is no news
    record = path != progress.metrics

    def follow() -> None:
        stopped = False
        while not stopped:
            stopped = stop_event.wait(poll)
            for line in tail.lines():
                progress.show(line, record)

    thread = threading.Thread(target=follow, name=f"tail {path.name}", daemon=True)
    thread.start()
    return thread


class _Tail:
    """Whole new JSON lines of a file that grows; a half-written last line waits for its end."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset = path, 0
        self._seen: set[bytes] = set()

    def lines(self) -> list[dict[str, Any]]:
        try:
            with self._path.open("rb") as file:
                if os.fstat(file.fileno()).st_size < self._offset:
                    self._offset = 0
                file.seek(self._offset)
                whole, newline, _ = file.read().rpartition(b"\n")
        except OSError:
            return []
        self._offset += len(whole) + len(newline)
        found = []
        for raw in whole.split(b"\n"):
            if not raw.strip() or raw in self._seen:
                continue
            self._seen.add(raw)
            with contextlib.suppress(ValueError):
                line = json.loads(raw)
                if isinstance(line, dict):
                    found.append(line)
        return found


def duration(seconds: float) -> str:
    """``34 s``, ``2 min 05 s``, ``1 h 12 min``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def _numbers(numbers: dict[str, Any]) -> str:
    parts = []
    for name in SHOWN:
        value = numbers.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            parts.append(_rate(value, name) if name.endswith("_per_s") else f"{name} {value:.4g}")
    return ", ".join(parts)


def _rate(value: float, name: str) -> str:
    """``8.0 samples/s``, ``1.2k tokens/s``."""
    unit = name.removesuffix("_per_s")
    if value >= 1000:
        scale, letter = (1e6, "M") if value >= 999_950 else (1e3, "k")
        return f"{value / scale:.1f}{letter} {unit}/s"
    return f"{value:.1f} {unit}/s"


def _rich_bar(stream: IO[str]) -> Any:
    from rich import progress as rich_progress
    from rich.console import Console

    return rich_progress.Progress(
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TextColumn("{task.fields[numbers]}"),
        rich_progress.TimeRemainingColumn(),
        console=Console(file=stream, force_terminal=True),
        refresh_per_second=4,
        transient=True,
    )
