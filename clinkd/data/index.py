"""Where each record of a split stands in the shards: the one thing of a data set that a process holds whole.

Decisions:
- An Arrow file that is mapped, not read: a process has of it what it looks at. What is reckoned with are
  numpy columns; no Python object is made of every record or turn.
- It is made from the shards' ids, splits and tasks alone: neither pixels nor texts are read for it.
- Tokens of documents are measured only where samples share sequences (``measured``): it takes a tokenizer
  over every question and answer.
- Turns are counted through all records: ``starts[record] + turn`` is the number of a turn, and of what is
  known of it (margins).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from clinkd import storage
from clinkd.data.lookup import Lookup
from clinkd.data.shards import LIGHT, LOOKED_AT_ONCE, Shards
from clinkd.data.tasks import run_tasks

Measure = Callable[[list[dict[str, Any]]], list[list[int]]]
"""Tokens of each document of each row; rows are a shard's light columns."""


@dataclass(frozen=True)
class RecordIndex:
    """Records in the shards' order.

    Args:
        table: ``id``; ``shard``, ``group`` (row group), ``row`` (within it); ``turns`` (how many);
            ``group_bytes`` (images of the whole row group, as they are stored); and of a measured index
            ``lengths``, tokens of each document: a record's turns, or all of them as one.
    """

    table: Any

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @cached_property
    def place(self) -> np.ndarray:
        """int32 [records, 3]: shard, row group, row."""
        return np.stack([self._column(name) for name in ("shard", "group", "row")], axis=1)

    @cached_property
    def turns(self) -> np.ndarray:
        """int32 [records]."""
        return self._column("turns")

    @cached_property
    def starts(self) -> np.ndarray:
        """int64 [records + 1]: the number of each record's first turn, and of all turns."""
        return np.concatenate([[0], np.cumsum(self.turns, dtype=np.int64)])

    @cached_property
    def group_bytes(self) -> np.ndarray:
        """int64 [records]."""
        return self._column("group_bytes")

    @cached_property
    def lengths(self) -> np.ndarray | None:
        """Tokens of all documents end to end, int32; None: not measured."""
        if "lengths" not in self.table.column_names:
            return None
        return self.table.column("lengths").combine_chunks().flatten().to_numpy(zero_copy_only=False)

    @cached_property
    def documents(self) -> np.ndarray:
        """int32 [records]: what a record's samples are dealt as: its turns, or what was measured."""
        if "lengths" not in self.table.column_names:
            return self.turns
        import pyarrow.compute as pc

        return pc.list_value_length(self.table.column("lengths")).to_numpy()

    def id(self, record: int) -> str:
        return str(self.table.column("id")[record].as_py())

    @cached_property
    def _names(self) -> Lookup:
        return Lookup(self.table.column("id"))

    def find(self, ids: Sequence[str]) -> np.ndarray:
        """The records of these names, int64; -1 for one that is not here."""
        return self._names.rows(ids)

    def turn_numbers(self, samples: Any) -> np.ndarray:
        """The number of each sample (a column of ``RECORD#TURN``) among all turns, int64; -1: none."""
        import pyarrow as pa
        import pyarrow.compute as pc

        if len(samples) == 0:
            return np.zeros(0, np.int64)
        chunked = samples if isinstance(samples, pa.ChunkedArray) else pa.chunked_array([samples])
        pairs = pc.split_pattern(chunked, "#", max_splits=1, reverse=True)
        names, turns = pc.list_element(pairs, 0), pc.list_element(pairs, 1).cast(pa.int64()).to_numpy()
        records = pc.index_in(names, value_set=self.table.column("id").combine_chunks())
        found = pc.fill_null(records, -1).to_numpy().astype(np.int64)
        known = (found >= 0) & (turns < self.turns[found])
        return np.where(known, self.starts[found] + turns, -1)

    def take(self, records: np.ndarray) -> RecordIndex:
        """Some records, in their order here."""
        return RecordIndex(self.table.take(np.sort(records)))

    def measured(self, measure: Measure, shards: Shards, cpus: float = 0.5) -> RecordIndex:
        """With the tokens of each document, by Ray Data tasks that read the shards' light columns.

        Raises:
            FeedError: ``measure`` refuses a record.
        """
        bounds = np.concatenate([[0], np.flatnonzero(np.diff(self.place[:, 0])) + 1, [len(self)]]).tolist()
        work = [self.place[start:end] for start, end in itertools.pairwise(bounds) if end > start]
        parts = list(run_tasks(work, _MeasureShard(shards, measure), cpus))
        import pyarrow as pa

        lengths = pa.chunked_array([part.column("lengths").combine_chunks() for part in parts])
        table = self.table.drop_columns("lengths") if "lengths" in self.table.column_names else self.table
        return RecordIndex(table.append_column("lengths", lengths.combine_chunks()))

    def write(self, path: Path) -> Path:
        """Writes it, whole."""
        import pyarrow as pa

        path.parent.mkdir(parents=True, exist_ok=True)
        with storage.whole(path) as file, pa.ipc.new_file(file, self.table.schema) as writer:
            writer.write_table(self.table)
        return path

    @classmethod
    def read(cls, path: Path | str) -> RecordIndex:
        import pyarrow as pa

        return cls(pa.ipc.open_file(pa.memory_map(str(path))).read_all())

    def _column(self, name: str) -> np.ndarray:
        return self.table.column(name).to_numpy()


