"""A sweep of N trials against as many separate `clinkd run`s of the same settings, whole commands both.

    python benchmarks/sweep.py [--trials N] [--separate N] [--config FILE] [k=v ...]

The sweep draws its trials at random over guidance and distillation. Of the separate runs, --separate are
timed, each with a store of its own and the values of one trial, and their mean stands for the others; they
are `clinkd run` without rounds of reflection, as the trials are. Printed: seconds of both and their ratio,
how often the teacher was asked, and what a trial's seconds are made of: training steps, and the rest
(answers, scores, Ray Tune, Ray Train, DeepSpeed's start).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

SPACE = {
    "rope.lambda_h": {"kind": "uniform", "low": 0.5, "high": 3.0},
    "rope.gamma": {"kind": "uniform", "low": 0.1, "high": 1.0},
    "distill.a": {"kind": "loguniform", "low": 0.1, "high": 2.0},
    "distill.temperature": {"kind": "uniform", "low": 0.3, "high": 2.0},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--separate", type=int, default=2)
    parser.add_argument("--config", type=Path, default=Path("configs/tiny.yaml"))
    parser.add_argument("overrides", nargs="*")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        sweep = {"base": str(chosen.config.resolve()), "run": {"name": "swept"},
                 "sweep": {"trials": chosen.trials, "sampler": "random", "space": SPACE}}  # fmt: skip
        (folder / "sweep.yaml").write_text(yaml.safe_dump(sweep))
        together = timed(folder, "sweep", "sweep.yaml", *chosen.overrides)
        facts = json.loads((folder / "runs" / "swept" / "sweep.json").read_text())
        apart = [
            separate(folder, number, row["values"], chosen)
            for number, row in enumerate(facts["trials"][: chosen.separate])
        ]
        whole = statistics.mean(apart) * chosen.trials
        labels = [path for path in (folder / "runs" / "artifacts").glob("label-*") if path.is_dir()]
        each = ", ".join(f"{seconds:.0f}" for seconds in apart)
        print(f"sweep of {chosen.trials} trials: {together:.0f} s")
        print(f"{chosen.trials} runs: {whole:.0f} s ({chosen.separate} timed: {each} s)")
        print(f"ratio: {together / whole:.3f}")
        print(f"passes of the teacher over the data: sweep {len(labels)}, runs {chosen.trials}")
        account(folder, facts["trials"])


def timed(folder: Path, *arguments: str) -> float:
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "clinkd", *arguments], cwd=folder, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return time.perf_counter() - begun


def separate(folder: Path, number: int, values: dict[str, Any], chosen: argparse.Namespace) -> float:
    own = [f"{key}={value}" for key, value in values.items()]
    name = [
        f"run.root=alone-{number}",
        f"run.name=r{number}",
        "reflect.rounds=0",
        "evaluate.text_metrics=false",
    ]
    return timed(folder, "run", str(chosen.config.resolve()), *chosen.overrides, *own, *name)


def account(folder: Path, rows: list[dict[str, Any]]) -> None:
    """What the trials' seconds are made of; the first one starts the workers and stands apart."""
    steps = {}
    for path in (folder / "runs" / "artifacts").glob("distill-*/metrics.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        steps[path.parent.name] = sum(line["seconds"] for line in lines)
    training = statistics.median(steps.values())
    rows = sorted(rows, key=lambda row: row["trial"])
    print(f"first trial, which starts the workers: {rows[0]['seconds']:.1f} s")
    later = statistics.median(row["seconds"] for row in rows[1:])
    print(f"later trials: {later:.1f} s, of these training steps {training:.1f}, rest {later - training:.1f}")


if __name__ == "__main__":
    main()
