"""From a plan to batches: Ray Data tasks read row groups, make batches of them, and a rank iterates over
them.

Decisions:
- The unit of work is a *job*: consecutive batches of one rank that come from one window. A job reads its
  row groups once and hands each batch over as soon as it is made.
- A batch is one row: its arrays as raw bytes, a JSON header with their types and shapes. They cross the
  object store once and are read where they lie.
- Tasks, not actors. A task finds a worker process of an earlier one, with tokenizer and processor loaded;
  actors start anew with every pipeline. On two cores, 376 images of 512 pixels: first batch after 0.4 s from
  tasks and 5 s from actors, 105 images/s and 43 over the whole pass, 117 and 112 once both run
  (benchmarks/feed.py --actors).
- What a batch is made of is the caller's: ``make`` turns records into arrays, on whatever model's terms.
- A record that cannot be made into a batch ends the run at once, with its id and what to do. Preparation
  has looked at every image, so a bad one here means that the data changed since.
"""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clinkd import storage
from clinkd.data.plan import Batch, LengthIndex, group_length
from clinkd.data.shards import LIGHT, DataError, open_parquet, shard_paths

Arrays = dict[str, np.ndarray]
Place = tuple[int, int, int]
"""(shard, row group, row)."""
PIXELS = ["id", "png", "width", "height", "turns", "more_images", "more_png"]
JOBS_PER_PIPELINE = 256
"""Jobs that one execution of Ray Data runs through: enough that its start is no part of the time."""


class FeedError(DataError):
    """A record that cannot be fed; the message says which, why and what to do, in one line."""


@dataclass(frozen=True)
class Asked:
    """One group of a batch, its record read."""

    row: dict[str, Any]  # the shard's columns, image bytes included; the same object for all groups of a job
    documents: tuple[int, ...]
    tokens: int  # of all its documents, as the plan counted them


Make = Callable[[list[list[Asked]]], Arrays]
"""Arrays of a batch from its sequences; no sequences: a filler."""


@dataclass(frozen=True)
class Shards:
    """The files of prepared data, and the S3 endpoint that leads to them; travels to the tasks by value."""

    paths: tuple[str, ...]
    endpoint: str | None = None

    @classmethod
    def of(cls, data: str | Path) -> Shards:
        """Raises DataError like ``shard_paths``."""
        return cls(tuple(str(storage.absolute(path)) for path in shard_paths(data)), storage.endpoint())

    def open(self, number: int) -> Any:
        """A context with the ParquetFile of a shard. Raises DataError like ``open_parquet``."""
        storage.configure(self.endpoint)
        return open_parquet(storage.locate(self.paths[number]))


@dataclass(frozen=True)
class Resources:
    """Of one rank's pipeline.

    Args:
        tasks: tasks that run at one time. cpus: what each of them declares to Ray.
        actors: actors in the place of tasks.
        store_share: of Ray's object store, the most that finished batches may take.
    """

    tasks: int = 2
    cpus: float = 0.5
    actors: bool = False
    store_share: float = 0.25


def jobs(index: LengthIndex, batches: Iterable[Batch]) -> Iterator[list[Any]]:
    """Batches as jobs: lists of batches, of sequences, of (place, documents, tokens)."""
    job: list[Any] = []
    window = None
    for batch in batches:
        if job and batch.window != window:
            yield job
            job = []
        window = batch.window
        job.append(
            [
                [
                    (tuple(index.place[group[0]].tolist()), group[1], group_length(index, group))
                    for group in sequence
                ]
                for sequence in batch.sequences
            ]
        )
    if job:
        yield job


def run_job(job: list[Any], shards: Shards, make: Make) -> Iterator[Arrays]:
    """The batches of a job, in order.

    Raises:
        FeedError: a record that cannot be read, decoded or made into a batch.
    """
    rows = _Rows(shards, Counter(place for batch in job for sequence in batch for place, _, _ in sequence))
    for batch in job:
        sequences = [
            [Asked(rows.take(place), documents, tokens) for place, documents, tokens in sequence]
            for sequence in batch
        ]
        yield make(sequences)


class _Rows:
    """Rows of the shards by place. Each row group is read once; a row is kept, with what ``make`` leaves in
    it, until its last group of the job is taken: no longer, as rows hold images."""

    def __init__(self, shards: Shards, uses: Counter[Place]) -> None:
        self.shards, self.uses = shards, uses
        self._groups: dict[tuple[int, int], Any] = {}
        self._rows: dict[Place, dict[str, Any]] = {}

    def take(self, place: Place) -> dict[str, Any]:
        row = self._rows.get(place)
        if row is None:
            row = self._rows[place] = self._group(place).slice(place[2], 1).to_pylist()[0]
        self.uses[place] -= 1
        if not self.uses[place]:
            del self._rows[place]
        return row

    def _group(self, place: Place) -> Any:
        shard, group, _ = place
        if (shard, group) not in self._groups:
            try:
                with self.shards.open(shard) as file:
                    known = [name for name in PIXELS if name in file.schema_arrow.names]
                    self._groups[shard, group] = file.read_row_group(group, columns=known)
            except Exception as error:
                raise FeedError(
                    f"{self.shards.paths[shard]}: row group {group} cannot be read ({error}); "
                    "run `clinkd prepare` again"
                ) from None
        return self._groups[shard, group]


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


