"""What a sample is, for every other room: tasks, modalities, turns and records.

A *record* is one image with its turns, as in Med-GRIT's own files; a *sample* is one turn of one record,
named ``<record id>#<turn>``. Shards store records (the image once), models see samples.
"""

from __future__ import annotations

from dataclasses import dataclass, field

TASKS = ("vg", "roc", "rc", "mia")
MODALITIES = ("ct", "mr", "x", "pet", "endoscopy", "dermoscopy", "fundus", "ultrasound")
TASK_NAMES = {
    "vg": "visual grounding",
    "roc": "referring object classification",
    "rc": "referring captioning",
    "mia": "medical image analysis",
}
# How an image of the modality is spoken of.
MODALITY_NAMES = {
    "ct": "CT", "mr": "MR", "x": "X-ray", "pet": "PET", "endoscopy": "endoscopic",
    "dermoscopy": "dermoscopic", "fundus": "fundus", "ultrasound": "ultrasound",
}  # fmt: skip

Box = tuple[int, int, int, int]
"""(x1, y1, x2, y2) on the 0-1000 grid of the image, x1 < x2 and y1 < y2."""


def modality_of(image_name: str) -> str:
    """The published protocol's modality: the name up to its first underscore (may not be in MODALITIES)."""
    return image_name.split("_", 1)[0]


def case_of(image_name: str) -> str:
    """The patient of an SA-Med2D name ``{modality}--{dataset}--{case}--{slice}.png``; else the whole stem."""
    stem = image_name.rsplit(".", 1)[0]
    parts = stem.split("--")
    return "--".join(parts[1:3]) if len(parts) >= 4 else stem


@dataclass(frozen=True, slots=True)
class Turn:
    """One question and its answer, both plain text with ``<box>(x1,y1),(x2,y2)</box>`` spans."""

    task: str
    question: str
    answer: str
    trusted: bool = True  # False: the question has no answer one may train on as truth; the teacher labels it


@dataclass(frozen=True, slots=True)
class Record:
    """One image and all that is asked about it. ``image`` is a bare file name, never a path.

    ``more`` are the further images of a conversation about several; the model sees all of them, in order, at
    the beginning of each question.
    """

    id: str
    image: str
    turns: tuple[Turn, ...] = field(default=())
    more: tuple[str, ...] = field(default=())

    @property
    def modality(self) -> str:
        return modality_of(self.image)


def sample_id(record_id: str, turn: int) -> str:
    return f"{record_id}#{turn}"
