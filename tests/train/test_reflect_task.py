"""What a round of reflection trains on: chosen texts, replay, the corrector's distribution, and exercises."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from feeding import answers, batch, source, write_shard
from phantom_rows import phantom_row

from clinkd.data.boxes import to_qwen
from clinkd.data.correction import correction_prompt, elaborated
from clinkd.data.phantoms import PhantomSpec
from clinkd.data.sampler import Batch
from clinkd.data.shards import DataError
from clinkd.distill.forms import Form
from clinkd.distill.labeller import Labeller, LabelSpec
from clinkd.distill.losses import distill_loss
from clinkd.distill.teacher_cache import Store, write_index
from clinkd.model.presets import TinySize, write_new_model
from clinkd.model.rope import RopeGuidance
from clinkd.train.batches import batch_maker
from clinkd.train.reflect_task import Feedback, ReflectTask
from clinkd.train.targets import Corrections, Exercises, Turn
from clinkd.train.tasks import VqaSpec

torch.set_num_threads(1)
PHANTOMS = PhantomSpec(6, size=56)
METHOD = {"divergence": "forward_kl", "temperature": 1.0}


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    return [phantom_row(PHANTOMS, number) for number in range(6)]


@pytest.fixture(scope="module")
def prepared(rows, tmp_path_factory) -> Path:
    return write_shard(tmp_path_factory.mktemp("data") / "prepared", rows)


@pytest.fixture(scope="module")
def folder(rows, tmp_path_factory) -> Path:
    texts = [to_qwen(turn[key]) for row in rows for turn in row["turns"] for key in ("question", "answer")]
    texts.append(correction_prompt("", "", ""))
    size = TinySize(hidden=64, layers=2, mlp=96, vision_hidden=32, vision_layers=1, image_size=56)
    return write_new_model(texts, size, tmp_path_factory.mktemp("model"), vocab_size=600, seed=0)


def spec(folder: Path, **more: Any) -> VqaSpec:
    return VqaSpec(str(folder), RopeGuidance(), train_vision=False, **more)


@pytest.fixture
def make(prepared, folder, tmp_path) -> Any:
    def task(
        chosen: dict[str, str], weight: float = 1.0, soft: str | None = None, **more: Any
    ) -> ReflectTask:
        vqa = spec(folder, coordinate_weight=weight)
        kept = tmp_path / "feedback.parquet"
        texts = {
            "sample": pa.array(list(chosen), pa.string()),
            "chosen": pa.array(list(chosen.values()), pa.string()),
        }
        pq.write_table(pa.table(texts), kept)
        batch_maker.cache_clear()
        fed = source(prepared, tmp_path, answers(vqa, targets=Corrections(str(kept), soft)))
        return ReflectTask(vqa, fed, Feedback(list(chosen), soft=soft, **more))

    return task


def said(task: Any, inputs: dict[str, torch.Tensor]) -> list[str]:
    """The targets in a batch, row by row."""
    return [task.tokenizer.decode(row[row != -100]).removesuffix("<|im_end|>") for row in inputs["labels"]]


def test_a_share_of_the_groups_is_about_feedback_and_a_share_about_what_was_right(make) -> None:
    task = make({"p0#1": "Mended."}, share=0.3, right=["p5#0", "p5#2"], replay=0.5)
    own = (2, (0, 1, 2))
    dealt = [task.choose(Batch((0, 0), ((own,),)), 0, step, 600).groups[0] for step in range(600)]
    counts = [sum(group[0] == record for group in dealt) for record in (0, 5, 2)]
    assert sum(counts) == 600 and counts == pytest.approx([180, 300, 120], abs=45)
    assert {len(group[1]) for group in dealt} == {3}  # a batch keeps its size
    wrong, had_right = ([turns for record, turns in dealt if record == number] for number in (0, 5))
    assert all(turns[0] == 1 and len(set(turns)) == 3 for turns in wrong)  # beside others of the same image
    assert all(set(turns[:2]) == {0, 2} for turns in had_right)
    first, second = (batch(task, [own] * 4, 7, 9)[0]["input_ids"] for _ in range(2))
    assert torch.equal(first, second)  # a resumed run draws the same
    lanes = [[task.choose(Batch((0, 0), ((own,),)), lane, step, 9) for step in range(20)] for lane in (0, 1)]
    assert lanes[0] != lanes[1]


def test_what_was_wrong_is_learned_by_the_chosen_text(make) -> None:
    task = make({"p0#1": "Mended."}, share=1.0)
    inputs, _ = batch(task, [(3, (0,)), (4, (0, 1))], 0, 9)
    assert len(said(task, inputs)) == 3 and said(task, inputs).count("Mended.") == 2
    assert "soft_tokens" not in inputs
    none = make({}, share=1.0, replay=0.0)
    assert len(batch(none, [(3, (0,)), (4, (0, 1))], 0, 9)[0]["labels"]) == 3  # as the sampler dealt


def test_feedback_about_a_record_that_is_not_trained_on_is_refused(make) -> None:
    with pytest.raises(DataError, match="feedback about p77, which is no record of the training split"):
        make({"p77#0": "Mended."}, share=1.0)


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
    store.open({})
    (table,) = Labeller(LabelSpec(str(folder), str(root), "corrector")).tables([records])
    names = [name.removesuffix("#0") for name in table.column("sample").to_pylist()]
    asked = table.drop_columns(["new", "passes"]).set_column(0, "sample", pa.array(names))
    write_index(out, asked, store, Form())
    return str(out)


@pytest.mark.parametrize("weight", [1.0, 3.0])
def test_soft_turns_follow_the_corrector_and_others_the_truth(rows, soft, make, weight) -> None:
    task = make({"p1#0": "Mended.", "p4#1": "Mended."}, weight, soft=soft, share=0.0, method=METHOD)
    inputs, tokens = batch(task, [(1, (0, 1)), (4, (1,))], 0, 9)
    answered = (inputs["labels"] != -100).sum(1).tolist()
    wanted = [[True] * answered[0], [False] * answered[1], [True] * answered[2]]
    assert inputs["soft_tokens"].tolist() == [one for row in wanted for one in row]
    assert to_qwen(rows[1]["turns"][0]["answer"]) == said(task, inputs)[0]  # along the truth
    module = task.build()
    losses = module(**inputs)

    inputs = dict(inputs)
    states = inputs.pop("teacher_hidden")
    inputs.pop("soft_tokens")
    soft_rows, coordinates = torch.tensor([True, False, True]), inputs.pop("coordinates", None)
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

    plain, _ = batch(task, [(0, (0,))], 0, 9)
    assert "teacher_hidden" not in plain and module(**plain)["kd"] == 0


def test_half_of_a_correctors_turns_are_exercises_that_ask_for_the_truth_with_where_it_is(rows) -> None:
    asked = [
        Turn(f"p{record}#{at}", turn["task"], turn["question"], turn["answer"])
        for record in (1, 2)
        for at, turn in enumerate(rows[record]["turns"])
    ]
    tasks = {turn.task for turn in asked if turn.sample.startswith("p1")}
    targets, shown, can = Exercises(seed=0), 0, 0
    for step in range(40):
        said = targets.talk(asked, step)
        assert said == targets.talk(asked, step)
        for turn, (question, answer) in zip(asked, said, strict=True):
            if turn.sample.startswith("p1"):
                continue
            posed, more = "A wrong first answer:" in question, elaborated(turn.task, turn.answer)
            assert answer == (more if posed else turn.answer)
            assert not (posed and (more is None or turn.task not in tasks))
            if posed:
                others = [one.answer for one in asked if one.task == turn.task and one.sample[:2] == "p1"]
                assert question in [correction_prompt(turn.question, turn.answer, other) for other in others]
            shown, can = shown + posed, can + (more is not None and turn.task in tasks)
    assert can and 0.35 * can < shown < 0.65 * can
    alone = [turn for turn in asked if turn.sample.startswith("p1")]
    assert all(
        Exercises(0).talk(alone, step) == [(turn.question, turn.answer) for turn in alone] for step in (0, 1)
    )
