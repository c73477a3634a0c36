"""One loop for every stage that trains: Ray Train workers, a DeepSpeed engine, a feed, checkpoints.

Decisions:
- What a stage *is* (model, batches, loss) stands in a :class:`Task`; the loop knows only this interface, so
  the guide, the teacher, distillation and reflection differ nowhere else.
- Losses come as sums with the number of tokens they are over; the loop divides by the tokens of all ranks and
  accumulation steps, so that the result does not depend on how a batch was dealt out.
- Counts of all ranks (train/meter.py) travel together, before the step: one collective for all of them.
- Rank 0 writes metrics as lines of a file: reporting each step to Ray Train would wait for its controller.
  After a resume, lines past the checkpoint are cut off.
- A process may run one job after the other (crew.py), so each begins with its own seeds and leaves nothing.
- Random numbers follow from seed, step and rank, so that a resumed job draws those of the undisturbed one.
- Who wants a job to end early puts a file there (``TrainJob.stop``); rank 0 sees it, all save and leave.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from clinkd.config import ComputeSection, OptimSection, WatchSection

if TYPE_CHECKING:
    from clinkd.train.feed import Share
    from clinkd.train.meter import Totals

PREEMPTIONS = os.environ.get("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1") != "0"
ASKED = 10.0  # seconds between questions to Ray Train, which all ranks ask together


class Batches(Protocol):
    """A rank's micro-batches, to the end of its stage."""

    def __iter__(self) -> Iterator[tuple[dict[str, Any], int, int, bool]]:
        """(the module's arguments, tokens (or items) that its sums are over, samples, whether it counts)."""

    def names(self) -> list[str]:
        """The samples of the batch last given; asked for by ``watch.samples`` alone."""

    def state(self) -> dict[str, Any]:
        """Where it stands between two steps, for a ``Share`` to go on from; JSON values."""


class Task(Protocol):
    """What a training stage brings."""

    def build(self) -> Any:
        """The torch module whose forward takes one batch and returns {"loss": sum, ...sums} as scalars."""

    def feed(self, share: Share, device: Any) -> Batches:
        """This rank's micro-batches."""

    def facts(self, step: int, total: int) -> dict[str, float]:
        """What goes into a step's line of the metrics; it follows from the step alone, so that a resumed run
        writes the same."""

    def save(self, state: dict[str, Any], out: Path) -> None:
        """Writes the trained model, ``state`` being the whole state dict of the module; rank 0 only."""


@dataclass(frozen=True)
class TrainJob:
    """Everything a worker needs; it travels by value."""

    stage: str
    make_task: Callable[[], Task]
    optim: OptimSection
    compute: ComputeSection
    zero_stage: int
    steps: int
    seed: int
    out: str  # where rank 0 writes the model and metrics; seen by driver and workers
    work: str  # where checkpoints lie while the job is under way; seen by all workers
    until: int | None = None  # ends there, before ``steps``, with a checkpoint and the model in ``paused``
    dealt: int = 0  # workers that the batches are dealt for; 0: those there are
    store: str | None = None  # where copies of the checkpoints go
    watch: WatchSection = field(default_factory=WatchSection)
    run: str = ""  # names the run in what it tells of itself

    @property
    def end(self) -> int:
        return self.steps if self.until is None else min(self.until, self.steps)

    @property
    def paused(self) -> Path:
        """Where the model lies of a job that ended early."""
        return Path(self.work) / f"model-{self.end}"

    @property
    def stop(self) -> Path:
        """A file; once it is there, the job ends after the step under way, with a checkpoint."""
        return Path(self.work) / self.stage / "stop"


