"""Stage prepare: images and questions to shards."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clinkd import metrics, storage
from clinkd.artifacts import Artifact, Draft
from clinkd.config import DataSection
from clinkd.data.shards import SHARDS
from clinkd.stages.base import Run, content_digest


def prepare(run: Run) -> Artifact:
    """Images and questions to shards."""
    data = run.config.data
    settings = data.model_dump(exclude={"endpoint_url"}) | {
        "seed": run.config.run.seed,
        "content": _content(data),
    }

    def make(draft: Draft) -> dict[str, Any]:
        from clinkd.data.phantoms import PhantomSpec
        from clinkd.data.prepare import prepare as write
        from clinkd.data.validate import Limits

        run.start_training_workers()
        phantoms = PhantomSpec(data.phantoms, size=data.phantom_size, seed=run.config.run.seed)
        run.progress.start("prepare")
        manifest = write(
            phantoms if data.source == "phantoms" else data.source,
            draft.path,
            images=data.images,
            seed=run.config.run.seed,
            test_fraction=data.test_fraction,
            validation_fraction=data.validation_fraction,
            images_per_shard=data.records_per_shard,
            limits=Limits(max_pixels=data.max_pixels),
            progress=lambda _, done, total: run.progress.update(done, total=total),
        )
        draft.know({f"{SHARDS}/{shard['name']}": shard["sha256"] for shard in manifest["shards"]})
        kept = ("records_in", "records_out", "quarantined", "duplicates", "images", "by_split")
        counts = {key: manifest[key] for key in kept}
        run.progress.finish(records=manifest["records_out"], quarantined=manifest["quarantined"])
        name = run.config.run.name
        metrics.DATA_READ.set(manifest["records_in"], run=name)
        metrics.DATA_QUARANTINED.set(manifest["quarantined"], run=name)
        metrics.DATA_DUPLICATE.set(manifest["duplicates"], run=name)
        return counts

    return run.stage("prepare", [], settings, make, version=3)


def _content(data: DataSection) -> str:
    """What lies in the source: has it to be prepared again?

    Of a bucket the files that say what is in it are looked at, not its millions of images.
    """
    from clinkd.data.sources import find_source, told_by

    roots = [None if data.source == "phantoms" else data.source, data.images]
    local = content_digest(*(Path(root) for root in roots if root and not storage.is_remote(root)))
    if not any(root and storage.is_remote(root) for root in roots):
        return local
    told = told_by(find_source(data.source, data.images))
    return "\n".join([local, *(f"{path} {storage.stamp(path)}" for path in told)])
