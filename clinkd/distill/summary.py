"""The teacher in small: how sure it is of each token, and its largest logits with the rest as one bucket.

Decisions:
- A bucket's mass depends on the temperature. Its log-sum-exp is kept at ``NODES`` temperatures (Chebyshev's
  in log T) and read at any other by barycentric interpolation (Berrut & Trefethen 2004) of T times it, which
  varies little: a cache of top-k logits then serves every temperature a sweep tries.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from clinkd.distill.losses import CHUNK_SIZE, check_inputs, chunked_logits, compute_type

COOLEST, HOTTEST, NODES = 0.2, 5.0, 12
"""Temperatures that tails are kept for; logits of a spread of 10 come out within 5e-4 of the log-mass."""


@torch.no_grad()
def confidence_margin(
    teacher_hidden: Tensor, teacher_head_weight: Tensor, *, chunk_size: int = CHUNK_SIZE
) -> tuple[Tensor, Tensor, Tensor]:
    """How sure the teacher is at each of N tokens, at T = 1 over its whole vocabulary.

    Args:
        teacher_hidden: [N, Ht]. teacher_head_weight: [Vt, Ht], Vt at least 2.

    Returns:
        p1 [N], the largest probability; margin [N], p1 - p2; entropy [N] in nats.
    """
    check_inputs(teacher_hidden, teacher_head_weight, None, chunk_size, "teacher_")
    found = [torch.empty(3, 0, dtype=compute_type(teacher_hidden), device=teacher_hidden.device)]
    for logits in chunked_logits(teacher_hidden, teacher_head_weight, chunk_size):
        p = logits.softmax(1)
        found.append(torch.cat([p.topk(2, dim=1).values.T, torch.special.entr(p).sum(1)[None]]))
    p1, p2, entropy = torch.cat(found, dim=1)
    return p1, p1 - p2, entropy


@torch.no_grad()
def target_log_probabilities(
    hidden: Tensor, head_weight: Tensor, targets: Tensor, *, chunk_size: int = CHUNK_SIZE
) -> Tensor:
    """[N] log-probability of each of N tokens, at T = 1; hidden [N, H], head_weight [V, H]."""
    check_inputs(hidden, head_weight, targets, chunk_size)
    found = [torch.empty(0, dtype=compute_type(hidden), device=hidden.device)]
    parts = zip(chunked_logits(hidden, head_weight, chunk_size), targets.split(chunk_size), strict=False)
    for logits, wanted in parts:
        found.append(logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(1))
    return torch.cat(found)


@torch.no_grad()
def top_k_logits(
    teacher_hidden: Tensor,
    teacher_head_weight: Tensor,
    *,
    k: int,
    vocabulary: int,
    chunk_size: int = CHUNK_SIZE,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of N tokens the k largest logits, their ids, and what :func:`tail_at` reads the others' mass from.

    Args:
        teacher_hidden: [N, Ht]. teacher_head_weight: [Vt, Ht].
        vocabulary: length of the common prefix of both vocabularies, above k.

    Returns:
        top_logits [N, k], top_ids [N, k], tails [N, NODES].
    """
    if not 0 < k < vocabulary <= len(teacher_head_weight):
        bounds = f"0 < k < vocabulary <= {len(teacher_head_weight)}"
        raise ValueError(f"top-k teacher: {bounds} must hold, not k = {k} and vocabulary = {vocabulary}")
    logits, ids, tails = [], [], []
    for chunk in chunked_logits(teacher_hidden, teacher_head_weight[:vocabulary], chunk_size):
        top, places = chunk.topk(k, dim=1)
        logits.append(top)
        ids.append(places)
        rest = chunk.scatter_(1, places, -torch.inf)
        tails.append(torch.stack([t * (rest / t).logsumexp(1) for t in _temperatures()], dim=1))
    if not logits:
        empty = teacher_hidden.new_zeros(0, k + NODES).to(compute_type(teacher_hidden))
        return empty[:, :k], empty[:, :k].long(), empty[:, k:]
    return torch.cat(logits), torch.cat(ids), torch.cat(tails)


def tail_at(tails: Tensor, temperature: float) -> Tensor:
    """[N] log-sum-exp of (logit / temperature) over the tokens that are not among the top k.

    Args:
        tails: [N, NODES] of :func:`top_k_logits`.

    Raises:
        ValueError: a temperature that no tail was kept for.
    """
    if not COOLEST <= temperature <= HOTTEST:
        raise ValueError(
            f"top-k teacher: tails are kept for temperatures from {COOLEST} to {HOTTEST}, not {temperature}"
        )
    place = (math.log(temperature) - math.log(COOLEST)) / math.log(HOTTEST / COOLEST) * 2 - 1
    nodes = _nodes()
    at = [number for number, node in enumerate(nodes) if abs(place - node) < 1e-12]
    if at:
        return tails[:, at[0]] / temperature
    # Barycentric weights of Chebyshev's nodes of the first kind.
    sines = [(-1) ** n * math.sin((2 * n + 1) * math.pi / (2 * NODES)) for n in range(NODES)]
    weights = tails.new_tensor([sine / (place - node) for sine, node in zip(sines, nodes, strict=True)])
    return (tails @ (weights / weights.sum())) / temperature


def _nodes() -> list[float]:
    """In [-1, 1]."""
    return [math.cos((2 * n + 1) * math.pi / (2 * NODES)) for n in range(NODES)]


def _temperatures() -> list[float]:
    return [COOLEST * (HOTTEST / COOLEST) ** ((node + 1) / 2) for node in _nodes()]
