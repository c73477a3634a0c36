"""How a model spells boxes: on a grid of the image, or in pixels of the image it was shown.

Decisions:
- Data keep Med-GRIT's grid everywhere; only text on its way into or out of a model is spelled the model's
  way. Qwen2-VL: integers on the 0-1000 grid. Qwen2.5-VL: integer pixels of the *resized* image, so a box has
  no meaning without that size.
- The grid does not change when an image is resized, so what any model is shown needs no correction there.
- Whole pixels, rounded to the nearest, take the grid there and back within one grid step wherever they can:
  every box from 501 pixels a side on, boxes at least a pixel wide from 334 on. On a smaller side of n pixels
  no rounding helps: such a box comes back within 500 / n + 1/2 steps, one thinner than a pixel, which becomes
  one pixel wide, within 1000 / n. Who wants a step there too makes the images larger (``min_pixels``) or
  takes ``subpixel``: as many decimals as one grid step needs. From pixels to the grid and back is exact up to
  1,000 pixels a side.
- What a model says in pixels beyond its image is not moved: it comes out as a bad grid box and counts as one.
- A span that cannot be read stays as it stands, either way: the corrector is shown a student's broken box.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from clinkd.data.boxes import GRID, format_box, from_qwen, to_qwen

Spelling = Literal["grid", "pixels"]
MODEL_SPELLING: dict[str, Spelling] = {"qwen2_vl": "grid", "qwen2_5_vl": "pixels"}
"""By the ``model_type`` of a checkpoint's config.json."""

WHOLE = 501
"""Pixels a side from which whole pixels hold every box to one grid step."""
_NUMBER = r"\s*(-?[0-9]{1,9}(?:\.[0-9]{1,9})?)\s*"
_SPAN = re.compile(rf"<box>\s*\({_NUMBER},{_NUMBER}\)\s*,\s*\({_NUMBER},{_NUMBER}\)\s*</box>")


@dataclass(frozen=True)
class BoxCodec:
    """Text with boxes into and out of a model that was shown an image of ``width`` x ``height`` pixels.

    Args:
        width, height: of the image as the model sees it (``smart_resize``); unused on the grid.
        subpixel: decimals on sides where whole pixels are coarser than the grid.

    Raises:
        ValueError: an unknown spelling, or pixels without a size.
    """

    spelling: Spelling = "grid"
    width: int = 0
    height: int = 0
    subpixel: bool = False

    def __post_init__(self) -> None:
        if self.spelling not in ("grid", "pixels"):
            raise ValueError(f"box codec: {self.spelling!r} is neither 'grid' nor 'pixels'")
        if self.spelling == "pixels" and min(self.width, self.height) < 1:
            raise ValueError(f"box codec: pixels need the image's size, not {self.width} x {self.height}")

    def encode(self, text: str) -> str:
        """Med-GRIT's text as the model's, with Qwen's box tokens; spans that are no box stay as they are."""
        return to_qwen(_respelled(text, self._written) if self.spelling == "pixels" else text)

    def decode(self, text: str) -> str:
        """The model's text as Med-GRIT's; spans that are no four numbers stay as they are."""
        text = from_qwen(text)
        return _respelled(text, self._read) if self.spelling == "pixels" else text

    def _written(self, corners: list[float]) -> str:
        x1, x2 = self._side(corners[0], corners[2], self.width)
        y1, y2 = self._side(corners[1], corners[3], self.height)
        return f"<box>({x1},{y1}),({x2},{y2})</box>"

    def _side(self, low: float, high: float, side: int) -> tuple[str, str]:
        """Both ends of an axis, in pixels as they are written."""
        decimals = max(0, math.ceil(math.log10(WHOLE / side))) if self.subpixel else 0
        unit = 10**decimals
        first, last = _apart(low * side * unit / GRID, high * side * unit / GRID, side * unit)
        return f"{first / unit:.{decimals}f}", f"{last / unit:.{decimals}f}"

    def _read(self, corners: list[float]) -> str:
        x1, x2 = _apart(corners[0] * GRID / self.width, corners[2] * GRID / self.width, GRID)
        y1, y2 = _apart(corners[1] * GRID / self.height, corners[3] * GRID / self.height, GRID)
        return format_box((x1, y1, x2, y2))


def codec_for(model_type: str, rows: int, columns: int, patch: int = 14) -> BoxCodec:
    """The codec of a model family for one image.

    Args:
        model_type: of the model's config; one that is not known speaks the grid.
        rows, columns: the image's patch grid (the last two of its ``image_grid_thw``).
        patch: pixels of a patch's side.
    """
    return BoxCodec(MODEL_SPELLING.get(model_type, "grid"), columns * patch, rows * patch)


def _respelled(text: str, spell: Callable[[list[float]], str]) -> str:
    return _SPAN.sub(lambda match: spell([float(group) for group in match.groups()]), text)


def _apart(low: float, high: float, last: int) -> tuple[int, int]:
    """The nearest whole numbers; of what had a width two, of which that end gives way that moves less."""
    first, second = (math.floor(value + 0.5) for value in (low, high))
    if first != second or low >= high or not 0 <= first <= last:
        return first, second
    up = second + 1 - high <= low - (first - 1)
    return (first, first + 1) if first < last and (up or first == 0) else (first - 1, first)


def smart_resize(
    height: int, width: int, *, factor: int = 28, min_pixels: int = 56 * 56, max_pixels: int = 1280 * 28 * 28
) -> tuple[int, int]:
    """(height, width) to which Qwen2-VL's and Qwen2.5-VL's processors resize an image.

    Both sides become multiples of ``factor`` (patch size times merge size) and the area comes to lie between
    the limits, the aspect kept as well as that allows. The rule is Qwen-VL-Utils' ``smart_resize``.

    Raises:
        ValueError: a side below 1, or one more than 200 times the other.
    """
    if min(height, width) < 1 or max(height, width) / min(height, width) > 200:
        raise ValueError(f"an image of {width} x {height} pixels cannot be resized")
    high, wide = round(height / factor) * factor, round(width / factor) * factor
    if high * wide > max_pixels:
        by = math.sqrt(height * width / max_pixels)
        high = max(factor, math.floor(height / by / factor) * factor)
        wide = max(factor, math.floor(width / by / factor) * factor)
    elif high * wide < min_pixels:
        by = math.sqrt(min_pixels / (height * width))
        high, wide = math.ceil(height * by / factor) * factor, math.ceil(width * by / factor) * factor
    return high, wide
