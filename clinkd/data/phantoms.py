"""Phantoms: drawn images of the eight modalities with their questions, so that everything runs with no data
at all.

Decisions:
- What an object *is* shows in its shape and inner structure, never in its place: places are uniform. Left and
  right of a pair are mirror images of one shape (a kidney's hilum faces the midline), so laterality has to be
  seen.
- Each modality has a look of its own (field of view, texture, noise, contrast), laid over the same anatomy.
- The wording of an answer follows from the wording of the question: nothing in an answer is left to chance.
- The drawing of image i depends on (seed, i) alone, so any part can be drawn again, on any worker.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage

from clinkd.data.boxes import mask_box, pixels_to_grid
from clinkd.data.records import MODALITIES, MODALITY_NAMES, Box, Record, Turn
from clinkd.data.templates import caption, describe_scene, identify, locate

Field = np.ndarray
"""[h, w] float32; shapes are given as (inside, tone) over u, v in [-1, 1] across the object's box."""

MIN_SIDE, MAX_SIDE = 0.12, 0.45


def _disk(u: Field, v: Field) -> Field:
    return u**2 + v**2 < 1


def _kidney(side: int) -> Callable[[Field, Field], tuple[Field, Field]]:
    def shape(u: Field, v: Field) -> tuple[Field, Field]:
        inside = _disk(u, v) & ((u - side * 0.9) ** 2 + (v * 0.9) ** 2 > 0.5)
        return inside, np.full_like(u, 0.8)

    return shape


def _lung(side: int) -> Callable[[Field, Field], tuple[Field, Field]]:
    def shape(u: Field, v: Field) -> tuple[Field, Field]:
        return ((u * side + 1) / 2) ** 2 + v**2 < 1, np.full_like(u, -0.9)

    return shape


def _hip(side: int) -> Callable[[Field, Field], tuple[Field, Field]]:
    def shape(u: Field, v: Field) -> tuple[Field, Field]:
        return u * side + v > 0, np.full_like(u, 0.9)

    return shape


def _star(lobes: int, depth: float, tone: float) -> Callable[[Field, Field], tuple[Field, Field]]:
    def shape(u: Field, v: Field) -> tuple[Field, Field]:
        limit = 1 - depth + depth * np.cos(lobes * np.arctan2(v, u))
        return np.hypot(u, v) < limit, np.full_like(u, tone)

    return shape


def _two_tone(inside: Callable, inner: Callable, outer: float, core: float) -> Callable:
    def shape(u: Field, v: Field) -> tuple[Field, Field]:
        return inside(u, v), np.where(inner(u, v), core, outer).astype(np.float32)

    return shape


SHAPES: dict[str, Callable[[Field, Field], tuple[Field, Field]]] = {
    "liver": lambda u, v: (np.abs(v) < 0.95 - 0.4 * (u + 1), np.full_like(u, 0.7)),
    "spleen": lambda u, v: (_disk(u, v) & (u**2 + (v - 0.7) ** 2 > 0.6), np.full_like(u, 0.8)),
    "left kidney": _kidney(-1),
    "right kidney": _kidney(1),
    "left lung": _lung(1),
    "right lung": _lung(-1),
    "left hip": _hip(1),
    "right hip": _hip(-1),
    "heart": _two_tone(_disk, lambda u, v: u**2 + v**2 < 0.3, 0.9, -0.6),
    "bladder": _two_tone(_disk, lambda u, v: v > 0, 0.2, 1.0),
    "aorta": lambda u, v: (_disk(u, v) & ((u**2 + v**2 > 0.5) | (u**2 + v**2 < 0.1)), np.full_like(u, 1.0)),
    "vertebra": _two_tone(lambda u, v: np.abs(u) < 2,
                          lambda u, v: (np.abs(u) < 0.4) & (np.abs(v) < 0.4), 0.9, -0.8),
    "tumor": _star(5, 0.3, 1.0),
    "hemorrhage": _star(3, 0.15, -1.0),
    "cyst": _two_tone(_disk, lambda u, v: u**2 + v**2 < 0.55, 0.9, -0.9),
    "polyp": lambda u, v: (((v < 0) & (u**2 + v**2 < 1)) | ((v >= 0) & (np.abs(u) < 0.35)),
                           np.full_like(u, 0.8)),
    "edema": lambda u, v: (_disk(u, v), 0.9 * np.sign(np.sin(2.5 * np.pi * v))),
    "fibrosis": lambda u, v: (_disk(u, v), 0.9 * np.sign(np.sin(2.5 * np.pi * u))),
    "stone": lambda u, v: (np.abs(u) + np.abs(v) < 1, np.full_like(u, 1.0)),
    "nodule": lambda u, v: (_disk(u, v), np.full_like(u, 0.7)),
}  # fmt: skip
NAMES = tuple(SHAPES)


