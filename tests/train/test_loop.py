"""The training loop on real Ray Train and DeepSpeed: a worker that dies, the number of workers."""

import json
import sys
from pathlib import Path

import pytest
from tiny_training import crew

from clinkd.config import ComputeSection, OptimSection
from clinkd.train.loop import TrainJob, keep_lines

pytestmark = pytest.mark.slow


class LineTask:
    """Least squares on numbers that Ray Data brings: small, but a real model, engine and optimiser."""

    def __init__(self, rows, scratch: Path, fail_once: str | None = None):
        import numpy as np

        values = np.concatenate([batch["id"] for batch in rows.iter_batches(batch_size=None)])
        self.values = np.sort(values).astype("float32")
        self.fail_once = fail_once

    def build(self):
        import torch

        class Line(torch.nn.Module):
            def __init__(self):
                super().__init__()
                nn = torch.nn
                self.layers = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))

            def forward(self, x, y):
                error = (self.layers(x) - y).square().sum()
                return {"loss": error, "error": error}

        return Line()

    def turn_counts(self):
        return [1] * len(self.values)

    def batch(self, groups, step, total):
        import os

        import torch

        if self.fail_once and step == 7 and not Path(self.fail_once).exists():
            Path(self.fail_once).touch()
            os._exit(9)  # as abrupt as kill -9
        x = torch.tensor([[self.values[record] / 16] for record, _ in groups])
        return {"x": x, "y": 2 * x + 1}, len(groups)

    def save(self, state, out):
        from safetensors.torch import save_file

        out.mkdir(parents=True, exist_ok=True)
        save_file({key: value.clone() for key, value in state.items()}, out / "model.safetensors")


def train(out: Path, *, zero: int, workers=2, batch=2, fail_once: str | None = None) -> list:
    import ray
    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module
    out.mkdir(parents=True, exist_ok=True)
    job = TrainJob(
        stage="line",
        make_task=lambda rows, scratch: LineTask(rows, scratch, fail_once),
        optim=OptimSection(batch_size=batch, lr=0.05),
        compute=ComputeSection(workers=workers, checkpoint_every=5),
        zero_stage=zero,
        steps=12,
        seed=3,
        out=str(out),
        work=str(out / "work"),
    )
    crew(job.compute).fit(job, ray.data.range(32))
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_a_worker_that_dies_changes_nothing(ray_session, tmp_path):
    calm = train(tmp_path / "calm", zero=1)
    assert [line["step"] for line in calm] == list(range(1, 13)) and calm[-1]["loss"] < 0.5 * calm[0]["loss"]
    assert all(line["samples_per_s"] > 0 for line in calm)
    assert all(line["seconds"] > 0 and line["memory_gib"] > 0 and line["grad_norm"] > 0 for line in calm)
    assert all("tokens_per_s" not in line for line in calm)  # what it learns from has no tokens
    torn = train(tmp_path / "torn", zero=1, fail_once=str(tmp_path / "died"))
    assert (tmp_path / "died").exists()
    assert [line["loss"] for line in torn] == [line["loss"] for line in calm]


def test_one_worker_sees_what_two_see(ray_session, tmp_path):
    two = train(tmp_path / "two", zero=0, workers=2, batch=2)
    one = train(tmp_path / "one", zero=0, workers=1, batch=4)
    assert [line["loss"] for line in one] == pytest.approx([line["loss"] for line in two], rel=1e-4)


def test_metrics_are_cut_back_to_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    keep_lines(path, 2)
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
