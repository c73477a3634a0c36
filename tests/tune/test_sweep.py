"""Sweeps by the command line, on real Ray Tune, DeepSpeed and SQLite: killed, failing, cloned."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_run import CONFIG, SMALL, clinkd, here, lines, start

from clinkd.config import load_config
from clinkd.storage import sha256
from clinkd.tune.study import NoStudy, open_study, own_trials

pytestmark = pytest.mark.slow

SWEEP = {
    "run": {"name": "swept"},
    "sweep": {
        "trials": 5, "scheduler": "asha", "grace": 2, "reduction": 2, "questions": 24, "metric": "likelihood",
        "concurrent": 1,  # of several at one time, which one ASHA ends depends on who is first at a rung
        "space": {
            "distill.a": {"kind": "loguniform", "low": 0.1, "high": 2},
            "distill.optim.lr": {"kind": "loguniform", "low": 1e-4, "high": 1e-2},
            "rope.mode": {"kind": "choice", "values": ["none", "pair"]},
        },
    },
}  # fmt: skip
STEPS = ["distill.optim.steps=6", "compute.workers=1"]  # a second worker is a minute of starting
TWICE = "CLINKD_KILLS" in os.environ  # a second kill, between trials; two minutes more


def root(finished: Path, folder: Path) -> Path:
    """A folder whose store has what a sweep's trials share, but no student."""
    store = folder / "runs" / "artifacts"
    store.mkdir(parents=True)
    for path in (finished / "runs" / "artifacts").iterdir():
        if path.name.split("-")[0] in ("prepare", "guide", "teacher", "label") and path.is_dir():
            shutil.copytree(path, store / path.name)
    if (finished / "runs" / "teacher-cache").is_dir():
        shutil.copytree(finished / "runs" / "teacher-cache", folder / "runs" / "teacher-cache")
    return folder


def write(folder: Path, **changes: Any) -> str:
    values = {"base": str(CONFIG)} | SWEEP | {"sweep": SWEEP["sweep"] | changes}
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return str(path)


def study_of(folder: Path, path: str) -> Any:
    return open_study(load_config(path, [*SMALL, *STEPS, f"run.root={folder / 'runs'}"]), create=False)


def outcome(folder: Path, path: str) -> list[tuple[Any, ...]]:
    try:
        trials = own_trials(study_of(folder, path))
    except NoStudy:  # it is only beginning
        return []
    return [
        (trial.number, trial.state.name, trial.params, trial.intermediate_values, trial.values)
        for trial in trials
    ]


def kill_when(folder: Path, path: str, ready: Any) -> None:
    """Starts the sweep and ends all of its processes with SIGKILL as soon as ``ready`` says of its trials."""
    process = start(folder, "sweep", path, *SMALL, *STEPS)
    until = time.monotonic() + 600
    try:
        while time.monotonic() < until and process.poll() is None:
            time.sleep(0.3)
            if ready(outcome(folder, path)):
                return
        raise AssertionError("the sweep ended, or never came so far")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(3)  # Ray's processes see that their parents are gone


def test_killed_and_resumed_the_study_is_the_undisturbed_one(finished: Path, tmp_path: Path) -> None:
    whole, cut = root(finished, tmp_path / "whole"), root(finished, tmp_path / "cut")
    path = write(tmp_path)
    done = here(whole, "sweep", path, *SMALL, *STEPS)
    assert done.returncode == 0, done.stderr
    kill_when(cut, path, lambda found: any(state == "RUNNING" and rungs for _, state, _, rungs, _ in found))
    if TWICE:
        kill_when(cut, path, lambda found: sum(each[1] in ("COMPLETE", "PRUNED") for each in found) >= 2)
    again = clinkd(cut, "sweep", path, *SMALL, *STEPS)
    assert again.returncode == 0, again.stderr
    assert outcome(cut, path) == outcome(whole, path)
    assert len({tuple(values) for *_, values in outcome(whole, path) if values}) > 1
    best = [(place / "runs" / "swept" / "best.yaml").read_text() for place in (whole, cut)]
    assert best[0] == best[1]
    assert students(cut) == students(whole) != {}
    assert labels(whole) == labels(finished)  # nothing was asked anew
    check_what_it_leaves(whole, done.stdout)


def students(folder: Path) -> dict[str, str]:
    """Digests of the trained weights, by artifact: bit for bit the same however often they were cut off."""
    found = (folder / "runs" / "artifacts").glob("distill-*/model/model.safetensors")
    return {path.parent.parent.name: sha256(path) for path in found}


def labels(folder: Path) -> set[str]:
    return {path.name for path in (folder / "runs" / "artifacts").glob("label-*") if path.is_dir()}


def check_what_it_leaves(folder: Path, said: str) -> None:
    run = folder / "runs" / "swept"
    facts = json.loads((run / "sweep.json").read_text())
    assert len(facts["trials"]) == 5 and facts["teacher_passes"] == 1
    assert "the teacher was asked once" in said and "min saved" in said
    ended = [row for row in facts["trials"] if row["state"] == "complete"]
    left = [path for path in (folder / "runs" / "artifacts").glob("distill-*") if path.is_dir()]
    assert len(left) == len(ended)  # what ended early left nothing
    pruned = [row for row in facts["trials"] if row["state"] == "pruned"]
    assert facts["steps_not_taken"] == sum(6 - row["step"] for row in pruned)
    page = (run / "sweep.html").read_text()
    assert "Parallel coordinates" in page and "://" not in page
    events = list((run / "sweep" / "tensorboard").rglob("events.*"))
    assert len(events) == 5


