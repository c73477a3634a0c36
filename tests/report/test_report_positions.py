"""The position map follows the formula of the guided rotary index, and the index itself to the last bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clinkd.report.positions import PLAIN, RELEASED, Guidance, Layout, lay_out, offsets

IMAGE, START = 9, 8
GOLDEN = Path(__file__).parents[1] / "golden" / "rope" / "released_code.json"

positive = st.floats(0.01, 8.0)
shares = st.floats(0.0, 1.0)
guidances = st.builds(
    Guidance,
    lambda_h=positive,
    lambda_w=positive,
    alpha_h=positive,
    alpha_w=positive,
    gamma=st.floats(0.0, 20.0),
    mode=st.sampled_from(("none", "pair", "patch")),
)


def whole(layout: Layout) -> np.ndarray:
    return np.concatenate([layout.before, layout.vision, layout.after], axis=1)


def model_index(
    before: int, grid: tuple[int, int, int], after: int, guidance: Guidance, s: float, relevance: np.ndarray
) -> np.ndarray:
    """The positions [3, tokens] that the model gives the same sequence."""
    import torch

    from clinkd.model.rope import RopeGuidance, guided_rope_index

    frames, rows, columns = grid
    ids = [1] * before + [IMAGE] * (frames * rows * columns) + [1] * after
    values: Any = vars(guidance)
    positions, _ = guided_rope_index(
        torch.tensor([ids]),
        torch.tensor([[frames, 2 * rows, 2 * columns]]),
        guidance=RopeGuidance(**values),
        image_token_id=IMAGE,
        vision_start_token_id=START,
        alignment=torch.tensor([[s]], dtype=torch.float64),
        relevance=torch.from_numpy(relevance),
    )
    return positions[:, 0].numpy()


@settings(deadline=None, max_examples=200)
@given(
    before=st.integers(0, 40),
    grid=st.tuples(st.integers(1, 2), st.integers(1, 12), st.integers(1, 12)),
    after=st.integers(0, 9),
    guidance=guidances,
    s=shares,
    seed=st.integers(0, 2**32 - 1),
)
def test_every_layout_is_the_models_own_index_bit_for_bit(before, grid, after, guidance, s, seed):
    relevance = np.random.default_rng(seed).random(int(np.prod(grid)), np.float32)
    layout = lay_out(before, grid, after, guidance, alignment=s, relevance=relevance)
    assert np.array_equal(
        whole(layout),
        model_index(before, grid, after, guidance, s, relevance),
    )


def test_plain_mrope_starts_one_after_the_text_and_goes_on_one_after_the_largest():
    layout = lay_out(3, (1, 2, 4), 2, PLAIN)
    assert layout.before.tolist() == [[0, 1, 2]] * 3
    assert layout.vision[0].tolist() == [3] * 8
    assert layout.vision[1].tolist() == [3, 3, 3, 3, 4, 4, 4, 4]
    assert layout.vision[2].tolist() == [3, 4, 5, 6, 3, 4, 5, 6]
    assert layout.after.tolist() == [[7, 8]] * 3


def test_pair_guidance_by_hand():
    guidance = Guidance(lambda_h=2, lambda_w=4, alpha_h=0.5, alpha_w=1.5, gamma=1.0, mode="pair")
    layout = lay_out(1, (1, 2, 2), 1, guidance, alignment=0.5)
    # λ is stretched by 1.5: λh = 3, λw = 6, λt = 4.5; the last text token sits at 0.
    assert layout.vision.tolist() == [[4.5] * 4, [3, 3, 3.5, 3.5], [6, 7.5, 6, 7.5]]
    assert layout.after.tolist() == [[13.5]] * 3


def test_patch_guidance_by_hand():
    """Relevance of three rows 0, 0.75, 0 (mean 0.25) and of two columns 0.25 each, γ = 1, αh = 2."""
    relevance = np.array([0, 0, 0.75, 0.75, 0, 0])
    guidance = Guidance(lambda_h=2, lambda_w=2, alpha_h=2, gamma=1.0, mode="patch")
    layout = lay_out(1, (1, 3, 2), 1, guidance, relevance=relevance)
    # Row 0 stays at the gap; the step to row 1 is 2 · 1.5, the one to row 2 is 2 · 0.75; columns stay even.
    assert layout.vision[1].tolist() == [2, 2, 5, 5, 6.5, 6.5]
    assert layout.vision[2].tolist() == [2, 3, 2, 3, 2, 3]
    assert layout.after.tolist() == [[8.5]] * 3


def test_a_step_never_falls_below_a_sixty_fourth_of_alpha():
    rows, columns = offsets(
        (1, 2, 2), Guidance(alpha_h=2.0, gamma=100.0, mode="patch"), np.array([1.0, 1, 0, 0])
    )
    assert rows.tolist() == [0, 2 / 64]
    assert columns.tolist() == [0, 1]


@pytest.mark.parametrize("mode", ["none", "pair", "patch"])
def test_gamma_zero_is_no_guidance_in_any_mode(mode):
    off = Guidance(lambda_h=2.0, lambda_w=2.0, mode=mode)
    layout = lay_out(3, (1, 2, 2), 2, off, alignment=0.0, relevance=np.array([1.0, 0, 0, 0]))
    assert off.guided == "none"
    assert np.array_equal(whole(layout), whole(lay_out(3, (1, 2, 2), 2, RELEASED)))


@pytest.mark.parametrize("mode", ["pair", "patch"])
def test_scores_that_were_not_kept_leave_the_image_unguided(mode):
    layout = lay_out(3, (1, 2, 2), 2, Guidance(lambda_h=2.0, lambda_w=2.0, gamma=1.0, mode=mode))
    assert np.array_equal(whole(layout), whole(lay_out(3, (1, 2, 2), 2, RELEASED)))


def test_a_segment_that_opens_the_sequence_starts_at_zero():
    layout = lay_out(0, (1, 2, 2), 1, RELEASED)
    assert layout.vision.min() == 0
    assert layout.after[0, 0] == 3


def test_an_empty_sequence_and_foreign_parameters_are_no_error():
    assert lay_out(0, (0, 0, 0), 0, PLAIN).last == 0.0
    odd = {"lambda_h": 2, "lambda_w": float("nan"), "alpha_h": -1, "alpha_w": True, "unknown": 1}
    assert Guidance.of({**odd, "gamma": "high", "mode": "pair"}) == Guidance(lambda_h=2.0, mode="pair")
    assert Guidance.of({"mode": "sideways", "gamma": 1}).guided == "none"
    assert Guidance.of({"gamma": 1}).guided == "pair"


@pytest.mark.parametrize("number", range(6))
def test_released_parameters_give_the_released_codes_positions(number):
    """Of each sample the text, its first image and the text up to the next image."""
    data = json.loads(GOLDEN.read_text())
    case = data["cases"][number]
    ids, mask = np.array(case["input_ids"]).ravel(), np.array(case["attention_mask"], bool).ravel()
    want = np.asarray(case["position_ids"]).reshape(3, -1)[:, mask]
    is_image = ids[mask] == data["image_token_id"]
    first = int(is_image.argmax())
    frames, height, width = case["image_grid_thw"][0]
    grid = (frames, height // data["spatial_merge_size"], width // data["spatial_merge_size"])
    end = first + int(np.prod(grid))
    more = is_image[end:]
    after = int(more.argmax()) if more.any() else len(more)
    got = whole(lay_out(first, grid, after, RELEASED))
    assert np.array_equal(got, want[:, : got.shape[1]])
    assert got.shape[1] == end + after
