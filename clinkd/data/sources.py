"""Where data come from, and how the driver cuts them into parts.

Decisions:
- The driver reads texts and names, never pixels, as a stream; it holds one number per image and a bounded
  buffer.
- Images are numbered in order of first appearance and ``images_per_shard`` of them are a part, so an image
  that several task files speak of meets all its rows in one part.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clinkd.data import medgrit, parts, samed2d
from clinkd.data.phantoms import PhantomSpec
from clinkd.data.shards import DataError
from clinkd.data.validate import RowError

QA_SUFFIXES = (".json", ".jsonl", ".ndjson")
_BUFFERED = 20_000  # light rows held before they go to their parts' files


@dataclass(frozen=True)
class Source:
    """Where the data come from: "phantoms", "medgrit" (``files``; ``root`` holds the images) or "samed2d"."""

    kind: str
    root: Path = Path()
    files: tuple[Path, ...] = ()
    phantoms: PhantomSpec | None = None

    def describe(self) -> dict[str, Any]:
        """For the manifest: names only, so that the same data elsewhere make the same manifest."""
        if self.phantoms is not None:
            return {"kind": self.kind, **asdict(self.phantoms)}
        if self.kind == "medgrit":
            return {"kind": self.kind, "files": [path.name for path in self.files]}
        return {"kind": self.kind, "name": self.root.resolve().name}


def find_source(source: PhantomSpec | str | Path, images: Path | None = None) -> Source:
    """What ``source`` is.

    Args:
        source: a ``PhantomSpec``; an SA-Med2D folder (``images/`` and ``masks/``); a folder with
        question/answer files
            and ``images/``; or one question/answer file, with ``images/`` beside it or given.

    Raises:
        DataError: it is none of them.
    """
    if isinstance(source, PhantomSpec):
        if source.images < 1:
            raise DataError(f"{source.images} phantoms were asked for: give data.images a number above 0")
        return Source("phantoms", phantoms=source)
    path = Path(source)
    if not path.exists():
        raise DataError(f"no file or folder {path}: check data.source (--source)")
    if images is not None and not Path(images).is_dir():
        raise DataError(f"no folder {images}: check data.images_dir (--images)")
    if path.is_file():
        if path.suffix.lower() not in QA_SUFFIXES:
            raise DataError(
                f"{path} is not {', '.join(QA_SUFFIXES)}: give a question/answer file or a folder"
            )
        return Source("medgrit", _images_beside(path.parent, images), (path,))
    if images is None and samed2d.is_folder(path):
        return Source("samed2d", path)
    files = tuple(
        file
        for file in sorted(path.iterdir())
        if file.suffix.lower() in QA_SUFFIXES
        and file.is_file()
        and not file.name.startswith(("SAMed2D_v1", "."))
    )
    if not files:
        raise DataError(
            f"{path} holds neither images/ with masks/ nor a question/answer file: give a folder with both, "
            f"or with {', '.join(QA_SUFFIXES)} beside images/"
        )
    return Source("medgrit", _images_beside(path, images), files)


def _images_beside(folder: Path, images: Path | None) -> Path:
    found = Path(images) if images is not None else folder / "images"
    if not found.is_dir():
        raise DataError(
            f"no images beside the questions ({found} is not a folder): give it with data.images (--images)"
        )
    return found


def plan(source: Source, base: dict, size: int, driver: parts.Tally) -> tuple[list[dict], dict[str, int]]:
    """The parts' jobs, and what the source gave as counted here: ``rows`` (pairs) or ``masks``."""
    if source.phantoms is not None:
        total = source.phantoms.images
        spans = [(start, min(start + size, total)) for start in range(0, total, size)]
        return [
            base | {"part": n, "spec": asdict(source.phantoms), "indices": s} for n, s in enumerate(spans)
        ], {}
    spill = _Spill(Path(base["work"]), size)
    if source.kind == "samed2d":
        given = {"masks": _route_masked(source.root, spill, driver)}
    else:
        given = {"rows": _route_entries(source, spill, driver)}
    spill.flush()
    base = base | {"root": str(source.root.absolute())}
    return [base | {"part": n, "rows": str(path)} for n, path in enumerate(spill.paths)], given


class _Spill:
    """Rows to their image's part: numbered in order of first appearance, ``size`` images are a part."""

    def __init__(self, work: Path, size: int) -> None:
        self.work, self.size = work, size
        self.numbers: dict[str, int] = {}
        self.paths: list[Path] = []
        self._held: dict[int, list[str]] = {}
        self._count = 0

    def add(self, image: str, row: dict[str, Any]) -> None:
        part = self.numbers.setdefault(image, len(self.numbers)) // self.size
        if part == len(self.paths):
            self.paths.append(self.work / f"rows-{part:05d}.jsonl")
        self._held.setdefault(part, []).append(json.dumps(row) + "\n")
        self._count += 1
        if self._count >= _BUFFERED:
            self.flush()

    def flush(self) -> None:
        for part, lines in self._held.items():
            with self.paths[part].open("a", encoding="utf-8") as file:
                file.writelines(lines)
        self._held, self._count = {}, 0


def _route_entries(source: Source, spill: _Spill, driver: parts.Tally) -> int:
    """Sends entries to parts by image; returns the number of pairs in the source."""
    total = 0
    for entry in (entry for file in source.files for entry in medgrit.read(file)):
        total += entry.rows
        if not entry.reason:
            spill.add(parts.spelling(entry.image, source.root), asdict(entry))
            continue
        error = RowError(entry.reason, entry.detail)
        for turn in range(entry.rows):
            driver.refuse(error, where=entry.where, id=entry.id, image=entry.image, turn=turn)
    return total


def _route_masked(root: Path, spill: _Spill, driver: parts.Tally) -> int:
    """Sends images with their masks to parts; returns the number of masks in the source."""
    total = 0
    try:
        for row in samed2d.read(root):
            total += len(row.masks)
            if row.image and row.image in spill.numbers:
                error = RowError("duplicate_id", "listed twice")
                for mask in row.masks or (None,):
                    driver.refuse(error, where=row.where, image=row.image, mask=mask)
            else:
                spill.add(row.image or row.where, asdict(row))
        samed2d.class_names(root)
    except RowError as error:
        raise DataError(
            f"{root}: {error.detail}: repair the file, or remove it to go by names alone"
        ) from None
    return total
