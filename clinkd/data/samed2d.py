"""SA-Med2D folders (images and masks) as records of all four tasks, for those who have no question/answer
files.

Decisions:
- ``SAMed2D_v1.json`` says which masks belong to which image; without it the names do
  (``{image stem}--{class}_{instance}.png``), and a mask without its image is quarantined.
- Class names come from ``SAMed2D_v1_class_mapping_id.json``; without that file an object is called "structure
  3".
- A mask's box is the box of all its foreground. Several masks of one class in an image are one VG question
  whose answer lists every box, left to right. Where one of three or more marks what the others mark together
  (a union mask beside its instances), the instances are the answer, and the union is no object of its own: it
  answers a question of its own, where all of them are.
- ROC is not asked about a box that two names share: it would have two answers.
- Every mask is either a target or one row of the quarantine: wrong size, empty, inverted (background marked),
  full.
- What the templates leave open is drawn from (seed, image name), so an image asks the same on any worker.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from clinkd import storage
from clinkd.data.boxes import mask_box, pixels_to_grid
from clinkd.data.records import MODALITY_NAMES, Box, Record, Turn, modality_of
from clinkd.data.templates import caption, describe_scene, identify, locate, locate_all
from clinkd.data.validate import Folder, RowError

INDEX = "SAMed2D_v1.json"
CLASSES = "SAMed2D_v1_class_mapping_id.json"
_MASK = re.compile(r"(?P<image>.+)--(?P<class>\d{4})_(?P<instance>\d{3})\.png")
_MASK_CODES = {"missing_image": "mask_missing", "unreadable_image": "mask_unreadable"}
FULL = 0.95
"""Share of the image above which a mask says nothing about a place."""


@dataclass(frozen=True, slots=True)
class Masked:
    """One image with its masks' paths, relative to the folder; an empty ``image`` means masks without one."""

    where: str
    image: str
    masks: tuple[str, ...]


def is_folder(path: Path) -> bool:
    return (path / "images").is_dir() and (path / "masks").is_dir()


def read(root: Path) -> Iterator[Masked]:
    """Streams the folder's images with their masks, in the index's order or by name.

    Raises:
        RowError: invalid_json when the index is not a JSON object of lists.
    """
    index = root / INDEX
    if not index.is_file():
        yield from _by_name(root)
        return
    for image, masks in _index_items(index):
        if not isinstance(masks, list) or not all(isinstance(mask, str) for mask in masks):
            raise RowError("invalid_json", f"{INDEX}: {image[:120]!r} has no list of masks")
        yield Masked(f"{INDEX}: {image}", image, tuple(masks))


def _index_items(index: Path) -> Iterator[tuple[str, object]]:
    try:
        import ijson
    except ImportError:
        try:
            yield from json.loads(index.read_bytes()).items()
        except (ValueError, AttributeError) as error:
            raise RowError("invalid_json", f"{INDEX}: {error}") from None
        return
    with index.open("rb") as file:
        try:
            yield from ijson.kvitems(file, "")
        except (ijson.JSONError, UnicodeDecodeError) as error:
            raise RowError("invalid_json", f"{INDEX}: {' '.join(str(error).split())[:200]}") from None


def _by_name(root: Path) -> Iterator[Masked]:
    masks: dict[str, list[str]] = {}
    orphans: list[str] = []
    images = [name for name in storage.names(root / "images") if not name.startswith(".")]
    stems = {name.rsplit(".", 1)[0] for name in images}
    for name in (name for name in storage.names(root / "masks") if not name.startswith(".")):
        match = _MASK.fullmatch(name)
        stem = match["image"] if match else name.rsplit(".", 1)[0].rsplit("--", 1)[0]
        (masks.setdefault(stem, []) if stem in stems else orphans).append(f"masks/{name}")
    for name in images:
        yield Masked(f"images/{name}", f"images/{name}", tuple(masks.get(name.rsplit(".", 1)[0], ())))
    for name in orphans:
        yield Masked(name, "", (name,))


def class_names(root: Path) -> dict[str, dict[str, str]] | None:
    """{dataset: {"0003": "tumor"}} from the class mapping; None where the folder has none.

    Raises:
        RowError: invalid_json.
    """
    path = root / CLASSES
    if not path.is_file():
        return None
    try:
        mapping = json.loads(path.read_bytes())
        return {
            dataset: {str(number): re.sub(r"[_\s]+", " ", name).strip() for name, number in classes.items()}
            for dataset, classes in mapping.items()
        }
    except (ValueError, AttributeError, TypeError) as error:
        raise RowError("invalid_json", f"{CLASSES}: {str(error)[:200]}") from None


