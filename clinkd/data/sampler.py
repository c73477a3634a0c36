"""Which samples stand in which batch: a pure function of seed, epoch, number of lanes and an index.

Decisions:
- A *lane* is a row of batches that one training worker makes; a stage keeps the number of lanes that it
  began with. Where it goes on with other workers, these share the lanes out, and every batch stays what it
  was.
- Nothing is remembered: who knows (seed, epoch, lanes) knows every batch, so a resumed run begins at any
  batch without reading what came before it.
- Row groups are shuffled, as many of them as ``window_bytes`` hold are read together, and their samples
  shuffled (and packed). Reading stays in long pieces, a task holds a bounded number of bytes, and an epoch
  still mixes samples of far-away shards.
- A window goes whole to one lane, the one with least to do. Sequences a lane then has too many of move to
  lanes with too few, so lanes differ by one sequence at most; where batches do not come out even, a lane's
  last is short, or a *filler* without samples. Every sample is seen once an epoch.
- An epoch is planned in numpy columns; a batch becomes Python when it is asked for. Ten million turns take
  seconds (benchmarks/growth.py).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from clinkd.data.index import RecordIndex
from clinkd.data.packing import pack
from clinkd.data.shards import DataError

Group = tuple[int, tuple[int, ...]]
"""(record of the index, its documents): what shares the record's images."""
Sequence = tuple[Group, ...]


@dataclass(frozen=True)
class SamplerOptions:
    """How batches are made up.

    Args:
        batch_size: sequences of a batch: packed ones, or else groups.
        per_group: most documents of a record that stay together and share its images.
        tokens: most tokens of a packed sequence; None: no packing, a sequence is a group.
        window_bytes: images that are read and mixed together; a row group at least.
    """

    seed: int
    batch_size: int
    per_group: int = 1
    tokens: int | None = None
    window_bytes: int = 64 << 20


@dataclass(frozen=True)
class Batch:
    """Sequences of one batch; none: a filler."""

    window: tuple[int, int]  # epoch and window of its first sequence: what is read together
    sequences: tuple[Sequence, ...]

    @property
    def groups(self) -> list[Group]:
        return [group for sequence in self.sequences for group in sequence]


@dataclass(frozen=True)
class Position:
    """Where training stands: the epoch, and batches of each lane done of it."""

    epoch: int = 0
    round: int = 0


