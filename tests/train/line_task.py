"""A job that is small but real: least squares on a few numbers."""

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
    ``stop``: (step, file) that is touched in it. ``wrong``: the error that is raised in step 8.
    """

    def __init__(
        self, batch: int, fail_once: str | None = None, nan: tuple[int, ...] = (),
        stop: tuple[int, Path] | None = None, wrong: Exception | None = None,
    ) -> None:  # fmt: skip
        self.size, self.fail_once, self.nan, self.stop, self.wrong = batch, fail_once, nan, stop, wrong

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

    def feed(self, share, device):
        return LineFeed(self, share)

    def facts(self, step, total):
        return {}

    def batch(self, records, step):
        import os

        import torch

        if self.fail_once and step == 7 and not Path(self.fail_once).exists():
            Path(self.fail_once).touch()
            os._exit(9)  # as abrupt as kill -9
        if self.wrong is not None and step == 7:
            raise self.wrong
        if self.stop and step + 1 == self.stop[0]:
            self.stop[1].touch()
        x = torch.tensor([[record / 16] for record in records])
        y = 2 * x + 1 if step + 1 not in self.nan else x * float("nan")
        return {"x": x, "y": y}

    def save(self, state, out):
        from safetensors.torch import save_file

        out.mkdir(parents=True, exist_ok=True)
        save_file({key: value.clone() for key, value in state.items()}, out / "model.safetensors")


class LineFeed:
    """Records 0 .. 31, shuffled anew in each epoch, dealt to lanes by turns."""

    def __init__(self, task: LineTask, share: Any) -> None:
        self.task, self.share = task, share
        self.place, self.step, self.last = 0, share.step, []

    def state(self):
        return {}

    def names(self):
        return [str(record) for record in self.last]

    def __iter__(self):
        return self

    def __next__(self):
        import numpy as np

        share, size = self.share, self.task.size
        place = share.places[self.place]
        start = (self.step * share.lanes * share.accumulation + (place or 0)) * size
        epochs = {
            at // 32: np.random.default_rng([3, at // 32]).permutation(32) for at in (start, start + size)
        }
        self.last = [int(epochs[at // 32][at % 32]) for at in range(start, start + size)]
        batch = self.task.batch(self.last, self.step)
        self.place += 1
        if self.place == len(share.places):
            self.place, self.step = 0, self.step + 1
        return batch, size if place is not None else 0, size, place is not None


def line_job(
    out: Path, make_task: Callable[[], Any], zero: int, workers: int, batch: int,
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
    nan: tuple[int, ...] = (), stop: tuple[int, Path] | None = None, wrong: Exception | None = None,
    **more: Any,
) -> list[dict[str, Any]]:  # fmt: skip
    """Lines of the metrics; ``more``: of the job."""
    job = line_job(out, lambda: LineTask(batch, fail_once, nan, stop, wrong), zero, workers, batch, **more)
    crew(job.compute).fit(job)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
