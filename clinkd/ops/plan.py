"""What a run will do, before anything runs: optimiser steps, samples a step, answers that are generated.

Decisions:
- Only what follows from the configuration is said. Where a stage's length follows from the data (epochs), the
  plan says so; "at most" is said where the data may hold less.
"""

from __future__ import annotations

from collections.abc import Iterator

from clinkd.config import OptimSection, RunConfig
from clinkd.reflect.rounds import generations
from clinkd.tune.space import reflects, rungs, trials_wanted


def plan(config: RunConfig) -> str:
    """The plan as text, a line a fact."""
    return "\n".join([*_stages(config), *_reflection(config), *_sweep(config)])


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


def _sweep(config: RunConfig) -> Iterator[str]:
    """What the trials of a sweep come to, at most."""
    options, optim, compute = config.sweep, config.distill.optim, config.compute
    if not options.space:
        return
    trials = trials_wanted(config)
    needs = f"{compute.workers * compute.cpus_per_worker:g} CPUs"
    if compute.gpus_per_worker:
        needs += f" and {compute.workers * compute.gpus_per_worker:g} GPUs"
    yield (
        f"sweep: {trials} trials over {len(options.space)} keys, each on {needs}; data, guide, teacher and "
        "cache are made once"
    )
    if optim.steps is None:
        yield f"sweep: a trial takes {optim.epochs:g} epochs of the data"
        return
    scored = rungs(config, optim.steps)
    extra = config.reflect.optim.steps if reflects(options.space, config) else 0
    steps = optim.steps + config.reflect.rounds * (extra or 0)
    yield (
        f"sweep: a trial takes at most {steps:,} training steps and is scored after {_listed(scored)}, on "
        f"{options.questions:,} validation questions each time; at most {trials * steps:,} steps in all "
        f"and {trials * len(scored) * options.questions:,} answers"
    )
    if options.scheduler in ("asha", "hyperband"):
        keep = 1 / options.reduction
        least = sum(
            (after - before) * max(1, round(trials * keep**at))
            for at, (before, after) in enumerate(zip([0, *scored], scored, strict=False))
        )
        yield f"sweep: with {options.scheduler}, about {least:,} steps, as one in {options.reduction} goes on"


def _listed(numbers: list[int]) -> str:
    """The first few of them."""
    return ", ".join(map(str, numbers[:6])) + (", …" if len(numbers) > 6 else "")


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
