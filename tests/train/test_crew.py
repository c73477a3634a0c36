"""A crew: the same processes job after job, and what becomes of a job that cannot be done."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from line_task import LineTask, line_job

from clinkd.config import ComputeSection
from clinkd.data.shards import DataError
from clinkd.train.crew import Crew, TrainingFailed, in_one_line


def job(out: Path, refused: bool = False, dies: bool = False) -> Any:
    """A job whose workers leave their process id in ``out``; or one that cannot be done."""

    def make_task() -> LineTask:
        import ray.train

        rank = ray.train.get_context().get_world_rank()
        if refused and rank == 1:
            raise DataError("record p7: its image cannot be decoded")
        if dies:
            raise RuntimeError("out of memory")
        (out / f"rank-{rank}").write_text(str(os.getpid()))
        return LineTask(2)

    return line_job(out, make_task, 1, 2, 2)


def processes(out: Path) -> list[str]:
    return [(out / f"rank-{rank}").read_text() for rank in (0, 1)]


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_workers_stay_and_outlive_a_job_that_the_data_ended(ray_session: None, tmp_path: Path) -> None:
    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with Crew(ComputeSection(workers=2, max_failures=1), tmp_path / "crew") as crew:
        for name in ("one", "two"):
            crew.fit(job(tmp_path / name))
        assert processes(tmp_path / "one") == processes(tmp_path / "two")
        assert len(losses(tmp_path / "one")) == 12 and losses(tmp_path / "one") == losses(tmp_path / "two")
        with pytest.raises(DataError, match="p7: its image cannot be decoded"):
            crew.fit(job(tmp_path / "refused", refused=True))
        crew.fit(job(tmp_path / "three"))  # by new processes, the others had waited for the one
        assert (tmp_path / "three" / "model" / "model.safetensors").is_file()


@pytest.mark.slow
def test_a_job_that_always_fails_ends_the_crew_with_its_error(ray_session: None, tmp_path: Path) -> None:
    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with Crew(ComputeSection(workers=2, max_failures=0), tmp_path / "crew") as crew:
        with pytest.raises(TrainingFailed) as error:
            crew.fit(job(tmp_path / "one", dies=True))
        said = str(error.value)
        assert re.match(
            r"line, worker [01]: RuntimeError: out of memory \(test_crew.py:\d+\); the same", said
        )
        assert "/logs on their node" in said and "\n" not in said
        crew.fit(job(tmp_path / "two"))  # the next job starts another
        assert (tmp_path / "two" / "model" / "model.safetensors").is_file()


def test_an_error_is_told_by_its_innermost_cause() -> None:
    try:
        try:
            {}["missing"]
        except KeyError as error:
            raise ValueError("two\nlines") from error
    except ValueError as error:
        assert re.fullmatch(r"KeyError: 'missing' \(test_crew.py:\d+\)", in_one_line(error))
    assert in_one_line(ValueError("\n  first line\nsecond")) == "ValueError: first line"
