"""The position map follows the formula of the guided rotary index."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

from clinkd.report.positions import PLAIN, RELEASED, Guidance, lay_out


def test_plain_mrope_starts_one_after_the_text_and_goes_on_one_after_the_largest():
    layout = lay_out(3, (1, 2, 4), 2, PLAIN)
    assert layout.before.tolist() == [[0, 1, 2]] * 3
    assert layout.vision[0].tolist() == [3] * 8
    assert layout.vision[1].tolist() == [3, 3, 3, 3, 4, 4, 4, 4]
    assert layout.vision[2].tolist() == [3, 4, 5, 6, 3, 4, 5, 6]
    assert layout.after.tolist() == [[7, 8]] * 3


def test_guided_positions_by_hand():
    layout = lay_out(
        1, (1, 2, 2), 1, Guidance(lambda_h=2, lambda_w=4, alpha_h=0.5, alpha_w=1.5, gamma=1.0, score=0.5)
    )
    # λ is stretched by 1.5: λh = 3, λw = 6, λt = 4.5; the last text token sits at 0.
    assert layout.vision.tolist() == [[4.5] * 4, [3, 3, 3.5, 3.5], [6, 7.5, 6, 7.5]]
    assert layout.after.tolist() == [[13.5]] * 3


def test_a_segment_that_opens_the_sequence_starts_at_zero():
    layout = lay_out(0, (1, 2, 2), 1, RELEASED)
    assert layout.vision.min() == 0
    assert layout.after[0, 0] == 3


def test_an_empty_sequence_and_foreign_parameters_are_no_error():
    assert lay_out(0, (0, 0, 0), 0, PLAIN).last == 0.0
    assert Guidance.of({"lambda_h": 2, "unknown": 1, "gamma": "high"}) == Guidance(lambda_h=2.0)


def test_released_parameters_give_the_released_codes_positions():
    """The golden file's first sample: text, a 6 × 5 image, text; the second image after it is left out."""
    shared = Path(os.environ.get("CLINKD_SHARED", Path(__file__).resolve().parents[2].parent / "shared"))
    golden = shared / "golden" / "rope" / "released_code.json"
    if not golden.exists():
        pytest.skip("the released code's golden positions are not beside the repository (CLINKD_SHARED)")
    data = json.loads(golden.read_text())
    case = data["cases"][0]
    ids, mask = np.array(case["input_ids"][0]), np.array(case["attention_mask"][0], bool)
    want = (
        np.array(case["position_ids"])[:, 0] if np.ndim(case["position_ids"]) == 3 else case["position_ids"]
    )
    want = np.asarray(want).reshape(3, -1)[:, mask]
    is_image = ids[mask] == data["image_token_id"]
    first = int(is_image.argmax())
    frames, height, width = case["image_grid_thw"][0]
    grid = (frames, height // data["spatial_merge_size"], width // data["spatial_merge_size"])
    layout = lay_out(first, grid, 4, RELEASED)
    got = np.concatenate([layout.before, layout.vision, layout.after], axis=1)
    assert np.array_equal(got, want[:, : got.shape[1]])
