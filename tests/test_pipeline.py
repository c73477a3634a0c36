"""The whole way of the data on a few phantoms: real Ray, real DeepSpeed, a real model at every stage."""

import json
import os
import subprocess
import sys
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
