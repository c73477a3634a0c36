"""A round of reflection without its models: what is asked, what counts as a miss, what is kept."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clinkd.config import ReflectSection
from clinkd.reflect.rounds import choose, choose_records, correction_records, misses, write_feedback
from clinkd.reflect.similarity import RougeSimilarity

NEAR, FAR = "<box>(100,100),(200,200)</box>", "<box>(700,700),(800,800)</box>"


def row(name: str, response: str, *, task: str = "vg", truth: str = f"The liver is at {NEAR}.") -> dict:
    question = "Where is the liver?" if task == "vg" else f"What is at the {NEAR}?"
    return {
        "sample": f"{name}#0", "image": f"{name}.png", "task": task, "question": question,
        "annotation": truth, "responses": [response],
    }  # fmt: skip


@given(st.lists(st.integers(1, 5), min_size=1, max_size=20), st.integers(1, 40), st.integers(0, 3))
def test_a_round_asks_about_whole_records_until_it_has_enough(counts, samples, number) -> None:
    turns = [(f"r{index:02d}", count) for index, count in enumerate(counts)]
    chosen = choose_records(turns, samples, 0, number)
    total = sum(dict(turns)[name] for name in chosen)
    assert chosen == sorted(set(chosen)) and chosen == choose_records(turns, samples, 0, number)
    assert total >= min(samples, sum(counts))
    assert total - max(dict(turns)[name] for name in chosen) < samples


def test_rounds_ask_about_different_records() -> None:
    turns = [(f"r{index}", 1) for index in range(50)]
    assert choose_records(turns, 10, 0, 1) != choose_records(turns, 10, 0, 2)


def test_misses_are_counted_by_reason_and_the_worst_come_first() -> None:
    answered = [
        row("a", f"The liver is at {NEAR}."),
        row("b", f"The liver is at {FAR}."),
        row("c", "I see."),
        row("d", "Right kidney", task="roc", truth="Left kidney"),
    ]
    wrong, reasons = misses(answered, RougeSimilarity(), ReflectSection(budget=2))
    assert reasons == {"low_iou": 1, "no_box": 1, "laterality": 1}
    assert len(wrong) == 2 and wrong[0][1].score <= wrong[1][1].score


def test_the_corrector_sees_question_truth_and_wrong_answer() -> None:
    wrong, _ = misses([row("b", f"It is at {FAR}.")], RougeSimilarity(), ReflectSection())
    (record,) = correction_records(wrong, {"b": [b"png", b"other"]})
    prompt = record["turns"][0]["question"]
    assert record["id"] == "b#0" and (record["png"], record["more_png"]) == (b"png", [b"other"])
    assert all(part in prompt for part in ("Where is the liver?", NEAR, FAR))


@pytest.mark.parametrize(
    ("candidates", "source"),
    [
        (["One sees the liver at <box>(101,100),(200,200)</box>"], "candidate"),
        ([f"The liver is at {NEAR}."], "truth"),  # parrots the truth
        ([f"The liver is at {FAR}.", "no box"], "truth"),
        ([], "truth"),
    ],
)
def test_feedback_keeps_every_candidate_and_what_was_chosen(tmp_path: Path, candidates, source) -> None:
    wrong, _ = misses([row("b", f"It is at {FAR}.")], RougeSimilarity(), ReflectSection())
    rows = choose(wrong, {"b#0": candidates}, RougeSimilarity(), ReflectSection(floor=0.4))
    write_feedback(rows, tmp_path / "feedback.parquet")
    (kept,) = pq.read_table(tmp_path / "feedback.parquet").to_pylist()
    assert kept["source"] == source and len(kept["candidates"]) == len(candidates)
    assert kept["chosen"] == (candidates[0] if source == "candidate" else f"The liver is at {NEAR}.")
