"""From the sampler's batches to arrays: whoever makes them reads row groups of the shards, and a rank takes
them in their order.

Decisions:
- The unit of work is a *job*: consecutive batches of one rank from one window. Who runs it keeps the row
  groups it read within a budget of bytes, so that the next job of the window finds them.
- On accelerators jobs are Ray Data tasks, beside the worker; on CPUs, where they would only take the
  worker's own cores, the worker runs them itself (``Resources.tasks`` 0). Both run the same code.
- A batch is one row: its arrays as raw bytes, a JSON header with their types and shapes. They cross the
  object store once and are read where they lie.
- Tasks, not actors. A task finds a worker process of an earlier one, with tokenizer and processor loaded;
  actors start anew with every pipeline. On two cores, 376 images of 512 pixels: first batch after 0.4 s from
  tasks and 5 s from actors, 105 images/s and 43 over the whole pass, 117 and 112 once both run.
- What a batch is made of is the caller's: ``make`` turns records into arrays, on whatever model's terms.
- A record that cannot be made into a batch ends the run at once, with its id and what to do. Preparation
  has looked at every image, so a bad one here means that the data changed since.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from clinkd.data.index import RecordIndex
from clinkd.data.reading import Place, Records
from clinkd.data.sampler import Batch
from clinkd.data.shards import Shards
from clinkd.data.tasks import run_tasks

Arrays = dict[str, np.ndarray]
JOBS_PER_PIPELINE = 256
"""Jobs that one execution of Ray Data runs through: enough that its start is no part of the time."""
BATCHES_PER_JOB = 16


@dataclass(frozen=True)
class Asked:
    """One group of a batch."""

    place: Place
    documents: tuple[int, ...]


@dataclass(frozen=True)
class Order:
    """A batch to be made: the groups of its sequences (none: a filler), and the step that it is for."""

    step: int
    window: tuple[int, int]
    sequences: tuple[tuple[Asked, ...], ...]


class Maker(Protocol):
    """What makes arrays of records; travels to the tasks by value."""

    def make(self, order: Order, records: Records) -> Arrays:
        """Raises FeedError."""


@dataclass(frozen=True)
class Resources:
    """Of one rank.

    Args:
        tasks: Ray Data tasks that make batches at one time; 0: the worker makes them. cpus: what each of them
            declares to Ray.
        kept_bytes: row groups that whoever makes batches keeps.
        store_share: of Ray's object store, the most that finished batches may take.
    """

    tasks: int = 2
    cpus: float = 0.5
    kept_bytes: int = 96 << 20
    store_share: float = 0.25


def jobs(orders: Iterable[Order]) -> Iterator[list[Order]]:
    """Consecutive batches of one window, ``BATCHES_PER_JOB`` at most."""
    job: list[Order] = []
    for order in orders:
        if job and (order.window != job[0].window or len(job) == BATCHES_PER_JOB):
            yield job
            job = []
        job.append(order)
    if job:
        yield job


def stream(orders: Iterable[Order], shards: Shards, maker: Maker, resources: Resources) -> Iterator[Arrays]:
    """Batches in their order.

    Args:
        maker: travels to the tasks by value, if there are any.

    Raises:
        FeedError: a record that cannot be read, decoded or made into a batch.
    """
    if not resources.tasks:
        records = Records(shards, resources.kept_bytes)
        for order in orders:
            yield maker.make(order, records)
        return
    chunk: list[list[Order]] = []
    for job in jobs(orders):
        chunk.append(job)
        if len(chunk) == JOBS_PER_PIPELINE:
            yield from _pipeline(chunk, _Jobs(shards, maker, resources.kept_bytes), resources)
            chunk = []
    if chunk:
        yield from _pipeline(chunk, _Jobs(shards, maker, resources.kept_bytes), resources)


def _pipeline(chunk: list[list[Order]], work: _Jobs, resources: Resources) -> Iterator[Arrays]:
    import ray

    store = ray.cluster_resources().get("object_store_memory", 0.0) * resources.store_share
    for table in run_tasks(chunk, work, resources.cpus, tasks=resources.tasks, store=store):
        yield from from_rows(table)


_RECORDS: dict[tuple[Shards, int], Records] = {}
"""Of this process, for one set of shards: the tasks that it runs one after the other."""


@dataclass(frozen=True)
class _Jobs:
    shards: Shards
    maker: Maker
    kept_bytes: int

    def __call__(self, job: list[Order]) -> Iterator[Any]:
        key = self.shards, self.kept_bytes
        if key not in _RECORDS:
            _RECORDS.clear()
            _RECORDS[key] = Records(*key)
        for order in job:
            yield to_row(self.maker.make(order, _RECORDS[key]))


def to_row(arrays: Arrays) -> Any:
    """A batch as an Arrow table of one row; the arrays' bytes are not copied."""
    import pyarrow as pa

    header = {name: [value.dtype.str, value.shape] for name, value in arrays.items()}
    columns = {"header": pa.array([json.dumps(header)])}
    for name, value in arrays.items():
        content = pa.py_buffer(np.ascontiguousarray(value).reshape(-1).view(np.uint8))
        offsets = pa.py_buffer(np.array([0, value.nbytes], np.int64))
        columns[name] = pa.Array.from_buffers(pa.large_binary(), 1, [None, offsets, content])
    return pa.table(columns)


def from_rows(table: Any) -> Iterator[Arrays]:
    """The batches of a block, over its own memory: read-only."""
    for at in range(table.num_rows):
        header = json.loads(table.column("header")[at].as_py())
        yield {
            name: np.frombuffer(table.column(name)[at].as_buffer(), dtype).reshape(shape)
            for name, (dtype, shape) in header.items()
        }


def order_of(index: RecordIndex, batch: Batch, step: int) -> Order:
    """A batch of the sampler as what its maker has to know."""
    sequences = tuple(
        tuple(Asked(Place(*index.place[record].tolist()), documents) for record, documents in sequence)
        for sequence in batch.sequences
    )
    return Order(step, batch.window, sequences)
