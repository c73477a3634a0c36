"""What a run will do, before anything runs: optimiser steps, samples a step, answers that are generated.

Decisions:
- Only what follows from the configuration is said. Where a stage's length follows from the data (epochs), the
  plan says so; "at most" is said where the data may hold less.
"""

from __future__ import annotations

from collections.abc import Iterator

from clinkd.config import OptimSection, RunConfig
from clinkd.reflect.rounds import generations


def plan(config: RunConfig) -> str:
    """The plan as text, a line a fact."""
    return "\n".join([*_stages(config), *_reflection(config)])


def _stages(config: RunConfig) -> Iterator[str]:
    workers, rounds = config.compute.workers, config.reflect.rounds
    stages: list[tuple[str, OptimSection]] = [("distill", config.distill.optim)]
    if config.teacher.path is None:
        stages.insert(0, ("teacher", config.sft))
    if rounds and config.reflect.exercises is not None:
        stages.append(("corrector", config.reflect.exercises))
    stages += [(f"reflect-{number}", config.reflect.optim) for number in range(1, rounds + 1)]
    yield f"{'stage':12}{'steps':>22}{'images a step':>16}{'questions a step':>18}"
    for name, optim in stages:
        images = optim.batch_size * optim.accumulation * workers
        steps = f"{optim.steps:,}" if optim.steps else f"{optim.epochs:g} epochs of the data"
        yield f"{name:12}{steps:>22}{images:>16,}{f'<= {images * optim.questions_per_image:,}':>18}"


def _reflection(config: RunConfig) -> Iterator[str]:
    options = config.reflect
    if not options.rounds:
        return
    asked = generations(options, options.validation)
    yield (
        f"reflection: a round generates at most {asked['student']:,} answers of the student "
        f"({options.samples:,} before, {options.samples:,} after, {options.validation:,} of the validation "
        f"split) and {asked['corrector']:,} candidates of the corrector "
        f"({options.candidates} for each of {min(options.budget, options.samples):,} misses)"
    )
    yield f"reflection: at most {asked['whole']:,} answers in {options.rounds} rounds"
