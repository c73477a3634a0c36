"""A stage on two Ray Train workers, on prepared phantoms with scores of a guide that was made up."""

from __future__ import annotations

import json
from dataclasses import replace
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


def train(prepared: Path, out: Path, spec: Any, **how: Any) -> list[dict[str, Any]]:
    """Lines of the metrics; the model lies in ``out / "model"``. ``how``: see ``job_of``."""
    return train_each(prepared, {"one": (out, spec, how)})["one"]


def train_each(
    prepared: Path, ways: dict[str, tuple[Path, Any, dict[str, Any]]]
) -> dict[str, list[dict[str, Any]]]:
    """One training after the other, each (out, spec, how), by the same workers, whose start takes longest."""
    import ray.data

    from clinkd.data.shards import shard_paths
    from clinkd.train.loop import fit

    jobs = [job_of(*way) for way in ways.values()]
    *before, last = jobs

    def make_task(rows: Any, scratch: Path) -> Any:
        import ray.train
        import torch

        from clinkd.train.loop import Worker

        context = ray.train.get_context()
        for number, job in enumerate(before):
            torch.manual_seed(job.seed)  # as each has it when it is the only one
            task = job.make_task(rows, scratch / str(number))
            Worker(job, task, context.get_world_rank(), context.get_world_size()).run()
        torch.manual_seed(last.seed)
        return last.make_task(rows, scratch)

    rows = ray.data.read_parquet([str(path) for path in shard_paths(prepared)])
    kept = rows.filter(expr=ray.data.expressions.col("split") == "train")
    fit(replace(last, make_task=make_task), kept, Path(last.out) / "work")
    return {
        name: [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        for name, (out, _, _) in ways.items()
    }


def job_of(out: Path, spec: Any, how: dict[str, Any]) -> Any:
    """``how``: zero, steps; precision, checkpoint_every, compute (more of that section); task: in place of
    SupervisedTask; optim: more of that section."""
    from clinkd.train.loop import TrainJob
    from clinkd.train.tasks import SupervisedTask

    out.mkdir(exist_ok=True)
    kind, zero = how.get("task") or SupervisedTask, how["zero"]
    compute = {key: how[key] for key in ("precision", "checkpoint_every") if key in how}
    return TrainJob(
        stage="teacher",
        make_task=lambda rows, scratch: kind(rows, scratch, spec, zero),
        optim=OptimSection(**{"batch_size": 2, "questions_per_image": 3, "lr": 5e-3} | how.get("optim", {})),
        compute=ComputeSection(**{"workers": 2, "checkpoint_every": 100} | compute | how.get("compute", {})),
        zero_stage=zero,
        steps=how["steps"],
        seed=0,
        out=str(out),
    )
