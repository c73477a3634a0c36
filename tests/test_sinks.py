"""Sinks: the numbers of a run in TensorBoard, MLflow and Weights & Biases; the real ones, on this disk."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from clinkd.config import RunConfig
from clinkd.progress import Progress
from clinkd.sinks import FILE, check_sinks, open_sinks


def config(**sinks: Any) -> RunConfig:
    return RunConfig.model_validate({"run": {"name": "mine"}, "sinks": sinks})


def fed(config: RunConfig, folder: Path, said: list[str] | None = None) -> None:
    """What a run with a teacher, a round of reflection and an evaluation writes."""
    folder.mkdir(exist_ok=True)
    with Progress(folder / "metrics.jsonl") as progress:
        say = progress.say if said is None else said.append
        with open_sinks(config, folder, say) as sinks:
            progress.also = sinks.line
            progress.start("teacher", 3)
            for step in (1, 2, 3):
                progress.update(step, loss=1 / step, samples_per_s=8.0)
            progress.show({"stage": "distill", "step": 7, "total": 9, "loss": 0.25}, record=False)
            progress.record(stage="reflect", event="round", round=2, wrong={"low_iou": 5}, note="p7.png")
            progress.record(stage="evaluate", event="test", vg={"recall_at_50": 0.6}, ok=True, none=None)


EXPECTED = {
    "teacher/loss": [(1, 1.0), (2, 0.5), (3, 1 / 3)],
    "teacher/samples_per_s": [(1, 8.0), (2, 8.0), (3, 8.0)],
    "distill/loss": [(7, 0.25)],
    "reflect/round/wrong/low_iou": [(2, 5.0)],
    "evaluate/test/vg/recall_at_50": [(0, 0.6)],
}


def test_tensorboard_shows_every_number_and_no_text(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    fed(config(tensorboard=True), tmp_path / "mine")
    events = EventAccumulator(str(tmp_path / "mine" / "tensorboard"))
    events.Reload()
    found = {
        tag: [(event.step, pytest.approx(event.value)) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }
    assert found == EXPECTED
    files = (tmp_path / "mine" / "tensorboard").iterdir()
    assert b"p7.png" not in b"".join(path.read_bytes() for path in files)


def client(folder: Path) -> Any:
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=folder.as_uri())


def test_mlflow_keeps_settings_and_numbers_and_a_run_that_goes_on_is_one_run(tmp_path: Path) -> None:
    wanted = config(mlflow=str(tmp_path / "mlruns"))
    fed(wanted, tmp_path / "mine")
    server = client(tmp_path / "mlruns")
    experiment = server.get_experiment_by_name("clinkd").experiment_id
    (run,) = server.search_runs([experiment])
    assert run.info.run_name == "mine" and run.info.status == "FINISHED"
    assert run.data.params["distill.a"] == str(wanted.distill.a) and "sinks.mlflow" not in run.data.params
    found = {
        name: [(item.step, item.value) for item in server.get_metric_history(run.info.run_id, name)]
        for name in run.data.metrics
    }
    assert {name: sorted(values) for name, values in found.items()} == EXPECTED

    fed(wanted, tmp_path / "mine")
    assert [again.info.run_id for again in server.search_runs([experiment])] == [run.info.run_id]
    other = RunConfig.model_validate(wanted.model_dump() | {"distill": {"a": 0.9}})
    fed(other, tmp_path / "mine")
    assert len(server.search_runs([experiment])) == 2  # other settings are another run


def test_a_run_that_fails_is_marked_as_failed(tmp_path: Path) -> None:
    with (
        pytest.raises(RuntimeError, match="out of memory"),
        open_sinks(config(mlflow=str(tmp_path / "mlruns")), tmp_path, print),
    ):
        raise RuntimeError("out of memory")
    server = client(tmp_path / "mlruns")
    (run,) = server.search_runs([server.get_experiment_by_name("clinkd").experiment_id])
    assert run.info.status == "FAILED"


def test_wandb_offline_keeps_the_run_on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    wanted = config(wandb="lab")
    said: list[str] = []
    fed(wanted, tmp_path / "mine", said)
    assert not said
    identity = json.loads((tmp_path / "mine" / FILE).read_text())["wandb"]
    (file,) = (tmp_path / "mine" / "wandb").glob(f"offline-run-*/run-{identity}.wandb")
    deadline = time.monotonic() + 60  # W&B's own process writes; it may lag behind on a busy machine
    while b"teacher/loss" not in (kept := file.read_bytes()) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert b"teacher/loss" in kept and b"p7.png" not in kept


def test_a_sink_that_fails_is_left_out_and_the_others_go_on(tmp_path: Path) -> None:
    said: list[str] = []
    wanted = config(mlflow=str(tmp_path / "mlruns"), tensorboard=True)
    with open_sinks(wanted, tmp_path, said.append) as sinks:
        shutil.rmtree(tmp_path / "mlruns")
        (tmp_path / "mlruns").write_text("no folder any more")
    assert len(said) == 1 and said[0].startswith("sinks.mlflow: ") and "left out" in said[0]
    assert list(tmp_path.glob("tensorboard/events*"))

    said.clear()
    with open_sinks(wanted, tmp_path, said.append) as sinks:
        sinks.line({"stage": "teacher", "step": 1, "loss": 1.0})
    assert len(said) == 1 and "goes on without it" in said[0]


def test_a_package_that_is_missing_is_said_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    from clinkd.config import ConfigError

    monkeypatch.setattr("clinkd.sinks.find_spec", lambda name: None)
    check_sinks(config())
    with pytest.raises(ConfigError, match=r"sinks\.wandb: wandb is not installed; pip install 'clinkd\[wand"):
        check_sinks(config(wandb="lab"))
