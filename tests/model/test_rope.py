"""Guided rotary positions: equal to transformers and to the released code, and what they promise beyond."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clinkd.model.rope import RopeGuidance, guided_rope_index

IMAGE, VIDEO, START, END = 9001, 9002, 9000, 9003
GOLDEN = Path(__file__).parents[1] / "golden" / "rope" / "released_code.json"
PLAIN, RELEASED = RopeGuidance(), RopeGuidance(lambda_h=2.0, lambda_w=2.0)
index = partial(guided_rope_index, image_token_id=IMAGE, vision_start_token_id=START, video_token_id=VIDEO)

Part = int | tuple[int, int, int]  # so many text tokens, or the merged grid of an image


def tokens(parts: list[Part], kind: int = IMAGE) -> tuple[list[int], list[list[int]]]:
    """Token ids of one sequence and its grids before merging. Images may touch: put text between them."""
    ids: list[int] = []
    grids = []
    for part in parts:
        if isinstance(part, int):
            ids += list(range(1, part + 1))
        else:
            frames, rows, columns = part
            ids += [kind] * (frames * rows * columns)
            grids.append([frames, 2 * rows, 2 * columns])
    return ids, grids


def batch(rows: list[list[Part]], side: str = "left") -> dict[str, torch.Tensor]:
    made = [tokens(parts) for parts in rows]
    length = max(len(ids) for ids, _ in made)
    ids, mask = np.zeros((len(rows), length), dtype=np.int64), np.zeros((len(rows), length), dtype=np.int64)
    for row, (own, _) in enumerate(made):
        place = slice(length - len(own), None) if side == "left" else slice(0, len(own))
        ids[row, place], mask[row, place] = own, 1
    grids = [grid for _, own in made for grid in own]
    return {
        "input_ids": torch.tensor(ids),
        "attention_mask": torch.tensor(mask),
        "image_grid_thw": torch.tensor(grids) if grids else None,
    }


def transformers_index(inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel

    bare = SimpleNamespace(config=SimpleNamespace(vision_config=SimpleNamespace(spatial_merge_size=2)))
    bare.get_vision_position_ids = partial(Qwen2VLModel.get_vision_position_ids, bare)
    return Qwen2VLModel.get_rope_index(bare, mm_token_type_ids=(inputs["input_ids"] == IMAGE).int(), **inputs)


# Every image is followed by text, as the chat template has it (transformers cannot tell touching images
# apart).
grid = st.tuples(st.just(1), st.integers(1, 6), st.integers(1, 6))
still = st.lists(st.tuples(grid, st.integers(1, 8)), max_size=4)
layout = st.tuples(st.integers(0, 9), still)
layout = layout.map(lambda pair: [pair[0], *(part for two in pair[1] for part in two)])
layout = layout.filter(lambda parts: any(not isinstance(part, int) or part for part in parts))
guidances = st.builds(
    RopeGuidance,
    *[st.floats(0.1, 4.0) for _ in range(4)],
    gamma=st.floats(0.0, 3.0),
    mode=st.sampled_from(["none", "pair", "patch"]),
)


def scores(inputs: dict[str, torch.Tensor], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random alignment per image and relevance per patch."""
    generator = torch.Generator().manual_seed(seed)
    images = 0 if inputs["image_grid_thw"] is None else len(inputs["image_grid_thw"])
    patches = int((inputs["input_ids"] == IMAGE).sum())
    return {
        "alignment": torch.rand(images, generator=generator) if images else None,
        "relevance": torch.rand(patches, generator=generator),
    }


def guided(inputs: dict[str, torch.Tensor], guidance: RopeGuidance, seed: int = 0):
    given_scores = scores(inputs, seed)
    if given_scores["alignment"] is None:
        given_scores["alignment"] = torch.ones(len(inputs["input_ids"]))
    return index(**inputs, guidance=guidance, **given_scores)


# --- against others


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(layout, min_size=1, max_size=4), side=st.sampled_from(["left", "right"]))
def test_plain_guidance_is_the_index_of_transformers_on_200_layouts(rows, side):
    inputs = batch(rows, side)
    theirs, their_deltas = transformers_index(inputs)
    ours, deltas = index(**inputs, guidance=PLAIN)
    assert ours.dtype == torch.float32 and torch.equal(ours, theirs.float())  # padding included
    assert torch.equal(deltas, their_deltas.double())


