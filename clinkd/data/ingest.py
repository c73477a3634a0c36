"""Prepared shards on their way into training workers: read through Ray Data, kept in one local Arrow file.

Decisions:
- A Ray Data iterator has no state to save, so it does not decide the order: it only brings the rows. They go
  into a memory-mapped Arrow file, one per node and stage, and the ledger decides which row is read when.
- Rows are sorted by record id, so the file is the same however the rows arrived.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass
class RecordTable:
    """Random access to records: ``turns`` in memory, image bytes on demand from the mapped file."""

    table: Any

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @property
    def ids(self) -> list[str]:
        return list(self.table.column("id").to_pylist())

    def turns(self, index: int) -> list[dict[str, Any]]:
        return list(self.table.column("turns")[index].as_py())

    def turn_counts(self) -> list[int]:
        import pyarrow.compute as pc

        return list(pc.list_value_length(self.table.column("turns")).to_pylist())

    def image(self, index: int) -> bytes:
        return bytes(self.table.column("png")[index].as_py())

    def images(self, index: int) -> list[bytes]:
        """All images of a record, in the order in which its questions show them."""
        more = self.table.column("more_png")[index].as_py() if "more_png" in self.table.column_names else None
        return [self.image(index), *(more or [])]

    def row(self, index: int) -> dict[str, Any]:
        """All columns of one record but its images' bytes."""
        names = [name for name in self.table.column_names if name not in ("png", "more_png")]
        return {name: self.table.column(name)[index].as_py() for name in names}


def collect(batches: Iterable[Any], path: Path) -> Path:
    """Writes Arrow tables or batches, sorted by id, to ``path`` (an Arrow IPC file); atomic."""
    import pyarrow as pa

    tables = [batch if isinstance(batch, pa.Table) else pa.Table.from_batches([batch]) for batch in batches]
    table = pa.concat_tables(tables).sort_by("id").combine_chunks()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    with pa.OSFile(str(unfinished), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1024)
    os.replace(unfinished, path)
    return path


def open_table(path: Path) -> RecordTable:
    import pyarrow as pa

    return RecordTable(pa.ipc.open_file(pa.memory_map(str(path))).read_all())


def pngs(row: Mapping[str, Any]) -> list[bytes]:
    """All images of a shard's row, or of a batch's, whose lists may be arrays; in the record's order."""
    more = row.get("more_png")
    return [bytes(row["png"]), *(bytes(png) for png in (() if more is None else more))]


def record_images(data: str | Path, ids: Collection[str]) -> dict[str, list[bytes]]:
    """All images of the named records, by record id; records that are not there are left out."""
    from clinkd.data.shards import open_parquet, shard_paths

    wanted, found = set(ids), {}
    for path in shard_paths(data):
        with open_parquet(path) as file:
            for group in range(file.num_row_groups):
                listed = file.read_row_group(group, columns=["id"])["id"].to_pylist()
                if not wanted.intersection(listed):  # no pixels are read in vain
                    continue
                for row in file.read_row_group(group, columns=["id", "png", "more_png"]).to_pylist():
                    if row["id"] in wanted:
                        found[row["id"]] = pngs(row)
    return found


def decode(png: bytes) -> Any:
    """An image as RGB, PIL."""
    import io

    from PIL import Image

    return Image.open(io.BytesIO(png)).convert("RGB")


def read_records(
    data: str | Path, *, split: str | None = None, ids: list[str] | None = None, blocks: int | None = None
) -> Any:
    """Prepared records as a Ray Dataset.

    Args:
        split: "train", "validation" or "test"; ids: these records alone. Neither: all.
        blocks: at least this many blocks, so that as many actors find work in few shards.
    """
    import ray.data
    from ray.data.expressions import col

    from clinkd import storage
    from clinkd.data.shards import shard_paths

    paths, filesystem = storage.arrow_source(shard_paths(data))
    count = max(len(paths), blocks) if blocks else None
    # Ray's newer reader asks for 32 actor processes to read Parquet footers, for every read of however few
    # shards (benchmarks/reads.py).
    ray.data.DataContext.get_current().use_datasource_v2 = False
    rows = ray.data.read_parquet(paths, filesystem=filesystem, override_num_blocks=count)
    if split is not None:
        rows = rows.filter(expr=col("split") == split)
    return rows if ids is None else rows.filter(expr=col("id").is_in(ids))
