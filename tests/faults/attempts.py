"""What each attempt at a run trained: where it was killed, where the next went on, which samples it had."""

from __future__ import annotations

import contextlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

from clinkd.train.account import dealt
from clinkd.train.guard import EVENTS

SETTLES = 1.5  # seconds in which what a process left behind is done; no worker is up again so soon


@dataclass(frozen=True)
class Stand:
    """Of a job when something was killed."""

    reached: int  # the last step that the metrics tell of
    newest: int  # the step of the newest checkpoint; 0: there is none
    resumed: list[int]  # steps that attempts so far went on from


def jobs(artifacts: Path) -> list[Path]:
    """Folders of finished jobs that trained, below ``artifacts``."""
    found = (path.parent.relative_to(artifacts) for path in artifacts.rglob("metrics.jsonl"))
    return sorted(path for path in found if not path.parts[0].endswith(".partial"))


class Attempts:
    """At one run, compared with an undisturbed one.

    Args:
        artifacts, calm: of this run and of the undisturbed one. every: steps between checkpoints.
    """

    def __init__(self, artifacts: Path, calm: Path, every: int) -> None:
        self.artifacts, self.calm, self.every = artifacts, calm, every
        self.stands: dict[Path, Stand] = {}

    def killed(self) -> str:
        """Compares what stands after a kill; says what the next attempt will repeat."""
        time.sleep(SETTLES)
        said = []
        for metrics in self.artifacts.rglob("metrics.jsonl"):
            artifact, *inner = metrics.parent.relative_to(self.artifacts).parts
            if not artifact.endswith(".partial"):
                continue
            job = Path(artifact.removesuffix(".partial"), *inner)
            stand = self._stand(metrics, self.artifacts / artifact)
            self._went_on(job, stand.resumed)
            assert stand.reached - stand.newest <= self.every, (job, stand)
            self._same_ledger(job, metrics.parent, stand.newest)
            self.stands[job] = stand
            said.append(f"step {stand.reached}, goes on from {stand.newest}")
        return "; ".join(said) or "nothing was trained"

    def finished(self, stage: str) -> bool:
        return any(not path.suffix for path in self.artifacts.glob(f"{stage}-*"))

    def reached(self, stage: str, since: float) -> int:
        """The last step of a stage under way, where it was taken after ``since``; else 0."""
        for metrics in self.artifacts.glob(f"{stage}-*.partial/**/metrics.jsonl"):
            with contextlib.suppress(FileNotFoundError):  # it is done this very moment
                lines = _whole_lines(metrics)
                if lines and metrics.stat().st_mtime > since:
                    return int(lines[-1]["step"])
        return 0

    def ended(self) -> None:
        """The run is done: where its last attempts went on."""
        for job, stand in self.stands.items():
            resumed = _resumed(self.artifacts / job / EVENTS)
            self._went_on(job, resumed)
            if stand.newest and not _finished(self.artifacts / job, stand):
                assert len(resumed) > len(stand.resumed), (job, stand)

    def _stand(self, metrics: Path, draft: Path) -> Stand:
        lines = _whole_lines(metrics)
        if not lines:
            return Stand(0, 0, _resumed(metrics.with_name(EVENTS)))
        checkpoints = (draft / "work" / lines[-1]["stage"]).glob("step-*")
        steps = [int(path.name.removeprefix("step-")) for path in checkpoints if not path.suffix]
        return Stand(lines[-1]["step"], max(steps, default=0), _resumed(metrics.with_name(EVENTS)))

    def _went_on(self, job: Path, resumed: list[int]) -> None:
        """Attempts since the last kill began where the newest checkpoint was."""
        before = self.stands.get(job)
        news = resumed[len(before.resumed) :] if before else resumed
        assert len(news) <= 1 and set(news) <= {before.newest if before else 0}, (job, before, resumed)

    def _same_ledger(self, job: Path, folder: Path, newest: int) -> None:
        """The checkpoint's steps had the samples that they have undisturbed."""
        kept = {step: samples for step, samples in dealt(folder).items() if step <= newest}
        wanted = {step: samples for step, samples in dealt(self.calm / job).items() if step <= newest}
        assert kept == wanted and len(kept) == newest, job


def samples_once_an_epoch(steps: dict[int, list[str]]) -> None:
    """Cut where each sample has had its turn, the order of a job's samples is epochs, each of all of them."""
    order = [sample for samples in steps.values() for sample in samples]
    size = len(set(order))
    for start in range(0, len(order), size):
        epoch = order[start : start + size]
        assert len(set(epoch)) == len(epoch), f"epoch {start // size}"


def _resumed(events: Path) -> list[int]:
    return [line["step"] for line in _whole_lines(events) if line["event"] == "resumed"]


def _finished(folder: Path, stand: Stand) -> bool:
    """Whether the job had been at its end already: what was killed was its artifact's making."""
    return stand.reached == _whole_lines(folder / "metrics.jsonl")[-1]["step"]


def _whole_lines(path: Path) -> list[dict]:
    if not path.is_file():
        return []
    whole = path.read_text().rpartition("\n")[0]  # a line may be half-written
    return [json.loads(line) for line in whole.splitlines()]
