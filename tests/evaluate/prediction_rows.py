"""Golden files and prediction rows for the tests beside it."""

import json
from pathlib import Path

GOLDEN = Path(__file__).parents[1] / "golden" / "evaluation"

IMAGES = {
    "ct": "ct_00--A--1--z.png", "mr": "mr_t1--B--1--z.png", "x": "x_ray--C--1--2d_none.png",
    "pet": "pet_00--D--1--z.png", "endoscopy": "endoscopy_00--E--1--2d_none.png",
    "dermoscopy": "dermoscopy_00--F--1--2d_none.png", "fundus": "fundus_photography--G--1--2d_none.png",
    "ultrasound": "ultrasound_00--H--1--2d_none.png",
}  # fmt: skip


def golden(name):
    """The official scripts' own output."""
    return json.loads((GOLDEN / name).read_text())


def row(annotation, response, modality="ct", id=0, image=None, **more):
    """One prediction row."""
    image = image or IMAGES[modality]
    return {"id": id, "image": image, "question": "q", "annotation": annotation, "response": response, **more}
