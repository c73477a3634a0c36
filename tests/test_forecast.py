"""The time that is left of a run: expected, measured, corrected by what the stages took."""

from clinkd.config import RunConfig
from clinkd.stages.forecast import Forecast, expected, probe


def test_only_runs_that_the_constants_describe_have_a_forecast() -> None:
    stages = expected(RunConfig.model_validate({}))
    assert stages is not None and list(stages)[:2] == ["prepare", "guide"] and min(stages.values()) > 0
    for other in (
        {"data": {"source": "/lab"}},
        {"model": {"path": "/qwen"}},
        {"compute": {"gpus_per_worker": 1}},
    ):
        assert expected(RunConfig.model_validate(other)) is None


def test_more_steps_take_longer_and_no_rounds_take_nothing() -> None:
    few, many = (expected(RunConfig.model_validate({"sft": {"steps": steps}})) for steps in (10, 1000))
    assert few is not None and many is not None and few["teacher"] < many["teacher"]
    none = expected(RunConfig.model_validate({"reflect": {"rounds": 0}}))
    assert none is not None and "reflect" not in none


def test_what_is_left_falls_with_time_and_follows_the_machines_pace() -> None:
    now = [0.0]
    forecast = Forecast({"one": 10, "two": 20}, factor=2.0, clock=lambda: now[0])
    assert forecast.left() == 60
    forecast.begin("one")
    now[0] = 5
    assert forecast.left() == 55
    assert forecast.left(step_seconds=30) == 70  # its steps need longer than was expected
    now[0] = 60  # three times the 20 s that were expected
    forecast.end("one")
    assert 80 < forecast.left() < 120  # more than the 40 s of before, less than three times as many
    forecast.begin("two")
    now[0] = 1000
    assert forecast.left() == 0


def test_a_stage_that_is_skipped_costs_nothing_and_says_nothing_of_the_machine() -> None:
    now = [0.0]
    forecast = Forecast({"one": 10, "two": 20}, factor=1.0, clock=lambda: now[0])
    forecast.begin("one")
    forecast.end("one", skipped=True)
    assert forecast.left() == 20


def test_the_probe_measures_something() -> None:
    assert 0 < probe() < 60
