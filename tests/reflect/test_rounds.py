"""A round of reflection without its models: what is asked, what counts as a miss, what is kept."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from clinkd.config import ReflectSection
from clinkd.reflect import rounds
from clinkd.reflect.rounds import choose_records
from clinkd.reflect.similarity import RougeSimilarity

MODELS = {"student": "s", "corrector": "c"}
NEAR, FAR = "<box>(100,100),(200,200)</box>", "<box>(700,700),(800,800)</box>"


def row(name: str, response: str, *, task: str = "vg", truth: str = f"The liver is at {NEAR}.") -> dict:
    question = "Where is the liver?" if task == "vg" else f"What is at the {NEAR}?"
    return {
        "sample": f"{name}#0", "image": f"{name}.png", "task": task, "modality": "ct", "question": question,
        "annotation": truth, "responses": [response],
    }  # fmt: skip


@given(st.lists(st.integers(1, 5), min_size=1, max_size=20), st.integers(1, 40), st.integers(0, 3))
def test_a_round_asks_about_whole_records_until_it_has_enough(counts, samples, number) -> None:
    turns = np.array(counts, np.int32)
    chosen = choose_records(turns, samples, 0, number).tolist()
    total = int(turns[chosen].sum())
    assert chosen == sorted(set(chosen)) and chosen == choose_records(turns, samples, 0, number).tolist()
    assert total >= min(samples, sum(counts))
    assert total - max(counts[record] for record in chosen) < samples


def test_rounds_ask_about_different_records() -> None:
    turns = np.ones(50, np.int32)
    first, second = (choose_records(turns, 10, 0, number).tolist() for number in (1, 2))
    assert first != second and len(first) == len(second) == 10


ANSWERED = [
    row("a", f"The liver is at {NEAR}."),
    row("b", f"The liver is at {FAR}."),
    row("c", "I see."),
    row("d", "Right kidney", task="roc", truth="Left kidney") | {"modality": "mr"},
]


def verdicts(answered: list[dict]) -> list:
    return rounds.judged(answered, RougeSimilarity(), ReflectSection())


def misses(answered: list[dict], budget: int = 9) -> list:
    return rounds.worst(answered, verdicts(answered), budget)


def test_the_worst_misses_come_first_within_the_budget() -> None:
    wrong = misses(ANSWERED)
    scores = [verdict.score for _, verdict in wrong]
    assert len(wrong) == 3 and scores == sorted(scores)
    assert misses(ANSWERED, budget=2) == wrong[:2]


def test_answers_are_counted_by_reason_task_and_modality_and_add_up() -> None:
    found = rounds.tally(ANSWERED, verdicts(ANSWERED))
    assert found["reasons"] == {"laterality": 1, "low_iou": 1, "no_box": 1}
    assert (found["answered"], found["wrong"], found["error_rate"]) == (4, 3, 0.75)
    for group in ("by_task", "by_modality"):
        assert sum(part["answered"] for part in found[group].values()) == 4
        assert sum(part["wrong"] for part in found[group].values()) == 3
    assert found["by_modality"]["mr"]["reasons"] == {"laterality": 1}
    assert rounds.tally([], []) == {
        "answered": 0, "wrong": 0, "error_rate": None, "reasons": {}, "by_task": {}, "by_modality": {},
    }  # fmt: skip


def test_what_was_fixed_and_what_broke_is_counted() -> None:
    was = rounds.right(ANSWERED, verdicts(ANSWERED))
    assert was == {"a#0": True, "b#0": False, "c#0": False, "d#0": False}
    after = [ANSWERED[0] | {"responses": ["I see."]}, ANSWERED[1] | {"responses": [NEAR]}, *ANSWERED[2:]]
    found = rounds.tally(after, verdicts(after), was)
    assert (found["fixed"], found["broke"], found["wrong"]) == (1, 1, 3)
    assert found["by_task"]["roc"]["fixed"] == 0


@pytest.mark.parametrize(
    ("errors", "best", "over"),
    [
        ([0.5], 0, False),
        ([0.5, 0.4], 1, False),
        ([0.5, 0.4, 0.4], 1, True),  # no fewer errors is no gain
        ([0.5, 0.6], 0, True),
        ([0.5, 0.6, 0.3], 2, False),
        ([None, None, None], 2, False),  # nothing to validate with: all rounds, the last one is kept
    ],
)
def test_rounds_end_without_a_gain_and_the_best_is_kept(errors, best, over) -> None:
    assert rounds.best_round(errors) == best
    assert rounds.finished(errors, patience=1) == over
    assert not rounds.finished(errors, patience=3)


def test_a_round_says_before_how_much_it_generates() -> None:
    options = ReflectSection(samples=100, budget=30, candidates=4, rounds=2)
    assert rounds.generations(options, 50) == {"student": 250, "corrector": 120, "whole": 790}
    assert rounds.generations(options.model_copy(update={"budget": 999}), 0)["corrector"] == 400
    assert rounds.generations(options.model_copy(update={"target": "distribution"}), 0)["corrector"] == 0
    assert rounds.generations(options.model_copy(update={"rounds": 0}), 50)["whole"] == 0


def test_the_corrector_sees_question_truth_and_wrong_answer() -> None:
    wrong = misses([row("b", f"It is at {FAR}.")])
    turn = rounds.correction_turn(wrong[0][0])
    prompt = turn["question"]
    assert turn["answer"] == wrong[0][0]["annotation"] and turn["trusted"]
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
    wrong = misses([row("b", f"It is at {FAR}.")])
    rows = rounds.choose(wrong, {"b#0": candidates}, RougeSimilarity(), ReflectSection(floor=0.4), MODELS)
    rounds.write_feedback(rows, tmp_path / "feedback.parquet")
    (kept,) = pq.read_table(tmp_path / "feedback.parquet").to_pylist()
    assert kept["source"] == source and len(kept["candidates"]) == len(candidates)
    assert kept["chosen"] == (candidates[0] if source == "candidate" else f"The liver is at {NEAR}.")
    assert (kept["student_hash"], kept["corrector_hash"], len(kept["prompt_hash"])) == ("s", "c", 16)
