"""Stage prepare: images and questions to shards."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from clinkd.artifacts import Artifact, Draft
from clinkd.stages.base import Run


def prepare(run: Run) -> Artifact:
    """Images and questions to shards."""
    data = run.config.data
    settings = data.model_dump() | {
        "seed": run.config.run.seed,
        "content": _content(data.source, data.images),
    }

    def make(draft: Draft) -> dict[str, Any]:
        from clinkd.data.phantoms import PhantomSpec
        from clinkd.data.prepare import prepare as write
        from clinkd.data.validate import Limits

        phantoms = PhantomSpec(data.phantoms, size=data.phantom_size, seed=run.config.run.seed)
        run.progress.start("prepare")
        manifest = write(
            phantoms if data.source == "phantoms" else data.source,
            draft.path,
            images=Path(data.images) if data.images else None,
            seed=run.config.run.seed,
            test_fraction=data.test_fraction,
            images_per_shard=data.records_per_shard,
            limits=Limits(max_pixels=data.max_pixels),
            progress=lambda _, done, total: run.progress.update(done, total=total),
        )
        kept = ("records_in", "records_out", "quarantined", "duplicates", "images", "by_split")
        counts = {key: manifest[key] for key in kept}
        run.progress.finish(records=manifest["records_out"], quarantined=manifest["quarantined"])
        return counts

    return run.stage("prepare", [], settings, make)


def _content(source: str, images: str | None) -> str:
    """A digest of a source's files by name, size and time: has it to be prepared again?"""
    digest = hashlib.sha256()
    for root in filter(None, (None if source == "phantoms" else source, images)):
        paths = [Path(root)] if Path(root).is_file() else sorted(Path(root).rglob("*"))
        for path in paths:
            if path.is_file():
                stat = path.stat()
                digest.update(f"{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()
