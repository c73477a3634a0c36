"""A trial of a population: it may go on from another's weights, under values that change under way.

Decisions:
- What a member was, and was cloned from, is its lineage, which is in the fingerprints of its stages: a model
  trained under changing settings never stands in the store for one trained under the last of them.
- Every rung is remembered under all that led to it (lineage and values). Who is cloned by whom follows from
  scores and the seed, so a population that was cut off is played again: the rungs that were reached are there
  at once, and training goes on behind them.
- Checkpoints of its last two rungs stay, since others may be a rung behind it; older ones are deleted.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clinkd import storage
from clinkd.artifacts import fingerprint
from clinkd.config import RunConfig
from clinkd.stages.base import Run, write_whole
from clinkd.tune.study import sweep_folder
from clinkd.tune.trial import Trial

KEPT = 2
"""Rungs of a member whose checkpoints stay."""


class Segments:
    """A member's rungs, in a file of the sweep's folder; each ``{"key", "told", "reached", "weights"}``."""

    def __init__(self, config: RunConfig, number: int) -> None:
        self.path = sweep_folder(config) / "population" / f"{number}.json"
        self.runs = Path(config.run.root).resolve()
        self._rungs: list[dict[str, Any]] = json.loads(self.path.read_text()) if self.path.is_file() else []

    def find(self, key: str) -> dict[str, Any] | None:
        return next((rung for rung in self._rungs if rung["key"] == key), None)

    def keep(self, rung: dict[str, Any]) -> None:
        """Notes a rung; then what no member can begin from any more goes."""
        self._rungs.append(rung)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(self.path, json.dumps(self._rungs))
        self._discard(len(self._rungs) - KEPT)

    def discard(self) -> None:
        """Deletes what is left of its drafts: the population is at its end."""
        self._discard(len(self._rungs))

    def _discard(self, before: int) -> None:
        drafts = [rung["told"]["draft"] for rung in self._rungs]
        for draft in set(drafts[: max(0, before)]) - set(drafts[max(0, before) :]) - {""}:
            if Path(draft).resolve().is_relative_to(self.runs):
                shutil.rmtree(draft, ignore_errors=True)


@dataclass
class Member(Trial):
    """A trial that can hand on its weights; ``lineage``: digests of what it began from, oldest first."""

    lineage: list[str] = field(default_factory=list)
    settings: list[dict[str, Any]] = field(default_factory=list)  # values, each with the step they hold from
    cloned: dict[str, Any] | None = None  # the checkpoint it began from, until the next rung tells of it
    weights: str = ""  # SHA-256 of the checkpoint of the last rung
    lost: bool = False  # whether the checkpoint that it was to begin from is gone

    def __post_init__(self) -> None:
        self.settings = self.settings or [{"from": 0, "values": self.values}]

    @property
    def key(self) -> str:
        """Names the next rung by all that leads to it."""
        return fingerprint("segment", {}, self.salt() | {"values": self.values, "after": self.step})

    def advance(self) -> dict[str, Any]:
        """As of any trial, with all ``settings`` that made it, and what it was ``cloned`` from, as JSON.

        Raises:
            RuntimeError: the checkpoint that it would go on from is gone.
        """
        segments, key = Segments(self.base, self.number), self.key  # before it trains, which moves on
        found = segments.find(key)
        if found is None:
            if self.lost:
                raise RuntimeError(
                    f"trial {self.number} of the population: its checkpoint of step {self.step} is gone; "
                    f"put {sweep_folder(self.base)} away to begin anew"
                )
            told = super().advance() | {"settings": json.dumps(self.settings)}
            told["cloned"] = json.dumps(self.cloned) if self.cloned else ""
            weights = digest(self.reached) if self.reached else ""
            found = {"key": key, "told": told, "reached": str(self.reached or ""), "weights": weights}
            segments.keep(found)
        self._begin_from(None)
        self.cloned, self.lost, told = None, False, found["told"]
        self.step, self.weights = told["step"], found["weights"]
        self.reached = Path(found["reached"]) if found["reached"] else None
        return dict(told)

    def salt(self) -> dict[str, Any]:
        return {"lineage": self.lineage, "member": self.number, "grace": self.base.sweep.grace}

    def _rung(self, run: Run, target: int, total: int) -> tuple[int, dict[str, float]]:
        reached, scores = super()._rung(run, target, total)
        if self.cloned is not None:
            self.cloned |= self._first(self.draft or run.done["distill"].path)
        return reached, scores

    def _scored(self, run: Run, target: int, total: int) -> tuple[int, dict[str, float]]:
        return self._rung(run, target, total)  # what is known of it is in its segments

    def _first(self, made: Path) -> dict[str, Any]:
        """Of the first step after a clone: its number and its learning rate; and the values from there on."""
        first = json.loads((made / "metrics.jsonl").read_text().splitlines()[0])
        return {"values": self.values, "first_step": first["step"], "first_lr": first["lr"]}

    def _begin_from(self, start: Path | None) -> None:
        if self.start is not None:
            shutil.rmtree(self.start.parent, ignore_errors=True)
        self.start = start

    def hand_on(self) -> dict[str, Any]:
        """What itself, or another, goes on from."""
        return {
            "trial": self.number, "step": self.step, "lineage": self.lineage, "values": self.values,
            "settings": self.settings, "weights": self.weights, "checkpoint": str(self.reached or ""),
        }  # fmt: skip

    def take(self, facts: dict[str, Any]) -> None:
        """Goes on from what a member handed on: itself after a pause, or a better one, under own values."""
        if not facts["step"]:
            return
        checkpoint = Path(facts["checkpoint"])
        copied = None
        if facts["checkpoint"] and checkpoint.is_dir():
            copied = shutil.copytree(checkpoint, Path(tempfile.mkdtemp(prefix="clinkd-")) / checkpoint.name)
        self._begin_from(copied)
        self.lost = copied is None
        self.step = facts["step"]
        led = {key: facts[key] for key in ("trial", "step", "lineage", "values", "weights")}
        self.lineage = [*facts["lineage"], fingerprint("clone", {}, led)]
        changed = self.values != facts["values"]
        self.settings = facts["settings"] + ([{"from": self.step, "values": self.values}] if changed else [])
        if facts["trial"] != self.number:
            self.cloned = {
                "trial": self.number, "from": facts["trial"], "step": self.step,
                "source": facts["weights"], "weights": digest(copied) if copied else facts["weights"],
            }  # fmt: skip


def digest(folder: Path) -> str:
    """SHA-256 over the names and the content of a checkpoint's files."""
    total = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        total.update(f"{file.relative_to(folder)} {storage.sha256(file)}\n".encode())
    return total.hexdigest()
