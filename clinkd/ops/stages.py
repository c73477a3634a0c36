"""The stages that train, as a plan sees them: model, batch, steps, and what follows for memory and work."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from clinkd.config import OptimSection, RunConfig
from clinkd.ops import cost, memory
from clinkd.ops.memory import Batch, Setting
from clinkd.ops.subject import Subject, source_of
from clinkd.ops.workload import Workload
from clinkd.train.engine import deepspeed_config
from clinkd.train.flops import Work, flops


@dataclass(frozen=True)
class Stage:
    """A stage that trains.

    Args:
        distils: against a teacher's distribution. share: of the training records. zero: its ZeRO stage.
    """

    name: str
    optim: OptimSection
    subject: Subject
    zero: int
    distils: bool
    share: float


class Outlook:
    """What follows from a configuration and its data for each stage."""

    def __init__(self, config: RunConfig, workload: Workload) -> None:
        self.config, self.workload = config, workload
        self.element = 2 if config.compute.precision == "bf16" else 4
        self.gpu = config.compute.gpus_per_worker > 0

    @property
    def devices(self) -> float:
        """GPUs, or CPUs, of all workers."""
        compute = self.config.compute
        return compute.workers * (compute.gpus_per_worker or compute.cpus_per_worker)

    def peak(self, card: cost.Accelerator) -> float:
        """FLOPs a second of one of them."""
        return card.peak if self.gpu else cost.CPU_PEAK

    def hours(self, work: float, card: cost.Accelerator) -> list[float]:
        """At least and at most, for ``work`` FLOPs on all of them."""
        return list(cost.hours(work, self.peak(card), self.devices, cost.MFU if self.gpu else cost.CPU_MFU))

    @cached_property
    def teacher(self) -> Subject:
        """As the stage teacher trains it, or as it is asked."""
        model = self.config.teacher
        return self._subject("teacher", model.train_vision and model.path is None)

    @cached_property
    def student(self) -> Subject:
        model = self.config.model
        return self._subject("student", model.train_vision, model.lora)

    def _subject(self, role: str, train_vision: bool, lora: Any = None) -> Subject:
        return Subject(
            source_of(self.config, role), train_vision=train_vision, lora=lora,
            attention=self.config.model.attention,
        )  # fmt: skip

    def stages(self) -> Iterator[Stage]:
        """In their order."""
        config, compute = self.config, self.config.compute
        zero = compute.zero_stage if compute.teacher_zero_stage is None else compute.teacher_zero_stage
        reflect = config.reflect
        if config.teacher.path is None:
            yield Stage("teacher", config.sft, self.teacher, zero, False, 1.0)
        yield Stage(
            "distill", config.distill.optim, self.student, compute.zero_stage, config.distill.a > 0,
            config.distill.share,
        )  # fmt: skip
        if reflect.rounds and reflect.exercises is not None:
            frozen = self._subject("teacher", False)
            yield Stage("corrector", reflect.exercises, frozen, compute.zero_stage, False, 1.0)
        for number in range(1, reflect.rounds + 1):
            again = reflect.target == "distribution"
            yield Stage(f"reflect-{number}", reflect.optim, self.student, compute.zero_stage, again, 1.0)

    def per_step(self, stage: Stage) -> int:
        """Images of a step, on all workers."""
        return stage.optim.batch_size * stage.optim.accumulation * self.config.compute.workers

    def groups(self, stage: Stage) -> int:
        records = max(1, round(stage.share * self.workload.records))
        return replace(self.workload, records=records).groups(stage.optim.questions_per_image)

    def steps(self, stage: Stage) -> int:
        """As ``data.sampler.BatchSampler.steps`` says, without packing."""
        optim = stage.optim
        rounds = math.ceil(self.groups(stage) / (optim.batch_size * self.config.compute.workers))
        return optim.steps or max(1, math.ceil(optim.epochs * rounds / optim.accumulation))

    def grid(self, subject: Subject) -> tuple[int, int, int]:
        low, high = subject.source.pixels
        model = self.config.model
        limits = (model.min_pixels or low, model.max_pixels or high)
        return self.workload.grid(subject.patch, subject.merge, limits)

    def image_tokens(self, subject: Subject) -> int:
        frames, rows, columns = self.grid(subject)
        return frames * rows * columns // subject.merge**2

    def batch(self, stage: Stage) -> Batch:
        """A micro-batch of a rank at its largest: each row as long as the longest question and answer."""
        optim, load = stage.optim, self.workload
        turns = min(float(optim.questions_per_image), load.turns)
        rows = max(1, round(optim.batch_size * turns))
        seen = self.image_tokens(stage.subject)
        shares = stage.zero <= 1 and turns > 1 and stage.subject.config.model_type == "qwen2_vl"
        guided = self.config.rope.gamma > 0 and stage.name != "teacher"
        return Batch(
            rows=rows, length=seen + load.longest, answers=round(rows * load.answer),
            images=optim.batch_size, grid=self.grid(stage.subject),
            shared=seen if shares and not guided else 0,
        )  # fmt: skip

    def memory(self, stage: Stage, zero: int | None = None, ranks: int | None = None) -> dict[str, float]:
        """Bytes on one GPU, or in a worker without any, by part; of what is on the GPU alone where there is.

        Args:
            zero, ranks: in the place of the configured ones.
        """
        compute, subject, batch = self.config.compute, stage.subject, self.batch(stage)
        how = Setting(
            stage.zero if zero is None else zero, ranks or compute.workers, self.element,
            compute.cpu_offload, compute.offload_parameters,
        )  # fmt: skip
        engine = deepspeed_config(stage.optim, compute, how.stage, subject.head[1])
        found = memory.states(subject.parameters, subject.trained, how)
        found["activations"] = memory.activations(
            subject, batch, self.element, compute.gradient_checkpointing
        )
        passes = 2 if stage.optim.coordinate_weight != 1 and not stage.distils else 1
        chunk = self.config.distill.chunk_size
        found["logits"] = memory.logits(
            subject, batch, self.element, chunk, distils=stage.distils, passes=passes
        )
        found["teacher"] = self._teacher_beside(stage, batch, how.ranks) if stage.distils else 0.0
        found["buffers"] = memory.buffers(subject, how, engine["zero_optimization"], self.gpu)
        if not self.gpu:
            found["images"] = self.host_images(stage, self.steps(stage))
            found["process"] = memory.PROCESS
        return found

    def _teacher_beside(self, stage: Stage, batch: Batch, ranks: int) -> float:
        """The teacher's head, or, online, all of it."""
        options, compute = self.config.distill, self.config.compute
        if options.cache.form == "topk" and options.teacher == "cache":
            return float(batch.answers * options.cache.k * 8)
        vocabulary, width = self.teacher.head
        found = memory.teacher_head(vocabulary, width, self.element, batch.answers)
        if options.teacher == "online" and stage.name == "distill":
            zero = compute.zero_stage if compute.teacher_zero_stage is None else compute.teacher_zero_stage
            element = 2 if self.config.model.dtype == "bfloat16" else 4
            found += element * self.teacher.parameters / (ranks if zero == 3 else 1)
        return found

    def host_images(self, stage: Stage, steps: float) -> float:
        """Bytes of records in a process that makes batches, after ``steps``: row groups as they were read,
        images cut, or a frozen tower's states, and the tokens of their turns.
        """
        dealt = steps * stage.optim.batch_size * stage.optim.accumulation
        records = max(1, round(stage.share * self.workload.records))
        seen = memory.distinct(records, dealt)
        online = stage.name == "distill" and self.config.distill.teacher == "online"
        family = stage.subject.config.model_type
        states = not stage.subject.tower_trains and stage.zero < 3 and not online and family == "qwen2_vl"
        load, length = self.workload, self.image_tokens(stage.subject) + self.workload.text
        tokens = memory.kept_tokens(seen * load.turns, length + load.answer)
        images = memory.kept_images(stage.subject, self.grid(stage.subject), seen, self.element, states)
        window = 1.5 * (self.config.feed.window_mib << 20)
        return images + tokens + min(window, seen * load.image_bytes)

    def step_flops(self, stage: Stage) -> float:
        """Of one step on all workers, forward and backward; by train/flops.py."""
        turns, images = self.workload.turns, self.per_step(stage)
        # A record's turns are dealt in as few groups as can be.
        rows = max(1, round(images * turns / -(-turns // stage.optim.questions_per_image)))
        parts = self._work(stage.subject, rows, images)
        if stage.distils:
            vocabulary, width = self.teacher.head
            parts.append(Work(round(rows * self.workload.answer), vocabulary * width, 0, reached=False))
        return flops(parts)

    def answer_flops(self, subject: Subject, questions: int) -> float:
        """Of reading ``questions`` and their answers, each with its image, forward alone."""
        parts = self._work(subject, questions, questions)
        return flops(replace(part, trained=0, reached=False) for part in parts)

    def _work(self, subject: Subject, rows: int, images: int) -> list[Work]:
        """Like rows and images stand for each other: one is worked out, its tokens are multiplied."""
        load = self.workload
        length = round(self.image_tokens(subject) + load.text + load.answer)
        text = subject.shape.work([length], [], round(load.answer))
        seen = subject.shape.work([], [self.grid(subject)], 0)
        return [_times(part, rows) for part in text] + [_times(part, images) for part in seen]


def _times(part: Work, count: int) -> Work:
    return replace(part, tokens=part.tokens * count, attention=part.attention * count)
