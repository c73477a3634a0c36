"""Two runs on the same questions: paired by image, sure of itself only where it may be."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clinkd.evaluate.compare import compare

NEAR, FAR = "<box>(100,100),(300,300)</box>", "<box>(600,600),(900,900)</box>"


def run(hits: list[bool], task: str = "vg") -> list[dict[str, Any]]:
    """A row a question, two on each image."""
    right, wrong, truth = (NEAR, FAR, NEAR) if task == "vg" else ("Liver", "Spleen", "Liver")
    return [
        {"sample": f"r{number}#0", "task": task, "image": f"ct_{number // 2}.png", "annotation": truth,
         "response": right if hit else wrong, "id": number}
        for number, hit in enumerate(hits)
    ]  # fmt: skip


def drawn(seed: int, rate: float, count: int = 300) -> list[bool]:
    return (np.random.default_rng(seed).random(count) < rate).tolist()


def test_the_difference_is_that_of_the_recalls_with_an_interval_around_it() -> None:
    worse, better = drawn(0, 0.5), drawn(1, 0.7)
    found = compare([run(worse)], [run(better)])["tasks"]["vg"]["recall_at_50"]
    assert found["difference"] == pytest.approx(np.mean(better) - np.mean(worse))
    assert found["low"] < found["difference"] < found["high"] and found["low"] > 0
    assert found["p"] < 0.01 and found["spread"] == [None, None]
    back = compare([run(better)], [run(worse)])["tasks"]["vg"]["recall_at_50"]
    assert (back["low"], back["high"]) == pytest.approx((-found["high"], -found["low"]))
    assert back["p"] == found["p"]


def test_pairing_sees_a_small_difference_that_two_intervals_would_hide() -> None:
    hits = drawn(2, 0.5)
    better = [hit or number % 20 == 0 for number, hit in enumerate(hits)]  # a few more on the same images
    found = compare([run(hits)], [run(better)])["tasks"]["vg"]["recall_at_50"]
    assert 0 < found["difference"] < 0.06 and found["p"] < 0.05


@given(st.lists(st.booleans(), min_size=4, max_size=30))
def test_a_run_against_itself_is_no_difference(hits: list[bool]) -> None:
    for task in ("vg", "roc", "rc", "mia"):
        for found in compare([run(hits, task)], [run(hits, task)])["tasks"][task].values():
            assert found["difference"] in (0.0, None) and found["p"] in (1.0, None)


def test_runs_of_several_seeds_are_compared_by_their_mean() -> None:
    groups = [[run(drawn(seed, rate)) for seed in seeds] for rate, seeds in ((0.5, (3, 4, 5)), (0.6, (6, 7)))]
    found = compare(*groups)["tasks"]["vg"]["recall_at_50"]
    means = [np.mean([np.mean(drawn(seed, rate)) for seed in seeds])
             for rate, seeds in ((0.5, (3, 4, 5)), (0.6, (6, 7)))]  # fmt: skip
    assert (found["first"], found["second"]) == pytest.approx(means)
    assert all(spread > 0 for spread in found["spread"])


def test_only_what_all_answered_counts_in_whatever_order() -> None:
    hits = drawn(8, 0.5, 40)
    found = compare([run(hits)[10:]], [run(hits)[::-1][5:]])
    assert found["rows"] == {"vg": 25} and found["left_out"] == {"vg": 10}
    assert found["tasks"]["vg"]["recall_at_50"]["difference"] == 0


def test_a_row_that_cannot_be_scored_is_left_out_on_both_sides() -> None:
    hits = drawn(9, 0.5, 40)
    broken = [row | {"response": None} if number == 7 else row for number, row in enumerate(run(hits))]
    found = compare([run(hits)], [broken])
    assert found["rows"] == {"vg": 39} and found["left_out"] == {"vg": 1}
    assert found["tasks"]["vg"]["recall_at_50"]["difference"] == 0


def test_what_cannot_be_compared_says_so() -> None:
    with pytest.raises(ValueError, match="no question in common"):
        compare([run([True])], [[row | {"sample": "other#0"} for row in run([True])]])
    with pytest.raises(ValueError, match="either side"):
        compare([], [run([True])])
