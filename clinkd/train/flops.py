"""Floating-point operations of a training step, by formula: those of the model, however it is computed.

Decisions:
- Forward, a token costs 2 operations for each weight it is multiplied with (Kaplan et al. 2020,
  arXiv:2001.08361, section 2.1), and attention 4 x width for each pair of tokens and layer: scores and their
  use (Chowdhery et al. 2022, PaLM, arXiv:2204.02311, appendix B). Causal masks halve nothing, as there.
- Backward, gradients of what comes in cost that again (twice for attention), and gradients of the weights 2
  for each weight that trains. All trained, it is their 6 N + 12 L H Q T per token; a frozen tower is forward
  alone; frozen weights between adapters pass gradients through.
- What is computed again (checkpointing, chunks of logits) is no work of the model's, nor is padding, nor
  lookups, norms and activations.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Work:
    """A part of a model in one step.

    Args:
        tokens: that pass it.
        weights: elements of the matrices that each of them is multiplied with; trained: of those, that train.
        reached: whether gradients of what comes in are wanted.
        attention: sum over layers of (heads x head size) x (pairs of tokens that see each other).
    """

    tokens: int
    weights: int
    trained: int
    reached: bool
    attention: int = 0


def flops(parts: Iterable[Work]) -> float:
    """Operations forward and backward."""
    total = 0.0
    for part in parts:
        forward = 2.0 * part.weights * part.tokens
        total += forward + 4.0 * part.attention + 2.0 * part.trained * part.tokens
        if part.reached:
            total += forward + 8.0 * part.attention
    return total


def squares(length: int, window: int | None = None) -> int:
    """Sum of the squared sizes of the windows that ``length`` is cut into; None: of one over all of it."""
    if window is None:
        return length * length
    return length // window * window**2 + (length % window) ** 2


def image_pairs(grid: tuple[int, int, int], window: int | None = None) -> int:
    """Pairs of an image's patches that see each other: within a frame, or within its square windows.

    Args:
        grid: frames, rows, columns of patches. window: rows and columns of patches a window has.
    """
    frames, rows, columns = grid
    return frames * squares(rows, window) * squares(columns, window)
