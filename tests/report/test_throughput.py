"""What the report makes of the speeds that stages logged."""

from __future__ import annotations

from clinkd.report.throughput import throughput


def test_rates_are_medians_and_memory_is_the_largest() -> None:
    lines = [
        {"stage": "teacher", "step": step, "samples_per_s": speed, "tokens_per_s": 10 * speed}
        | {"memory_gib": gib}
        for step, speed, gib in ((1, 1.0, 0.5), (2, 8.0, 1.5), (3, 9.0, 1.25))
    ]
    assert throughput(lines) == [
        {"stage": "teacher", "steps": 3, "samples": 8.0, "tokens": 80.0, "tflops": None, "memory": 1.5}
    ]


def test_stages_come_in_their_order_and_other_lines_are_none() -> None:
    lines = [
        {"stage": "teacher", "step": 1, "samples_per_s": 2.0},
        {"stage": "teacher", "event": "done"},
        {"stage": "label", "step": 4},
        {"stage": "reflect-1", "step": 1, "tokens_per_s": 5.0},
        {"stage": "teacher", "step": 2, "samples_per_s": float("nan"), "memory_gib": 3.0},
    ]
    found = throughput(lines)
    assert [row["stage"] for row in found] == ["teacher", "reflect-1"]
    assert found[0]["steps"] == 1 and found[0]["samples"] == 2.0 and found[1]["samples"] is None


def test_a_step_written_twice_is_one_step() -> None:
    assert throughput([{"step": 1, "samples_per_s": 2.0}] * 3)[0]["steps"] == 1
