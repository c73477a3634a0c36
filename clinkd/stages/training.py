"""Stages teacher and distill, and what every stage that trains does.

Decisions:
- A model made here starts from a folder like any checkpoint, so training knows one way to begin.
- Steps come from the configuration or from epochs over the sampler's batches.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clinkd.artifacts import Artifact, Draft
from clinkd.config import ConfigError, OptimSection, RunConfig
from clinkd.data.shards import DataError
from clinkd.progress import tail_metrics
from clinkd.stages import models
from clinkd.stages.base import Run, content_digest, write_whole
from clinkd.stages.certificate import method_of, stamp
from clinkd.stages.models import pixel_limits, student_start, teacher_folder, teacher_rope, vqa_spec
from clinkd.stages.online import asks_teacher, distill_settings, online_spec

if TYPE_CHECKING:
    from clinkd.data.index import RecordIndex
    from clinkd.data.sampler import SamplerOptions
    from clinkd.train.batches import BatchSpec
    from clinkd.train.feed import FeedSpec
    from clinkd.train.loop import TrainJob
    from clinkd.train.targets import Targets
    from clinkd.train.tasks import VqaSpec


def teacher(run: Run) -> Artifact:
    """The teacher, trained on the true answers; a checkpoint by path takes its place without training."""
    config = run.config
    optim, compute = config.sft, config.compute
    if config.teacher.path is not None:
        return _given_teacher(run, Path(config.teacher.path))
    settings = {
        "teacher": config.teacher.model_dump(), "optim": optim.model_dump(), "seed": config.run.seed,
        "precision": compute.precision,
    } | fed(config) | pixel_limits(config)  # fmt: skip

    def make(draft: Draft) -> dict[str, Any]:
        zero = compute.zero_stage if compute.teacher_zero_stage is None else compute.teacher_zero_stage
        start = run.done["guide"].path / "model"
        spec = vqa_spec(
            run, start, teacher_rope(), train_vision=config.teacher.train_vision,
            coordinate_weight=optim.coordinate_weight,
        )  # fmt: skip
        training = Training("teacher", optim, zero)
        return train(run, draft, training, answers(run, spec), partial(_supervised, spec, zero))

    return run.stage("teacher", ["prepare", "guide"], settings, make, version=2)


def _supervised(spec: VqaSpec, zero: int, source: FeedSpec) -> Any:
    from clinkd.train.tasks import SupervisedTask

    return SupervisedTask(spec, source, zero)


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
    } | fed(config) | pixel_limits(config)  # fmt: skip

    def make(draft: Draft) -> dict[str, Any]:
        from clinkd.train.targets import Exercises

        zero = config.compute.zero_stage
        spec = vqa_spec(
            run, teacher_folder(run), teacher_rope(), train_vision=False,
            coordinate_weight=optim.coordinate_weight,
        )  # fmt: skip
        maker = answers(run, spec, Exercises(config.run.seed))
        return train(run, draft, Training("corrector", optim, zero), maker, partial(_supervised, spec, zero))

    return run.stage("corrector", ["prepare", "teacher"], settings, make, version=2)


def fed(config: RunConfig) -> dict[str, Any]:
    """Settings of the feed that change what a stage learns."""
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
    """Optimiser steps of the student's distillation.

    Raises:
        ConfigError: they follow from epochs of packed samples, whose number is known in training alone.
    """
    config = run.config
    optim = config.distill.optim
    if optim.steps:
        return optim.steps
    if config.feed.pack_tokens is not None:
        raise ConfigError("distill.optim.epochs: with feed.pack_tokens a sweep needs distill.optim.steps")
    from clinkd.data.sampler import BatchSampler

    index = share_of(training_index(run), config.distill.share, config.run.seed)
    sampler = BatchSampler(index, sampler_options(config, optim, 0), config.compute.workers)
    return sampler.steps(optim.epochs, optim.accumulation)


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
    } | models.lora_settings(config) | fed(config) | run.salt  # fmt: skip

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
        training = Training(
            "distill", options.optim, zero, share=options.share, seed=config.student_seed, until=until
        )
        counts = train(run, draft, training, *_learner(run, spec, zero))
        return counts | {"certified": certificate["ok"]}

    inputs = ["prepare", "guide", "teacher", *(["label"] if taught else [])]
    return run.stage("distill", inputs, settings, make, version=2)


def _learner(run: Run, spec: VqaSpec, zero: int) -> tuple[Any, Callable[[FeedSpec], Any]]:
    """What makes the student's batches, and its task where it trains."""
    from clinkd.train.distill_task import DistillSpec, DistillTask
    from clinkd.train.online_task import OnlineDistillTask
    from clinkd.train.targets import Labels

    options = run.config.distill
    if not asks_teacher(options):
        return answers(run, spec), partial(_supervised, spec, zero)
    labels = str(run.done["label"].path.resolve())
    learn = DistillSpec(labels, method_of(options), options.start_quantile, options.end_quantile)
    if online := online_spec(run, spec):
        maker = answers(run, spec, Labels(labels, states=False))
        return maker, lambda source: OnlineDistillTask(spec, source, learn, online, zero)
    return answers(run, spec, Labels(labels)), lambda source: DistillTask(spec, source, learn, zero)


