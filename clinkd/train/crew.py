"""Training workers of Ray Train that stay from job to job.

Decisions:
- A worker spends some ten seconds of a core on importing torch, DeepSpeed and transformers, and Ray Train
  starts four more processes beside it. A crew is one ``TorchTrainer`` whose workers take one job after the
  other, so a run, or a suite of tests, pays that once.
- Jobs are handed over by a mailbox, an actor that holds references alone: a job's code is imported where it
  runs. All ranks take the jobs in their order and finish each together.
- A worker that dies is Ray Train's affair: it starts the group again, which takes up the first job that is
  not settled, from its last checkpoint.
- An error that is the data's is the job's result, not the crew's end. So is one that a second attempt ends
  with too: a third would not mend it.
- Between jobs a crew holds its CPUs and GPUs, so stages keep one only where Ray was started for them
  (``cluster.declared_cpus``), and never on GPUs, which other stages want.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
import traceback
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from clinkd import cluster, metrics
from clinkd.config import ComputeSection
from clinkd.data.shards import DataError
from clinkd.train.loop import TrainJob, run_job

SOON = 10.0
"""Seconds for workers to end that have nothing more to do."""


class Outcome(NamedTuple):
    """What ended a job, in one line; both empty where all went well."""

    refused: str
    failed: str


class Mailbox:
    """Jobs in their order; an actor whose calls wait (asyncio)."""

    def __init__(self) -> None:
        import asyncio

        self._jobs: list[Any] = []
        self._settled: list[Outcome] = []
        self._failures: list[str] = []
        self._closed = False
        self._changed = asyncio.Condition()

    async def post(self, job: list[Any]) -> int:
        """Puts a reference, in a list so that Ray does not resolve it; returns the job's number."""
        async with self._changed:
            self._jobs.append(job)
            self._changed.notify_all()
            return len(self._jobs) - 1

    async def settled(self) -> int:
        """How many jobs are done with."""
        return len(self._settled)

    async def job(self, number: int) -> list[Any] | None:
        """The job, once it is there; None once no more will come."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._closed or number < len(self._jobs))
            return self._jobs[number] if number < len(self._jobs) else None

    async def settle(self, number: int, refused: str = "", failed: str = "") -> None:
        """``refused``: what was wrong with the data. ``failed``: what no further attempt would mend."""
        async with self._changed:
            if number == len(self._settled):
                self._settled.append(Outcome(refused, failed))
                self._jobs[number] = None
            self._failures.clear()
            self._changed.notify_all()

    async def outcome(self, number: int) -> Outcome:
        """How a job ended, once it is settled."""
        async with self._changed:
            await self._changed.wait_for(lambda: number < len(self._settled))
            return self._settled[number]

    async def fail(self, error: str) -> bool:
        """A worker met an error that is not the data's; whether an attempt before ended with the same."""
        again = error in self._failures
        self._failures.append(error)
        return again

    async def failure(self) -> str:
        """The first error of the job under way; what follows it are mostly its effects. Empty: none."""
        return self._failures[0] if self._failures else ""

    async def close(self) -> None:
        async with self._changed:
            self._closed = True
            self._changed.notify_all()


class TrainingFailed(RuntimeError):
    """Training ended with an error of a worker; the message is its cause in one line."""


def serve(config: dict[str, Any]) -> None:
    """The train function of every worker; ``config``: the actor ``mailbox``."""
    import ray
    import ray.train

    mailbox = config["mailbox"]
    rank = ray.train.get_context().get_world_rank()
    number = ray.get(mailbox.settled.remote())
    while True:
        posted = ray.get(mailbox.job.remote(number))
        if posted is None:
            return
        stage = "train"
        try:
            job = ray.get(posted[0])
            stage = job.stage
            run_job(job)
        except DataError as error:
            ray.get(mailbox.settle.remote(number, refused=str(error)))
            raise  # the other ranks wait in a collective for this one
        except Exception as error:
            told = f"{stage}, worker {rank}: {in_one_line(error)}"
            if ray.get(mailbox.fail.remote(told)):
                ray.get(mailbox.settle.remote(number, failed=told))
            raise
        if rank == 0:
            ray.get(mailbox.settle.remote(number))
        del job, posted
        number += 1


