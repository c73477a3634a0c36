"""Mask folders: every mask a target or a reason, and four tasks out of names and boxes."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clinkd.data.boxes import format_box, parse_boxes
from clinkd.data.samed2d import CLASSES, INDEX, class_names, is_folder, object_name, read, read_mask, record
from clinkd.data.validate import Folder, Limits, RowError, check_turn

STEM = "ct_00--AMOS--p.1 a--z_0001"
SIDE = 100


def mask(*boxes: tuple[int, int, int, int], size: tuple[int, int] = (SIDE, SIDE)) -> np.ndarray:
    pixels = np.zeros(size[::-1], np.uint8)
    for x1, y1, x2, y2 in boxes:
        pixels[y1:y2, x1:x2] = 255
    return pixels


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    Image.new("L", (SIDE, SIDE)).save(tmp_path / "images" / f"{STEM}.png")
    return tmp_path


def save(root: Path, pixels: np.ndarray, code: str = "0003_000", mode: str | None = None) -> str:
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(root / "masks" / f"{STEM}--{code}.png")
    return f"masks/{STEM}--{code}.png"


def test_a_mask_becomes_the_box_of_its_foreground(root: Path) -> None:
    pixels = mask((10, 20, 30, 40))
    for mode in ("L", "1", "P", "RGB", "RGBA"):
        path = save(root, pixels, mode=mode)
        assert read_mask(Folder(root, Limits()), path, SIDE, SIDE) == (100, 200, 300, 400)
    low = save(root, (pixels > 0).astype(np.uint8))  # foreground 1, not 255
    assert read_mask(Folder(root, Limits()), low, SIDE, SIDE) == (100, 200, 300, 400)


@pytest.mark.parametrize(
    ("pixels", "code"),
    [
        (mask(), "mask_empty"),
        (mask((10, 10, 20, 20), size=(SIDE, 50)), "mask_wrong_size"),
        (255 - mask((10, 10, 60, 60)), "mask_inverted"),
        (255 - mask(), "mask_full"),
        (mask((0, 0, SIDE, SIDE - 1)), "mask_full"),
    ],
)
def test_a_mask_that_says_nothing_is_refused(root: Path, pixels: np.ndarray, code: str) -> None:
    with pytest.raises(RowError) as caught:
        read_mask(Folder(root, Limits()), save(root, pixels), SIDE, SIDE)
    assert caught.value.code == code


def test_files_that_are_no_masks_are_refused(root: Path) -> None:
    path = save(root, mask((1, 1, 50, 50)))
    data = (root / path).read_bytes()
    for body in (b"", b"not an image", data[: len(data) // 2]):
        (root / path).write_bytes(body)
        with pytest.raises(RowError, match="mask_unreadable"):
            read_mask(Folder(root, Limits()), path, SIDE, SIDE)
    with pytest.raises(RowError, match="mask_missing"):
        read_mask(Folder(root, Limits()), "masks/none.png", SIDE, SIDE)
    with pytest.raises(RowError, match="path_escape"):
        read_mask(Folder(root, Limits()), "../mask.png", SIDE, SIDE)


def test_a_large_structure_that_leaves_the_image_is_no_inverted_mask(root: Path) -> None:
    path = save(root, mask((0, 0, 70, SIDE)))
    assert read_mask(Folder(root, Limits()), path, SIDE, SIDE) == (0, 0, 700, 1000)


def test_names_come_from_the_mapping(root: Path) -> None:
    (root / CLASSES).write_text(json.dumps({"AMOS": {"left_kidney": "0003", "lower-grade_glioma": "0004"}}))
    names = class_names(root)
    assert object_name(f"masks/{STEM}--0003_000.png", names) == "left kidney"
    assert object_name(f"masks/{STEM}--0004_002.png", names) == "lower-grade glioma"
    for name, code in [
        (f"{STEM}--0005_000.png", "mask_unknown_class"),
        ("ct_00--Other--p--z_1--0003_000.png", "mask_unknown_class"),
        (f"{STEM}.png", "mask_bad_name"),
    ]:
        with pytest.raises(RowError, match=code):
            object_name(f"masks/{name}", names)


def test_without_mapping_an_object_is_called_by_its_number(root: Path) -> None:
    assert class_names(root) is None
    assert object_name(f"masks/{STEM}--0003_000.png", None) == "structure 3"


def test_a_broken_mapping_or_index_says_so(root: Path) -> None:
    for text in ("{", "[]", '{"AMOS": 3}'):
        (root / CLASSES).write_text(text)
        with pytest.raises(RowError, match="invalid_json"):
            class_names(root)
    for text in ("{", '{"images/a.png": 3}'):
        (root / INDEX).write_text(text)
        with pytest.raises(RowError, match="invalid_json"):
            list(read(root))


def test_the_folder_is_read_by_index_or_by_names(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [save(root, mask((1, 1, 50, 50)), code) for code in ("0003_000", "0003_001")]
    Image.new("L", (9, 9)).save(root / "masks" / "ct_00--AMOS--other--z_0001--0003_000.png")
    by_name = list(read(root))
    assert [(row.image, row.masks) for row in by_name] == [
        (f"images/{STEM}.png", tuple(paths)),
        ("", ("masks/ct_00--AMOS--other--z_0001--0003_000.png",)),
    ]
    (root / INDEX).write_text(json.dumps({f"images/{STEM}.png": paths[:1]}))
    assert [(row.image, row.masks) for row in read(root)] == [(f"images/{STEM}.png", (paths[0],))]
    monkeypatch.setitem(sys.modules, "ijson", None)  # the index in memory, where there is no streaming
    assert [(row.image, row.masks) for row in read(root)] == [(f"images/{STEM}.png", (paths[0],))]
    assert is_folder(root) and not is_folder(root / "images")


LEFT, RIGHT, TOP = (0, 400, 100, 500), (800, 400, 950, 500), (400, 0, 600, 300)


def test_all_four_tasks_come_of_one_image() -> None:
    made = record(f"{STEM}.png", [("liver", TOP), ("left kidney", LEFT)], seed=0)
    assert Counter(turn.task for turn in made.turns) == {"vg": 2, "roc": 2, "rc": 1, "mia": 1}
    assert (made.id, made.image) == (STEM, f"{STEM}.png")
    for turn in made.turns:
        assert check_turn(turn.question, turn.answer) == turn
    assert made.turns[-1].answer.startswith(
        "The CT image displays, from left to right, the left kidney and the liver."
    )


def test_instances_of_one_class_are_one_question_with_every_box() -> None:
    turns = record(f"{STEM}.png", [("polyp", RIGHT), ("polyp", LEFT), ("polyp", LEFT)], seed=0).turns
    vg = [turn for turn in turns if turn.task == "vg"]
    assert [parse_boxes(turn.answer) for turn in vg] == [[LEFT, RIGHT]]
    assert sum(turn.task == "roc" for turn in turns) == 2


def test_a_union_mask_beside_its_instances_is_no_object_of_its_own_but_has_its_question() -> None:
    union = (LEFT[0], LEFT[1], RIGHT[2], RIGHT[3])
    turns = record(f"{STEM}.png", [("lung", union), ("lung", LEFT), ("lung", RIGHT)], seed=0).turns
    located, whole = sorted(
        (turn for turn in turns if turn.task == "vg"), key=lambda turn: "every" in turn.question
    )
    assert parse_boxes(located.answer) == [LEFT, RIGHT] and parse_boxes(whole.answer) == [union]
    assert whole.question == "Which region of the image holds every lung?"
    scene, caption = turns[-1], turns[-2]
    assert format_box(union) not in caption.question and scene.answer.count("lung") == 2  # listed, largest
    assert all(check_turn(turn.question, turn.answer) == turn for turn in turns)
    assert {parse_boxes(turn.question)[0] for turn in turns if turn.task == "roc"} == {LEFT, RIGHT}
    named = [("lung", union), ("left lung", LEFT), ("right lung", RIGHT)]  # a class of its own has a name
    assert sum(turn.task == "vg" for turn in record(f"{STEM}.png", named, seed=0).turns) == 3
    pair = record(f"{STEM}.png", [("lung", union), ("lung", LEFT)], seed=0).turns
    assert len(parse_boxes(next(turn for turn in pair if turn.task == "vg").answer)) == 2


def test_what_a_caption_says_is_the_classs_and_the_boxs(seed: int = 0) -> None:
    """Laterality comes from the class name, the place from the box: none is made up from the other."""
    for name, box, where in [
        ("left kidney", (800, 400, 950, 500), "right"),  # on the image's right, as radiology shows it
        ("kidney", (0, 0, 150, 150), "upper left"),
        ("liver", (400, 400, 600, 600), "centre"),
    ]:
        (turn,) = [turn for turn in record(f"{STEM}.png", [(name, box)], seed).turns if turn.task == "rc"]
        assert f"the {name}, a" in turn.answer and turn.answer.endswith(f"in the {where} of the image.")


def test_a_box_that_two_names_share_is_not_asked_about() -> None:
    turns = record(f"{STEM}.png", [("lung", TOP), ("infection", TOP), ("heart", LEFT)], seed=0).turns
    assert [turn.answer for turn in turns if turn.task == "roc"] == ["Heart"]
    assert sum(turn.task == "vg" for turn in turns) == 3


def test_the_wording_follows_seed_and_image_and_not_the_masks_order() -> None:
    objects = [(f"structure {number}", (number, 0, 500 + number, 400)) for number in range(8)]
    made = record(f"{STEM}.png", objects, seed=0)
    assert record(f"{STEM}.png", objects[::-1], seed=0) == made
    assert any(record(f"{STEM}.png", objects, seed=seed).turns != made.turns for seed in range(1, 9))
