"""Packing: which samples share one sequence, so that little of it is padding.

Decisions:
- Best fit decreasing: the longest first, each into the fullest sequence that still has room. It needs no
  more than 11/9 of the fewest sequences (Johnson, 1973); on answers about images, whose lengths are
  mostly small parts of a sequence, it fills nearly all of it.
- What is packed together is decided within a window of samples, which the caller has shuffled: sorting by
  length happens inside it alone, and the sequences come back in an order that does not tell their
  lengths.
- A sample is never cut. One that is longer than a sequence is refused, by its place: the caller knows its
  name.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence


class TooLong(ValueError):
    """A sample that does not fit into a sequence of its own; ``index`` is its place in the lengths."""

    def __init__(self, index: int, length: int, tokens: int) -> None:
        super().__init__(f"sample {index} has {length} tokens, a packed sequence holds {tokens}")
        self.index, self.length, self.tokens = index, length, tokens


def pack(lengths: Sequence[int], tokens: int) -> list[list[int]]:
    """Deals samples out to sequences.

    Args:
        lengths: tokens of each sample, at least 1.
        tokens: most tokens of a sequence.

    Returns:
        Sequences as lists of indices into ``lengths``: each index once, ascending within its sequence, the
        sequences ordered by their first index. The same lengths give the same sequences.

    Raises:
        TooLong: a sample of more than ``tokens``.
        ValueError: a sample without tokens.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens free, bin), sorted
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = lengths[index]
        if length > tokens:
            raise TooLong(index, length, tokens)
        if length < 1:
            raise ValueError(f"sample {index} has {length} tokens")
        place = bisect_left(room, (length, -1))
        free, chosen = room.pop(place) if place < len(room) else (tokens, len(bins))
        if chosen == len(bins):
            bins.append([])
        bins[chosen].append(index)
        if free > length:
            insort(room, (free - length, chosen))
    return sorted(sorted(indices) for indices in bins)


def packed_fill(lengths: Sequence[int], bins: Sequence[Sequence[int]]) -> float:
    """Share of tokens that are no padding, when each sequence is as long as the longest of them."""
    used = [sum(lengths[index] for index in indices) for indices in bins]
    return sum(used) / (len(used) * max(used))


def padded_fill(lengths: Sequence[int], batch: int) -> float:
    """The same for batches of ``batch`` samples in order, padded to the longest of each."""
    groups = [lengths[at : at + batch] for at in range(0, len(lengths), batch)]
    return sum(lengths) / sum(max(group) * len(group) for group in groups)
