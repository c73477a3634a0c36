"""A rank's batches while it trains: which they are, made by whom, and as the loss module's arguments.

Decisions:
- What stands in a batch follows from the sampler (data/sampler.py) and from what the stage does with it in a
  step (``Fed.choose``); both are pure functions, so that a resumed run needs no more than where it
  stands: the epoch, and the batches of each lane done of it.
- A rank works off the lanes that are its own, whatever the number of ranks was when the stage began.
- Decoding, resizing and tokenizing happen where ``Resources`` says; a worker's own part is one multiply and
  add per pixel, on its device, and for a frozen tower not even that for an image that it has seen.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

import torch

from clinkd.data.feed import Arrays, Maker, Order, Resources, order_of, stream
from clinkd.data.index import RecordIndex
from clinkd.data.records import sample_id
from clinkd.data.sampler import Batch, BatchSampler, Position, SamplerOptions
from clinkd.data.shards import Shards

if TYPE_CHECKING:
    from clinkd.data.reading import Records


@dataclass(frozen=True)
class FeedSpec:
    """How a stage is fed from the shards; travels to the workers by value."""

    maker: Maker
    options: SamplerOptions
    index: str  # file of the RecordIndex, seen by every worker
    shards: Shards
    resources: Resources = field(default_factory=Resources)

    def records(self) -> RecordIndex:
        return _index(self.index)

    def sampler(self, lanes: int) -> BatchSampler:
        return BatchSampler(self.records(), self.options, lanes)


@lru_cache(maxsize=2)
def _index(path: str) -> RecordIndex:
    return RecordIndex.read(path)


@dataclass(frozen=True)
class Share:
    """What of a stage's batches is one rank's, and from where on.

    Args:
        lanes: rows of batches that the stage was begun with. accumulation: batches of a lane in a step.
        places: the rank's micro-batches of a step, numbered over lanes first; None: one that counts nothing.
        step: steps done; steps: of the stage; end: no batch is made for a step after it.
        state: of a feed that went before.
    """

    lanes: int
    accumulation: int
    places: tuple[int | None, ...]
    step: int
    steps: int
    end: int
    state: dict[str, Any] | None = None


@dataclass(frozen=True)
class _Planned:
    """A batch under way; ``after``: where the stage stands when its step is done, with the step's last."""

    batch: Batch
    after: Position | None


@dataclass(frozen=True)
class InTask:
    """A maker in a task of its own: beside others, each on one thread."""

    maker: Maker

    def make(self, order: Order, records: Records) -> Arrays:
        torch.set_num_threads(1)
        return self.maker.make(order, records)


class Fed(Protocol):
    """What a stage does with its batches."""

    def choose(self, batch: Batch, lane: int, step: int, total: int) -> Batch:
        """What of a batch of the sampler is trained on in a step, or in its place."""

    def arguments(
        self, arrays: Arrays, batch: Batch, step: int, device: torch.device
    ) -> tuple[dict[str, Any], int]:
        """The loss module's arguments of a batch's arrays, and the tokens that its sums are over."""


class Feed:
    """One rank's micro-batches, to the end of its stage."""

    def __init__(self, task: Fed, spec: FeedSpec, share: Share, device: torch.device) -> None:
        self.task, self.spec, self.share, self.device = task, spec, share, device
        self.position = Position(**share.state) if share.state else Position()
        self.step = share.step
        self._sampler = spec.sampler(share.lanes)
        self._planned: deque[_Planned] = deque()  # asked for, and not yet given
        maker = InTask(spec.maker) if spec.resources.tasks else spec.maker
        self._batches = stream(self._orders(), spec.shards, maker, spec.resources)
        self._last: Batch | None = None

    def state(self) -> dict[str, Any]:
        """Where it stands; JSON values. To be asked for between steps."""
        return asdict(self.position)

    def names(self) -> list[str]:
        """The samples of the batch last given; of conversations, RECORD#0 stands for all turns."""
        assert self._last is not None
        index = self.spec.records()
        return [sample_id(index.id(record), turn) for record, turns in self._last.groups for turn in turns]

    def __iter__(self) -> Iterator[tuple[dict[str, Any], int, int, bool]]:
        return self

    def __next__(self) -> tuple[dict[str, Any], int, int, bool]:
        """(arguments, tokens that the loss is over, samples, whether it counts)."""
        arrays = dict(next(self._batches))
        planned = self._planned.popleft()
        self._last = planned.batch
        samples = int(arrays.pop("samples")[0])
        arguments, tokens = self.task.arguments(arrays, planned.batch, self.step, self.device)
        if planned.after is not None:
            self.position, self.step = planned.after, self.step + 1
        return arguments, tokens, samples, samples > 0

    def _orders(self) -> Iterator[Order]:
        share, index = self.share, self.spec.records()
        rounds = self._sampler.walk(self.position)
        for step in range(share.step, share.end):
            found = list(islice(rounds, share.accumulation))
            after = Position(found[-1].epoch, found[-1].round + 1)
            for number, place in enumerate(share.places):
                batch = self._batch(found, place, step)
                last = number == len(share.places) - 1
                self._planned.append(_Planned(batch, after if last else None))
                yield order_of(index, batch, step)

    def _batch(self, rounds: list[Position], place: int | None, step: int) -> Batch:
        if place is None:
            return Batch((rounds[0].epoch, 0), ())
        position, lane = rounds[place // self.share.lanes], place % self.share.lanes
        batch = self._sampler.batch(position, lane)
        return self.task.choose(batch, lane, step, self.share.steps)
