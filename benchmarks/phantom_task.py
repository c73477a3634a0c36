"""A training task on phantoms without preparing shards, for teacher_cache_forms.py and train_step.py."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass
class Rows:
    """What a task asks of Ray's dataset, of a table in memory."""

    table: Any

    def iter_batches(self, **kwargs: Any) -> Iterator[Any]:
        yield self.table


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


def task(table: Any, model: Path, scratch: Path) -> Any:
    """The supervised task, all of the model training."""
    from clinkd.model.rope import RopeGuidance
    from clinkd.train.tasks import SupervisedTask, VqaSpec

    scratch.mkdir(parents=True, exist_ok=True)
    return SupervisedTask(
        Rows(table), scratch, VqaSpec(str(model), RopeGuidance(2.0, 2.0), train_vision=True)
    )
