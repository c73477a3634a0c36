"""What the trials of a sweep come to: steps, answers, hours.

Decisions:
- Hours are those of one trial after another: how many run at one time is the cluster's affair.
- What is made once (guide, teacher, labels) is told apart from the trials; the guide has no hours here, as in
  the rest of the plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from clinkd.config import RunConfig
from clinkd.ops import cost
from clinkd.tune.space import reflects, rungs, trials_wanted

if TYPE_CHECKING:
    from clinkd.ops.stages import Outlook

ONCE = ("teacher", "label")


def told(look: Outlook, rows: Sequence[dict[str, Any]], card: cost.Accelerator) -> Iterator[str]:
    """Lines about the sweep of a configuration; none where it sweeps nothing.

    Args:
        rows: the plan's stages, with hours.
    """
    config = look.config
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
        yield _hours(look, rows, card, trials, 1, 1.0)
        return
    scored = rungs(config, optim.steps)
    extra = config.reflect.optim.steps if reflects(options.space, config) else 0
    steps = optim.steps + config.reflect.rounds * (extra or 0)
    yield (
        f"sweep: a trial takes at most {steps:,} training steps and is scored after {_listed(scored)}, on "
        f"{options.questions:,} validation questions each time; at most {trials * steps:,} steps in all "
        f"and {trials * len(scored) * options.questions:,} answers"
    )
    share = 1.0
    if options.scheduler in ("asha", "hyperband"):
        keep = 1 / options.reduction
        least = sum(
            (after - before) * max(1, round(trials * keep**at))
            for at, (before, after) in enumerate(zip([0, *scored], scored, strict=False))
        )
        share = least / (trials * steps)
        yield f"sweep: with {options.scheduler}, about {least:,} steps, as one in {options.reduction} goes on"
    yield _hours(look, rows, card, trials, len(scored), share)


def _hours(
    look: Outlook,
    rows: Sequence[dict[str, Any]],
    card: cost.Accelerator,
    trials: int,
    rungs: int,
    share: float,
) -> str:
    """Of the trials, ``share`` of whose steps and rungs are taken, and of what they share."""
    config = look.config
    own, once = _parts(config, rows)
    scoring = look.hours(look.answer_flops(look.student, trials * rungs * config.sweep.questions), card)
    low, high = (share * (trials * sum(row["hours"][side] for row in own) + scoring[side]) for side in (0, 1))
    least, most = (sum(row["hours"][side] for row in once) for side in (0, 1))
    return (
        f"sweep: its trials take {low:.2g} to {high:.2g} hours one after the other, what they share "
        f"{least:.2g} to {most:.2g}"
    )


def _parts(
    config: RunConfig, rows: Sequence[dict[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Stages of each trial, and those that are made once: distillation too where only reflection differs."""
    space = config.sweep.space
    shared = all(key.startswith("reflect.") for key in space)
    own = [row for row in rows if row["name"].startswith("reflect")] if reflects(space, config) else []
    distill = [row for row in rows if row["name"] == "distill"]
    once = [row for row in rows if row["name"] in ONCE]
    return (own, once + distill) if shared else (own + distill, once)


def _listed(numbers: list[int]) -> str:
    """The first few of them."""
    return ", ".join(map(str, numbers[:6])) + (", …" if len(numbers) > 6 else "")