def object_name(mask: str, names: Mapping[str, Mapping[str, str]] | None) -> str:
    """What a mask shows, from its file name.

    Raises:
        RowError: mask_bad_name or mask_unknown_class.
    """
    match = _MASK.fullmatch(mask.rsplit("/", 1)[-1])
    if match is None:
        raise RowError("mask_bad_name", mask[-120:])
    if names is None:
        return f"structure {int(match['class'])}"
    parts = match["image"].split("--")
    name = names.get(parts[1] if len(parts) > 1 else "", {}).get(match["class"])
    if not name:
        raise RowError("mask_unknown_class", f"class {match['class']} of {mask[-120:]}")
    return name


def read_mask(folder: Folder, mask: str, width: int, height: int) -> Box:
    """The grid box of a mask file's foreground.

    Raises:
        RowError: path_escape or one of the mask_* codes.
    """
    from PIL import Image

    try:
        data = folder.read(mask)
    except RowError as error:
        raise RowError(_MASK_CODES.get(error.code, error.code), error.detail) from None
    try:
        image = Image.open(io.BytesIO(data), formats=("PNG",))
        if image.size != (width, height):  # before any pixel is decoded: the image's size is within the limit
            raise RowError("mask_wrong_size", f"{image.width} x {image.height}, the image {width} x {height}")
        pixels = (
            np.asarray(image.convert("L") if image.mode not in ("1", "L", "P", "I;16", "I") else image) > 0
        )
    except (OSError, SyntaxError, ValueError) as error:
        if isinstance(error, RowError):
            raise
        text = re.sub(r" ?<_io\S+ object at \w+>", "", str(error))  # an address would differ each time
        raise RowError("mask_unreadable", text[:120]) from None
    share, border = float(pixels.mean()), np.r_[pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]]
    if share > 0.5 and border.mean() > 0.99:
        raise RowError(
            "mask_inverted" if share < 1 else "mask_full", f"{share:.0%} of the image, all of its border"
        )
    if share > FULL:
        raise RowError("mask_full", f"{share:.0%} of the image")
    box = mask_box(pixels)
    if box is None:
        raise RowError("mask_empty", "no foreground")
    return pixels_to_grid(box, width, height)


def turns(image: str, objects: Sequence[tuple[str, Box]], seed: int) -> tuple[Turn, ...]:
    """All four tasks from an image's (name, grid box) pairs, one per mask."""
    digest = hashlib.sha256(f"{seed}:{image}".encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    boxes: dict[str, list[Box]] = {}
    owners: dict[Box, set[str]] = {}
    for name, box in sorted(objects, key=lambda item: (item[0], item[1])):
        owners.setdefault(box, set()).add(name)
        if box not in boxes.setdefault(name, []):
            boxes[name].append(box)
    unions = {}
    for name, places in boxes.items():
        boxes[name], unions[name] = _apart(places)
    result: list[Turn] = []
    for name, places in boxes.items():
        result.extend(locate_all(name, union) for union in unions[name])
        result.append(locate(name, places, name_first=bool(rng.random() < 0.5)))
        result.extend(identify(name, box) for box in places if len(owners[box]) == 1)
    distinct = [(name, box) for name, places in boxes.items() for box in places]
    name, box = distinct[int(rng.integers(len(distinct)))]
    result.append(caption(name, box))
    result.append(describe_scene(MODALITY_NAMES[modality_of(image)], distinct))
    return tuple(result)


def _apart(places: list[Box]) -> tuple[list[Box], list[Box]]:
    """Instances, and the union mask's box: the one that bounds the others, where they are at least two."""
    for place in places:
        others = [other for other in places if other != place]
        if len(others) > 1:
            corners = list(zip(*others, strict=True))
            if place == (min(corners[0]), min(corners[1]), max(corners[2]), max(corners[3])):
                return others, [place]
    return places, []


def record(image: str, objects: Sequence[tuple[str, Box]], seed: int) -> Record:
    return Record(image.rsplit(".", 1)[0], image, turns(image, objects, seed))
