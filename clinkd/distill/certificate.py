"""The loss certificate: the configured loss against a plain float64 oracle, value and gradient, before a run.

Decisions:
- The oracle shares no code with losses.py: whole logits, log_softmax and autograd in float64, formulas as in
  the design. It sees the same inputs as the loss, already rounded to the run's type, so only arithmetic is
  compared.
- The cases are those that go wrong in practice: unequal vocabularies either way, one token, none, a last
  chunk that is not full, a batch split over two ranks of which one may be all masked, far-off teachers, a
  self-teacher.
- Errors are relative: of the value to max(1, |oracle|), of a gradient to the oracle's largest entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from clinkd.distill.losses import (
    CHUNK_SIZE,
    DistillLoss,
    distill_loss,
    distill_loss_logits,
    distill_loss_topk,
)
from clinkd.distill.summary import tail_at, top_k_logits

# (student vocabulary, teacher vocabulary, answer tokens of each rank, scale of the states)
CASES: tuple[tuple[int, int, tuple[int, ...], float], ...] = (
    (37, 37, (7,), 1.0),
    (37, 41, (5,), 1.0),
    (41, 37, (5,), 1.0),
    (37, 29, (1,), 2.0),
    (53, 61, (CHUNK_SIZE + 3,), 1.0),
    (37, 37, (0,), 1.0),
    (37, 41, (6, 0), 1.0),
    (41, 37, (3, 8), 2.5),
)
# Gradients are handed back in the parameters' type: half a unit in its last place, and some room.
VALUE_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}
GRADIENT_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 8e-3, torch.float16: 1e-3}


TOP = 8  # logits kept where the teacher comes as top-k
Given = Literal["states", "topk", "logits"]
"""What the loss gets of the teacher."""


def _kl(log_x: Tensor, log_y: Tensor) -> Tensor:
    return (log_x.exp() * (log_x - log_y)).sum()


def _jsd(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    weighted = (log_p + math.log(beta), log_q + math.log(1 - beta))
    log_m = torch.logsumexp(torch.stack(weighted), dim=0)
    return beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)


ORACLES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "forward_kl": lambda log_p, log_q, beta: _kl(log_p, log_q),
    "reverse_kl": lambda log_p, log_q, beta: _kl(log_q, log_p),
    "jsd": _jsd,
}
"""Every divergence again, independently: (log p, log q [N, C], beta) -> the sum over all rows."""


def certify(
    *,
    a: float = 0.5,
    temperature: float = 0.5,
    divergence: str = "forward_kl",
    scale_t2: bool = False,
    jsd_beta: float = 0.5,
    chunk_size: int = CHUNK_SIZE,
    dtype: str = "float32",
    given: Given = "states",
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Hold the loss of a configuration against the oracle on small random cases.

    Args:
        a, temperature, divergence, scale_t2, jsd_beta, chunk_size: as the run will call ``distill_loss``.
        dtype: type of the states and heads: "float32", "bfloat16", "float16" or "float64".
        given: what the loss gets of the teacher; against "topk" the oracle sees the same buckets.
        seed: of the cases.

    Returns:
        ``ok``, ``max_value_error``, ``max_gradient_error`` (both relative), ``value_tolerance``,
        ``gradient_tolerance``, ``self_teacher_kd``, ``cases``, and ``failures`` (one line each).

    Raises:
        ValueError: an unknown dtype, or parameters that ``distill_loss`` refuses.
    """
    kind = getattr(torch, dtype, None)
    if kind not in VALUE_TOLERANCE:
        raise ValueError(f"certificate: dtype must be float32, bfloat16, float16 or float64, not {dtype!r}")
    method = {
        "a": a,
        "temperature": temperature,
        "divergence": divergence,
        "scale_t2": scale_t2,
        "jsd_beta": jsd_beta,
    }
    # Single precision rounds logits / T, which grow as T shrinks.
    room = max(1.0, 0.5 / temperature) if temperature > 0 else 1.0
    value_tolerance, gradient_tolerance = VALUE_TOLERANCE[kind] * room, GRADIENT_TOLERANCE[kind] * room
    generator = torch.Generator().manual_seed(seed)
    worst_value = worst_gradient = 0.0
    failures = []
    for case in CASES:
        value, gradient = _compare(case, method, chunk_size, kind, device, generator, given)
        worst_value, worst_gradient = max(worst_value, value), max(worst_gradient, gradient)
        if not (value <= value_tolerance and gradient <= gradient_tolerance):
            failures.append(f"case {case}: value off by {value:.2e}, gradient by {gradient:.2e}")
    own = _self_teacher(method, chunk_size, kind, device, generator)
    if not own <= value_tolerance:
        failures.append(f"self-teacher: KD is {own:.2e}, not 0")
    return {
        "ok": not failures,
        "loss": method | {"chunk_size": chunk_size, "dtype": dtype, "given": given},
        "max_value_error": worst_value,
        "max_gradient_error": worst_gradient,
        "value_tolerance": value_tolerance,
        "gradient_tolerance": gradient_tolerance,
        "self_teacher_kd": own,
        "cases": len(CASES) + 1,
        "failures": failures,
    }


