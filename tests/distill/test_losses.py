"""The chunked losses equal the plain ones, in value and gradient, whatever the shapes."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clinkd.distill import losses
from clinkd.distill.certificate import oracle_loss
from clinkd.distill.losses import answer_loss, distill_loss, distill_loss_logits, distill_loss_topk
from clinkd.distill.summary import COOLEST, HOTTEST, confidence_margin, tail_at, top_k_logits

DIVERGENCES = ["forward_kl", "reverse_kl", "jsd"]


def case(n=7, v=31, vt=37, h=5, ht=6, dtype=torch.float64, seed=0, scale=1.0):
    """(hidden, head, targets, teacher_hidden, teacher_head)"""
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator)
    hidden, head = ((draw(size, h) * scale).to(dtype).requires_grad_() for size in (n, v))
    targets = torch.randint(v, (n,), generator=generator)
    return hidden, head, targets, (draw(n, ht) * scale).to(dtype), (draw(vt, ht) * scale).to(dtype)


def gradients(loss, inputs):
    return torch.autograd.grad(loss, inputs[:2], retain_graph=True)


@settings(max_examples=200, deadline=None)
@given(
    n=st.integers(0, 20),
    v=st.integers(2, 40),
    vt=st.integers(2, 40),
    chunk=st.integers(1, 24),
    a=st.floats(0, 8),
    temperature=st.floats(0.2, 5),
    divergence=st.sampled_from(DIVERGENCES),
    scale_t2=st.booleans(),
    beta=st.floats(0.05, 0.95),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_equal_to_the_oracle_on_200_shapes(
    n, v, vt, chunk, a, temperature, divergence, scale_t2, beta, dtype, seed
):
    inputs = case(n, v, vt, dtype=dtype, seed=seed)
    method = {"a": a, "temperature": temperature, "divergence": divergence}
    method |= {"scale_t2": scale_t2, "jsd_beta": beta}
    ours = distill_loss(*inputs, chunk_size=chunk, **method)
    wide = [leaf.detach().double().requires_grad_() for leaf in inputs[:2]]
    truth = oracle_loss(*wide, *inputs[2:], **method)
    close = 1e-10 if dtype == torch.float64 else 2e-5
    for mine, his in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine.double(), his, rtol=close, atol=close)
    tolerance = {torch.float64: 1e-9, torch.float32: 5e-5, torch.bfloat16: 6e-3}[dtype]
    for mine, his in zip(gradients(ours.total, inputs), gradients(truth.total, wide), strict=True):
        assert mine.dtype == dtype
        largest = his.abs().max().item() if his.numel() else 0.0
        torch.testing.assert_close(mine.double(), his, rtol=0, atol=tolerance * largest + 1e-12)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_each_of_the_three_scalars_is_differentiable(divergence):
    inputs = case(n=5)
    method = {"a": 0.7, "temperature": 0.5, "divergence": divergence}
    ours, truth = distill_loss(*inputs, chunk_size=2, **method), oracle_loss(*inputs, **method)
    for mine, his in [
        (ours.kd, truth.kd),
        (ours.ce, truth.ce),
        (ours.total, truth.total),
        (ours.total * 2 + ours.kd - 3 * ours.ce, truth.total * 2 + truth.kd - 3 * truth.ce),
    ]:
        for one, other in zip(gradients(mine, inputs), gradients(his, inputs), strict=True):
            torch.testing.assert_close(one, other)


def test_a_second_backward_pass_gives_the_same_gradient():
    inputs = case()
    loss = distill_loss(*inputs, a=0.5, temperature=0.5).total * 3
    first = [gradient.clone() for gradient in gradients(loss, inputs)]
    for one, other in zip(first, gradients(loss, inputs), strict=True):
        torch.testing.assert_close(one, other)


def test_the_totals_gradient_comes_from_the_forward_pass_and_that_of_a_part_costs_another(monkeypatch):
    passes = []
    monkeypatch.setattr(losses, "_pass", lambda *given, run=losses._pass: passes.append(1) or run(*given))
    inputs = case()
    loss = distill_loss(*inputs, a=0.5, temperature=0.5)
    gradients(loss.total, inputs)
    assert len(passes) == 1
    gradients(loss.kd, inputs)
    assert len(passes) == 2


def test_gradcheck_of_the_answer_loss():
    hidden, head, targets, *_ = case(n=4, v=6, h=3)
    assert torch.autograd.gradcheck(lambda x, w: answer_loss(x, w, targets, chunk_size=3), (hidden, head))


def test_answer_loss_is_cross_entropy():
    hidden, head, targets, *_ = case(n=9)
    expected = torch.nn.functional.cross_entropy(hidden @ head.T, targets)
    ours = answer_loss(hidden, head, targets, chunk_size=2)
    torch.testing.assert_close(ours, expected)
    for one, other in zip(gradients(ours, (hidden, head)), gradients(expected, (hidden, head)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_student_that_is_its_own_teacher_has_kd_zero_and_no_slope(divergence):
    hidden, head, targets, *_ = case()
    method = {"a": 1.0, "temperature": 0.5, "divergence": divergence}
    loss = distill_loss(hidden, head, targets, hidden, head, **method)
    assert abs(loss.kd.item()) < 1e-12
    for gradient in gradients(loss.kd, (hidden, head)):
        assert gradient.abs().max() < 1e-12


def test_tokens_beyond_the_common_prefix_get_no_distillation():
    """A smaller teacher has nothing to say about the student's last tokens, and the other way round."""
    hidden, head, targets, teacher, teacher_head = case(v=31, vt=20)
    kd = distill_loss(hidden, head, targets, teacher, teacher_head, a=1.0, temperature=1.0).kd
    _, by_head = gradients(kd, (hidden, head))
    assert (by_head[20:] == 0).all() and (by_head[:20] != 0).any()
    longer = torch.cat([teacher_head, torch.full((30, 6), 9.0, dtype=torch.float64)])
    fewer = targets.clamp(max=19)
    padded = distill_loss(hidden, head[:20], fewer, teacher, longer, a=1.0, temperature=1.0).kd
    torch.testing.assert_close(kd, padded)


