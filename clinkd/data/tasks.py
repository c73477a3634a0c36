"""Pieces of work as Ray Data tasks, their tables in order; and the error of one of them as it was raised."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from clinkd.data.shards import DataError


class FeedError(DataError):
    """A record that cannot be fed; the message says which, why and what to do, in one line."""


def run_tasks(
    work: Iterable[Any],
    call: Callable[[Any], Iterator[Any]],
    cpus: float,
    *,
    tasks: int | None = None,
    store: float | None = None,
) -> Iterator[Any]:
    """Runs pieces of work in Ray Data tasks; yields the Arrow tables that ``call`` makes of each, in order.

    Args:
        work: pieces, each pickled. call: travels to the tasks by value.
        cpus: that each task declares. tasks: that run at one time; None: as Ray sees fit.
        store: bytes of Ray's object store that finished tables may take.

    Raises:
        FeedError: as ``call`` raised it.
    """
    import ray.data

    quiet()
    pieces = [{"work": pickle.dumps(piece)} for piece in work]
    if not pieces:
        return
    rows = ray.data.from_items(pieces, override_num_blocks=len(pieces))
    pool = None if tasks is None else ray.data.TaskPoolStrategy(min(tasks, len(pieces)))
    run: Any = _run_rows
    made = rows.map_batches(
        run, fn_args=(call,), batch_size=1, batch_format="pyarrow", num_cpus=cpus, compute=pool
    )
    options = made.context.execution_options
    options.preserve_order = True
    made.context.target_max_block_size = 1  # every table leaves its task when it is made
    if store is not None:
        options.resource_limits = options.resource_limits.copy(object_store_memory=store)
    try:
        yield from made.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=2)
    except Exception as error:
        raise cause_of(error) from None


def quiet() -> None:
    """Bars and logs of Ray Data stand down: a pipeline here is no event."""
    import logging

    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def _run_rows(table: Any, call: Callable[[Any], Iterator[Any]]) -> Iterator[Any]:
    for packed in table.column("work").to_pylist():
        yield from call(pickle.loads(packed))


def cause_of(error: BaseException) -> BaseException:
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
