"""What the page says and shows of the guide: the sample's positions, where it looks, how good it is."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from report_samples import SPEC, whole_run

from clinkd.data.phantoms import draw
from clinkd.data.scores import regrid
from clinkd.report import guide, plots
from clinkd.report.html import ReportInputs, build_report
from clinkd.report.overlays import HEAT, Budget, heat_legend, heat_map
from clinkd.report.positions import Guidance

SAMPLE: dict[str, Any] = {
    "sample": "case#0", "image": "ct_1.png", "question": "Where is the liver?", "task": "vg",
    "alignment": 0.4, "relevance": [1.0, 0.0, 0.0, 0.0], "grid": [2, 2], "merged": [4, 2],
    "before": 3, "after": 2,
}  # fmt: skip


class Text(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.text = ""
        self.images: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.images += [value or "" for name, value in attrs if tag == "img" and name == "alt"]

    def handle_data(self, data: str) -> None:
        self.text += data


def page_of(folder: Path, **given: Any) -> tuple[str, Text]:
    page = build_report(ReportInputs("run", **given), folder / "report.html").read_text(encoding="utf-8")
    found = Text(page)
    return " ".join(found.text.split()), found


def effect(**values: Any) -> str:
    (look,) = guide.looks([SAMPLE])
    return guide.effect_of(Guidance.of({"lambda_h": 2, "lambda_w": 2, **values}), look)


def test_the_map_is_of_the_first_sample_with_the_scores_that_the_mode_asks_for():
    bare = {**SAMPLE, "sample": "bare#0", "relevance": None, "grid": None, "merged": [9, 9]}
    samples = guide.looks([bare, SAMPLE])
    for mode, gamma, name in (("pair", 1, "bare#0"), ("patch", 1, "case#0"), ("patch", 0, "bare#0")):
        placed = guide.position_maps({"mode": mode, "gamma": gamma}, samples)
        assert placed["sample"]["name"] == name
    assert (placed["before"], placed["rows"], placed["columns"], placed["after"]) == (3, 9, 9, 2)


def test_pair_guidance_names_the_alignment_and_what_it_makes_of_the_gap():
    said = effect(mode="pair", gamma=0.5)
    assert "s = 0.40" in said and "λ is multiplied by 1 + 0.5 · (1 − 0.40) = 1.3, to 2.6." in said


def test_patch_guidance_names_the_steps_and_that_alignment_has_no_part():
    """Relevance 1 in the left half of the two upper of four rows: row means 0.5, 0.5, 0, 0."""
    said = effect(mode="patch", gamma=0.4)
    assert "row steps run from 0.9 to 1.1 (even: 1)" in said
    assert "the sample's alignment (s = 0.40) has no part in this mode" in said


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"mode": "none", "gamma": 0.7}, "Guidance is off: the mode is none"),
        ({"mode": "pair", "gamma": 0}, "Guidance is off: γ = 0, so mode pair changes nothing"),
        ({"mode": "patch", "gamma": 0}, "Guidance is off: γ = 0, so mode patch changes nothing"),
    ],
)
def test_guidance_that_is_off_is_called_off(values, sentence):
    assert sentence in effect(**values)


@pytest.mark.parametrize(("mode", "key"), [("pair", "alignment"), ("patch", "relevance")])
def test_a_score_that_is_not_known_is_said_to_be_so(mode, key):
    (look,) = guide.looks([{**SAMPLE, key: None}])
    said = guide.effect_of(Guidance(gamma=1.0, mode=mode), look)
    assert f"The {key} of this sample is not known" in said


def test_the_run_s_map_is_the_layout_its_model_makes(tmp_path):
    """λ 2, before 3: the image starts at 4; its rows follow at 5.1, 6 and 6.9, then text at 8.9."""
    text, _ = page_of(
        tmp_path,
        guide_samples=[SAMPLE],
        guidance={"lambda_h": 2, "lambda_w": 2, "gamma": 0.4, "mode": "patch"},
    )
    assert "Its prompt has 3 text tokens, an image of 4 × 2 merged patches and 2 text tokens." in text
    assert "an alignment of 0.40" in text
    assert "Rows from 4 to 6.9, columns from 4 to 4.9. Text goes on at 8.9." in text


@pytest.mark.parametrize(
    ("guidance", "sentence"),
    [
        ({"gamma": 0.4, "mode": "patch"}, "The meshes are what this run's model was given (γ = 0.4)."),
        ({"gamma": 0.4, "mode": "pair"}, "is guided by pairs, not by patches: the meshes show what"),
        ({"gamma": 0, "mode": "patch"}, "not guided: the meshes show what patch guidance with γ = 1 would"),
        (None, "What the run's own guidance is was not given; drawn is patch guidance with γ = 1."),
    ],
)  # fmt: skip
def test_meshes_that_are_not_the_run_s_own_are_said_to_be_so(tmp_path, guidance, sentence):
    text, _ = page_of(tmp_path, guide_samples=[SAMPLE], guidance=guidance)
    assert sentence in text


def test_a_look_shows_the_image_its_question_and_where_relevance_is_highest(tmp_path):
    png, _ = draw(SPEC, 0)
    text, found = page_of(
        tmp_path, guide_samples=[SAMPLE], images=lambda names: {name: png for name in names}
    )
    assert found.images == [
        "ct_1.png, relevance to “Where is the liver?”: "
        "highest (1.00) in row 1 of 2, column 1 of 2; lowest 0.00, mean 0.25."
    ]
    assert "Where is the liver?" in text[text.index("Where the guide looks") :]


def test_the_heat_map_colours_the_cells_that_are_relevant():
    buffer = io.BytesIO()
    Image.new("L", (80, 80), 128).save(buffer, "PNG")
    uri = heat_map(buffer.getvalue(), np.array([[0.0, 1.0], [0.0, 0.0]]))
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))), int)
    quarter = len(pixels) // 4
    legend = [list(map(int, stop)) for stop in re.findall(r"rgb\((\d+) (\d+) (\d+)\)", heat_legend())]
    assert np.abs(pixels[quarter, 3 * quarter] - legend[-1]).max() < 12  # JPEG is not exact
    assert np.abs(pixels[3 * quarter, quarter] - legend[0]).max() < 12
    light = [0.3 * red + 0.6 * green + 0.1 * blue for red, green, blue in HEAT]
    assert light == sorted(light)


def test_relevance_is_read_on_the_model_s_grid_in_the_model_s_precision():
    row = {**SAMPLE, "relevance": [51 / 255, 1, 0, 102 / 255], "merged": [3, 5]}
    (look,) = guide.looks([row])
    want = regrid(np.array([51, 255, 0, 102], np.uint8).astype(np.float32) / 255, (2, 2), (3, 5))
    assert look.relevance is not None and look.relevance.dtype == np.float32
    assert np.array_equal(look.relevance, want)


@pytest.mark.parametrize(
    ("change", "lost"),
    [
        ({"alignment": 1.5}, "alignment"),
        ({"alignment": float("nan")}, "alignment"),
        ({"relevance": [0.5] * 3}, "heat"),
        ({"relevance": [0.5, 0.5, 0.5, 2.0]}, "heat"),
        ({"relevance": [0.5, None, 0.5, "x"]}, "heat"),
        ({"relevance": "high"}, "heat"),
        ({"grid": [0, 4]}, "heat"),
        ({"grid": None}, "heat"),
        ({"merged": [2.5, 2]}, "merged"),
        ({"merged": [10**6, 10**6]}, "merged"),
        ({"before": None}, "text"),
        ({"after": -1}, "text"),
    ],
)
def test_a_part_that_is_missing_or_malformed_counts_as_not_kept(tmp_path, change, lost):
    (look,) = guide.looks([{**SAMPLE, **change}])
    assert getattr(look, lost) is None
    for mode in ("pair", "patch"):
        page_of(tmp_path, guide_samples=[{**SAMPLE, **change}], guidance={"gamma": 1.0, "mode": mode})


def test_rows_that_are_nothing_leave_a_report(tmp_path):
    odd: list[Any] = [{}, None, {"relevance": []}, {"grid": [2, 2]}, {**SAMPLE, "merged": None}]
    text, _ = page_of(tmp_path, guide_samples=odd)
    assert "The size of the model's grid is not known" in text
    assert "The image was not found in the run's data." in text


def test_no_more_than_a_few_looks_are_shown_and_their_pictures_share_a_budget():
    png, _ = draw(SPEC, 0)
    samples = guide.looks([SAMPLE] * 9)
    budget = Budget(int(1.5 * len(heat_map(png, np.eye(2)))))
    cards = guide.look_cards(samples, None, {"ct_1.png": png}, budget)
    assert len(cards) == guide.MOST_LOOKS
    assert [card["picture"] is not None for card in cards] == [True] + [False] * 5
    assert cards[1]["problem"] == "Left out to keep this file small."


def test_a_large_image_is_drawn_by_some_of_its_lines():
    rows = {**SAMPLE, "merged": [128, 96]}
    (card,) = guide.look_cards(guide.looks([rows]), {"gamma": 1, "mode": "patch"}, {}, Budget(0))
    assert "One line in 4 is drawn." in card["said"]
    assert len(card["svg"]) < 60_000
    placed = guide.position_maps({"gamma": 1, "mode": "patch"}, guide.looks([rows]))
    assert placed["drawn"] == 4
    assert max(len(item["svg"]) for item in placed["maps"]) < 60_000
    assert plots.thinning(plots.MOST_LINES) == 1


def test_one_row_of_patches_and_an_image_that_opens_the_prompt_can_be_drawn(tmp_path):
    for merged, before in (([1, 1], 0), ([1, 7], 0), ([7, 1], 3)):
        rows = {**SAMPLE, "merged": merged, "before": before, "after": 0}
        text, _ = page_of(tmp_path, guide_samples=[rows], guidance={"gamma": 1, "mode": "patch"})
        assert "Where the guide looks" in text


def test_retrieval_is_said_to_be_of_names_not_of_questions(tmp_path):
    numbers = {"retrieval_at_1": 0.41, "chance": 0.05, "regions": 120, "patch_auc": 0.9}
    text, _ = page_of(tmp_path, guide=numbers)
    assert (
        "it ranks the region's own name first among all names of the test split for 41.0% of 120 regions "
        "(retrieval R@1), more often than chance would (5.0%). patch AUC 0.9." in text
    )
    assert "finds the right question" not in text
    text, _ = page_of(tmp_path, guide={**numbers, "retrieval_at_1": 0.05})
    assert "no more often than chance would" in text
    text, _ = page_of(tmp_path, guide={"retrieval_at_1": None, "pair_auc": 0.5})
    assert "Guide: pair AUC 0.5." in text


def test_the_whole_run_shows_six_looks_with_images(report: Path):
    found = Text(report.read_text(encoding="utf-8"))
    assert len([alt for alt in found.images if "relevance to" in alt]) == 6
    assert len(whole_run().guide_samples) > 6
