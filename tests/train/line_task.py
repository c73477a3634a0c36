"""A job that is small but real: least squares on numbers that Ray Data brings."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tiny_training import crew

from clinkd.config import ComputeSection, OptimSection
from clinkd.train.loop import TrainJob


class LineTask:
    """A real model, engine and optimiser.

    ``fail_once``: a file, without which a worker ends in step 8. ``nan``: steps whose targets are no numbers.
    ``stop``: (step, file) that is touched in it.
    """

    def __init__(
        self, rows: Any, scratch: Path, fail_once: str | None = None, nan: tuple[int, ...] = (),
        stop: tuple[int, Path] | None = None,
    ) -> None:  # fmt: skip
        import numpy as np

        values = np.concatenate([batch["id"] for batch in rows.iter_batches(batch_size=None)])
        self.values = np.sort(values).astype("float32")
        self.fail_once, self.nan, self.stop = fail_once, nan, stop

    def build(self):
        import torch

        class Line(torch.nn.Module):
            def __init__(self):
                super().__init__()
                nn = torch.nn
                self.layers = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))

            def forward(self, x, y):
                error = (self.layers(x) - y).square().sum()
                return {"loss": error, "error": error, "x": x.sum()}

        return Line()

    def turn_counts(self):
        return [1] * len(self.values)

    def names(self, groups):
        return [str(record) for record, _ in groups]

    def batch(self, groups, step, total):
        import os

        import torch

        if self.fail_once and step == 7 and not Path(self.fail_once).exists():
            Path(self.fail_once).touch()
            os._exit(9)  # as abrupt as kill -9
        if self.stop and step + 1 == self.stop[0]:
            self.stop[1].touch()
        x = torch.tensor([[self.values[record] / 16] for record, _ in groups])
        y = 2 * x + 1 if step + 1 not in self.nan else x * float("nan")
        return {"x": x, "y": y}, len(groups)

    def save(self, state, out):
        from safetensors.torch import save_file

        out.mkdir(parents=True, exist_ok=True)
        save_file({key: value.clone() for key, value in state.items()}, out / "model.safetensors")


def line_job(
    out: Path, make_task: Callable[[Any, Path], Any], zero: int, workers: int, batch: int,
    muon_lr: float | None = None, **more: Any,
) -> TrainJob:  # fmt: skip
    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module
    out.mkdir(parents=True, exist_ok=True)
    return TrainJob(
        stage="line", make_task=make_task, optim=OptimSection(batch_size=batch, lr=0.05, muon_lr=muon_lr),
        compute=ComputeSection(workers=workers, checkpoint_every=5), zero_stage=zero, steps=12, seed=3,
        out=str(out), work=str(out / "work"), **more,
    )  # fmt: skip


def train_line(
    out: Path, *, zero: int = 0, workers: int = 2, batch: int = 2, fail_once: str | None = None,
    nan: tuple[int, ...] = (), stop: tuple[int, Path] | None = None, **more: Any,
) -> list[dict[str, Any]]:  # fmt: skip
    """Lines of the metrics; ``more``: of the job."""
    import ray.data

    job = line_job(
        out, lambda rows, scratch: LineTask(rows, scratch, fail_once, nan, stop), zero, workers, batch, **more
    )
    crew(job.compute).fit(job, ray.data.range(32))
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
