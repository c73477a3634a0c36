"""A training task on phantoms without preparing them, for train_step.py."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any


def phantom_table(images: int) -> Any:
    """Records as the shards have them, as far as training reads them: id, turns, png."""
    import pyarrow as pa

    from clinkd.data.phantoms import PhantomSpec, draw

    spec = PhantomSpec(images)
    drawn = [draw(spec, index) for index in range(images)]
    return pa.Table.from_pylist(
        [
            {"id": record.id, "turns": [asdict(turn) for turn in record.turns], "png": png}
            for png, record in drawn
        ]
    )


def write_model(table: Any, size: Any, out: Path) -> Path:
    """A new model of ``size`` (TinySize) with a tokenizer of the table's texts."""
    from clinkd.data.boxes import to_qwen
    from clinkd.model.presets import write_new_model

    turns = [turn for row in table.column("turns").to_pylist() for turn in row]
    texts = [to_qwen(turn[key]) for turn in turns for key in ("question", "answer")]
    return write_new_model(texts, size, out, vocab_size=1024, seed=0)


def write_shards(table: Any, folder: Path) -> Path:
    """The table as prepared data of one shard."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from clinkd.data.shards import schema

    empty = {"more_images": [], "more_png": [], "split": "train", "image": "", "modality": "ct"}
    rows = pa.Table.from_pylist([empty | row for row in table.to_pylist()], schema())
    (folder / "shards").mkdir(parents=True)
    pq.write_table(rows, folder / "shards" / "part-00000.parquet", row_group_size=64)
    (folder / "manifest.json").write_text(json.dumps({"shards": [{"name": "part-00000.parquet"}]}))
    return folder


def task(data: Path, model: Path, scratch: Path, batch: int, per_group: int) -> Any:
    """The supervised task over prepared data, all of the model training."""
    from clinkd.data.feed import Resources
    from clinkd.data.index import build_index
    from clinkd.data.sampler import SamplerOptions
    from clinkd.data.shards import Shards
    from clinkd.model.rope import RopeGuidance
    from clinkd.train.batches import BatchSpec
    from clinkd.train.feed import FeedSpec
    from clinkd.train.tasks import SupervisedTask, VqaSpec

    spec, shards = VqaSpec(str(model), RopeGuidance(2.0, 2.0), train_vision=True), Shards.of(data)
    index = build_index(shards, "train").write(scratch / "index.arrow")
    options = SamplerOptions(0, batch, per_group)
    maker = BatchSpec(spec.model, spec.guidance)
    return SupervisedTask(spec, FeedSpec(maker, options, str(index), shards, Resources(tasks=0)))
