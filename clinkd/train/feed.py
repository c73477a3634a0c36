"""Training batches as a stream: each rank draws its own from the shards, through Ray Data, while it trains.

Decisions:
- Decoding, resizing and tokenizing happen in Ray Data tasks (train/batches.py); a worker's own part is
  one multiply and add per pixel, on its device. What stands in a batch is decided by the plan
  (data/plan.py).
- Where a rank stands is (epoch, ranks and batches of it so far): a resumed run plans the epoch again and
  starts its pipeline at the next batch. With another number of ranks it plans what is left.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import islice
from typing import Any

import torch

from clinkd.data.feed import Arrays, Resources, Shards, jobs, stream
from clinkd.data.plan import Batch, LengthIndex, Past, PlanOptions, plan_epoch
from clinkd.data.records import sample_id
from clinkd.model.pixels import Numbers
from clinkd.train.batches import BatchSpec
from clinkd.train.tasks import SupervisedTask, VqaSpec


@dataclass(frozen=True)
class StreamSpec:
    """How a stage is fed from the shards; travels to the workers by value."""

    batch: BatchSpec
    options: PlanOptions
    index: str  # file of the LengthIndex, seen by every worker
    shards: Shards
    resources: Resources = field(default_factory=Resources)

    def rounds(self, epoch: int, world: int, past: Past = ()) -> int:
        """Batches of each rank in an epoch."""
        return len(plan_epoch(self.lengths, self.options, epoch, world, past)[0])

    def steps(self, epochs: float, accumulation: int, world: int) -> int:
        """Optimiser steps that ``epochs`` take; each epoch has its own number of batches."""
        whole = int(epochs)
        batches: float = sum(self.rounds(epoch, world) for epoch in range(whole))
        if epochs > whole:
            batches += (epochs - whole) * self.rounds(whole, world)
        return max(1, math.ceil(batches / accumulation))

    @property
    def lengths(self) -> LengthIndex:
        return _index(self.index)


@lru_cache(maxsize=2)
def _index(path: str) -> LengthIndex:
    return LengthIndex.read(path)


@dataclass
class Position:
    """Where a run stands in the stream: the epoch, and (ranks, batches of each rank) done of it."""

    epoch: int = 0
    past: list[list[int]] = field(default_factory=list)

    def state(self) -> dict[str, Any]:
        return asdict(self)


class Stream:
    """One rank's batches, endlessly through the epochs, from a position on.

    Args:
        limit: batches that will be asked for at most; the pipeline makes no more.
    """

    def __init__(
        self, spec: StreamSpec, rank: int, world: int, limit: int, state: dict[str, Any] | None = None
    ):
        self.spec, self.rank, self.world, self.limit = spec, rank, world, limit
        self.position = Position(**state) if state else Position()
        self._rounds: dict[int, int] = {}
        self._dealt: deque[Batch] = deque()  # asked for, and not yet given
        past = self.position.past
        if not past or past[-1][0] != world:
            past.append([world, 0])
            before: Past = tuple((ranks, done) for ranks, done in past[:-1])
            if not spec.rounds(self.position.epoch, world, before):
                self.position = Position(self.position.epoch + 1, [[world, 0]])
        self._batches = self._run()

    def __iter__(self) -> Iterator[Arrays]:
        return self

    def __next__(self) -> Arrays:
        arrays = next(self._batches)
        self.last = self._dealt.popleft()
        self._advance()
        return arrays

    def planned(self) -> Iterator[Batch]:
        """What is to come, without reading it."""
        epoch, past = self.position.epoch, self.position.past
        before: Past = tuple((ranks, batches) for ranks, batches in past[:-1])
        done = past[-1][1]
        while True:
            ranks = plan_epoch(self.spec.lengths, self.spec.options, epoch, self.world, before)
            self._rounds[epoch] = len(ranks[self.rank])
            yield from ranks[self.rank][done:]
            epoch, before, done = epoch + 1, (), 0

    def _run(self) -> Iterator[Arrays]:
        def noted() -> Iterator[Batch]:
            for batch in islice(self.planned(), self.limit):
                self._dealt.append(batch)
                yield batch

        work = jobs(self.spec.lengths, noted())
        yield from stream(work, self.spec.shards, self.spec.batch.make, self.spec.resources)

    def _advance(self) -> None:
        self.position.past[-1][1] += 1
        if self.position.past[-1][1] >= self._rounds[self.position.epoch]:
            self.position = Position(self.position.epoch + 1, [[self.world, 0]])


class StreamTask(SupervisedTask):
    """Turns with their true answers, drawn from the shards while training."""

    keeps = False  # a stream brings every image's pixels anew

    def __init__(self, spec: VqaSpec, source: StreamSpec, zero_stage: int = 0) -> None:
        self.source = source
        self.prepare(spec, zero_stage)

    def feed(
        self, rank: int, world: int, limit: int, state: dict[str, Any] | None, device: torch.device
    ) -> Feed:
        """The micro-batches of ``rank`` from ``state`` on, at most ``limit`` of them."""
        return Feed(Stream(self.source, rank, world, limit, state), self, device)


class Feed:
    """A stream's batches as the loss module's arguments."""

    def __init__(self, source: Stream, task: StreamTask, device: torch.device) -> None:
        self.source, self.task = source, task
        self.numbers = Numbers(task.processor, device)

    def state(self) -> dict[str, Any]:
        return self.source.position.state()

    def names(self) -> list[str]:
        """The samples of the batch last given; of conversations, RECORD#0 stands for all turns."""
        ids = self.source.spec.lengths.ids
        sequences = self.source.last.sequences
        return [
            sample_id(ids[record], document)
            for sequence in sequences for record, documents in sequence for document in documents
        ]  # fmt: skip

    def __iter__(self) -> Iterator[tuple[dict[str, Any], int, int]]:
        return self

    def __next__(self) -> tuple[dict[str, Any], int, int]:
        """(arguments, tokens that the loss is over, turns)."""
        arrays = dict(next(self.source))
        pixels = self.numbers(arrays.pop("pixels"), arrays.pop("channels"), arrays["image_grid_thw"])
        samples = int(arrays.pop("samples")[0])
        # Copies: the arrays lie in the object store, where torch may not write.
        inputs: dict[str, Any] = {name: torch.from_numpy(value.copy()) for name, value in arrays.items()}
        inputs |= {"pixel_values": pixels, "attention_mask": None}
        if self.task.spec.coordinate_weight != 1:
            inputs["coordinates"] = self.task.coordinates(inputs["labels"])
        return inputs, int((inputs["labels"][:, 1:] != -100).sum()), samples
