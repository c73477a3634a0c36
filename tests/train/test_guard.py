"""What training says and does about what goes wrong without an error."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clinkd.config import WatchSection
from clinkd.data.shards import DataError
from clinkd.train.guard import AGAIN, ENOUGH, FAILING, Guard, Rollback


def guard(folder: Path, **options: Any) -> Guard:
    return Guard(WatchSection(**options), "distill", folder / "events.jsonl")


def calm(watch: Guard, first: int = 1, count: int = ENOUGH, loss: float = 1.0) -> int:
    """Steps in which nothing happens; returns the next one."""
    for step in range(first, first + count):
        watch.step(step, loss, 0.1, [0.05, 0.05], True)
    return first + count


def events(folder: Path) -> list[tuple[str, int]]:
    path = folder / "events.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [(line["event"], line["step"]) for line in found]


@given(st.lists(st.floats(0.5, 9.0), max_size=60), st.lists(st.floats(0.02, 0.19), max_size=60))
def test_a_loss_and_a_pace_that_only_wander_say_nothing(losses: list[float], paces: list[float]) -> None:
    watch = Guard(WatchSection(), "distill", None)
    for step, (loss, pace) in enumerate(zip(losses, paces, strict=False), 1):
        watch.step(step, loss, pace, [0.1, 0.1], True)


def test_a_step_left_out_by_deepspeed_is_noted_and_training_goes_on(tmp_path: Path) -> None:
    watch = guard(tmp_path)
    step = calm(watch)
    watch.step(step, math.nan, 0.1, [0.05, 0.05], False)
    calm(watch, step + 1)
    assert events(tmp_path) == [("nonfinite", step)]


def test_weights_that_took_it_in_go_back_and_past_that_step(tmp_path: Path) -> None:
    watch = guard(tmp_path)
    with pytest.raises(Rollback) as back:
        watch.step(7, math.inf, 0.1, [0.05, 0.05], True)
    assert back.value.steps == [7] and events(tmp_path) == [("nonfinite", 7)]


@pytest.mark.parametrize("options", [{"nonfinite": "stop"}, {"patience": 1}])
def test_where_it_is_to_stop_the_error_says_what_to_do(tmp_path: Path, options: dict[str, Any]) -> None:
    watch = guard(tmp_path, **options)
    with pytest.raises(DataError, match=r"^distill: step \d: .* lower the learning rate"):
        for step in (1, 2):
            watch.step(step, math.nan, 0.1, [0.05], False)


@pytest.mark.parametrize("policy", ["note", "rollback", "stop"])
def test_a_loss_that_explodes(tmp_path: Path, policy: str) -> None:
    watch = guard(tmp_path, on_explosion=policy)
    step = calm(watch)
    watch.step(step, 50.0, 0.1, [0.05, 0.05], True)  # one alone is a hard batch
    step = calm(watch, step + 1)
    wild = list(range(step, step + FAILING))
    for each in wild[:-1]:
        watch.step(each, 50.0, 0.1, [0.05, 0.05], True)
    assert events(tmp_path) == []
    last = (wild[-1], 50.0, 0.1, [0.05, 0.05], True)
    if policy == "note":
        watch.step(*last)
    else:
        with pytest.raises(DataError if policy == "stop" else Rollback) as caught:
            watch.step(*last)
        assert policy == "stop" or caught.value.steps == wild
    assert events(tmp_path) == ([] if policy == "stop" else [("explosion", wild[-1])])


def test_it_goes_back_three_times_and_no_more(tmp_path: Path) -> None:
    watch = guard(tmp_path, patience=50)
    for step in range(1, FAILING + 1):
        with pytest.raises(Rollback):
            watch.step(step, math.nan, 0.1, [0.05], True)
    with pytest.raises(DataError, match="after 3 returns to a checkpoint"):
        watch.step(9, math.nan, 0.1, [0.05], True)


def test_a_slow_step_and_a_rank_that_falls_behind_are_said_once_in_a_while(tmp_path: Path) -> None:
    watch = guard(tmp_path)
    step = calm(watch)
    watch.step(step, 1.0, 2.0, [0.05, 0.05, 0.05], True)
    watch.step(step + 1, 1.0, 2.0, [0.05, 0.05, 0.05], True)
    assert events(tmp_path) == [("slow", step)]
    for late in range(step + 2, step + 2 + 2 * AGAIN):
        watch.step(late, 1.0, 0.1, [0.05, 0.3, 0.05], True)
    assert events(tmp_path)[1:] == [
        ("lag", step + 1 + ENOUGH), ("lag", step + 1 + ENOUGH + AGAIN)
    ]  # fmt: skip


def test_little_room_is_said_before_a_checkpoint(tmp_path: Path) -> None:
    watch = guard(tmp_path)
    watch.resources(100, tmp_path, 1)
    assert ("disk", 100) not in events(tmp_path)
    watch.resources(200, tmp_path, 1 << 60)
    assert ("disk", 200) in events(tmp_path)