@pytest.mark.parametrize("number", range(6))
def test_lambda_two_is_the_released_code(number):
    case = json.loads(GOLDEN.read_text())["cases"][number]
    mask = torch.tensor(case["attention_mask"])
    ids = torch.tensor(case["input_ids"])
    ours, deltas = index(ids, torch.tensor(case["image_grid_thw"]), mask, guidance=RELEASED)
    theirs = torch.tensor(case["position_ids"]).float()
    assert torch.equal(ours[:, mask.bool()], theirs[:, mask.bool()])
    # The released deltas count the padded length.
    padding = ids.shape[1] - mask.sum(1, keepdim=True)
    assert torch.equal(deltas, (torch.tensor(case["rope_deltas"]) + padding).double())


# --- the formulas, written out


def test_formula_by_hand():
    guidance = RopeGuidance(lambda_h=1.5, lambda_w=2.5, alpha_h=0.5, alpha_w=1.25)
    position, delta = index(**batch([[3, (1, 2, 3), 2]]), guidance=guidance)
    p = 2.0
    rows, columns = torch.tensor([0, 0, 0, 1, 1, 1]), torch.tensor([0, 1, 2, 0, 1, 2])
    expected = torch.stack([torch.full((6,), p + 2.0), p + 1.5 + 0.5 * rows, p + 2.5 + 1.25 * columns])
    assert torch.equal(position[:, 0, 3:9], expected)
    following = p + 2.5 + 2 * 1.25 + 2.5
    assert position[:, 0, 9:].T.tolist() == [[following] * 3, [following + 1] * 3]
    assert delta.item() == following + 2 - 11


def test_an_image_that_opens_the_sequence_starts_at_zero_whatever_the_gap():
    position, _ = index(**batch([[(1, 2, 2), 1]]), guidance=RELEASED)
    assert position[1, 0].tolist() == [0, 0, 1, 1, 3] and position[0, 0].tolist() == [0, 0, 0, 0, 3]


def test_images_that_touch_are_told_apart_and_the_second_starts_at_the_largest_coordinate_of_the_first():
    position, _ = index(**batch([[2, (1, 1, 3), (1, 2, 1), 1]]), guidance=RELEASED)
    assert position[2, 0].tolist() == [0, 1, 3, 4, 5, 7, 7, 9 + 1]
    assert position[1, 0].tolist() == [0, 1, 3, 3, 3, 7, 8, 9 + 1]


def test_frames_of_a_video_step_by_one_and_text_follows_the_largest_axis():
    ids, grids = tokens([2, (5, 1, 2), 1], kind=VIDEO)
    position, _ = index(torch.tensor([ids]), video_grid_thw=torch.tensor(grids), guidance=PLAIN)
    assert position[0, 0].tolist() == [0, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7]


def test_images_and_videos_mix_in_one_row():
    ids = [1, VIDEO, VIDEO, IMAGE, 1, IMAGE, IMAGE]
    grids, video = torch.tensor([[1, 2, 2], [1, 4, 2]]), torch.tensor([[2, 2, 2]])
    position, delta = index(torch.tensor([ids]), grids, video_grid_thw=video, guidance=PLAIN)
    assert position[0, 0].tolist() == [0, 1, 2, 3, 4, 5, 5]
    assert position[1, 0].tolist() == [0, 1, 1, 3, 4, 5, 6]
    assert delta.item() == 0


def test_pair_guidance_widens_the_gap_of_an_image_that_does_not_fit():
    guidance = RopeGuidance(lambda_h=2.0, lambda_w=1.0, gamma=0.5, mode="pair")
    inputs = batch([[1, (1, 1, 1), 1, (1, 1, 1), 1]])
    position, _ = index(**inputs, guidance=guidance, alignment=torch.tensor([1.0, 0.0]))
    assert position[1, 0].tolist() == [0, 2, 4, 4 + 3, 7 + 3]  # fits: lambda 2; does not: 2 * (1 + 0.5)
    assert position[2, 0].tolist() == [0, 1, 4, 4 + 1.5, 7 + 3]
    assert position[0, 0].tolist() == [0, 1.5, 4, 4 + 2.25, 7 + 3]


