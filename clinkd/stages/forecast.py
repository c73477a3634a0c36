"""How long the rest of a run takes, from its first seconds on.

Decisions:
- Each stage has expected seconds: its start, and its work in units that the configuration gives. Both were
  measured with the shipped configuration on two cores; only runs like it (synthetic images, models made
  here) get a forecast. For others ``clinkd plan --calibrate`` measures their own models.
- A machine's factor is measured at first by half a second of similar work, then by the stages that are done.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from clinkd.config import OptimSection, RunConfig

PROBE_S = 0.012
"""Seconds that ``probe`` takes on the machine where the constants below were measured."""
START_S = {"prepare": 13.0, "guide": 21.0, "teacher": 3.0, "label": 12.0, "distill": 3.0, "reflect": 19.0,
           "evaluate": 19.0}  # fmt: skip
DRAWN_S, GUIDED_S, SCORED_S = 0.0042, 0.0046, 0.0017
"""Seconds for an image: to draw it, to train the guide on it, to score its questions."""
ANSWER_S = 0.00067
"""Seconds for a question and a text layer of a training step, ``WORKERS`` at work."""
LABEL_S = 0.001
"""Seconds for an answer that the teacher labels."""
WORKERS = 2
TURNS = 9
"""Questions about a synthetic image."""


def expected(config: RunConfig) -> dict[str, float] | None:
    """Return the seconds of each stage on the machine of the constants, in the order of the stages.

    None for a run that the constants do not describe.
    """
    given = (config.model.path, config.teacher.path, config.guide.path)
    if config.data.source != "phantoms" or any(given) or config.compute.gpus_per_worker:
        return None
    images, guide = config.data.phantoms, config.guide
    work = {
        "prepare": images * DRAWN_S,
        "guide": guide.steps * guide.batch_size * GUIDED_S + images * SCORED_S,
        "teacher": _training(config, config.sft, config.teacher.tiny.layers),
        "label": config.distill.share * images * TURNS * LABEL_S,
        "distill": _training(config, config.distill.optim, config.model.tiny.layers),
        "reflect": config.reflect.rounds * _training(config, config.reflect.optim, config.model.tiny.layers),
        "evaluate": 0.0,
    }
    if not config.reflect.rounds:
        del work["reflect"]
    return {stage: START_S[stage] + seconds for stage, seconds in work.items()}


def _training(config: RunConfig, optim: OptimSection, layers: int) -> float:
    workers = config.compute.workers
    per_step = optim.batch_size * optim.accumulation * workers * optim.questions_per_image
    steps = optim.steps or math.ceil(optim.epochs * config.data.phantoms * TURNS / per_step)
    return steps * per_step * (layers + 1) * ANSWER_S * WORKERS / workers


def probe() -> float:
    """Return the fewest seconds of ten that a small matrix product and an activation take here."""
    import numpy as np

    rows, weights = np.ones((2048, 128), np.float32), np.ones((128, 384), np.float32)
    found = []
    for _ in range(10):
        begun = time.perf_counter()
        for _ in range(4):
            np.tanh(rows @ weights)
        found.append(time.perf_counter() - begun)
    return min(found)


class Forecast:
    """Seconds that are left of a run.

    Args:
        stages: expected seconds of each stage still to come. factor: of this machine on them.
    """

    def __init__(
        self, stages: dict[str, float], factor: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.stages, self.factor, self._clock = dict(stages), factor, clock
        self._current, self._begun = "", 0.0
        self._expected = self._taken = 10.0  # the first factor counts as ten seconds of evidence

    @property
    def _pace(self) -> float:
        return self.factor * self._taken / self._expected

    def begin(self, stage: str) -> None:
        """Note that a stage starts now."""
        self._current, self._begun = stage, self._clock()

    def end(self, stage: str, skipped: bool = False) -> None:
        """Note that a stage is done; one that was skipped says nothing about the machine."""
        seconds = self.stages.pop(stage, None)
        if seconds is not None and not skipped and stage == self._current:
            self._expected += seconds * self.factor
            self._taken += self._clock() - self._begun
        self._current = ""

    def left(self, step_seconds: float = 0.0) -> float:
        """Return the seconds left; ``step_seconds``: what the steps of the present stage still need."""
        rest = sum(seconds for stage, seconds in self.stages.items() if stage != self._current) * self._pace
        if self._current not in self.stages:
            return rest
        passed = self._clock() - self._begun
        return rest + max(self.stages[self._current] * self._pace - passed, step_seconds)
