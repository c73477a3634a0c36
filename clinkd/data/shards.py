"""Prepared data as everyone reads it: ``manifest.json``, ``shards/part-*.parquet``, one row per image with
its turns.

Decisions:
- The manifest is written last: a folder without one is not prepared, whatever else it holds.
- Readers that do not need pixels do not read them: the image bytes are a Parquet column of their own.
- A folder is a path, a URI (s3://) or a path object; which of them makes no difference.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clinkd import storage
from clinkd.data.records import sample_id

MANIFEST, SHARDS, QUARANTINE = "manifest.json", "shards", "quarantine.jsonl"
LOOKED_AT_ONCE = 8
"""Shards that are looked at by as many threads, which wait for their storage most of the time."""
LIGHT = ["id", "image", "modality", "split", "width", "height", "turns", "more_images"]


class DataError(ValueError):
    """Data that cannot be used; the message says what, where and what to do, in one line."""


def schema() -> Any:
    """The Arrow schema of a shard."""
    import pyarrow as pa

    turn = pa.struct(
        [("task", pa.string()), ("question", pa.string()), ("answer", pa.string()), ("trusted", pa.bool_())]
    )
    other = pa.struct([("image", pa.string()), ("width", pa.int32()), ("height", pa.int32())])
    return pa.schema(
        [
            ("id", pa.string()),
            ("image", pa.string()),
            ("modality", pa.string()),
            ("split", pa.string()),
            ("png", pa.binary()),
            ("width", pa.int32()),
            ("height", pa.int32()),
            ("turns", pa.list_(turn)),
            # A record's further images, in the order in which its conversation names them; mostly none.
            ("more_images", pa.list_(other)),
            ("more_png", pa.list_(pa.binary())),
        ]
    )


def read_manifest(data: str | Path) -> dict[str, Any]:
    """The manifest of a prepared folder.

    Raises:
        DataError: no manifest, or one that is not JSON.
    """
    path = storage.locate(data) / MANIFEST
    try:
        manifest = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise DataError(f"no prepared data in {data} (no {MANIFEST}): run `clinkd prepare` into it") from None
    except (ValueError, OSError) as error:
        raise DataError(f"cannot read {path} ({error}): remove it and run `clinkd prepare` again") from None
    if not isinstance(manifest, dict) or not isinstance(manifest.get("shards"), list):
        raise DataError(f"{path} lists no shards: remove it and run `clinkd prepare` again")
    return manifest


def shard_paths(data: str | Path) -> list[Path]:
    """The shards' files in the manifest's order.

    Raises:
        DataError: no manifest, or a shard that it lists is not there.
    """
    folder = storage.locate(data) / SHARDS
    paths = [folder / shard["name"] for shard in read_manifest(data)["shards"]]
    there = set(storage.names(folder))
    for path in paths:
        if path.name not in there:
            raise DataError(f"{path} is listed in the manifest but not there: run `clinkd prepare` again")
    return paths


@contextlib.contextmanager
def open_parquet(path: Path, footer: Any = None) -> Iterator[Any]:
    """A Parquet file to read from, on a disk or in a bucket; ``footer``: its metadata, where they are known.

    Raises:
        DataError: it is not there, or no whole Parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        opened = path.open("rb") if storage.is_remote(path) else str(path)
        file = pq.ParquetFile(opened, metadata=footer)
    except (FileNotFoundError, pa.ArrowInvalid) as error:
        text = " ".join(str(error).split())[:120]
        raise DataError(f"{path} is no whole Parquet file ({text}): run `clinkd prepare` again") from None
    with file:
        yield file


