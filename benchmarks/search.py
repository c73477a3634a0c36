"""TPE with ASHA against random search: training steps until the score that 32 random trials reach.

    python benchmarks/search.py [--seeds N] [--first N] [--trials N] [--keep DIR] [--config FILE] [k=v ...]

For each seed (of data, models and sampler) random search trains all its trials to their end; its best value
of the metric is the mark. Then TPE draws trials that ASHA may end early, on the same data and teacher, and
the training steps are counted, trial after trial, until one of them reaches the mark. Printed: for each seed
both counts and their ratio (inf where none reaches it), and the median.

The student begins from nothing, so that its settings matter: one that begins as its teacher ends is best left
as it is, and what a search then finds is noise.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

STEPS = 40
SPACE = {
    "distill.optim.lr": {"kind": "loguniform", "low": 1e-5, "high": 1e-1},
    "distill.optim.vision_lr": {"kind": "loguniform", "low": 1e-2, "high": 1.0},
    "distill.a": {"kind": "loguniform", "low": 0.05, "high": 5.0},
    "distill.temperature": {"kind": "uniform", "low": 0.3, "high": 3.0},
}
SMALL = [
    "data.phantoms=160", "data.test_fraction=0.1", "data.validation_fraction=0.2", "guide.steps=4",
    "sft.steps=150", f"distill.optim.steps={STEPS}", "distill.optim.batch_size=4",
    "distill.optim.questions_per_image=4", "model.init=random", "compute.workers=1",
]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first", type=int, default=0, help="the first of the seeds")
    parser.add_argument("--trials", type=int, default=32)
    parser.add_argument("--keep", type=Path, help="write the trials of each seed into this folder")
    parser.add_argument("--config", type=Path, default=Path("configs/tiny.yaml"))
    parser.add_argument("overrides", nargs="*")
    chosen = parser.parse_args()
    ratios = []
    for seed in range(chosen.first, chosen.first + chosen.seeds):
        with tempfile.TemporaryDirectory() as scratch:
            ratios.append(compare(Path(scratch), seed, chosen))
    reached = [ratio for ratio in ratios if math.isfinite(ratio)]
    print(f"median ratio {statistics.median(ratios):.2f}; reached by {len(reached)} of {len(ratios)} seeds")


def compare(folder: Path, seed: int, chosen: argparse.Namespace) -> float:
    """Steps of TPE with ASHA over those of random search; infinite where it never gets there."""
    random = swept(folder, "random", seed, chosen, {"sampler": "random", "scheduler": "none"})
    mark = max(row["likelihood"] for row in random if row["state"] == "complete")
    whole = sum(row["step"] for row in random)
    for student in (folder / "runs" / "artifacts").glob("distill-*"):
        if student.is_dir():  # beside them lie their locks
            shutil.rmtree(student)  # both sides draw the same values first, and are to train them
    rows = swept(
        folder, "tpe", seed, chosen, {"sampler": "tpe", "scheduler": "asha", "grace": 10, "reduction": 2}
    )
    taken = 0
    for row in sorted(rows, key=lambda row: row["trial"]):
        taken += row["step"]
        if max(row["rungs"].values()) >= mark:
            break
    else:
        taken = math.inf  # type: ignore[assignment]
    best = max(max(row["rungs"].values()) for row in rows)
    ended = sum(row["state"] == "pruned" for row in rows)
    if chosen.keep:
        kept = chosen.keep / f"seed-{seed}.json"
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps({"random": random, "tpe": rows}))
    print(
        f"seed {seed}: random {whole} steps, best {mark:.4f}; TPE + ASHA {taken} steps to it, "
        f"{taken / whole:.2f} (best {best:.4f} of {len(rows)} trials, {ended} ended early)", flush=True,
    )  # fmt: skip
    return taken / whole


def swept(
    folder: Path, name: str, seed: int, chosen: argparse.Namespace, how: dict[str, Any]
) -> list[dict[str, Any]]:
    """The trials of a sweep, one at a time so that the next one knows of the last."""
    path = folder / f"{name}.yaml"
    sweep = {
        "trials": chosen.trials,
        "metric": "likelihood",
        "questions": 96,
        "concurrent": 1,
        "space": SPACE,
    }
    values = {"base": str(chosen.config.resolve()), "run": {"name": name, "seed": seed}}
    path.write_text(yaml.safe_dump(values | {"sweep": sweep | how | {"space": SPACE}}))
    command = [sys.executable, "-m", "clinkd", "sweep", str(path), *SMALL, *chosen.overrides]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    return list(json.loads((folder / "runs" / name / "sweep.json").read_text())["trials"])


if __name__ == "__main__":
    main()
