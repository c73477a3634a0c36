"""Stages teacher, label and distill, and what every stage that trains does.

Decisions:
- A model made here starts from a folder like any checkpoint, so training knows one way to begin.
- Steps come from the configuration or from epochs over the ledger's groups.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from clinkd.artifacts import Artifact, Draft
from clinkd.config import ConfigError, OptimSection, RopeSection, TinySection
from clinkd.progress import tail_metrics
from clinkd.stages.base import Run


def start_model(run: Run, draft: Draft, tiny: TinySection, path: str | None) -> Path:
    """The folder a model starts from: the user's checkpoint, or one made here from the training text."""
    if path is not None:
        return Path(path)
    from clinkd.model.presets import TinySize, write_new_model

    vision = run.config.model.vision
    size = TinySize(
        hidden=tiny.hidden, layers=tiny.layers, heads=tiny.heads, mlp=tiny.mlp, vision_hidden=vision.hidden,
        vision_layers=vision.layers, vision_heads=vision.heads, patch=vision.patch,
        image_size=vision.image_size,
    )  # fmt: skip
    folder = draft.work / "start"
    if not (folder / "config.json").is_file():
        texts = _training_text(run.done["prepare"].path)
        write_new_model(texts, size, folder, vocab_size=run.config.model.vocab_size, seed=run.config.run.seed)
    return folder


def _training_text(data: Path) -> Iterator[str]:
    from clinkd.data.boxes import to_qwen
    from clinkd.data.shards import samples

    for sample in samples(data, "train"):
        yield to_qwen(sample["question"])
        yield to_qwen(sample["answer"])


def steps_of(optim: OptimSection, groups: int, workers: int) -> int:
    """Optimiser steps of a stage, from ``steps`` or ``epochs``."""
    per_step = optim.batch_size * optim.accumulation * workers
    return optim.steps or max(1, round(optim.epochs * groups / per_step))


def guidance(rope: RopeSection) -> Any:
    from clinkd.model.rope import RopeGuidance

    return RopeGuidance(**rope.model_dump())


def teacher(run: Run) -> Artifact:
    """The teacher, trained on the true answers; a checkpoint by path takes its place without training."""
    config = run.config
    optim, compute = config.sft, config.compute
    settings = {
        "teacher": config.teacher.model_dump(), "vision": config.model.vision.model_dump(),
        "vocab_size": config.model.vocab_size, "optim": optim.model_dump(), "seed": config.run.seed,
        "precision": compute.precision,
    }  # fmt: skip

    def make(draft: Draft) -> dict[str, Any]:
        from clinkd.train.tasks import SupervisedTask, VqaSpec

        start = start_model(run, draft, config.teacher.tiny, config.teacher.path)
        zero = compute.zero_stage if compute.teacher_zero_stage is None else compute.teacher_zero_stage
        spec = VqaSpec(
            model=str(start.resolve()), guidance=guidance(RopeSection(mode="none")),
            train_vision=config.teacher.train_vision, dtype=config.model.dtype,
            gradient_checkpointing=compute.gradient_checkpointing,
        )  # fmt: skip
        return train(
            run,
            draft,
            "teacher",
            optim,
            zero,
            lambda rows, scratch: SupervisedTask(rows, scratch, spec, zero),
        )

    return run.stage("teacher", ["prepare"], settings, make)


def label(run: Run) -> Artifact:
    """The teacher asked once about every training sample: answers, confidence, states."""
    config = run.config
    settings = {"unlabelled_share": config.distill.unlabelled_share, "seed": config.run.seed}

    def make(draft: Draft) -> dict[str, Any]:
        import pyarrow as pa
        import pyarrow.parquet as pq
        import ray.data
        from ray.data.expressions import col

        from clinkd.data.shards import samples, shard_paths
        from clinkd.distill.teacher_cache import Labeller, LabelSpec, write_head

        data, model = run.done["prepare"].path, run.done["teacher"].path / "model"
        total = sum(1 for _ in samples(data, "train"))
        run.progress.start("label", total)
        rows = ray.data.read_parquet([str(path) for path in shard_paths(data)])
        labelled = rows.filter(expr=col("split") == "train").map_batches(
            Labeller,
            fn_constructor_args=(
                LabelSpec(
                    str(model.resolve()), hidden_share=config.distill.unlabelled_share, seed=config.run.seed
                ),
            ),
            batch_size=16,
            compute=ray.data.ActorPoolStrategy(size=config.compute.actors),
            num_cpus=0.5,
        )
        tables: list[Any] = []
        done = 0
        for table in labelled.iter_batches(batch_format="pyarrow", batch_size=1024):
            tables.append(table)
            done += len(table)
            run.progress.update(done, record=False)
        (draft.path / "states").mkdir(exist_ok=True)
        whole = pa.concat_tables(tables).sort_by("sample")
        pq.write_table(whole, draft.path / "states" / "part-00000.parquet", row_group_size=4096)
        write_head(model, draft.path)
        taught = sum(source == "teacher" for source in whole.column("source").to_pylist())
        run.progress.finish(samples=done, pseudo_labels=taught)
        return {"samples": done, "pseudo_labels": taught}

    return run.stage("label", ["prepare", "teacher"], settings, make)