def test_alignment_goes_by_image_or_by_row():
    guidance = RopeGuidance(gamma=1.0, mode="pair")
    inputs = batch([[1, (1, 1, 1), 1, (1, 2, 1), 1], [1, (1, 1, 1), 1]])
    by_row, _ = index(**inputs, guidance=guidance, alignment=torch.tensor([0.25, 0.5]))
    by_image, _ = index(**inputs, guidance=guidance, alignment=torch.tensor([0.25, 0.25, 0.5]))
    assert torch.equal(by_row, by_image)
    # Two images, two rows, but not one each: [B] counts as per image, [B, 1] as per row.
    inputs = batch([[1, (1, 1, 1), 1, (1, 2, 1), 1], [3]])
    rowwise, _ = index(**inputs, guidance=guidance, alignment=torch.tensor([[0.25], [0.5]]))
    assert torch.equal(rowwise, index(**inputs, guidance=guidance, alignment=torch.tensor([0.25, 0.25]))[0])


def test_patch_guidance_stretches_the_rows_and_columns_the_guide_looks_at():
    relevance = torch.tensor([[0.0, 0.2, 0.1], [0.6, 1.0, 0.5]])
    guidance = RopeGuidance(alpha_h=2.0, alpha_w=1.0, gamma=0.5, mode="patch")
    position, _ = index(**batch([[1, (1, 2, 3), 1]]), guidance=guidance, relevance=relevance.reshape(-1))
    mean = relevance.mean().item()
    row = 2.0 * (1 + 0.5 * (relevance[1].mean().item() - mean))
    columns = (1 + 0.5 * (relevance.mean(0) - mean)).tolist()
    assert position[1, 0, [1, 4]].tolist() == pytest.approx([1, 1 + row], abs=1e-6)
    assert position[2, 0, 1:4].tolist() == pytest.approx(
        [1, 1 + columns[1], 1 + columns[1] + columns[2]], abs=1e-6
    )


def test_however_strong_patch_guidance_a_line_keeps_a_64th_of_its_step():
    relevance = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 1.0])  # of three rows the middle one
    guidance = RopeGuidance(alpha_h=2.0, gamma=3.0, mode="patch")
    position, _ = index(**batch([[1, (1, 3, 2), 1]]), guidance=guidance, relevance=relevance)
    middle, last = position[1, 0, [3, 5]].tolist()
    assert middle == 1 + 2.0 / 64 and last == pytest.approx(middle + 2.0 * (1 + 3.0 / 3), abs=1e-6)


def test_patch_guidance_with_even_relevance_or_gamma_zero_changes_nothing():
    inputs = batch([[2, (1, 3, 4), 3], [(1, 2, 2), 1]])
    plain, _ = index(**inputs, guidance=PLAIN)
    strong = RopeGuidance(gamma=2.0, mode="patch")
    even, _ = index(**inputs, guidance=strong, relevance=torch.full((16,), 0.5))
    none, _ = index(**inputs, guidance=RopeGuidance(gamma=0.0, mode="patch"))
    assert torch.equal(plain, even) and torch.equal(plain, none)


def test_images_of_two_rows_do_not_touch_where_one_ends_before_the_others_place():
    rows: list[list[Part]] = [[3, (1, 1, 2), 4], [5, (1, 1, 2), 2]]
    guidance = RopeGuidance(lambda_h=3.0, lambda_w=3.0)
    together, _ = index(**batch(rows), guidance=guidance)
    for row, parts in enumerate(rows):
        assert torch.equal(together[:, row], index(**batch([parts]), guidance=guidance)[0][:, 0])


# --- properties under any guidance


