"""Two workers, then one, then two again: every stage that trains comes out as if nothing had happened."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_training import Fed, train_each

from clinkd.data.phantoms import PhantomSpec
from clinkd.data.shards import iter_rows
from clinkd.model.rope import RopeGuidance
from clinkd.train.tasks import VqaSpec

pytestmark = pytest.mark.slow
STEPS, FIRST, SECOND = 6, 2, 4


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
def labels(prepared: Path, start: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """What stage label would keep; some truths are hidden."""
    from clinkd.distill.labeller import Labeller, LabelSpec
    from clinkd.distill.teacher_cache import Store, write_index

    root, out = tmp_path_factory.mktemp("stores"), tmp_path_factory.mktemp("label")
    Store(root, "teacher").open({})
    spec = LabelSpec(str(start), str(root), "teacher", max_new_tokens=4, hidden_share=0.2)
    (table,) = Labeller(spec).tables([list(iter_rows(prepared, "train"))])
    write_index(out, table.drop_columns(["new", "passes"]), spec.store(), spec.form)
    return str(out)


@pytest.fixture(scope="module")
def feedback(prepared: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = [f"{row['id']}#0" for row in iter_rows(prepared, "train")][:5]
    path = tmp_path_factory.mktemp("feedback") / "feedback.parquet"
    pq.write_table(pa.table({"sample": names, "chosen": ["It is mended."] * len(names)}), path)
    return str(path), names


class Guided(Fed):
    def batches(self, spec: Any) -> Any:
        from clinkd.train.guide_task import GuideBatchSpec

        return GuideBatchSpec(spec.model)

    def __call__(self, spec: Any, source: Any, zero: int) -> Any:
        from clinkd.train.guide_task import GuideTask

        return GuideTask(spec, source, zero)


class Distilled(Fed):
    """With a curriculum that holds half of the samples back at first."""

    def __init__(self, labels: str) -> None:
        self.labels = labels

    def batches(self, spec: Any) -> Any:
        from clinkd.train.batches import BatchSpec
        from clinkd.train.targets import Labels

        return BatchSpec(spec.model, spec.guidance, packed=True, targets=Labels(self.labels))

    def __call__(self, spec: Any, source: Any, zero: int) -> Any:
        from clinkd.train.distill_task import DistillSpec, DistillTask

        options = {"a": 2.0, "temperature": 1.0, "divergence": "forward_kl"}
        return DistillTask(spec, source, DistillSpec(self.labels, options, 0.5, 0.0), zero)


class Reflected(Fed):
    """A third of the groups are about feedback, a third about what was right."""

    def __init__(self, path: str, names: list[str]) -> None:
        self.path, self.names = path, names

    def batches(self, spec: Any) -> Any:
        from clinkd.train.batches import BatchSpec
        from clinkd.train.targets import Corrections

        return BatchSpec(spec.model, spec.guidance, packed=True, targets=Corrections(self.path))

    def __call__(self, spec: Any, source: Any, zero: int) -> Any:
        from clinkd.train.reflect_task import Feedback, ReflectTask

        return ReflectTask(spec, source, Feedback(self.names[:3], 0.3, self.names[3:], 0.3), zero)


class Exercised(Fed):
    def batches(self, spec: Any) -> Any:
        from clinkd.train.batches import BatchSpec
        from clinkd.train.targets import Exercises

        return BatchSpec(spec.model, spec.guidance, targets=Exercises(0))

    def __call__(self, spec: Any, source: Any, zero: int) -> Any:
        from clinkd.train.tasks import SupervisedTask

        return SupervisedTask(spec, source, zero)


def test_two_one_two_workers_in_every_stage(prepared, start, labels, feedback, tmp_path) -> None:
    spec = VqaSpec(str(start), RopeGuidance(1.5, 2.0), train_vision=True)
    packed = {"feed": {"tokens": 300, "window_bytes": 20_000}, "optim": {"batch_size": 1}}
    stages: dict[str, dict[str, Any]] = {
        "guide": {"zero": 0, "task": Guided(), "optim": {"questions_per_image": 1000}},
        "corrector": {"zero": 1, "task": Exercised()},
        "distill": {"zero": 1, "task": Distilled(labels)} | packed,
        "reflect": {"zero": 2, "task": Reflected(*feedback)} | packed,
    }

    def run(name: str, **how: Any) -> dict[str, list[dict[str, Any]]]:
        ways = {}
        for stage, own in stages.items():
            folder = tmp_path / f"{stage}-{name}"
            ways[stage] = (folder, spec, {"steps": STEPS} | own | how)
        return train_each(prepared, ways)

    calm = run("calm")
    run("torn", until=FIRST)
    run("torn", until=SECOND, compute={"workers": 1})
    torn = run("torn")
    for stage, lines in calm.items():
        assert [line["step"] for line in torn[stage]] == list(range(1, STEPS + 1)), stage
        assert [line["tokens"] for line in torn[stage]] == [line["tokens"] for line in lines], stage
        for key in ("loss", *(["kd", "admitted_share"] if stage == "distill" else [])):
            assert [line[key] for line in torn[stage]] == pytest.approx(
                [line[key] for line in lines], rel=2e-4
            ), (stage, key)
        # With as many workers nothing differs, to the last bit that is written.
        assert [line["loss"] for line in torn[stage][:FIRST]] == [line["loss"] for line in lines[:FIRST]]
    shares = [line["admitted_share"] for line in calm["distill"]]
    assert shares == sorted(shares) and shares[0] < 0.7 and shares[-1] == 1
