"""The bar falls from a high quantile of the margins to a low one, and never rises."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from clinkd.distill.curriculum import admitted_margin

margins = hnp.arrays(np.float64, st.integers(1, 40), elements=st.floats(0, 1))
quantiles = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(sorted)


def test_it_falls_linearly_in_the_quantile():
    values = np.linspace(0, 1, 101)
    bars = [admitted_margin(step, 11, values, 0.8, 0.0) for step in (0, 5, 10)]
    assert bars == pytest.approx([0.8, 0.4, 0.0])


@given(values=margins, pair=quantiles, total=st.integers(1, 30))
def test_the_bar_is_a_margin_never_rises_and_admits_the_share(values, pair, total):
    end, start = pair
    bars = [admitted_margin(step, total, values, start, end) for step in range(total)]
    assert all(bar in values for bar in bars)
    assert all(later <= earlier for earlier, later in pairwise(bars))
    assert np.mean(values >= bars[-1]) >= 1 - end - 1e-9


@given(values=margins, start=st.floats(0, 1), total=st.integers(1, 30))
def test_with_an_end_quantile_of_zero_every_sample_has_its_turn(values, start, total):
    assert (values >= admitted_margin(total - 1, total, values, start, 0.0)).all()


@given(values=margins, pair=quantiles, step=st.integers(0, 9), seed=st.integers(0, 9))
def test_the_order_of_the_samples_does_not_matter(values, pair, step, seed):
    shuffled = np.random.default_rng(seed).permutation(values)
    end, start = pair
    assert admitted_margin(step, 10, values, start, end) == admitted_margin(step, 10, shuffled, start, end)


def test_steps_outside_the_stage_count_as_its_ends():
    values = np.arange(10) / 10
    assert admitted_margin(-5, 10, values, 0.5, 0.1) == admitted_margin(0, 10, values, 0.5, 0.1)
    assert admitted_margin(99, 10, values, 0.5, 0.1) == admitted_margin(9, 10, values, 0.5, 0.1)
    assert admitted_margin(0, 1, values, 0.5, 0.0) == 0.0  # a stage of one step is at its end


def test_without_margins_nothing_waits():
    assert admitted_margin(3, 10, np.array([]), 0.9, 0.1) == -math.inf


@pytest.mark.parametrize(
    "step, total, values, start, end",
    [
        (0, 10, [0.5], 0.1, 0.9),  # it would rise
        (0, 10, [0.5], 1.1, 0.0),
        (0, 10, [0.5], 0.5, -0.1),
        (0, 10, [0.5], math.nan, 0.0),
        (0, 0, [0.5], 0.9, 0.1),
        (0, 10, [0.5, math.nan], 0.9, 0.1),
    ],
)
def test_what_it_refuses(step, total, values, start, end):
    with pytest.raises(ValueError, match="curriculum"):
        admitted_margin(step, total, np.array(values), start, end)
