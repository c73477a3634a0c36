"""Regions and phrases from turns, and the cells of a grid that a box covers."""

from hypothesis import given
from hypothesis import strategies as st

from clinkd.data.regions import coverage, region_pairs, without_boxes

BOX = "<box>(0,0),(500,250)</box>"


def turn(task: str, question: str, answer: str) -> dict:
    return {"task": task, "question": question, "answer": answer}


def test_each_task_gives_the_pair_it_holds() -> None:
    pairs = region_pairs(
        [
            turn("vg", "Where is the liver?", f"The liver is at {BOX}."),
            turn("roc", f"What is at the {BOX}?", "Left kidney"),
            turn("rc", f"Describe {BOX}.", "This region contains the spleen."),
            turn("mia", "What can you see?", "A CT image."),
        ]
    )
    assert [(pair.phrase, pair.name) for pair in pairs] == [
        ("Where is the liver?", False), ("left kidney", True), ("This region contains the spleen.", False)
    ]  # fmt: skip
    assert {pair.boxes for pair in pairs} == {((0, 0, 500, 250),)}


def test_turns_without_a_usable_box_give_none() -> None:
    turns = [turn("vg", "Where?", "Nowhere."), turn("roc", "At <box>(5,5),(1,1)</box>?", "x")]
    assert not region_pairs(turns)


def test_boxes_leave_a_text() -> None:
    assert without_boxes(f"What is at the {BOX} ?") == "What is at the ?"


def test_coverage_of_a_half_and_of_a_quarter_cell() -> None:
    assert coverage(((0, 0, 500, 1000),), 2, 2).tolist() == [1, 0, 1, 0]
    assert coverage(((0, 0, 250, 500),), 2, 2).tolist() == [0.5, 0, 0, 0]


@given(st.integers(0, 998), st.integers(0, 998), st.integers(1, 999), st.integers(1, 999), st.integers(1, 9))
def test_covered_area_is_the_boxs_area(x: int, y: int, width: int, height: int, cells: int) -> None:
    box = (x, y, min(1000, x + width), min(1000, y + height))
    area = (box[2] - box[0]) * (box[3] - box[1]) / 1e6
    share = coverage((box,), cells, cells)
    assert share.min() >= 0 and share.max() <= 1 + 1e-5
    assert abs(share.sum() / cells**2 - area) < 1e-4
