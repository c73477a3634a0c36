"""One part of a preparation, as a task on any worker does it: check (decode, validate, draw) and then write.

Decisions:
- Two passes. The first checks images and rows and leaves a Parquet file of what is good; then the driver, who
  has seen every part's light facts, decides what no part can decide alone (which side a case goes to); the
  second adds that and writes the shard. Pixels are decoded once.
- A part reads its rows from a file and leaves its own files, each written beside and renamed: run again after
  a crash, it leaves the same bytes.
- Jobs and results are plain JSON values.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clinkd.data import medgrit, phantoms, samed2d
from clinkd.data.boxes import BoxError
from clinkd.data.records import Box, Record, Turn, case_of
from clinkd.data.shards import schema
from clinkd.data.validate import (
    Limits,
    RowError,
    check_image,
    check_modality,
    check_turn,
    contradictions,
    reason,
    resolve,
)

ROW_GROUP = 64
"""Images per Parquet row group: what a streaming reader holds at once."""

Good = tuple[Record, bytes, tuple[int, int], str, list[str]]
"""A record that passed, its image's bytes, (width, height), where it stood, and the masks it was made of."""


class Tally:
    """What a part refused: one quarantine line per question/answer pair or mask, and the counts."""

    def __init__(self, path: Path) -> None:
        self._path, self._beside = path, _beside(path)
        self._file = self._beside.open("w", encoding="utf-8")
        self.duplicates = self.masks = 0
        self.by_reason: Counter[str] = Counter()

    def refuse(self, error: RowError | BoxError, **row: Any) -> None:
        code, detail = reason(error)
        self.by_reason[code] += 1
        self.masks += bool(row.get("mask"))
        self._file.write(json.dumps({"reason": code, "detail": detail, **row}) + "\n")

    def close(self) -> None:
        self._file.close()
        os.replace(self._beside, self._path)


def _beside(path: Path) -> Path:
    """Where ``path`` is written until whole; this process's own, as a killed run's tasks may still live."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def check(job: dict[str, Any]) -> dict[str, Any]:
    """First pass over one part.

    Args:
        job: ``part`` (number), ``kind``, ``work`` (folder), ``limits``, ``seed``, and what the kind's reader
        needs.

    Returns:
        ``part``, ``duplicates``, ``by_reason`` and ``images``, for each its id, image, modality, case, where
        in the source it stood, samples by task (``tasks``) and ``masks``; ``refused_masks`` counts.
    """
    work, number = Path(job["work"]), job["part"]
    tally = Tally(work / f"quarantine-{number:05d}.jsonl")
    reader = {"phantoms": _phantoms, "medgrit": _medgrit, "samed2d": _samed2d}[job["kind"]]
    facts: dict[str, Any] = {"part": number, "images": []}

    def rows() -> Iterator[dict[str, Any]]:
        for record, png, (width, height), where, masks in reader(job, tally):
            facts["images"].append(
                {
                    "id": record.id,
                    "image": record.image,
                    "where": where,
                    "masks": masks,
                    "modality": record.modality,
                    "case": case_of(record.image),
                    "tasks": Counter(turn.task for turn in record.turns),
                }
            )
            turns = [asdict(turn) for turn in record.turns]
            yield {"id": record.id, "image": record.image, "modality": record.modality, "split": "",
                   "png": png, "width": width, "height": height, "turns": turns,
                   "more_images": [], "more_png": []}  # fmt: skip

    _write_parquet(rows(), work / f"checked-{number:05d}.parquet")
    tally.close()
    return facts | {
        "duplicates": tally.duplicates,
        "by_reason": tally.by_reason,
        "refused_masks": tally.masks,
    }


def write(job: dict[str, Any]) -> dict[str, Any]:
    """Second pass: the shard of a checked part, given each kept row's side; returns name, rows, sha256."""
    import pyarrow.parquet as pq

    name = f"part-{job['part']:05d}.parquet"
    path = Path(job["shards"]) / name
    sides, dropped = iter(job["sides"]), set(job["dropped"])

    def rows() -> Iterator[dict[str, Any]]:
        with pq.ParquetFile(Path(job["work"]) / f"checked-{job['part']:05d}.parquet") as file:
            batches = (batch.to_pylist() for batch in file.iter_batches(batch_size=ROW_GROUP))
            for place, row in enumerate(row for batch in batches for row in batch):
                if place not in dropped:
                    yield row | {"split": next(sides)}

    count = _write_parquet(rows(), path)
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256") if hasattr(hashlib, "file_digest") else _digest(file)
    return {"name": name, "rows": count, "sha256": digest.hexdigest()}


