"""Finds rows of a column of names without a dict of them: sixteen bytes a name, whatever its length.

Decisions:
- Names are found by a 64-bit hash, and then compared: two names of one hash are told apart.
- The hash is worked out by numpy over the column's bytes: a million names take about a second, and no Python
  object is made of any of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pyarrow as pa

CHUNK = 1 << 16
"""Names that are hashed at a time."""
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that its powers do not vanish modulo 2**64


class Lookup:
    """Rows by name.

    Args:
        names: a column of strings; it stays where it is, memory-mapped or not.
    """

    def __init__(self, names: pa.ChunkedArray) -> None:
        self._names = names
        hashes = hash_names(names)
        order = np.argsort(hashes, kind="stable")
        self._order, self._hashes = order, hashes[order]

    def __len__(self) -> int:
        return len(self._order)

    def rows(self, wanted: Sequence[str]) -> np.ndarray:
        """The row of each wanted name, the first of those that have it; -1: there is none. [wanted] int64."""
        import pyarrow as pa

        hashes = hash_names(pa.chunked_array([pa.array(wanted, pa.string())]))
        starts = np.searchsorted(self._hashes, hashes, "left")
        ends = np.searchsorted(self._hashes, hashes, "right")
        found = np.full(len(wanted), -1, np.int64)
        for at, (name, start, end) in enumerate(zip(wanted, starts.tolist(), ends.tolist(), strict=True)):
            for row in self._order[start:end].tolist():
                if self._names[row].as_py() == name:
                    found[at] = row
                    break
        return found


def hash_names(names: pa.ChunkedArray) -> np.ndarray:
    """A hash of each name, uint64; the same in every process."""
    parts = [_hash(chunk.slice(at, CHUNK)) for chunk in names.chunks for at in range(0, len(chunk), CHUNK)]
    return np.concatenate(parts) if parts else np.zeros(0, np.uint64)


def _hash(names: pa.Array) -> np.ndarray:
    import pyarrow as pa

    whole = pa.concat_arrays([names])  # a slice's own buffers, from offset 0
    if len(whole) == 0:
        return np.zeros(0, np.uint64)
    _, offsets, content = whole.buffers()
    kind = np.int64 if pa.types.is_large_string(whole.type) else np.int32
    ends = np.frombuffer(offsets, kind)[whole.offset : whole.offset + len(whole) + 1].astype(np.int64)
    first, last = int(ends[0]), int(ends[-1])
    size = last - first
    letters = np.zeros(0, np.uint8) if content is None else np.frombuffer(content, np.uint8, size, first)
    ends = ends - first
    lengths = np.diff(ends)
    place = np.arange(size) - np.repeat(ends[:-1], lengths)
    powers = np.cumprod(np.full(int(lengths.max(initial=0)) + 1, _BASE))
    terms = (letters.astype(np.uint64) + np.uint64(1)) * powers[place]
    sums = np.concatenate([[np.uint64(0)], np.cumsum(terms, dtype=np.uint64)])
    return (sums[ends[1:]] - sums[ends[:-1]]) ^ (sums[ends[1:]] - sums[ends[:-1]] >> np.uint64(29))
