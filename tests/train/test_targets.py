"""What is to be said to each question of a batch: the truth, the teacher's answers, corrections."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from feeding import answers, batch, source, write_shard
from phantom_rows import phantom_model, phantom_row

from clinkd.data.phantoms import PhantomSpec
from clinkd.distill.labeller import Labeller, LabelSpec
from clinkd.distill.teacher_cache import Store, write_index
from clinkd.model.rope import RopeGuidance
from clinkd.train.batches import batch_maker
from clinkd.train.distill_task import take_said
from clinkd.train.targets import SAID, Labels, Truth, Turn
from clinkd.train.tasks import SupervisedTask, VqaSpec

torch.set_num_threads(1)
SPEC = PhantomSpec(3, size=56)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    found = [phantom_row(SPEC, number) for number in range(3)]
    found[1]["turns"][0]["trusted"] = False  # the teacher, which was taught nothing, never ends its answer
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phantom_model(SPEC, tmp_path_factory.mktemp("model"), layers=1)


@pytest.fixture(scope="module")
def labels(rows, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    root, out = tmp_path_factory.mktemp("stores"), tmp_path_factory.mktemp("label")
    spec = LabelSpec(str(folder), str(root), "teacher", max_new_tokens=4)
    Store(root, "teacher").open({})
    (table,) = Labeller(spec).tables([rows])
    write_index(out, table.drop_columns(["new", "passes"]), spec.store(), spec.form)
    return str(out)


def turns_of(row: dict[str, Any]) -> list[Turn]:
    return [
        Turn(f"{row['id']}#{at}", turn["task"], turn["question"], turn["answer"])
        for at, turn in enumerate(row["turns"])
    ]


def test_the_truth_is_what_the_data_say(rows) -> None:
    turns = turns_of(rows[0])
    assert Truth().open().talk(turns, 3) == [(turn.question, turn.answer) for turn in turns]
    assert Truth().arrays(["p0#0"]) == {}


def test_what_the_teacher_was_refused_for_is_not_said(rows, labels: str) -> None:
    opened, turns = Labels(labels).open(), turns_of(rows[1])
    found = opened.talk(turns, 0)
    assert found[0] is None
    assert found[1:] == [(turn.question, turn.answer) for turn in turns[1:]]
    assert opened.talk([turns[1]._replace(sample="elsewhere#0")], 0) == [None]


def test_the_teachers_states_come_as_the_bytes_that_were_kept(rows, labels: str) -> None:
    opened = Labels(labels).open()
    names = ["p2#1", "p0#0"]
    arrays = opened.arrays(names)
    assert set(arrays) == {SAID + "states"} and arrays[SAID + "states"].dtype == np.uint8
    said = take_said(dict(arrays), opened.cache)["teacher_hidden"]
    assert torch.equal(said, opened.cache.read(names)["teacher_hidden"])
    assert Labels(labels, states=False).open().arrays(names) == {}
    assert take_said({}, opened.cache) == {}
    none = take_said(dict(opened.arrays([])), opened.cache)["teacher_hidden"]
    assert none.shape == (0, said.shape[1])


@pytest.mark.parametrize("conversations", [False, True])
def test_a_batch_leaves_out_what_is_not_said(rows, folder, labels, tmp_path, conversations) -> None:
    batch_maker.cache_clear()
    vqa = VqaSpec(str(folder), RopeGuidance(), train_vision=False)
    maker = answers(vqa, targets=Labels(labels, states=False), conversations=conversations)
    task = SupervisedTask(vqa, source(write_shard(tmp_path / "data", rows), tmp_path, maker))
    count = len(rows[1]["turns"])
    groups = [(1, (0,) if conversations else tuple(range(count)))]
    inputs, tokens = batch(task, groups)
    assert len(inputs["input_ids"]) == (1 if conversations else count - 1)
    said = [task.tokenizer.decode(row[row != -100]) for row in inputs["labels"]]
    assert "".join(said).count("<|im_end|>") == count - 1
    alone, _ = batch(task, [(1, (0,))]) if not conversations else (inputs, tokens)
    if not conversations:
        assert (alone["labels"] == -100).all()  # nothing is left of it: a batch that counts nothing
