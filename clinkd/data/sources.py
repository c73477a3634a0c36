"""Where data come from, and how the driver cuts them into parts.

Decisions:
- The driver reads texts and names, never pixels, as a stream; it holds one number per image and a bounded
  buffer.
- Images are numbered in order of first appearance and ``images_per_shard`` of them are a part, so an image
  that several task files speak of meets all its rows in one part.
- Rows are sorted into parts on the driver's own disk and go to the working folder when all have been read:
  nothing can be appended to in a bucket.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clinkd import storage
from clinkd.data import medgrit, parts, readers, samed2d
from clinkd.data.phantoms import PhantomSpec
from clinkd.data.shards import MANIFEST, DataError, row_count, shard_paths
from clinkd.data.validate import RowError

FORMATS: dict[str, Callable[[Path], Iterator[medgrit.Entry]]] = {
    suffix: medgrit.read for suffix in (".json", ".jsonl", ".ndjson")
}
"""Readers of question/answer files by their names' ends; what they yield is checked alike (``readers``)."""
_BUFFERED = 20_000  # light rows held before they go to their parts' files


@dataclass(frozen=True)
class Source:
    """Where the data come from: "phantoms", "medgrit" (``files``; ``root`` holds the images), "samed2d" or
    "parquet" (``files`` of a former run)."""

    kind: str
    root: Path = Path()
    files: tuple[Path, ...] = ()
    phantoms: PhantomSpec | None = None

    def describe(self) -> dict[str, Any]:
        """For the manifest: names only, so that the same data elsewhere make the same manifest."""
        if self.phantoms is not None:
            return {"kind": self.kind, **asdict(self.phantoms)}
        if self.files:
            return {"kind": self.kind, "files": [path.name for path in self.files]}
        return {"kind": self.kind, "name": storage.absolute(self.root).name}


def find_source(source: PhantomSpec | str | Path, images: str | Path | None = None) -> Source:
    """What ``source`` is.

    Args:
        source: a ``PhantomSpec``; an SA-Med2D folder (``images/`` and ``masks/``); a folder with
            question/answer files and ``images/``; one question/answer file, with ``images/`` beside it or
            given; or a folder that prepare wrote, or one Parquet file of it. Paths and URIs (s3://).

    Raises:
        DataError: it is none of them.
    """
    if isinstance(source, PhantomSpec):
        if source.images < 1:
            raise DataError(f"{source.images} phantoms were asked for: give data.images a number above 0")
        return Source("phantoms", phantoms=source)
    try:
        path = storage.locate(source)
        shown = storage.locate(images) if images is not None else None
        return _find(path, shown)
    except DataError:
        raise
    except Exception as error:  # whatever a file system's library raises: no protocol, no bucket, no access
        text = " ".join(str(error).split())[:200] or type(error).__name__
        raise DataError(
            f"cannot look into {source}: {text}; check the path, the endpoint (--endpoint-url) and "
            "the credentials"
        ) from None


def _find(path: Path, images: Path | None) -> Source:
    if not path.exists():
        raise DataError(f"no file or folder {path}: check data.source (--source)")
    if images is not None and not images.is_dir():
        raise DataError(f"no folder {images}: check data.images_dir (--images)")
    if path.is_file():
        if path.suffix.lower() == ".parquet":
            return Source("parquet", files=(path,))
        if path.suffix.lower() not in FORMATS:
            raise DataError(f"{path} is not {', '.join(FORMATS)}: give a question/answer file or a folder")
        return Source("medgrit", _images_beside(path.parent, images), (path,))
    if (path / MANIFEST).is_file():
        return Source("parquet", files=tuple(shard_paths(path)))
    if images is None and samed2d.is_folder(path):
        return Source("samed2d", path)
    files = tuple(
        path / name
        for name in storage.names(path)
        if name.lower().endswith(tuple(FORMATS)) and not name.startswith(("SAMed2D_v1", "."))
    )
    if not files:
        raise DataError(
            f"{path} holds neither images/ with masks/ nor a question/answer file: give a folder with both, "
            f"or with {', '.join(FORMATS)} beside images/"
        )
    return Source("medgrit", _images_beside(path, images), files)


