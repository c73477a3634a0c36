"""Which samples each step was dealt is what the weights were trained on, whatever happened in between."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from clinkd.train.account import Account, dealt


def train(folder: Path, ranks: int, first: int, last: int) -> None:
    """Steps ``first`` to ``last`` by so many ranks, four samples a step."""
    accounts = [Account(folder, rank) for rank in range(ranks)]
    for account in accounts:
        account.begin(first - 1)
    for step in range(first, last + 1):
        for at in range(4):
            accounts[at * ranks // 4].deal([f"{step}-{at}"])
        for account in accounts:
            account.write(step)


def test_a_step_has_the_samples_of_all_ranks_in_the_ledgers_order(tmp_path: Path) -> None:
    train(tmp_path, 2, 1, 2)
    assert dealt(tmp_path) == {step: [f"{step}-{at}" for at in range(4)] for step in (1, 2)}


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 9), st.integers(0, 9)), max_size=5))
def test_however_often_it_goes_on_each_step_stands_once(tmp_path_factory, attempts) -> None:
    """Attempts of (ranks, steps taken, steps before the newest checkpoint)."""
    folder, reached = tmp_path_factory.mktemp("account"), 0
    for ranks, steps, back in attempts:
        start = max(0, reached - back)
        reached = start + steps
        train(folder, ranks, start + 1, reached)
    assert {step: sorted(samples) for step, samples in dealt(folder).items()} == {
        step: [f"{step}-{at}" for at in range(4)] for step in range(1, reached + 1)
    }


def test_a_line_cut_off_by_a_kill_is_taken_back(tmp_path: Path) -> None:
    train(tmp_path, 2, 1, 3)
    path = tmp_path / "samples-1.jsonl"
    path.write_text(path.read_text()[:-9])
    train(tmp_path, 2, 3, 4)
    assert [len(samples) for samples in dealt(tmp_path).values()] == [4, 4, 4, 4]


def test_samples_of_a_step_that_never_ended_are_not_the_next_ones(tmp_path: Path) -> None:
    account = Account(tmp_path, 0)
    account.deal(["lost"])
    account.begin(0)
    account.deal(["a"])
    account.write(1)
    assert dealt(tmp_path) == {1: ["a"]}
