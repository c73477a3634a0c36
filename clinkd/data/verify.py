"""Prepared data, checked again from the shards alone: hashes, counts, leaks, and the split itself.

Decisions:
- What the manifest says is worked out anew from the shards' rows by the code that wrote it (``census``); the
  split must come out the same from seed and fraction.
- That no image, case or near-duplicate stands on both sides is looked at for itself, not inferred from the
  split having been made that way.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np

from clinkd import storage
from clinkd.data.census import Census
from clinkd.data.fingerprint import near_pairs, perceptual_hash
from clinkd.data.parts import Tally
from clinkd.data.records import TASKS, case_of, modality_of
from clinkd.data.shards import DataError, read_manifest, rows_of, shard_paths


def verify(data: str, run: Callable[[Callable[[dict], dict], list[dict]], list[dict]]) -> dict[str, Any]:
    """Checks a prepared folder or URI whole.

    Args:
        run: does a task over jobs, as ``prepare`` does its parts.

    Returns:
        The manifest.

    Raises:
        DataError: what is wrong, where, and what to do.
    """
    manifest = read_manifest(data)
    paths = shard_paths(data)
    jobs = [
        {"part": number, "file": str(storage.absolute(path)), "sha256": shard["sha256"]}
        for number, (path, shard) in enumerate(zip(paths, manifest["shards"], strict=True))
    ]
    facts = sorted(run(look, jobs), key=lambda fact: fact["part"])
    for shard, fact in zip(manifest["shards"], facts, strict=True):
        if shard["sha256"] != fact["sha256"]:
            raise DataError(
                f"{shard['name']} in {data} is not what was written (SHA-256 {fact['sha256'][:12]}…, "
                f"{shard['sha256'][:12]}… in the manifest): run `clinkd prepare` again"
            )
    _check_leaks(facts, data)
    census = Census(Tally())
    for fact in facts:
        census.add(fact)
    census.settle(manifest["seed"], manifest["test_fraction"], manifest.get("validation_fraction", 0.0))
    found = census.counts() | {"images": census.records}
    for key, value in found.items():
        if manifest[key] != value:
            raise DataError(
                f"{data}: {key} is {value} in the shards, {manifest[key]} in the manifest: prepare again"
            )
    for part, fact in zip(census.parts, facts, strict=True):
        if census.sides_of(part) != fact["sides"]:
            raise DataError(
                f"{paths[part.number].name} in {data}: the split does not follow from seed "
                f"{manifest['seed']} and test fraction {manifest['test_fraction']}: prepare again"
            )
    return manifest


def look(job: dict[str, Any]) -> dict[str, Any]:
    """One shard's facts, in the form that ``parts.check`` gives, with its SHA-256 and its rows' sides.

    A shard that is not the one that was written is not looked into.
    """
    path = storage.locate(job["file"])
    records, sides = [], []
    digest = storage.sha256(path)
    for number, row in enumerate(rows_of(path) if digest == job["sha256"] else ()):
        sides.append(row["split"])
        names = [row["image"], *(other["image"] for other in row.get("more_images") or [])]
        images = [row["png"], *(row.get("more_png") or [])]
        tasks = [turn["task"] for turn in row["turns"]]
        records.append(
            {
                "id": row["id"],
                "where": f"{path.name} row {number}",
                "masks": [],
                "tasks": {task: tasks.count(task) for task in TASKS},
                "pictures": [
                    [name, name, modality_of(name), case_of(name), _hash(data)]
                    for name, data in zip(names, images, strict=True)
                ],
            }
        )
    return {
        "part": job["part"],
        "sha256": digest,
        "rows": 0,
        "duplicates": 0,
        "by_reason": {},
        "refused_masks": 0,
        "records": records,
        "sides": sides,
    }


def _hash(data: bytes) -> str | None:
    from PIL import Image

    return perceptual_hash(Image.open(io.BytesIO(data)))


def _check_leaks(facts: list[dict], data: str) -> None:
    """Raises DataError when an image, a case or a near-duplicate is on both sides."""
    side_of: dict[tuple[str, str], str] = {}
    hashes, sides, names = [], [], []
    for fact in facts:
        for record, side in zip(fact["records"], fact["sides"], strict=True):
            for name, _, _, case, fingerprint in record["pictures"]:
                for kind, value in (("image", name), ("case", case)):
                    if side_of.setdefault((kind, value), side) != side:
                        raise DataError(f"{data}: {kind} {value[:120]!r} is in train and in test")
                if fingerprint is not None:
                    hashes.append(bytes.fromhex(fingerprint))
                    sides.append(side)
                    names.append(name)
    if hashes:
        bits = np.frombuffer(b"".join(hashes), np.uint8).reshape(len(hashes), -1)
        for first, second in near_pairs(bits):
            if sides[first] != sides[second]:
                raise DataError(
                    f"{data}: {names[first][:120]!r} and {names[second][:120]!r} are near-duplicates, one in "
                    "train and one in test"
                )
