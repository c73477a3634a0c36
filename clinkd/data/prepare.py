"""Prepare: whatever a lab has, to shards, a quarantine and a manifest, through Ray Data.

Decisions:
- The driver streams light rows (texts and names, never pixels) into one file per part; Ray Data runs the
  parts (``parts.check``, then ``parts.write``) wherever there is room. A part is ``images_per_shard`` images
  in the order they first stood in the source, and becomes one shard: which worker made it when leaves no
  trace.
- Same source and seed, same bytes. The manifest comes last; a run that was killed is simply run again.
- Counts are in question/answer pairs (samples) and add up: ``records_in = records_out + quarantined +
  duplicates``. Of a mask folder, a quarantined mask is one row.
- An entry that repeats an image's name joins that image; exact repeats of a pair are duplicates.
- The output folder has to be one that driver and workers share.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from clinkd.data import medgrit, parts, samed2d, split
from clinkd.data.phantoms import PhantomSpec
from clinkd.data.records import TASKS
from clinkd.data.shards import MANIFEST, QUARANTINE, SHARDS, DataError
from clinkd.data.validate import Limits, RowError

__all__ = ["DataError", "Source", "find_source", "prepare"]

Progress = Callable[[str, int, int], None]
"""Called with ("check" | "write", parts done, parts in all)."""
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
        raise DataError(f"no images beside the questions ({found} is not a folder): give it with --images")
    return found


def prepare(
    source: PhantomSpec | str | Path,
    out: Path,
    *,
    images: Path | None = None,
    seed: int = 0,
    test_fraction: float = 0.1,
    images_per_shard: int = 256,
    limits: Limits | None = None,
    strict: bool = False,
    cpus: float = 0.5,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Checks, splits and shards ``source`` into ``out``; Ray has to be running.

    Args:
        source, images: see ``find_source``.
        seed: of the split and of the templates' choices (phantoms have a seed of their own).
        test_fraction: share of the cases that goes to test, in [0, 1).
        strict: the first refused row is an error.
        cpus: Ray CPUs a part's task asks for.

    Returns:
        The manifest, as written to ``out/manifest.json``.

    Raises:
        DataError: no such source, nothing usable in it, or (strict) a refused row.
    """
    if not 0 <= test_fraction < 1:
        raise DataError(f"a test fraction of {test_fraction}: it has to be at least 0 and below 1")
    found, out = find_source(source, images), Path(out).absolute()
    work = _fresh(out)
    driver = parts.Tally(work / "quarantine-driver.jsonl")
    base = {"kind": found.kind, "work": str(work), "seed": seed, "limits": asdict(limits or Limits())}
    jobs, given = _plan(found, base, images_per_shard, driver)
    driver.close()
    facts = sorted(_run(parts.check, jobs, cpus, "check", progress), key=lambda fact: fact["part"])
    _write_quarantine(work, out, len(jobs))
    reasons = sum((Counter(fact["by_reason"]) for fact in facts), Counter(driver.by_reason))
    if strict and reasons:
        with (out / QUARANTINE).open() as file:
            raise DataError(f"strict: {_one_line(json.loads(file.readline()))}")
    kept = [image for fact in facts for image in fact["images"]]
    if not kept:
        raise DataError(f"no usable image in {_name(found)}{_why(reasons)}: see {out / QUARANTINE}")
    sides = _split(kept, seed, test_fraction)
    writes = [
        {
            "part": fact["part"],
            "work": str(work),
            "shards": str(out / SHARDS),
            "splits": [sides[image["case"]] for image in fact["images"]],
        }
        for fact in facts
        if fact["images"]
    ]
    shards = sorted(_run(parts.write, writes, cpus, "write", progress), key=lambda shard: shard["name"])
    manifest = _manifest(found, given, facts, reasons, sides) | {"seed": seed, "test_fraction": test_fraction}
    manifest["shards"] = shards
    _commit(manifest, out)
    shutil.rmtree(work, ignore_errors=True)
    return manifest


def _fresh(out: Path) -> Path:
    """Takes away what a former run left, its marker first; returns the working folder."""
    (out / MANIFEST).unlink(missing_ok=True)
    work = out / ".work"
    for folder in (work, out / SHARDS):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    return work


def _plan(source: Source, base: dict, size: int, driver: parts.Tally) -> tuple[list[dict], dict[str, int]]:
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
    rows = [
        base | {"part": n, "rows": str(path), "root": str(source.root)} for n, path in enumerate(spill.paths)
    ]
    return [job | {"root": str(source.root.absolute())} for job in rows], given


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
    """Sends entries to parts by image name; returns the number of pairs in the source."""
    spellings: dict[str, str] = {}
    ids: dict[str, str] = {}
    total = 0
    for entry in (entry for file in source.files for entry in medgrit.read(file)):
        total += entry.rows
        name = entry.image.rsplit("/", 1)[-1]
        spelling = entry.image.removeprefix("./").removeprefix(f"{source.root.name}/")
        error = RowError(entry.reason, entry.detail) if entry.reason else None
        if error is None and spellings.setdefault(name, spelling) != spelling:
            error = RowError("ambiguous_image", f"{spelling[:120]!r} and {spellings[name][:120]!r}")
        if error is None and ids.setdefault(entry.id, name) != name:
            error = RowError("duplicate_id", f"{entry.id[:120]!r} is the id of {ids[entry.id][:120]!r}")
        if error is None:
            spill.add(name, asdict(entry))
            continue
        for turn in range(entry.rows):
            driver.refuse(error, where=entry.where, id=entry.id, image=entry.image, turn=turn)
    return total


