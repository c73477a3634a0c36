"""Regions and the phrases that speak of them, taken from turns.

Decisions:
- A region and its phrase come from one turn: an answer's box with its question (VG), a question's box
  with its answer (ROC, RC). The box itself is cut out of the text.
- Names are compared in lower case: "Left kidney" answers a question, "left kidney" stands in one.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import numpy as np

from clinkd.data.boxes import GRID, parse_boxes
from clinkd.data.records import Box

COVER = 0.3

_BOX = re.compile(r"<box>.*?</box>", re.S)


class Pair(NamedTuple):
    """A phrase and the regions it speaks of; ``name`` says that the phrase is a class name."""

    phrase: str
    boxes: tuple[Box, ...]
    name: bool


def without_boxes(text: str) -> str:
    return " ".join(_BOX.sub(" ", text).split())


def region_pairs(turns: list[dict[str, Any]]) -> list[Pair]:
    """The (region, phrase) pairs that a record's turns hold."""
    pairs = []
    for turn in turns:
        text, boxed = turn["answer"], turn["question"]
        if turn["task"] == "vg":
            text, boxed = boxed, text
        boxes, phrase = tuple(parse_boxes(boxed, strict=False)), without_boxes(text)
        if turn["task"] == "roc":
            phrase = phrase.lower()
        if boxes and phrase and turn["task"] != "mia":
            pairs.append(Pair(phrase, boxes, turn["task"] == "roc"))
    return pairs


def coverage(boxes: tuple[Box, ...], rows: int, columns: int) -> np.ndarray:
    """[rows * columns] share of each cell of a grid over the image that lies in one of the boxes."""
    best = np.zeros((rows, columns), np.float32)
    left, top = np.arange(columns) * GRID / columns, np.arange(rows) * GRID / rows
    for x1, y1, x2, y2 in boxes:
        width = (
            np.clip(np.minimum(left + GRID / columns, x2) - np.maximum(left, x1), 0, None) * columns / GRID
        )
        height = np.clip(np.minimum(top + GRID / rows, y2) - np.maximum(top, y1), 0, None) * rows / GRID
        best = np.maximum(best, (height[:, None] * width[None, :]).astype(np.float32))
    return best.reshape(-1)


def covered(share: np.ndarray) -> np.ndarray:
    """Cells that count as a region's: of which it covers 30%, or the one it covers most; bool."""
    return share >= min(COVER, share.max())
