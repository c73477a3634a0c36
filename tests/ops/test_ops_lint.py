"""Warnings: each says what is wrong and what to do, and keeps quiet otherwise."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from clinkd.config import RunConfig, with_values
from clinkd.ops import lint
from clinkd.ops.lint import Cluster


def config(**changes: object) -> RunConfig:
    return with_values(RunConfig(), {key.replace("__", "."): value for key, value in changes.items()})


SPACE = {"distill.a": {"kind": "uniform", "low": 0.1, "high": 0.9}}


def test_ranks_without_images_of_their_own() -> None:
    assert list(lint.starving("teacher", 16, 16)) == []
    (line,) = lint.starving("teacher", 15, 16)
    assert "16 images" in line and "lower compute.workers" in line


def test_workers_that_would_wait_for_ever() -> None:
    (line,) = lint.placement(config(compute__workers=4, compute__cpus_per_worker=2), Cluster(cpus=7))
    assert "want 8" in line and "lower compute.workers to 3" in line
    assert list(lint.placement(config(compute__workers=4), Cluster(cpus=4))) == []
    assert list(lint.placement(config(compute__workers=400), Cluster())) == []  # nobody knows the cluster


def test_gpus_are_looked_at_like_cpus() -> None:
    wants = config(compute__workers=8, compute__gpus_per_worker=1)
    (line,) = lint.placement(wants, Cluster(cpus=64, gpus=4))
    assert "8 workers of 1 GPU" in line and "to 4" in line


def test_trials_that_do_not_fit_beside_each_other() -> None:
    sweeps = config(sweep__space=SPACE, sweep__trials=8, sweep__concurrent=3, compute__workers=2)
    (line,) = lint.placement(sweeps, Cluster(cpus=4))
    assert "3 trials of 2 CPUs want 6" in line and "lower sweep.concurrent to 2" in line
    assert list(lint.placement(sweeps, Cluster(cpus=6))) == []


def test_a_population_has_to_fit_whole() -> None:
    sweeps = config(sweep__space=SPACE, sweep__trials=4, sweep__scheduler="pbt", compute__workers=2)
    (line,) = lint.placement(sweeps, Cluster(cpus=6))
    assert "population of 4" in line and "lower sweep.trials to 3" in line


def test_a_working_dir_that_ray_would_refuse(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "big.bin").write_bytes(b"x" * 3_000_000)
    (tmp_path / "code.py").write_text("pass")
    for folder in (".git", "__pycache__"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "pack").write_bytes(b"x" * 9_000_000)
    (line,) = lint.working_dir(tmp_path, most=2_000_000)
    assert "holds 3 MiB" in line and "data 3" in line
    assert list(lint.working_dir(tmp_path, most=4_000_000)) == []


def test_what_git_ignores_is_not_sent(tmp_path: Path) -> None:
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / ".gitignore").write_text("runs/\n")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "big.bin").write_bytes(b"x" * 3_000_000)
    assert list(lint.working_dir(tmp_path, most=1_000_000)) == []
    (tmp_path / "größe.bin").write_bytes(b"x" * 3_000_000)
    assert "größe.bin 3" in next(lint.working_dir(tmp_path, most=1_000_000))


def test_checkpoints_further_apart_than_failures() -> None:
    (line,) = lint.checkpoints("distill", every=1000, step_seconds=10, mtbf_hours=2, best=600)
    assert "every 2.8 h" in line and "fails every 2.0 h" in line and "set it to 60" in line
    assert list(lint.checkpoints("distill", every=100, step_seconds=10, mtbf_hours=2, best=600)) == []


def test_checkpoints_that_take_most_of_the_time() -> None:
    (line,) = lint.writing("distill", every=100, step_seconds=1, write_seconds=60, best=3600, steps=9000)
    assert "trains for 100 s and then writes for 60 s" in line and "set it to 3,600" in line
    short = next(lint.writing("distill", every=100, step_seconds=1, write_seconds=60, best=3600, steps=500))
    assert "set it to 500," in short  # at its end it is whole anyway
    assert (
        list(lint.writing("distill", every=1000, step_seconds=1, write_seconds=60, best=3600, steps=9000))
        == []
    )
    assert (
        list(lint.writing("distill", every=100, step_seconds=1, write_seconds=60, best=50, steps=9000)) == []
    )


def test_what_does_not_fit_says_what_would() -> None:
    (line,) = lint.memory("distill", 100e9, 80e9, "ZeRO-2 fits: set compute.zero_stage=2")
    assert "100.0 GB" in line and "set compute.zero_stage=2" in line
    assert "model.lora.rank" in next(lint.memory("distill", 100e9, 80e9, None))
    assert list(lint.memory("distill", 80e9, 80e9, None)) == []


@pytest.mark.parametrize(
    ("changes", "key"),
    [({"model__dtype": "bfloat16"}, "model.dtype"), ({"compute__gpus_per_worker": 1}, "compute.precision")],
)
def test_types_that_are_refused_or_wasted(changes: dict, key: str) -> None:
    assert [line.partition(":")[0] for line in lint.precision(config(**changes))] == [key]
    assert list(lint.precision(config(**changes, compute__precision="bf16"))) == []
