"""The plan of an epoch: every sample once, equal work, pure, resumable, also with other ranks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clinkd.data.plan import LengthIndex, PlanOptions, group_length, plan_epoch
from clinkd.data.shards import DataError


def index_of(counts: list[list[int]], seed: int = 0) -> LengthIndex:
    """Shards with row groups of so many records, each of one to four documents."""
    rng = np.random.default_rng(seed)
    place = [
        (shard, group, row)
        for shard, groups in enumerate(counts)
        for group, count in enumerate(groups)
        for row in range(count)
    ]
    lengths = [rng.integers(10, 60, rng.integers(1, 5)).tolist() for _ in place]
    return LengthIndex([f"r{at}" for at in range(len(place))], np.array(place), lengths)


SHARDS = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=4)
OPTIONS = st.builds(
    PlanOptions, seed=st.integers(0, 9), batch_size=st.integers(1, 4),
    tokens=st.sampled_from([None, 60, 150]), per_group=st.integers(1, 4), window=st.integers(1, 5),
)  # fmt: skip


def samples(batches) -> list[tuple[int, int]]:
    return [
        (record, document)
        for batch in batches
        for sequence in batch.sequences
        for record, documents in sequence
        for document in documents
    ]


def everything(index: LengthIndex) -> list[tuple[int, int]]:
    return [(record, at) for record, lengths in enumerate(index.lengths) for at in range(len(lengths))]


@settings(deadline=None)
@given(SHARDS, OPTIONS, st.integers(1, 5))
def test_every_sample_once_and_equally_many_batches(counts, options, world):
    index = index_of(counts)
    ranks = plan_epoch(index, options, 0, world)
    assert len(ranks) == world and len({len(rank) for rank in ranks}) == 1
    assert sorted(sample for rank in ranks for sample in samples(rank)) == everything(index)
    used = [sum(len(batch.sequences) for batch in rank) for rank in ranks]
    assert max(used) - min(used) <= 1
    for rank in ranks:
        for batch in rank:
            assert len(batch.sequences) <= options.batch_size
            for sequence in batch.sequences:
                whole = sum(group_length(index, group) for group in sequence)
                assert options.tokens is None or whole <= options.tokens
                assert all(len(documents) <= options.per_group for _, documents in sequence)


@settings(deadline=None)
@given(SHARDS, OPTIONS, st.integers(1, 3), st.integers(1, 3), st.integers(0, 5))
def test_other_ranks_go_on_with_what_is_left(counts, options, before, after, rounds):
    index = index_of(counts)
    first = plan_epoch(index, options, 1, before)
    rounds = min(rounds, len(first[0]))
    done = [sample for rank in first for sample in samples(rank[:rounds])]
    left = plan_epoch(index, options, 1, after, ((before, rounds),))
    assert sorted(done + [sample for rank in left for sample in samples(rank)]) == everything(index)


def test_epochs_and_seeds_differ_and_come_again():
    index, options = index_of([[8, 8], [8, 8]]), PlanOptions(0, 2)
    plans = [plan_epoch(index, options, epoch, 2) for epoch in (0, 1, 0)]
    assert plans[0] == plans[2] and samples(plans[0][0]) != samples(plans[1][0])
    assert plan_epoch(index, PlanOptions(1, 2), 0, 2) != plans[0]


def test_a_window_goes_whole_to_a_rank_and_mixes_its_row_groups():
    index, options = index_of([[8] * 8]), PlanOptions(0, 1, per_group=4, window=2)
    ranks = plan_epoch(index, options, 0, 2)
    groups = [{index.place[record][1] for record, _ in samples(rank)} for rank in ranks]
    assert len(groups[0]) == len(groups[1]) == 4 and not groups[0] & groups[1]
    first = [index.place[record][1] for record, _ in samples(ranks[0][:16])]
    assert len(set(first)) == 2 and first != sorted(first) and first != sorted(first, reverse=True)


def test_a_rank_without_work_gets_fillers():
    ranks = plan_epoch(index_of([[1]]), PlanOptions(0, 2, per_group=4), 0, 3)
    assert [[len(batch.sequences) for batch in rank] for rank in ranks] == [[1], [0], [0]]


def test_a_sample_too_long_is_named():
    with pytest.raises(DataError, match=r"record r0: a sample of \d+ tokens.*feed.pack_tokens is 5"):
        plan_epoch(index_of([[1]]), PlanOptions(0, 1, tokens=5), 0, 1)


def test_an_index_is_kept_whole(tmp_path):
    index = index_of([[3, 2], [4]])
    again = LengthIndex.read(index.write(tmp_path / "index.arrow"))
    assert again.ids == index.ids and again.lengths == index.lengths and (again.place == index.place).all()
