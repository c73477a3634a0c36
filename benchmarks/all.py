"""All benchmarks, one after the other: a page, and what changed since the last results that were kept.

    python benchmarks/all.py [--only NAME ...] [--keep]           (or: make bench)

Each benchmark measures both of its sides in one run and prints their ratio; here a few of these numbers are
read from what it prints. benchmarks/results.json has the last ones that were kept, with machine and versions;
the table says how far each number is from them. --keep writes the new ones there, and docs/performance.md.
Numbers of another machine, or of one that was busy, are no regression: look at the ratios first.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results.json", HERE.parent / "docs" / "performance.md"
VERSIONS = ("torch", "ray", "deepspeed", "transformers", "optuna", "pyarrow")


@dataclass(frozen=True)
class Number:
    """``pattern``: of the output, its first group the number. ``more``: whether more is better."""

    name: str
    pattern: str
    more: bool


@dataclass(frozen=True)
class Bench:
    name: str
    arguments: tuple[str, ...]
    numbers: tuple[Number, ...]


BENCHES = (
    Bench("rope", (), (
        Number("rotary positions, times transformers' speed", r"^\S.*? ([\d.]+)x", True),
    )),
    Bench("distill", ("--answers", "64", "256"), (
        Number("distillation step, times faster than full logits", r": ([\d.]+)x faster", True),
        Number("its peak memory, of full logits'", r": ([\d.]+) of the peak memory", False),
    )),
    Bench("distill_growth", ("--doublings", "2"), (
        Number("its time's slope in the vocabulary", r"^vocabulary[\s\S]*?^slope +([\d.-]+)", False),
    )),
    Bench("candidates", (), (
        Number("candidates, times one at a time", r"^batches, prompts read once.* ([\d.]+)x$", True),
    )),
    Bench("predict", ("--images", "12", "--rounds", "2"), (
        Number("answers in batches, times one at a time", r"^batches.* ([\d.]+)x$", True),
    )),
    Bench("text_metrics", ("--rounds", "1"), (
        Number("text metrics, times a process for each modality", r"^one scorer.* ([\d.]+)x$", True),
    )),
    Bench("feed", (), (Number("feed, of a torch DataLoader", r"([\d.]+) of the DataLoader$", True),)),
    Bench("packing", (), (
        Number("packed tokens a CPU second, of padded", r"^packed: .*a CPU second \(([\d.]+)\)", True),
    )),
    Bench("train_step", ("--zero", "1"), (
        Number("step of the loop, of a bare torch loop", r"^ZeRO 1 +[\d.]+ +[\d.]+ +([\d.]+)", False),
    )),
    Bench("offsite", (), (Number("steps with copies to a slow bucket", r"^steps: .*ratio ([\d.]+)", False),)),
    Bench("prepare", ("--records", "5000", "--rounds", "1"), (
        Number("prepare of twice the records, times the time", r"records take ([\d.]+) times", False),
    )),
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[bench.name for bench in BENCHES], metavar="NAME")
    parser.add_argument("--keep", action="store_true", help="write results.json and docs/performance.md")
    chosen = parser.parse_args()
    kept = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"numbers": {}, "outputs": {}}
    found: dict[str, Any] = {"machine": machine(), "numbers": {}, "outputs": {}, "seconds": {}}
    for bench in BENCHES:
        if not chosen.only or bench.name in chosen.only:
            print(f"{bench.name} ...", file=sys.stderr, flush=True)
            measure(bench, found)
    print(table(found["numbers"], kept["numbers"]))
    if chosen.keep:
        for part in ("numbers", "outputs", "seconds"):
            found[part] = kept.get(part, {}) | found[part]
        RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        PAGE.write_text(page(found), encoding="utf-8")
        print(f"kept: {RESULTS}, {PAGE}", file=sys.stderr)
    if any(value is None for value in found["numbers"].values()):
        raise SystemExit("some numbers were not found in the outputs above")


def measure(bench: Bench, found: dict[str, Any]) -> None:
    """Runs it and reads its numbers; a benchmark that fails or says MISSED still has its output kept."""
    begun = time.perf_counter()
    command = [sys.executable, str(HERE / f"{bench.name}.py"), *bench.arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found["seconds"][bench.name] = round(time.perf_counter() - begun)
    said = done.stdout.strip() or done.stderr.strip()[-2000:]
    found["outputs"][bench.name] = " ".join(command[1:]).replace(str(HERE), "benchmarks") + "\n\n" + said
    for number in bench.numbers:
        match = re.search(number.pattern, done.stdout, re.MULTILINE)
        found["numbers"][number.name] = float(match[1]) if match else None
        if not match:
            print(f"{bench.name}: no {number.name!r} in what it says:\n{said}", file=sys.stderr)


def table(now: dict[str, float | None], before: dict[str, float | None]) -> str:
    """Each number, the one that was kept, and how many times better it is now."""
    better = {number.name: number.more for bench in BENCHES for number in bench.numbers}
    lines = ["| number | now | kept | times better |", "|---|---|---|---|"]
    for name, value in now.items():
        old = before.get(name)
        ratio = None if not value or not old else (value / old if better[name] else old / value)
        cells = (f"{each:.3g}" if each is not None else "-" for each in (value, old, ratio))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    """What the numbers are of."""
    with open("/proc/cpuinfo", encoding="utf-8") as info:
        model = next((line.partition(":")[2].strip() for line in info if line.startswith("model name")), "")
    return {
        "date": datetime.date.today().isoformat(), "cpu": model or platform.machine(),
        "cores": os.cpu_count(), "python": platform.python_version(),
        "versions": {name: version(name) for name in VERSIONS},
        "load": round(os.getloadavg()[2], 1),
    }  # fmt: skip


def page(found: dict[str, Any]) -> str:
    about = found["machine"]
    versions = ", ".join(f"{name} {number}" for name, number in about["versions"].items())
    numbers = "\n".join(
        f"| {name} | {value if value is not None else '-'} |" for name, value in found["numbers"].items()
    )
    outputs = "\n\n".join(f"## {name}\n\n```\n{text}\n```" for name, text in sorted(found["outputs"].items()))
    return (
        "# Performance\n\n"
        "Made by `make bench`: every benchmark measures both of its sides in one run. Times are of one "
        "machine and say little\nof another; ratios hold better.\n\n"
        f"{about['date']}, {about['cores']} cores of {about['cpu']}, Python {about['python']}, {versions}; "
        f"load before it began {about['load']}.\n\n| number | |\n|---|---|\n{numbers}\n\n{outputs}\n"
    )


if __name__ == "__main__":
    main()
