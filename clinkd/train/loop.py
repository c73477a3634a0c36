"""One loop for every stage that trains: Ray Train workers, a DeepSpeed engine, the ledger, checkpoints.

Decisions:
- What a stage *is* (model, batches, loss) stands in a :class:`Task`; the loop knows only this interface, so
  the guide, the teacher, distillation and reflection differ nowhere else.
- Losses come as sums with the number of tokens they are over; the loop divides by the tokens of all ranks and
  accumulation steps, so that the result does not depend on how a batch was dealt out.
- Counts of all ranks (train/meter.py) travel together, before the step: one collective for all of them.
- Rank 0 writes metrics as lines of a file: reporting each step to Ray Train would wait for its controller.
  After a resume, lines past the checkpoint are cut off.
- A process may run one job after the other (crew.py), so each begins with its own seeds and leaves nothing.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from clinkd.config import ComputeSection, OptimSection
from clinkd.train.ledger import Group, Ledger


class Task(Protocol):
    """What a training stage brings."""

    def build(self) -> Any:
        """The torch module whose forward takes one batch and returns {"loss": sum, ...sums} as scalars."""

    def turn_counts(self) -> Sequence[int]:
        """Turns of each record, for the ledger."""

    def batch(self, groups: list[Group], step: int, total: int) -> tuple[dict[str, Any], int]:
        """The module's arguments for these groups, and the tokens (or items) its sums are over."""

    # A task with a method ``feed(rank, world, limit, state, device)`` is asked for a stream of micro-batches
    # in the place of ``turn_counts`` and ``batch``; see train/feed.py.

    # A task with a method ``facts(step, total) -> dict[str, float]`` has these put into the metrics, in the
    # step's line. They follow from the step alone, so that a resumed run writes the same.

    def save(self, state: dict[str, Any], out: Path) -> None:
        """Writes the trained model, ``state`` being the whole state dict of the module; rank 0 only."""


class Totals(NamedTuple):
    """Of one step, over all ranks."""

    tokens: float  # that the loss is over
    samples: int
    input_tokens: int
    operations: float


@dataclass(frozen=True)
class TrainJob:
    """Everything a worker needs; it travels by value."""

    stage: str
    make_task: Callable[[Any, Path], Task]  # (rows of Ray Data, scratch folder of this node) -> Task
    optim: OptimSection
    compute: ComputeSection
    zero_stage: int
    steps: int
    seed: int
    out: str  # where rank 0 writes the model and metrics; seen by driver and workers
    work: str  # where checkpoints lie while the job is under way; seen by all workers
    rows: str = ""  # names the rows: jobs of one name read the same
    until: int | None = None  # ends there, before ``steps``, with a checkpoint and the model in ``paused``

    @property
    def end(self) -> int:
        return self.steps if self.until is None else min(self.until, self.steps)

    @property
    def paused(self) -> Path:
        """Where the model lies of a job that ended early."""
        return Path(self.work) / f"model-{self.end}"


