"""The answering stages with a real model: every ZeRO stage trains the same curve, and what it saves loads."""

from pathlib import Path

import pytest

from clinkd.data.phantoms import PhantomSpec

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def prepared(ray_session, tmp_path_factory) -> Path:
    from clinkd.data.prepare import prepare

    out = tmp_path_factory.mktemp("prepared")
    prepare(PhantomSpec(images=24), out, test_fraction=0.3, images_per_shard=12)
    return out


@pytest.mark.parametrize("stages", [(0, 2), pytest.param((0, 1, 2, 3), marks=pytest.mark.full)])
def test_zero_stages_train_one_curve(prepared, start, tmp_path, stages) -> None:
    import torch
    from tiny_training import train_each

    from clinkd.model.clinkd_qwen2vl import load_model
    from clinkd.model.rope import RopeGuidance
    from clinkd.train.tasks import VqaSpec

    spec = VqaSpec(str(start), RopeGuidance(1.5, 2.0), train_vision=True, coordinate_weight=3.0)
    ways = {zero: (tmp_path / str(zero), spec, {"zero": zero, "steps": 6}) for zero in stages}
    curves, models = {}, {}
    for zero, lines in train_each(prepared, ways).items():
        curves[zero] = [line["ce"] for line in lines]
        models[zero] = load_model(tmp_path / str(zero) / "model").state_dict()
    before = load_model(start).state_dict()
    for zero in stages:
        assert curves[zero] == pytest.approx(curves[0], rel=2e-3)
        assert curves[zero][-1] < 0.9 * curves[zero][0]
        for name, value in models[zero].items():
            assert torch.allclose(value, models[0][name], atol=5e-3), name
            if "bias" not in name and "norm" not in name:
                assert not torch.equal(value, before[name]), f"{name} was not trained"