def test_a_trial_that_fails_is_marked_and_the_sweep_goes_on(finished: Path, tmp_path: Path) -> None:
    """Its DeepSpeed file is not there, which the workers find out."""
    folder = root(finished, tmp_path)
    space = {
        "distill.a": {"kind": "choice", "values": [0.5, 0.7]},
        "compute.deepspeed": {"kind": "choice", "values": ["missing.json"], "when": {"distill.a": 0.7}},
    }
    path = write(folder, space=space, sampler="random", scheduler="none", trials=2, retries=0)
    done = clinkd(folder, "sweep", path, *SMALL, *STEPS, "compute.max_failures=0")
    assert done.returncode == 0, done.stderr
    rows = json.loads((folder / "runs" / "swept" / "sweep.json").read_text())["trials"]
    states = {row["values"]["distill.a"]: row["state"] for row in rows}
    assert states == {0.5: "complete", 0.7: "fail"}
    assert "fail" in done.stdout


@pytest.mark.skipif(
    "CLINKD_CLONES" not in os.environ, reason="a population trains side by side: minutes; CLINKD_CLONES=1"
)
@pytest.mark.full
def test_a_clone_goes_on_from_exactly_the_others_weights_and_a_kill_changes_no_population(
    finished: Path, tmp_path: Path
) -> None:
    folder, cut = root(finished, tmp_path / "whole"), root(finished, tmp_path / "cut")
    space = {"distill.optim.lr": {"kind": "loguniform", "low": 1e-5, "high": 1e-2}}
    path = write(tmp_path, space=space, sampler="random", scheduler="pbt", grace=2, trials=2)
    done = clinkd(folder, "sweep", path, *SMALL, *STEPS)
    assert done.returncode == 0, done.stderr
    check_clones(folder, done.stdout)
    # Once where all have been cloned or gone on, once near the end, where one of them may have ended.
    kill_when(cut, path, lambda found: sum(4 in each[3] for each in found) == 1)
    kill_when(cut, path, lambda found: sum(6 in each[3] for each in found) == 1)
    again = clinkd(cut, "sweep", path, *SMALL, *STEPS)
    assert again.returncode == 0, again.stderr
    assert outcome(cut, path) == outcome(folder, path)
    notes = [lines(place / "runs" / "swept" / "sweep" / "clones.jsonl") for place in (folder, cut)]
    assert sorted(notes[0], key=str) == sorted(notes[1], key=str)
    assert students(cut) == students(folder) != {}
    for place in (folder, cut):  # nothing that only resuming needs
        assert not list((place / "runs" / "artifacts").glob("distill-*.partial"))


def check_clones(folder: Path, said: str) -> None:
    clones = lines(folder / "runs" / "swept" / "sweep" / "clones.jsonl")
    assert clones, "nothing was cloned"
    for clone in clones:
        assert clone["trial"] != clone["from"]
        assert clone["weights"] == clone["source"] and len(clone["weights"]) == 64
        # Its learning rate is its own: the curve's factor times what the clone was given.
        assert clone["first_step"] == clone["step"] + 1
        rate = clone["values"]["distill.optim.lr"]
        assert clone["first_lr"] / rate == pytest.approx(cosine(clone["step"] + 1, 6), rel=1e-6)
    rows = json.loads((folder / "runs" / "swept" / "sweep.json").read_text())["trials"]
    drawn = {row["values"]["distill.optim.lr"] for row in rows}
    assert not drawn & {clone["values"]["distill.optim.lr"] for clone in clones}  # perturbed
    best = rows[0]  # no configuration made it, but it is there, and what made it
    assert (Path(best["model"]) / "model.safetensors").is_file() and "its student lies in" in said
    assert best["settings"][0]["from"] == 0 and all(row["settings"] for row in rows)
    assert any(len(row["settings"]) > 1 for row in rows)


def cosine(step: int, total: int) -> float:
    from clinkd.config import OptimSection
    from clinkd.train.engine import learning_rate

    return learning_rate(step, total, OptimSection())


@pytest.mark.parametrize(
    ("changes", "overrides", "said"),
    [
        ({"space": {"distill.aa": {"kind": "uniform", "low": 0, "high": 1}}}, [], "did you mean a"),
        ({}, ["compute.gpus_per_worker=1"], "GPU"),
        ({}, ["compute.workers=64"], "64 workers"),
        ({"space": {"distill.a": {"kind": "uniform", "low": 2, "high": 1}}}, [], "low < high"),
        ({}, ["data.validation_fraction=0"], "a sweep chooses by the validation split"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(
    tmp_path: Path, changes: dict[str, Any], overrides: list[str], said: str
) -> None:
    done = here(tmp_path, "sweep", write(tmp_path, **changes), *SMALL, *STEPS, *overrides)
    assert done.returncode == 2 and said in done.stderr
    assert not list(tmp_path.glob("runs/artifacts/*-*"))  # no stage was made