def run_job(job: TrainJob) -> None:
    """A job on this worker of Ray Train."""
    import gc

    import ray.train
    import torch

    from clinkd import metrics
    from clinkd.train.engine import set_seeds

    torch.set_num_threads(max(1, int(job.compute.cpus_per_worker)))
    context = ray.train.get_context()
    rank, world = context.get_world_rank(), context.get_world_size()
    metrics.about(run=job.run, stage=job.stage, rank=str(rank))
    set_seeds(job.seed)
    worker = Worker(job, job.make_task(), rank, world)
    worker.run()
    worker.engine.destroy()
    del worker
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Worker:
    """One rank of a training stage."""

    engine: Any
    meter: Any
    feed: Batches

    def __init__(self, job: TrainJob, task: Task, rank: int, world: int) -> None:
        import torch.distributed as dist

        from clinkd.train.account import Account
        from clinkd.train.checkpoint import Checkpoints
        from clinkd.train.engine import import_engine
        from clinkd.train.guard import EVENTS, Guard
        from clinkd.train.meter import begin_memory

        import_engine(job.compute)
        self.libraries_gib = begin_memory()
        self.task, self.rank, self.world = task, rank, world
        self._deal(job)
        self.metrics = Path(job.out) / "metrics.jsonl"
        self.checkpoints = Checkpoints(Path(job.work) / job.stage, rank, dist.barrier, world)
        self.guard = Guard(job.watch, job.stage, None if rank else Path(job.out) / EVENTS)
        self.account = Account(Path(job.out), rank, job.watch.samples)
        self.offsite: Any = None
        if job.store and not rank:
            from clinkd.train.offsite import Offsite

            self.offsite = Offsite(
                job.store, self.checkpoints.folder, lambda text: self.guard.say("store", self.step, text)
            )
        self.step = 0
        self._own, self._looked, self._saved = 0.0, time.monotonic(), 0

    def _deal(self, job: TrainJob) -> None:
        """Which micro-batches of a step this rank works off."""
        from clinkd.train.resume import places

        self.job = job
        self.micros = (job.dealt or self.world) * job.optim.accumulation  # of all ranks
        self.places = places(self.micros, self.rank, self.world)
        self.rounds = len(self.places)

    def run(self) -> None:
        from clinkd.train.guard import Rollback

        passed: set[int] = set()
        if self.offsite is not None:
            self.offsite.begin()
        while True:
            self._begin(back=bool(passed))
            try:
                whole = self._train(passed)
                if self.offsite is not None:
                    done = whole and self.job.end == self.job.steps  # nobody goes on from its checkpoints
                    self.offsite.close(0.0 if done else self.job.compute.grace)
                if whole:
                    self._finish()
                return
            except Rollback as back:
                passed.update(back.steps)
                self.engine.destroy()

    def _begin(self, back: bool) -> None:
        """Model and engine, from the newest checkpoint where there is one; ``back``: for the second time."""
        import torch.distributed as dist

        from clinkd.train.engine import start_engine
        from clinkd.train.guard import EVENTS
        from clinkd.train.meter import Meter
        from clinkd.train.resume import keep_lines, loadable

        folder, standing, universal = loadable(
            self.checkpoints, self.world, self.job.zero_stage, dist.barrier
        )
        if standing is not None:  # from a store it may have come without its folder's own note
            self._deal(replace(self.job, steps=standing.begun.steps, dealt=standing.begun.workers))
        job = self.job
        module = self.task.build()
        if job.zero_stage >= 2 and hasattr(module, "shares"):
            # It reduces gradients in the order in which they become ready, which sharing changes: where one
            # rank's batch shares and another's does not, weights of one shape would get each other's.
            module.shares = False
        self.meter = Meter(module)
        optim = job.optim.model_copy(update={"accumulation": self.rounds})
        self.engine = start_engine(module, optim, job.compute, job.zero_stage, job.steps, universal=universal)
        self._restore(folder, standing)
        self.account.begin(self.step)
        if self.rank == 0:
            keep_lines(self.metrics, self.step)
            if not back:  # else they tell of what it went back for
                keep_lines(self.metrics.with_name(EVENTS), self.step)
                if standing is not None:
                    self.guard.resumed(self.step, job.steps, self.world, job.zero_stage)

    def _train(self, passed: set[int]) -> bool:
        """Steps until the job's end; false: asked to stop before it, with a checkpoint."""
        start, seen, saved = time.monotonic(), 0, -1
        while self.step < self.job.end:
            if self.step + 1 in passed:
                self._pass_over()
                continue
            begun = time.monotonic()
            sums, totals = self._train_step()
            now = time.monotonic()
            self.step += 1
            seen += totals.samples
            self._look(sums, totals, now - begun)
            self._log(sums, totals, now - begun, seen / (now - start))
            if totals.stop and self.step < self.job.end:
                self._checkpoint()
                return False
            early = self.step == self.job.end < self.job.steps
            due = self.step % self.job.compute.checkpoint_every == 0 and self.step < self.job.end
            if early or due or (totals.preempted and saved < 0):
                self._checkpoint()
                saved = self.step if totals.preempted else saved
        return True

    def _pass_over(self) -> None:
        """A step that spoilt the weights before: its samples are not trained on."""
        for _ in islice(self.feed, self.rounds):
            pass
        self.engine.lr_scheduler.step()
        self.step += 1

    def _look(self, sums: dict[str, float], totals: Totals, seconds: float) -> None:
        applied = self.engine.was_step_applied()
        if not applied:
            self.engine.lr_scheduler.step()  # DeepSpeed leaves it where it is; ours follows the step
        loss = sums["loss"] / max(totals.tokens, 1.0)
        self.guard.step(self.step, loss, seconds, totals.waits, applied)

    def _micro_batches(self) -> Iterator[tuple[dict[str, Any], int, int, bool]]:
        """(arguments, tokens, samples, counts) of each accumulation step of this rank.

        Samples are what is trained on (questions; the guide: images), not what was dealt: a curriculum holds
        some back. One that does not count keeps a rank in step that has no micro-batch of its own left.
        """
        for arguments, tokens, samples, counts in islice(self.feed, self.rounds):
            if self.account.kept and counts:
                self.account.deal(self.feed.names())
            yield arguments, tokens, samples, counts

    def _wishes(self) -> list[float]:
        """With the counts: whether to stop, whether to ask about preemption, each rank's seconds."""
        stop = ask = 0.0
        if self.rank == 0:
            stop = float(self.job.stop.exists())
            ask = float(PREEMPTIONS and time.monotonic() - self._looked > ASKED)
        own = [0.0] * self.world
        own[self.rank] = self._own
        return [stop, ask, *own]

    def _preempted(self, ask: bool) -> bool:
        if not ask:
            return False
        import ray.train

        self._looked = time.monotonic()
        return ray.train.get_preemption_info() is not None

    def _train_step(self) -> tuple[dict[str, float], Totals]:
        """Sums of the losses and counts, all over all ranks."""
        import torch
        import torch.distributed as dist

        from clinkd.train.engine import on_device, set_seeds
        from clinkd.train.meter import Totals

        set_seeds((self.job.seed * 1_000_003 + self.step) * 65_537 + self.rank)
        begun = time.monotonic()
        batches = list(self._micro_batches())
        found = [(n, samples, *self.meter.count(arguments, n)) for arguments, n, samples, _ in batches]
        own = time.monotonic() - begun
        whole = [sum(column) for column in zip(*found, strict=True)] + self._wishes()
        counts = torch.tensor(whole, dtype=torch.float64, device=self.engine.device)
        dist.all_reduce(counts)
        # DeepSpeed averages over ranks and accumulation steps; ours are sums, to be divided by all tokens.
        scale = self.world * len(batches) / counts[0].float().clamp(min=1)
        sums: dict[str, Any] = {}
        for number, (arguments, _, _, real) in enumerate(batches):
            given = {key: on_device(value, self.engine.device) for key, value in arguments.items()}
            begun = time.monotonic()
            losses = self.engine(**given)
            own += 0 if number else time.monotonic() - begun
            self.engine.backward(losses["loss"] * (scale * real))
            self.engine.step()
            for key, value in losses.items():
                sums[key] = sums.get(key, 0.0) + value.detach().float() * real
        packed = torch.stack([sums[key] for key in sorted(sums)])
        dist.all_reduce(packed)
        self._own = own
        tokens, samples, inputs, operations, stop, ask, *waits = counts.tolist()
        totals = Totals(
            tokens, int(samples), int(inputs), operations, stop > 0, self._preempted(ask > 0), waits
        )
        return dict(zip(sorted(sums), packed.tolist(), strict=True)), totals

    def _log(self, sums: dict[str, float], totals: Totals, seconds: float, rate: float) -> None:
        """A line of the metrics; ``seconds`` of this step, ``rate`` in samples a second since the start."""
        from clinkd.train.meter import measured, publish

        publish(self.step, self.job.steps, sums["loss"], totals, seconds, self.engine.device, self.rank)
        self.account.write(self.step)
        if self.rank:
            return
        line = {"stage": self.job.stage, "step": self.step, "total": self.job.steps}
        line |= measured(self.engine, sums, totals, seconds)
        line |= {"samples_per_s": round(rate, 2), "libraries_gib": self.libraries_gib}
        facts = self.task.facts(self.step - 1, self.job.steps)
        line |= {key: round(value, 6) for key, value in facts.items() if math.isfinite(value)}
        with self.metrics.open("a") as lines:
            lines.write(json.dumps(line) + "\n")

    def _checkpoint(self) -> None:
        from clinkd.train.checkpoint import step_name
        from clinkd.train.resume import SHARDS, Begun, Standing

        begun = Begun(self.job.steps, self.job.dealt or self.world)
        standing = Standing(self.step, self.world, self.job.zero_stage, begun, self.feed.state())

        def write(folder: Path) -> None:
            self.engine.save_checkpoint(str(folder), tag=SHARDS)
            if self.rank == 0:
                standing.write(folder)

        if self.rank == 0:
            self.guard.resources(self.step, self.checkpoints.folder, self._saved)
        self._saved = self.checkpoints.save(self.step, write)
        if self.offsite is not None:
            self.offsite.send(self.checkpoints.folder / step_name(self.step))

    def _restore(self, folder: Path | None, standing: Any) -> None:
        from clinkd.train.engine import options_of, set_options
        from clinkd.train.feed import Share
        from clinkd.train.resume import SHARDS

        self.step = standing.step if standing else 0
        if folder is not None:
            options = options_of(self.engine)
            self.engine.load_checkpoint(str(folder), tag=SHARDS)
            set_options(self.engine, options)
        self.feed = self.task.feed(
            Share(
                self.micros // self.job.optim.accumulation, self.job.optim.accumulation, tuple(self.places),
                self.step, self.job.steps, self.job.end, standing.feed if standing else None,
            ),
            self.engine.device,
        )  # fmt: skip

    def _finish(self) -> None:
        """The whole model on rank 0; all ranks leave together."""
        import torch.distributed as dist

        from clinkd.train.engine import whole_state

        state = whole_state(self.engine, self.job.zero_stage)
        if self.rank == 0:
            early = self.job.end < self.job.steps
            self.task.save(state, self.job.paused if early else Path(self.job.out) / "model")
        dist.barrier()
