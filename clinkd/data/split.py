"""Train, validation and test, by case.

Decisions:
- A case (the patient part of a name) goes to one side whole, whatever modalities it was imaged with; so
  does a group of cases that share images or hold near-duplicates (``census``).
- The order in which cases go to test is a hash of (seed, case): it does not depend on what else is in the
  data.
- Each modality gives its share, at least one case to each side where it has two; the rounding carries over
  from one modality to the next, so that the whole comes out at the fraction asked for.
- Two cases are enough for a test side, even where no modality has two.
- Validation comes out of what test leaves, in the same way: the test side is the same with and without it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Mapping

SIDES = ("train", "validation", "test")


def assign(
    cases: Mapping[str, Collection[str]], *, seed: int, test_fraction: float, validation_fraction: float = 0.0
) -> dict[str, str]:
    """``{case: one of SIDES}``.

    Args:
        cases: the modalities of each case.
        test_fraction: share of the cases that goes to test, in [0, 1).
        validation_fraction: that goes to validation, so that both stay below 1.
    """
    sides = _halves(cases, seed, test_fraction)
    rest = {case: names for case, names in cases.items() if sides[case] == "train"}
    if validation_fraction > 0 and len(rest) > 1:
        inner = _halves(rest, seed, validation_fraction / (1 - test_fraction))
        sides |= {case: "validation" for case, side in inner.items() if side == "test"}
    return sides


def _halves(cases: Mapping[str, Collection[str]], seed: int, test_fraction: float) -> dict[str, str]:
    """``{case: "train" | "test"}``."""
    members: dict[str, list[str]] = {}
    for case in sorted(cases, key=lambda case: (_rank(seed, case), case)):
        for modality in cases[case]:
            members.setdefault(modality, []).append(case)
    split: dict[str, str] = {}
    wished, given = 0.0, 0
    # Small modalities first: where a case counts for two, the one with less choice chooses.
    for modality in sorted(members, key=lambda name: (len(members[name]), name)):
        free = [case for case in members[modality] if case not in split]
        tested = sum(split.get(case) == "test" for case in members[modality])
        trained = len(members[modality]) - len(free) - tested
        wished += test_fraction * len(free)
        least = int(not tested and len(members[modality]) > 1)
        most = max(0, len(free) - int(not trained))
        count = max(min(least, most), min(round(wished) - given, most), 0) if test_fraction > 0 else 0
        given += count
        split.update((case, "test" if place < count else "train") for place, case in enumerate(free))
    if test_fraction > 0 and len(split) > 1 and "test" not in split.values():  # one case of each modality
        split[min(split, key=lambda case: (_rank(seed, case), case))] = "test"
    return split


def groups(count: int, joined: Iterable[tuple[int, int]]) -> list[int]:
    """Numbers 0 .. count - 1 as groups: what a pair joins, directly or through others, has one number.

    Returns:
        The group of each, numbered in order of first appearance.
    """
    import numpy as np
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    pairs = np.array(list(joined), dtype=np.int64).reshape(-1, 2)
    links = coo_array((np.ones(len(pairs), bool), (pairs[:, 0], pairs[:, 1])), shape=(count, count))
    _, labels = connected_components(links, directed=False)
    seen: dict[int, int] = {}
    return [seen.setdefault(label, len(seen)) for label in labels.tolist()]


def _rank(seed: int, case: str) -> bytes:
    return hashlib.sha256(f"{seed}:{case}".encode()).digest()
