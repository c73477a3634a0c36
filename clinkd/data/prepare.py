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
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clinkd.data import parts, split
from clinkd.data.phantoms import PhantomSpec
from clinkd.data.records import TASKS
from clinkd.data.shards import MANIFEST, QUARANTINE, SHARDS, DataError
from clinkd.data.sources import Source, find_source, plan
from clinkd.data.validate import Limits, RowError

__all__ = ["DataError", "Source", "find_source", "prepare"]

Progress = Callable[[str, int, int], None]
"""Called with ("check" | "write", parts done, parts in all)."""


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
    jobs, given = plan(found, base, images_per_shard, driver)
    facts = sorted(_run(parts.check, jobs, cpus, "check", progress), key=lambda fact: fact["part"])
    _drop_repeated(facts, driver)
    driver.close()
    _write_quarantine(work, out, len(jobs))
    reasons = sum((Counter(fact["by_reason"]) for fact in facts), Counter(driver.by_reason))
    _complain(found, out, reasons, any(fact["images"] for fact in facts), strict)
    sides = _split(facts, seed, test_fraction)
    shards = _run(parts.write, _write_jobs(facts, sides, work, out), cpus, "write", progress)
    manifest = _manifest(found, given | {"refused_masks": driver.masks}, facts, reasons, sides)
    manifest |= {"seed": seed, "test_fraction": test_fraction}
    manifest["shards"] = sorted(shards, key=lambda shard: shard["name"])
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


def _drop_repeated(facts: list[dict], driver: parts.Tally) -> None:
    """Takes out images whose file name or id an earlier one has; ``dropped`` are their rows in the part.

    Only now, among images that passed: a broken row must not take the place of a good one.
    """
    names: set[str] = set()
    ids: set[str] = set()
    for fact in facts:
        kept, fact["dropped"] = [], []
        for place, image in enumerate(fact["images"]):
            code = (
                "ambiguous_image" if image["image"] in names else "duplicate_id" if image["id"] in ids else ""
            )
            if code:
                fact["dropped"].append(place)
                error = RowError(code, f"{image['image'][:120]!r}, id {image['id'][:120]!r}")
                for mask in image["masks"] or [None] * sum(image["tasks"].values()):
                    row = {"where": image["where"], "id": image["id"], "image": image["image"]}
                    driver.refuse(error, **row, mask=mask)
            else:
                kept.append(image)
            names.add(image["image"])
            ids.add(image["id"])
        fact["images"] = kept


def _complain(source: Source, out: Path, reasons: Counter[str], usable: bool, strict: bool) -> None:
    if strict and reasons:
        with (out / QUARANTINE).open() as file:
            row = json.loads(file.readline())
        raise DataError(
            f"strict: {row['reason']} at {row['where']} ({row['detail']}): repair it or leave strict out"
        )
    if not usable:
        listed = ", ".join(f"{count} {code}" for code, count in reasons.most_common(3)) or "it is empty"
        name = ", ".join(str(path) for path in source.files) or str(source.root)
        raise DataError(f"no usable image in {name} ({listed}): see {out / QUARANTINE}")


def _split(facts: list[dict], seed: int, test_fraction: float) -> dict[str, str]:
    cases: dict[str, set[str]] = {}
    for image in (image for fact in facts for image in fact["images"]):
        cases.setdefault(image["case"], set()).add(image["modality"])
    return split.assign(cases, seed=seed, test_fraction=test_fraction)


def _write_jobs(facts: list[dict], sides: dict[str, str], work: Path, out: Path) -> list[dict]:
    return [
        {
            "part": fact["part"],
            "work": str(work),
            "shards": str(out / SHARDS),
            "sides": [sides[image["case"]] for image in fact["images"]],
            "dropped": fact["dropped"],
        }
        for fact in facts
        if fact["images"]
    ]


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
        "format": 2,
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
        targets = sum(len(image["masks"]) for fact in facts for image in fact["images"])
        refused = given["refused_masks"] + sum(fact["refused_masks"] for fact in facts)
        manifest["masks"] = {"in": given["masks"], "targets": targets, "quarantined": refused}
        if given["masks"] != targets + refused:
            raise RuntimeError(f"masks were lost: {given['masks']} in, {targets} + {refused} out")
    if records_in != records_out + quarantined + duplicates:
        raise RuntimeError(
            f"rows were lost: {records_in} in, {records_out} + {quarantined} + {duplicates} out"
        )
    return manifest


def _commit(manifest: dict[str, Any], out: Path) -> None:
    beside = out / f".{MANIFEST}.tmp"
    beside.write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(beside, out / MANIFEST)
