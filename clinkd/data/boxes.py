"""Boxes: the 0-1000 grid in and out of text and pixels, and overlap.

Text carries ``<box>(x1,y1),(x2,y2)</box>``; Qwen2-VL's tokenizer has ``<|box_start|>`` and ``<|box_end|>``
for the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from clinkd.data.records import Box

GRID = 1000
_SPAN = re.compile(r"<box>(.*?)</box>", re.S)
_NUMBER = r"\s*(-?[0-9]+)\s*"
_CORNERS = re.compile(rf"\({_NUMBER},{_NUMBER}\)\s*,\s*\({_NUMBER},{_NUMBER}\)")
_NOT_FINITE = re.compile(r"\b(?:nan|inf|infinity)\b", re.I)


class BoxError(ValueError):
    """A box that cannot be used; ``code`` is the quarantine's reason."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code


def format_box(box: Sequence[int]) -> str:
    x1, y1, x2, y2 = box
    return f"<box>({x1},{y1}),({x2},{y2})</box>"


def to_qwen(text: str) -> str:
    """Med-GRIT's ``<box>`` spans as Qwen2-VL's special tokens."""
    return text.replace("<box>", "<|box_start|>").replace("</box>", "<|box_end|>")


def from_qwen(text: str) -> str:
    return text.replace("<|box_start|>", "<box>").replace("<|box_end|>", "</box>")


def parse_boxes(text: str, *, strict: bool = True) -> list[Box]:
    """All ``<box>`` spans of ``text`` in order.

    Args:
        strict: raise on the first bad span (data); otherwise leave bad spans out (model answers).

    Raises:
        BoxError: ``box_broken`` (not four integers), ``box_nan``, ``box_out_of_range``, ``box_inverted`` or
            ``box_empty``.
    """
    boxes: list[Box] = []
    spans = _SPAN.findall(text)
    for span in spans:
        try:
            boxes.append(_parse_span(span))
        except BoxError:
            if strict:
                raise
    if strict and not len(spans) == text.count("<box>") == text.count("</box>"):
        raise BoxError("box_broken", "a <box> that is not closed, or closed before it opens")
    return boxes


def _parse_span(span: str) -> Box:
    match, shown = _CORNERS.fullmatch(span.strip()), " ".join(span[:60].split())
    if match is None:
        raise BoxError("box_nan" if _NOT_FINITE.search(span) else "box_broken", shown or "nothing in the box")
    if max(map(len, match.groups())) > 9:  # int() itself refuses numbers of thousands of digits
        raise BoxError("box_out_of_range", f"{shown}...")
    x1, y1, x2, y2 = (int(group) for group in match.groups())
    if min(x1, y1, x2, y2) < 0 or max(x1, y1, x2, y2) > GRID:
        raise BoxError("box_out_of_range", shown)
    if x1 > x2 or y1 > y2:
        raise BoxError("box_inverted", shown)
    if x1 == x2 or y1 == y2:
        raise BoxError("box_empty", shown)
    return x1, y1, x2, y2


def pixels_to_grid(box: Sequence[float], width: int, height: int) -> Box:
    """Pixel corners (right, bottom exclusive) to the nearest grid steps, at least one wide; error <= 1."""
    x1, x2 = _span(box[0] * GRID / width, box[2] * GRID / width)
    y1, y2 = _span(box[1] * GRID / height, box[3] * GRID / height)
    return x1, y1, x2, y2


def _span(low: float, high: float) -> tuple[int, int]:
    first, last = (min(max(round(value), 0), GRID) for value in (low, high))
    if first < last:
        return first, last
    # Both ends met in one step: widen to the side from which the rounding took.
    return (first - 1, first) if first == GRID or first > max(low, 0) else (first, first + 1)


def grid_to_pixels(box: Sequence[float], width: int, height: int) -> tuple[float, float, float, float]:
    x1, y1, x2, y2 = box
    return x1 * width / GRID, y1 * height / GRID, x2 * width / GRID, y2 * height / GRID


def mask_box(mask: np.ndarray) -> tuple[int, int, int, int] | None:
    """Pixel box (right and bottom exclusive) of the nonzero part of a [H, W] mask; None when it is empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if rows.size == 0:
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union; 0 for boxes without area."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    if width <= 0 or height <= 0:
        return 0.0
    inter = width * height
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inter
    return inter / union if union > 0 else 0.0