def run_job(job: TrainJob, rows: Any) -> None:
    """A job on this worker of Ray Train; ``rows``: for the task, with a dataset's ``iter_batches``."""
    import gc
    import random

    import numpy as np
    import ray.train
    import torch

    torch.set_num_threads(max(1, int(job.compute.cpus_per_worker)))
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(job.seed)
    with tempfile.TemporaryDirectory(prefix="clinkd-") as scratch:
        task = job.make_task(rows, Path(scratch))
        worker = Worker(job, task, rank, world)
        worker.run()
        worker.engine.destroy()
        del task, worker
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Worker:
    """One rank of a training stage."""

    def __init__(self, job: TrainJob, task: Task, rank: int, world: int) -> None:
        import torch.distributed as dist

        from clinkd.train.checkpoint import Checkpoints
        from clinkd.train.engine import import_engine, start_engine
        from clinkd.train.meter import Meter, begin_memory

        import_engine(job.compute)
        self.libraries_gib = begin_memory()
        self.job, self.task, self.rank, self.world = job, task, rank, world
        self.streams = hasattr(task, "feed")
        if not self.streams:
            self.ledger = Ledger(task.turn_counts(), job.optim.questions_per_image, job.seed)
        self.feed: Any = None
        module = task.build()
        if job.zero_stage >= 2 and hasattr(module, "shares"):
            # It reduces gradients in the order in which they become ready, which sharing changes: where one
            # rank's batch shares and another's does not, weights of one shape would get each other's.
            module.shares = False
        self.meter = Meter(module)
        self.engine = start_engine(module, job.optim, job.compute, job.zero_stage, job.steps)
        self.metrics = Path(job.out) / "metrics.jsonl"
        self.checkpoints = Checkpoints(Path(job.work) / job.stage, rank, dist.barrier, world)
        self.step = self.consumed = 0

    def run(self) -> None:
        self._restore()
        start, seen = time.monotonic(), 0
        while self.step < self.job.end:
            begun = time.monotonic()
            sums, totals = self._train_step()
            now = time.monotonic()
            self.step += 1
            self.consumed += self._groups_per_step
            seen += totals.samples
            self._log(sums, totals, now - begun, seen / (now - start))
            early = self.step == self.job.end < self.job.steps
            if early or (self.step % self.job.compute.checkpoint_every == 0 and self.step < self.job.end):
                self._checkpoint()
        self._finish()

    @property
    def _groups_per_step(self) -> int:
        return self.world * self.job.optim.batch_size * self.job.optim.accumulation

    def _micro_batches(self) -> Iterator[tuple[dict[str, Any], int, int]]:
        """(arguments, tokens, samples) of each accumulation step.

        Samples are the rows trained on (the guide: images), not those dealt: a curriculum holds some back.
        """
        size = self.job.optim.batch_size
        if self.streams:
            yield from islice(self.feed, self.job.optim.accumulation)
            return
        for micro in range(self.job.optim.accumulation):
            groups = self.ledger.share(self.consumed + micro * self.world * size, self.rank, self.world, size)
            arguments, tokens = self.task.batch(groups, self.step, self.job.steps)
            yield arguments, tokens, len(arguments.get("input_ids", groups))

    def _train_step(self) -> tuple[dict[str, float], Totals]:
        """Sums of the losses and counts, all over all ranks."""
        import torch
        import torch.distributed as dist

        batches = list(self._micro_batches())
        found = [(n, samples, *self.meter.count(arguments, n)) for arguments, n, samples in batches]
        counts = torch.tensor(found, dtype=torch.float64).sum(0).to(self.engine.device)
        dist.all_reduce(counts)
        count = counts[0].float()
        # DeepSpeed averages over ranks and accumulation steps; ours are sums, to be divided by all tokens.
        scale = self.world * len(batches) / count.clamp(min=1)
        sums: dict[str, Any] = {}
        for arguments, _, _ in batches:
            given = {key: _move(value, self.engine.device) for key, value in arguments.items()}
            losses = self.engine(**given)
            self.engine.backward(losses["loss"] * scale)
            self.engine.step()
            for key, value in losses.items():
                sums[key] = sums.get(key, 0.0) + value.detach().float()
        packed = torch.stack([sums[key] for key in sorted(sums)])
        dist.all_reduce(packed)
        tokens, samples, inputs, operations = counts.tolist()
        totals = Totals(tokens, int(samples), int(inputs), operations)
        return dict(zip(sorted(sums), packed.tolist(), strict=True)), totals

    def _log(self, sums: dict[str, float], totals: Totals, seconds: float, rate: float) -> None:
        """A line of the metrics; ``seconds`` of this step, ``rate`` in samples a second since the start."""
        if self.rank:
            return
        from clinkd.train.meter import gradient_norm, peak_memory_gib, speed

        line = {"stage": self.job.stage, "step": self.step, "total": self.job.steps}
        line |= {key: round(value / max(totals.tokens, 1.0), 6) for key, value in sums.items()}
        line |= {"lr": self.engine.get_lr()[0], "tokens": int(totals.tokens), "samples_per_s": round(rate, 2)}
        line |= speed(seconds, totals.input_tokens, totals.operations)
        line["memory_gib"] = peak_memory_gib(self.engine.device)
        line["libraries_gib"] = self.libraries_gib
        norm = gradient_norm(self.engine)
        if norm is not None:
            line["grad_norm"] = norm
        if hasattr(self.task, "facts"):
            facts = self.task.facts(self.step - 1, self.job.steps)
            line |= {key: round(value, 6) for key, value in facts.items() if math.isfinite(value)}
        with self.metrics.open("a") as lines:
            lines.write(json.dumps(line) + "\n")

    def _checkpoint(self) -> None:
        state = {"step": self.step, "consumed": self.consumed, "world": self.world}
        if self.streams:
            state["feed"] = self.feed.state()
        self.checkpoints.save(
            self.step,
            lambda folder: self.engine.save_checkpoint(str(folder), tag="state", client_state=state),
        )

    def _restore(self) -> None:
        folder = self.checkpoints.newest()
        state: dict[str, Any] = {}
        if folder is not None:
            rates = _options(self.engine)
            _, state = self.engine.load_checkpoint(str(folder), tag="state")
            _set_options(self.engine, rates)
            self.step, self.consumed = state["step"], state["consumed"]
        if self.streams:
            left = (self.job.steps - self.step) * self.job.optim.accumulation
            task: Any = self.task
            self.feed = task.feed(self.rank, self.world, left, state.get("feed"), self.engine.device)
        if self.rank == 0:
            keep_lines(self.metrics, self.step)

    def _finish(self) -> None:
        """The whole model on rank 0; all ranks leave together."""
        import torch.distributed as dist

        state = self._whole_state()
        if self.rank == 0:
            early = self.job.end < self.job.steps
            self.task.save(state, self.job.paused if early else Path(self.job.out) / "model")
        dist.barrier()

    def _whole_state(self) -> dict[str, Any]:
        if self.job.zero_stage == 3:  # collective: every rank takes part
            state = self.engine._zero3_consolidated_16bit_state_dict()
            return state or {}
        return {key: value.detach().cpu().clone() for key, value in self.engine.module.state_dict().items()}


OPTIONS = ("weight_decay", "betas")


def _options(engine: Any) -> tuple[list[float], list[dict[str, Any]]]:
    """Base learning rates, and what else the configuration says of each group of parameters."""
    groups = engine.optimizer.param_groups
    return list(engine.lr_scheduler.base_lrs), [{key: group[key] for key in OPTIONS} for group in groups]


def _set_options(engine: Any, options: tuple[list[float], list[dict[str, Any]]]) -> None:
    """Puts the configuration's options in the place of a checkpoint's: a clone's settings are its own."""
    scheduler = engine.lr_scheduler
    scheduler.base_lrs = options[0]
    for group, base, curve, others in zip(
        engine.optimizer.param_groups, options[0], scheduler.lr_lambdas, options[1], strict=True
    ):
        group.update(others, lr=base * curve(scheduler.last_epoch), initial_lr=base)


def _move(value: Any, device: Any) -> Any:
    import torch

    return value.to(device) if isinstance(value, torch.Tensor) else value


def keep_lines(path: Path, step: int) -> None:
    """Cuts a metrics file back to the lines of steps up to ``step``; a torn last line goes too."""
    kept = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError):
                continue
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text("".join(line + "\n" for line in kept))
    os.replace(unfinished, path)
