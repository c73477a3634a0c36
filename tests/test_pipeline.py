"""The whole way of the data on a few phantoms: real Ray, real DeepSpeed, a real model at every stage."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
CONFIG = Path(__file__).parent.parent / "configs" / "tiny.yaml"
SMALL = [
    "data.phantoms=48", "data.test_fraction=0.34", "guide.steps=4", "sft.steps=4", "rope.gamma=0.5",
    "distill.optim.steps=4",
    "reflect.optim.steps=4",     "reflect.samples=12", "reflect.budget=4", "reflect.candidates=2",
    "reflect.similarity=rouge",
    "evaluate.text_metrics=false", "evaluate.max_new_tokens=12", "compute.checkpoint_every=2",
]  # fmt: skip


def clinkd(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    command = [sys.executable, "-m", "clinkd", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False
    )


def test_run_trains_distils_evaluates_reports_and_then_skips(tmp_path: Path) -> None:
    done = clinkd(tmp_path, "run", str(CONFIG), *SMALL)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "tiny"
    result = json.loads((run / "eval.json").read_text())
    for task, key in (("vg", "recall_at_50"), ("roc", "recall")):
        assert 0 <= result[task]["mean"][key] <= 1 and len(result[task]["modalities"]) == 8
    assert 0 <= result["baselines"]["vg"] < 0.2 and 0 < result["baselines"]["roc"] < 0.3
    predictions = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert [row["id"] for row in predictions] == list(range(len(predictions)))
    stages = {json.loads(line)["stage"] for line in (run / "metrics.jsonl").read_text().splitlines()}
    assert {"prepare", "guide", "teacher", "label", "distill", "reflect", "evaluate"} <= stages
    assert "distill" in (run / "report.html").read_text()

    again = clinkd(tmp_path, "run", str(CONFIG), *SMALL)
    assert again.returncode == 0
    skipped = [line.split()[1] for line in again.stderr.splitlines() if line.startswith("skipped")]
    assert skipped == ["prepare", "guide", "teacher", "label", "distill", "reflect", "evaluate"]
    assert json.loads((run / "eval.json").read_text()) == result


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.pth=x", "did you mean path?"),
        ("model.path=/nowhere/qwen", "model.path"),
        ("data.source=/nowhere/data", "/nowhere/data"),
        ("compute.workers=999", "compute.workers"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(tmp_path: Path, override: str, said: str) -> None:
    failed = clinkd(tmp_path, "run", str(CONFIG), override)
    assert failed.returncode == 2
    assert said in failed.stderr and "Traceback" not in failed.stderr
    assert len(failed.stderr.strip().splitlines()) == 1


def test_killed_in_the_middle_of_distillation_it_goes_on(tmp_path: Path) -> None:
    """kill -9 of the driver and all it started; the same command resumes from the last checkpoint."""
    arguments = ["run", str(CONFIG), *SMALL, "distill.optim.steps=40", "reflect.rounds=0"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    first = subprocess.Popen(
        [sys.executable, "-m", "clinkd", *arguments], cwd=tmp_path, env=environment, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    reached = wait_for_step(tmp_path / "runs" / "artifacts", 10, first)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    assert reached < 40

    done = clinkd(tmp_path, *arguments)
    assert done.returncode == 0, done.stderr
    metrics = next((tmp_path / "runs" / "artifacts").glob("distill-*/metrics.jsonl"))
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, 41))  # none twice, none missing
    assert "skipped teacher" in done.stderr and "skipped distill" not in done.stderr


def wait_for_step(artifacts: Path, step: int, process: subprocess.Popen) -> int:
    """Waits until distillation has written this step's metrics; returns the step it is at."""
    deadline = time.monotonic() + 500
    while time.monotonic() < deadline and process.poll() is None:
        for path in artifacts.glob("distill-*.partial/metrics.jsonl"):
            lines = path.read_text().splitlines()
            if len(lines) >= step:
                return len(lines)
        time.sleep(0.2)
    raise AssertionError(f"distillation did not reach step {step} (exit code {process.poll()})")
