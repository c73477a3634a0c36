"""Which pseudo-labels may be learned from, and when: the confidence-margin curriculum.

Decisions:
- The bar is a quantile of the margins at hand, not a margin: teachers differ in how sure they are, shares do
  not.
- It falls linearly and reaches its end at the last step. With an end quantile of 0 every sample has its turn.
- The bar is always one of the margins (numpy's "lower" quantile), so `margin >= bar` admits at least the
  share 1 - quantile and never depends on interpolation.
"""

from __future__ import annotations

import math

import numpy as np


def admitted_margin(
    step: int, total_steps: int, margins: np.ndarray, start_quantile: float, end_quantile: float
) -> float:
    """The smallest confidence margin that is admitted at a step; samples below it wait.

    Args:
        step: 0 .. total_steps - 1; beyond either end it counts as that end.
        total_steps: of the stage, at least 1. A stage of one step is at its end.
        margins: [samples] mean p1 - p2 of the teacher over each sample's answer tokens, in [0, 1].
        start_quantile: the bar's quantile at step 0. end_quantile: at the last step, at most start_quantile.

    Returns:
        A member of ``margins``; -inf where there are none (nothing waits). It never rises with ``step``.

    Raises:
        ValueError: quantiles not 0 <= end <= start <= 1, no steps, or a margin that is not a number.
    """
    if not 0 <= end_quantile <= start_quantile <= 1:
        given = f"start_quantile {start_quantile} and end_quantile {end_quantile}"
        raise ValueError(f"curriculum: 0 <= end <= start <= 1 must hold, not {given}")
    if total_steps < 1:
        raise ValueError(f"curriculum: total_steps must be at least 1, not {total_steps}")
    values = np.asarray(margins, dtype=np.float64)
    if np.isnan(values).any():
        raise ValueError(f"curriculum: {int(np.isnan(values).sum())} margins are not numbers")
    if values.size == 0:
        return -math.inf
    done = min(max(step / (total_steps - 1), 0.0), 1.0) if total_steps > 1 else 1.0
    quantile = (1 - done) * start_quantile + done * end_quantile
    return float(np.quantile(values, quantile, method="lower"))