def test_no_token_gives_a_zero_that_still_has_a_gradient():
    inputs = case(n=0)
    for loss in (*distill_loss(*inputs, a=0.5, temperature=0.5), answer_loss(*inputs[:3])):
        assert loss.item() == 0 and loss.requires_grad
        by_hidden, by_head = gradients(loss, inputs)
        assert by_hidden.shape == inputs[0].shape
        assert by_head.shape == inputs[1].shape and (by_head == 0).all()


@settings(max_examples=30, deadline=None)
@given(split=st.integers(0, 9), as_tensor=st.booleans())
def test_ranks_of_unequal_counts_sum_to_the_whole_batch(split, as_tensor):
    hidden, head, targets, teacher, teacher_head = case(n=9)
    run = partial(distill_loss, a=0.5, temperature=0.5)
    whole = run(hidden, head, targets, teacher, teacher_head)
    count = torch.tensor(9) if as_tensor else 9.0
    parts = [
        run(hidden[rows], head, targets[rows], teacher[rows], teacher_head, normalizer=count)
        for rows in (slice(0, split), slice(split, 9))
    ]
    torch.testing.assert_close(parts[0].total + parts[1].total, whole.total)
    both = gradients(parts[0].total + parts[1].total, (hidden, head))
    for one, other in zip(both, gradients(whole.total, (hidden, head)), strict=True):
        torch.testing.assert_close(one, other)


def test_a_normaliser_of_zero_gives_zero_not_nan():
    assert distill_loss(*case(n=0), a=0.5, temperature=0.5, normalizer=0).total.item() == 0
    assert answer_loss(*case(n=0)[:3], normalizer=torch.tensor(0)).item() == 0
    inputs = case(n=3)  # of rows that count nothing
    loss = distill_loss(*inputs, a=0.5, temperature=0.5, normalizer=0).total
    assert loss.item() == 0 and not any(gradient.any() for gradient in gradients(loss, inputs))


