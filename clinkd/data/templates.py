"""Wording that phantoms and mask folders share: the four tasks' turns from names and boxes.

The wording of an answer follows from the wording of its question; what varies is given by the caller, who
draws it from a seed.
"""

from __future__ import annotations

from collections.abc import Sequence

from clinkd.data.boxes import GRID, format_box
from clinkd.data.records import Box, Turn


def place(box: Box) -> str:
    """Where a box lies, in thirds of the image: "upper left", "centre", …"""
    column = ("left", "", "right")[min(2, 3 * (box[0] + box[2]) // (2 * GRID))]
    row = ("upper", "", "lower")[min(2, 3 * (box[1] + box[3]) // (2 * GRID))]
    return f"{row} {column}".strip() or "centre"


def size_word(box: Box) -> str:
    share = (box[2] - box[0]) * (box[3] - box[1]) / GRID**2
    return "small" if share < 0.05 else "large" if share > 0.1 else "medium"


def locate(name: str, boxes: Sequence[Box], *, name_first: bool) -> Turn:
    """VG: where an object is. Several boxes (instances of one name) are all listed, joined by "and"."""
    where = " and ".join(format_box(box) for box in boxes)
    if name_first:
        return Turn(
            "vg", f"Where is the {name} located in the image?", f"The {name} is located at the {where}."
        )
    return Turn("vg", f"Please point out the {name}.", f"{where} shows the {name}.")


def locate_all(name: str, union: Box) -> Turn:
    """VG of a union mask: the one box that holds every instance of a name."""
    question = f"Which region of the image holds every {name}?"
    return Turn("vg", question, f"Every {name} lies within the {format_box(union)}.")


def identify(name: str, box: Box) -> Turn:
    """ROC: what a box holds. Only the first letter is raised: "COVID-19 infection" keeps its capitals."""
    question = f"What anatomical structure or finding is present at the {format_box(box)}?"
    return Turn("roc", question, name[:1].upper() + name[1:])


def caption(name: str, box: Box) -> Turn:
    """RC: what a region contains."""
    return Turn(
        "rc",
        f"Can you describe the content within the {format_box(box)}?",
        f"This region contains the {name}, a {size_word(box)} structure in the {place(box)} of the image.",
    )


def listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def describe_scene(modality: str, objects: Sequence[tuple[str, Box]]) -> Turn:
    """MIA: all objects from left to right, and the largest."""
    ordered = sorted(objects, key=lambda item: (item[1][0] + item[1][2], item[0]))
    names = list(dict.fromkeys(f"the {name}" for name, _ in ordered))
    largest = max(objects, key=lambda item: ((item[1][2] - item[1][0]) * (item[1][3] - item[1][1]), item[0]))[
        0
    ]
    return Turn(
        "mia",
        "What can you interpret from the overall image?",
        f"The {modality} image displays, from left to right, {listed(names)}. "
        f"It shows the {largest} as the largest.",
    )
