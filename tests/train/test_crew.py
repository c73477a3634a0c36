"""A crew: the same processes job after job, and what becomes of a job that cannot be done."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from line_task import LineTask, line_job

from clinkd.config import ComputeSection
from clinkd.data.shards import DataError
from clinkd.train.crew import Crew

pytestmark = pytest.mark.slow


def job(out: Path, refused: bool = False, dies: bool = False) -> Any:
    """A job whose workers leave their process id in ``out``; or one that cannot be done."""

    def make_task(rows: Any, scratch: Path) -> LineTask:
        import ray.train

        rank = ray.train.get_context().get_world_rank()
        if refused and rank == 1:
            raise DataError("record p7: its image cannot be decoded")
        if dies:
            raise RuntimeError("out of memory")
        (out / f"rank-{rank}").write_text(str(os.getpid()))
        return LineTask(rows, scratch)

    return line_job(out, make_task, 1, 2, 2)


def processes(out: Path) -> list[str]:
    return [(out / f"rank-{rank}").read_text() for rank in (0, 1)]


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def test_workers_stay_and_outlive_a_job_that_the_data_ended(ray_session: None, tmp_path: Path) -> None:
    import ray.cloudpickle
    import ray.data

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    rows = ray.data.range(32)
    with Crew(ComputeSection(workers=2, max_failures=1), tmp_path / "crew") as crew:
        for name in ("one", "two"):
            crew.fit(job(tmp_path / name), rows)
        assert processes(tmp_path / "one") == processes(tmp_path / "two")
        assert len(losses(tmp_path / "one")) == 12 and losses(tmp_path / "one") == losses(tmp_path / "two")
        with pytest.raises(DataError, match="p7: its image cannot be decoded"):
            crew.fit(job(tmp_path / "refused", refused=True), rows)
        crew.fit(job(tmp_path / "three"), rows)  # by new processes, the others had waited for the one
        assert (tmp_path / "three" / "model" / "model.safetensors").is_file()


def test_a_job_that_always_fails_ends_the_crew_with_its_error(ray_session: None, tmp_path: Path) -> None:
    import ray.cloudpickle
    import ray.data
    from ray.train import TrainingFailedError

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with Crew(ComputeSection(workers=2, max_failures=0), tmp_path / "crew") as crew:
        with pytest.raises(TrainingFailedError, match="out of memory"):
            crew.fit(job(tmp_path / "one", dies=True), ray.data.range(32))
        crew.fit(job(tmp_path / "two"), ray.data.range(32))  # the next job starts another
        assert (tmp_path / "two" / "model" / "model.safetensors").is_file()
