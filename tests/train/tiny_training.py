"""A stage on two Ray Train workers, on prepared phantoms with scores of a guide that was made up."""

from __future__ import annotations

import abc
import json
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import ending
from feeding import answers, source

from clinkd.config import ComputeSection, OptimSection
from clinkd.train.crew import Crew


def made_up_scores(prepared: Path, out: Path) -> str:
    """Alignment and relevance of every sample, on a guide's grid of 3 x 4."""
    from clinkd.data.scores import FILE, write_scores
    from clinkd.data.shards import samples

    names = [item["sample"] for item in samples(prepared)]
    maps = [[(37 * number + 20 * cell) % 256 for cell in range(12)] for number in range(len(names))]
    alignment = [number % 11 / 10 for number in range(len(names))]
    write_scores(out, names, alignment, maps, [[3]] * len(names), [[4]] * len(names))
    return str(out / FILE)


class Fed(abc.ABC):
    """Of a test's own maker of tasks that brings its own maker of batches."""

    @abc.abstractmethod
    def batches(self, spec: Any) -> Any:
        """What makes a batch of records."""


_crew: Crew | None = None


def crew(compute: ComputeSection) -> Crew:
    """Workers that the tests of a session share, as long as they ask for as many; they end before its Ray."""
    global _crew
    if _crew is None or _crew.compute.workers != compute.workers:
        if _crew is None:
            ending.before_ray.append(dismiss)
        dismiss()
        patient = compute.model_copy(update={"max_failures": 100})  # tests let workers die on purpose
        _crew = Crew(patient, Path(tempfile.mkdtemp(prefix="crew")))
    return _crew


def dismiss() -> None:
    if _crew is not None:
        _crew.close()


def train(prepared: Path, out: Path, spec: Any, **how: Any) -> list[dict[str, Any]]:
    """Lines of the metrics; the model lies in ``out / "model"``. ``how``: see ``job_of``."""
    return train_each(prepared, {"one": (out, spec, how)})["one"]


def train_each(
    prepared: Path, ways: dict[str, tuple[Path, Any, dict[str, Any]]]
) -> dict[str, list[dict[str, Any]]]:
    """One training after the other, each (out, spec, how)."""
    jobs = [job_of(prepared, *way) for way in ways.values()]
    for job in jobs:
        crew(job.compute).fit(job)
    return {
        name: [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        for name, (out, _, _) in ways.items()
    }


def job_of(prepared: Path, out: Path, spec: Any, how: dict[str, Any]) -> Any:
    """``how``: zero, steps, until; precision, checkpoint_every, compute (more of that section); optim: more
    of that section; feed: more of ``SamplerOptions``; task: makes another than SupervisedTask of (spec,
    source, zero), and as a ``Fed`` what makes its batches."""
    import ray.cloudpickle

    from clinkd.data.sampler import SamplerOptions
    from clinkd.train.loop import TrainJob
    from clinkd.train.tasks import SupervisedTask

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # for workers, who cannot import it
    out.mkdir(exist_ok=True)
    kind, zero = how.get("task") or SupervisedTask, how["zero"]
    compute = {key: how[key] for key in ("precision", "checkpoint_every") if key in how}
    optim = OptimSection(**{"batch_size": 2, "questions_per_image": 3, "lr": 5e-3} | how.get("optim", {}))
    options = SamplerOptions(0, optim.batch_size, optim.questions_per_image, **how.get("feed", {}))
    plain = answers(spec, packed=options.tokens is not None)
    maker = kind.batches(spec) if isinstance(kind, Fed) else plain
    fed = source(prepared, out, maker, options)
    return TrainJob(
        stage="teacher",
        make_task=partial(kind, spec, fed, zero),
        optim=optim,
        compute=ComputeSection(**{"workers": 2, "checkpoint_every": 100} | compute | how.get("compute", {})),
        zero_stage=zero,
        steps=how["steps"],
        seed=0,
        out=str(out),
        work=str(out / "work"),
        until=how.get("until"),
    )
