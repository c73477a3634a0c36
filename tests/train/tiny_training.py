"""A stage on two Ray Train workers, on prepared phantoms with scores of a guide that was made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from clinkd.config import ComputeSection, OptimSection


def made_up_scores(prepared: Path, out: Path) -> str:
    """Alignment and relevance of every sample, on a guide's grid of 3 x 4."""
    from clinkd.data.scores import FILE, write_scores
    from clinkd.data.shards import samples

    names = [item["sample"] for item in samples(prepared)]
    maps = [[(37 * number + 20 * cell) % 256 for cell in range(12)] for number in range(len(names))]
    alignment = [number % 11 / 10 for number in range(len(names))]
    write_scores(out, names, alignment, maps, [[3]] * len(names), [[4]] * len(names))
    return str(out / FILE)


def train(
    prepared: Path,
    out: Path,
    spec: Any,
    *,
    zero: int,
    steps: int,
    precision: str = "fp32",
    checkpoint_every: int = 100,
    task: Any = None,
    compute: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Lines of the metrics; the model lies in ``out / "model"``. ``task``: in place of SupervisedTask;
    ``compute``: more of that section."""
    import ray.data

    from clinkd.data.shards import shard_paths
    from clinkd.train.loop import TrainJob, fit
    from clinkd.train.tasks import SupervisedTask

    kind = task or SupervisedTask
    out.mkdir(exist_ok=True)
    job = TrainJob(
        stage="teacher",
        make_task=lambda rows, scratch: kind(rows, scratch, spec, zero),
        optim=OptimSection(batch_size=2, questions_per_image=3, lr=5e-3),
        compute=ComputeSection(
            workers=2, precision=precision, checkpoint_every=checkpoint_every, **compute or {}
        ),
        zero_stage=zero,
        steps=steps,
        seed=0,
        out=str(out),
    )
    rows = ray.data.read_parquet([str(path) for path in shard_paths(prepared)])
    fit(job, rows.filter(expr=ray.data.expressions.col("split") == "train"), out / "work")
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
