"""What `clinkd plan` says against what a run then takes: memory of a worker, and seconds of a step.

    python benchmarks/plan.py [CONFIG] [--calibrate N] [--steps N] [--phantoms N]

Both sides in one run, one after the other, each in a process of its own with a Ray of its own. First
``clinkd.ops.calibrate`` takes --calibrate steps of every stage that trains; from them the plan says what a
run of --steps steps on --phantoms phantoms takes. Then that run trains, on other phantoms.

Seconds are of a step, planned: the median of the calibration's steps but the first two; taken: the mean of
the run's but the first two. Memory without a GPU is by how much the resident pages of rank 0's process grew
at their peak, over what it held with torch, transformers and DeepSpeed imported and no model built (on a GPU
it is what torch allocated). It is given twice: as estimated from the configuration alone, and as calibrated,
which is what was measured plus the processed images that more steps will have kept. Ratios are planned to
taken; wanted are 0.85 to 1.15 of memory and 0.75 to 1.25 of time, calibrated.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("config", nargs="?", default="configs/tiny.yaml")
    parser.add_argument("overrides", nargs="*")
    for name, value in (("calibrate", 24), ("steps", 60), ("phantoms", 240)):
        parser.add_argument(f"--{name}", type=int, default=value)
    chosen = parser.parse_args()
    os.environ["RAY_AUTH_MODE"] = "disabled"  # unset, ray.init leaves a token in the home folder
    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        planned, taken = Path(folder, "planned.json"), Path(folder, "taken.json")
        for work, out in ((calibrated, planned), (trained, taken)):
            process = multiprocessing.get_context("spawn").Process(target=work, args=(chosen, folder, out))
            process.start()
            process.join()
            if process.exitcode:
                raise SystemExit(f"{work.__name__}: ended with {process.exitcode}")
        report(json.loads(planned.read_text()), json.loads(taken.read_text()))


def configured(chosen: argparse.Namespace, folder: str) -> Any:
    """The run that is planned: the configuration with so many steps and phantoms."""
    from clinkd.config import load_config, with_values
    from clinkd.ops.calibrate import small

    config = small(load_config(chosen.config, chosen.overrides), chosen.steps, Path(folder, "run"))
    return with_values(config, {"data.phantoms": chosen.phantoms, "run.seed": 1})


def calibrated(chosen: argparse.Namespace, folder: str, out: Path) -> None:
    from clinkd.ops.calibrate import measure
    from clinkd.ops.plan import plan

    config = configured(chosen, folder)
    found = plan(config, measured=measure(config, chosen.calibrate))
    out.write_text(json.dumps(found))


def trained(chosen: argparse.Namespace, folder: str, out: Path) -> None:
    from clinkd.ops.calibrate import learn

    out.write_text(json.dumps({name: asdict(one) for name, one in learn(configured(chosen, folder)).items()}))


def report(plan: dict[str, Any], taken: dict[str, Any]) -> None:
    print(f"{'':12}{'seconds a step':^27}{'MB over the libraries':^45}")
    heads = ("planned", "taken", "ratio", "estimated", "ratio", "calibrated", "ratio", "taken")
    print(f"{'stage':12}" + "".join(f"{head:>{width}}" for head, width in zip(heads, WIDTHS, strict=True)))
    missed = []
    for row in plan["stages"]:
        name = "reflect" if row["name"].startswith("reflect-") else row["name"]
        if row.get("asks") or name not in taken:
            continue
        real, said = taken[name], row["measured"]
        grown = real["grown"]
        seconds = real["mean"]
        values = (
            f"{said['seconds']:.3f}", f"{seconds:.3f}", f"{said['seconds'] / seconds:.2f}",
            f"{row['total'] / 1e6:.0f}", f"{row['total'] / grown:.2f}",
            f"{said['grown_at_end'] / 1e6:.0f}", f"{said['grown_at_end'] / grown:.2f}", f"{grown / 1e6:.0f}",
        )  # fmt: skip
        print(f"{name:12}" + "".join(f"{text:>{width}}" for text, width in zip(values, WIDTHS, strict=True)))
        if not 0.75 <= said["seconds"] / seconds <= 1.25:
            missed.append(f"{name}'s time")
        if not 0.85 <= said["grown_at_end"] / grown <= 1.15:
            missed.append(f"{name}'s memory")
    print(
        f"wanted: memory within 15%, time within 25%: {'MISSED: ' + ', '.join(missed) if missed else 'met'}"
    )


WIDTHS = (9, 9, 9, 11, 7, 12, 7, 8)

if __name__ == "__main__":
    main()