@settings(max_examples=100, deadline=None)
@given(parts=layout, guidance=guidances, seed=st.integers(0, 99))
def test_axes_increase_inside_a_segment_and_text_comes_after_it(parts, guidance, seed):
    position, delta = guided(batch([parts]), guidance, seed)
    position = position[:, 0]
    at = 0
    for part in parts:
        if isinstance(part, int):
            assert (position[:, at : at + part].diff(dim=1) > 0).all()
            at += part
            continue
        _, rows, columns = part
        height, width = position[1, at : at + rows * columns], position[2, at : at + rows * columns]
        assert (height.view(rows, columns).diff(dim=0) > 0).all() and (
            height.view(rows, columns).diff(dim=1) == 0
        ).all()
        assert (width.view(rows, columns).diff(dim=1) > 0).all() and (
            width.view(rows, columns).diff(dim=0) == 0
        ).all()
        at += rows * columns
        largest = position[:, at - rows * columns : at].max()
        following = position[0, at].item() if at < position.shape[1] else delta.item() + at
        assert following > largest
        if guidance.mode == "none":
            assert following - largest == pytest.approx(max(guidance.lambda_h, guidance.lambda_w), abs=1e-4)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(layout, min_size=2, max_size=4), side=st.sampled_from(["left", "right"]), guidance=guidances
)
def test_a_batch_is_its_rows_one_by_one_bit_for_bit(rows, side, guidance):
    inputs = batch(rows, side)
    own = scores(inputs)
    if own["alignment"] is None:
        own["alignment"] = torch.ones(len(rows))
    together, deltas = index(**inputs, guidance=guidance, **own)
    image = patch = 0
    for row, parts in enumerate(rows):
        single = batch([parts])
        images, patches = (
            sum(not isinstance(part, int) for part in parts),
            int((single["input_ids"] == IMAGE).sum()),
        )
        alone, delta = index(
            **single,
            guidance=guidance,
            alignment=own["alignment"][image : image + images] if images else torch.ones(1),
            relevance=own["relevance"][patch : patch + patches],
        )
        kept = inputs["attention_mask"][row].bool()
        assert torch.equal(together[:, row, kept], alone[:, 0]) and torch.equal(deltas[row], delta[0])
        assert (together[:, row, ~kept] == 0).all()
        image, patch = image + images, patch + patches


@settings(max_examples=60, deadline=None)
@given(documents=st.lists(layout, min_size=1, max_size=4), padding=st.integers(0, 3), guidance=guidances)
def test_packed_documents_are_the_documents_alone_bit_for_bit(documents, padding, guidance):
    alone = [batch([parts]) for parts in documents]
    ids = torch.cat([one["input_ids"] for one in alone] + [torch.zeros(1, padding, dtype=torch.long)], dim=1)
    mask = torch.cat([one["attention_mask"] * (n + 1) for n, one in enumerate(alone)], dim=1)
    mask = torch.nn.functional.pad(mask, (0, padding))
    grids = [one["image_grid_thw"] for one in alone if one["image_grid_thw"] is not None]
    packed = {"input_ids": ids, "attention_mask": mask, "image_grid_thw": torch.cat(grids) if grids else None}
    plain = RopeGuidance(guidance.lambda_h, guidance.lambda_w, guidance.alpha_h, guidance.alpha_w)
    position, _ = index(**packed, guidance=plain)
    for number, one in enumerate(alone):
        assert torch.equal(position[:, mask == number + 1], index(**one, guidance=plain)[0][:, 0])


@settings(max_examples=60, deadline=None)
@given(parts=layout, new=st.integers(1, 5), guidance=guidances)
def test_deltas_continue_a_cached_generation_bit_for_bit(parts, new, guidance):
    """Text position (counted without padding) + delta is where the whole sequence has the token."""
    prompt, whole = batch([parts, [3]]), batch([[*parts, new], [3, new]], side="right")
    _, deltas = guided(prompt, guidance)
    full, _ = guided(whole, guidance)
    for row in range(2):
        length, total = int(prompt["attention_mask"][row].sum()), int(whole["attention_mask"][row].sum())
        continued = torch.arange(length, total) + deltas[row]
        assert torch.equal(continued.float().expand(3, -1), full[:, row, length:total])


def test_padding_inside_a_row_is_skipped_as_transformers_skips_it():
    inputs = batch([[3, (1, 2, 2), 4]])
    inputs["attention_mask"][0, [1, 4, 8]] = 0  # a hole in the text, one inside the image, one after it
    inputs["image_grid_thw"] = torch.tensor([[1, 2, 6]])
    ours, deltas = index(**inputs, guidance=PLAIN)
    theirs, their_deltas = transformers_index(inputs)
    assert torch.equal(ours, theirs.float()) and torch.equal(deltas, their_deltas.double())


