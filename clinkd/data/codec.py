"""How a model spells boxes: on a grid of the image, or in pixels of the image it was shown.

Decisions:
- Data keep Med-GRIT's grid everywhere; only text on its way into or out of a model is spelled the model's
  way. Qwen2-VL: integers on the 0-1000 grid. Qwen2.5-VL: integer pixels of the *resized* image, so a box has
  no meaning without that size.
- The grid does not change when an image is resized, so what any model is shown needs no correction there.
- Pixels are rounded to the nearest. To pixels and back is exact within one grid step where the resized side
  has 334 pixels or more; a smaller one has pixels of more than three grid steps, and the error is half a
  pixel. A box narrower than a pixel becomes one pixel wide. From pixels to the grid and back is exact up to
  1,000 pixels a side.
- What a model says in pixels beyond its image is not moved: it comes out as a bad grid box and counts as one.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from clinkd.data.boxes import GRID, format_box, from_qwen, parse_boxes, to_qwen

Spelling = Literal["grid", "pixels"]
MODEL_SPELLING: dict[str, Spelling] = {"qwen2_vl": "grid", "qwen2_5_vl": "pixels"}
"""By the ``model_type`` of a checkpoint's config.json."""

_SPAN = re.compile(
    r"<box>\s*\((-?[0-9]{1,9}),\s*(-?[0-9]{1,9})\)\s*,\s*\((-?[0-9]{1,9}),\s*(-?[0-9]{1,9})\)\s*</box>"
)


@dataclass(frozen=True)
class BoxCodec:
    """Text with boxes into and out of a model that was shown an image of ``width`` x ``height`` pixels.

    Args:
        width, height: of the image as the model sees it (``smart_resize``); unused on the grid.

    Raises:
        ValueError: an unknown spelling, or pixels without a size.
    """

    spelling: Spelling = "grid"
    width: int = 0
    height: int = 0

    def __post_init__(self) -> None:
        if self.spelling not in ("grid", "pixels"):
            raise ValueError(f"box codec: {self.spelling!r} is neither 'grid' nor 'pixels'")
        if self.spelling == "pixels" and min(self.width, self.height) < 1:
            raise ValueError(f"box codec: pixels need the image's size, not {self.width} x {self.height}")

    def encode(self, text: str) -> str:
        """Med-GRIT's text as the model's, with Qwen's box tokens.

        Raises:
            BoxError: a bad box in ``text``, where it has to be converted.
        """
        if self.spelling == "pixels":
            boxes = iter(parse_boxes(text))
            text = re.sub(
                r"<box>.*?</box>", lambda _: format_box(self._pixels(next(boxes))), text, flags=re.S
            )
        return to_qwen(text)

    def decode(self, text: str) -> str:
        """The model's text as Med-GRIT's; spans that are no four integers stay as they are."""
        text = from_qwen(text)
        return _SPAN.sub(self._grid_span, text) if self.spelling == "pixels" else text

    def _pixels(self, box: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
        x1, x2 = _apart(box[0], box[2], self.width, GRID)
        y1, y2 = _apart(box[1], box[3], self.height, GRID)
        return x1, y1, x2, y2

    def _grid_span(self, match: re.Match[str]) -> str:
        x1, y1, x2, y2 = map(int, match.groups())
        (x1, x2), (y1, y2) = _apart(x1, x2, GRID, self.width), _apart(y1, y2, GRID, self.height)
        return format_box((x1, y1, x2, y2))


def _apart(low: int, high: int, to: int, of: int) -> tuple[int, int]:
    """Two coordinates from a scale of ``of`` to one of ``to``; what had a width keeps at least one step."""
    first, last = math.floor(low * to / of + 0.5), math.floor(high * to / of + 0.5)
    if first == last and low < high:  # within one step: the step around their middle
        first = min(max(math.floor((low + high) * to / of / 2), 0), to - 1)
        return first, first + 1
    return first, last


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
