"""All benchmarks, one after the other: a page, and what changed since the last results that were kept.

    python benchmarks/all.py [--only NAME ...] [--keep]           (or: make bench)

Each benchmark measures both of its sides in one run and prints their ratio; here a few of these numbers are
read from what it prints. benchmarks/results.json has the last ones that were kept, with machine and versions;
the table says how far each number is from them. --keep writes the new ones there, and docs/performance.md
with its two plots. Numbers of another machine, or of one that was busy, are no regression: look at the ratios
first. benchmarks/search.py, hours long, stands for itself.
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
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results.json", HERE.parent / "docs" / "performance.md"
PLOTS = {"ratios": "performance-ratios.svg", "growth": "performance-growth.svg"}  # beside the page
VERSIONS = ("torch", "ray", "deepspeed", "transformers", "optuna", "pyarrow")
SLOPE = r"^{}[\s\S]*?^slope +([\d.-]+)"
HELLO = re.compile(r"^\[.*\[WARNING\] \[real_accelerator.*\n", re.MULTILINE)  # DeepSpeed's


@dataclass(frozen=True)
class Number:
    """``pattern``: of the output, its first group the number. ``more``: whether more is better.

    ``sides``: whether it is one side over the other, so that 1 is no difference.
    """

    name: str
    pattern: str
    more: bool
    sides: bool = True


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
        Number("distillation's peak memory, of full logits'", r": ([\d.]+) of the peak memory", False),
    )),
    Bench("distill_growth", ("--doublings", "3", "--plot", "{growth}"), (
        Number("distillation's time, slope in the vocabulary", SLOPE.format("vocabulary"), False, False),
        Number("distillation's time, slope in the length", SLOPE.format("length"), False, False),
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
    Bench("feed", (), (Number("feed, of a torch DataLoader", r"^feed,.* ([\d.]+) of the Data", True),)),
    Bench("packing", (), (
        Number("packed tokens a CPU second, of padded", r"^packed: .*a CPU second \(([\d.]+)\)", True),
    )),
    Bench("train_step", ("--zero", "1"), (
        Number("step of the loop, of a bare torch loop", r"^ZeRO 1 +[\d.]+ +[\d.]+ +([\d.]+)", False),
    )),
    Bench("offsite", (), (Number("steps with copies to a slow bucket", r"^steps: .*ratio ([\d.]+)", False),)),
    Bench("prepare", ("--records", "5000", "--rounds", "1"), (
        Number("prepare of twice the records, times the time", r"records take ([\d.]+) times", False, False),
    )),
    Bench("teacher_cache_forms", (), ()),
    Bench("plan", (), ()),
    Bench("sweep", ("--separate", "1", "data.phantoms=400", "guide.steps=60", "sft.steps=120",
                    "distill.optim.steps=60"), (
        Number("sweep of 8 trials, of 8 runs' time", r"^ratio: ([\d.]+)$", False),
    )),
)  # fmt: skip

NUMBERS = [number for bench in BENCHES for number in bench.numbers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[bench.name for bench in BENCHES], metavar="NAME")
    parser.add_argument("--keep", action="store_true", help="write results.json and docs/performance.md")
    chosen = parser.parse_args()
    kept = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {"numbers": {}, "outputs": {}}
    found: dict[str, Any] = {"machine": machine(), "numbers": {}, "outputs": {}, "seconds": {}}
    with tempfile.TemporaryDirectory() as scratch:
        plots = PAGE.parent if chosen.keep else Path(scratch)
        for bench in BENCHES:
            if not chosen.only or bench.name in chosen.only:
                print(f"{bench.name} ...", file=sys.stderr, flush=True)
                measure(bench, found, plots)
    print(table(found["numbers"], kept["numbers"]))
    if chosen.keep:
        keep(found, kept)
    if any(value is None for value in found["numbers"].values()):
        raise SystemExit("some numbers were not found in the outputs above")


def keep(found: dict[str, Any], kept: dict[str, Any]) -> None:
    """Writes what was found, beside what was kept of benchmarks that did not run; the page and its plot."""
    before = {name: kept["numbers"].get(name) for name in found["numbers"]}
    for part in ("numbers", "outputs", "seconds"):
        found[part] = kept.get(part, {}) | found[part]
    found["before"] = kept.get("before", {}) | before
    RESULTS.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    plot_ratios(found["numbers"], PAGE.parent / PLOTS["ratios"])
    PAGE.write_text(page(found), encoding="utf-8")
    print(f"kept: {RESULTS}, {PAGE}", file=sys.stderr)


def measure(bench: Bench, found: dict[str, Any], plots: Path) -> None:
    """Runs it and reads its numbers; a benchmark that fails or says MISSED still has its output kept."""
    begun = time.perf_counter()
    places = {name: str(plots / file) for name, file in PLOTS.items()}
    arguments = [argument.format_map(places) if "{" in argument else argument for argument in bench.arguments]
    command = [sys.executable, str(HERE / f"{bench.name}.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found["seconds"][bench.name] = round(time.perf_counter() - begun)
    said = (done.stdout.strip() or done.stderr.strip()[-2000:]).replace(str(plots), "docs")
    said = HELLO.sub("", said)
    if done.returncode:
        said += f"\n(ended with {done.returncode})"
    called = " ".join(["benchmarks/" + bench.name + ".py", *bench.arguments])
    found["outputs"][bench.name] = called.format_map(PLOTS) + "\n\n" + said
    for number in bench.numbers:
        match = re.search(number.pattern, done.stdout, re.MULTILINE)
        found["numbers"][number.name] = float(match[1]) if match else None
        if not match:
            print(f"{bench.name}: no {number.name!r} in what it says:\n{said}", file=sys.stderr)


def table(now: dict[str, float | None], before: dict[str, float | None]) -> str:
    """Each number, the one that was kept, and how many times better it is now."""
    lines = ["| number | now | kept before | times better |", "|---|---|---|---|"]
    for number in NUMBERS:
        if number.name in now:
            value, old = now[number.name], before.get(number.name)
            ratio = None if not value or not old else (value / old if number.more else old / value)
            cells = (f"{each:.3g}" if each is not None else "-" for each in (value, old, ratio))
            lines.append(f"| {number.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot_ratios(numbers: dict[str, float | None], path: Path) -> None:
    """Bars: how many times better than the other side, on a logarithmic scale; 1 is no difference."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "clinkd"  # the same numbers give the same file
    sides = [number for number in reversed(NUMBERS) if number.sides and numbers.get(number.name)]
    values = [float(numbers[each.name] or 1) for each in sides]
    better = [value if each.more else 1 / value for each, value in zip(sides, values, strict=True)]
    figure = Figure(figsize=(9, 0.4 * len(sides) + 1), layout="constrained")
    axes = figure.subplots()
    colours = ["#2a7f62" if value >= 1 else "#b5532a" for value in better]
    bars = axes.barh([each.name for each in sides], [value - 1 for value in better], left=1, color=colours)
    axes.bar_label(bars, [f"{value:.2f}" for value in better], padding=4)
    axes.set_xscale("log")
    axes.set_xticks([0.5, 1, 2, 5, 10, 20], ["0.5", "1", "2", "5", "10", "20"])
    axes.minorticks_off()
    axes.axvline(1, color="#555", linewidth=1)
    axes.margins(x=0.12)
    axes.set_xlabel("times better than the other side")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


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
    outputs = "\n\n".join(
        f"## {name}\n\n{found['seconds'].get(name, 0)} s\n\n```\n{text}\n```"
        for name, text in sorted(found["outputs"].items())
    )
    return (
        "# Performance\n\n"
        "Made by `make bench`: every benchmark measures both of its sides in one run. Times are of one "
        "machine and say little\nof another; ratios hold better.\n\n"
        f"{about['date']}, {about['cores']} cores of {about['cpu']}, Python {about['python']}, {versions}; "
        f"load before it began {about['load']}.\n\n"
        f"{table(found['numbers'], found['before'])}\n\n"
        f"![How many times better than the other side]({PLOTS['ratios']})\n\n"
        "How a distillation step grows with each of its sizes, and a step over full logits:\n\n"
        f"![Growth of a distillation step]({PLOTS['growth']})\n\n{outputs}\n"
    )


if __name__ == "__main__":
    main()
