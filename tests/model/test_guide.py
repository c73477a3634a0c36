"""The guide: logits become scores in [0, 1], the same wherever they are made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clinkd.data.images import decode
from clinkd.data.phantoms import PhantomSpec, draw
from clinkd.data.scores import Score
from clinkd.model import guide as guides
from clinkd.model import presets
from clinkd.model.clinkd_qwen2vl import load_model
from clinkd.model.guide import Calibration, fit_calibration, guide_inputs, load_guide, merged_grids
from clinkd.model.tiny_guide import TinyEncoder, TinyGuide, save_guide

torch.set_num_threads(1)
SIZE = presets.TinySize(hidden=64, layers=1, mlp=96, vision_hidden=32, vision_layers=1, image_size=56)
RECORDS = [draw(PhantomSpec(4, size=112), index) for index in range(4)]
IMAGES = [decode(png) for png, _ in RECORDS]
QUESTIONS = [[turn.question for turn in record.turns] for _, record in RECORDS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A guide's folder as the stage leaves it, its encoder untrained."""
    out = tmp_path_factory.mktemp("guide")
    texts = [text for _, record in RECORDS for turn in record.turns for text in (turn.question, turn.answer)]
    presets.write_new_model(texts, SIZE, out / guides.OWN, vocab_size=500, seed=0)
    torch.manual_seed(0)
    save_guide(TinyGuide(load_model(out / guides.OWN)), out / guides.OWN)
    guides.write_settings(out, guides.OWN, Calibration(0.5, 0.1, 1.5, 2.0))
    return out


def test_scores_are_the_calibrated_logits_of_the_encoder(folder: Path) -> None:
    encoder = TinyEncoder(folder / guides.OWN)
    texts = ["where is the liver", "what is this"]
    found = load_guide(folder).score([([IMAGES[0]], texts)])[0]
    seen = encoder.images([IMAGES[0]])[0]
    asked = encoder.texts(texts)
    pair, patches = encoder.pair_logits(seen, asked), encoder.patch_logits(seen, asked)
    assert patches.shape == (seen.grid[0] * seen.grid[1], 2) and torch.equal(pair, patches.max(0).values)
    for number, score in enumerate(found):
        assert score.alignment == pytest.approx(float(torch.sigmoid(0.5 * pair[number] + 0.1)), abs=1e-6)
        wanted = torch.sigmoid(1.5 * patches[:, number] + 2.0).numpy()
        assert np.abs(score.relevance / 255 - wanted).max() <= 0.5 / 255 + 1e-6
        assert score.grids == (seen.grid,)