def stream(work: Iterable[list[Any]], shards: Shards, make: Make, resources: Resources) -> Iterator[Arrays]:
    """Runs jobs through Ray Data and yields their batches in order.

    Args:
        work: from ``jobs``; taken ``JOBS_PER_PIPELINE`` at a time.
        make: travels to the tasks by value.

    Raises:
        FeedError: see ``run_job``.
    """
    chunk: list[list[Any]] = []
    for job in work:
        chunk.append(job)
        if len(chunk) == JOBS_PER_PIPELINE:
            yield from _pipeline(chunk, shards, make, resources)
            chunk = []
    if chunk:
        yield from _pipeline(chunk, shards, make, resources)


def _pipeline(chunk: list[list[Any]], shards: Shards, make: Make, resources: Resources) -> Iterator[Arrays]:
    import ray.data

    _quiet()
    rows = ray.data.from_items([{"job": pickle.dumps(job)} for job in chunk], override_num_blocks=len(chunk))
    made = rows.map_batches(
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=resources.cpus,
        **_workers(shards, make, resources, len(chunk)),
    )
    options = made.context.execution_options
    options.preserve_order = True
    made.context.target_max_block_size = 1  # every batch leaves its task when it is made
    store = ray.cluster_resources().get("object_store_memory", 0.0) * resources.store_share
    options.resource_limits = options.resource_limits.copy(object_store_memory=store)
    try:
        for block in made.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2):
            yield from from_rows(block)
    except Exception as error:
        raise _cause(error) from None


def _workers(shards: Shards, make: Make, resources: Resources, count: int) -> dict[str, Any]:
    import ray.data

    tasks = min(resources.tasks, count)
    if resources.actors:
        pool: Any = ray.data.ActorPoolStrategy(size=tasks)
        return {"fn": _Jobs, "fn_constructor_args": (shards, make), "compute": pool}
    return {"fn": _run_rows, "fn_args": (shards, make), "compute": ray.data.TaskPoolStrategy(tasks)}


def _quiet() -> None:
    """Bars and logs of Ray Data stand down: a pipeline here is no event."""
    import logging

    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def _run_rows(table: Any, shards: Shards, make: Make) -> Iterator[Any]:
    for packed in table.column("job").to_pylist():
        yield from map(to_row, run_job(pickle.loads(packed), shards, make))


class _Jobs:
    def __init__(self, shards: Shards, make: Make) -> None:
        self.shards, self.make = shards, make

    def __call__(self, table: Any) -> Iterator[Any]:
        yield from _run_rows(table, self.shards, self.make)


def _cause(error: BaseException) -> BaseException:
    """The FeedError that Ray wrapped, as it was raised; or else the error itself."""
    waiting: list[BaseException | None] = [error]
    while waiting:
        seen = waiting.pop()
        if seen is None:
            continue
        inner = getattr(seen, "cause", None)  # of Ray's own wrappers, which are also of the cause's class
        if isinstance(seen, FeedError) and inner is None:
            return FeedError(str(seen).splitlines()[0])  # Ray adds lines of its own
        waiting += [seen.__context__, seen.__cause__, inner if isinstance(inner, BaseException) else None]
    return error


Measure = Callable[[list[dict[str, Any]]], list[list[int]]]
"""Tokens of each document of each row; rows are a shard's light columns."""


def build_index(
    shards: Shards, split: str, measure: Measure, *, ids: Iterable[str] | None = None, cpus: float = 0.5
) -> LengthIndex:
    """Where the records stand and how long they are; reads the shards' light columns, through Ray Data.

    Args:
        ids: these records alone; None: all of the split.
        measure: travels to the tasks by value.

    Raises:
        FeedError: ``measure`` refuses a record.
    """
    import ray.data

    _quiet()
    chosen = None if ids is None else frozenset(ids)
    work: Any = {"fn": _measure_shards, "fn_args": (shards, split, measure, chosen)}
    numbers = ray.data.range(len(shards.paths), override_num_blocks=len(shards.paths))
    found: list[dict[str, Any]] = []
    try:
        block: Any
        for block in numbers.map_batches(**work, batch_size=1, num_cpus=cpus).iter_batches(
            batch_size=None, batch_format="pyarrow"
        ):
            found += block.to_pylist()
    except Exception as error:
        raise _cause(error) from None
    found.sort(key=lambda row: row["place"])
    return LengthIndex(
        [row["id"] for row in found],
        np.array([row["place"] for row in found], np.int64).reshape(-1, 3),
        [row["lengths"] for row in found],
    )


def _measure_shards(
    batch: dict[str, Any], shards: Shards, split: str, measure: Measure, ids: frozenset[str] | None
) -> Iterator[Any]:
    import pyarrow as pa

    columns: dict[str, list[Any]] = {"id": [], "place": [], "lengths": []}
    for shard in batch["id"].tolist():
        with shards.open(shard) as file:
            known = [name for name in LIGHT if name in file.schema_arrow.names]
            for group in range(file.num_row_groups):
                rows = file.read_row_group(group, columns=known).to_pylist()
                wanted = [
                    (at, row)
                    for at, row in enumerate(rows)
                    if row["split"] == split and row["turns"] and (ids is None or row["id"] in ids)
                ]
                columns["id"] += [row["id"] for _, row in wanted]
                columns["place"] += [[shard, group, at] for at, _ in wanted]
                columns["lengths"] += measure([row for _, row in wanted])
    kinds = {"id": pa.string(), "place": pa.list_(pa.int64()), "lengths": pa.list_(pa.int64())}
    yield pa.table({name: pa.array(values, kinds[name]) for name, values in columns.items()})
