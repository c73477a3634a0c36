"""What a round of reflection trains on: chosen texts, replay, the corrector's distribution, and exercises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from phantom_rows import Rows, as_batch, phantom_row

from clinkd.data.boxes import to_qwen
from clinkd.data.correction import correction_prompt, elaborated
from clinkd.data.phantoms import PhantomSpec
from clinkd.distill.forms import Form
from clinkd.distill.labeller import Labeller, LabelSpec
from clinkd.distill.losses import distill_loss
from clinkd.distill.teacher_cache import Store, write_index
from clinkd.model.clinkd_qwen2vl import load_model
from clinkd.model.presets import TinySize, write_new_model
from clinkd.model.rope import RopeGuidance
from clinkd.train.reflect_task import ExerciseTask, Feedback, ReflectTask
from clinkd.train.tasks import VqaSpec

torch.set_num_threads(1)
PHANTOMS = PhantomSpec(6, size=56)
METHOD = {"divergence": "forward_kl", "temperature": 1.0}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return [phantom_row(PHANTOMS, number) for number in range(6)]


@pytest.fixture(scope="module")
def folder(rows, tmp_path_factory) -> Path:
    texts = [to_qwen(turn[key]) for row in rows for turn in row["turns"] for key in ("question", "answer")]
    texts.append(correction_prompt("", "", ""))
    size = TinySize(hidden=64, layers=2, mlp=96, vision_hidden=32, vision_layers=1, image_size=56)
    return write_new_model(texts, size, tmp_path_factory.mktemp("model"), vocab_size=600, seed=0)


def spec(folder: Path, **more: Any) -> VqaSpec:
    return VqaSpec(str(folder), RopeGuidance(), train_vision=False, **more)


def said(task: Any, inputs: dict[str, torch.Tensor]) -> list[str]:
    """The targets in a batch, row by row."""
    return [task.tokenizer.decode(row[row != -100]).removesuffix("<|im_end|>") for row in inputs["labels"]]


def test_a_share_of_the_groups_is_about_feedback_and_a_share_about_what_was_right(
    rows, folder, tmp_path
) -> None:
    feedback = Feedback({"p0#1": "Mended."}, share=0.3, right=["p5#0", "p5#2"], replay=0.5)
    task = ReflectTask(Rows(rows), tmp_path, spec(folder), feedback)
    own = (2, (0, 1, 2))
    dealt = [task._instead(own, np.random.default_rng(number)) for number in range(600)]
    counts = [sum(group[0] == record for group in dealt) for record in (0, 5, 2)]
    assert sum(counts) == 600 and counts == pytest.approx([180, 300, 120], abs=45)
    assert {len(group[1]) for group in dealt} == {3}  # a batch keeps its size
    wrong, had_right = ([turns for record, turns in dealt if record == number] for number in (0, 5))
    assert all(turns[0] == 1 and len(set(turns)) == 3 for turns in wrong)  # beside others of the same image
    assert all(set(turns[:2]) == {0, 2} for turns in had_right)
    first, second = (task.batch([own] * 4, 7, 9)[0]["input_ids"] for _ in range(2))
    assert torch.equal(first, second)  # a resumed run draws the same


def test_what_was_wrong_is_learned_by_the_chosen_text(rows, folder, tmp_path) -> None:
    task = ReflectTask(Rows(rows), tmp_path, spec(folder), Feedback({"p0#1": "Mended."}, share=1.0))
    inputs, _ = task.batch([(3, (0,)), (4, (0, 1))], 0, 9)
    assert len(said(task, inputs)) == 3 and said(task, inputs).count("Mended.") == 2
    assert "soft_rows" not in inputs
    none = ReflectTask(Rows(rows), tmp_path / "none", spec(folder), Feedback({}, share=1.0, replay=0.0))
    assert len(none.batch([(3, (0,)), (4, (0, 1))], 0, 9)[0]["labels"]) == 3  # as the ledger dealt


@pytest.fixture(scope="module")
def soft(rows, folder, tmp_path_factory) -> str:
    """The corrector's states along the truths of p1#0 and p4#1, whose prompts it was shown as corrections."""
    root, out = tmp_path_factory.mktemp("stores"), tmp_path_factory.mktemp("soft")
    records = []
    for record, turn in ((1, 0), (4, 1)):
        asked = rows[record]["turns"][turn]
        prompt = correction_prompt(asked["question"], asked["answer"], "I see.")
        records.append(rows[record] | {"id": f"p{record}#{turn}", "turns": [asked | {"question": prompt}]})
    store = Store(root, "corrector")
    store.open(load_model(folder).lm_head.weight, {})
    found = Labeller(LabelSpec(str(folder), str(root), "corrector"))(as_batch(records))
    names = [name.removesuffix("#0") for name in found["sample"]]
    write_index(out, list(zip(names, found["task"], found["key"], strict=True)), store, Form())
    return str(out)


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_soft_rows_follow_the_corrector_and_others_the_truth(rows, folder, soft, tmp_path, weight) -> None:
    feedback = Feedback({"p1#0": "Mended.", "p4#1": "Mended."}, share=0.0, soft=soft, method=METHOD)
    task = ReflectTask(Rows(rows), tmp_path, spec(folder, coordinate_weight=weight), feedback)
    inputs, tokens = task.batch([(1, (0, 1)), (4, (1,))], 0, 9)
    assert inputs["soft_rows"].tolist() == [True, False, True]
    assert to_qwen(rows[1]["turns"][0]["answer"]) == said(task, inputs)[0]  # along the truth
    module = task.build()
    losses = module(**inputs)

    inputs = dict(inputs)
    states = inputs.pop("teacher_hidden")
    soft_rows, coordinates = inputs.pop("soft_rows"), inputs.pop("coordinates", None)
    labels = inputs.pop("labels")
    hidden = module.model.forward_hidden(**inputs)[:, :-1]
    head, kept, targets = module.model.lm_head.weight, labels[:, 1:] != -100, labels[:, 1:]
    mask = kept & soft_rows[:, None]
    kd = distill_loss(
        hidden[mask], head, targets[mask], states.float(), module.corrector_head, a=1.0, normalizer=1.0,
        **METHOD,
    ).kd  # fmt: skip
    logits = (hidden @ head.T).log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    hard = kept & ~soft_rows[:, None]
    weights = 1 + (weight - 1) * (coordinates[:, 1:] if coordinates is not None else 0 * targets)
    ce = -(logits * hard).sum()
    torch.testing.assert_close(losses["ce"], ce)
    torch.testing.assert_close(losses["kd"], kd)
    torch.testing.assert_close(losses["loss"], kd - (weights * logits * hard).sum())
    assert int(kept.sum()) == tokens and losses["kd"] > 0

    plain, _ = task.batch([(0, (0,))], 0, 9)
    assert "teacher_hidden" not in plain and module(**plain)["kd"] == 0


def test_half_of_a_correctors_turns_are_exercises_that_ask_for_the_truth_with_where_it_is(
    rows, folder, tmp_path
) -> None:
    task = ExerciseTask(Rows(rows), tmp_path, spec(folder), seed=0)
    turns = rows[2]["turns"]
    shown = 0
    for step in range(40):
        for number, asked in enumerate(turns):
            prompt, answer = task.row(2, number, step, 40)
            text = task.tokenizer.decode(answer).removesuffix("<|im_end|>")
            posed = "A wrong first answer:" in task.tokenizer.decode(prompt)
            more = elaborated(asked["task"], asked["answer"])
            assert text == to_qwen(more if posed and more else asked["answer"])
            assert (prompt, answer) == task.row(2, number, step, 40)
            shown += posed
            assert not (posed and more is None)
    can = 40 * sum(elaborated(turn["task"], turn["answer"]) is not None for turn in turns)
    assert 0.35 * can < shown < 0.65 * can
