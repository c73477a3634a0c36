"""Stages teacher and distill, and what every stage that trains does.

Decisions:
- A model made here starts from a folder like any checkpoint, so training knows one way to begin.
- Steps come from the configuration or from epochs over the ledger's groups.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clinkd.artifacts import Artifact, Draft, fingerprint
from clinkd.config import ConfigError, OptimSection, RunConfig
from clinkd.data.shards import DataError
from clinkd.progress import tail_metrics
from clinkd.stages import models
from clinkd.stages.base import Run, content_digest, write_whole
from clinkd.stages.certificate import method_of, stamp
from clinkd.stages.models import pixel_limits, student_start, teacher_folder, teacher_rope, vqa_spec
from clinkd.stages.online import asks_teacher, distill_settings, online_spec

if TYPE_CHECKING:
    from clinkd.train.feed import StreamSpec
    from clinkd.train.loop import TrainJob
    from clinkd.train.tasks import VqaSpec


def steps_of(optim: OptimSection, groups: int, workers: int) -> int:
    """Optimiser steps of a stage, from ``steps`` or ``epochs``."""
    per_step = optim.batch_size * optim.accumulation * workers
    return optim.steps or max(1, round(optim.epochs * groups / per_step))


def teacher(run: Run) -> Artifact:
    """The teacher, trained on the true answers; a checkpoint by path takes its place without training."""
    config = run.config
    optim, compute = config.sft, config.compute
    if config.teacher.path is not None:
        return _given_teacher(run, Path(config.teacher.path))
    settings = {
        "teacher": config.teacher.model_dump(), "optim": optim.model_dump(), "seed": config.run.seed,
        "precision": compute.precision,
    } | streamed(config) | pixel_limits(config)  # fmt: skip

    def make(draft: Draft) -> dict[str, Any]:
        from clinkd.train.tasks import SupervisedTask

        zero = compute.zero_stage if compute.teacher_zero_stage is None else compute.teacher_zero_stage
        start = run.done["guide"].path / "model"
        spec = vqa_spec(
            run, start, teacher_rope(), train_vision=config.teacher.train_vision,
            coordinate_weight=optim.coordinate_weight,
        )  # fmt: skip
        if config.feed.mode == "stream":
            return train_streamed(run, draft, "teacher", optim, zero, spec)
        return train(
            run, draft, "teacher", optim, zero,
            lambda rows, scratch: SupervisedTask(rows, scratch, spec, zero),
        )  # fmt: skip

    return run.stage("teacher", ["prepare", "guide"], settings, make)


def corrector(run: Run) -> Artifact | None:
    """A corrector made of the teacher by exercises; None where none is asked for.

    A teacher that is given exercises itself learns to copy a box from its prompt in the place of looking: on
    phantoms its students' VG Recall@0.5 was .25 with exercises from its first step and .33 with them in its
    last fifth, against .60.
    """
    config = run.config
    optim = config.reflect.exercises
    if optim is None:
        return None
    settings = {
        "optim": optim.model_dump(), "seed": config.run.seed, "precision": config.compute.precision,
    } | pixel_limits(config)  # fmt: skip

    def make(draft: Draft) -> dict[str, Any]:
        from clinkd.train.reflect_task import ExerciseTask

        zero = config.compute.zero_stage
        spec = vqa_spec(
            run, teacher_folder(run), teacher_rope(), train_vision=False,
            coordinate_weight=optim.coordinate_weight,
        )  # fmt: skip
        return train(
            run, draft, "corrector", optim, zero,
            lambda rows, scratch: ExerciseTask(rows, scratch, spec, config.run.seed, zero),
        )  # fmt: skip

    return run.stage("corrector", ["prepare", "teacher"], settings, make)


def streamed(config: RunConfig) -> dict[str, Any]:
    """Settings of the feed that change what the teacher learns; none for the table."""
    if config.feed.mode == "table":
        return {}
    return {"feed": config.feed.model_dump(exclude={"tasks"})}


def _given_teacher(run: Run, path: Path) -> Artifact:
    """An artifact that names the user's checkpoint; its files stay where they are."""

    def make(draft: Draft) -> dict[str, Any]:
        write_whole(draft.path / "model.json", json.dumps({"path": str(path.resolve())}))
        return {"steps": 0}

    return run.stage("teacher", [], {"path": str(path.resolve()), "content": content_digest(path)}, make)


class Paused(Exception):
    """A training ended early, as it was asked to: ``model`` is its model, ``checkpoint`` where it goes on."""

    def __init__(self, model: Path, checkpoint: Path) -> None:
        super().__init__(f"paused with {model}")
        self.model, self.checkpoint = model, checkpoint


