"""What a cache keeps of a token comes back as it went in, within what its form allows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clinkd.distill.forms import Form
from clinkd.distill.losses import distill_loss, distill_loss_topk
from clinkd.distill.summary import tail_at

OFF = {"float16": 5e-4, "bfloat16": 4e-3, "int8": 2e-2}
"""Largest error of a state, relative to its norm."""


def states(tokens, width=24, seed=0, scale=1.0):
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed)) * scale


def parts(kept, counts):
    """A sample's byte strings of each column."""
    found = {}
    for name, values in kept.items():
        ends = torch.tensor(counts).cumsum(0).tolist()
        found[name] = [values[end - count : end].tobytes() for end, count in zip(ends, counts, strict=True)]
    return found


@settings(max_examples=50, deadline=None)
@given(
    name=st.sampled_from(sorted(OFF)),
    counts=st.lists(st.integers(0, 5), min_size=1, max_size=4),
    width=st.integers(1, 40),
    scale=st.floats(1e-3, 1e3),
    seed=st.integers(0, 99),
)
def test_states_come_back_and_their_error_is_told(name, counts, width, scale, seed):
    form, hidden = Form(name), states(sum(counts), width, seed, scale)
    kept, off = form.pack(hidden, torch.zeros(3, width))
    assert sum(values.shape[1] for values in kept.values()) == form.token_bytes(width)
    back = form.unpack(parts(kept, counts), width)["teacher_hidden"]
    assert back.shape == hidden.shape and off.shape == (len(hidden),)
    error = (back.float() - hidden).norm(dim=1) / hidden.norm(dim=1)
    torch.testing.assert_close(error, off, atol=1e-6, rtol=1e-3)
    assert (off <= OFF[name]).all()


def test_a_row_of_zeros_stays_one_in_int8():
    kept, off = Form("int8").pack(torch.zeros(2, 8), torch.zeros(3, 8))
    back = Form("int8").unpack(parts(kept, [1, 1]), 8)["teacher_hidden"]
    assert not back.any() and not off.any()


def test_top_k_serves_the_loss_at_any_temperature():
    """With all but one token kept it is the exact loss, but for the rounding of logits to half precision."""
    form, hidden, head = Form("topk", k=19, vocabulary=20), states(9), states(20, seed=1)
    kept, _ = form.pack(hidden, head)
    assert sum(values.shape[1] for values in kept.values()) == form.token_bytes(24)
    back = form.unpack(parts(kept, [4, 5]), 24)
    own, own_head, targets = states(9, 6, 2), states(20, 6, 3), torch.arange(9)
    for temperature in (0.3, 1.0, 4.0):
        exact = distill_loss(own, own_head, targets, hidden, head, a=1.0, temperature=temperature)
        small = distill_loss_topk(
            own, own_head, targets, back["top_logits"], back["top_ids"].long(),
            tail_at(back["tails"], temperature), vocabulary=20, a=1.0, temperature=temperature,
        )  # fmt: skip
        assert small.total.item() == pytest.approx(exact.total.item(), rel=5e-3)


@pytest.mark.parametrize(
    "given_, message",
    [(("float8",), "cache.form"), (("topk", 64, 64), "cache.k"), (("topk",), "cache.k")],
)
def test_what_cannot_be_kept_is_refused(given_, message):
    with pytest.raises(ValueError, match=message):
        Form(*given_)
