"""Divergences of a teacher p and a student q, by the name that ``distill.divergence`` gives them.

Decisions:
- A formula gives its value and its slope by the logits z, q = softmax(z), written out: the loss works out its
  gradients in the forward pass (``losses``). Each is held against an independent one in float64
  (``certificate.ORACLES``) before a run trains, so a new one needs an oracle too.
- Formulas see log-probabilities that are theirs to use up; temperature and its square are the caller's.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

Formula = Callable[[Tensor, Tensor, float], tuple[Tensor, Tensor]]
"""(log p, log q [n, C], beta) -> (sum over the rows, slope by q's logits [n, C])."""

DIVERGENCES: dict[str, Formula] = {}


def divergence(name: str) -> Callable[[Formula], Formula]:
    """Registers a formula under a name.

    Raises:
        ValueError: the name is taken.
    """
    if name in DIVERGENCES:
        raise ValueError(f"distillation loss: there is a divergence {name} already")

    def add(formula: Formula) -> Formula:
        DIVERGENCES[name] = formula
        return formula

    return add


def toward(q: Tensor, gap: Tensor) -> tuple[Tensor, Tensor]:
    """Slope q * (gap - E_q[gap]) of E_q[gap], for a gap whose own slope has no mean, and that mean [n, 1]."""
    rows = (q * gap).sum(1, keepdim=True)
    return gap.sub_(rows).mul_(q), rows


@divergence("forward_kl")
def forward_kl(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """KL(p || q); slope q - p."""
    p = log_p.exp()
    value = log_p.sub_(log_q).mul_(p).sum()
    return value, log_q.exp_().sub_(p)


@divergence("reverse_kl")
def reverse_kl(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """KL(q || p)."""
    slope, rows = toward(log_q.exp(), log_q.sub_(log_p))
    return rows.sum(), slope


@divergence("jsd")
def jsd(log_p: Tensor, log_q: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """beta KL(p || m) + (1 - beta) KL(q || m), m = beta p + (1 - beta) q (Agarwal et al. 2024, eq. 1)."""
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    value = (log_p.exp() * log_p.sub(log_m)).sum() * beta
    # The slopes of log m cancel: m is the mixture itself.
    slope, rows = toward(log_q.exp(), log_q.sub_(log_m).mul_(1 - beta))
    return value + rows.sum(), slope
