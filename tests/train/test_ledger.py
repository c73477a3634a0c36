"""The ledger: every turn once an epoch, the same for any number of workers, resumable at any group."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clinkd.train.ledger import Ledger

TURNS = st.lists(st.integers(1, 9), min_size=1, max_size=12)


@given(TURNS, st.integers(1, 4), st.integers(0, 9), st.integers(0, 3))
def test_every_turn_is_in_exactly_one_group_of_an_epoch(turns, per_group, seed, epoch):
    ledger = Ledger(turns, per_group, seed)
    groups = ledger.epoch(epoch)
    assert len(groups) == ledger.groups_per_epoch
    assert all(1 <= len(chosen) <= per_group for _, chosen in groups)
    seen = Counter((record, turn) for record, chosen in groups for turn in chosen)
    assert seen == Counter((record, turn) for record, count in enumerate(turns) for turn in range(count))


@given(TURNS, st.integers(1, 3), st.integers(1, 3), st.integers(1, 4), st.integers(1, 8))
def test_workers_share_one_sequence(turns, per_group, world, batch, steps):
    ledger = Ledger(turns, per_group, 1)
    whole = ledger.take(0, world * batch * steps)
    shared = [
        group
        for step in range(steps)
        for rank in range(world)
        for group in Ledger(turns, per_group, 1).share(step * world * batch, rank, batch)
    ]
    assert shared == whole


@given(TURNS, st.integers(1, 4), st.integers(0, 30), st.integers(0, 30))
def test_the_sequence_is_one_epoch_after_the_other(turns, per_group, start, count):
    size = Ledger(turns, per_group, 3).groups_per_epoch
    epochs = [Ledger(turns, per_group, 3).epoch(number) for number in range((start + count) // size + 1)]
    whole = [group for epoch in epochs for group in epoch]
    taken = Ledger(turns, per_group, 3).take(start, count)
    assert taken == whole[start : start + count] and len(taken) == count


def test_it_is_short_to_print_however_much_it_keeps():
    ledger = Ledger([4, 2], 2, 0)
    before = repr(ledger)
    ledger.epoch(0)
    assert repr(ledger) == before


@given(TURNS, st.integers(0, 40), st.integers(0, 20))
def test_a_resumed_run_goes_on_with_exactly_the_rest(turns, start, count):
    assert Ledger(turns, 2, 5).take(0, start + count)[start:] == Ledger(turns, 2, 5).take(start, count)


def test_epochs_and_seeds_differ():
    first = Ledger([4] * 20, 2, 0)
    assert first.epoch(0) != first.epoch(1)
    assert first.epoch(0) != Ledger([4] * 20, 2, 1).epoch(0)


@pytest.mark.parametrize(("turns", "per_group"), [([], 1), ([0], 1), ([1], 0)])
def test_nothing_to_order_is_an_error(turns, per_group):
    with pytest.raises(ValueError, match="ledger"):
        Ledger(turns, per_group, 0)
