"""kill -9 of a worker, the driver or the raylet at random moments of a whole run; the same command each time.

Half of the moments are of time, half are steps of a stage that trains.

Long, so it runs where CLINKD_FAULTS says how many moments: CLINKD_FAULTS=10 pytest tests/faults
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from attempts import Attempts, jobs, samples_once_an_epoch
from small_run import CONFIG, SMALL, clinkd, lines, start

from clinkd.storage import sha256
from clinkd.train.account import dealt

pytestmark = pytest.mark.slow
MOMENTS = int(os.environ.get("CLINKD_FAULTS", "0"))
EACH = 8  # of one run
EVERY = 4  # steps between checkpoints
TRAINED = {"guide": 4, "teacher": 24, "distill": 24, "reflect": 24}
LONGEST = 240  # seconds to wait for a step
LONGER = ["sft.steps=24", "distill.optim.steps=24", "reflect.optim.steps=24"]
LONGER += [f"compute.checkpoint_every={EVERY}", "watch.samples=true"]
ARGUMENTS = ("run", str(CONFIG), *SMALL, *LONGER)


def victims(driver: int, kind: str) -> list[psutil.Process]:
    """Processes of this run alone: found among its driver's descendants."""
    if kind == "driver":
        return [psutil.Process(driver)]
    wanted = {"worker": "RayTrainWorker", "raylet": "raylet"}[kind]
    found = []
    for process in psutil.Process(driver).children(recursive=True):
        try:
            title = " ".join(process.cmdline()[:1])
        except psutil.Error:
            continue
        if wanted in title:
            found.append(process)
    return found


def kill_one(process: subprocess.Popen[bytes], kind: str, chance: random.Random) -> bool:
    """Ends one process of that kind with SIGKILL; the whole command goes where it cannot live without it."""
    try:
        found = victims(process.pid, kind)
    except psutil.Error:
        return False
    if not found:
        return False
    chance.choice(found).kill()
    if kind != "worker":
        time.sleep(2)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(3)  # Ray's processes see that their parents are gone
    return True


@pytest.mark.skipif(not MOMENTS, reason="CLINKD_FAULTS=N kills N times; some minutes each ten")
@pytest.mark.full
def test_the_same_command_comes_to_the_same_run(tmp_path: Path) -> None:
    calm = tmp_path / "calm"
    calm.mkdir()
    whole = clinkd(calm, *ARGUMENTS)
    assert whole.returncode == 0, whole.stderr
    chance = random.Random(int(os.environ.get("CLINKD_FAULTS_SEED", "0")))
    killed: list[str] = []
    while len(killed) < MOMENTS:
        torn = tmp_path / f"torn-{len(killed)}"
        torn.mkdir()
        attempts = Attempts(torn / "runs" / "artifacts", calm / "runs" / "artifacts", EVERY)
        killed += disturbed(torn, min(EACH, MOMENTS - len(killed)), chance, attempts)
        last = clinkd(torn, *ARGUMENTS)
        assert last.returncode == 0, last.stderr
        attempts.ended()
        check_same(calm / "runs", torn / "runs")
    print("", *killed, f"{len(killed)} killed", sep="\n")


def moment(attempts: Attempts, chance: random.Random) -> Callable[[], bool]:
    """Whether it is time to kill: after some seconds, mostly while something starts, or in a step."""
    begun = time.monotonic()
    stages = [stage for stage in TRAINED if not attempts.finished(stage)]
    if not stages or chance.random() < 0.5:
        seconds = chance.uniform(4, 75)
        return lambda: time.monotonic() > begun + seconds
    stage, now = chance.choice(stages), time.time()
    step = chance.randint(1, TRAINED[stage] - 1)
    return lambda: attempts.reached(stage, now) >= step or time.monotonic() > begun + LONGEST


def disturbed(folder: Path, moments: int, chance: random.Random, attempts: Attempts) -> list[str]:
    """Runs the command again and again, killing so many times; says of each what it was."""
    done: list[str] = []
    process = start(folder, *ARGUMENTS)
    try:
        while len(done) < moments:
            come = moment(attempts, chance)
            while process.poll() is None and not come():
                time.sleep(0.05)
            if process.poll() == 0:
                return done
            kind, where = chance.choice(["worker", "driver", "raylet"]), stage(folder)
            if process.poll() is None and kill_one(process, kind, chance):
                done.append(f"{kind} in {where}: {attempts.killed()}")
            if process.poll() is not None:
                process = start(folder, *ARGUMENTS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            time.sleep(3)
    return done


def stage(folder: Path) -> str:
    """What is being made."""
    partial = (folder / "runs" / "artifacts").glob("*.partial")
    return ", ".join(sorted(path.name.split("-")[0] for path in partial)) or "between stages"


def check_same(calm: Path, torn: Path) -> None:
    """Weights bit for bit, curves, ledger and answers of every stage."""
    names = {path.name for path in (calm / "artifacts").iterdir() if path.is_dir()}
    assert names == {
        path.name for path in (torn / "artifacts").iterdir() if path.is_dir() and path.suffix != ".partial"
    }
    for name in sorted(names):
        ours, theirs = torn / "artifacts" / name, calm / "artifacts" / name
        for model in theirs.rglob("model.safetensors"):
            assert sha256(ours / model.relative_to(theirs)) == sha256(model), (name, model.name)
        for metrics in theirs.rglob("metrics.jsonl"):
            wanted, found = lines(metrics), lines(ours / metrics.relative_to(theirs))
            assert [line["step"] for line in found] == list(range(1, len(wanted) + 1)), name
            assert [line.get("loss") for line in found] == [line.get("loss") for line in wanted], name
    trained = jobs(calm / "artifacts")
    assert len(trained) >= 4  # the guide, the teacher, distillation, reflection
    for job in trained:
        found = dealt(torn / "artifacts" / job)
        assert found == dealt(calm / "artifacts" / job), job
        samples_once_an_epoch(found)
    assert lines(torn / "tiny" / "predictions.jsonl") == lines(calm / "tiny" / "predictions.jsonl")
