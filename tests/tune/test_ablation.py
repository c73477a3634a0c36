"""The ablation's tables, out of comparisons of real predictions."""

from __future__ import annotations

import json
from typing import Any

import pytest

from clinkd.data.phantoms import image_name
from clinkd.data.records import MODALITIES
from clinkd.evaluate.compare import compare
from clinkd.tune.ablation import ARMS, HEADLINE, table, whole_table


def run(right: int) -> list[dict[str, Any]]:
    """Four images of each modality with a question of each kind; ``right`` of the four are answered."""
    rows = []
    for number in range(4 * len(MODALITIES)):
        image, known = image_name(number), number // len(MODALITIES) < right
        boxed = {"question": "Where is it?", "annotation": "<box>(100,100),(300,300)</box>"}
        named = {"question": "What is at <box>(100,100),(300,300)</box>?", "annotation": "liver"}
        said = "<box>(100,100),(300,300)</box>" if known else "<box>(600,600),(900,900)</box>"
        rows.append({"id": len(rows), "image": image, "task": "vg", "response": said} | boxed)
        rows.append(
            {"id": len(rows), "image": image, "task": "roc", "response": "liver" if known else "lung"} | named
        )
    return rows


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    """Three seeds of each arm but the last, which has not ended."""
    sft, better = [run(1), run(1), run(1)], [run(3), run(2), run(4)]
    found: dict[str, Any] = {"sft": {"runs": ["a", "b", "c"], "against": None}}
    for name in list(ARMS)[1:-1]:
        found[name] = {"runs": ["a", "b", "c"], "against": compare(sft, better)}
    found["all"] = {"runs": [], "against": None}
    return json.loads(json.dumps({"seeds": 3, "arms": found}))


def rows(text: str) -> dict[str, list[str]]:
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return {row[0]: row[1:] for row in cells}


def test_an_arm_stands_beside_the_one_it_is_compared_with(result: dict[str, Any]) -> None:
    found = rows(table(result))
    assert found["arm"] == ["seeds", f"vg {HEADLINE['vg']}", f"roc {HEADLINE['roc']}"]
    assert [float(cell) for cell in found["sft"]] == pytest.approx([3, 0.25, 0.25], abs=1e-4)
    for cell in found["guided"][1:]:  # 3, 2 and 4 of 4
        mean, rest = cell.split(" (")
        assert float(mean) == pytest.approx(0.75, abs=1e-4)
        difference, between, p = rest.rstrip(")").split(", ")
        low, high = map(float, between.split("…"))
        assert float(difference) == pytest.approx(0.5, abs=1e-4) and 0 < low < 0.5 < high < 1
        assert 0 < float(p.removeprefix("p ")) < 0.05
    assert found["all"] == ["0", "-", "-"]


def test_every_metric_has_a_row_of_all_arms(result: dict[str, Any]) -> None:
    found = rows(whole_table(result))
    assert found[""] == list(ARMS)
    tasks = result["arms"]["guided"]["against"]["tasks"]
    asked = [(task, metric) for task in ("vg", "roc") for metric in tasks[task]]  # no captions were
    assert list(found)[2:] == [
        f"{task} {metric}" for task, metric in asked if tasks[task][metric]["first"] is not None
    ]
    assert len(found) > 8
    assert all(len(row) == len(ARMS) for row in found.values())


def test_before_an_arm_has_ended_it_says_so() -> None:
    nothing = {"seeds": 1, "arms": {name: {"runs": [], "against": None} for name in ARMS}}
    assert table(nothing) == "ablation: no arm has ended"