def test_without_mask_and_without_images_positions_just_count():
    position, deltas = index(torch.tensor([[5, 6, 7]]), guidance=RELEASED)
    assert position[:, 0].tolist() == [[0, 1, 2]] * 3 and deltas.tolist() == [[0]]


def test_a_row_of_nothing_but_padding_is_all_zero():
    inputs = batch([[2, (1, 1, 1), 1], []])
    position, deltas = index(**inputs, guidance=PLAIN)
    assert (position[:, 1] == 0).all() and deltas[1].item() == 0


def test_fractional_positions_stay_exact_far_out():
    parts: list[Part] = []
    for _ in range(200):
        parts += [30, (1, 4, 4)]
    guidance = RopeGuidance(0.3, 0.7, 0.1, 0.9)
    position, _ = index(**batch([[*parts, 1]]), guidance=guidance)
    each = 29 + 0.7 + 3 * 0.9 + 0.7
    assert position[0, 0, -1].item() == pytest.approx(200 * each, abs=1e-3)


# --- what it refuses


@pytest.mark.parametrize(
    "wrong",
    [
        {"lambda_h": 0.0},
        {"lambda_w": -1.0},
        {"alpha_h": math.inf},
        {"alpha_w": math.nan},
        {"gamma": -0.1},
        {"gamma": math.nan},
        {"mode": "both"},
    ],
)
def test_guidance_validates_itself(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RopeGuidance(**wrong)


def test_tokens_that_do_not_match_their_grids_are_refused():
    inputs = batch([[2, (1, 2, 2), 1]])
    with pytest.raises(ValueError, match=r"4 vision tokens.*ask for 6"):
        index(**{**inputs, "image_grid_thw": torch.tensor([[1, 4, 6]])}, guidance=PLAIN)
    with pytest.raises(ValueError, match=r"4 vision tokens.*0 grids"):
        index(inputs["input_ids"], guidance=PLAIN)
    with pytest.raises(ValueError, match="do not stand together"):  # the grids of two images, swapped
        swapped = batch([[1, (1, 1, 2), 1, (1, 2, 2), 1]])
        index(**{**swapped, "image_grid_thw": swapped["image_grid_thw"].flip(0)}, guidance=PLAIN)
    with pytest.raises(ValueError, match="do not stand together"):  # an image split over two packed documents
        split = {**inputs, "attention_mask": torch.tensor([[1, 1, 1, 1, 2, 2, 2]])}
        index(**split, guidance=PLAIN)
    with pytest.raises(ValueError, match="do not stand together"):  # over two rows, at places that follow
        ids = torch.tensor([[1, IMAGE, 1, 1], [1, 1, IMAGE, 1]])
        index(ids, torch.tensor([[1, 2, 4]]), guidance=PLAIN)
    with pytest.raises(ValueError, match="attention_mask"):
        index(inputs["input_ids"], inputs["image_grid_thw"], torch.ones(1, 3), guidance=PLAIN)


def test_scores_that_are_missing_or_wrong_are_refused():
    inputs = batch([[2, (1, 2, 2), 1], [1, (1, 1, 1), 2]])
    pair, patch = RopeGuidance(gamma=0.5, mode="pair"), RopeGuidance(gamma=0.5, mode="patch")
    for guidance, wrong, message in [
        (pair, {}, "needs the alignment"),
        (pair, {"alignment": torch.ones(3)}, "per image or per row"),
        (pair, {"alignment": torch.tensor([0.5, 1.5])}, r"\[0, 1\]"),
        (pair, {"alignment": torch.tensor([0.5, math.nan])}, r"\[0, 1\]"),
        (patch, {}, "needs the patch relevance"),
        (patch, {"relevance": torch.ones(4)}, "4 relevance scores for 5"),
        (patch, {"relevance": torch.full((5,), -0.1)}, r"\[0, 1\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            index(**inputs, guidance=guidance, **wrong)
