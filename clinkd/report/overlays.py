"""Boxes drawn on images, embedded as data URIs.

Decisions:
- Colour never stands alone: the truth is a solid line, an answer dashed with the truth in its gaps, and each
  box carries its word.
- Images are brought to one size first (small ones up, bicubic), so that lines and words look the same on all.
- A heat map lies on the image in grey: its colours mean relevance and nothing else. They grow lighter with
  it, so they are told apart without colour vision, and cells keep their edges: the guide knows nothing finer.
- JPEG without chroma subsampling: a third of a PNG on noisy images, and thin coloured lines stay clean.
- All overlays of a report share one byte budget; when it is spent, further images are left out and counted.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from clinkd.data.boxes import grid_to_pixels
from clinkd.data.records import Box

SIDE = 336  # pixels of the longer side
MAX_UPSCALE = 4.0
STYLES = {
    "truth": ((64, 220, 110), False), "answer": ((255, 120, 40), True),
    "chosen": ((90, 170, 255), True), "asked": ((255, 225, 80), False),
    "after": ((240, 120, 240), True),
}  # fmt: skip
"""Kind of mark: colour and whether it is dashed."""
# Relevance 0 to 1: from dark blue over red to light yellow, and how much of the image it covers.
HEAT = ((20, 15, 70), (120, 30, 110), (215, 65, 70), (250, 150, 40), (255, 245, 130))
HEAT_COVER = (0.35, 0.7)


class ImageError(ValueError):
    """Bytes that are no image one can draw on."""


@dataclass(frozen=True)
class Mark:
    """A box on the 0-1000 grid, its kind (a key of STYLES) and the word written at it."""

    box: Box
    kind: str
    label: str = ""


class Budget:
    """Bytes left for images in one report."""

    def __init__(self, limit: int) -> None:
        self.left = limit
        self.refused = 0

    def embed(self, image: bytes, marks: Sequence[Mark]) -> str | None:
        """The overlay as a data URI, or None when it would not fit. Raises ImageError."""
        return self.take(overlay(image, marks))

    def take(self, uri: str) -> str | None:
        """The data URI if it fits, else None."""
        if len(uri) > self.left:
            self.refused += 1
            return None
        self.left -= len(uri)
        return uri


def overlay(image: bytes, marks: Iterable[Mark], side: int = SIDE) -> str:
    """The image with its boxes as ``data:image/jpeg;base64,…``. Raises ImageError as ``drawn`` does."""
    return _uri(drawn(image, marks, side))


def heat_map(image: bytes, relevance: np.ndarray, side: int = SIDE) -> str:
    """The image in grey under its relevance [rows, columns] in [0, 1], cell by cell, as a data URI.

    Raises:
        ImageError: as ``drawn`` does.
    """
    grey = np.asarray(_resized(_opened(image), side).convert("L"), np.float64)
    rows, columns = (
        np.arange(length) * cells // length for length, cells in zip(grey.shape, relevance.shape, strict=True)
    )
    return _uri(Image.fromarray(heated(grey, relevance[rows[:, None], columns[None, :]])))


def heated(grey: np.ndarray, relevance: np.ndarray) -> np.ndarray:
    """uint8 [..., 3]: grey values under the colour of relevance, which covers more where it is higher."""
    levels = np.linspace(0, 1, len(HEAT))
    colour = np.stack([np.interp(relevance, levels, channel) for channel in np.transpose(HEAT)], axis=-1)
    cover = np.interp(relevance, [0, 1], HEAT_COVER)[..., None]
    return np.rint((1 - cover) * grey[..., None] + cover * colour).astype(np.uint8)


def heat_legend(steps: int = 11) -> str:
    """The colours from 0 to 1 over mid-grey as the stops of a CSS gradient."""
    colours = heated(np.full(steps, 128.0), np.linspace(0, 1, steps))
    return ", ".join(f"rgb({red} {green} {blue})" for red, green, blue in colours.tolist())


def _uri(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=80, subsampling=0, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def drawn(image: bytes, marks: Iterable[Mark], side: int = SIDE) -> Image.Image:
    """The image, its longer side ``side`` pixels, with its boxes.

    Raises:
        ImageError: the bytes are no image, or one too large to open safely.
    """
    canvas = _resized(_opened(image), side)
    pen = ImageDraw.Draw(canvas)
    for mark in marks:
        _draw_mark(pen, canvas.size, mark)
    return canvas


def _opened(image: bytes) -> Image.Image:
    try:
        opened: Image.Image = Image.open(io.BytesIO(image))
        opened.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ImageError(f"not an image: {error}") from error
    if opened.mode[0] in "IF":  # 16- and 32-bit grey: RGB would cut off all but the lowest 8 bits
        opened = Image.fromarray(_stretched(np.asarray(opened, np.float64)))
    return opened.convert("RGB")


def _stretched(values: np.ndarray) -> np.ndarray:
    """[h, w] of any range as uint8, the finite values' extremes at 0 and 255, all others at 0."""
    finite = np.where(np.isfinite(values), values, np.nan)
    if np.isnan(finite).all():
        return np.zeros(values.shape, np.uint8)
    low, high = np.nanmin(finite), np.nanmax(finite)
    return np.nan_to_num((finite - low) / max(high - low, 1e-9) * 255).astype(np.uint8)


