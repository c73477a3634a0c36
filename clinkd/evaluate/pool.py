"""Actors that answer questions and stay: a model is loaded once, however often it is asked.

Decisions:
- Work comes in parts that the caller composes. What a part's answers are follows from its records, its seed
  and the model alone: neither the number of actors nor what was answered before has a say, so that a run
  which was killed goes on with the parts that are missing and comes out the same.
- An actor keeps the last two models: a student and its corrector, by turns, are loaded once each.
- What travels is where the records stand: an actor reads them itself.
- Two parts an actor are under way: one that it works on, one that waits for it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from clinkd.data.reading import KEPT_BYTES, Records, Wanted
from clinkd.data.shards import Shards
from clinkd.evaluate.predict import Answerer, PredictSpec

Rows = list[dict[str, Any]]
KEPT = 2
"""Models an actor holds."""


class Desk:
    """One actor."""

    def __init__(self) -> None:
        self._kept: OrderedDict[PredictSpec, Answerer] = OrderedDict()
        self._records: Records | None = None

    def answer(self, spec: PredictSpec, shards: Shards, wanted: Sequence[Wanted], seed: int) -> Rows:
        """One row a turn, in the order of the turns' names.

        Raises:
            FeedError: a record that cannot be read.
        """
        if spec not in self._kept:
            while len(self._kept) >= KEPT:
                self._kept.popitem(last=False)
            self._kept[spec] = Answerer(spec)
        self._kept.move_to_end(spec)
        if self._records is None or self._records.shards != shards:
            self._records = Records(shards, KEPT_BYTES)
        records = [self._records.record(one) for one in wanted]
        rows = list(self._kept[spec].answer(records, seed))
        return sorted(rows, key=lambda row: str(row["sample"]))


class AnswerPool:
    """``actors`` desks; they end with the pool.

    Args:
        cpus, gpus: what Ray sets aside for each.
    """

    def __init__(self, actors: int, *, cpus: float = 0.5, gpus: float = 0.0) -> None:
        import ray

        # A desk whose process or node is lost starts anew, and with it the part it was at.
        actor = ray.remote(num_cpus=cpus, num_gpus=gpus, max_restarts=3, max_task_retries=3)(Desk)
        self._desks: list[Any] = [actor.remote() for _ in range(actors)]

    def answers(
        self, spec: PredictSpec, shards: Shards, parts: Iterable[tuple[int, Sequence[Wanted], int]]
    ) -> Iterator[tuple[int, Rows]]:
        """Answers of (number, records, seed) each, as (number, rows), in no particular order."""

        busy: dict[Any, tuple[int, int]] = {}  # under way: (number, desk)
        load = [0] * len(self._desks)
        for number, wanted, seed in parts:
            if len(busy) >= 2 * len(self._desks):
                yield self._next(busy, load)
            desk = load.index(min(load))
            busy[self._desks[desk].answer.remote(spec, shards, wanted, seed)] = (number, desk)
            load[desk] += 1
        while busy:
            yield self._next(busy, load)

    @staticmethod
    def _next(busy: dict[Any, tuple[int, int]], load: list[int]) -> tuple[int, Rows]:
        import ray

        (done,), _ = ray.wait(list(busy), num_returns=1)
        number, desk = busy.pop(done)
        load[desk] -= 1
        return number, ray.get(done)

    def close(self) -> None:
        import ray

        for desk in self._desks:
            ray.kill(desk)
        self._desks = []