def told_by(source: Source) -> list[Path]:
    """The files that say what a source holds."""
    if source.kind == "samed2d":
        return [source.root / samed2d.INDEX, source.root / samed2d.CLASSES]
    return list(source.files)


def _images_beside(folder: Path, images: Path | None) -> Path:
    found = images if images is not None else folder / "images"
    if not found.is_dir():
        raise DataError(
            f"no images beside the questions ({found} is not a folder): give it with data.images (--images)"
        )
    return found


def plan(source: Source, base: dict, size: int, driver: parts.Tally) -> tuple[list[dict], dict[str, int]]:
    """The parts' jobs, and what the source gave as counted here: ``rows`` (pairs) or ``masks``."""
    base = base | {"root": str(storage.absolute(source.root))}
    if source.phantoms is not None:
        spans = _spans(source.phantoms.images, size)
        return [
            base | {"part": n, "spec": asdict(source.phantoms), "indices": s} for n, s in enumerate(spans)
        ], {}
    if source.kind == "parquet":
        found = [(path, span) for path in source.files for span in _spans(row_count(path), size)]
        return [
            base | {"part": n, "file": str(storage.absolute(path)), "first": first, "count": stop - first,
                    "content": storage.stamp(path)}
            for n, (path, (first, stop)) in enumerate(found)
        ], {}  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="clinkd-rows-") as scratch:
        spill = _Spill(Path(scratch), size)
        if source.kind == "samed2d":
            given = {"masks": _route_masked(source.root, spill, driver)}
            names = source.root / samed2d.CLASSES
            base |= {"classes": storage.sha256(names) if names.is_file() else None}
        else:
            given = {"rows": _route_entries(source, spill, driver)}
        moved = spill.move(storage.locate(base["work"]))
    return [base | {"part": n, **rows} for n, rows in enumerate(moved)], given


def _spans(total: int, size: int) -> list[tuple[int, int]]:
    return [(start, min(start + size, total)) for start in range(0, total, size)]


class _Spill:
    """Rows to their image's part: numbered in order of first appearance, ``size`` images are a part."""

    def __init__(self, scratch: Path, size: int) -> None:
        self.scratch, self.size = scratch, size
        # By digest: of millions of names only these stay. Two that met would share a part, no more.
        self._numbers: dict[bytes, int] = {}
        self.paths: list[Path] = []
        self._held: dict[int, list[str]] = {}
        self._count = 0

    def __contains__(self, image: str) -> bool:
        return _short(image) in self._numbers

    def add(self, image: str, row: dict[str, Any]) -> None:
        part = self._numbers.setdefault(_short(image), len(self._numbers)) // self.size
        if part == len(self.paths):
            self.paths.append(self.scratch / f"rows-{part:05d}.jsonl")
        self._held.setdefault(part, []).append(json.dumps(row) + "\n")
        self._count += 1
        if self._count >= _BUFFERED:
            self._flush()

    def _flush(self) -> None:
        for part, lines in self._held.items():
            with self.paths[part].open("a", encoding="utf-8") as file:
                file.writelines(lines)
        self._held, self._count = {}, 0

    def move(self, work: Path) -> list[dict[str, str]]:
        """The parts' files moved to ``work``: ``rows`` (where) and ``content`` (SHA-256) of each."""
        self._flush()
        moved = []
        for path in self.paths:
            content = storage.sha256(path)
            with storage.whole(work / path.name) as file, path.open("rb") as rows:
                shutil.copyfileobj(rows, file)
            moved.append({"rows": str(work / path.name), "content": content})
        return moved


def _short(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=12).digest()


def _route_entries(source: Source, spill: _Spill, driver: parts.Tally) -> int:
    """Sends entries to parts by image; returns the number of pairs in the source."""
    total = 0
    for entry in (entry for file in source.files for entry in FORMATS[file.suffix.lower()](file)):
        total += entry.rows
        if not entry.reason:
            spill.add(readers.spelling(entry.image, source.root), asdict(entry))
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
            if row.image and row.image in spill:
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