def distill(run: Run) -> Artifact:
    """The student, from the teacher's cache."""
    config, options = run.config, run.config.distill
    settings = {
        "distill": options.model_dump(), "model": config.model.model_dump(), "rope": config.rope.model_dump(),
        "seed": config.run.seed, "precision": config.compute.precision,
    }  # fmt: skip

    def make(draft: Draft) -> dict[str, Any]:
        from clinkd.train.tasks import DistillSpec, DistillTask, VqaSpec

        start = _student_start(run, draft)
        spec = VqaSpec(
            model=str(start.resolve()), guidance=guidance(config.rope),
            train_vision=config.model.train_vision, dtype=config.model.dtype, chunk_size=options.chunk_size,
            gradient_checkpointing=config.compute.gradient_checkpointing,
        )  # fmt: skip
        kept = {"a": options.a, "temperature": options.temperature, "divergence": options.divergence}
        learn = DistillSpec(str(run.done["label"].path), kept, options.start_quantile, options.end_quantile)
        zero = config.compute.zero_stage
        return train(
            run, draft, "distill", options.optim, zero,
            lambda rows, scratch: DistillTask(rows, scratch, spec, learn, zero),
        )  # fmt: skip

    return run.stage("distill", ["prepare", "teacher", "label"], settings, make)


def _student_start(run: Run, draft: Draft) -> Path:
    """What the student starts from: a checkpoint by path, layers of the teacher, or random weights."""
    model = run.config.model
    if model.path is not None or model.init == "random":
        return start_model(run, draft, model.tiny, model.path)
    folder = draft.work / "start"
    if not (folder / "config.json").is_file():
        from transformers import AutoImageProcessor, AutoTokenizer

        from clinkd.model.clinkd_qwen2vl import load_model, save_model, student_from_teacher

        teacher_folder = run.done["teacher"].path / "model"
        student = student_from_teacher(load_model(teacher_folder), model.tiny.layers)
        tokenizer = AutoTokenizer.from_pretrained(teacher_folder)
        save_model(student, tokenizer, AutoImageProcessor.from_pretrained(teacher_folder), folder)
    return folder


def train(
    run: Run,
    draft: Draft,
    stage: str,
    optim: OptimSection,
    zero_stage: int,
    make_task: Callable[[Any, Path], Any],
    out: Path | None = None,
) -> dict[str, Any]:
    """Trains one stage on the training split, its progress followed from the workers' metrics."""
    import ray.data
    from ray.data.expressions import col

    from clinkd.data.shards import samples, shard_paths
    from clinkd.train.ledger import Ledger
    from clinkd.train.loop import TrainJob, fit

    out = out or draft.path
    data = run.done["prepare"].path
    per_record: dict[str, int] = {}
    for sample in samples(data, "train"):
        per_record[sample["id"]] = per_record.get(sample["id"], 0) + 1
    if not per_record:
        raise ConfigError("data.source: no training record is left after prepare; see its quarantine.jsonl")
    ledger = Ledger(list(per_record.values()), optim.questions_per_image, 0)
    steps = steps_of(optim, ledger.groups_per_epoch, run.config.compute.workers)
    job = TrainJob(
        stage=stage, make_task=make_task, optim=optim, compute=run.config.compute, zero_stage=zero_stage,
        steps=steps, seed=run.config.run.seed, out=str(out.resolve()),
    )  # fmt: skip
    rows = ray.data.read_parquet([str(path) for path in shard_paths(data)]).filter(
        expr=col("split") == "train"
    )
    run.progress.start(stage, steps)
    stop = threading.Event()
    follower = tail_metrics(out / "metrics.jsonl", run.progress, stop)
    try:
        fit(job, rows, draft.work)
    finally:
        stop.set()
        follower.join()
    run.progress.finish()
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return {"steps": steps, "loss": json.loads(lines[-1])["loss"], "records": len(per_record)}
