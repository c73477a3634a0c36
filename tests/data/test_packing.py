"""Packing: every sample once, no sequence over its limit, little room left."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clinkd.data.packing import TooLong, pack, packed_fill, padded_fill

LENGTHS = st.lists(st.integers(1, 64), max_size=200)


@given(LENGTHS, st.integers(64, 200))
def test_every_sample_once_and_no_sequence_over_the_limit(lengths, tokens):
    bins = pack(lengths, tokens)
    assert sorted(index for indices in bins for index in indices) == list(range(len(lengths)))
    assert all(0 < sum(lengths[index] for index in indices) <= tokens for indices in bins)


@given(LENGTHS, st.integers(64, 200))
def test_at_most_one_sequence_is_half_empty(lengths, tokens):
    """What no two half-empty sequences can be: both would fit into one."""
    used = [sum(lengths[index] for index in indices) for indices in pack(lengths, tokens)]
    assert sum(2 * tokens_used <= tokens for tokens_used in used) <= 1


@given(LENGTHS)
def test_packing_is_a_function_of_the_lengths(lengths):
    assert pack(lengths, 100) == pack(tuple(lengths), 100)


def test_a_known_case():
    assert pack([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]


def test_a_sample_longer_than_a_sequence_is_named():
    with pytest.raises(TooLong, match="sample 1 has 11 tokens") as error:
        pack([3, 11], 10)
    assert error.value.index == 1
    with pytest.raises(ValueError, match="sample 0 has 0 tokens"):
        pack([0], 10)


def test_packing_fills_what_padding_leaves_empty():
    lengths = np.random.default_rng(0).integers(20, 120, 400).tolist()
    bins = pack(lengths, 512)
    assert packed_fill(lengths, bins) > 0.97 > 0.75 > padded_fill(lengths, 8)
    assert padded_fill([4, 2, 3], 2) == 9 / (8 + 3)