def test_in_bfloat16_logits_are_single_precision_and_near(folder: Path) -> None:
    """As an engine holds it: the weights rounded, the fixed rotation as it was."""
    guide = TinyEncoder(folder / guides.OWN).guide
    ids, mask = torch.tensor([[7, 8, 9], [11, 12, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    torch.manual_seed(2)
    patches = torch.randn(6, SIZE.hidden)

    def logits(patches: torch.Tensor) -> list[torch.Tensor]:
        words = guide.phrases(ids, mask)
        return [guide.logits(patches, words), guide.number_logits(patches), guide.bag_logits(patches)]

    with torch.no_grad():
        exact = logits(patches)
        for parameter in guide.parameters():
            parameter.data = parameter.data.bfloat16()
        rounded = logits(patches.bfloat16())
    for wanted, found in zip(exact, rounded, strict=True):
        assert found.dtype == torch.float32 and (found - wanted).norm() / wanted.norm() < 0.03


def test_a_question_scores_the_same_alone_and_among_others(folder: Path) -> None:
    guide = load_guide(folder)
    together = guide.score([([image], asked) for image, asked in zip(IMAGES, QUESTIONS, strict=True)])
    for image, asked, scores in zip(IMAGES, QUESTIONS, together, strict=True):
        for question, score in zip(asked, scores, strict=True):
            alone = guide.score([([image], [question])])[0][0]
            assert alone.alignment == pytest.approx(score.alignment, abs=1e-5)
            assert np.abs(alone.relevance.astype(int) - score.relevance).max() <= 1


def test_boxes_of_a_question_are_not_read(folder: Path) -> None:
    bare, boxed = "What is this region?", "What is this region <box>(10,20),(30,40)</box>?"
    first, second = load_guide(folder).score([([IMAGES[0]], [bare.replace("?", " ?"), boxed])])[0]
    assert first.alignment == pytest.approx(second.alignment, abs=1e-6)


def test_of_several_images_the_one_that_fits_best_counts(folder: Path) -> None:
    guide, asked = load_guide(folder), ["where is the spleen"]
    alone = [guide.score([([image], asked)])[0][0] for image in IMAGES[:3]]
    both = guide.score([(IMAGES[:3], asked)])[0][0]
    assert both.alignment == pytest.approx(max(score.alignment for score in alone), abs=1e-5)
    assert both.grids == tuple(score.grids[0] for score in alone)
    apart = np.concatenate([score.relevance for score in alone])
    assert np.abs(both.relevance.astype(int) - apart).max() <= 1


@settings(max_examples=20, deadline=None)
@given(slope=st.floats(0.3, 3), bias=st.floats(-2, 2), seed=st.integers(0, 99))
def test_calibration_finds_the_probabilities_that_made_the_matches(slope, bias, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(20_000, generator=generator)
    truth = torch.sigmoid(slope * logits + bias)
    found = fit_calibration(logits, torch.rand(20_000, generator=generator) < truth)
    assert (torch.sigmoid(found[0] * logits + found[1]) - truth).abs().mean() < 0.02


def test_the_model_gets_what_its_mode_asks_for() -> None:
    scores = [
        Score(0.25, np.array([0, 51, 102, 153], np.uint8), ((2, 2),)),
        Score(0.5, np.array([255, 0, 255], np.uint8), ((1, 1), (1, 2))),
    ]
    merged = [[(2, 2)], [(1, 2), (1, 1)]]
    assert guide_inputs("none", scores, merged) == {}
    assert guide_inputs("pair", scores, merged)["alignment"].tolist() == [[0.25], [0.5]]
    assert guide_inputs("pair", scores, merged, packed=True)["alignment"].tolist() == [0.25, 0.5, 0.5]
    relevance = guide_inputs("patch", scores, merged)["relevance"]
    assert relevance.tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 1, 1, 0.5])
    assert relevance.dtype == torch.float32
    assert merged_grids(torch.tensor([[1, 4, 6], [1, 2, 2]]), 2) == [(2, 3), (1, 1)]


def test_a_copy_guides_alike_and_needs_the_original_no_more(folder: Path, tmp_path: Path) -> None:
    guides.copy_guide(folder, tmp_path / "copy")
    wanted = load_guide(folder).score([([IMAGES[1]], QUESTIONS[1])])
    found = load_guide(tmp_path / "copy").score([([IMAGES[1]], QUESTIONS[1])])
    assert [score.alignment for score in found[0]] == [score.alignment for score in wanted[0]]
    names = {path.name for path in (tmp_path / "copy").rglob("*") if path.is_file()}
    assert {"guide.json", "guide.safetensors", "config.json", "tokenizer.json"} <= names


def test_an_encoder_that_lies_elsewhere_stays_there(folder: Path, tmp_path: Path) -> None:
    made, copy = tmp_path / "made", tmp_path / "copy"
    made.mkdir()
    guides.write_settings(made, str(folder / guides.OWN), Calibration())
    guides.copy_guide(made, copy)
    assert [path.name for path in copy.iterdir()] == ["guide.json"]
    assert load_guide(copy).score([([IMAGES[0]], ["where"])])[0][0].alignment > 0


def test_an_encoder_that_tells_no_patches_apart_guides_by_pair_alone(folder: Path) -> None:
    class Blind(TinyEncoder):
        def patch_logits(self, seen: Any, texts: Any) -> Any:
            raise ValueError("no dense features")

        def pair_logits(self, seen: Any, texts: Any) -> Any:
            return super().patch_logits(seen, texts).max(0).values

    blind = guides.Guide(Blind(folder / guides.OWN), Calibration(0.5, 0.1))
    asked = [([IMAGES[0]], ["where is the liver"])]
    score = blind.score(asked)[0][0]
    assert score.alignment == pytest.approx(load_guide(folder).score(asked)[0][0].alignment, abs=1e-6)
    assert guide_inputs("pair", [score], [[(2, 2)]])["alignment"].shape == (1, 1)
    with pytest.raises(ValueError, match=r"rope\.mode=pair"):
        guide_inputs("patch", [score], [[(2, 2)]])


@pytest.mark.parametrize(
    "content", [None, "{", json.dumps({"encoder": "model"} | {"temperatur": 1}), json.dumps({"bias": 1})]
)
def test_a_folder_that_is_no_guides_is_refused_in_one_line(tmp_path: Path, content: Any) -> None:
    if content is not None:
        (tmp_path / "guide.json").write_text(content)
    with pytest.raises(ValueError, match=r"guide\.json.*made by the stage guide") as error:
        load_guide(tmp_path)
    assert "\n" not in str(error.value)
