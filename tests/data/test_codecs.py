"""Boxes as models spell them: grid and pixels agree, whatever the image was resized to."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_boxes import boxes
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as theirs

from clinkd.data.boxes import GRID, format_box, grid_to_pixels, parse_boxes, pixels_to_grid
from clinkd.data.codecs import WHOLE, GridCodec, PixelCodec, codec_for, smart_resize

SIDES = st.integers(1, 150).map(lambda patches: 28 * patches)  # what a processor resizes to: 28 .. 4200


def there_and_back(codec: GridCodec | PixelCodec, box: tuple) -> tuple:
    (back,) = parse_boxes(codec.from_model(codec.to_model(f"the {format_box(box)}, there")))
    return back


@given(boxes(), SIDES, SIDES)
def test_the_grid_is_told_as_it_is(box: tuple, width: int, height: int) -> None:
    assert there_and_back(codec_for("qwen2_vl", height // 14, width // 14), box) == box


@given(boxes(), st.integers(28, 5000), st.integers(28, 5000))
def test_with_decimals_every_box_comes_back_within_one_grid_step(box: tuple, width: int, height: int) -> None:
    back = there_and_back(PixelCodec(width, height, subpixel=True), box)
    assert max(abs(a - b) for a, b in zip(box, back, strict=True)) <= 1


@given(boxes(), st.integers(WHOLE, 5000), st.integers(WHOLE, 5000))
def test_whole_pixels_bring_every_box_back_within_one_grid_step_from_501_a_side(
    box: tuple, width: int, height: int
) -> None:
    back = there_and_back(PixelCodec(width, height), box)
    assert max(abs(a - b) for a, b in zip(box, back, strict=True)) <= 1


@given(boxes(), st.integers(28, 5000))
def test_whole_pixels_of_a_smaller_image_are_as_near_as_a_pixel_is_fine(box: tuple, side: int) -> None:
    back = there_and_back(PixelCodec(side, side), box)
    for low, high in ((0, 2), (1, 3)):
        thin = (box[high] - box[low]) * side < GRID  # thinner than a pixel: one end has to give way
        bound = 1000 / side if thin else 500 / side + 0.5
        errors = [abs(box[end] - back[end]) for end in (low, high)]
        assert max(errors) <= max(1, bound)
        assert back[low] < back[high]


def test_501_and_334_are_the_first_sides_that_hold() -> None:
    """Every pair of ends on one axis, so that the bounds named are facts and not samples."""

    def worst(side: int, width: range) -> int:
        codec, most = PixelCodec(side, side), 0
        for low in range(GRID):
            for high in (low + step for step in width if low + step <= GRID):
                first, last = (round(int(end) * GRID / side) for end in codec._side(low, high, side))
                most = max(most, abs(first - low), abs(last - high))
        return most

    for side in (501, 560, 700, 1000, 1400):
        assert worst(side, range(1, 4)) <= 1
    assert worst(476, range(1, 2)) == 2  # no whole pixels, whatever the rounding: see the next test
    for side in (334, 336, 364, 500):
        assert worst(side, range(math.ceil(GRID / side), math.ceil(GRID / side) + 3)) <= 1
    assert worst(308, range(10, 13)) == 2


@pytest.mark.parametrize("side", [308, 400])
def test_where_whole_pixels_miss_by_more_no_rounding_would_help(side: int) -> None:
    """Of all pixel pairs none is within a step of some box: the loss is the unit's and not the codec's."""
    on_grid = [round(pixel * GRID / side) for pixel in range(side + 1)]

    def reachable(low: int, high: int) -> bool:
        near = [[p for p, g in enumerate(on_grid) if abs(g - end) <= 1] for end in (low, high)]
        return any(first < last for first in near[0] for last in near[1])

    assert not all(reachable(low, low + 1) for low in range(GRID))


@given(st.data(), st.integers(28, 999), st.integers(28, 999))
def test_pixels_of_up_to_999_a_side_survive_the_grid_exactly(
    data: st.DataObject, width: int, height: int
) -> None:
    pixels = data.draw(boxes(width, height))
    written = PixelCodec(width, height).to_model(format_box(pixels_to_grid(pixels, width, height)))
    assert written == format_box(pixels).replace("<box>", "<|box_start|>").replace("</box>", "<|box_end|>")


@given(st.data())
def test_a_box_before_and_after_any_resize_is_one_box_on_the_grid(data: st.DataObject) -> None:
    width, height = data.draw(st.integers(28, 3000)), data.draw(st.integers(28, 3000))
    if max(width, height) > 200 * min(width, height):
        return
    pixels = data.draw(boxes(width, height))
    wide, high = smart_resize(width, height)
    x1, y1, x2, y2 = pixels
    resized = (x1 * wide / width, y1 * high / height, x2 * wide / width, y2 * high / height)
    before, after = pixels_to_grid(pixels, width, height), pixels_to_grid(resized, wide, high)
    # A coordinate that lies between two steps may round to either: floats differ in their last bit.
    assert max(abs(a - b) for a, b in zip(before, after, strict=True)) <= 1
    told = there_and_back(PixelCodec(wide, high, subpixel=True), before)
    shown = grid_to_pixels(told, wide, high)
    for exact, back, side in zip(resized, shown, (wide, high) * 2, strict=True):
        assert abs(exact - back) <= 2 * side / GRID + 1e-6


def test_the_spelling_is_qwens_in_pixels_of_the_resized_image() -> None:
    codec = PixelCodec(644, 504)
    told = "at <|box_start|>(64,101),(322,504)<|box_end|>"
    assert codec.to_model("at <box>(100,200),(500,1000)</box>") == told
    assert codec.from_model(told) == "at <box>(99,200),(500,1000)</box>"
    small = PixelCodec(28, 280, subpixel=True)
    assert small.to_model("<box>(1,1),(2,2)</box>") == "<|box_start|>(0.03,0.3),(0.06,0.6)<|box_end|>"


@pytest.mark.parametrize(
    "text",
    [
        "<box>(1,2),(3)</box>",
        "<box>(1,2),(3,4)",
        "nothing",
        f"<box>(1,2),({'9' * 5000},4)</box>",
        "<box>(nan,2),(3,4)</box>",
    ],
)
def test_what_is_no_box_stays_as_it_is(text: str) -> None:
    assert PixelCodec(560, 560).from_model(text) == text


def test_a_models_wrong_box_stays_wrong() -> None:
    codec = PixelCodec(1000, 1000)
    for box in ("(30,20),(10,40)", "(10,20),(10,40)", "(10,20),(2000,40)"):
        assert codec.from_model(f"<|box_start|>{box}<|box_end|>") == f"<box>{box}</box>"


@given(st.integers(1, 4000), st.integers(1, 4000), st.sampled_from([(3136, 1003520), (784, 50176)]))
def test_the_resize_is_transformers_own(width: int, height: int, area: tuple[int, int]) -> None:
    if max(width, height) > 200 * min(width, height):
        with pytest.raises(ValueError, match="resize"):
            smart_resize(width, height)
        return
    high, wide = theirs(height, width, 28, *area)
    assert smart_resize(width, height, min_pixels=area[0], max_pixels=area[1]) == (wide, high)


def test_the_model_type_chooses() -> None:
    assert codec_for("qwen2_vl", 36, 46) == GridCodec()
    assert codec_for("qwen2_5_vl", 36, 46) == PixelCodec(644, 504)
    assert codec_for("qwen2_5_vl_text", 36, 46) == PixelCodec(644, 504)
    with pytest.raises(ValueError, match="0 x 28"):
        PixelCodec(0, 28)
