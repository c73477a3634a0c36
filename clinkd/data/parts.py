"""One part of a preparation, as a task on any worker does it: check (decode, validate, draw) and then write.

Decisions:
- Two passes. The first checks images and rows and leaves a Parquet file of what is good; then the driver, who
  has seen every part's light facts, decides what no part can decide alone (which side a case goes to); the
  second adds that and writes the shard. Pixels are decoded once.
- A part reads its rows from a file and leaves its own files, each whole: run again after a crash, it leaves
  the same bytes. What it leaves last names the job it was for and the files it read; where both are still the
  same, a run that goes on takes it as it is.
- Jobs and results are plain JSON values.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clinkd import storage
from clinkd.data import readers
from clinkd.data.boxes import BoxError
from clinkd.data.records import case_of, modality_of
from clinkd.data.shards import schema
from clinkd.data.validate import Folder, Limits, RowError, reason

FORMAT = 3
"""Of shards and of what parts leave; another number makes a run that goes on start over."""
ROW_GROUP = 64
GROUP_BYTES = 4 << 20
"""Images, and their bytes, after which a Parquet row group ends: what is read for one image that is asked for
by itself, and what windows of training are put together of."""


class Tally:
    """What a part refused: one quarantine line per question/answer pair or mask, and the counts."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile("w+b")  # noqa: SIM115
        self.duplicates = self.masks = self.rows = 0
        self.by_reason: Counter[str] = Counter()

    def refuse(self, error: RowError | BoxError, **row: Any) -> None:
        code, detail = reason(error)
        self.by_reason[code] += 1
        self.masks += bool(row.get("mask"))
        line = json.dumps({"reason": code, "detail": detail, **row}) + "\n"
        self._file.write(line.encode())

    def save(self, path: Path) -> None:
        """Writes the lines to ``path``, whole."""
        self._file.seek(0)
        with storage.whole(path) as file:
            while chunk := self._file.read(1 << 20):
                file.write(chunk)
        self._file.close()


def check(job: dict[str, Any]) -> dict[str, Any]:
    """First pass over one part.

    Args:
        job: ``part`` (number), ``kind``, ``work`` (folder), ``root`` of the images, ``limits``, ``seed``, and
            what the kind's reader needs.

    Returns:
        ``part``, ``sha256`` (of what was checked), ``rows`` (question/answer pairs seen), ``duplicates``,
        ``by_reason``, ``refused_masks`` and ``records``, for each its id, where it stood, samples by task
        (``tasks``), ``masks`` and ``pictures`` (name, path, modality, case, perceptual hash).
    """
    work, number = storage.locate(job["work"]), job["part"]
    folder = Folder(storage.locate(job["root"]), Limits(**job["limits"]))
    done = _left(work / f"facts-{number:05d}.json", job)
    if done is not None and folder.unchanged(done["seen"]):
        return done["result"]
    tally = Tally()
    records: list[dict[str, Any]] = []

    def rows() -> Iterator[dict[str, Any]]:
        for good in readers.read(job, folder, tally):
            records.append(_facts(good))
            yield _row(good)

    if job["dry"]:
        digest = f"dry, {sum(1 for _ in rows())} rows"
    else:
        _, digest = _write_parquet(rows(), work / f"checked-{number:05d}.parquet")
    tally.save(work / f"quarantine-{number:05d}.jsonl")
    result = {
        "part": number,
        "sha256": digest,
        "rows": tally.rows,
        "duplicates": tally.duplicates,
        "by_reason": dict(tally.by_reason),
        "refused_masks": tally.masks,
        "records": records,
    }
    _leave(work / f"facts-{number:05d}.json", job, result, folder.seen)
    return result


def _facts(good: readers.Good) -> dict[str, Any]:
    return {
        "id": good.record.id,
        "where": good.where,
        "masks": list(good.masks),
        "tasks": dict(Counter(turn.task for turn in good.record.turns)),
        "pictures": [
            [one.name, one.path, modality_of(one.name), case_of(one.name), one.fingerprint]
            for one in good.pictures
        ],
    }


def _row(good: readers.Good) -> dict[str, Any]:
    first, *more = good.pictures
    return {
        "id": good.record.id,
        "image": first.name,
        "modality": good.record.modality,
        "split": "",
        "png": first.data,
        "width": first.width,
        "height": first.height,
        "turns": [asdict(turn) for turn in good.record.turns],
        "more_images": [{"image": one.name, "width": one.width, "height": one.height} for one in more],
        "more_png": [one.data for one in more],
    }


def write(job: dict[str, Any]) -> dict[str, Any]:
    """Second pass: the shard of a checked part, given each kept row's side; returns name, rows, sha256."""
    from clinkd.data.shards import rows_of

    work, number = storage.locate(job["work"]), job["part"]
    name = f"part-{number:05d}.parquet"
    path = storage.locate(job["shards"]) / name
    left = work / f"written-{number:05d}.json"
    done = _left(left, job)
    if done is not None and storage.stamp(path) == done["seen"][name]:
        return done["result"]
    sides, dropped = iter(job["sides"]), set(job["dropped"])

    def rows() -> Iterator[dict[str, Any]]:
        for place, row in enumerate(rows_of(work / f"checked-{number:05d}.parquet")):
            if place not in dropped:
                yield row | {"split": next(sides)}

    count, digest = _write_parquet(rows(), path)
    result = {"name": name, "rows": count, "sha256": digest}
    _leave(left, job, result, {name: storage.stamp(path)})
    return result


def _mark(job: dict[str, Any]) -> str:
    """What a job is, wherever its working folder lies."""
    known = {key: value for key, value in job.items() if key not in ("work", "shards", "rows")}
    return hashlib.sha256(json.dumps([FORMAT, known], sort_keys=True).encode()).hexdigest()


def _left(path: Path, job: dict[str, Any]) -> dict[str, Any] | None:
    """What a former run left of this very job, or None."""
    try:
        done = json.loads(path.read_bytes())
        return done if done["mark"] == _mark(job) else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _leave(path: Path, job: dict[str, Any], result: dict[str, Any], seen: dict[str, str | None]) -> None:
    storage.write_whole(path, json.dumps({"mark": _mark(job), "seen": seen, "result": result}))


def _write_parquet(rows: Iterator[dict[str, Any]], path: Path) -> tuple[int, str]:
    """Streams rows into row groups; the same rows give the same bytes. Returns their number and SHA-256."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    count = size = 0
    group: list[dict[str, Any]] = []
    options = {"compression": "zstd", "use_dictionary": ["modality", "split"]}
    with storage.whole(path) as file:
        hashed = _Hashed(file)
        with pq.ParquetWriter(pa.PythonFile(hashed, mode="w"), schema(), **options) as writer:
            for row in rows:
                group.append(row)
                count += 1
                size += len(row["png"]) + sum(map(len, row["more_png"]))
                if len(group) == ROW_GROUP or size >= GROUP_BYTES:
                    writer.write_table(pa.Table.from_pylist(group, schema()))
                    group, size = [], 0
            if group:
                writer.write_table(pa.Table.from_pylist(group, schema()))
    return count, hashed.digest.hexdigest()


class _Hashed:
    """A file to write whose bytes are hashed on their way."""

    def __init__(self, file: Any) -> None:
        self._file, self.digest, self.closed = file, hashlib.sha256(), False

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return int(self._file.write(data))

    def tell(self) -> int:
        return int(self._file.tell())

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        """The file outlives the Parquet writer: its owner closes it."""

    def writable(self) -> bool:
        return True