def answers(run: Run, spec: VqaSpec, targets: Targets | None = None) -> BatchSpec:
    """What makes the batches of a stage that answers; without ``targets`` with the answers of the data."""
    from clinkd.train.batches import BatchSpec
    from clinkd.train.targets import Truth

    feed = run.config.feed
    return BatchSpec(
        spec.model, spec.guidance, packed=feed.pack_tokens is not None, conversations=feed.conversations,
        scores=spec.scores, min_pixels=spec.min_pixels, max_pixels=spec.max_pixels,
        targets=targets or Truth(),
    )  # fmt: skip


@dataclass(frozen=True)
class Training:
    """How a stage trains.

    Args:
        name: of the stage. share: of the training split's records. seed: of the samples' order; None: the
        run's.
        until: the step to end at. out: folder of model and metrics; None: the artifact's.
        whole_records: its samples are records, which are not packed.
    """

    name: str
    optim: OptimSection
    zero_stage: int
    share: float = 1.0
    seed: int | None = None
    until: int | None = None
    out: Path | None = None
    whole_records: bool = False


def train(
    run: Run, draft: Draft, training: Training, maker: Any, make_task: Callable[[FeedSpec], Any]
) -> dict[str, Any]:
    """Trains one stage on the training split, and shows its progress.

    Args:
        maker: makes its batches (``data.feed.Maker``). make_task: its task, where it trains.

    Raises:
        Paused: at ``until``, where that is not the end.
        ConfigError: no record to train on, or a sample longer than ``feed.pack_tokens``.
    """
    from clinkd.train.loop import TrainJob
    from clinkd.train.resume import begun

    config, optim = run.config, training.optim
    stage, workers = training.name, config.compute.workers
    source = feed_spec(run, draft, training, maker)
    steps = optim.steps
    if steps is None or config.feed.pack_tokens:
        try:
            sampler = source.sampler(workers)
            sampler.rounds(0)  # packing looks at every length
            steps = steps or sampler.steps(optim.epochs, optim.accumulation)
        except DataError as error:
            raise ConfigError(str(error)) from None
    began = begun(draft.work / stage, steps, workers)
    job = TrainJob(
        stage=stage, make_task=partial(make_task, source), optim=optim, compute=config.compute,
        zero_stage=training.zero_stage, steps=began.steps,
        seed=config.run.seed if training.seed is None else training.seed,
        out=str((training.out or draft.path).resolve()), work=str(draft.work.resolve()),
        until=training.until, dealt=began.workers, watch=config.watch, run=config.run.name,
        store=store_of(run, draft, stage),
    )  # fmt: skip
    return _fit(run, job, len(source.records()))


