"""How boxes are spelled to a model: Qwen2-VL's 0-1000 grid, or Qwen2.5-VL's pixels of the resized image.

Decisions:
- Data know the grid alone (``<box>(x1,y1),(x2,y2)</box>``), which no resize changes: a codec stands where
  text meets a model, and nowhere else.
- Both codecs write Qwen's box tokens, ``<|box_start|>(x1,y1),(x2,y2)<|box_end|>``, so training weighs and
  reads both alike; what stands in a codec's spans is its own unit.
- Pixels are those of the image as the vision tower gets it: sides that are multiples of 28, by
  ``smart_resize``, or known from the image's patch grid.
- Qwen2.5-VL writes whole pixels. On a side of n pixels that takes the grid there and back within one grid
  step wherever whole pixels can hold it: for every box from 501 pixels on, for boxes at least one pixel wide
  from 334 on. Below, a pixel is three grid steps and more, and no rounding helps: a box of any width comes
  back within 500 / n + 1/2 steps, one thinner than a pixel within 1000 / n. A model that is to point more
  precisely needs larger images (``min_pixels`` of its processor), or ``subpixel=True``, which writes as many
  decimals as one grid step needs and holds it on every side.
- A span that cannot be read is left as it stands: what it is worth is for the judge and the metrics to say.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from clinkd.data.boxes import GRID, format_box, from_qwen, to_qwen
from clinkd.data.records import Box

WHOLE = 501
"""Pixels a side from which whole pixels hold every box to one grid step."""
_NUMBER = r"\s*(-?[0-9]{1,9}(?:\.[0-9]{1,9})?)\s*"
_SPAN = re.compile(rf"<box>\s*\({_NUMBER},{_NUMBER}\)\s*,\s*\({_NUMBER},{_NUMBER}\)\s*</box>")


class BoxCodec(Protocol):
    """Text with Med-GRIT's boxes to a model's text about one image, and back."""

    def to_model(self, text: str) -> str: ...

    def from_model(self, text: str) -> str: ...


@dataclass(frozen=True)
class GridCodec:
    """Qwen2-VL: grid steps, whatever the image's size."""

    def to_model(self, text: str) -> str:
        return to_qwen(text)

    def from_model(self, text: str) -> str:
        return from_qwen(text)


@dataclass(frozen=True)
class PixelCodec:
    """Qwen2.5-VL: pixels of the resized image.

    Args:
        width, height: of the resized image, in pixels (see ``smart_resize`` and ``codec_for``).
        subpixel: decimals where whole pixels are coarser than the grid.

    Raises:
        ValueError: an image without pixels.
    """

    width: int
    height: int
    subpixel: bool = False

    def __post_init__(self) -> None:
        if min(self.width, self.height) < 1:
            raise ValueError(f"box codec: an image of {self.width} x {self.height} pixels")

    def to_model(self, text: str) -> str:
        return to_qwen(_respell(text, lambda corners: self._written(corners)))

    def from_model(self, text: str) -> str:
        return _respell(from_qwen(text), lambda corners: format_box(self._read(corners)))

    def _written(self, corners: list[float]) -> str:
        x1, x2 = self._side(corners[0], corners[2], self.width)
        y1, y2 = self._side(corners[1], corners[3], self.height)
        return f"<box>({x1},{y1}),({x2},{y2})</box>"

    def _side(self, low: float, high: float, side: int) -> tuple[str, str]:
        """Grid steps of one axis as pixels in text."""
        decimals = _decimals(side) if self.subpixel else 0
        unit = 10**decimals
        first, last = distinct(low * side * unit / GRID, high * side * unit / GRID, side * unit)
        return f"{first / unit:.{decimals}f}", f"{last / unit:.{decimals}f}"

    def _read(self, corners: list[float]) -> Box:
        # Not ``pixels_to_grid``: a model's swapped or empty box stays one, for the judge to see.
        x1, x2 = (round(value * GRID / self.width) for value in (corners[0], corners[2]))
        y1, y2 = (round(value * GRID / self.height) for value in (corners[1], corners[3]))
        return x1, y1, x2, y2


def _respell(text: str, spell: Callable[[list[float]], str]) -> str:
    return _SPAN.sub(lambda match: spell([float(group) for group in match.groups()]), text)


def _decimals(side: int) -> int:
    """Decimals that make a pixel fine enough for one grid step; 0 from ``WHOLE`` pixels on."""
    return max(0, math.ceil(math.log10(WHOLE / side)))


def distinct(low: float, high: float, last: int) -> tuple[int, int]:
    """The nearest whole numbers in [0, last], not equal: the end that moves is the one that moves less."""
    first, second = (min(max(round(value), 0), last) for value in (low, high))
    if first != second or low >= high:
        return first, second
    up, down = second + 1 - high, low - (first - 1)
    return (first, second + 1) if second < last and (up <= down or first == 0) else (first - 1, second)


def smart_resize(
    width: int, height: int, *, factor: int = 28, min_pixels: int = 56 * 56, max_pixels: int = 14 * 14 * 5120
) -> tuple[int, int]:
    """(width, height) that Qwen2-VL's and Qwen2.5-VL's processors resize an image to.

    The same arithmetic as theirs, without importing transformers: multiples of ``factor``, about the same
    aspect, an area from ``min_pixels`` to ``max_pixels``.

    Raises:
        ValueError: an image without pixels, or one side more than 200 times the other.
    """
    if min(width, height) < 1 or max(width, height) > 200 * min(width, height):
        raise ValueError(f"resize: an image of {width} x {height} pixels")
    wide, high = round(width / factor) * factor, round(height / factor) * factor
    if wide * high > max_pixels:
        shrink = math.sqrt(width * height / max_pixels)
        wide, high = (max(factor, math.floor(side / shrink / factor) * factor) for side in (width, height))
    elif wide * high < min_pixels:
        grow = math.sqrt(min_pixels / (width * height))
        wide, high = (math.ceil(side * grow / factor) * factor for side in (width, height))
    return wide, high


def codec_for(model_type: str, rows: int, columns: int, patch: int = 14) -> BoxCodec:
    """The codec of a model family for one image.

    Args:
        model_type: of the model's config; "qwen2_5_vl" speaks pixels, all others the grid.
        rows, columns: the image's patch grid (the last two of its ``image_grid_thw``).
        patch: pixels of a patch's side.
    """
    pixels = model_type.startswith("qwen2_5_vl")
    return PixelCodec(columns * patch, rows * patch) if pixels else GridCodec()
