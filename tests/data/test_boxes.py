"""The 0-1000 grid: text in and out, pixels in and out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clinkd.data.boxes import (
    GRID,
    BoxError,
    format_box,
    from_qwen,
    grid_to_pixels,
    iou,
    mask_box,
    parse_boxes,
    pixels_to_grid,
    to_qwen,
)


@st.composite
def boxes(draw: st.DrawFn, width: int = GRID, height: int = GRID) -> tuple[int, int, int, int]:
    x1, y1 = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
    return x1, y1, draw(st.integers(x1 + 1, width)), draw(st.integers(y1 + 1, height))


@given(
    st.lists(boxes(), max_size=4),
    st.text(st.characters(codec="utf-8", exclude_characters="<>|"), max_size=20),
)
def test_what_is_written_is_read_back(listed: list, between: str) -> None:
    text = between.join(["", *(format_box(box) for box in listed), ""])
    assert parse_boxes(text) == listed
    assert from_qwen(to_qwen(text)) == text
    assert "<box>" not in to_qwen(text)


@given(st.data())
def test_pixels_to_grid_and_back_is_within_one_grid_step(data: st.DataObject) -> None:
    width, height = data.draw(st.integers(8, 4096)), data.draw(st.integers(8, 4096))
    pixels = data.draw(boxes(width, height))
    grid = pixels_to_grid(pixels, width, height)
    assert 0 <= grid[0] < grid[2] <= GRID and 0 <= grid[1] < grid[3] <= GRID
    assert parse_boxes(format_box(grid)) == [grid]
    for exact, back, side in zip(
        pixels, grid_to_pixels(grid, width, height), (width, height) * 2, strict=True
    ):
        assert abs(exact - back) <= side / GRID + 1e-9


@pytest.mark.parametrize("pixels", [(-9, -9, -5, -5), (100, 100, 120, 120), (0, 0, 0, 0)])
def test_a_box_off_the_image_still_gives_a_box_on_the_grid(pixels: tuple) -> None:
    x1, y1, x2, y2 = pixels_to_grid(pixels, 100, 100)
    assert 0 <= x1 < x2 <= GRID and 0 <= y1 < y2 <= GRID


def test_spaces_and_line_feeds_inside_a_box_are_read() -> None:
    assert parse_boxes("<box> ( 1, 2 ) ,\n(3 ,4) </box>") == [(1, 2, 3, 4)]


@pytest.mark.parametrize(
    ("span", "code"),
    [
        ("(1,2),(3)", "box_broken"),
        ("", "box_broken"),
        ("1,2,3,4", "box_broken"),
        ("(nan,2),(3,4)", "box_nan"),
        ("(1.5,2),(3,4)", "box_broken"),
        ("(1,2),(3,4),(5,6)", "box_broken"),
        ("(-1,2),(3,4)", "box_out_of_range"),
        ("(1,2),(3,1001)", "box_out_of_range"),
        ("(5,2),(3,4)", "box_inverted"),
        ("(1,8),(3,4)", "box_inverted"),
        ("(3,2),(3,4)", "box_empty"),
        ("(1,4),(3,4)", "box_empty"),
    ],
)
def test_a_bad_box_says_what_is_wrong_or_is_left_out(span: str, code: str) -> None:
    text = f"the <box>{span}</box> and <box>(1,2),(3,4)</box>"
    with pytest.raises(BoxError) as caught:
        parse_boxes(text)
    assert caught.value.code == code
    assert parse_boxes(text, strict=False) == [(1, 2, 3, 4)]


@pytest.mark.parametrize("text", ["<box>(1,2),(3,4)", "(1,2),(3,4)</box>", "<box><box>(1,2),(3,4)</box>"])
def test_a_box_left_open_is_broken(text: str) -> None:
    with pytest.raises(BoxError, match="box_broken"):
        parse_boxes(text)


@given(boxes(), boxes())
def test_iou_is_symmetric_and_one_only_for_the_same_box(a: tuple, b: tuple) -> None:
    assert iou(a, b) == iou(b, a)
    assert 0 <= iou(a, b) <= 1
    assert (iou(a, b) == 1) == (a == b)


def test_iou_counts_area() -> None:
    assert iou((0, 0, 10, 10), (5, 0, 15, 10)) == pytest.approx(1 / 3)
    assert iou((0, 0, 10, 10), (10, 0, 20, 10)) == 0
    assert iou((5, 5, 5, 5), (5, 5, 5, 5)) == 0


def test_a_masks_box_reaches_past_its_last_pixel() -> None:
    mask = np.zeros((6, 9), bool)
    assert mask_box(mask) is None
    mask[2, 3] = mask[4, 8] = True
    assert mask_box(mask) == (3, 2, 9, 5)
