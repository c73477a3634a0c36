"""Train and test: by case, by seed, each modality on both sides."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clinkd.data.split import assign, groups


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=4), st.sets(st.sampled_from(["ct", "mr", "x"]), min_size=1), max_size=30
    ),
    st.integers(0, 5),
    st.floats(0.01, 0.9),
)
def test_every_case_has_one_side_and_modalities_both_where_they_can(
    cases: dict, seed: int, fraction: float
) -> None:
    split = assign(cases, seed=seed, test_fraction=fraction)
    assert split.keys() == cases.keys() and set(split.values()) <= {"train", "test"}
    assert split == assign(dict(reversed(cases.items())), seed=seed, test_fraction=fraction)
    if len(cases) > 1:
        assert "test" in split.values()
    if all(len(kinds) == 1 for kinds in cases.values()):
        for modality in ("ct", "mr", "x"):
            sides = {split[case] for case, kinds in cases.items() if modality in kinds}
            if sum(modality in kinds for kinds in cases.values()) > 1:
                assert sides == {"train", "test"}


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.25, 0.5])
def test_the_share_comes_out_over_all_modalities(fraction: float) -> None:
    cases = {f"case {n}": {f"modality {n % 8}"} for n in range(3000)}
    split = assign(cases, seed=0, test_fraction=fraction)
    assert Counter(split.values())["test"] == round(3000 * fraction)
    per_modality = Counter(next(iter(cases[case])) for case, side in split.items() if side == "test")
    assert max(per_modality.values()) - min(per_modality.values()) <= 1


def test_another_seed_is_another_split_and_no_fraction_no_test() -> None:
    cases = {f"case {n}": {"ct"} for n in range(100)}
    assert assign(cases, seed=0, test_fraction=0.2) != assign(cases, seed=1, test_fraction=0.2)
    assert set(assign(cases, seed=0, test_fraction=0.0).values()) == {"train"}


def test_validation_comes_out_of_what_test_leaves() -> None:
    cases = {f"case {n}": {f"modality {n % 4}"} for n in range(1000)}
    without = assign(cases, seed=0, test_fraction=0.2)
    split = assign(cases, seed=0, test_fraction=0.2, validation_fraction=0.1)
    counts = Counter(split.values())
    assert counts == {"train": 700, "validation": 100, "test": 200}
    assert all(split[case] == "test" for case, side in without.items() if side == "test")
    for modality in range(4):
        sides = {split[case] for case, kinds in cases.items() if f"modality {modality}" in kinds}
        assert sides == {"train", "validation", "test"}
    two = assign({"a": {"ct"}, "b": {"ct"}}, seed=0, test_fraction=0.1, validation_fraction=0.5)
    assert sorted(two.values()) == ["test", "train"]  # nothing is left to choose by


def test_a_case_keeps_its_place_in_the_order_when_others_join() -> None:
    cases = {f"case {n}": {"ct"} for n in range(100)}
    few = assign(cases, seed=0, test_fraction=0.2)
    more = assign(cases | {f"new {n}": {"mr"} for n in range(50)}, seed=0, test_fraction=0.2)
    assert few == {case: side for case, side in more.items() if case in few}


@settings(deadline=None)  # the first example imports scipy
@given(st.integers(1, 30), st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=20))
def test_groups_are_what_pairs_join(count: int, pairs: list[tuple[int, int]]) -> None:
    pairs = [(a % count, b % count) for a, b in pairs]
    found = groups(count, pairs)
    assert len(found) == count and sorted(set(found)) == list(range(len(set(found))))
    assert list(dict.fromkeys(found)) == sorted(set(found))  # numbered by first appearance
    assert all(found[a] == found[b] for a, b in pairs)
    joined = {number: {number} for number in range(count)}
    for a, b in pairs:
        union = joined[a] | joined[b]
        for number in union:
            joined[number] = union
    assert len({frozenset(members) for members in joined.values()}) == len(set(found))
