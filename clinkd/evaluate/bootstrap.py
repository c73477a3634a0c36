"""Percentile bootstrap by image for ratios of sums, all draws at once.

Decisions:
- The unit drawn is the image: answers about one image are not independent.
- Images are drawn from all modalities together; a macro mean of a draw is over the modalities it holds. One
  image gives no interval.
- Every number is a ratio of sums over rows, so a draw needs only how often each image was drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS, SEED = 1000, 0
_CHUNK = 4_000_000  # draws x images held at once


@dataclass(frozen=True)
class Estimate:
    """``value`` with its 95% interval; ``count`` and ``of`` are numerator and denominator."""

    value: float | None  # None where nothing was there to measure
    low: float | None
    high: float | None
    count: float
    of: float

    def as_dict(self) -> dict[str, float | None]:
        return {"value": self.value, "low": self.low, "high": self.high, "count": self.count, "of": self.of}


@dataclass(frozen=True)
class Ratio:
    """A ratio of sums, and the same of every draw [B]; nan where a draw has nothing to measure."""

    value: float | None  # None where nothing was there to measure
    draws: np.ndarray
    count: float
    of: float

    def estimate(self) -> Estimate:
        """With its 95% interval, where there are draws."""
        usable = self.draws[~np.isnan(self.draws)]
        if self.value is None or not len(usable):
            return Estimate(self.value, None, None, self.count, self.of)
        low, high = np.percentile(usable, [2.5, 97.5])
        return Estimate(self.value, float(low), float(high), self.count, self.of)


@dataclass(frozen=True)
class Resampled:
    """Sums of k columns per modality, [M, k], and the same for every draw, [B, M, k]."""

    names: list[str]
    images: int
    totals: np.ndarray
    draws: np.ndarray

    def pooled(self, numerator: str, denominator: str, times: float = 1.0) -> Ratio:
        """``times * sum(numerator) / sum(denominator)`` over all modalities together."""
        i, j = self.names.index(numerator), self.names.index(denominator)
        sums, drawn = self.totals.sum(axis=0), self.draws.sum(axis=1)
        up = times * sums[i]
        return self._ratio(up / sums[j] if sums[j] else 0.0, up, sums[j], times * drawn[:, i], drawn[:, j])

    def macro(self, numerator: str, denominator: str, divide_by: int, epsilon: float) -> Ratio:
        """Sum over modalities of ``numerator / (denominator + epsilon)``, divided by ``divide_by``."""
        i, j = self.names.index(numerator), self.names.index(denominator)
        up, down = self.totals[:, i], self.totals[:, j]
        value = (up / (down + epsilon)).sum() / divide_by
        # A modality the draw lacks is not one without hits: the mean over those it has stands for all.
        held = (self.draws[:, :, j] > 0).sum(axis=1)
        drawn = (
            (self.draws[:, :, i] / (self.draws[:, :, j] + epsilon)).sum(axis=1) * (down > 0).sum() / divide_by
        )
        return self._ratio(value, up.sum(), down.sum(), drawn, held)

    def _ratio(self, value: float, up: float, down: float, drawn: np.ndarray, divisor: np.ndarray) -> Ratio:
        draws = np.full(len(drawn), np.nan)
        if down <= 0:
            return Ratio(None, draws, float(up), float(down))
        if self.images > 1:
            np.divide(drawn, divisor, out=draws, where=divisor > 0)
        return Ratio(float(value), draws, float(up), float(down))


def resample(
    columns: dict[str, Sequence[float]],
    images: Sequence[str],
    modalities: Sequence[str],
    draws: int = DRAWS,
    seed: int = SEED,
) -> Resampled:
    """Sums every column per modality, and again for ``draws`` resamplings of the images.

    Args:
        columns: name to one number a row.
        images: the image of each row, the unit that is drawn.
        modalities: the modality of each row (one for all rows of an image).
    """
    values = np.array(list(columns.values()), np.float64).reshape(len(columns), len(images)).T  # [rows, k]
    names, rng = sorted(set(modalities)), np.random.default_rng(seed)
    numbered: dict[str, int] = {}
    index = np.array([numbered.setdefault(image, len(numbered)) for image in images], np.int64)
    group = np.zeros(len(numbered), np.int64)  # modality of each image
    group[index] = [names.index(modality) for modality in modalities]
    sums = np.zeros((len(numbered), len(columns)))  # per image
    np.add.at(sums, index, values)
    totals = np.stack([sums[group == m].sum(axis=0) for m in range(len(names))]) if names else sums[:0]
    drawn = np.zeros((draws, len(names), len(columns)))
    step = max(1, _CHUNK // max(1, len(sums)))
    for start in range(0, draws, step):
        counts = _times_drawn(rng, min(step, draws - start), len(sums))
        for m in range(len(names)):
            drawn[start : start + step, m] = counts[:, group == m] @ sums[group == m]
    return Resampled(list(columns), len(numbered), totals, drawn)


def _times_drawn(rng: np.random.Generator, draws: int, images: int) -> np.ndarray:
    """How often each of n images is in each of B samples of size n, [B, n] float."""
    picked = rng.integers(0, max(1, images), (draws, images)) + images * np.arange(draws)[:, None]
    return np.bincount(picked.ravel(), minlength=draws * images).reshape(draws, images).astype(np.float64)
