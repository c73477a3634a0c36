"""Boxes in a model's own spelling: through the grid, through pixels, through resizing, and back."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clinkd.data.boxes import GRID, BoxError, format_box, grid_to_pixels, parse_boxes, pixels_to_grid
from clinkd.data.codec import BoxCodec, smart_resize

SIDES = st.integers(28, 4000)


@st.composite
def grid_boxes(draw: st.DrawFn, limit: int = GRID) -> tuple[int, int, int, int]:
    x1, y1 = draw(st.integers(0, limit - 1)), draw(st.integers(0, limit - 1))
    return x1, y1, draw(st.integers(x1 + 1, limit)), draw(st.integers(y1 + 1, limit))


def through(codec: BoxCodec, box: tuple) -> tuple:
    (back,) = parse_boxes(codec.decode(codec.encode(f"At {format_box(box)}.")), strict=False)
    return back


def worst(a: tuple, b: tuple) -> int:
    return max(abs(x - y) for x, y in zip(a, b, strict=True))


@given(grid_boxes(), st.integers(334, 4000), st.integers(334, 4000))
def test_to_the_models_pixels_and_back_is_within_one_grid_step(box: tuple, width: int, height: int) -> None:
    """Of a box that is not narrower than a pixel; half a pixel is up to 1.5 grid steps before rounding."""
    x1, y1, x2, y2 = box
    x2, y2 = max(x2, min(GRID, x1 + 3)), max(y2, min(GRID, y1 + 3))
    box = (min(x1, x2 - 3), min(y1, y2 - 3), x2, y2)
    assert worst(through(BoxCodec("pixels", width, height), box), box) <= 1


@given(grid_boxes(), SIDES, SIDES)
def test_in_a_small_image_it_is_within_half_a_pixel_or_the_least_box(
    box: tuple, width: int, height: int
) -> None:
    """A box of less than a pixel becomes one pixel; others move by half a pixel at most, then a rounding."""
    back = through(BoxCodec("pixels", width, height), box)
    for low, high, side in ((0, 2, width), (1, 3, height)):
        step = GRID / side
        limit = step / 2 + 0.5 if (box[high] - box[low]) >= step else step + 0.5
        assert max(abs(back[low] - box[low]), abs(back[high] - box[high])) <= limit + 1e-9


@given(st.data(), st.integers(28, 1000), st.integers(28, 1000))
def test_pixels_to_the_grid_and_back_is_exact_up_to_a_thousand(
    data: st.DataObject, width: int, height: int
) -> None:
    x1, y1 = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    box = (x1, y1, data.draw(st.integers(x1 + 1, width)), data.draw(st.integers(y1 + 1, height)))
    codec = BoxCodec("pixels", width, height)
    said = f"<|box_start|>({box[0]},{box[1]}),({box[2]},{box[3]})<|box_end|>"
    assert codec.encode(codec.decode(said)) == said


@given(grid_boxes(), SIDES, SIDES)
def test_the_grid_does_not_change_when_an_image_is_resized(box: tuple, width: int, height: int) -> None:
    try:
        high, wide = smart_resize(height, width, min_pixels=256 * 28 * 28)
    except ValueError:
        return
    pixels = grid_to_pixels(box, width, height)  # sub-pixel, in the image as it came
    moved = [pixels[0] * wide / width, pixels[1] * high / height,
             pixels[2] * wide / width, pixels[3] * high / height]  # fmt: skip
    assert worst(pixels_to_grid(moved, wide, high), box) <= 1


@given(grid_boxes(), SIDES, SIDES)
def test_no_box_loses_its_area_or_leaves_the_image(box: tuple, width: int, height: int) -> None:
    codec = BoxCodec("pixels", width, height)
    text = codec.encode(format_box(box)).removeprefix("<|box_start|>").removesuffix("<|box_end|>")
    x1, y1, x2, y2 = map(int, text.replace("(", "").replace(")", "").split(","))
    assert 0 <= x1 < x2 <= width and 0 <= y1 < y2 <= height


@given(st.text(), grid_boxes())
def test_the_grid_spelling_only_renames_the_marks(text: str, box: tuple) -> None:
    whole = f"{text} {format_box(box)}"
    codec = BoxCodec()
    assert codec.decode(codec.encode(whole)) == codec.decode(whole)
    assert codec.encode(format_box(box)) == f"<|box_start|>{format_box(box)[5:-6]}<|box_end|>"


def test_a_known_box() -> None:
    codec = BoxCodec("pixels", width=448, height=336)
    assert codec.encode("At <box>(100,200),(500,1000)</box>.") == (
        "At <|box_start|>(45,67),(224,336)<|box_end|>."
    )
    assert codec.decode("<|box_start|>(45,67),(224,336)<|box_end|>") == "<box>(100,199),(500,1000)</box>"


def test_what_a_model_says_wrongly_stays_wrong() -> None:
    codec = BoxCodec("pixels", 448, 448)
    for said in ("(1,2),(3)", "(a,b),(c,d)", "(1.5,2),(3,4)", f"({'9' * 5000},2),(3,4)"):
        assert codec.decode(f"<box>{said}</box>") == f"<box>{said}</box>"
    assert parse_boxes(codec.decode("<box>(10,10),(600,200)</box>"), strict=False) == []  # beyond the image
    with pytest.raises(BoxError, match="box_inverted"):
        parse_boxes(codec.decode("<box>(200,10),(10,200)</box>"))
    with pytest.raises(BoxError):
        codec.encode("<box>(1,2)</box>")


@pytest.mark.parametrize("arguments", [("pixels",), ("pixels", 448, 0), ("inches", 448, 448)])
def test_a_codec_that_cannot_be_is_refused(arguments: tuple) -> None:
    with pytest.raises(ValueError, match="box codec"):
        BoxCodec(*arguments)


@settings(deadline=None)  # the first example imports transformers
@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([(56 * 56, 12845056), (200704, 1003520)]))
def test_resizing_is_the_processors(height: int, width: int, limits: tuple[int, int]) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as theirs

    asked = {"factor": 28, "min_pixels": limits[0], "max_pixels": limits[1]}
    try:
        wanted = theirs(height, width, **asked)
    except ValueError:
        with pytest.raises(ValueError):
            smart_resize(height, width, **asked)
    else:
        assert smart_resize(height, width, **asked) == tuple(wanted)