def in_one_line(error: BaseException) -> str:
    """An error's innermost cause: its kind, the first line of what it says, and the line of code."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    where = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(where[-1].filename).name}:{where[-1].lineno})" if where else ""
    return f"{type(error).__name__}: {said[:300]}{place}"


def told_with_logs(cause: str) -> str:
    """A cause in one line, with what to do and where there is more."""
    return (
        f"{cause}; the same command goes on from the last checkpoint (workers' logs: {cluster.logs()} on "
        "their node, or `ray logs`)"
    )


class Crew:
    """The workers of ``compute``; started with the first job. A context manager.

    Args:
        storage: a folder for Ray Train's own notes, seen by all nodes.
    """

    def __init__(self, compute: ComputeSection, storage: Path) -> None:
        self.compute, self.storage = compute, storage
        self._mailbox: Any = None
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(wait=error is None)

    def fit(self, job: TrainJob) -> None:
        """Runs a job; one that was cut off goes on from its last checkpoint in ``job.work``.

        Raises:
            DataError: a worker met a record that cannot be fed.
            TrainingFailed: workers failed more often than ``compute.max_failures`` allows.
        """
        job.stop.unlink(missing_ok=True)
        with _announced(job):
            self._fit(job)

    def start(self) -> None:
        """Start the workers, if they are not there; returns at once."""
        if self._thread is None:
            self._start()

    def _fit(self, job: TrainJob) -> None:
        import ray

        self.start()
        number = ray.get(self._mailbox.post.remote([ray.put(job)]))
        settled = self._mailbox.outcome.remote(number)
        try:
            self._await(settled, job)
        except KeyboardInterrupt:  # SIGTERM too, see interrupt.py
            self._save(settled, job)
            raise
        outcome = ray.get(settled)
        if outcome.refused:
            raise DataError(outcome.refused)
        if outcome.failed:
            raise TrainingFailed(told_with_logs(f"{outcome.failed}, twice"))

    def _await(self, settled: Any, job: TrainJob, seconds: float = math.inf) -> None:
        import ray

        until = time.monotonic() + seconds
        while time.monotonic() < until and not ray.wait([settled], timeout=0.2)[0]:
            if self._thread is not None and not self._thread.is_alive():
                raise self._failed(job)

    def _failed(self, job: TrainJob) -> TrainingFailed:
        """What ended the workers, as a person reads it."""
        import ray

        found = ""
        with contextlib.suppress(Exception):  # the mailbox may be gone with its node
            found = ray.get(self._mailbox.failure.remote(), timeout=SOON)
        error = self._error
        self._forget()
        if not found:
            cause = "the workers ended without a word" if error is None else in_one_line(error)
            found = f"{job.stage}: {cause}"
        return TrainingFailed(told_with_logs(found))

    def _save(self, settled: Any, job: TrainJob) -> None:
        """Has the workers end after their step, with a checkpoint; a second signal does not wait for it."""
        job.stop.parent.mkdir(parents=True, exist_ok=True)
        job.stop.touch()
        with contextlib.suppress(Exception):  # the workers may be ending as well
            self._await(settled, job, self.compute.grace)

    def _start(self) -> None:
        import ray

        self._error = None
        here = cluster.beside_the_driver()
        self._mailbox = ray.remote(Mailbox).options(num_cpus=0, **here).remote()
        actors = {"mailbox": self._mailbox}
        trainer = _trainer(self.compute, actors, self.storage)

        def run() -> None:
            try:
                trainer.fit()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, name="crew", daemon=True)
        self._thread.start()

    def close(self, wait: bool = True) -> None:
        """Sends the workers home; ``wait``: until they are gone, not only for a few seconds.

        A thread that still waits for Ray when Ray is shut down can take the process with it (SIGSEGV).
        """
        import ray

        if self._thread is None or not ray.is_initialized():
            self._forget()
            return
        thread = self._thread
        if thread.is_alive():
            ray.get(self._mailbox.close.remote())
            thread.join(None if wait else SOON)
        self._forget()

    def _forget(self) -> None:
        self._mailbox = self._thread = None


@contextlib.contextmanager
def _announced(job: TrainJob) -> Iterator[None]:
    """Tells the metrics that a job is under way; the workers that it waits for may be dead."""
    names = {"run": job.run, "stage": job.stage, "zero_stage": str(job.zero_stage)}
    metrics.TRAIN_BEGUN.set(time.time(), **names)
    metrics.TRAIN_ACTIVE.set(1, **names)
    try:
        yield
    finally:
        metrics.TRAIN_ACTIVE.set(0, **names)


def _trainer(compute: ComputeSection, config: dict[str, Any], storage: Path) -> Any:
    import ray.train
    import ray.train.torch
    import ray.train.v2.api.config

    gpu, least = compute.gpus_per_worker > 0, compute.min_workers
    cpus = cluster.declared_cpus(compute.workers, compute.cpus_per_worker)
    resources = {"CPU": cpus} | ({"GPU": compute.gpus_per_worker} if gpu else {})
    environment = {"TOKENIZERS_PARALLELISM": "false"}
    if not gpu:  # Muon's few small matrices are not worth a compiler
        environment |= {"DS_ACCELERATOR": "cpu", "TORCH_COMPILE_DISABLE": "1"}
    return ray.train.torch.TorchTrainer(
        serve,
        train_loop_config=config,
        scaling_config=ray.train.ScalingConfig(
            num_workers=compute.workers if least is None else (least, compute.workers),  # type: ignore[arg-type]
            use_gpu=gpu,
            resources_per_worker=resources,
            # Declaring less than it uses, a worker would be packed beside others on one node.
            placement_strategy="PACK" if cpus == compute.cpus_per_worker else "SPREAD",
        ),
        torch_config=ray.train.torch.TorchConfig(backend="nccl" if gpu else "gloo"),
        run_config=ray.train.RunConfig(  # type: ignore[call-arg]
            name=f"crew-{uuid.uuid4().hex[:8]}",  # under a known name Ray Train would take up a former run
            storage_path=str(storage.resolve()),
            failure_config=ray.train.v2.api.config.FailureConfig(
                max_failures=compute.max_failures, max_preemption_failures=compute.max_preemptions
            ),
            worker_runtime_env={"env_vars": environment},
        ),
    )
