"""Rotary positions of one sequence (text, an image, text) for the report's position maps.

Decisions:
- The formula of the guided rotary index is written out again here, in NumPy and for one segment: the report
  draws what the formula says, and needs no torch to say it. The model's own index is the test's oracle.
- Sums run in float64 over increments rounded to 2**-24 and relevance is added up in the order of the patches,
  as the model does, so that the numbers on the page are the model's own bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from clinkd.report.tables import number

MODES = ("none", "pair", "patch")
QUANTUM = 2.0**-24
SMALLEST_STEP = 1 / 64  # of α: the least that patch guidance leaves of a step


@dataclass(frozen=True)
class Guidance:
    """λ (gap between text and image), α (step of rows and columns), γ (strength) and what γ guides."""

    lambda_h: float = 1.0
    lambda_w: float = 1.0
    alpha_h: float = 1.0
    alpha_w: float = 1.0
    gamma: float = 0.0
    mode: str = "none"

    @classmethod
    def of(cls, values: Mapping[str, object]) -> Guidance:
        """From a configuration's own keys; what it does not name, or names wrongly, is plain.

        A configuration without a mode is one of pair guidance, the configuration's own default.
        """
        found = {key: number(values.get(key)) for key in cls.__dataclass_fields__ if key != "mode"}
        kept = {
            key: value
            for key, value in found.items()
            if value is not None and (value > 0 or (key == "gamma" and value == 0))
        }
        mode = str(values.get("mode", "pair"))
        return cls(**kept, mode=mode if mode in MODES else "none")

    @property
    def guided(self) -> str:
        """The mode that takes effect: "none" when γ is 0."""
        return self.mode if self.gamma > 0 else "none"

    def widening(self, alignment: float | None) -> float:
        """What λ is multiplied by, for an image that fits its question by ``alignment`` in [0, 1]."""
        return 1 + self.gamma * (1 - alignment) if self.guided == "pair" and alignment is not None else 1.0


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


def lay_out(
    before: int,
    grid: tuple[int, int, int],
    after: int,
    guidance: Guidance,
    *,
    alignment: float | None = None,
    relevance: np.ndarray | None = None,
) -> Layout:
    """Positions of ``before`` text tokens, (frames, rows, columns) merged patches and ``after`` text tokens.

    With the preceding token at p, patch (f, r, c) gets p + (λt + f, λh + y(r), λw + x(c)), λt = (λh + λw)/2,
    y and x as in ``offsets``; a segment that opens the sequence starts at 0. Text goes on at the segment's
    largest coordinate + max(λh, λw).

    Args:
        alignment: s in [0, 1] of image and question; pair guidance multiplies λ by 1 + γ(1 − s).
        relevance: [patches] in [0, 1], in the order of the patches; patch guidance stretches by it.
        What the guidance asks for and is None leaves the image unguided.
    """
    if not np.prod(grid):
        return Layout(_text(0.0, before), np.zeros((3, 0), np.float32), _text(float(before), after))
    wide = guidance.widening(alignment)
    gaps = np.array([(guidance.lambda_h + guidance.lambda_w) / 2, guidance.lambda_h, guidance.lambda_w])
    gaps = _rounded(gaps * wide)
    lead = gaps if before else np.zeros(3)
    rows, columns = offsets(grid, guidance, relevance)
    place = np.indices(grid).reshape(3, -1)
    corner = max(before - 1, 0) + lead[:, None]
    vision = corner + np.stack([place[0].astype(float), rows[place[1]], columns[place[2]]])
    start = float(vision.max() + gaps[1:].max())
    return Layout(_text(0.0, before), vision.astype(np.float32), _text(start, after))


def offsets(
    grid: tuple[int, int, int], guidance: Guidance, relevance: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """How far rows [rows] and columns [columns] stand from the segment's first corner, float64.

    Even steps of α; under patch guidance the step that leads to row r is αh·(1 + γ(ρr − mean ρ)), ρr the mean
    relevance of its patches, and never less than αh/64. Columns likewise.
    """
    made = []
    for axis, alpha in ((1, guidance.alpha_h), (2, guidance.alpha_w)):
        if guidance.guided == "patch" and relevance is not None:
            rho = line_means(grid, relevance, axis)
            factor = 1 + guidance.gamma * (rho - _added(rho) / len(rho))
            reached = _rounded(alpha * np.maximum(factor, SMALLEST_STEP)).cumsum()
            made.append(reached - reached[0])
        else:
            made.append(_rounded(np.arange(grid[axis]) * alpha))
    return made[0], made[1]


def line_means(grid: tuple[int, int, int], relevance: np.ndarray, axis: int) -> np.ndarray:
    """Mean relevance of each row (axis 1) or column (axis 2), float64."""
    line = np.indices(grid)[axis].ravel()
    return np.bincount(line, relevance.astype(np.float64)) / (line.size // grid[axis])


def _added(values: np.ndarray) -> float:
    """One after the other: NumPy's own sum adds in pairs, and its last bit may differ."""
    return float(values.cumsum()[-1])


def _rounded(value: np.ndarray) -> np.ndarray:
    return np.round(value / QUANTUM) * QUANTUM


def _text(start: float, tokens: int) -> np.ndarray:
    return np.tile((start + np.arange(tokens)).astype(np.float32), (3, 1))