def test_the_teacher_gets_no_gradient_and_a_frozen_head_costs_none():
    hidden, head, targets, teacher, teacher_head = case()
    teacher.requires_grad_()
    teacher_head.requires_grad_()
    frozen = head.detach()
    distill_loss(hidden, frozen, targets, teacher, teacher_head, a=0.5, temperature=0.5).total.backward()
    assert hidden.grad is not None
    assert frozen.grad is None and teacher.grad is None and teacher_head.grad is None


@pytest.mark.parametrize("part", ["total", "kd", "ce"])
def test_a_head_over_frozen_states_has_the_gradient_that_it_has_over_others(part):
    hidden, *rest = case()
    wanted, found = (
        torch.autograd.grad(getattr(distill_loss(states, *rest, a=0.5, temperature=0.5), part), rest[0])
        for states in (hidden, hidden.detach())
    )
    torch.testing.assert_close(found, wanted)


def test_without_gradients_the_values_are_the_same():
    inputs = case()
    with torch.no_grad():
        quiet = distill_loss(*inputs, a=0.5, temperature=0.5)
    assert not quiet.total.requires_grad
    assert torch.equal(quiet.total, distill_loss(*inputs, a=0.5, temperature=0.5).total)


def test_autocast_does_not_touch_the_loss():
    inputs = case(dtype=torch.float32)
    plain = distill_loss(*inputs, a=0.5, temperature=0.5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = distill_loss(*inputs, a=0.5, temperature=0.5)
        margins = confidence_margin(*inputs[3:])
    assert torch.equal(plain.total, cast.total) and torch.equal(margins[0], confidence_margin(*inputs[3:])[0])
    for one, other in zip(gradients(plain.total, inputs), gradients(cast.total, inputs), strict=True):
        assert torch.equal(one, other)


def test_extreme_logits_stay_finite():
    inputs = case(dtype=torch.float32, scale=12.0)
    for divergence in DIVERGENCES:
        loss = distill_loss(*inputs, a=0.5, temperature=0.25, divergence=divergence)
        assert all(value.isfinite() for value in loss)
        assert all(gradient.isfinite().all() for gradient in gradients(loss.total, inputs))


def test_logits_are_never_held_for_more_than_a_chunk(monkeypatch):
    """No tensor with more rows than a chunk and as wide as the vocabulary is ever made."""
    from torch.utils._python_dispatch import TorchDispatchMode

    widest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal widest
            made = func(*args, **(kwargs or {}))
            for tensor in made if isinstance(made, tuple | list) else [made]:
                if isinstance(tensor, torch.Tensor) and tensor.ndim == 2 and tensor.shape[1] in (31, 37):
                    widest = max(widest, tensor.shape[0])
            return made

    inputs = case(n=12)
    with Watch():
        distill_loss(*inputs, a=0.5, temperature=0.5, chunk_size=4).total.backward()
    assert widest == 6 or widest <= 4, widest  # [Ht, Vt] is the transposed teacher head


# --- the teacher's confidence


@settings(max_examples=30, deadline=None)
@given(n=st.integers(0, 9), chunk=st.integers(1, 5))
def test_confidence_and_margin_are_those_of_the_whole_softmax(n, chunk):
    *_, teacher, head = case(n=n)
    p1, margin, entropy = confidence_margin(teacher, head, chunk_size=chunk)
    p = (teacher @ head.T).softmax(1)
    top = p.topk(2, dim=1).values
    torch.testing.assert_close(p1, top[:, 0])
    torch.testing.assert_close(margin, top[:, 0] - top[:, 1])
    torch.testing.assert_close(entropy, -(p * p.log()).sum(1))


def test_confidence_of_a_teacher_that_knows_nothing_and_one_that_is_certain():
    head = torch.eye(4)
    p1, margin, entropy = confidence_margin(torch.tensor([[0.0, 0, 0, 0], [900.0, 0, 0, 0]]), head)
    assert p1.tolist() == pytest.approx([0.25, 1.0]) and margin.tolist() == pytest.approx([0.0, 1.0])
    assert entropy.tolist() == pytest.approx([math.log(4), 0.0])


# --- top-k with the tail as one bucket


def top_k(inputs, k, temperature, vocabulary, chunk=64):
    """The teacher's top k, their ids, and the tail of exactly this temperature."""
    top, ids, _ = top_k_logits(*inputs[3:], k=k, vocabulary=vocabulary, chunk_size=chunk)
    logits = (inputs[3] @ inputs[4][:vocabulary].T).scatter(1, ids, -torch.inf)
    return top, ids, (logits / temperature).logsumexp(1)


def bucketed_oracle(inputs, k, *, temperature, divergence, a, jsd_beta=0.5):
    """Coarsen both distributions to k + 1 outcomes, then let the oracle take their logarithms for logits."""
    hidden, head, targets, teacher, teacher_head = inputs
    common = min(len(head), len(teacher_head))
    p = (teacher @ teacher_head[:common].T / temperature).softmax(1)
    q = (hidden @ head[:common].T / temperature).softmax(1)
    ids = p.topk(k, dim=1).indices

    def coarse(x):
        rest = x.scatter(1, ids, 0.0).sum(1, keepdim=True)  # 1 - top.sum() would cancel a small tail away
        return torch.cat([x.gather(1, ids), rest], dim=1).log()

    eye = torch.eye(k + 1, dtype=p.dtype)
    zero = torch.zeros(len(p), dtype=torch.long)
    kd = oracle_loss(
        coarse(q), eye, zero, coarse(p), eye, a=a, temperature=1.0, divergence=divergence, jsd_beta=jsd_beta
    ).kd
    ce = torch.nn.functional.cross_entropy(hidden @ head.T, targets)
    return (a * kd + ce) / (1 + a)


@settings(max_examples=60, deadline=None)
@given(
    k=st.integers(1, 12),
    vt=st.integers(13, 40),
    temperature=st.floats(0.3, 3),
    divergence=st.sampled_from(DIVERGENCES),
    chunk=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_top_k_is_the_divergence_of_the_coarsened_distributions(k, vt, temperature, divergence, chunk, seed):
    inputs = case(vt=vt, seed=seed)
    common = min(31, vt)
    method = {"temperature": temperature, "divergence": divergence, "a": 0.5}
    small = top_k(inputs, k, temperature, common, chunk)
    ours = distill_loss_topk(*inputs[:3], *small, vocabulary=common, chunk_size=chunk, **method).total
    truth = bucketed_oracle(inputs, k, **method)
    torch.testing.assert_close(ours, truth, rtol=1e-7, atol=1e-7)
    for one, other in zip(gradients(ours, inputs), gradients(truth, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


def test_top_k_is_exact_when_only_one_token_is_left_over_and_a_lower_bound_before():
    inputs = case(v=20, vt=20)
    exact = distill_loss(*inputs, a=1.0, temperature=0.5).kd

    def at(k):
        small = top_k(inputs, k, 0.5, 20)
        return distill_loss_topk(*inputs[:3], *small, vocabulary=20, a=1.0, temperature=0.5).kd.item()

    kds = [at(k) for k in (1, 4, 8, 16, 19)]
    assert kds == sorted(kds) and kds[-1] == pytest.approx(exact.item())


@settings(max_examples=60, deadline=None)
@given(
    temperature=st.floats(COOLEST, HOTTEST),
    scale=st.floats(0.1, 10),
    vocabulary=st.integers(12, 400),
    seed=st.integers(0, 99),
)
def test_the_tails_mass_is_known_at_any_temperature(temperature, scale, vocabulary, seed):
    _, _, _, teacher, head = case(vt=vocabulary, seed=seed)
    teacher = teacher * scale / 6**0.5
    _, ids, tails = top_k_logits(teacher, head, k=8, vocabulary=vocabulary)
    rest = (teacher @ head.T).scatter(1, ids, -torch.inf)
    torch.testing.assert_close(
        tail_at(tails, temperature), (rest / temperature).logsumexp(1), atol=2e-3, rtol=0
    )


def test_a_temperature_without_tails_is_refused():
    with pytest.raises(ValueError, match=r"from 0\.2 to 5"):
        tail_at(torch.zeros(2, 12), 0.1)


def test_whole_logits_are_the_states_they_came_from():
    inputs = case(vt=37)
    method = {"a": 0.5, "temperature": 0.7, "divergence": "jsd", "chunk_size": 3}
    exact = distill_loss(*inputs, **method)
    given_logits = distill_loss_logits(*inputs[:3], inputs[3] @ inputs[4].T, **method)
    for one, other in zip(exact, given_logits, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)
    found = zip(gradients(exact.total, inputs), gradients(given_logits.total, inputs), strict=True)
    for one, other in found:
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)
    with pytest.raises(ValueError, match="6 teacher states for 7"):
        distill_loss_logits(*inputs[:3], torch.zeros(6, 37), a=0.5, temperature=1.0)


def test_top_k_without_tokens():
    inputs = case(n=0)
    small = top_k(inputs, 4, 0.5, 31)
    loss = distill_loss_topk(*inputs[:3], *small, vocabulary=31, a=0.5, temperature=0.5)
    assert loss.total.item() == 0 and loss.total.requires_grad


# --- what they refuse


@pytest.mark.parametrize(
    "change, message",
    [
        ({"a": -0.1}, "a must be"),
        ({"a": math.nan}, "a must be"),
        ({"temperature": 0.0}, "temperature"),
        ({"divergence": "kl"}, "divergence must be one of"),
        ({"divergence": "jsd", "jsd_beta": 1.0}, "jsd_beta"),
        ({"divergence": "jsd", "jsd_beta": 0.0}, "jsd_beta"),
        ({"divergence": "jsd", "jsd_beta": -0.5}, "jsd_beta"),
        ({"chunk_size": 0}, "chunk_size"),
    ],
)
def test_parameters_out_of_range_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        distill_loss(*case(), **{"a": 0.5, "temperature": 0.5, **change})


def test_a_beta_that_only_jsd_reads_is_only_checked_for_it():
    for divergence in ("forward_kl", "reverse_kl"):
        found = distill_loss(*case(), a=0.5, temperature=0.5, divergence=divergence, jsd_beta=1.0)
        assert found.total.isfinite()


def test_parts_of_a_top_k_that_do_not_fit_are_refused():
    inputs = case()
    top, ids, tail = top_k(inputs, 4, 0.5, 31)
    cut = [(top[:, :3], ids, tail), (top[:6], ids[:6], tail), (top, ids, tail[:6])]
    for parts in (*cut, (top, ids, tail[:, None])):
        with pytest.raises(ValueError, match=r"top_logits, top_ids and tail must be"):
            distill_loss_topk(*inputs[:3], *parts, vocabulary=31, a=0.5, temperature=0.5)
    for vocabulary in (4, 32):
        with pytest.raises(ValueError, match="k < vocabulary <= 31"):
            distill_loss_topk(*inputs[:3], top, ids, tail, vocabulary=vocabulary, a=0.5, temperature=0.5)


def test_shapes_that_do_not_fit_are_refused():
    hidden, head, targets, teacher, teacher_head = case()
    run = partial(distill_loss, a=0.5, temperature=0.5)
    for inputs, message in [
        ((hidden, head[:, :4], targets, teacher, teacher_head), r"\[N, H\]"),
        ((hidden[None], head, targets, teacher, teacher_head), r"\[N, H\]"),
        ((hidden[0], head, targets, teacher, teacher_head), r"\[N, H\]"),
        ((hidden[:5][None], head, targets[:1], teacher[:1], teacher_head), r"\[N, H\]"),
        ((hidden, head, targets[:3], teacher, teacher_head), "targets"),
        ((hidden, head, targets - 100, teacher, teacher_head), "select answer tokens"),
        ((hidden, head, targets + 31, teacher, teacher_head), "targets must lie"),
        ((hidden, head, targets, teacher[:3], teacher_head), "3 teacher states for 7"),
        ((hidden, head, targets, teacher, teacher_head[:, :2]), "teacher_"),
    ]:
        with pytest.raises(ValueError, match=message):
            run(*inputs)
    with pytest.raises(ValueError, match="vocabulary"):
        top_k_logits(teacher, teacher_head, k=37, vocabulary=37)