def _route_masked(root: Path, spill: _Spill, driver: parts.Tally) -> int:
    """Sends images with their masks to parts; returns the number of masks in the source."""
    total = 0
    try:
        for row in samed2d.read(root):
            total += len(row.masks)
            name = row.image.rsplit("/", 1)[-1]
            if name and name in spill.numbers:
                error = RowError("duplicate_id", f"{name[:120]!r} is listed twice")
                for mask in row.masks or (None,):
                    driver.refuse(error, where=row.where, image=row.image, mask=mask)
            else:
                spill.add(name or row.where, asdict(row))
        samed2d.class_names(root)
    except RowError as error:
        raise DataError(
            f"{root.name}: {error.detail}: repair the file, or remove it to go by names alone"
        ) from None
    return total


def _run(
    task: Callable[[dict], dict], jobs: list[dict], cpus: float, name: str, progress: Progress | None
) -> list[dict]:
    """Runs ``task`` on every job through Ray Data, one block a job; results in the order they come."""
    import ray

    if not ray.is_initialized():
        raise RuntimeError("prepare runs its parts through Ray Data: call ray.init() first")
    if not jobs:
        return []

    def call(row: dict[str, str]) -> dict[str, str]:
        return {"result": json.dumps(task(json.loads(row["job"])))}

    results = []
    with _quiet():
        items = [{"job": json.dumps(job)} for job in jobs]
        dataset = ray.data.from_items(items, override_num_blocks=len(items)).map(call, num_cpus=cpus)
        for row in dataset.iter_rows():
            results.append(json.loads(row["result"]))
            if progress is not None:
                progress(name, len(results), len(jobs))
    return results


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Ray Data's own progress bars and plan printing; the caller has a progress view of its own."""
    import ray.data

    context, logger = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    bars, level = context.enable_progress_bars, logger.level
    context.enable_progress_bars = False
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        context.enable_progress_bars = bars
        logger.setLevel(level)


def _split(kept: Iterable[dict[str, Any]], seed: int, test_fraction: float) -> dict[str, str]:
    cases: dict[str, set[str]] = {}
    for image in kept:
        cases.setdefault(image["case"], set()).add(image["modality"])
    return split.assign(cases, seed=seed, test_fraction=test_fraction)


def _write_quarantine(work: Path, out: Path, count: int) -> None:
    beside = out / f".{QUARANTINE}.tmp"
    with beside.open("wb") as file:
        for name in ("driver", *(f"{number:05d}" for number in range(count))):
            with (work / f"quarantine-{name}.jsonl").open("rb") as part:
                shutil.copyfileobj(part, file)
    os.replace(beside, out / QUARANTINE)


def _manifest(
    source: Source, given: dict, facts: list[dict], reasons: Counter, sides: dict
) -> dict[str, Any]:
    tasks, modalities, splits = Counter(dict.fromkeys(TASKS, 0)), Counter[str](), Counter[str]()
    table: dict[str, Counter[str]] = {}
    for image in (image for fact in facts for image in fact["images"]):
        samples, side = sum(image["tasks"].values()), sides[image["case"]]
        tasks.update(image["tasks"])
        modalities[image["modality"]] += samples
        splits[side] += samples
        table.setdefault(image["modality"], Counter(train=0, test=0))[side] += 1
    records_out, quarantined = sum(tasks.values()), sum(reasons.values())
    duplicates = sum(fact["duplicates"] for fact in facts)
    records_in = given.get("rows", records_out + quarantined + duplicates)
    manifest = {
        "format": 1,
        "source": source.describe(),
        "records_in": records_in,
        "records_out": records_out,
        "quarantined": quarantined,
        "duplicates": duplicates,
        "images": sum(len(fact["images"]) for fact in facts),
        "by_task": dict(tasks),
        "by_modality": dict(sorted(modalities.items())),
        "by_split": {side: splits[side] for side in ("train", "test")},
        "by_reason": dict(sorted(reasons.items())),
        "images_by_modality": {name: dict(table[name]) for name in sorted(table)},
    }
    if "masks" in given:
        targets = sum(fact["targets"] for fact in facts)
        manifest["masks"] = {
            "in": given["masks"],
            "targets": targets,
            "quarantined": given["masks"] - targets,
        }
    if records_in != records_out + quarantined + duplicates:
        raise RuntimeError(
            f"rows were lost: {records_in} in, {records_out} + {quarantined} + {duplicates} out"
        )
    return manifest


def _commit(manifest: dict[str, Any], out: Path) -> None:
    beside = out / f".{MANIFEST}.tmp"
    beside.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(beside, out / MANIFEST)


def _name(source: Source) -> str:
    return ", ".join(str(path) for path in source.files) or str(source.root)


def _why(reasons: Counter[str]) -> str:
    listed = ", ".join(f"{count} {code}" for code, count in islice(reasons.most_common(), 3))
    return f" ({listed})" if listed else " (it is empty)"


def _one_line(row: dict[str, Any]) -> str:
    return f"{row['reason']} at {row.get('where')}: {row['detail']}: repair the row or prepare without strict"