def _digest(file: Any) -> Any:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest


def _write_parquet(rows: Iterator[dict[str, Any]], path: Path) -> int:
    """Streams rows into row groups; the same rows give the same bytes. Returns their number."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    count, group, beside = 0, [], _beside(path)
    options = {"compression": "zstd", "use_dictionary": ["modality", "split"]}
    with pq.ParquetWriter(beside, schema(), **options) as writer:
        for row in rows:
            group.append(row)
            count += 1
            if len(group) == ROW_GROUP:
                writer.write_table(pa.Table.from_pylist(group, schema()))
                group = []
        if group:
            writer.write_table(pa.Table.from_pylist(group, schema()))
    os.replace(beside, path)
    return count


def spelling(image: str, root: Path) -> str:
    """One spelling of an image's path for "x.png", "./x.png" and "images/x.png" under ``root`` = images/."""
    return image.removeprefix("./").removeprefix(f"{root.name}/")


def _job_rows(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    with open(job["rows"], encoding="utf-8") as file:
        yield from map(json.loads, file)


def _phantoms(job: dict[str, Any], tally: Tally) -> Iterator[Good]:
    spec = phantoms.PhantomSpec(**job["spec"])
    for index in range(*job["indices"]):
        png, record = phantoms.draw(spec, index)
        yield record, png, (spec.size, spec.size), f"phantom {index}", []


def _medgrit(job: dict[str, Any], tally: Tally) -> Iterator[Good]:
    """Entries about one image become one record, in the order they stood in the source."""
    root, limits = Path(job["root"]), Limits(**job["limits"])
    groups: dict[str, list[medgrit.Entry]] = {}
    for row in _job_rows(job):
        groups.setdefault(spelling(row["image"], root), []).append(medgrit.Entry(**row))
    for image, entries in groups.items():
        name = image.rsplit("/", 1)[-1]
        try:
            path = resolve(root, entries[0].image)
            check_modality(name)
            png, *size = check_image(path, limits)
        except RowError as error:
            for entry in entries:
                for turn in range(entry.rows):
                    tally.refuse(error, where=entry.where, id=entry.id, image=entry.image, turn=turn)
            continue
        turns = _checked_turns(entries, limits, tally)
        if turns:
            yield Record(entries[0].id, name, turns), png, (size[0], size[1]), entries[0].where, []


def _checked_turns(entries: list[medgrit.Entry], limits: Limits, tally: Tally) -> tuple[Turn, ...]:
    """An image's good turns; bad ones and contradictions are refused, repeats counted and dropped."""
    checked: list[tuple[dict[str, Any], Turn]] = []
    for entry in entries:
        for number, (question, answer) in enumerate(entry.pairs):
            row = {"where": entry.where, "id": entry.id, "image": entry.image, "turn": number}
            try:
                checked.append((row, check_turn(question, answer, entry.task, limits)))
            except (RowError, BoxError) as error:
                tally.refuse(error, **row)
    clashes = contradictions([turn for _, turn in checked])
    kept: dict[Turn, None] = {}
    for row, turn in checked:
        if (turn.task, turn.question) in clashes:
            tally.refuse(RowError("contradicting_answers", turn.question[:120]), **row)
        elif turn in kept:
            tally.duplicates += 1
        else:
            kept[turn] = None
    return tuple(kept)


def _samed2d(job: dict[str, Any], tally: Tally) -> Iterator[Good]:
    root, limits = Path(job["root"]), Limits(**job["limits"])
    names = samed2d.class_names(root)
    for row in _job_rows(job):
        where, image, masks = row["where"], row["image"], row["masks"]
        place = {"where": where, "image": image}
        try:
            if not image:
                raise RowError("mask_orphan", "no image of that name")
            path = resolve(root, image)
            name = image.rsplit("/", 1)[-1]
            check_modality(name)
            png, width, height = check_image(path, limits)
            if not masks:
                raise RowError("no_masks", image)
        except RowError as error:
            for mask in masks or [None]:
                tally.refuse(error, **place, mask=mask)
            continue
        objects: list[tuple[str, Box]] = []
        good: list[str] = []
        for mask in masks:
            try:
                shown = samed2d.object_name(mask, names)
                objects.append((shown, samed2d.read_mask(root, mask, width, height, limits)))
                good.append(mask)
            except RowError as error:
                tally.refuse(error, **place, mask=mask)
        if objects:
            record = samed2d.record(name, objects, job["seed"])
            yield record, png, (width, height), where, good
