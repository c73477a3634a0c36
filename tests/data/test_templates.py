"""The wording of the four tasks."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clinkd.data.boxes import parse_boxes
from clinkd.data.templates import caption, describe_scene, identify, listed, locate, place, size_word
from clinkd.data.validate import check_turn

BOX = (100, 200, 300, 400)


def test_the_four_turns_as_written() -> None:
    assert locate("liver", [BOX], name_first=True).answer == (
        "The liver is located at the <box>(100,200),(300,400)</box>."
    )
    assert (
        locate("liver", [BOX], name_first=False).answer == "<box>(100,200),(300,400)</box> shows the liver."
    )
    assert identify("left kidney", BOX).answer == "Left kidney"
    assert caption("liver", BOX).answer == (
        "This region contains the liver, a small structure in the upper left of the image."
    )
    scene = describe_scene("CT", [("spleen", (600, 0, 900, 300)), ("liver", BOX)])
    assert scene.answer == (
        "The CT image displays, from left to right, the liver and the spleen. "
        "It shows the spleen as the largest."
    )


def test_an_acronym_keeps_its_capitals() -> None:
    assert identify("COVID-19 infection", BOX).answer == "COVID-19 infection"


def test_vg_lists_every_instance() -> None:
    turn = locate("polyp", [BOX, (500, 500, 600, 600)], name_first=True)
    assert parse_boxes(turn.answer) == [BOX, (500, 500, 600, 600)]


@pytest.mark.parametrize(
    ("box", "where"),
    [
        ((0, 0, 100, 100), "upper left"),
        ((450, 450, 550, 550), "centre"),
        ((450, 800, 550, 1000), "lower"),
        ((900, 450, 1000, 550), "right"),
        ((0, 0, 1000, 1000), "centre"),
    ],
)
def test_places_are_thirds_of_the_image(box: tuple, where: str) -> None:
    assert place(box) == where


def test_sizes_are_shares_of_the_image() -> None:
    assert [size_word((0, 0, side, side)) for side in (200, 300, 400)] == ["small", "medium", "large"]


def test_lists_read_like_english() -> None:
    assert [listed(["a"]), listed(["a", "b"]), listed(["a", "b", "c"])] == ["a", "a and b", "a, b and c"]


@given(st.tuples(st.integers(0, 998), st.integers(0, 998)), st.booleans())
def test_each_turn_passes_the_row_checks_as_its_own_task(corner: tuple[int, int], name_first: bool) -> None:
    box = (*corner, 999, 999)
    for turn in (
        locate("liver", [box], name_first=name_first),
        identify("right lung", box),
        caption("liver", box),
        describe_scene("CT", [("liver", box)]),
    ):
        assert check_turn(turn.question, turn.answer) == turn