def build_index(shards: Shards, split: str | None) -> RecordIndex:
    """The records of a split (None: of all) that have turns.

    Raises:
        DataError: a shard is no whole Parquet file.
    """
    import pyarrow as pa

    with ThreadPoolExecutor(LOOKED_AT_ONCE) as readers:
        parts = list(readers.map(lambda shard: _look(shards, shard, split), range(len(shards.paths))))
    return RecordIndex(pa.concat_tables([_schema().empty_table(), *parts]).combine_chunks())


def _schema() -> Any:
    import pyarrow as pa

    whole = dict.fromkeys(("shard", "group", "row", "turns"), pa.int32())
    return pa.schema({"id": pa.string()} | whole | {"group_bytes": pa.int64()})


def _look(shards: Shards, shard: int, split: str | None) -> Any:
    """The part of an index that is about one shard."""
    import pyarrow as pa
    import pyarrow.compute as pc

    parts = [_schema().empty_table()]
    with shards.open(shard) as file:
        for group in range(file.num_row_groups):
            found = file.read_row_group(group, columns=["id", "split", "turns.list.element.task"])
            turns = pc.fill_null(pc.list_value_length(found["turns"]), 0).to_numpy()
            there = turns > 0
            if split is not None:
                there &= pc.equal(found["split"], split).to_numpy()
            wanted = np.flatnonzero(there)
            number = dict.fromkeys(("shard", "group"), np.zeros(len(wanted), np.int32))
            columns = number | {
                "shard": np.full(len(wanted), shard), "group": np.full(len(wanted), group), "row": wanted,
                "turns": turns[wanted], "group_bytes": np.full(len(wanted), _image_bytes(file, group)),
            }  # fmt: skip
            arrays = {name: pa.array(values, _schema().field(name).type) for name, values in columns.items()}
            table = pa.table({"id": found["id"].combine_chunks().take(pa.array(wanted))} | arrays)
            parts.append(table.select(_schema().names).cast(_schema()))
    return pa.concat_tables(parts)


def _image_bytes(file: Any, group: int) -> int:
    found = file.metadata.row_group(group)
    columns = [found.column(number) for number in range(found.num_columns)]
    return sum(column.total_uncompressed_size for column in columns if "png" in column.path_in_schema)


@dataclass(frozen=True)
class _MeasureShard:
    """Measures the records at ``place`` [records, 3] of one shard."""

    shards: Shards
    measure: Measure

    def __call__(self, place: np.ndarray) -> Iterator[Any]:
        import pyarrow as pa

        lengths: list[list[int]] = []
        with self.shards.open(int(place[0, 0])) as file:
            known = [name for name in LIGHT if name in file.schema_arrow.names]
            for group in np.unique(place[:, 1]).tolist():
                rows = file.read_row_group(group, columns=known)
                wanted = place[place[:, 1] == group, 2]
                lengths += self.measure(rows.take(pa.array(wanted)).to_pylist())
        yield pa.table({"lengths": pa.array(lengths, pa.list_(pa.int32()))})
