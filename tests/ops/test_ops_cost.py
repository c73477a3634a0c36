"""Hours, prices, intervals."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clinkd.config import ConfigError
from clinkd.ops.cost import GPUS, accelerator, checkpoint_bytes, hours, interval, job_mtbf


def test_hours_are_operations_by_what_the_devices_reach() -> None:
    best, worst = hours(3600e15, 1e15, 2, (0.25, 0.5))
    assert (best, worst) == (1.0, 2.0)
    assert hours(0, 1e15, 1, (0.1, 0.2)) == (0, 0)


@pytest.mark.parametrize(
    "wrong", [(-1, 1, 1, (0.1, 0.2)), (1, 0, 1, (0.1, 0.2)), (1, 1, 0, (0.1, 0.2)), (1, 1, 1, (0.3, 0.2))]
)
def test_impossible_hours_are_refused(wrong: tuple) -> None:
    with pytest.raises(ValueError, match="cost"):
        hours(*wrong)


def test_young_and_dalys_interval() -> None:
    # A minute to write, a failure a day: sqrt(2 x 60 x 86400).
    assert interval(60, 24) == pytest.approx(3219.9, abs=0.1)
    assert interval(0, 24) == 0
    with pytest.raises(ValueError, match="interval"):
        interval(60, 0)


@given(st.floats(0.1, 1e4), st.floats(0.1, 1e5))
def test_no_other_interval_loses_less(write: float, mtbf: float) -> None:
    """First order: writing takes write / apart of the time, a failure loses half an interval."""

    def lost(apart: float) -> float:
        return write / apart + apart / 2 / (mtbf * 3600)

    best = interval(write, mtbf)
    assert lost(best) <= min(lost(best * factor) for factor in (0.5, 0.9, 1.1, 2.0)) * (1 + 1e-9)


def test_a_larger_job_fails_more_often_unless_the_user_knows() -> None:
    assert job_mtbf(16_384) == pytest.approx(3.05, abs=0.01)  # a failure every three hours, as published
    assert job_mtbf(8, given=5.0) == 5.0
    assert job_mtbf(0.5) == job_mtbf(1)


def test_the_users_price_goes_before_the_tables() -> None:
    assert accelerator("h100", 2.5).price == 2.5
    assert accelerator("h100") == GPUS["h100"]
    with pytest.raises(ConfigError, match="--gpu: unknown accelerator 'h1000'"):
        accelerator("h1000")


def test_a_checkpoint_holds_weights_and_the_optimisers_twelve_bytes() -> None:
    assert checkpoint_bytes(10, 5, 2) == 80
