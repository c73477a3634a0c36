"""The stages in their order."""

from __future__ import annotations

from pathlib import Path

from clinkd.artifacts import Artifact
from clinkd.config import ConfigError, RunConfig, load_config
from clinkd.stages import outcome, training
from clinkd.stages.base import Run, open_run
from clinkd.stages.guide import guide
from clinkd.stages.label import label
from clinkd.stages.online import asks_teacher
from clinkd.stages.prepare import prepare
from clinkd.stages.reflection import reflect

TRAINED = ("guide", "teacher", "distill", "reflect")


def run(config: RunConfig) -> Path:
    """The whole way of the data; returns the report.

    Raises:
        ConfigError, DataError: a user's mistake, found before the stage that would meet it where possible.
    """
    with open_run(config) as current:
        current.forecast_all()
        learn(current)
        return finish(current)


def finish(current: Run) -> Path:
    """Evaluation and report of a run that has learnt."""
    student = "reflect" if current.config.reflect.rounds else "distill"
    outcome.evaluate(current, student)
    outcome.keep_model(current, student)
    return outcome.report(current)


def run_to(config: RunConfig, last: str) -> Artifact:
    """All stages up to and with ``last``."""
    order = [prepare, guide, training.teacher, label, training.distill, reflect]
    if last != "label" and not asks_teacher(config.distill):
        order.remove(label)
    names = [stage.__name__ for stage in order]
    with open_run(config) as current:
        for stage in order[: names.index(last) + 1]:
            artifact = stage(current)
        return artifact


def report_again(folder: Path) -> Path:
    """The report of a finished run, from what is kept.

    Raises:
        ConfigError: the folder is no run's, or the run is not finished.
    """
    if not (folder / "config.yaml").is_file() or not (folder / "eval.json").is_file():
        raise ConfigError(
            f"{folder}: no finished run there (config.yaml and eval.json); `clinkd run` makes one"
        )
    config = load_config(folder / "config.yaml", [f"run.root={folder.resolve().parent}"])
    with open_run(config) as current:
        learn(current)
        return finish(current)


def learn(current: Run) -> None:
    """All stages that come before the evaluation."""
    share(current)
    training.distill(current)
    if current.config.reflect.rounds:
        reflect(current)


def share(current: Run) -> None:
    """The stages that a sweep's trials have in common."""
    prepare(current)
    guide(current)
    training.teacher(current)
    if asks_teacher(current.config.distill):
        label(current)
