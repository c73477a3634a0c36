"""How DeepSpeed sends gradients changes no curve, and the metrics say what each step took."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from clinkd.data.phantoms import PhantomSpec

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def prepared(ray_session, tmp_path_factory) -> Path:
    from clinkd.data.prepare import prepare

    out = tmp_path_factory.mktemp("prepared")
    prepare(PhantomSpec(images=16), out, test_fraction=0.3, images_per_shard=8)
    return out


@pytest.mark.parametrize("zero", [2, pytest.param(3, marks=pytest.mark.full)])
def test_overlap_and_buckets_change_no_curve(zero: int, prepared: Path, start: Path, tmp_path: Path) -> None:
    from tiny_training import train_each

    from clinkd.model.rope import RopeGuidance
    from clinkd.train.tasks import VqaSpec

    spec = VqaSpec(str(start), RopeGuidance(1.5, 2.0), train_vision=True)
    ways = {
        "preset": {},
        "overlapped": {"overlap_comm": True, "bucket_size": 5000},  # a matrix of the model is larger
        "off": {"overlap_comm": False, "bucket_size": 40_000},
    }
    if zero == 3:
        ways["off"] |= {"cpu_offload": True, "offload_parameters": True, "zero_stage": 3}
        del ways["overlapped"]
    lines = train_each(
        prepared,
        {
            name: (tmp_path / name, spec, {"zero": zero, "steps": 5, "compute": way})
            for name, way in ways.items()
        },
    )
    losses = {name: [line["loss"] for line in found] for name, found in lines.items()}
    assert losses["preset"][-1] < 0.95 * losses["preset"][0]
    for found in losses.values():
        assert found == pytest.approx(losses["preset"], rel=1e-4)
    for line in lines["preset"]:
        assert line["tokens"] < line["input_tokens"]  # image and question tokens are input too
        assert line["tokens_per_s"] == pytest.approx(line["input_tokens"] / line["seconds"], rel=1e-2)
        assert line["tflops_per_s"] > 0 and line["memory_gib"] > 0.1
        assert math.isfinite(line["grad_norm"]) and line["grad_norm"] > 0
