"""One trial of a sweep, rung by rung, in an actor of Ray Tune's that stays for the next trial.

Decisions:
- A rung is a training job that ends early: the next one goes on from its checkpoint, exactly as after a kill.
  So a trial that is stopped, killed, moved to another node or cloned needs no way of its own.
- What an actor keeps warm (training workers, desks that answer) passes from trial to trial; it ends with the
  actor, which Ray Tune ends when no trial is left for it.
- Scores come from the validation split: the test split is for the one configuration that is chosen.
- A clone (population based training) has its own lineage in the fingerprints of its stages: a model trained
  under changing settings never stands in the store for one trained under the last of them.
- Who a trial is says Ray Tune's id of it: of a clone, everything in its configuration is the other's.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ray import tune

from clinkd import cluster, storage
from clinkd.artifacts import ArtifactBusy, fingerprint
from clinkd.config import RunConfig, check_config
from clinkd.stages import outcome, pipeline, training
from clinkd.stages.asking import Desks, Records
from clinkd.stages.base import Run, open_run, write_whole
from clinkd.stages.reflection import reflect
from clinkd.train.checkpoint import Checkpoints
from clinkd.train.crew import Crew
from clinkd.tune.space import reflects, rungs, trial_config

RUNGS = "rungs.json"
LINEAGE = "lineage.json"


@dataclass
class Warm:
    """What stays from trial to trial: training workers and desks."""

    folder: Path
    crew: Crew | None = None
    desks: Desks | None = None
    records: Records | None = None

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

    def records_for(self, run: Run) -> Records:
        data = run.done["prepare"].path
        if self.records is None or self.records.data != data:
            self.records = Records(data, run.blocks)
        return self.records

    def close(self) -> None:
        if self.desks is not None:
            self.desks.close()
        if self.crew is not None:
            self.crew.close()
            shutil.rmtree(self.crew.storage, ignore_errors=True)
        self.crew = self.desks = None


@dataclass
class Trial:
    """Values under trial; ``lineage``: what it was cloned from, oldest first."""

    values: dict[str, Any]
    base: RunConfig
    warm: Warm
    key: str = ""  # Ray Tune's id of it
    lineage: list[str] = field(default_factory=list)
    settings: list[dict[str, Any]] = field(default_factory=list)  # values, each with the step they hold from
    start: Path | None = None  # a checkpoint to begin from
    step: int = 0
    cloned: dict[str, Any] | None = None  # the checkpoint it began from, until the next rung tells of it
    reached: Path | None = None  # the checkpoint of the last rung, where that was not the end
    draft: Path | None = None  # the unfinished artifact
    model: Path | None = None  # the student, once it is at its end

    def __post_init__(self) -> None:
        self.settings = self.settings or [{"from": 0, "values": self.values}]

    def advance(self) -> dict[str, Any]:
        """Trains to the next rung; returns its scores, ``step`` and whether it was the last (``done``)."""
        config = trial_config(self.values, self.base)
        with open_run(config, stream=open(os.devnull, "w")) as run:
            run.lend(self.warm.crew_for(config))
            run.salt = {"lineage": self.lineage} if self.base.sweep.scheduler == "pbt" else {}
            _patiently(lambda: pipeline.share(run))
            total = training.distill_steps(run)
            target = next(rung for rung in rungs(self.base, total) if rung > self.step)
            known = self._known(run)
            if str(target) not in known:
                target, known[str(target)] = self._rung(run, target, total)
                write_whole(run.folder / RUNGS, json.dumps(known))
            self.step = target
            return known[str(target)] | {
                "step": target, "total": total, "done": target == total, "draft": str(self.draft or ""),
                "model": str(self.model or ""), "settings": json.dumps(self.settings),
                "cloned": self._told_clone(),
            }  # fmt: skip

    def _known(self, run: Run) -> dict[str, Any]:
        """Scores at rungs that were reached before a kill."""
        path = run.folder / RUNGS
        if self.base.sweep.scheduler == "pbt" or not path.is_file():
            return {}
        return dict(json.loads(path.read_text()))

    def _rung(self, run: Run, target: int, total: int) -> tuple[int, dict[str, float]]:
        """The step reached, and the scores there; a student that was made before is at its end at once."""
        self.reached, last = None, False
        try:
            # A population's trial cannot go on where another driver left it: that was another population.
            fresh = self.base.sweep.scheduler == "pbt" and self.step == 0
            model = _patiently(lambda: training.distill(run, target, self.start, fresh)).path / "model"
            target, last = total, True
        except training.Paused as paused:
            model, self.reached = paused.model, newest(paused.checkpoint)
            self.draft = paused.checkpoint.parent.parent
        if self.start is not None:
            shutil.rmtree(self.start.parent, ignore_errors=True)
            self.start = None
        if last and reflects(self.values, run.config):
            _patiently(lambda: reflect(run))
            model = run.done["reflect"].path / "model"
        self.model = model if last else None
        if last and self.base.sweep.test:
            outcome.evaluate(run, "reflect" if "reflect" in run.done else "distill")
        scores = outcome.validate(
            run, model, self.base.sweep.questions, self.warm.desks_for(run), self.warm.records_for(run),
            self.base.sweep.metrics,
        )  # fmt: skip
        if self.cloned is not None:
            self.cloned |= self._first(run.done["distill"].path if last else self.draft)
        if not last:
            shutil.rmtree(model, ignore_errors=True)
        return target, scores

    def _first(self, made: Path | None) -> dict[str, Any]:
        """Of the first step after a clone: its number and its learning rate; and the values from there on."""
        assert made is not None
        first = json.loads((made / "metrics.jsonl").read_text().splitlines()[0])
        return {"values": self.values, "first_step": first["step"], "first_lr": first["lr"]}

    def _told_clone(self) -> str:
        """What it was cloned from, for the driver, which notes it; empty where it was not."""
        told, self.cloned = self.cloned, None
        return json.dumps(told) if told else ""


def newest(folder: Path) -> Path | None:
    """The last checkpoint in a folder of them."""
    return Checkpoints(folder, 0, lambda: None).newest()


def digest(folder: Path) -> str:
    """SHA-256 over the names and the content of a checkpoint's files."""
    total = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        total.update(f"{file.relative_to(folder)} {storage.sha256(file)}\n".encode())
    return total.hexdigest()