def distill_steps(run: Run) -> int:
    """Optimiser steps of the student's distillation."""
    from clinkd.train.ledger import Ledger

    optim, turns = run.config.distill.optim, turn_counts(run)
    chosen = share_of(list(turns), run.config.distill.share, run.config.run.seed)
    ledger = Ledger([turns[record] for record in chosen], optim.questions_per_image, 0)
    return steps_of(optim, ledger.groups_per_epoch, run.config.compute.workers)


def distill(run: Run, until: int | None = None, start: Path | None = None) -> Artifact:
    """The student, from the teacher's cache, from the teacher beside it, or from the truth alone.

    Args:
        until: the step to end at; the next call goes on from there.
        start: a checkpoint to begin from where there is none yet.

    Raises:
        Paused: at ``until``, where that is not the end.
    """
    config, options = run.config, run.config.distill
    taught = asks_teacher(options)
    settings = {
        "distill": distill_settings(options),
        "model": config.model.model_dump(exclude={"lora", "attention"}),
        "rope": config.rope.model_dump(), "seed": config.student_seed,
        "precision": config.compute.precision,
    } | models.lora_settings(config) | run.salt  # fmt: skip

    def make(draft: Draft) -> dict[str, Any]:
        from clinkd.train.checkpoint import Checkpoints

        certificate = stamp(config, draft.path)
        spec = vqa_spec(
            run, student_start(run, draft), config.rope, train_vision=config.model.train_vision,
            lora=config.model.lora, coordinate_weight=1.0 if taught else options.optim.coordinate_weight,
        )  # fmt: skip
        zero = config.compute.zero_stage
        if start is not None:
            Checkpoints(draft.work / "distill", 0, lambda: None).adopt(start)
        counts = train(
            run, draft, "distill", options.optim, zero, _learner(run, spec, zero),
            records=share_of(list(turn_counts(run)), options.share, config.run.seed),
            seed=config.student_seed,
            until=until,
        )  # fmt: skip
        return counts | {"certified": certificate["ok"]}

    inputs = ["prepare", "guide", "teacher", *(["label"] if taught else [])]
    return run.stage("distill", inputs, settings, make)


def _learner(run: Run, spec: VqaSpec, zero: int) -> Callable[[Any, Path], Any]:
    """Makes the student's task where it trains."""
    from clinkd.train.distill_task import DistillSpec, DistillTask
    from clinkd.train.online_task import OnlineDistillTask
    from clinkd.train.tasks import SupervisedTask

    options = run.config.distill
    if not asks_teacher(options):
        return lambda rows, scratch: SupervisedTask(rows, scratch, spec, zero)
    learn = DistillSpec(
        str(run.done["label"].path), method_of(options), options.start_quantile, options.end_quantile
    )
    if online := online_spec(run, spec):
        return lambda rows, scratch: OnlineDistillTask(rows, scratch, spec, learn, online, zero)
    return lambda rows, scratch: DistillTask(rows, scratch, spec, learn, zero)


def train(
    run: Run,
    draft: Draft,
    stage: str,
    optim: OptimSection,
    zero_stage: int,
    make_task: Callable[[Any, Path], Any],
    out: Path | None = None,
    records: list[str] | None = None,
    seed: int | None = None,
    until: int | None = None,
) -> dict[str, Any]:
    """Trains one stage on the training split, or on ``records`` of it, and shows its progress.

    ``seed``: of the order of the samples; None: the run's. ``until``: the step to end at.

    Raises:
        Paused: at ``until``, where that is not the end.
    """
    from clinkd.data.ingest import read_records
    from clinkd.train.ledger import Ledger
    from clinkd.train.loop import TrainJob
    from clinkd.train.resume import begun

    out = out or draft.path
    data = run.done["prepare"].path
    turns = turn_counts(run)
    chosen = list(turns) if records is None else records
    if not chosen:
        raise ConfigError("data.source: no training record is left after prepare; see its quarantine.jsonl")
    ledger = Ledger([turns[record] for record in chosen], optim.questions_per_image, 0)
    workers = run.config.compute.workers
    began = begun(draft.work / stage, steps_of(optim, ledger.groups_per_epoch, workers), workers)
    job = TrainJob(
        stage=stage, make_task=make_task, optim=optim, compute=run.config.compute, zero_stage=zero_stage,
        steps=began.steps, seed=run.config.run.seed if seed is None else seed, out=str(out.resolve()),
        work=str(draft.work.resolve()), until=until, dealt=began.workers, watch=run.config.watch,
        run=run.config.run.name,
        store=store_of(run, draft, stage),
        rows=fingerprint("rows", {"prepare": run.done["prepare"].fingerprint}, {"records": chosen}),
    )  # fmt: skip
    return _fit(run, job, read_records(data, split="train", ids=records), len(chosen))