def _resized(image: Image.Image, side: int) -> Image.Image:
    scale = min(MAX_UPSCALE, side / max(image.size))
    width, height = (max(1, round(length * scale)) for length in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _draw_mark(pen: ImageDraw.ImageDraw, size: tuple[int, int], mark: Mark) -> None:
    colour, dashed = STYLES[mark.kind]
    x1, y1, x2, y2 = grid_to_pixels(mark.box, *size)
    x2, y2 = min(x2, size[0] - 1), min(y2, size[1] - 1)
    corners = [(x1, y1), (x2, y1), (x2, y2), (x1, y2), (x1, y1)]
    for start, end in pairwise(corners):
        for a, b in _dashes(start, end) if dashed else [(start, end)]:
            pen.line([a, b], fill=(0, 0, 0), width=5)  # a dark edge keeps the line visible on any image
            pen.line([a, b], fill=colour, width=3)
    if mark.label:
        _write(pen, size, mark.label, colour, (x1, y1 if not dashed else y2), below=dashed)


def _dashes(
    start: tuple[float, float], end: tuple[float, float], dash: float = 9.0, gap: float = 5.0
) -> list[tuple[tuple[float, float], tuple[float, float]]]:
    length = max(abs(end[0] - start[0]), abs(end[1] - start[1]))
    if length <= 0:
        return []

    def at(distance: float) -> tuple[float, float]:
        share = min(distance / length, 1.0)
        return start[0] + share * (end[0] - start[0]), start[1] + share * (end[1] - start[1])

    return [(at(begin), at(begin + dash)) for begin in np.arange(0.0, length, dash + gap)]


def _write(
    pen: ImageDraw.ImageDraw,
    size: tuple[int, int],
    text: str,
    colour: tuple,
    at: tuple[float, float],
    below: bool,
) -> None:
    """A word on a filled tag at a box's corner: outside the box where there is room, else inside."""
    font = ImageFont.load_default(13)
    left, top, right, bottom = font.getbbox(text)
    width, height = right - left + 8, bottom - top + 6
    x = min(max(at[0], 0), max(size[0] - width, 0))
    y = at[1] + 1 if below else at[1] - height
    y = (
        y
        if 0 <= y <= size[1] - height
        else min(max(at[1] - height if below else at[1], 0), max(size[1] - height, 0))
    )
    pen.rectangle([x, y, x + width, y + height], fill=colour)
    pen.text((x + 4 - left, y + 3 - top), text, fill=(0, 0, 0), font=font)
