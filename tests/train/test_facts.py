"""What distillation tells of its curriculum at a step: the bar that its batches are admitted by."""

from __future__ import annotations

import numpy as np
import pytest

from clinkd.train.distill_task import DistillSpec, DistillTask


def task(margins: list[float], start: float = 0.5, end: float = 0.0) -> DistillTask:
    """The task with the margins of a cache, and nothing of the model and data it would load."""
    made = object.__new__(DistillTask)
    made.margins = np.array(margins)
    made.distill = DistillSpec("", {}, start, end)
    return made


def test_the_bar_falls_and_the_share_rises_to_all() -> None:
    made = task([0.1, 0.2, 0.3, 0.4, 0.5])
    facts = [made.facts(step, 5) for step in range(5)]
    assert facts[0] == {"admitted_margin": 0.3, "admitted_share": pytest.approx(0.6)}
    assert facts[-1] == {"admitted_margin": 0.1, "admitted_share": 1.0}
    shares = [fact["admitted_share"] for fact in facts]
    assert shares == sorted(shares)


def test_the_facts_are_of_the_bar_that_admits() -> None:
    made = task([0.9, 0.7, 0.2, 0.6], start=0.75)
    for step in range(4):
        bar = made.facts(step, 4)["admitted_margin"]
        assert bar == made.bar(step, 4)
        assert made.facts(step, 4)["admitted_share"] == (made.margins >= bar).mean()


def test_a_step_says_the_same_whenever_it_is_asked() -> None:
    made = task([0.5, 0.25, 0.75])
    later = made.facts(7, 9)
    made.facts(1, 9)
    assert made.facts(7, 9) == later
