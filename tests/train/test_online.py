"""The teacher beside the student in the real loop: the cache's curve, the student's own answers, shards."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from feeding import batch, source
from tiny_training import Fed

from clinkd.config import ConfigError
from clinkd.data.phantoms import PhantomSpec
from clinkd.data.sampler import Batch
from clinkd.data.shards import iter_rows

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def here() -> None:
    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module


@pytest.fixture(scope="module")
def prepared(ray_session, tmp_path_factory) -> Path:
    from clinkd.data.prepare import prepare

    out = tmp_path_factory.mktemp("prepared")
    prepare(PhantomSpec(images=24), out, test_fraction=0.3, images_per_shard=12)
    return out


@pytest.fixture(scope="module")
def teacher(start, tmp_path_factory) -> Path:
    """Wider than the student, of other weights, and sure of what it says."""
    import torch
    from transformers import AutoTokenizer

    from clinkd.model.clinkd_qwen2vl import new_model, save_model
    from clinkd.model.pixels import load_processor
    from clinkd.model.presets import TinySize, tiny_config
    from clinkd.model.rope import RopeGuidance

    tokenizer = AutoTokenizer.from_pretrained(start)
    size = TinySize(hidden=128, layers=2, heads=2, mlp=256, vision_hidden=32, vision_layers=1, patch=14)
    torch.manual_seed(1)
    model = new_model(tiny_config(size, tokenizer), RopeGuidance(2.0, 2.0))
    model.lm_head.weight.data *= 4
    return save_model(model, tokenizer, load_processor(str(start)), tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def cache(prepared, teacher, tmp_path_factory) -> str:
    """What stage label would keep, in float16; a third of the answers are the teacher's own."""
    from clinkd.distill.labeller import Labeller, LabelSpec
    from clinkd.distill.teacher_cache import Store, write_index

    root, out = tmp_path_factory.mktemp("stores"), tmp_path_factory.mktemp("label")
    store = Store(root, "teacher")
    store.open({})
    rows = list(iter_rows(prepared, "train"))
    spec = LabelSpec(str(teacher), str(root), "teacher", max_new_tokens=8, hidden_share=0.3)
    (table,) = Labeller(spec).tables([rows])
    write_index(out, table.drop_columns(["new", "passes"]), store, spec.form)
    return str(out)


class Maker(Fed):
    """Makes a task on a worker, in the place of ``SupervisedTask``."""

    def __init__(self, cache: str, kind: Any = None, **online: Any) -> None:
        from clinkd.train.distill_task import DistillSpec

        self.kind, self.online = kind, online
        options = {"a": 2.0, "temperature": 1.0, "divergence": "forward_kl"}
        self.distill = DistillSpec(cache, options, start_quantile=0.5, end_quantile=0.0)

    def batches(self, spec: Any) -> Any:
        """What makes its batches."""
        from clinkd.train.batches import BatchSpec
        from clinkd.train.targets import Labels

        return BatchSpec(
            spec.model, spec.guidance, targets=Labels(self.distill.cache, states=not self.online)
        )

    def __call__(self, spec: Any, source: Any, zero: int) -> Any:
        from clinkd.train.distill_task import DistillTask
        from clinkd.train.online_task import OnlineDistillTask, OnlineSpec

        if not self.online:
            return DistillTask(spec, source, self.distill, zero)
        kind = self.kind() if self.kind else OnlineDistillTask
        return kind(spec, source, self.distill, OnlineSpec(**self.online), zero)


def spec_of(start: Path, **more: Any) -> Any:
    from clinkd.model.rope import RopeGuidance
    from clinkd.train.tasks import VqaSpec

    return VqaSpec(str(start), RopeGuidance(1.5, 2.0), train_vision=True, **more)


