"""A sheet of sample images with their boxes, to look at prepared data before training on it.

Decisions:
- The modalities take turns, so that a rare one is seen too; within one, the choice is seeded.
- A box carries the name that a classification question gives it, else the grounding question's words.
"""

from __future__ import annotations

import io
import os
import random
from collections.abc import Sequence
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

from clinkd.data.regions import region_pairs
from clinkd.data.shards import images, iter_rows
from clinkd.report.overlays import ImageError, Mark, drawn

TILE, CAPTION, COLUMNS = 256, 18, 4
LONGEST_LABEL = 28


def sample_sheet(data: str | Path, out: Path, *, count: int = 16, seed: int = 0) -> int:
    """Writes up to ``count`` images of a prepared folder with their boxes to ``out`` (PNG).

    Returns:
        how many images the sheet holds.

    Raises:
        DataError: no prepared data there.
    """
    rows = _choose(list(iter_rows(data, columns=["id", "image", "modality", "split"])), count, seed)
    wanted = {row["id"] for row in rows}
    turns = {
        row["id"]: row["turns"] for row in iter_rows(data, columns=["id", "turns"]) if row["id"] in wanted
    }
    pixels = images(data, {row["image"] for row in rows})
    height = TILE + CAPTION
    sheet = Image.new("RGB", (COLUMNS * TILE, max(1, -(-len(rows) // COLUMNS)) * height), "white")
    for number, row in enumerate(rows):
        corner = (number % COLUMNS * TILE, number // COLUMNS * height)
        _tile(sheet, corner, pixels.get(row["image"], b""), row, marks_of(turns[row["id"]]))
    _write_whole(sheet, Path(out))
    return len(rows)


def marks_of(turns: Sequence[dict[str, Any]]) -> list[Mark]:
    """One mark for each box that the turns speak of, named by a class name where there is one."""
    found: dict[Any, Mark] = {}
    for pair in sorted(region_pairs(list(turns)), key=lambda pair: not pair.name):
        for box in pair.boxes:
            found.setdefault(box, Mark(box, "truth", _short(pair.phrase)))
    return list(found.values())


def _choose(rows: list[dict[str, Any]], count: int, seed: int) -> list[dict[str, Any]]:
    random.Random(seed).shuffle(rows)
    piles: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        piles.setdefault(row["modality"], []).append(row)
    dealt = chain.from_iterable(zip_longest(*(piles[name] for name in sorted(piles))))
    return [row for row in dealt if row is not None][:count]


def _tile(
    sheet: Image.Image, corner: tuple[int, int], image: bytes, row: dict[str, Any], marks: list[Mark]
) -> None:
    x, y = corner
    pen = ImageDraw.Draw(sheet)
    try:
        sheet.paste(drawn(image, marks, TILE), (x, y))
    except ImageError as error:
        pen.text((x + 4, y + TILE // 2), str(error)[:40], fill="red")
    pen.text((x + 4, y + TILE + 3), f"{row['modality']} ({row['split']}) {row['image']}"[:42], fill="black")


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_LABEL else text[: LONGEST_LABEL - 1] + "\u2026"


def _write_whole(sheet: Image.Image, out: Path) -> None:
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = out.with_name(f".{out.name}.{os.getpid()}")
    unfinished.write_bytes(buffer.getvalue())
    os.replace(unfinished, out)
