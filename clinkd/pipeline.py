"""The stages in their order, each an artifact that is made once and skipped when whole.

Decisions:
- A stage's fingerprint comes from the fingerprints of what it reads and the settings that matter to it;
  numbers of workers and where things run do not.
- Artifacts lie in ``<root>/artifacts`` and are shared by all runs under the root, so a sweep's trials
  find the
  teacher and its cache. ``<root>/<name>`` holds what a person opens: eval.json, predictions.jsonl,
  report.html.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clinkd.artifacts import Artifact, Draft, Store, fingerprint
from clinkd.config import ConfigError, OptimSection, RopeSection, RunConfig, TinySection, to_yaml
from clinkd.progress import Progress, tail_metrics


@dataclass
class Run:
    """One run: its configuration, its artifacts so far, and its progress view."""

    config: RunConfig
    progress: Progress
    store: Store
    done: dict[str, Artifact] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)  # rows of the report's table of stages
    _connected: bool = False

    @property
    def folder(self) -> Path:
        return Path(self.config.run.root) / self.config.run.name

    def connect(self) -> None:
        """Ray, when the first stage that is not skipped needs it."""
        if not self._connected:
            from clinkd import cluster

            compute = self.config.compute
            cluster.connect(compute.address, compute.workers, compute.cpus_per_worker)
            self._connected = True

    def stage(
        self,
        name: str,
        inputs: list[str],
        settings: dict[str, Any],
        make: Callable[[Draft], dict[str, Any]],
        version: int = 1,
    ) -> Artifact:
        """Finds the stage's artifact or makes it; ``make`` writes into the draft and returns counts."""
        read = {other: self.done[other].fingerprint for other in inputs}
        mark = fingerprint(name, read, settings, version)
        artifact = self.store.find(name, mark)
        skipped = artifact is not None
        if artifact is None:
            self.connect()
            with self.store.build(name, mark, read, settings) as draft:
                artifact = draft.artifact or draft.commit(make(draft))
        else:
            self.progress.skipped(name, artifact.meta["seconds"])
        self.done[name] = artifact
        self.log.append(
            {"stage": name, "fingerprint": mark[:12], "seconds": artifact.meta["seconds"],
             "counts": artifact.meta["counts"], "skipped": skipped}
        )  # fmt: skip
        return artifact


@contextlib.contextmanager
def open_run(config: RunConfig) -> Iterator[Run]:
    """A run's folder, progress and store; Ray is left at the end if it was started here."""
    from clinkd import cluster

    check_inputs(config)
    folder = Path(config.run.root) / config.run.name
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "config.yaml", to_yaml(config))
    with Progress(folder / "metrics.jsonl") as progress:
        run = Run(config, progress, Store(Path(config.run.root) / "artifacts", progress.say))
        try:
            yield run
        finally:
            if run._connected:
                cluster.disconnect()


def check_inputs(config: RunConfig) -> None:
    """Says at once what would fail late.

    Raises:
        ConfigError: a model path without a model, more workers than CPUs. DataError: a source that is
        not there.
    """
    from clinkd import cluster
    from clinkd.data.prepare import find_source

    for key, path in (("model.path", config.model.path), ("teacher.path", config.teacher.path)):
        if path is not None and not (Path(path) / "config.json").is_file():
            raise ConfigError(f"{key}: {path} holds no config.json; give the folder of a Qwen2-VL checkpoint")
    if config.data.source != "phantoms":
        find_source(config.data.source, Path(config.data.images) if config.data.images else None)
    if not (config.compute.address or os.environ.get("RAY_ADDRESS")):
        cluster.check_workers(config.compute.workers, config.compute.cpus_per_worker, cluster.real_cores())


def write_whole(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def prepare(run: Run) -> Artifact:
    """Images and questions to shards."""
    data = run.config.data
    settings = data.model_dump() | {
        "seed": run.config.run.seed,
        "content": _content(data.source, data.images),
    }

    def make(draft: Draft) -> dict[str, Any]:
        from clinkd.data.phantoms import PhantomSpec
        from clinkd.data.prepare import prepare as write
        from clinkd.data.validate import Limits

        phantoms = PhantomSpec(data.phantoms, size=data.phantom_size, seed=run.config.run.seed)
        run.progress.start("prepare")
        manifest = write(
            phantoms if data.source == "phantoms" else data.source,
            draft.path,
            images=Path(data.images) if data.images else None,
            seed=run.config.run.seed,
            test_fraction=data.test_fraction,
            images_per_shard=data.records_per_shard,
            limits=Limits(max_pixels=data.max_pixels),
            progress=lambda _, done, total: run.progress.update(done, total=total),
        )
        kept = ("records_in", "records_out", "quarantined", "duplicates", "images", "by_split")
        counts = {key: manifest[key] for key in kept}
        run.progress.finish(records=manifest["records_out"], quarantined=manifest["quarantined"])
        return counts

    return run.stage("prepare", [], settings, make)


def _content(source: str, images: str | None) -> str:
    """A digest of a source's files by name, size and time: has it to be prepared again?"""
    digest = hashlib.sha256()
    for root in filter(None, (None if source == "phantoms" else source, images)):
        paths = [Path(root)] if Path(root).is_file() else sorted(Path(root).rglob("*"))
        for path in paths:
            if path.is_file():
                stat = path.stat()
                digest.update(f"{path.name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


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
) -> dict[str, Any]:
    """Trains one stage on the training split, its progress followed from the workers' metrics."""
    import ray.data
    from ray.data.expressions import col

    from clinkd.data.shards import samples, shard_paths
    from clinkd.train.ledger import Ledger
    from clinkd.train.loop import TrainJob, fit

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
        steps=steps, seed=run.config.run.seed, out=str(draft.path.resolve()),
    )  # fmt: skip
    rows = ray.data.read_parquet([str(path) for path in shard_paths(data)]).filter(
        expr=col("split") == "train"
    )
    run.progress.start(stage, steps)
    stop = threading.Event()
    follower = tail_metrics(draft.path / "metrics.jsonl", run.progress, stop)
    try:
        fit(job, rows, draft.work)
    finally:
        stop.set()
        follower.join()
    run.progress.finish()
    lines = (draft.path / "metrics.jsonl").read_text().splitlines()
    return {"steps": steps, "loss": json.loads(lines[-1])["loss"], "records": len(per_record)}