def _fit(run: Run, job: TrainJob, rows: Any, records: int) -> dict[str, Any]:
    """Runs a job and shows its progress; returns the stage's counts."""
    from clinkd.train.guard import EVENTS

    metrics = Path(job.out) / "metrics.jsonl"
    run.progress.start(job.stage, job.steps)
    stop = threading.Event()
    followers = [tail_metrics(path, run.progress, stop) for path in (metrics, metrics.with_name(EVENTS))]
    try:
        run.train(job, rows)
    finally:
        stop.set()
        for follower in followers:
            follower.join()
    run.progress.finish()
    if job.end < job.steps:
        raise Paused(job.paused, Path(job.work) / job.stage)
    last = json.loads(metrics.read_text().splitlines()[-1])
    return {"steps": job.steps, "loss": last.get("loss"), "records": records}


def train_streamed(
    run: Run, draft: Draft, stage: str, optim: OptimSection, zero_stage: int, spec: VqaSpec
) -> dict[str, Any]:
    """Trains one stage on the training split as its shards stream by; see train/feed.py."""
    from clinkd.train.feed import StreamTask
    from clinkd.train.loop import TrainJob
    from clinkd.train.resume import begun

    source = stream_spec(run, draft, optim, spec)
    workers = run.config.compute.workers
    steps = optim.steps or source.steps(optim.epochs, optim.accumulation, workers)
    began = begun(draft.work / stage, steps, workers)
    job = TrainJob(
        stage=stage, make_task=lambda rows, scratch: StreamTask(spec, source, zero_stage), optim=optim,
        compute=run.config.compute, zero_stage=zero_stage, seed=run.config.run.seed, steps=began.steps,
        out=str(draft.path.resolve()), work=str(draft.work.resolve()), dealt=began.workers,
        watch=run.config.watch, store=store_of(run, draft, stage), run=run.config.run.name,
    )  # fmt: skip
    return _fit(run, job, None, len(source.lengths.ids))


def stream_spec(run: Run, draft: Draft, optim: OptimSection, spec: VqaSpec) -> StreamSpec:
    """How the stage is fed, once the lengths of all samples are known.

    Raises:
        ConfigError: no record to train on, or a sample longer than ``feed.pack_tokens``.
    """
    from clinkd import cluster
    from clinkd.data.feed import Resources, Shards, build_index
    from clinkd.data.plan import PlanOptions
    from clinkd.train.batches import BatchSpec
    from clinkd.train.feed import StreamSpec

    feed, compute = run.config.feed, run.config.compute
    batch = BatchSpec(
        spec.model, spec.guidance, packed=feed.pack_tokens is not None, conversations=feed.conversations,
        scores=spec.scores, min_pixels=spec.min_pixels, max_pixels=spec.max_pixels,
    )  # fmt: skip
    shards = Shards.of(run.done["prepare"].path)
    index = build_index(shards, "train", batch.measure)
    if not index.ids:
        raise ConfigError("data.source: no training record is left after prepare; see its quarantine.jsonl")
    path = index.write(draft.work / "lengths.arrow")
    source = StreamSpec(
        batch,
        PlanOptions(
            run.config.run.seed, optim.batch_size, feed.pack_tokens, optim.questions_per_image, feed.window
        ),
        str(path.resolve()),
        shards,
        Resources(
            feed.tasks,
            cluster.feed_cpus(compute.workers, compute.cpus_per_worker, feed.tasks),
            store_share=0.5 / compute.workers,
        ),
    )
    try:
        source.rounds(0, compute.workers)
    except DataError as error:
        raise ConfigError(str(error)) from None
    return source


def store_of(run: Run, draft: Draft, stage: str) -> str | None:
    """Where copies of a stage's checkpoints go: under the artifact's own name, whichever run makes it."""
    root = run.config.compute.checkpoint_store
    return None if root is None else f"{root.rstrip('/')}/{draft.path.stem}/{stage}"


def turn_counts(run: Run) -> dict[str, int]:
    """Turns of each training record."""
    from clinkd.data.shards import samples

    turns: dict[str, int] = {}
    for sample in samples(run.done["prepare"].path, "train"):
        turns[sample["id"]] = turns.get(sample["id"], 0) + 1
    return turns


def share_of(records: list[str], share: float, seed: int) -> list[str]:
    """A share of the records (at least one), the same for the same seed, in their order."""
    count = max(1, round(share * len(records)))
    chosen = np.random.default_rng(seed).permutation(len(records))[:count]
    return [records[index] for index in sorted(chosen.tolist())]