@dataclass(frozen=True)
class PhantomSpec:
    """How many phantoms, how large, how crowded."""

    images: int
    size: int = 112  # pixels a side
    seed: int = 0
    min_objects: int = 3
    max_objects: int = 4


@dataclass(frozen=True)
class Placed:
    name: str
    box: Box  # on the 0-1000 grid


def image_name(index: int) -> str:
    modality = MODALITIES[index % len(MODALITIES)]
    prefix = {"fundus": "fundus_photography", "x": "x_ray"}.get(modality, f"{modality}_00")
    return f"{prefix}--Phantom--case_{index:06d}--2d_none.png"


def draw(spec: PhantomSpec, index: int) -> tuple[bytes, Record]:
    """Draws image ``index``: its PNG and its record with all four tasks."""
    rng = np.random.default_rng([spec.seed, index])
    modality = MODALITIES[index % len(MODALITIES)]
    tone, inside, objects = _anatomy(spec, rng)
    pixels = LOOKS[modality](tone, inside, rng)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=3)
    name = image_name(index)
    return buffer.getvalue(), Record(name[:-4], name, _turns(objects, modality, rng))


def _anatomy(spec: PhantomSpec, rng: np.random.Generator) -> tuple[Field, Field, list[Placed]]:
    size = spec.size
    tone, inside = np.zeros((size, size), np.float32), np.zeros((size, size), bool)
    taken = np.zeros((size, size), bool)
    wanted = int(rng.integers(spec.min_objects, spec.max_objects + 1))
    objects: list[Placed] = []
    names = iter(rng.permutation(NAMES))
    while len(objects) < wanted:
        name = str(next(names))
        x, y, mask, levels = _shaped(name, taken, size, rng)
        height, width = mask.shape
        window = (slice(y, y + height), slice(x, x + width))
        tone[window] = np.where(mask, levels, tone[window])
        inside[window] |= mask
        taken[max(0, y - 2) : y + height + 2, max(0, x - 2) : x + width + 2] = True
        objects.append(Placed(name, pixels_to_grid((x, y, x + width, y + height), size, size)))
    return tone, inside, objects


def _shaped(
    name: str, taken: np.ndarray, size: int, rng: np.random.Generator
) -> tuple[int, int, Field, Field]:
    """A place (x, y) with the object's mask and tones there, cut to the mask's own extent."""
    while True:
        width, height, x, y = _free_place(taken, size, rng)
        axis_x, axis_y = (np.linspace(-1 + 1 / n, 1 - 1 / n, n, dtype=np.float32) for n in (width, height))
        mask, levels = SHAPES[name](*np.meshgrid(axis_x, axis_y))
        left, top, right, bottom = mask_box(mask) or (0, 0, 0, 0)
        if min(right - left, bottom - top) >= MIN_SIDE * size:
            return x + left, y + top, mask[top:bottom, left:right], levels[top:bottom, left:right]