class BatchSampler:
    """The batches of all lanes through all epochs."""

    def __init__(self, index: RecordIndex, options: SamplerOptions, lanes: int) -> None:
        if not len(index):
            raise DataError("the training split holds no record; see the quarantine.jsonl of stage prepare")
        self.index, self.options, self.lanes = index, options, lanes
        self.epoch = lru_cache(maxsize=2)(self._epoch)

    def _epoch(self, number: int) -> Epoch:
        return Epoch(self.index, self.options, number, self.lanes)

    def rounds(self, epoch: int) -> int:
        """Batches of each lane in an epoch."""
        if self.options.tokens is None:  # every epoch has as many groups
            return math.ceil(self._groups / (self.options.batch_size * self.lanes))
        return self.epoch(epoch).rounds

    @property
    def _groups(self) -> int:
        return int((-(-self.index.documents // self.options.per_group)).sum())

    def steps(self, epochs: float, accumulation: int) -> int:
        """Optimiser steps that ``epochs`` take."""
        whole = int(epochs)
        batches: float = sum(self.rounds(epoch) for epoch in range(whole))
        if epochs > whole:
            batches += (epochs - whole) * self.rounds(whole)
        return max(1, math.ceil(batches / accumulation))

    def walk(self, position: Position) -> Iterator[Position]:
        """Positions from one on, endlessly."""
        epoch, number = position.epoch, position.round
        while True:
            if number >= self.rounds(epoch):
                epoch, number = epoch + 1, 0
                continue
            yield Position(epoch, number)
            number += 1

    def batch(self, position: Position, lane: int) -> Batch:
        return self.epoch(position.epoch).batch(lane, position.round)


class Epoch:
    """One epoch, planned.

    Raises:
        DataError: a document of more than ``options.tokens``.
    """

    def __init__(self, index: RecordIndex, options: SamplerOptions, number: int, lanes: int) -> None:
        self.index, self.options, self.number = index, options, number
        rng = np.random.default_rng([options.seed, number])
        windows = _windows(index, options.window_bytes, rng)
        self._draw_groups(windows, rng)
        self._draw_sequences()
        self._deal(lanes)
        size = options.batch_size
        self.rounds = max(-(-len(found) // size) for found in self._lanes)

    def batch(self, lane: int, place: int) -> Batch:
        size, own = self.options.batch_size, self._lanes[lane]
        chosen = own[place * size : (place + 1) * size].tolist()
        at = chosen[0] if chosen else (int(own[-1]) if len(own) else 0)
        window = int(self._window[self._order[self._sequences[at]]])
        return Batch((self.number, window), tuple(self._sequence(number) for number in chosen))

    def _sequence(self, number: int) -> Sequence:
        return tuple(
            self._group(group)
            for group in self._order[self._sequences[number] : self._sequences[number + 1]].tolist()
        )

    def _group(self, group: int) -> Group:
        documents = self._documents[self._groups[group] : self._groups[group + 1]]
        return int(self._record[group]), tuple(documents.tolist())

    def _draw_groups(self, windows: np.ndarray, rng: np.random.Generator) -> None:
        """Groups: ``_documents`` of all end to end, where each begins (``_groups``), its record and window;
        and their ``_order``, shuffled within windows."""
        counts, size = self.index.documents.astype(np.int64), self.options.per_group
        starts = np.concatenate([[0], np.cumsum(counts)])
        record = np.repeat(np.arange(len(counts)), counts)
        order = np.argsort(record + rng.random(len(record)), kind="stable")
        place = np.arange(len(record)) - starts[record]  # within the record
        begins = np.flatnonzero(place % size == 0)
        self._documents = order - starts[record]
        if self.options.tokens is not None:
            begins = self._fitting(begins, order, record, self.options.tokens)
        self._groups = np.append(begins, len(record))
        self._record = record[begins]
        self._window = windows[self._record]
        self._order = np.argsort(self._window + rng.random(len(begins)), kind="stable")

    def _fitting(self, begins: np.ndarray, order: np.ndarray, record: np.ndarray, tokens: int) -> np.ndarray:
        """Where groups begin, so that each fits a sequence: one that would not falls apart into documents."""
        lengths = self.index.lengths
        assert lengths is not None, "packing takes a measured index"
        ordered = lengths[order]
        self._tokens = np.add.reduceat(ordered, begins)
        wide = np.flatnonzero(ordered > tokens)
        if len(wide):
            raise DataError(
                f"record {self.index.id(int(record[wide[0]]))}: a sample of {ordered[wide[0]]} tokens, but "
                f"feed.pack_tokens is {tokens}; raise it, or lower model.max_pixels"
            )
        whole = np.zeros(len(order), bool)
        whole[begins] = True
        ends = np.append(begins[1:], len(order))
        for at in np.flatnonzero(self._tokens > tokens).tolist():
            whole[begins[at] : ends[at]] = True
        begins = np.flatnonzero(whole)
        self._tokens = np.add.reduceat(ordered, begins)
        return begins

    def _draw_sequences(self) -> None:
        """``_sequences``: where each begins in ``_order``, which packing puts anew."""
        if self.options.tokens is None:
            self._sequences = np.arange(len(self._order) + 1)
            return
        windows = self._window[self._order]
        bounds = np.concatenate([[0], np.flatnonzero(np.diff(windows)) + 1, [len(windows)]]).tolist()
        lengths = self._tokens[self._order]
        order, begins = [], [0]
        for start, end in itertools.pairwise(bounds):
            for chosen in pack(lengths[start:end].tolist(), self.options.tokens):
                order += [start + at for at in chosen]
                begins.append(len(order))
        self._order = self._order[np.array(order, np.int64)]
        self._sequences = np.array(begins)

    def _deal(self, lanes: int) -> None:
        """``_lanes``: the sequences of each; windows whole, then even."""
        windows = self._window[self._order[self._sequences[:-1]]]
        count = len(windows)
        bounds = np.concatenate([[0], np.flatnonzero(np.diff(windows)) + 1, [count]]).tolist()
        dealt: list[list[np.ndarray]] = [[] for _ in range(lanes)]
        sizes = [0] * lanes
        for start, end in itertools.pairwise(bounds):
            lane = sizes.index(min(sizes))
            dealt[lane].append(np.arange(start, end))
            sizes[lane] += end - start
        # The larger quotas go where more lies already: fewer sequences move.
        quota = [count // lanes] * lanes
        for lane in sorted(range(lanes), key=lambda lane: -sizes[lane])[: count % lanes]:
            quota[lane] += 1
        found = [np.concatenate([*parts, np.zeros(0, np.int64)]).astype(np.int64) for parts in dealt]
        spare = np.concatenate([own[most:] for own, most in zip(found, quota, strict=True)])
        self._lanes, taken = [], 0
        for own, most in zip(found, quota, strict=True):
            missing = max(0, most - len(own))
            self._lanes.append(np.concatenate([own[:most], spare[taken : taken + missing]]))
            taken += missing


def _windows(index: RecordIndex, window_bytes: int, rng: np.random.Generator) -> np.ndarray:
    """[records] the window of each: whole row groups, drawn until their images fill it."""
    place = index.place
    begins = np.concatenate([[True], np.any(np.diff(place[:, :2], axis=0) != 0, axis=1)])
    number = np.cumsum(begins) - 1
    sizes = index.group_bytes[begins].astype(np.int64)
    order = rng.permutation(len(sizes))
    before = np.concatenate([[0], np.cumsum(sizes[order])[:-1]])
    window = np.empty(len(sizes), np.int64)
    window[order] = np.unique(before // max(1, window_bytes), return_inverse=True)[1]
    found: np.ndarray = window[number]
    return found
