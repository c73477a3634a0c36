"""Rows in groups of like length: the cheapest split, and the same hidden states as in one pass."""

from __future__ import annotations

from itertools import product

from hypothesis import given, settings
from hypothesis import strategies as st

from clinkd.model.rows import length_groups


def cost(lengths: list[int], groups: list[list[int]], overhead: int) -> int:
    return sum(len(rows) * max(lengths[row] for row in rows) + overhead for rows in groups)


@settings(deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=7), st.integers(0, 40))
def test_no_other_split_by_length_is_cheaper(lengths: list[int], overhead: int) -> None:
    groups = length_groups(lengths, overhead)
    assert sorted(row for rows in groups for row in rows) == list(range(len(lengths)))
    order = sorted(range(len(lengths)), key=lambda row: lengths[row])
    least = min(
        cost(lengths, split(order, cuts), overhead) for cuts in product([False, True], repeat=len(order) - 1)
    )
    assert cost(lengths, groups, overhead) == least


def split(order: list[int], cuts: tuple[bool, ...]) -> list[list[int]]:
    groups = [[order[0]]]
    for row, cut in zip(order[1:], cuts, strict=True):
        if cut:
            groups.append([])
        groups[-1].append(row)
    return groups


def test_dear_passes_leave_one_group() -> None:
    assert len(length_groups([1, 50, 100], 1000)) == 1 and length_groups([], 5) == []
