"""The answering stages with a real model: every ZeRO stage trains the same curve, and what it saves loads."""

import json
from pathlib import Path

import pytest

from clinkd.config import ComputeSection, OptimSection
from clinkd.data.phantoms import PhantomSpec

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def prepared(ray_session, tmp_path_factory) -> Path:
    from clinkd.data.prepare import prepare

    out = tmp_path_factory.mktemp("prepared")
    prepare(PhantomSpec(images=24), out, test_fraction=0.3, images_per_shard=12)
    return out


def train(prepared: Path, start: Path, out: Path, zero: int) -> list[float]:
    import ray.data

    from clinkd.data.shards import shard_paths
    from clinkd.model.rope import RopeGuidance
    from clinkd.train.loop import TrainJob, fit
    from clinkd.train.tasks import SupervisedTask, VqaSpec

    spec = VqaSpec(str(start), RopeGuidance(1.5, 2.0), train_vision=True, coordinate_weight=3.0)
    optim = OptimSection(batch_size=2, questions_per_image=3, lr=5e-3, steps=6)
    out.mkdir()
    job = TrainJob(
        stage="teacher",
        make_task=lambda rows, scratch: SupervisedTask(rows, scratch, spec, zero),
        optim=optim,
        compute=ComputeSection(workers=2, checkpoint_every=100),
        zero_stage=zero,
        steps=6,
        seed=0,
        out=str(out),
    )
    rows = ray.data.read_parquet([str(path) for path in shard_paths(prepared)])
    fit(job, rows.filter(expr=ray.data.expressions.col("split") == "train"), out / "work")
    return [json.loads(line)["ce"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_zero_0_to_3_train_one_curve(prepared, start, tmp_path) -> None:
    import torch

    from clinkd.model.clinkd_qwen2vl import load_model

    curves, models = {}, {}
    for zero in range(4):
        curves[zero] = train(prepared, start, tmp_path / str(zero), zero)
        models[zero] = load_model(tmp_path / str(zero) / "model").state_dict()
    before = load_model(start).state_dict()
    for zero in range(4):
        assert curves[zero] == pytest.approx(curves[0], rel=2e-3)
        assert curves[zero][-1] < 0.9 * curves[zero][0]
        for name, value in models[zero].items():
            assert torch.allclose(value, models[0][name], atol=5e-3), name
            if "bias" not in name and "norm" not in name:
                assert not torch.equal(value, before[name]), f"{name} was not trained"
