"""The account of reflection's rounds as the page's tables."""

from __future__ import annotations

from typing import Any

import pytest

from clinkd.report import rounds


def part(answered: int, reasons: dict[str, int], **more: Any) -> dict[str, Any]:
    wrong = sum(reasons.values())
    found = {"answered": answered, "wrong": wrong, "reasons": reasons}
    return found | {"error_rate": wrong / answered if answered else None} | more


ACCOUNT = {
    "before": part(100, {"low_iou": 20, "no_box": 10}),
    "rounds": [
        {
            "before": part(50, {"low_iou": 25}, by_task={"vg": part(50, {"low_iou": 25})}),
            "after": part(50, {"low_iou": 10}, fixed=16, broke=1,
                          by_task={"vg": part(50, {"low_iou": 10}, fixed=16, broke=1)}),
            "corrected": 20, "from_candidates": 5, "generated": {"student": 200, "corrector": 80},
            "validation": part(100, {"low_iou": 15}),
        }
    ],
    "kept": 1,
}  # fmt: skip


def test_a_row_a_round_and_one_before() -> None:
    before, first = rounds.outcomes(ACCOUNT)
    assert before == {"round": None, "kept": False, "validation": 0.3}
    wanted = {"asked": 50, "before": 0.5, "after": 0.2, "fixed": 16, "broke": 1, "corrected": 20, "chosen": 5}
    assert wanted.items() <= first.items()
    assert (first["generated"], first["validation"], first["kept"]) == (280, 0.15, True)


def test_errors_by_reason_are_shares_of_the_validation_split() -> None:
    assert rounds.by_reason(ACCOUNT) == [
        {"reason": "low_iou", "rates": [0.2, 0.15]},
        {"reason": "no_box", "rates": [0.1, 0.0]},
        {"reason": "all", "rates": [0.3, 0.15]},
    ]


def test_without_validation_they_are_of_each_rounds_questions() -> None:
    none = {"before": part(0, {}), "rounds": [ACCOUNT["rounds"][0] | {"validation": part(0, {})}]}
    assert rounds.by_reason(none)[0] == {"reason": "low_iou", "rates": [0.5]}
    assert rounds.outcomes(none)[1]["validation"] is None


def test_tasks_and_modalities_come_with_what_was_fixed_and_broke() -> None:
    (row,) = rounds.by_group(ACCOUNT)
    assert row == {
        "round": 1, "group": "vg", "asked": 50, "before": 0.5, "after": 0.2, "fixed": 16, "broke": 1,
    }  # fmt: skip


@pytest.mark.parametrize("account", [{}, {"rounds": None}, {"rounds": []}, {"before": 3, "rounds": [1]}])
def test_a_missing_or_strange_account_is_no_error(account: dict[str, Any]) -> None:
    rounds.outcomes(account), rounds.by_reason(account), rounds.by_group(account)
