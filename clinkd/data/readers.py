"""What a part holds, kind by kind: checked records with their images, refused rows told to the tally.

Decisions:
- Every kind of source ends in the same ``Good``; what a row's images and turns have to pass is the same for
  all (``validate``).
- Entries about the same images become one record, in the order they stood in the source.
- A former run's Parquet is checked like any other source: what another version let through may not pass now.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from clinkd import storage
from clinkd.data import medgrit, phantoms, samed2d
from clinkd.data.boxes import BoxError
from clinkd.data.fingerprint import perceptual_hash
from clinkd.data.records import Box, Record, Turn
from clinkd.data.validate import (
    Folder,
    Limits,
    RowError,
    check_image,
    check_modality,
    check_name,
    check_turn,
    contradictions,
    resolve,
)


@dataclass(frozen=True, slots=True)
class Picture:
    """An image that passed: its bytes as they came, its size in pixels, where it was, and its hash."""

    name: str
    data: bytes
    width: int
    height: int
    path: str
    fingerprint: str | None


@dataclass(frozen=True, slots=True)
class Good:
    """A record that passed, its images, where in the source it stood, and the masks it was made of."""

    record: Record
    pictures: tuple[Picture, ...]
    where: str
    masks: tuple[str, ...] = ()


class Tally(Protocol):
    """Where refused rows go."""

    duplicates: int
    rows: int

    def refuse(self, error: RowError | BoxError, **row: Any) -> None: ...


def read(job: dict[str, Any], folder: Folder, tally: Tally) -> Iterator[Good]:
    """A part's good records; ``tally.rows`` counts the question/answer pairs seen, where a source has any."""
    readers = {"phantoms": _phantoms, "medgrit": _medgrit, "samed2d": _samed2d, "parquet": _parquet}
    yield from readers[job["kind"]](job, folder, tally)


def spelling(image: str, root: Path) -> str:
    """One spelling of an image's path for "x.png", "./x.png" and "images/x.png" under ``root`` = images/."""
    return image.removeprefix("./").removeprefix(f"{root.name}/")


def _picture(name: str, data: bytes, path: str, limits: Limits) -> Picture:
    image = check_image(data, limits)
    return Picture(name, data, image.width, image.height, path, perceptual_hash(image))


def _found(path: str, folder: Folder) -> Picture:
    """The image ``path`` under the folder, checked."""
    resolve(folder.root, path)  # an escape is told as one, whatever the name
    name = path.rsplit("/", 1)[-1]
    check_modality(name)
    return _picture(name, folder.read(path), spelling(path, folder.root), folder.limits)


