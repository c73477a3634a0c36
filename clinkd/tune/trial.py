"""One trial of a sweep, rung by rung.

Decisions:
- A rung is a training job that ends early: the next one goes on from its checkpoint, exactly as after a kill.
  So a trial that is stopped, killed, moved to another node or cloned needs no way of its own.
- What a trial's process keeps warm (training workers, desks that answer) passes from trial to trial.
- Scores come from the validation split: the test split is for the one configuration that is chosen.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clinkd.artifacts import ArtifactBusy
from clinkd.config import RunConfig
from clinkd.stages import outcome, pipeline, training
from clinkd.stages.asking import Desks
from clinkd.stages.base import Run, open_run, write_whole
from clinkd.stages.reflection import reflect
from clinkd.train.checkpoint import Checkpoints
from clinkd.train.crew import Crew
from clinkd.tune.space import reflects, rungs, trial_config

RUNGS = "rungs.json"


@dataclass
class Warm:
    """What stays from trial to trial: training workers and desks."""

    folder: Path
    crew: Crew | None = None
    desks: Desks | None = None

    def crew_for(self, config: RunConfig) -> Crew:
        if self.crew is not None and self.crew.compute != config.compute:
            self.close()
        if self.crew is None:
            self.crew = Crew(config.compute, self.folder / f"crew-{os.getpid()}")
        return self.crew

    def desks_for(self, run: Run) -> Desks:
        if self.desks is None:
            self.desks = Desks.of(run)
        self.desks.progress = run.progress
        return self.desks

    def close(self) -> None:
        if self.desks is not None:
            self.desks.close()
        if self.crew is not None:
            self.crew.close()
            shutil.rmtree(self.crew.storage, ignore_errors=True)
        self.crew = self.desks = None


@dataclass
class Trial:
    """Values under trial; ``number``: of the study's trial."""

    values: dict[str, Any]
    base: RunConfig
    warm: Warm
    number: int = 0
    start: Path | None = None  # a checkpoint to begin from
    step: int = 0
    reached: Path | None = None  # the checkpoint of the last rung, where that was not the end
    draft: Path | None = None  # the unfinished artifact
    model: Path | None = None  # the student, once it is at its end

    def advance(self) -> dict[str, Any]:
        """Trains to the next rung; returns its scores, ``step`` and whether it was the last (``done``)."""
        config = trial_config(self.values, self.base)
        with open_run(config, stream=open(os.devnull, "w")) as run:
            run.lend(self.warm.crew_for(config))
            run.salt = self.salt()
            _patiently(lambda: pipeline.share(run))
            total = training.distill_steps(run)
            target = next(rung for rung in rungs(self.base, total) if rung > self.step)
            self.step, scores = self._scored(run, target, total)
            return scores | {
                "step": self.step, "total": total, "done": self.step == total, "draft": str(self.draft or ""),
                "model": str(self.model or ""),
            }  # fmt: skip

    def salt(self) -> dict[str, Any]:
        """What makes the student another than its settings say."""
        return {}

    def _scored(self, run: Run, target: int, total: int) -> tuple[int, dict[str, float]]:
        """The step reached and its scores: trained, or as they were before a kill."""
        path = run.folder / RUNGS
        known = dict(json.loads(path.read_text())) if path.is_file() else {}
        if str(target) not in known:
            target, known[str(target)] = self._rung(run, target, total)
            write_whole(path, json.dumps(known))
        return target, known[str(target)]

    def _rung(self, run: Run, target: int, total: int) -> tuple[int, dict[str, float]]:
        """The step reached, and the scores there; a student that was made before is at its end at once."""
        self.reached, last = None, False
        try:
            model = _patiently(lambda: training.distill(run, target, self.start)).path / "model"
            target, last = total, True
            self.draft = None
        except training.Paused as paused:
            model, self.reached = paused.model, newest(paused.checkpoint)
            self.draft = paused.checkpoint.parent.parent
        if last and reflects(self.values, run.config):
            _patiently(lambda: reflect(run))
            model = run.done["reflect"].path / "model"
        self.model = model if last else None
        if last and self.base.sweep.test:
            outcome.evaluate(run, "reflect" if "reflect" in run.done else "distill")
        scores = outcome.validate(
            run, model, self.base.sweep.questions, self.warm.desks_for(run),
            self.base.sweep.metrics,
        )  # fmt: skip
        if not last:
            shutil.rmtree(model, ignore_errors=True)
        return target, scores


def newest(folder: Path) -> Path | None:
    """The last checkpoint in a folder of them."""
    return Checkpoints(folder, 0, lambda: None).newest()


def _patiently(build: Any) -> Any:
    """Waits where another trial builds the same: two trials may share more than the sweep knows."""
    while True:
        try:
            return build()
        except ArtifactBusy:
            time.sleep(1.0)