def _fit(run: Run, job: TrainJob, records: int) -> dict[str, Any]:
    """Runs a job and shows its progress; returns the stage's counts."""
    from clinkd.train.guard import EVENTS

    metrics = Path(job.out) / "metrics.jsonl"
    run.progress.start(job.stage, job.steps)
    stop = threading.Event()
    followers = [tail_metrics(path, run.progress, stop) for path in (metrics, metrics.with_name(EVENTS))]
    try:
        run.train(job)
    finally:
        stop.set()
        for follower in followers:
            follower.join()
    run.progress.finish()
    if job.end < job.steps:
        raise Paused(job.paused, Path(job.work) / job.stage)
    last = json.loads(metrics.read_text().splitlines()[-1])
    return {"steps": job.steps, "loss": last.get("loss"), "records": records}


def sampler_options(
    config: RunConfig, optim: OptimSection, seed: int, tokens: int | None = None
) -> SamplerOptions:
    from clinkd.data.sampler import SamplerOptions

    window = config.feed.window_mib << 20
    return SamplerOptions(seed, optim.batch_size, optim.questions_per_image, tokens, window)


def feed_spec(run: Run, draft: Draft, training: Training, maker: Any) -> FeedSpec:
    """How the stage is fed; writes the index of its records.

    Raises:
        ConfigError: no record to train on.
    """
    from clinkd import cluster
    from clinkd.data.feed import Resources
    from clinkd.data.shards import Shards
    from clinkd.train.feed import FeedSpec

    config, compute = run.config, run.config.compute
    index = share_of(training_index(run), training.share, config.run.seed)
    shards = Shards.of(run.done["prepare"].path)
    tasks = config.feed.tasks
    if tasks is None:
        tasks = 2 if compute.gpus_per_worker else 0
    cpus = cluster.feed_cpus(compute.workers, compute.cpus_per_worker, max(1, tasks))
    packs = not training.whole_records
    if packs and (config.feed.pack_tokens is not None or config.feed.conversations):
        index = index.measured(maker.measure, shards, cpus)
    path = index.write(draft.work / f"{training.name}-index.arrow")
    seed = config.run.seed if training.seed is None else training.seed
    return FeedSpec(
        maker,
        sampler_options(config, training.optim, seed, config.feed.pack_tokens if packs else None),
        str(path.resolve()), shards,
        Resources(tasks, cpus, 3 * (config.feed.window_mib << 20) // 2, store_share=0.5 / compute.workers),
    )  # fmt: skip


def store_of(run: Run, draft: Draft, stage: str) -> str | None:
    """Where copies of a stage's checkpoints go: under the artifact's own name, whichever run makes it."""
    root = run.config.compute.checkpoint_store
    return None if root is None else f"{root.rstrip('/')}/{draft.path.stem}/{stage}"


def training_index(run: Run) -> RecordIndex:
    """The training split; made once and kept for the run.

    Raises:
        ConfigError: no record is left to train on.
    """
    index = split_index(run, "train")
    if not len(index):
        raise ConfigError("data.source: no training record is left after prepare; see its quarantine.jsonl")
    return index


def split_index(run: Run, split: str) -> RecordIndex:
    """The records of a split."""
    from clinkd.data.index import build_index
    from clinkd.data.shards import Shards

    name = f"index {split} {run.done['prepare'].fingerprint}"
    if name not in run.indices:
        run.indices[name] = build_index(Shards.of(run.done["prepare"].path), split)
    return run.indices[name]


def share_of(index: RecordIndex, share: float, seed: int) -> RecordIndex:
    """A share of the records (at least one), the same for the same seed, in their order."""
    if share == 1:
        return index
    count = max(1, round(share * len(index)))
    return index.take(np.random.default_rng(seed).permutation(len(index))[:count])
