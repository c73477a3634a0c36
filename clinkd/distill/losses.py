"""Distillation and answer losses from hidden states, without ever holding the logits of all tokens.

Decisions:
- The caller selects the answer tokens; the heads are applied to them alone, chunk by chunk, in float32
  (float64 if the hidden states are), also under autocast. What is alive at once is a few [chunk, V] buffers.
- The forward pass already works out the gradient, by written-out formulas (divergences.py): nothing is
  recomputed in the backward pass, and a head sharded by ZeRO is needed once per step, in the forward pass.
  Each formula is held against an independent float64 oracle by certificate.py.
- The head's gradient is summed over chunks in float32 and rounded to the parameter's type once.
- Sums are divided by `normalizer`: the answer tokens of all ranks and accumulation steps, else this call's N.
  A rank with nothing to say gets a zero that still has a gradient (of zeros), so collectives stay in step.
- KL and CE look at the same rows: `hidden` are the states that *predict* `targets`.
- Vocabularies of unequal size meet on their common prefix; both distributions are renormalised over it. The
  cross-entropy keeps the student's whole vocabulary.
- No hidden T**2: `scale_t2` multiplies KD (the reported one too) by it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clinkd.distill.divergences import DIVERGENCES

# (student logits [n, V], rows) -> (sum of KD over the rows, its gradient by logits[:, :C] as [n, C])
Pull = Callable[[Tensor, slice], tuple[Tensor, Tensor]]

CHUNK_SIZE = 64


class DistillLoss(NamedTuple):
    """Scalars, each differentiable: ``total`` = (a * kd + ce) / (1 + a)."""

    total: Tensor
    kd: Tensor
    ce: Tensor


def distill_loss(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    teacher_hidden: Tensor,
    teacher_head_weight: Tensor,
    *,
    a: float,
    temperature: float,
    divergence: str = "forward_kl",
    chunk_size: int = CHUNK_SIZE,
    normalizer: Tensor | float | None = None,
    scale_t2: bool = False,
    jsd_beta: float = 0.5,
) -> DistillLoss:
    """(a * KD(teacher, student; T) + CE) / (1 + a) over N answer tokens, exact (design, section 4; ClinKD).

    Args:
        hidden: [N, H] student states that predict the targets.
        head_weight: [V, H] student head.
        targets: [N] token ids below V.
        teacher_hidden: [N, Ht] teacher states at the same tokens; no gradient flows into the teacher.
        teacher_head_weight: [Vt, Ht].
        a: weight of KD against CE, at least 0.
        temperature: divides both logits inside KD, above 0.
        divergence: "forward_kl" KL(teacher || student); "reverse_kl" KL(student || teacher); "jsd"
            generalised Jensen-Shannon beta * KL(p || m) + (1 - beta) * KL(q || m), m = beta * p + (1 - beta)
            * q (Agarwal et al. 2024, GKD, eq. 1), p the teacher, q the student.
        chunk_size: tokens whose logits are held at once.
        normalizer: what the sums are divided by instead of N; 0 gives 0.
        scale_t2: multiply KD by T**2 (Hinton et al. 2015).
        jsd_beta: beta of "jsd", strictly between 0 and 1.

    Returns:
        Three scalars in float32 (float64 for float64 states), in nats per token.

    Raises:
        ValueError: a parameter or target out of range, or shapes that do not fit.
    """
    check_inputs(teacher_hidden, teacher_head_weight, None, chunk_size, "teacher_")
    common = min(len(head_weight), len(teacher_head_weight))
    states, head = teacher_hidden.detach(), teacher_head_weight.detach()[:common]

    def logits() -> Callable[[slice], Tensor]:
        wide = head.to(compute_type(hidden))
        return lambda rows: states[rows].to(wide.dtype) @ wide.T

    kd = _Divergence(divergence, temperature, scale_t2, jsd_beta)
    return _exact(hidden, head_weight, targets, len(states), common, logits, kd, a, chunk_size, normalizer)


def distill_loss_logits(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    teacher_logits: Tensor,
    *,
    a: float,
    temperature: float,
    divergence: str = "forward_kl",
    chunk_size: int = CHUNK_SIZE,
    normalizer: Tensor | float | None = None,
    scale_t2: bool = False,
    jsd_beta: float = 0.5,
) -> DistillLoss:
    """As :func:`distill_loss`, from a teacher's whole logits [N, Vt], for one that shows nothing else."""
    if teacher_logits.ndim != 2:
        raise ValueError(f"distillation loss: teacher_logits {tuple(teacher_logits.shape)} must be [N, Vt]")
    given = teacher_logits.detach()
    common = min(len(head_weight), given.shape[1])

    def logits() -> Callable[[slice], Tensor]:
        return lambda rows: given[rows, :common].to(compute_type(hidden))

    kd = _Divergence(divergence, temperature, scale_t2, jsd_beta)
    return _exact(hidden, head_weight, targets, len(given), common, logits, kd, a, chunk_size, normalizer)


