"""Prepare: whatever a lab has, to shards, a quarantine and a manifest, through Ray Data.

Decisions:
- The driver streams light rows (texts and names, never pixels) into one file per part; Ray Data runs the
  parts (``parts.check``, then ``parts.write``) wherever there is room. A part is ``images_per_shard`` images
  in the order they first stood in the source, and becomes one shard: which worker made it when leaves no
  trace.
- Same source and seed, same bytes. The manifest comes last; a run that was killed goes on where it was when
  the same command is given again: parts that are done and whose files are still the same are taken.
- Counts are in question/answer pairs (samples) and add up: ``records_in = records_out + quarantined +
  duplicates``. Of a mask folder, a quarantined mask is one row.
- An entry that repeats an image's name joins that image; exact repeats of a pair are duplicates.
- The output is a folder that driver and workers share, or a URI (s3://).
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clinkd import storage
from clinkd.data import parts
from clinkd.data.census import Census
from clinkd.data.phantoms import PhantomSpec
from clinkd.data.shards import MANIFEST, QUARANTINE, SHARDS, DataError
from clinkd.data.sources import Source, find_source, plan
from clinkd.data.validate import Limits

__all__ = ["DataError", "Source", "find_source", "prepare", "run"]

WORK = ".work"
"""Folder under the output that holds what a run has done so far; gone when it is whole."""

Progress = Callable[[str, int, int], None]
"""Called with ("check" | "write", parts done, parts in all)."""


def prepare(
    source: PhantomSpec | str | Path,
    out: str | Path,
    *,
    images: str | Path | None = None,
    seed: int = 0,
    test_fraction: float = 0.1,
    validation_fraction: float = 0.0,
    images_per_shard: int = 256,
    limits: Limits | None = None,
    strict: bool = False,
    dry: bool = False,
    cpus: float = 0.5,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Checks, splits and shards ``source`` into ``out``; Ray has to be running.

    Args:
        source, images: see ``find_source``.
        seed: of the split and of the templates' choices (phantoms have a seed of their own).
        test_fraction, validation_fraction: shares of the cases that go to test and to validation, in [0, 1)
            together; no validation by default.
        strict: the first refused row is an error.
        dry: check everything and write nothing but ``out/quarantine.jsonl``.
        cpus: Ray CPUs a part's task asks for.

    Returns:
        The manifest, as written to ``out/manifest.json``.

    Raises:
        DataError: no such source, nothing usable in it, or (strict) a refused row.
        OSError: a bucket could not be read or written, in spite of all tries; the same call goes on.
    """
    _check_fractions(test_fraction, validation_fraction)
    found, out = find_source(source, images), storage.absolute(storage.locate(out))
    _keep_apart(found, out)
    work = _begin(out, dry)
    driver = parts.Tally()
    base = {
        "kind": found.kind,
        "work": str(work),
        "seed": seed,
        "limits": asdict(limits or Limits()),
        "dry": dry,
    }
    jobs, given = plan(found, base, images_per_shard, driver)
    census = Census(driver)
    facts = []
    for fact in _in_order(run(parts.check, jobs, cpus, "check", progress)):
        census.add(fact)
        facts.append(fact["sha256"])
    driver.save(work / "quarantine-driver.jsonl")
    _write_quarantine(work, out, len(jobs))
    reasons = driver.by_reason + census.by_reason
    _complain(found, out, reasons, census.records > 0, strict)
    census.settle(seed, test_fraction, validation_fraction)
    manifest = _manifest(found, given, census, reasons)
    manifest |= {"seed": seed, "test_fraction": test_fraction, "leaks": census.leaks}
    if validation_fraction:
        manifest["validation_fraction"] = validation_fraction
    if dry:
        storage.remove(work)
        return manifest
    writing = run(parts.write, _write_jobs(census, facts, work, out), cpus, "write", progress)
    manifest["shards"] = sorted(writing, key=lambda shard: shard["name"])
    _commit(manifest, out)
    return manifest


def _check_fractions(test: float, validation: float) -> None:
    if not 0 <= test < 1:
        raise DataError(f"a test fraction of {test}: it has to be at least 0 and below 1")
    if not 0 <= validation < 1 - test:
        raise DataError(
            f"a validation fraction of {validation}: it has to be at least 0, and below 1 with the test "
            f"fraction ({test})"
        )


def _keep_apart(source: Source, out: Path) -> None:
    """Refuses an output that would be written over what is read: a killed run would leave neither."""
    read = [file.parent for file in source.files]
    if source.kind == "parquet":
        read = [folder.parent for folder in read]  # of its shards
    elif source.kind == "samed2d":
        read = [source.root]
    if str(out.resolve()) in {str(storage.absolute(folder).resolve()) for folder in read}:
        raise DataError(f"{out} holds the source: give --out a folder of its own")


def _begin(out: Path, dry: bool) -> Path:
    """Takes away a former run's marker, not what it has done; returns the working folder."""
    work = out / WORK
    storage.make_folder(work)
    if not dry:
        storage.remove(out / MANIFEST)
        storage.make_folder(out / SHARDS)
    return work


