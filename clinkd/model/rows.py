"""Rows of a padded batch in groups of like length: less padding for some more passes."""

from __future__ import annotations

from collections.abc import Sequence


def length_groups(lengths: Sequence[int], overhead: int) -> list[list[int]]:
    """Row numbers in groups, each padded to its own longest row, at the least cost.

    The cost of a group is its padded tokens and ``overhead``, what another pass costs in tokens; the best
    split of the rows in order of length is found exactly, in time quadratic in the rows.
    """
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    least, begins = [0], [0]
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        cost, begin = min((least[at] + (end - at) * longest, at) for at in range(end))
        least.append(cost + overhead)
        begins.append(begin)
    groups, end = [], len(order)
    while end:
        groups.append(order[begins[end] : end])
        end = begins[end]
    return groups[::-1]
