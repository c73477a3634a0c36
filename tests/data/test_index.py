"""Where records stand: made from ids, splits and tasks alone, mapped, and found by name."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from feeding import write_shard
from hypothesis import given, settings
from hypothesis import strategies as st
from phantom_rows import phantom_row

from clinkd.data.index import RecordIndex, build_index
from clinkd.data.lookup import Lookup, hash_names
from clinkd.data.phantoms import PhantomSpec
from clinkd.data.shards import DataError, Shards

SPEC = PhantomSpec(9, size=56)


@pytest.fixture
def shards(tmp_path) -> Shards:
    rows = [phantom_row(SPEC, number) for number in range(9)]
    rows[3]["split"], rows[5]["turns"] = "test", []
    return Shards.of(write_shard(tmp_path / "data", rows))


def test_records_of_a_split_that_have_turns_in_the_shards_order(shards):
    index = build_index(shards, "train")
    names = [index.id(record) for record in range(len(index))]
    assert names == ["p0", "p1", "p2", "p4", "p6", "p7", "p8"]
    assert index.place.tolist() == [
        [0, 0, 0],
        [0, 0, 1],
        [0, 0, 2],
        [0, 1, 0],
        [0, 1, 2],
        [0, 1, 3],
        [0, 2, 0],
    ]
    assert index.turns.tolist() == [
        len(phantom_row(SPEC, number)["turns"]) for number in (0, 1, 2, 4, 6, 7, 8)
    ]
    assert (np.diff(index.starts) == index.turns).all() and (index.documents == index.turns).all()
    images = sum(len(phantom_row(SPEC, number)["png"]) for number in range(4))
    assert images <= index.group_bytes[0] < 1.5 * images
    assert len(build_index(shards, None)) == 8 and len(build_index(shards, "validation")) == 0


def test_it_is_kept_whole_and_a_part_keeps_its_places(shards, tmp_path):
    index = build_index(shards, "train")
    again = RecordIndex.read(index.write(tmp_path / "index.arrow"))
    assert again.table.equals(index.table)
    some = again.take(np.array([5, 0]))
    assert [some.id(record) for record in (0, 1)] == ["p0", "p7"] and some.place[1].tolist() == [0, 1, 3]


def test_records_and_turns_are_found_by_name(shards):
    index = build_index(shards, "train")
    assert index.find(["p8", "p3", "p0", "nobody"]).tolist() == [6, -1, 0, -1]
    samples = pa.array(["p1#0", "p1#1", "p3#0", "p0#99", "p8#0"])
    first, last = int(index.starts[1]), int(index.starts[6])
    assert index.turn_numbers(samples).tolist() == [first, first + 1, -1, -1, last]
    assert index.turn_numbers(pa.array([], pa.string())).tolist() == []


def test_a_shard_that_was_replaced_is_refused(shards):
    from pathlib import Path

    path = Path(shards.paths[0])
    path.write_bytes(path.read_bytes() + b"more")
    with pytest.raises(DataError, match=r"part-00000.parquet was changed since this command began"):
        build_index(shards, "train")


@settings(deadline=None)
@given(st.lists(st.text(max_size=12), max_size=40), st.lists(st.text(max_size=12), max_size=10))
def test_names_are_found_whatever_they_are(names, others):
    column = pa.chunked_array([pa.array(names[:7], pa.string()), pa.array(names[7:], pa.string())])
    wanted = [*names, *others]
    expected = [names.index(name) if name in names else -1 for name in wanted]
    assert Lookup(column).rows(wanted).tolist() == expected
    assert len(Lookup(column)) == len(names)


def test_names_of_one_hash_are_told_apart(monkeypatch):
    from clinkd.data import lookup

    monkeypatch.setattr(lookup, "hash_names", lambda names: np.zeros(len(names), np.uint64))
    found = Lookup(pa.chunked_array([pa.array(["a", "b", "c"])]))
    assert found.rows(["c", "a", "d"]).tolist() == [2, 0, -1]


def test_a_hash_does_not_depend_on_where_a_name_stands():
    whole = pa.array([f"name-{number}" for number in range(100_000)])
    alone = hash_names(pa.chunked_array([whole.slice(70_001, 5)]))
    assert (hash_names(pa.chunked_array([whole]))[70_001:70_006] == alone).all()
    assert len(np.unique(hash_names(pa.chunked_array([whole])))) == len(whole)
