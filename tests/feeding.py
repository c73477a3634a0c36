"""Prepared data written by hand, and batches of chosen groups as a training worker gets them, without Ray."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from clinkd.data.feed import Resources, order_of
from clinkd.data.index import build_index
from clinkd.data.reading import Records
from clinkd.data.sampler import Batch, Group, SamplerOptions
from clinkd.data.shards import Shards, schema
from clinkd.train.batches import BatchSpec
from clinkd.train.feed import FeedSpec, Share
from clinkd.train.tasks import VqaSpec

HERE = Resources(tasks=0)
OPTIONS = SamplerOptions(0, 2, per_group=3)


def write_shard(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """A prepared folder of one shard, four records a row group."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    shards = folder / "shards"
    shards.mkdir(parents=True)
    defaults = {"split": "train", "width": 56, "height": 56, "more_images": [], "more_png": []}
    table = pa.Table.from_pylist([defaults | row for row in rows], schema())
    pq.write_table(table, shards / "part-00000.parquet", row_group_size=4)
    (folder / "manifest.json").write_text(json.dumps({"shards": [{"name": "part-00000.parquet"}]}))
    return folder


def source(
    prepared: Path, folder: Path, maker: Any, options: SamplerOptions = OPTIONS, resources: Resources = HERE
) -> FeedSpec:
    """The training split of prepared data, fed; the index lies in ``folder``."""
    shards = Shards.of(prepared)
    index = build_index(shards, "train")
    if options.tokens is not None or getattr(maker, "conversations", False):
        index = index.measured(maker.measure, shards)
    path = index.write(folder / "index.arrow")
    return FeedSpec(maker, options, str(path), shards, resources)


def answers(spec: VqaSpec, **more: Any) -> BatchSpec:
    """What makes the batches of a stage that answers."""
    kept = {"scores": spec.scores, "min_pixels": spec.min_pixels, "max_pixels": spec.max_pixels}
    return BatchSpec(spec.model, spec.guidance, **kept | more)


def batch(
    task: Any, groups: Sequence[Group], step: int = 0, total: int = 1, lane: int = 0
) -> tuple[dict[str, Any], int]:
    """The loss module's arguments for these groups, a sequence each, and the tokens they are over."""
    chosen = task.choose(Batch((0, 0), tuple((group,) for group in groups)), lane, step, total)
    spec = task.source
    order = order_of(spec.records(), chosen, step)
    arrays = dict(spec.maker.make(order, Records(spec.shards, 1 << 20)))
    arrays.pop("samples")
    found: tuple[dict[str, Any], int] = task.arguments(arrays, chosen, step, torch.device("cpu"))
    return found


def share(steps: int, lanes: int = 1, lane: int = 0, step: int = 0, state: Any = None) -> Share:
    """One lane's batches of ``steps`` steps, one a step."""
    return Share(lanes, 1, (lane,), step, steps, steps, state)
