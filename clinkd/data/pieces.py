"""Models put to work on records by Ray Data's actors: what travels there is which records, not the records.

Decisions:
- A piece is some hundred records that stand beside each other; an actor reads them itself, a few at a time.
  An actor that is lost has one piece to do again.
- What comes back are Arrow tables about the records, never their images.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

from clinkd.data.reading import KEPT_BYTES, Questions, Records, Wanted
from clinkd.data.shards import Shards
from clinkd.data.tasks import cause_of, quiet

if TYPE_CHECKING:
    import pyarrow as pa

PIECE = 256
"""Records of a piece at most; fewer where there are few, so that each actor has some."""
TOGETHER = 32
"""Records that are read, and looked at, at one time."""


class Work(Protocol):
    """What an actor does with records."""

    def tables(self, batches: Iterable[list[dict[str, Any]]]) -> Iterator[pa.Table]:
        """Tables about all records of a piece, which comes as batches."""


def work_on(
    questions: Questions, make: Callable[[], Work], *, actors: int, cpus: float = 0.5, gpus: float = 0.0
) -> Iterator[pa.Table]:
    """The tables of all pieces.

    Args:
        make: makes an actor's work; travels by value. cpus, gpus: what Ray sets aside for each actor.

    Raises:
        FeedError: a record that cannot be read.
    """
    import ray.data

    quiet()
    size = max(1, min(PIECE, -(-len(questions) // (4 * actors))))
    pieces = [pickle.dumps(questions.part(at, at + size)) for at in range(0, len(questions), size)]
    if not pieces:
        return
    rows = ray.data.from_items([{"work": piece} for piece in pieces], override_num_blocks=len(pieces))
    done = rows.map_batches(
        _Actor, fn_constructor_args=(make, questions.shards), batch_size=1, batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(actors, len(pieces))), num_cpus=cpus, num_gpus=gpus,
    )  # fmt: skip
    try:
        yield from done.iter_batches(batch_format="pyarrow", batch_size=None)
    except Exception as error:
        raise cause_of(error) from None


class _Actor:
    def __init__(self, make: Callable[[], Work], shards: Shards) -> None:
        self.work, self.records = make(), Records(shards, KEPT_BYTES)

    def __call__(self, pieces: pa.Table) -> Iterator[pa.Table]:
        for piece in pieces.column("work").to_pylist():
            yield from self.work.tables(self._batches(pickle.loads(piece)))

    def _batches(self, wanted: list[Wanted]) -> Iterator[list[dict[str, Any]]]:
        for at in range(0, len(wanted), TOGETHER):
            yield [self.records.record(one) for one in wanted[at : at + TOGETHER]]