def test_online_is_the_cache_to_half_precision(prepared, start, teacher, cache, tmp_path) -> None:
    from tiny_training import train_each

    tasks = {"kept": Maker(cache), "asked": Maker(cache, teacher=str(teacher))}
    found = train_each(
        prepared,
        {
            name: (tmp_path / name, spec_of(start), {"zero": 1, "steps": 6, "task": task})
            for name, task in tasks.items()
        },
    )
    kept, asked = found["kept"], found["asked"]
    for name in ("loss", "kd", "ce"):
        assert [line[name] for line in asked] == pytest.approx([line[name] for line in kept], rel=2e-4)
    assert [line["tokens"] for line in asked] == [line["tokens"] for line in kept]
    assert asked[-1]["kd"] < 0.9 * asked[0]["kd"]


def watched() -> Any:
    """A task that writes down, as it saves, how its teacher's weights stand to those of the folder."""
    from clinkd.train.online_task import OnlineDistillTask

    class WatchedTask(OnlineDistillTask):
        def save(self, state: dict[str, Any], out: Path) -> None:
            import torch

            from clinkd.model.clinkd_qwen2vl import load_model

            before, held = load_model(self.online.teacher).state_dict(), self.teacher.weights()
            told = {
                "whole": all(torch.equal(value, before[name]) for name, value in held.items()),
                "held": sum(value.numel() for value in held.values()),
                "of": sum(before[name].numel() for name in held),
                "state": sorted(state),
            }
            (out.parent / "told.json").write_text(json.dumps(told))
            super().save(state, out)

    return WatchedTask


def test_the_student_learns_from_its_own_answers_and_the_teacher_stays_as_it_is(
    prepared, start, teacher, cache, tmp_path
) -> None:
    from tiny_training import train

    from clinkd.model.clinkd_qwen2vl import load_model

    maker = Maker(cache, watched, teacher=str(teacher), on_policy=1.0, max_new_tokens=6)
    lines = train(prepared, tmp_path / "out", spec_of(start), zero=1, steps=20, task=maker)
    assert all(line["sampled"] == 1 and "ce" not in line for line in lines)
    assert all(line["loss"] == pytest.approx(2 / 3 * line["kd"], rel=1e-4) for line in lines)
    first, last = (sum(line["kd"] for line in part) for part in (lines[:5], lines[-5:]))
    assert last < 0.6 * first
    told = json.loads((tmp_path / "out" / "told.json").read_text())
    assert told["whole"] and told["held"] == told["of"]
    assert set(told["state"]) == {f"model.{name}" for name in load_model(start).state_dict()}
    saved = load_model(tmp_path / "out" / "model")
    assert saved.lm_head.weight.shape == load_model(start).lm_head.weight.shape


def test_a_sharded_teacher_and_a_sharded_student_change_nothing(
    prepared, start, teacher, cache, tmp_path
) -> None:
    """Some steps learn from the student's own answers, some from the cache's."""
    from tiny_training import train_each

    ways = {}
    for student, stage in ((1, 0), (3, 3)):
        maker = Maker(
            cache, watched, teacher=str(teacher), zero_stage=stage, on_policy=0.5, max_new_tokens=6, seed=1
        )
        how = {"zero": student, "steps": 5, "task": maker}
        ways[student, stage] = (tmp_path / f"{student}{stage}", spec_of(start), how)
    curves = train_each(prepared, ways)
    for (_, stage), (out, _, _) in ways.items():
        told = json.loads((out / "told.json").read_text())
        assert told["held"] < 0.7 * told["of"] if stage == 3 else told["whole"]
    plain = curves[1, 0]
    assert {"sampled" in line for line in plain} == {True, False}
    for lines in curves.values():
        assert [line["tokens"] for line in lines] == [line["tokens"] for line in plain]
        assert [line["kd"] for line in lines] == pytest.approx([line["kd"] for line in plain], rel=2e-3)


def test_resumed_it_samples_the_same_answers(prepared, start, teacher, cache, tmp_path) -> None:
    from tiny_training import train

    task = Maker(cache, teacher=str(teacher), on_policy=0.6, max_new_tokens=6)
    how = {"zero": 2, "steps": 8, "task": task}
    calm = train(prepared, tmp_path / "calm", spec_of(start), **how)
    train(prepared, tmp_path / "torn", spec_of(start), **how, until=3)
    torn = train(prepared, tmp_path / "torn", spec_of(start), **how)
    assert [line["loss"] for line in torn] == [line["loss"] for line in calm]
    assert any("sampled" in line for line in torn[3:])
    same = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("calm", "torn")]
    assert same[0] == same[1]