def run(
    task: Callable[[dict], dict], jobs: list[dict], cpus: float, name: str, progress: Progress | None
) -> Iterator[dict]:
    """Runs ``task`` on every job through Ray Data, one block a job; results in the order they come."""
    import ray

    if not ray.is_initialized():
        raise RuntimeError("prepare runs its parts through Ray Data: call ray.init() first")
    if not jobs:
        return
    endpoint = storage.endpoint()

    def call(row: dict[str, str]) -> dict[str, str]:
        storage.configure(endpoint)
        try:
            return {"result": json.dumps(task(json.loads(row["job"]))), "error": "", "kind": ""}
        except Exception as error:  # told as a value: what Ray raises is pages long
            if not (isinstance(error, DataError) or storage.outage(error)):
                raise
            text = " ".join(f"{error}".split())[:300] or type(error).__name__
            kind = "data" if isinstance(error, DataError) else "storage"
            return {"result": "", "error": text, "kind": kind}

    done = 0
    with _quiet():
        items = [{"job": json.dumps(job)} for job in jobs]
        dataset = ray.data.from_items(items, override_num_blocks=len(items)).map(call, num_cpus=cpus)
        for row in dataset.iter_rows():
            if row["kind"] == "data":
                raise DataError(row["error"])
            if row["error"]:
                raise OSError(f"{row['error']}; give the same command again: it goes on where it was")
            done += 1
            if progress is not None:
                progress(name, done, len(jobs))
            yield json.loads(row["result"])


def _in_order(facts: Iterator[dict]) -> Iterator[dict]:
    """Parts' facts by number, each as soon as all before it are there."""
    waiting: dict[int, dict] = {}
    number = 0
    for fact in facts:
        waiting[fact["part"]] = fact
        while number in waiting:
            yield waiting.pop(number)
            number += 1


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


def _complain(source: Source, out: Path, reasons: Counter[str], usable: bool, strict: bool) -> None:
    """Ends a run that cannot end well, and with it what it has done: what is wrong is to be repaired."""
    if usable and not (strict and reasons):
        return
    storage.remove(out / WORK)
    if strict and reasons:
        with (out / QUARANTINE).open("rb") as file:
            row = json.loads(file.readline())
        raise DataError(
            f"strict: {row['reason']} at {row['where']} ({row['detail']}): repair it or leave strict out"
        )
    listed = ", ".join(f"{count} {code}" for code, count in reasons.most_common(3)) or "it is empty"
    name = ", ".join(str(path) for path in source.files) or str(source.root)
    raise DataError(f"no usable image in {name} ({listed}): see {out / QUARANTINE}")


def _write_jobs(census: Census, checked: list[str], work: Path, out: Path) -> list[dict]:
    return [
        {
            "part": part.number,
            "checked": digest,
            "work": str(work),
            "shards": str(out / SHARDS),
            "sides": census.sides_of(part),
            "dropped": part.dropped,
        }
        for part, digest in zip(census.parts, checked, strict=True)
        if part.cases
    ]


def _write_quarantine(work: Path, out: Path, count: int) -> None:
    with storage.whole(out / QUARANTINE) as file:
        for name in ("driver", *(f"{number:05d}" for number in range(count))):
            with (work / f"quarantine-{name}.jsonl").open("rb") as part:
                shutil.copyfileobj(part, file)


def _manifest(source: Source, given: dict[str, int], census: Census, reasons: Counter) -> dict[str, Any]:
    counts = census.counts()
    records_out, quarantined = sum(counts["by_task"].values()), sum(reasons.values())
    records_in = given.get("rows", census.rows)
    if source.kind == "samed2d":  # its pairs are made here; what it gives are masks
        records_in = records_out + quarantined + census.duplicates
    manifest = {
        "format": parts.FORMAT,
        "source": source.describe(),
        "records_in": records_in,
        "records_out": records_out,
        "quarantined": quarantined,
        "duplicates": census.duplicates,
        "images": census.records,
        "by_reason": dict(sorted(reasons.items())),
        **counts,
    }
    if "masks" in given:
        refused = census.tally.masks + census.refused_masks
        manifest["masks"] = {"in": given["masks"], "targets": census.targets, "quarantined": refused}
        if given["masks"] != census.targets + refused:
            raise RuntimeError(f"masks were lost: {given['masks']} in, {census.targets} + {refused} out")
    if records_in != records_out + quarantined + census.duplicates:
        raise RuntimeError(
            f"rows were lost: {records_in} in, {records_out} + {quarantined} + {census.duplicates} out"
        )
    return manifest


def _commit(manifest: dict[str, Any], out: Path) -> None:
    """Takes away what former runs left and is not this one's, writes the marker, and clears up."""
    kept = {shard["name"] for shard in manifest["shards"]}
    for folder in (out, out / SHARDS):
        for name in storage.names(folder):
            stale = name not in kept if folder != out else name.startswith(".") and name.endswith(".tmp")
            if stale:
                storage.remove(folder / name)
    storage.write_whole(out / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    storage.remove(out / WORK)
