"""Records of the shards, read by whoever works on them: what travels to a worker is where they stand."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from clinkd.data.shards import LIGHT, Shards
from clinkd.data.tasks import FeedError

PIXELS = [*LIGHT, "png", "more_png"]
KEPT_BYTES = 96 << 20
"""Row groups that a reader keeps."""
FOOTERS = 16 << 20
"""Bytes of shards' footers that it keeps, so that a row group is one request."""


class Place(NamedTuple):
    """Where a record stands."""

    shard: int
    group: int
    row: int


@dataclass(frozen=True)
class Wanted:
    """A record to be read.

    Args:
        name, turns: in the place of its own id and turns, where its images are asked about something else.
    """

    place: Place
    name: str | None = None
    turns: tuple[dict[str, Any], ...] | None = None


@dataclass(frozen=True)
class Questions:
    """Records to be asked about, in their order; a part of them travels by value.

    Args:
        place: int [n, 3], where each stands.
        instead: (name, turns) of each, where its images are asked about something else.
    """

    shards: Shards
    place: np.ndarray
    instead: tuple[tuple[str, tuple[dict[str, Any], ...]], ...] | None = None

    def __len__(self) -> int:
        return len(self.place)

    def part(self, start: int, stop: int) -> list[Wanted]:
        """Some of them."""
        places = [Place(*place) for place in self.place[start:stop].tolist()]
        if self.instead is None:
            return [Wanted(place) for place in places]
        return [Wanted(place, *other) for place, other in zip(places, self.instead[start:stop], strict=True)]


class Kept:
    """The last values that were used, as many as a budget of bytes holds; the newest always."""

    def __init__(self, budget: int) -> None:
        self.budget, self.size = budget, 0
        self._values: OrderedDict[Any, tuple[Any, int]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._values)

    def get(self, key: Any) -> Any:
        """None: it is not there."""
        if key not in self._values:
            return None
        self._values.move_to_end(key)
        return self._values[key][0]

    def put(self, key: Any, value: Any, size: int) -> None:
        if key in self._values:
            self.size -= self._values.pop(key)[1]
        self._values[key] = value, size
        self.size += size
        while self.size > self.budget and len(self._values) > 1:
            self.size -= self._values.popitem(last=False)[1][1]


class Records:
    """Records of the shards by place, their row groups read when they are needed and kept for a while."""

    def __init__(self, shards: Shards, kept_bytes: int) -> None:
        self.shards, self._kept = shards, Kept(kept_bytes)
        self._footers = Kept(FOOTERS)

    def name(self, place: Place) -> tuple[Any, ...]:
        """What names a record among all that a process ever reads: its file, as it is now, and its place."""
        return (self.shards.paths[place.shard], self.shards.stamps[place.shard], place.group, place.row)

    def row(self, place: Place) -> dict[str, Any]:
        """All columns but its images.

        Raises:
            FeedError: its row group cannot be read.
        """
        return dict(self._group(place).select(LIGHT).slice(place.row, 1).to_pylist()[0])

    def images(self, place: Place) -> list[bytes]:
        """The encoded images, in the record's order. Raises FeedError like ``row``."""
        group = self._group(place)
        more = group.column("more_png")[place.row].as_py()
        return [group.column("png")[place.row].as_py(), *(more or [])]

    def record(self, wanted: Wanted) -> dict[str, Any]:
        """A whole record, its images as ``png`` and ``more_png``. Raises FeedError like ``row``."""
        first, *more = self.images(wanted.place)
        row = self.row(wanted.place) | {"png": first, "more_png": more}
        if wanted.turns is not None:
            row |= {"id": wanted.name, "turns": list(wanted.turns)}
        return row

    def _group(self, place: Place) -> Any:
        key = place[:2]
        found = self._kept.get(key)
        if found is None:
            found = self._read(*key)
            self._kept.put(key, found, found.nbytes)
        if place.row >= len(found):
            raise FeedError(
                f"{self.shards.paths[place.shard]}: row group {place.group} has {len(found)} rows; the shard "
                "was replaced since the index was made: run the command again"
            )
        return found

    def _read(self, shard: int, group: int) -> Any:
        import pyarrow as pa

        try:
            with self.shards.open(shard, self._footers.get(shard)) as file:
                self._footers.put(shard, file.metadata, file.metadata.serialized_size)
                names = file.schema_arrow.names
                found = file.read_row_group(group, columns=[name for name in PIXELS if name in names])
        except Exception as error:
            raise FeedError(
                f"{self.shards.paths[shard]}: row group {group} cannot be read "
                f"({' '.join(str(error).split())[:200]}); run `clinkd prepare` again"
            ) from None
        for name in PIXELS:  # of shards that an earlier version wrote
            if name not in found.column_names:
                found = found.append_column(name, pa.nulls(len(found)))
        return found