def distill_loss_topk(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    top_logits: Tensor,
    top_ids: Tensor,
    tail: Tensor,
    *,
    vocabulary: int,
    a: float,
    temperature: float,
    divergence: str = "forward_kl",
    chunk_size: int = CHUNK_SIZE,
    normalizer: Tensor | float | None = None,
    scale_t2: bool = False,
    jsd_beta: float = 0.5,
) -> DistillLoss:
    """As :func:`distill_loss`, from the teacher's k largest logits and one bucket for all other tokens.

    Both distributions are coarsened to k + 1 outcomes, so no mass is lost or clamped; the divergence is a
    lower bound of the exact one. Take the inputs from :func:`clinkd.distill.summary.top_k_logits`.

    Args:
        top_logits, top_ids: [N, k] teacher logits and their ids, all below ``vocabulary``.
        tail: [N] log-sum-exp of (logit / T) over the other tokens below ``vocabulary``, *for this
            temperature* (``summary.tail_at``).
        vocabulary: length of the common prefix of both vocabularies.
    """
    check_inputs(hidden, head_weight, targets, chunk_size)
    kd = _Divergence(divergence, temperature, scale_t2, jsd_beta)
    if top_logits.shape != top_ids.shape or len(top_ids) != len(hidden) or tail.shape != (len(hidden),):
        raise ValueError("distillation loss: top_logits, top_ids and tail must be [N, k], [N, k] and [N]")
    if not top_ids.shape[1] < vocabulary <= len(head_weight):
        bounds = f"k < vocabulary <= {len(head_weight)}"
        raise ValueError(f"distillation loss: {bounds} must hold, not {vocabulary}")

    def bucketed() -> Pull:
        dtype = compute_type(hidden)
        top_scaled = top_logits.detach().to(dtype) / temperature
        known = torch.cat([top_scaled, tail.detach().to(dtype)[:, None]], dim=1)

        def pull(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
            ids = top_ids[rows]
            z = logits[:, :vocabulary] / temperature
            top = z.gather(1, ids)
            z.scatter_(1, ids, -torch.inf)
            rest = z.logsumexp(1, keepdim=True)
            value, slope = kd(known[rows].log_softmax(1), torch.cat([top, rest], dim=1).log_softmax(1))
            # The tail's logit is the log-sum-exp of its tokens: each gets its share of the slope.
            spread = (z - rest).exp_().mul_(slope[:, -1:]).scatter_(1, ids, slope[:, :-1])
            return value, spread.div_(temperature)

        return pull

    return _loss(hidden, head_weight, targets, bucketed, a, chunk_size, normalizer)


def answer_loss(
    hidden: Tensor,
    head_weight: Tensor,
    targets: Tensor,
    *,
    chunk_size: int = CHUNK_SIZE,
    normalizer: Tensor | float | None = None,
) -> Tensor:
    """Cross-entropy over N answer tokens, for stages without a teacher; see :func:`distill_loss`."""
    check_inputs(hidden, head_weight, targets, chunk_size)
    return _loss(hidden, head_weight, targets, None, 0.0, chunk_size, normalizer).ce


def _exact(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    taught: int,
    common: int,
    logits: Callable[[], Callable[[slice], Tensor]],
    kd: _Divergence,
    a: float,
    chunk_size: int,
    normalizer: Tensor | float | None,
) -> DistillLoss:
    """The loss against ``taught`` rows of the teacher's logits over the ``common`` tokens, chunk by chunk."""
    check_inputs(hidden, weight, targets, chunk_size)
    if taught != len(hidden):
        raise ValueError(f"distillation loss: {taught} teacher states for {len(hidden)} student states")

    def exact() -> Pull:
        teacher = logits()

        def pull(own: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
            log_p = teacher(rows).div(kd.temperature).log_softmax(1)
            value, slope = kd(log_p, own[:, :common].div(kd.temperature).log_softmax(1))
            return value, slope.div_(kd.temperature)

        return pull

    return _loss(hidden, weight, targets, exact, a, chunk_size, normalizer)


def compute_type(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def chunked_logits(hidden: Tensor, weight: Tensor, chunk_size: int) -> Iterator[Tensor]:
    """Logits [n, V] of one chunk after the other."""
    wide = weight.to(compute_type(hidden))
    for chunk in hidden.split(chunk_size) if len(hidden) else ():
        with torch.autocast(hidden.device.type, enabled=False):
            logits = chunk.to(wide.dtype) @ wide.T
        yield logits


def check_inputs(
    hidden: Tensor, weight: Tensor, targets: Tensor | None, chunk_size: int, whose: str = ""
) -> None:
    """Refuses shapes and targets that do not fit; ``whose`` names them in the message."""
    if hidden.ndim != 2 or weight.ndim != 2 or hidden.shape[1] != weight.shape[1]:
        shapes = f"{whose}hidden {tuple(hidden.shape)} and {whose}head_weight {tuple(weight.shape)}"
        raise ValueError(f"distillation loss: {shapes} must be [N, H] and [V, H]")
    if chunk_size < 1:
        raise ValueError(f"distillation loss: chunk_size must be at least 1, not {chunk_size}")
    if targets is None:
        return
    if targets.shape != (len(hidden),):
        raise ValueError(f"distillation loss: targets {tuple(targets.shape)} for {len(hidden)} states")
    if len(targets) and not bool(((targets >= 0) & (targets < len(weight))).all()):
        raise ValueError(f"distillation loss: targets must lie in [0, {len(weight)}); select answer tokens")


@dataclass(frozen=True)
class _Divergence:
    """Divergence of p (teacher) and q (student): value, and slope by the logits that q is the softmax of."""

    kind: str
    temperature: float
    scale_t2: bool
    beta: float

    def __post_init__(self) -> None:
        if self.kind not in DIVERGENCES:
            known = ", ".join(DIVERGENCES)
            raise ValueError(f"distillation loss: divergence must be one of {known}, not {self.kind!r}")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(f"distillation loss: temperature must be above 0, not {self.temperature}")
        if self.kind == "jsd" and not 0 < self.beta < 1:
            raise ValueError(f"distillation loss: jsd_beta must lie between 0 and 1, not {self.beta}")

    def __call__(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities [n, C], used up -> (sum over rows, slope [n, C])."""
        value, slope = DIVERGENCES[self.kind](log_p, log_q, self.beta)
        if self.scale_t2:
            value, slope = value * self.temperature**2, slope.mul_(self.temperature**2)
        return value, slope


def _loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    teacher: Callable[[], Pull] | None,
    a: float,
    chunk_size: int,
    normalizer: Tensor | float | None,
) -> DistillLoss:
    if a < 0 or not math.isfinite(a):
        raise ValueError(f"distillation loss: a must be a finite number of at least 0, not {a}")
    count = torch.as_tensor(len(hidden) if normalizer is None else normalizer, device=hidden.device).detach()
    count = count.to(compute_type(hidden))
    scale = torch.where(count > 0, count, 1).reciprocal() * (count > 0)
    plan = _Plan(teacher, a, chunk_size, scale, torch.is_grad_enabled())
    found = _ChunkedLoss.apply(hidden, weight, targets, plan)  # type: ignore[no-untyped-call]  # torch's
    return DistillLoss(*found)


@dataclass(frozen=True)
class _Plan:
    teacher: Callable[[], Pull] | None  # prepares the teacher's head and gives its pull
    a: float
    chunk_size: int
    scale: Tensor  # one over the normaliser
    gradients: bool


class _ChunkedLoss(torch.autograd.Function):
    """(total, kd, ce). Gradients of total come from the forward pass; those of kd or ce cost another."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, plan: _Plan) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(hidden, weight, targets)
        ctx.plan = plan
        needs = (plan.gradients and ctx.needs_input_grad[0], plan.gradients and ctx.needs_input_grad[1])
        share = plan.scale / (1 + plan.a)
        kd, ce, *ctx.ready = _pass(hidden, weight, targets, plan, share * plan.a, share, needs)
        kd, ce = kd * plan.scale, ce * plan.scale
        return (plan.a * kd + ce) / (1 + plan.a), kd, ce

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, total: Tensor | None, kd: Tensor | None, ce: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors
        if ctx.ready is not None and total is not None and kd is None and ce is None:
            # Scaled in place to save a [V, H] buffer: a second backward pass starts afresh.
            by_hidden, by_weight = (None if slope is None else slope.mul_(total) for slope in ctx.ready)
            ctx.ready = None
        else:
            zero = torch.zeros_like(ctx.plan.scale)
            shared = (zero if total is None else total) / (1 + ctx.plan.a)
            by_kd = ((zero if kd is None else kd) + ctx.plan.a * shared) * ctx.plan.scale
            by_ce = ((zero if ce is None else ce) + shared) * ctx.plan.scale
            needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1])
            _, _, by_hidden, by_weight = _pass(hidden, weight, targets, ctx.plan, by_kd, by_ce, needs)
        return (
            None if by_hidden is None else by_hidden.to(hidden.dtype),
            None if by_weight is None else by_weight.to(weight.dtype),
            None,
            None,
        )


def _pass(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    plan: _Plan,
    by_kd: Tensor,
    by_ce: Tensor,
    needs: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Sums of KD and CE over all chunks, and the gradient of by_kd * KD + by_ce * CE where needed."""
    dtype = compute_type(hidden)
    wide = weight.to(dtype)
    kd, ce = torch.zeros(2, dtype=dtype, device=hidden.device)
    by_hidden = torch.empty(hidden.shape, dtype=dtype, device=hidden.device) if needs[0] else None
    by_weight = torch.zeros_like(wide) if needs[1] else None
    with torch.autocast(hidden.device.type, enabled=False):
        pull = plan.teacher() if plan.teacher is not None and len(hidden) else None
        for begin in range(0, len(hidden), plan.chunk_size):
            rows = slice(begin, begin + plan.chunk_size)
            states, wanted = hidden[rows].to(dtype), targets[rows, None]
            logits = states @ wide.T
            total = logits.logsumexp(1, keepdim=True)
            ce = ce + (total - logits.gather(1, wanted)).sum()
            value, slope = pull(logits, rows) if pull else (None, None)
            kd = kd if value is None else kd + value
            if not any(needs):
                continue
            # d CE / d logits = softmax - onehot, built in the place of the logits.
            grad = logits.sub_(total).exp_()
            grad.scatter_add_(1, wanted, grad.new_full(wanted.shape, -1.0)).mul_(by_ce)
            if slope is not None:
                grad[:, : slope.shape[1]].add_(slope.mul_(by_kd))
            if by_hidden is not None:
                by_hidden[rows] = grad @ wide
            if by_weight is not None:
                by_weight.addmm_(grad.T, states)
    return kd, ce, by_hidden, by_weight
