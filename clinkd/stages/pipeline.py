"""The stages in their order."""

from __future__ import annotations

from pathlib import Path

from clinkd.config import RunConfig
from clinkd.stages import outcome, training
from clinkd.stages.base import Run, open_run
from clinkd.stages.guide import guide
from clinkd.stages.prepare import prepare
from clinkd.stages.reflection import reflect


def run(config: RunConfig) -> Path:
    """The whole way of the data; returns the report.

    Raises:
        ConfigError, DataError: a user's mistake, found before the stage that would meet it where possible.
    """
    with open_run(config) as current:
        learn(current)
        student = "reflect" if config.reflect.rounds else "distill"
        outcome.evaluate(current, student)
        return outcome.report(current)


def learn(current: Run) -> None:
    """All stages that come before the evaluation."""
    prepare(current)
    guide(current)
    training.teacher(current)
    training.label(current)
    training.distill(current)
    if current.config.reflect.rounds:
        reflect(current)
