"""What Ray Tune drives: an actor that trains a trial rung by rung and stays for the next one.

Ray Tune saves only where it may clone (population based training), and what it saves are a few lines: the
weights lie where they were trained.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ray import tune

from clinkd import cluster
from clinkd.config import check_config
from clinkd.stages.base import write_whole
from clinkd.tune.member import Member
from clinkd.tune.study import sweep_folder
from clinkd.tune.trial import Trial, Warm

LINEAGE = "lineage.json"


class SweepTrial(tune.Trainable):
    """``step`` is a rung; what is warm ends with the actor, which Ray Tune ends when no trial is left."""

    def setup(self, config: dict[str, Any], base: dict[str, Any], local: bool) -> None:  # type: ignore[override]
        cluster.adopt(local)
        self._base = check_config(base, "sweep")
        self._warm = Warm(sweep_folder(self._base) / "workers")
        self.reset_config(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        chosen = new_config.get("trial", new_config)
        kind = Member if self._base.sweep.population else Trial
        self._trial = kind(dict(chosen["values"]), self._base, self._warm, chosen["number"])
        return True

    def step(self) -> dict[str, Any]:
        return self._trial.advance()

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        facts = self._trial.hand_on() if isinstance(self._trial, Member) else {}
        write_whole(Path(checkpoint_dir) / LINEAGE, json.dumps(facts))

    def load_checkpoint(self, checkpoint: Any) -> None:
        if isinstance(self._trial, Member):
            self._trial.take(json.loads((Path(checkpoint) / LINEAGE).read_text()))

    def cleanup(self) -> None:
        self._warm.close()
