"""Stage guide: trains the Med-CLIP, measures it, and scores every (image, question)."""

from __future__ import annotations

import json
from typing import Any

from clinkd.artifacts import Artifact, Draft
from clinkd.config import OptimSection
from clinkd.stages.base import Run, write_whole
from clinkd.stages.models import pixel_limits, start_model, teacher_rope, vqa_spec
from clinkd.stages.training import train

RETRIEVAL = "retrieval.json"


def guide(run: Run) -> Artifact:
    """The guide as a model's folder (the teacher starts there), scores beside it."""
    config = run.config
    settings = {
        "guide": config.guide.model_dump(), "teacher": config.teacher.tiny.model_dump(),
        "path": config.teacher.path, "vision": config.model.vision.model_dump(),
        "vocab_size": config.model.vocab_size, "seed": config.run.seed,
    } | pixel_limits(config)  # fmt: skip

    def make(draft: Draft) -> dict[str, Any]:
        counts: dict[str, Any] = {}
        if not (draft.path / "model" / "guide.json").is_file():
            counts = _train(run, draft)
        retrieval = _score(run, draft)
        write_whole(draft.path / RETRIEVAL, json.dumps(retrieval))
        run.progress.record(stage="guide", event="retrieval", **retrieval)
        return counts | retrieval

    return run.stage("guide", ["prepare"], settings, make, version=2)


def _train(run: Run, draft: Draft) -> dict[str, Any]:
    from clinkd.train.guide_task import GuideTask

    options, workers = run.config.guide, run.config.compute.workers
    start = start_model(run, draft, run.config.teacher.tiny, run.config.teacher.path)
    spec = vqa_spec(run, start, teacher_rope(), train_vision=run.config.teacher.path is None)
    optim = OptimSection(
        steps=options.steps, batch_size=max(1, options.batch_size // workers), lr=options.lr, warmup=0.1,
        questions_per_image=1_000_000,
    )  # fmt: skip
    return train(run, draft, "guide", optim, 0, lambda rows, scratch: GuideTask(rows, scratch, spec))


def _score(run: Run, draft: Draft) -> dict[str, Any]:
    """Raw scores of all samples, calibrated on the training split; retrieval on the test split."""
    import torch

    from clinkd.data.ingest import read_records
    from clinkd.data.scores import write_scores
    from clinkd.data.shards import samples
    from clinkd.evaluate.alignment import ScoreSpec, score
    from clinkd.model.guide import fit_calibration

    data = run.done["prepare"].path
    total = sum(1 for _ in samples(data))
    names = sorted(
        {item["answer"].strip().lower() for item in samples(data, "test") if item["task"] == "roc"}
    )
    run.progress.start("guide: scores", total)
    rows: list[dict[str, Any]] = []
    spec = ScoreSpec(str((draft.path / "model").resolve()), tuple(names or ["nothing"]))
    records = read_records(data, blocks=run.blocks)
    for row in score(records, spec, actors=run.config.compute.actors):
        rows.append(row)
        run.progress.update(len(rows), record=False)
    rows.sort(key=lambda row: row["sample"])
    own, other = (
        torch.tensor([row[key] for row in rows if row["split"] == "train"]) for key in ("own", "other")
    )
    match = torch.cat([torch.ones_like(own), torch.zeros_like(other)])
    slope, bias = fit_calibration(torch.cat([own, other]), match)
    raw = torch.tensor([row["own"] for row in rows])
    calibrated = torch.sigmoid(slope * raw + bias).tolist()
    write_scores([row["sample"] for row in rows], calibrated, draft.path)
    tested = [row for row in rows if row["split"] == "test"]
    regions = sum(row["regions"] for row in tested)
    right = sum(row["right"] for row in tested)
    found = {
        "retrieval_at_1": right / regions if regions else None,
        "chance": 1 / len(names) if names else None, "regions": regions,
        "temperature": slope, "bias": bias,
    }  # fmt: skip
    run.progress.finish(retrieval_at_1=found["retrieval_at_1"], chance=found["chance"])
    return found