def _patiently(build: Any) -> Any:
    """Waits where another trial builds the same: two trials may share more than the sweep knows."""
    while True:
        try:
            return build()
        except ArtifactBusy:
            time.sleep(1.0)


class SweepTrial(tune.Trainable):
    """What Ray Tune drives: ``step`` is a rung."""

    def setup(self, config: dict[str, Any], base: dict[str, Any], local: bool) -> None:  # type: ignore[override]
        cluster.adopt(local)
        self._base = check_config(base, "sweep")
        folder = Path(self._base.run.root) / self._base.run.name / "sweep" / "workers"
        self._warm = Warm(folder)
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        chosen = new_config.get("trial", new_config)
        self._trial = Trial(dict(chosen["values"]), self._base, self._warm, self.trial_id)
        return True

    def step(self) -> dict[str, Any]:
        return self._trial.advance()

    # Ray Tune saves only where it may clone (population based training).

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        folder, trial = Path(checkpoint_dir), self._trial
        facts: dict[str, Any] = {
            "trial": trial.key, "step": trial.step, "lineage": trial.lineage, "values": trial.values,
            "settings": trial.settings,
        }  # fmt: skip
        if trial.reached is not None:
            shutil.copytree(trial.reached, folder / trial.reached.name)
            facts["weights"] = digest(folder / trial.reached.name)
        write_whole(folder / LINEAGE, json.dumps(facts))

    def load_checkpoint(self, checkpoint: Any) -> None:
        folder = Path(checkpoint)
        facts = json.loads((folder / LINEAGE).read_text())
        start = newest(folder)
        if start is None:
            return
        mark = fingerprint("clone", {}, facts)
        own = self._trial
        kept = Path(tempfile.mkdtemp(prefix="clinkd-")) / start.name  # Ray Tune's own folder may go
        own.start, own.step = shutil.copytree(start, kept), facts["step"]
        own.lineage = [*facts["lineage"], mark]
        changed = own.values != facts["values"]
        own.settings = facts["settings"] + ([{"from": own.step, "values": own.values}] if changed else [])
        if facts["trial"] != own.key:  # else it was only paused
            own.cloned = {
                "trial": own.key, "from": facts["trial"], "step": own.step,
                "source": facts["weights"], "weights": digest(own.start),
            }  # fmt: skip

    def cleanup(self) -> None:
        self._warm.close()
