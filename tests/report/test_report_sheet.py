"""The sample sheet of prepared data."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from clinkd.data.shards import DataError, schema
from clinkd.report.overlays import STYLES
from clinkd.report.sheet import marks_of, sample_sheet

ASKED = (
    ("vg", "Where is the liver?", "<box>(100,200),(500,600)</box>"),
    ("roc", "What is at <box>(100,200),(500,600)</box>?", "Liver"),
    ("vg", "Where is the stone?", "<box>(700,700),(900,900)</box>"),
    ("mia", "Describe the image.", "A CT image."),
)
TURNS = [{"task": task, "question": asks, "answer": says, "trusted": True} for task, asks, says in ASKED]


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """Ten CT images and one of ultrasound; the last CT's bytes are no image."""
    buffer = io.BytesIO()
    Image.new("L", (64, 48)).save(buffer, "PNG")
    rows = []
    for number in range(11):
        modality = "ultrasound" if number == 0 else "ct"
        png = buffer.getvalue() if number < 10 else b"nothing"
        rows.append(
            {"id": str(number), "image": f"{modality}_{number}.png", "modality": modality, "split": "train",
             "png": png, "width": 64, "height": 48, "turns": TURNS}
        )  # fmt: skip
    (tmp_path / "shards").mkdir()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema()), tmp_path / "shards" / "part-0.parquet")
    (tmp_path / "manifest.json").write_text(json.dumps({"shards": [{"name": "part-0.parquet"}]}))
    return tmp_path


def test_a_box_is_named_by_its_class_else_by_its_question():
    assert [(mark.box, mark.label) for mark in marks_of(TURNS)] == [
        ((100, 200, 500, 600), "liver"),
        ((700, 700, 900, 900), "Where is the stone?"),
    ]


def test_the_sheet_shows_every_modality_and_its_boxes(prepared: Path):
    out = prepared / "new" / "sheet.png"
    assert sample_sheet(prepared, out, count=2) == 2
    pixels = np.asarray(Image.open(out))
    green = (pixels == STYLES["truth"][0]).all(-1)
    first, second = green[:256, :256], green[:256, 256:512]  # one CT, one ultrasound: the same boxes on both
    assert first.sum() > 500 and (first == second).all()
    assert not green[:, 512:].any()


def test_the_choice_is_seeded_and_a_broken_image_has_its_place(prepared: Path):
    assert sample_sheet(prepared, prepared / "a.png", count=50) == 11
    sample_sheet(prepared, prepared / "b.png", count=50)
    sample_sheet(prepared, prepared / "c.png", count=50, seed=1)
    a, b, c = ((prepared / name).read_bytes() for name in ("a.png", "b.png", "c.png"))
    assert a == b != c
    red, other = (np.asarray(Image.open(prepared / "a.png"), np.int16)[..., channel] for channel in (0, 2))
    assert (red > other + 150).sum() > 20  # its tile says why it is empty


def test_a_folder_that_is_not_prepared_is_said(tmp_path: Path):
    with pytest.raises(DataError, match="no prepared data"):
        sample_sheet(tmp_path, tmp_path / "sheet.png")
    assert not (tmp_path / "sheet.png").exists()
