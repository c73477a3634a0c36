"""The sampler: every sample once an epoch, equal work, pure, and the same whoever works the lanes off."""

from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clinkd.data.index import RecordIndex
from clinkd.data.sampler import BatchSampler, Epoch, Position, SamplerOptions
from clinkd.data.shards import DataError


def index_of(counts: list[list[int]], seed: int = 0) -> RecordIndex:
    """Shards with row groups of so many records, each of one to four turns; a record's image is a byte."""
    rng = np.random.default_rng(seed)
    place = np.array(
        [
            (shard, group, row, count)
            for shard, groups in enumerate(counts)
            for group, count in enumerate(groups)
            for row in range(count)
        ],
        np.int32,
    )
    lengths = [rng.integers(10, 60, rng.integers(1, 5)).tolist() for _ in place]
    columns: dict[str, Any] = {name: place[:, at] for at, name in enumerate(("shard", "group", "row"))}
    columns |= {"turns": np.array([len(one) for one in lengths], np.int32), "group_bytes": place[:, 3]}
    listed = pa.array(lengths, pa.list_(pa.int32()))
    return RecordIndex(
        pa.table({"id": [f"r{at}" for at in range(len(place))]} | columns | {"lengths": listed})
    )


SHARDS = st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=4)
OPTIONS = st.builds(
    SamplerOptions, seed=st.integers(0, 9), batch_size=st.integers(1, 4),
    tokens=st.sampled_from([None, 60, 150]), per_group=st.integers(1, 4), window_bytes=st.integers(1, 40),
)  # fmt: skip


def lanes_of(epoch: Epoch, lanes: int) -> list[list[Any]]:
    return [[epoch.batch(lane, place) for place in range(epoch.rounds)] for lane in range(lanes)]


def samples(batches: list[Any]) -> list[tuple[int, int]]:
    return [
        (record, document)
        for batch in batches
        for record, documents in batch.groups
        for document in documents
    ]


def everything(index: RecordIndex) -> list[tuple[int, int]]:
    return [(record, at) for record, count in enumerate(index.documents.tolist()) for at in range(count)]


@settings(deadline=None)
@given(SHARDS, OPTIONS, st.integers(1, 5))
def test_every_sample_once_and_equally_many_batches(counts, options, lanes):
    index = index_of(counts)
    epoch = Epoch(index, options, 0, lanes)
    found = lanes_of(epoch, lanes)
    assert sorted(sample for lane in found for sample in samples(lane)) == everything(index)
    used = [sum(len(batch.sequences) for batch in lane) for lane in found]
    assert max(used) - min(used) <= 1
    starts = np.concatenate([[0], np.cumsum(index.documents)])
    for batch in (batch for lane in found for batch in lane):
        assert len(batch.sequences) <= options.batch_size
        for sequence in batch.sequences:
            whole = sum(index.lengths[starts[record] + at] for record, chosen in sequence for at in chosen)
            assert options.tokens is None or whole <= options.tokens
            assert options.tokens is not None or len(sequence) == 1
            assert all(len(documents) <= options.per_group for _, documents in sequence)


@settings(deadline=None)
@given(SHARDS, OPTIONS, st.integers(1, 4))
def test_rounds_are_known_without_a_plan(counts, options, lanes):
    sampler = BatchSampler(index_of(counts), options, lanes)
    assert [sampler.rounds(epoch) for epoch in (0, 1)] == [sampler.epoch(epoch).rounds for epoch in (0, 1)]


def test_epochs_seeds_and_lanes_differ_and_come_again():
    index, options = index_of([[8, 8], [8, 8]]), SamplerOptions(0, 2)
    plans = [lanes_of(Epoch(index, options, epoch, 2), 2) for epoch in (0, 1, 0)]
    assert plans[0] == plans[2] and samples(plans[0][0]) != samples(plans[1][0])
    assert lanes_of(Epoch(index, SamplerOptions(1, 2), 0, 2), 2) != plans[0]


def test_a_window_goes_whole_to_a_lane_and_mixes_its_row_groups():
    index, options = index_of([[8] * 8]), SamplerOptions(0, 1, per_group=4, window_bytes=16)
    lanes = lanes_of(Epoch(index, options, 0, 2), 2)
    groups = [{int(index.place[record][1]) for record, _ in samples(lane)} for lane in lanes]
    assert len(groups[0]) == len(groups[1]) == 4 and not groups[0] & groups[1]
    first = [int(index.place[record][1]) for record, _ in samples(lanes[0][:16])]
    assert len(set(first)) == 2 and first != sorted(first) and first != sorted(first, reverse=True)
    assert len({batch.window for batch in lanes[0][:16]}) == 1


def test_a_row_group_above_the_budget_is_a_window_of_its_own():
    epoch = Epoch(index_of([[9, 9, 9]]), SamplerOptions(0, 1, per_group=4, window_bytes=2), 0, 1)
    windows = [batch.window for batch in lanes_of(epoch, 1)[0]]
    assert len(set(windows)) == 3 and windows == sorted(windows)


def test_a_lane_without_work_gets_fillers():
    lanes = lanes_of(Epoch(index_of([[1]]), SamplerOptions(0, 2, per_group=4), 0, 3), 3)
    assert [[len(batch.sequences) for batch in lane] for lane in lanes] == [[1], [0], [0]]


def test_a_sample_too_long_is_named():
    with pytest.raises(DataError, match=r"record r0: a sample of \d+ tokens.*feed.pack_tokens is 5"):
        Epoch(index_of([[1]]), SamplerOptions(0, 1, tokens=5), 0, 1)


def test_nothing_to_sample_is_an_error():
    with pytest.raises(DataError, match="no record"):
        BatchSampler(index_of([[1]]).take(np.zeros(0, np.int64)), SamplerOptions(0, 1), 1)


@settings(deadline=None)
@given(st.integers(0, 3), st.integers(0, 5))
def test_a_walk_goes_on_where_it_stood(epoch, place):
    sampler = BatchSampler(index_of([[5, 5]]), SamplerOptions(0, 2), 2)
    walk = sampler.walk(Position())
    whole = list(islice(walk, 60))
    start = Position(epoch, place)
    following = list(islice(sampler.walk(start), 5))
    begins = whole.index(following[0])
    assert following == whole[begins : begins + 5]
    if place < sampler.rounds(epoch):
        assert following[0] == start


@pytest.mark.parametrize(("epochs", "accumulation"), [(1, 1), (2, 1), (0.5, 1), (2, 2), (2.5, 3)])
def test_epochs_are_so_many_steps(epochs, accumulation):
    sampler = BatchSampler(index_of([[9]]), SamplerOptions(0, 2), 1)
    assert sampler.steps(epochs, accumulation) == int(np.ceil(epochs * sampler.rounds(0) / accumulation))