def _job_rows(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    with storage.locate(job["rows"]).open("rb") as file:
        yield from map(json.loads, file.read().splitlines())


def _phantoms(job: dict[str, Any], folder: Folder, tally: Tally) -> Iterator[Good]:
    spec = phantoms.PhantomSpec(**job["spec"])
    for index in range(*job["indices"]):
        png, record = phantoms.draw(spec, index)
        tally.rows += len(record.turns)
        yield Good(record, (_picture(record.image, png, record.image, folder.limits),), f"phantom {index}")


def _medgrit(job: dict[str, Any], folder: Folder, tally: Tally) -> Iterator[Good]:
    groups: dict[tuple[str, ...], list[medgrit.Entry]] = {}
    for row in _job_rows(job):
        entry = medgrit.Entry(**row)
        tally.rows += entry.rows
        paths = (entry.image, *entry.more)
        groups.setdefault(tuple(spelling(path, folder.root) for path in paths), []).append(entry)
    folder.expect(path for entries in groups.values() for path in (entries[0].image, *entries[0].more))
    for entries in groups.values():
        paths = (entries[0].image, *entries[0].more)
        try:
            pictures = tuple(_found(path, folder) for path in paths)
        except RowError as error:
            for entry in entries:
                for turn in range(entry.rows):
                    tally.refuse(error, where=entry.where, id=entry.id, image=entry.image, turn=turn)
            continue
        turns = _checked_turns(entries, folder.limits, tally)
        if turns:
            names = [picture.name for picture in pictures]
            record = Record(entries[0].id, names[0], turns, tuple(names[1:]))
            yield Good(record, pictures, entries[0].where)


def _checked_turns(entries: list[medgrit.Entry], limits: Limits, tally: Tally) -> tuple[Turn, ...]:
    """An image's good turns; bad ones and contradictions are refused, repeats counted and dropped."""
    checked: list[tuple[dict[str, Any], Turn]] = []
    for entry in entries:
        images = 1 + len(entry.more)
        for number, (question, answer) in enumerate(entry.pairs):
            row = {"where": entry.where, "id": entry.id, "image": entry.image, "turn": number}
            try:
                checked.append((row, check_turn(question, answer, entry.task, limits, images)))
            except (RowError, BoxError) as error:
                tally.refuse(error, **row)
    return _without_clashes(checked, tally)


def _without_clashes(checked: list[tuple[dict[str, Any], Turn]], tally: Tally) -> tuple[Turn, ...]:
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


def _parquet(job: dict[str, Any], folder: Folder, tally: Tally) -> Iterator[Good]:
    """Rows ``first`` .. ``first + count`` of one Parquet file, the shard of a former run."""
    from clinkd.data.shards import rows_of

    path = storage.locate(job["file"])
    for number, row in enumerate(rows_of(path, job["first"], job["count"]), job["first"]):
        turns = list(row["turns"] or [])
        tally.rows += max(1, len(turns))
        place = {"where": f"{path.name} row {number}", "id": str(row["id"]), "image": str(row["image"])}
        try:
            pictures = _stored_pictures(row, folder.limits)
            if not turns:
                raise RowError("no_turns", "no question")
        except RowError as error:
            for turn in range(max(1, len(turns))):
                tally.refuse(error, **place, turn=turn)
            continue
        kept = _stored_turns(turns, place, folder.limits, tally, len(pictures))
        if kept:
            names = [picture.name for picture in pictures]
            yield Good(Record(row["id"], names[0], kept, tuple(names[1:])), pictures, place["where"])


def _stored_pictures(row: dict[str, Any], limits: Limits) -> tuple[Picture, ...]:
    """The images of a Parquet row, checked as if they had come from files."""
    if not isinstance(row["id"], str) or not row["id"]:
        raise RowError("invalid_record", "no id")
    check_name(row["id"])
    more = [other["image"] for other in row.get("more_images") or []]
    stored = [row["png"], *(row.get("more_png") or [])]
    if len(stored) != 1 + len(more):
        raise RowError("invalid_record", f"{1 + len(more)} image names, {len(stored)} images")
    pictures = []
    for name, data in zip([row["image"], *more], stored, strict=True):
        if not isinstance(name, str) or not name or "/" in name or "\\" in name:
            raise RowError("path_escape", f"{str(name)[:120]!r} is no bare file name")
        check_name(name)
        check_modality(name)
        pictures.append(_picture(name, data or b"", name, limits))
    return tuple(pictures)


def _stored_turns(
    turns: list[dict], place: dict[str, str], limits: Limits, tally: Tally, images: int
) -> tuple[Turn, ...]:
    checked: list[tuple[dict[str, Any], Turn]] = []
    for number, turn in enumerate(turns):
        row = {**place, "turn": number}
        try:
            found = check_turn(turn["question"], turn["answer"], turn["task"], limits, images)
        except (RowError, BoxError) as error:
            tally.refuse(error, **row)
            continue
        trusted = turn.get("trusted") is not False
        checked.append((row, Turn(found.task, found.question, found.answer, trusted)))
    return _without_clashes(checked, tally)


def _samed2d(job: dict[str, Any], folder: Folder, tally: Tally) -> Iterator[Good]:
    names, rows = samed2d.class_names(folder.root), list(_job_rows(job))
    folder.expect(path for row in rows for path in (row["image"], *row["masks"]) if path)
    for row in rows:
        image, masks = row["image"], row["masks"]
        place = {"where": row["where"], "image": image}
        try:
            if not image:
                raise RowError("mask_orphan", "no image of that name")
            picture = _found(image, folder)
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
                objects.append((shown, samed2d.read_mask(folder, mask, picture.width, picture.height)))
                good.append(mask)
            except RowError as error:
                tally.refuse(error, **place, mask=mask)
        if objects:
            record = samed2d.record(picture.name, objects, job["seed"])
            yield Good(record, (picture,), row["where"], tuple(good))