def _free_place(taken: np.ndarray, size: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """A box at a uniform place that touches nothing drawn so far; large first, then smaller."""
    for attempt in range(1000):
        top = MAX_SIDE - (MAX_SIDE - MIN_SIDE - 0.03) * min(attempt / 200, 1)
        width, height = (round(size * side) for side in rng.uniform(MIN_SIDE + 0.01, top, 2))
        if not 0.5 < width / height < 2:
            continue
        x, y = int(rng.integers(0, size - width + 1)), int(rng.integers(0, size - height + 1))
        if not taken[y : y + height, x : x + width].any():
            return width, height, x, y
    raise RuntimeError("no free place for another object: fewer or smaller objects are needed")


def _smooth(rng: np.random.Generator, size: int, sigma: float) -> Field:
    """Smooth noise of unit variance."""
    coarse = rng.normal(size=(max(4, int(size / sigma)),) * 2).astype(np.float32)
    return ndimage.zoom(coarse, size / coarse.shape[0], order=1)[:size, :size]


def _grey(value: Field) -> np.ndarray:
    return np.repeat((np.clip(value, 0, 1) * 255).astype(np.uint8)[..., None], 3, axis=2)


def _colour(value: Field, dark: tuple, bright: tuple) -> np.ndarray:
    mix = np.clip(value, 0, 1)[..., None]
    return ((1 - mix) * np.array(dark) + mix * np.array(bright)).astype(np.uint8)


def _axes(size: int) -> tuple[Field, Field]:
    axis = np.linspace(-1, 1, size, dtype=np.float32)
    u, v = np.meshgrid(axis, axis)
    return u, v


def _ct(tone: Field, inside: Field, rng: np.random.Generator) -> np.ndarray:
    u, v = _axes(len(tone))
    body = 0.4 + 0.03 * _smooth(rng, len(tone), 12)
    value = np.where(u**2 + v**2 < 1.7, body, 0.1)
    return _grey(value + 0.4 * tone + 0.03 * rng.normal(size=tone.shape))


def _mr(tone: Field, inside: Field, rng: np.random.Generator) -> np.ndarray:
    bias = 1 + 0.25 * np.clip(_smooth(rng, len(tone), 50), -1, 1)
    value = np.hypot((0.4 + 0.35 * tone) * bias, 0.05 * rng.normal(size=tone.shape))
    return _grey(value + 0.02 * rng.normal(size=tone.shape))


def _x_ray(tone: Field, inside: Field, rng: np.random.Generator) -> np.ndarray:
    _, v = _axes(len(tone))
    ribs = 0.06 * np.sin(v * rng.uniform(14, 20) + rng.uniform(0, 6))
    return _grey(0.55 - 0.38 * tone + ribs + 0.02 * rng.normal(size=tone.shape))


def _pet(tone: Field, inside: Field, rng: np.random.Generator) -> np.ndarray:
    uptake = ndimage.gaussian_filter(tone, 0.7)
    return _grey(0.5 + 0.42 * uptake + 0.07 * _smooth(rng, len(tone), 2) * (0.5 + np.abs(uptake)))


def _endoscopy(tone: Field, inside: Field, rng: np.random.Generator) -> np.ndarray:
    u, v = _axes(len(tone))
    vignette = 1 - 0.25 * (u**2 + v**2)
    value = (0.5 + 0.4 * tone + 0.04 * _smooth(rng, len(tone), 8)) * vignette
    return _colour(value, (50, 5, 10), (255, 180, 150))


def _dermoscopy(tone: Field, inside: Field, rng: np.random.Generator) -> np.ndarray:
    u, v = _axes(len(tone))
    value = 0.55 - 0.4 * tone + 0.03 * rng.normal(size=tone.shape)
    for _ in range(3):  # hairs
        angle, offset = rng.uniform(0, np.pi), rng.uniform(-0.8, 0.8)
        value = value - 0.3 * (np.abs(u * np.cos(angle) + v * np.sin(angle) - offset) < 0.012)
    return _colour(value, (60, 30, 20), (250, 210, 190))


def _fundus(tone: Field, inside: Field, rng: np.random.Generator) -> np.ndarray:
    u, v = _axes(len(tone))
    vessel = np.abs(u - 0.4 * np.sin(3 * v + rng.uniform(0, 6))) < 0.02
    value = 0.45 + 0.4 * tone - 0.2 * (vessel & ~inside) + 0.03 * _smooth(rng, len(tone), 10)
    value = np.where((u**2 + v**2 < 1.6) | inside, value, 0.0)
    return _colour(value, (20, 0, 0), (255, 190, 90))


def _ultrasound(tone: Field, inside: Field, rng: np.random.Generator) -> np.ndarray:
    u, v = _axes(len(tone))
    sector = np.abs(u) < 0.55 + 0.35 * (v + 1)
    speckle = rng.gamma(12.0, 1 / 12.0, size=tone.shape)
    value = np.where(sector | inside, (0.4 + 0.36 * tone) * ndimage.gaussian_filter(speckle, 0.5), 0.03)
    return _grey(value)


LOOKS: dict[str, Callable[[Field, Field, np.random.Generator], np.ndarray]] = {
    "ct": _ct, "mr": _mr, "x": _x_ray, "pet": _pet, "endoscopy": _endoscopy,
    "dermoscopy": _dermoscopy, "fundus": _fundus, "ultrasound": _ultrasound,
}  # fmt: skip


def _turns(objects: list[Placed], modality: str, rng: np.random.Generator) -> tuple[Turn, ...]:
    """VG and ROC for every object, RC for one, MIA for the image."""
    turns = []
    for item in objects:
        turns.append(locate(item.name, [item.box], name_first=rng.random() < 0.5))
        turns.append(identify(item.name, item.box))
    chosen = objects[int(rng.integers(len(objects)))]
    turns.append(caption(chosen.name, chosen.box))
    turns.append(describe_scene(MODALITY_NAMES[modality], [(item.name, item.box) for item in objects]))
    return tuple(turns)


def write_source(spec: PhantomSpec, out: Path, indices: range | None = None) -> Path:
    """Writes phantoms as a lab would have them: ``images/*.png`` and ``medgrit.json``, Med-GRIT's form."""
    images = out / "images"
    images.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in indices or range(spec.images):
        png, record = draw(spec, index)
        (images / record.image).write_bytes(png)
        rows.append(to_medgrit(record))
    (out / "medgrit.json").write_text(json.dumps(rows))
    return out


def to_medgrit(record: Record) -> dict:
    """A record as BiRD's JSON: id and [question, answer] pairs, the image named before the first."""
    turns = [[turn.question, turn.answer] for turn in record.turns]
    turns[0][0] = f"Picture 1: <img>{record.image}</img>\n{turns[0][0]}"
    return {"id": record.id, "conversations": turns}
