"""Rotary positions of one small sequence, for the report's position map.

Decisions:
- The formula of the guided rotary index is written out again here, in NumPy and for one segment: the report
  draws what the formula says, and needs no torch to say it. The model's own index is checked against the same
  golden file.
- Patch guidance (steps that follow a relevance map) belongs to one image and is not drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Guidance:
    """λ (gap between text and vision), α (step of rows and columns), γ and the pair's alignment in [0, 1]."""

    lambda_h: float = 1.0
    lambda_w: float = 1.0
    alpha_h: float = 1.0
    alpha_w: float = 1.0
    gamma: float = 0.0
    score: float = 1.0  # Med-CLIP alignment of image and question; 1 leaves λ as it is

    @classmethod
    def of(cls, values: Mapping[str, object]) -> Guidance:
        """From a configuration's own keys; what it does not name, or gives no number for, is plain."""
        known = {key: values.get(key) for key in cls.__dataclass_fields__}
        return cls(**{key: float(value) for key, value in known.items() if isinstance(value, (int, float))})


PLAIN = Guidance()
RELEASED = Guidance(lambda_h=2.0, lambda_w=2.0)


@dataclass(frozen=True)
class Layout:
    """Positions (t, h, w) of a sequence's parts, each [3, tokens] float32."""

    before: np.ndarray
    vision: np.ndarray
    after: np.ndarray

    @property
    def last(self) -> float:
        """The largest coordinate of the sequence."""
        return max(
            (float(part.max()) for part in (self.before, self.vision, self.after) if part.size), default=0.0
        )


def lay_out(before: int, grid: tuple[int, int, int], after: int, guidance: Guidance) -> Layout:
    """Positions of ``before`` text tokens, (frames, rows, columns) merged patches and ``after`` text tokens.

    With the preceding token at p, patch (f, r, c) gets p + (λt + f, λh + αh·r, λw + αw·c), λt = (λh + λw)/2,
    and λ is multiplied by 1 + γ(1 − s); a segment that opens the sequence starts at 0. Text goes on at the
    segment's largest coordinate + max(λh, λw).
    """
    stretch = 1 + guidance.gamma * (1 - guidance.score)
    gap_h, gap_w = guidance.lambda_h * stretch, guidance.lambda_w * stretch
    frames, rows, columns = (axis.ravel() for axis in np.indices(grid))
    gaps = np.array([[(gap_h + gap_w) / 2], [gap_h], [gap_w]]) if before else np.zeros((3, 1))
    vision = (
        max(before - 1, 0) + gaps + np.stack([frames, guidance.alpha_h * rows, guidance.alpha_w * columns])
    )
    start = vision.max() + max(gap_h, gap_w) if vision.size else before
    return Layout(_text(0, before), vision.astype(np.float32), _text(start, after))


def _text(start: float, tokens: int) -> np.ndarray:
    return np.tile(np.arange(tokens, dtype=np.float32) + np.float32(start), (3, 1))
