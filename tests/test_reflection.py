"""The stage reflect as a command: kill -9 in every phase of a round, and what a finished one leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file
from small_run import CONFIG, SMALL, clinkd, lines, start

from clinkd.distill.teacher_cache import teacher_key

pytestmark = pytest.mark.slow
COMMAND = ("train", "reflect", str(CONFIG), *SMALL)
PHASES = [  # of a round: what is there when it is under way
    "round-1/answers/part-00000.jsonl",
    "round-1/candidates/part-00000.jsonl",
    "work/reflect-1/step-*",
    "round-1/after/part-00000.jsonl",
]
if "CLINKD_KILLS" not in os.environ:  # a minute each
    PHASES = PHASES[1:3]


def reflected(folder: Path, before: set[Path]) -> Path:
    """The stage's artifact that was made since."""
    new = set(artifacts(folder)) - before
    (made,) = (path for path in new if path.is_dir() and "partial" not in path.name)
    return made


def artifacts(folder: Path) -> list[Path]:
    return list((folder / "runs" / "artifacts").glob("reflect-*"))


def killed_in(folder: Path, phase: str) -> dict[str, int]:
    """Starts the command and kills it, with all it started, as soon as the phase is there.

    Returns:
        When each part that was there then had been written, by its name.
    """
    process = start(folder, *COMMAND)
    wait_for(folder, phase, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return {
        str(path.relative_to(partial)): path.stat().st_mtime_ns
        for partial in (folder / "runs" / "artifacts").glob("reflect-*.partial")
        for path in partial.rglob("part-*.jsonl")
    }


def wait_for(folder: Path, pattern: str, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 900
    while time.monotonic() < deadline and process.poll() is None:
        if any((folder / "runs" / "artifacts").glob(f"reflect-*.partial/{pattern}")):
            return
        time.sleep(0.02)
    raise AssertionError(f"{pattern} never came (exit code {process.poll()})")


def test_killed_in_a_phase_it_goes_on_and_comes_out_the_same(finished: Path, tmp_path: Path) -> None:
    (quiet,) = (path for path in artifacts(finished) if path.is_dir())
    skipped = shutil.ignore_patterns("reflect-*", "evaluate-*", "tiny")
    shutil.copytree(finished / "runs", tmp_path / "runs", ignore=skipped)
    written: dict[str, int] = {}
    for phase in PHASES:
        found = killed_in(tmp_path, phase)
        assert written.items() <= found.items()  # what was there was not written again
        written = found
    assert any("answers" in name for name in written) and any("candidates" in name for name in written)
    done = clinkd(tmp_path, *COMMAND)
    assert done.returncode == 0, done.stderr

    disturbed = tmp_path / "runs" / "artifacts" / quiet.name
    for name, when in written.items():
        assert (disturbed / name).stat().st_mtime_ns == when
    parts = sorted(path.relative_to(quiet) for path in quiet.rglob("part-*.jsonl"))
    assert parts == sorted(path.relative_to(disturbed) for path in disturbed.rglob("part-*.jsonl"))
    assert len({path.parent for path in parts}) == 5  # answers, candidates, after, validation twice
    for part in parts:
        assert (disturbed / part).read_bytes() == (quiet / part).read_bytes(), part
    name = "round-1/feedback.parquet"
    assert pq.read_table(disturbed / name).equals(pq.read_table(quiet / name))
    assert [row["step"] for row in lines(disturbed / "round-1/metrics.jsonl")] == list(range(1, 5))
    ours, theirs = (load_file(path / "model" / "model.safetensors") for path in (disturbed, quiet))
    assert all(ours[key].equal(theirs[key]) for key in theirs) and ours.keys() == theirs.keys()


def test_a_finished_round_accounts_for_every_answer(finished: Path) -> None:
    (folder,) = (path for path in artifacts(finished) if path.is_dir())
    account = json.loads((folder / "rounds.json").read_text())
    (facts,) = account["rounds"]
    for part in (account["before"], facts["before"], facts["after"], facts["validation"]):
        assert part["answered"] > 0 and sum(part["reasons"].values()) == part["wrong"]
        for group in ("by_task", "by_modality"):
            assert sum(each["answered"] for each in part[group].values()) == part["answered"]
    was, now = facts["before"], facts["after"]
    assert was["wrong"] - now["fixed"] + now["broke"] == now["wrong"]
    feedback = pq.read_table(folder / "round-1/feedback.parquet").to_pylist()
    assert len(feedback) == facts["corrected"] <= 4
    assert all(len(row["candidates"]) == 2 and row["corrector_hash"] for row in feedback)
    assert facts["generated"]["corrector"] == 2 * len(feedback)
    rates = [account["before"]["error_rate"], facts["validation"]["error_rate"]]
    assert account["kept"] == rates.index(min(rates))
    assert (folder / "model" / "model.safetensors").is_file() and not (folder / "round-1/model").exists()
    page = (finished / "runs" / "tiny" / "report.html").read_text()
    assert 'aria-label="Rounds of reflection"' in page and "said after the round" in page


@pytest.mark.full
def test_a_corrector_made_by_exercises_gives_its_distribution_in_the_place_of_texts(finished: Path) -> None:
    before = set(artifacts(finished))
    wanted = ("reflect.target=distribution", "reflect.exercises.steps=2")
    done = clinkd(finished, "train", "reflect", str(CONFIG), *SMALL, *wanted)
    assert done.returncode == 0, done.stderr
    folder = reflected(finished, before)
    corrector = next(path for path in folder.parent.glob("corrector-*") if path.is_dir())
    assert any(row["kd"] > 0 for row in lines(folder / "round-1/metrics.jsonl"))
    assert not (folder / "round-1/candidates").exists()
    feedback = pq.read_table(folder / "round-1/feedback.parquet").to_pylist()
    assert feedback and all(row["chosen"] == row["truth"] for row in feedback)
    assert {row["corrector_hash"] for row in feedback} == {teacher_key(corrector / "model", {})}