def oracle_loss(
    hidden: Tensor,
    head: Tensor,
    targets: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    *,
    a: float,
    temperature: float,
    divergence: str,
    scale_t2: bool = False,
    jsd_beta: float = 0.5,
    normalizer: float | None = None,
    top_ids: Tensor | None = None,
) -> DistillLoss:
    """The loss as one would write it on a blackboard: float64, all logits at once, autograd's gradients.

    ``top_ids`` [N, k]: all other tokens count as one.
    """
    logits, teacher = hidden.double() @ head.double().T, teacher_hidden.double() @ teacher_head.double().T
    common = min(logits.shape[1], teacher.shape[1])
    log_q = torch.log_softmax(logits[:, :common] / temperature, dim=1)
    log_p = torch.log_softmax(teacher[:, :common] / temperature, dim=1)
    if top_ids is not None:
        log_q, log_p = (_bucketed(logs, top_ids) for logs in (log_q, log_p))

    kd = ORACLES[divergence](log_p, log_q, jsd_beta)
    if scale_t2:
        kd = kd * temperature**2
    count = len(hidden) if normalizer is None else normalizer
    ce = -torch.log_softmax(logits, dim=1).gather(1, targets[:, None]).sum()
    kd, ce = kd / max(count, 1), ce / max(count, 1)
    return DistillLoss((a * kd + ce) / (1 + a), kd, ce)


def _bucketed(logs: Tensor, ids: Tensor) -> Tensor:
    """[N, k + 1] log-probabilities of the tokens in ``ids`` and of all others together."""
    rest = logs.scatter(1, ids, -math.inf).logsumexp(1, keepdim=True)
    return torch.cat([logs.gather(1, ids), rest], dim=1)


def _compare(
    case: tuple[int, int, tuple[int, ...], float],
    method: dict[str, Any],
    chunk_size: int,
    kind: torch.dtype,
    device: str,
    generator: torch.Generator,
    given: Given,
) -> tuple[float, float]:
    """Relative errors (value, gradient) of one case: the ranks' losses are summed, as all-reduce would."""
    vocabulary, teacher_vocabulary, ranks, scale = case
    count = sum(ranks)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).to(device, kind)

    leaves = [draw(count, 8).requires_grad_(), draw(vocabulary, 8).requires_grad_()]
    teacher = [draw(count, 12), draw(teacher_vocabulary, 12)]
    targets = torch.randint(vocabulary, (count,), generator=generator).to(device)
    parts, begin = [], 0
    for size in ranks:
        rows = slice(begin, begin := begin + size)
        own = (leaves[0][rows], leaves[1], targets[rows])
        how = method | {"chunk_size": chunk_size, "normalizer": count}
        parts.append(_ours(given, own, (teacher[0][rows], teacher[1]), how))
    ids = None
    if given == "topk":
        common = min(vocabulary, teacher_vocabulary)
        ids = top_k_logits(teacher[0], teacher[1], k=TOP, vocabulary=common)[1]
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth = oracle_loss(wide[0], wide[1], targets, *teacher, normalizer=count, top_ids=ids, **method)
    sums = [torch.stack(same).sum() for same in zip(*parts, strict=True)]
    value = max(_error(mine.item(), his.item()) for mine, his in zip(sums, truth, strict=True))
    found = torch.autograd.grad(sums[0], leaves)
    wanted = torch.autograd.grad(truth.total, wide)
    gradients = [
        ((mine.double() - his).abs().max() / his.abs().max().clamp(min=1e-30)).item() if his.numel() else 0.0
        for mine, his in zip(found, wanted, strict=True)
    ]
    return value, max(error if math.isfinite(error) else math.inf for error in gradients)


def _ours(
    given: Given, own: tuple[Tensor, Tensor, Tensor], teacher: tuple[Tensor, Tensor], how: dict[str, Any]
) -> DistillLoss:
    if given == "states":
        return distill_loss(*own, *teacher, **how)
    if given == "logits":
        return distill_loss_logits(*own, teacher[0].double() @ teacher[1].double().T, **how)
    common = min(len(own[1]), len(teacher[1]))
    top, ids, tails = top_k_logits(*teacher, k=TOP, vocabulary=common)
    return distill_loss_topk(*own, top, ids, tail_at(tails, how["temperature"]), vocabulary=common, **how)


def _error(found: float, wanted: float) -> float:
    error = abs(found - wanted) / max(1.0, abs(wanted))
    return error if math.isfinite(error) else math.inf


def _self_teacher(
    method: dict[str, Any], chunk_size: int, kind: torch.dtype, device: str, generator: torch.Generator
) -> float:
    """|KD| of a student that is its own teacher."""
    hidden = torch.randn(9, 8, generator=generator).to(device, kind)
    head = torch.randn(37, 8, generator=generator).to(device, kind)
    targets = torch.randint(37, (9,), generator=generator).to(device)
    loss = distill_loss(hidden, head, targets, hidden, head, chunk_size=chunk_size, **method)
    return _error(float(loss.kd), 0.0)