@pytest.fixture(scope="module")
def made(prepared, start, teacher, cache, tmp_path_factory) -> Any:
    online = {"teacher": str(teacher), "on_policy": 1.0, "max_new_tokens": 40, "seed": 3}
    maker, spec = Maker(cache, **online), spec_of(start)
    return maker(spec, source(prepared, tmp_path_factory.mktemp("task"), maker.batches(spec)), 0)


@pytest.fixture
def task(made) -> Any:
    """A task in this process, its student as it starts."""
    made.build()
    return made


GROUPS = [(0, (0, 1)), (2, (0,)), (3, (1, 2))]


def test_sampled_are_the_students_own_tokens_up_to_their_end(task) -> None:
    """A student that knows nothing would write image tokens and the like; an empty answer is an end."""
    import torch

    from clinkd.model.presets import IM_END

    end = task.tokenizer.convert_tokens_to_ids(IM_END)
    task.student.lm_head.weight.data.zero_()  # every token is as likely as another
    seen: set[int] = set()
    for step in range(4):
        inputs, tokens = batch(task, GROUPS, step, 4)
        answers = [row[row != -100].tolist() for row in inputs["labels"]]
        assert tokens == sum(map(len, answers)) == len(inputs["teacher_hidden"])
        for answer in answers:
            assert 1 <= len(answer) <= 40 and (answer[-1] == end or len(answer) == 40)
            assert end not in answer[:-1]
            seen |= set(answer)
    config = task.student.config
    assert not seen & {config.image_token_id, config.video_token_id, config.vision_start_token_id}
    assert len(seen) > 100

    silent = task.student.lm_head.register_forward_hook(
        lambda module, given, logits: logits.index_fill(-1, torch.tensor(end), 1e4)
    )
    inputs, tokens = batch(task, GROUPS, 8, 9)  # in the last step nothing waits
    silent.remove()
    admitted = task.choose(Batch((0, 0), tuple((group,) for group in GROUPS)), 0, 8, 9).groups
    count = sum(len(turns) for _, turns in admitted)  # but for what was refused
    assert 3 <= count <= 5 and [row[row != -100].tolist() for row in inputs["labels"]] == [[end]] * count
    assert tokens == len(inputs["teacher_hidden"]) == count


def test_what_is_sampled_follows_from_seed_step_and_groups(task) -> None:
    import torch

    random = torch.random.get_rng_state()
    first, again, later = (batch(task, GROUPS, step, 9)[0] for step in (4, 4, 5))
    assert torch.equal(first["labels"], again["labels"])
    assert not torch.equal(first["labels"], later["labels"])
    assert torch.equal(torch.random.get_rng_state(), random)  # training's own stays where it was
    assert task.student.training


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_share_of_sampled_steps_is_on_policy(task, share, monkeypatch) -> None:
    from dataclasses import replace

    monkeypatch.setattr(task, "online", replace(task.online, on_policy=share))
    drawn = [task.samples(step) for step in range(1000)]
    assert sum(drawn) / 1000 == pytest.approx(share, abs=0.05 if 0 < share < 1 else 0)
    assert drawn == [task.samples(step) for step in range(1000)]


def test_a_teacher_that_cannot_see_the_students_batches_is_refused(start, teacher, tmp_path) -> None:
    import shutil

    from clinkd.train.online_task import check_shared

    check_shared(spec_of(start), str(teacher))
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    settings = json.loads((other / "preprocessor_config.json").read_text())
    settings["image_mean"] = [0.1, 0.2, 0.3]
    (other / "preprocessor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=r"differ in image_mean; use distill\.teacher=cache") as caught:
        check_shared(spec_of(start), str(other))
    assert "\n" not in str(caught.value)
