"""The guide's scores: kept by sample, read on any grid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clinkd.data.scores import FILE, Score, Scores, mean, quantise, regrid, write_scores

grids = st.tuples(st.integers(1, 9), st.integers(1, 9))


def written(folder: Path) -> Scores:
    write_scores(
        folder, ["a#0", "a#1", "b#0"], [0.25, 0.5, 1.0],
        relevance=[[0, 51, 102, 153], [255] * 4, [1, 2, 3, 4, 5, 6, 7]],
        rows=[[2], [2], [2, 1]], columns=[[2], [2], [3, 1]],
    )  # fmt: skip
    return Scores(folder / FILE)


def test_scores_come_back_by_sample(tmp_path: Path) -> None:
    scores = written(tmp_path)
    assert len(scores) == 3
    assert scores["a#1"].alignment == 0.5 and scores["a#1"].grids == ((2, 2),)
    assert scores["b#0"].relevance.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert scores["b#0"].grids == ((2, 3), (1, 1))


def test_a_sample_that_was_never_scored_is_named(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="never scored sample c#0"):
        written(tmp_path)["c#0"]
    assert len(Scores(None)) == 0


def test_relevance_is_read_on_the_grids_of_the_records_images(tmp_path: Path) -> None:
    scores = written(tmp_path)
    assert scores["a#0"].on([(2, 2)]) == pytest.approx([0.0, 0.2, 0.4, 0.6])
    assert scores["a#0"].on([(1, 2)]) == pytest.approx([0.2, 0.4])  # the means of both columns
    assert scores["a#0"].on([(4, 2)]) == pytest.approx([0.0, 0.2, 0.0, 0.2, 0.4, 0.6, 0.4, 0.6])
    assert scores["b#0"].on([(2, 3), (1, 2)])[-2:] == pytest.approx([7 / 255] * 2)
    assert scores["a#0"].on([(2, 2)]).dtype == np.float32
    with pytest.raises(ValueError, match="1 images for a record of 2"):
        scores["a#0"].on([(2, 2), (1, 1)])


@settings(max_examples=100, deadline=None)
@given(grid=grids, merged=grids, seed=st.integers(0, 99))
def test_a_map_keeps_its_mean_and_range_on_any_grid(grid, merged, seed):
    values = np.random.default_rng(seed).random(grid[0] * grid[1])
    found = regrid(values, grid, merged)
    assert len(found) == merged[0] * merged[1]
    assert found.mean() == pytest.approx(values.mean())
    assert values.min() - 1e-9 <= found.min() and found.max() <= values.max() + 1e-9


@given(grid=grids, factor=st.integers(1, 4), seed=st.integers(0, 99))
def test_a_finer_grid_and_back_is_the_map_itself(grid, factor, seed):
    values = np.random.default_rng(seed).random(grid[0] * grid[1])
    finer = (grid[0] * factor, grid[1] * factor)
    assert regrid(regrid(values, grid, finer), finer, grid) == pytest.approx(values)


def test_several_questions_have_the_mean_of_their_scores() -> None:
    first = Score(0.2, np.array([0, 100], np.uint8), ((1, 2),))
    second = Score(0.6, np.array([255, 200], np.uint8), ((1, 2),))
    both = mean([first, second])
    assert both.alignment == pytest.approx(0.4) and both.relevance.tolist() == [128, 150]
    assert mean([first]).relevance.tolist() == [0, 100]


def test_steps_are_of_a_255th() -> None:
    assert quantise(np.array([0.0, 0.5, 1.0, 1 / 255, 1.2, -0.1])).tolist() == [0, 128, 255, 1, 255, 0]
