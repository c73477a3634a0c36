"""Which samples go into which batch of which rank: a pure function of seed, epoch, ranks and an index of
lengths.

Decisions:
- Nothing is remembered: who knows (seed, epoch, ranks) knows every batch, so a resumed run starts at any
  batch without reading what came before it.
- Row groups are shuffled, ``window`` of them are read together, and their samples shuffled and packed.
  Reading stays in long pieces, and an epoch still mixes samples of far-away shards.
- A window goes whole to one rank, the one with least to do. Sequences a rank then has too many of move to
  ranks with too few, so ranks differ by one sequence at most; where batches do not come out even, a
  rank's last is a *filler* without samples. All ranks make the same number of steps, and every sample is
  seen once.
- A run that goes on with another number of ranks in the middle of an epoch plans again what is left of
  it: ``past`` names the ranks and batches so far.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clinkd.data.packing import TooLong, pack
from clinkd.data.shards import DataError

Group = tuple[int, tuple[int, ...]]
"""(record of the index, its documents): what shares the record's images."""
Past = tuple[tuple[int, int], ...]
"""((ranks, batches of each rank), ...) of an epoch so far."""


@dataclass(frozen=True)
class LengthIndex:
    """Where each record stands and how long its documents are, in the shards' order.

    Args:
        ids: of the records.
        place: int [records, 3]: shard, row group, row within the group.
        lengths: of each record, the tokens of each of its documents (at least one).
    """

    ids: list[str]
    place: np.ndarray
    lengths: list[list[int]]

    def write(self, path: Path) -> Path:
        import pyarrow as pa

        columns: dict[str, Any] = {"id": self.ids, "lengths": self.lengths}
        columns |= {name: self.place[:, at] for at, name in enumerate(("shard", "group", "row"))}
        table = pa.table(columns)
        unfinished = path.with_suffix(".tmp")
        with pa.OSFile(str(unfinished), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        unfinished.replace(path)
        return path

    @classmethod
    def read(cls, path: Path | str) -> LengthIndex:
        import pyarrow as pa

        table = pa.ipc.open_file(pa.OSFile(str(path))).read_all()
        place = np.stack([table.column(name).to_numpy() for name in ("shard", "group", "row")], axis=1)
        return cls(table.column("id").to_pylist(), place, table.column("lengths").to_pylist())


@dataclass(frozen=True)
class PlanOptions:
    """How batches are made.

    Args:
        batch_size: sequences of a batch when packing, else groups.
        tokens: most tokens of a packed sequence; None: no packing, one sequence per document.
        per_group: most documents of a record that stay together and share its images.
        window: row groups that are read and mixed together.
    """

    seed: int
    batch_size: int
    tokens: int | None = None
    per_group: int = 1
    window: int = 4


@dataclass(frozen=True)
class Batch:
    """Sequences of one batch, each a tuple of groups; none: a filler."""

    window: int  # of its first sequence, within the epoch
    sequences: tuple[tuple[Group, ...], ...]


def plan_epoch(
    index: LengthIndex, options: PlanOptions, epoch: int, world: int, past: Past = ()
) -> list[list[Batch]]:
    """The batches of each rank, equally many: [world] lists.

    Args:
        past: what earlier numbers of ranks have already done of this epoch.

    Raises:
        DataError: a document longer than ``options.tokens``.
    """
    seen = _seen(index, options, epoch, past)
    windows = [
        (number, sequence)
        for number, groups in enumerate(_windows(index, options, epoch))
        for sequence in _sequences(index, options, [group for group in groups if group not in seen])
    ]
    ranks = _deal(windows, world)
    size = options.batch_size
    rounds = max(-(-len(found) // size) for found in ranks)
    return [_batches(found, size, rounds) for found in ranks]


def _seen(index: LengthIndex, options: PlanOptions, epoch: int, past: Past) -> set[Group]:
    done: set[Group] = set()
    for number, (world, rounds) in enumerate(past):
        for rank in plan_epoch(index, options, epoch, world, past[:number]):
            done.update(
                group for batch in rank[:rounds] for sequence in batch.sequences for group in sequence
            )
    return done


def _windows(index: LengthIndex, options: PlanOptions, epoch: int) -> Iterator[list[Group]]:
    """Groups of each window, shuffled."""
    rng = np.random.default_rng([options.seed, epoch])
    records: dict[tuple[int, int], list[int]] = {}
    for record, (shard, group, _) in enumerate(index.place.tolist()):
        records.setdefault((shard, group), []).append(record)
    places = list(records)
    order = [places[at] for at in rng.permutation(len(places))]
    for start in range(0, len(order), options.window):
        chosen = [record for place in order[start : start + options.window] for record in records[place]]
        groups = [group for record in chosen for group in _groups(index, options, record, rng)]
        yield [groups[at] for at in rng.permutation(len(groups))]


def _groups(
    index: LengthIndex, options: PlanOptions, record: int, rng: np.random.Generator
) -> Iterator[Group]:
    """A record's documents, shuffled, ``per_group`` at a time; fewer where they would not fit a sequence."""
    lengths = index.lengths[record]
    kept: list[int] = []
    for document in rng.permutation(len(lengths)).tolist():
        whole = sum(lengths[at] for at in kept) + lengths[document]
        if kept and (
            len(kept) == options.per_group or (options.tokens is not None and whole > options.tokens)
        ):
            yield record, tuple(kept)
            kept = []
        kept.append(document)
    if kept:
        yield record, tuple(kept)


def _sequences(index: LengthIndex, options: PlanOptions, groups: Sequence[Group]) -> list[tuple[Group, ...]]:
    if options.tokens is None:
        return [(group,) for group in groups]
    lengths = [group_length(index, group) for group in groups]
    try:
        return [tuple(groups[at] for at in chosen) for chosen in pack(lengths, options.tokens)]
    except TooLong as error:
        raise DataError(
            f"record {index.ids[groups[error.index][0]]}: a sample of {error.length} tokens, but "
            f"feed.pack_tokens is {error.tokens}; raise it, or lower model.max_pixels"
        ) from None


def group_length(index: LengthIndex, group: Group) -> int:
    """Tokens of all documents of a group."""
    return sum(index.lengths[group[0]][document] for document in group[1])


def _deal(
    sequences: list[tuple[int, tuple[Group, ...]]], world: int
) -> list[list[tuple[int, tuple[Group, ...]]]]:
    """(window, sequence) of each rank: windows whole, then even."""
    windows: dict[int, list[tuple[int, tuple[Group, ...]]]] = {}
    for number, sequence in sequences:
        windows.setdefault(number, []).append((number, sequence))
    ranks: list[list[tuple[int, tuple[Group, ...]]]] = [[] for _ in range(world)]
    for window in windows.values():
        min(ranks, key=len).extend(window)
    # The larger quotas go where more lies already: fewer sequences move.
    quota = [len(sequences) // world] * world
    for rank in sorted(range(world), key=lambda rank: -len(ranks[rank]))[: len(sequences) % world]:
        quota[rank] += 1
    spare = [ranks[rank].pop() for rank in range(world) for _ in range(len(ranks[rank]) - quota[rank])]
    for rank in range(world):
        missing = quota[rank] - len(ranks[rank])
        ranks[rank] += [spare.pop() for _ in range(missing)]
    return ranks


def _batches(sequences: list[tuple[int, tuple[Group, ...]]], size: int, rounds: int) -> list[Batch]:
    found = []
    for at in range(0, len(sequences), size):
        part = sequences[at : at + size]
        found.append(Batch(part[0][0], tuple(sequence for _, sequence in part)))
    last = found[-1].window if found else 0
    return found + [Batch(last, ())] * (rounds - len(found))