@dataclass(frozen=True)
class Shards:
    """The files of prepared data, and the S3 endpoint that leads to them; travels to the workers by value."""

    paths: tuple[str, ...]
    stamps: tuple[str | None, ...]  # of the files, when the command began
    endpoint: str | None = None

    @classmethod
    def of(cls, data: str | Path) -> Shards:
        """Raises DataError like ``shard_paths``."""
        paths = [storage.absolute(path) for path in shard_paths(data)]
        with ThreadPoolExecutor(LOOKED_AT_ONCE) as threads:
            stamps = tuple(threads.map(storage.stamp, paths))
        return cls(tuple(map(str, paths)), stamps, storage.endpoint())

    def open(self, number: int, footer: Any = None) -> contextlib.AbstractContextManager[Any]:
        """The ParquetFile of a shard; ``footer``: its metadata, where they were read before.

        Raises:
            DataError: like ``open_parquet``; or it is not the file that the command began with.
        """
        storage.configure(self.endpoint)
        path = storage.locate(self.paths[number])
        if storage.stamp(path) != self.stamps[number]:
            raise DataError(f"{path} was changed since this command began: run it again")
        return open_parquet(path, footer)


def row_count(path: Path) -> int:
    """Rows of a Parquet file. Raises DataError like ``open_parquet``."""
    with open_parquet(path) as file:
        return int(file.metadata.num_rows)


def rows_of(
    path: Path,
    first: int = 0,
    count: int | None = None,
    *,
    columns: list[str] | None = None,
    batch_size: int = 64,
) -> Iterator[dict[str, Any]]:
    """Streams rows ``first`` .. ``first + count`` of one Parquet file; columns it has not are left out."""
    with open_parquet(path) as file:
        known = set(file.schema_arrow.names)
        wanted = None if columns is None else [name for name in columns if name in known]
        stop = file.metadata.num_rows if count is None else first + count
        start = 0
        for group in range(file.num_row_groups):
            end = start + file.metadata.row_group(group).num_rows
            if start < stop and end > first:
                at = start
                for batch in file.iter_batches(batch_size=batch_size, row_groups=[group], columns=wanted):
                    for row in batch.to_pylist():
                        if first <= at < stop:
                            yield row
                        at += 1
            start = end


def iter_rows(
    data: str | Path, split: str | None = None, *, columns: list[str] | None = None, batch_size: int = 64
) -> Iterator[dict[str, Any]]:
    """Streams the shards' rows (one per record), ``batch_size`` at a time in memory.

    Args:
        split: "train", "validation", "test" or None for all.
        columns: of ``schema()``; None for all, image bytes included.
    """
    wanted = columns if columns is None or "split" in columns else [*columns, "split"]
    for path in shard_paths(data):
        for row in rows_of(path, columns=wanted, batch_size=batch_size):
            if split is None or row["split"] == split:
                yield row


def samples(data: str | Path, split: str | None = None) -> Iterator[dict[str, Any]]:
    """Streams samples, no pixels: sample, id, image, modality, split, turn, and the turn's own fields."""
    for row in iter_rows(data, split, columns=LIGHT):
        for number, turn in enumerate(row["turns"]):
            yield {
                "sample": sample_id(row["id"], number),
                "id": row["id"],
                "image": row["image"],
                "modality": row["modality"],
                "split": row["split"],
                "turn": number,
                **turn,
            }


def images(data: str | Path, names: Collection[str]) -> dict[str, bytes]:
    """The image bytes of the named images; names that are not there are left out."""
    import pyarrow as pa
    import pyarrow.compute as pc

    wanted = set(names)
    found: dict[str, bytes] = {}
    for path in shard_paths(data):
        if not wanted - found.keys():
            break
        with open_parquet(path) as file:
            for group in range(file.num_row_groups):
                listed = file.read_row_group(group, columns=["image"])["image"]
                if not wanted.intersection(listed.to_pylist()):
                    continue
                table = file.read_row_group(group, columns=["image", "png"])
                table = table.filter(
                    pc.is_in(table["image"], value_set=pa.array(sorted(wanted), pa.string()))
                )
                found.update(zip(table["image"].to_pylist(), table["png"].to_pylist(), strict=True))
    return found
