"""How a distillation step grows with batch, length, answer tokens and vocabulary, and the full-logit step.

    python benchmarks/distill_growth.py [--plot FILE] [--base N N N N] [--doublings N] [--memory GIB]
                                        [--rounds N] [--threads N] [--device cpu|cuda]

Both steps are those of kd.py. One size grows at a time from a base (--base: batch, length, answer tokens of
each sequence, vocabulary), by doubling. Where the full-logit step would take more than --memory GiB, or more
than is free, ours stands alone. At every size where both run, the losses are held against each other at the
same positions first, within 1e-4. Printed are median milliseconds, sides alternating, and the slope of log
time over log size by least squares over each side's points: 1 is growth in proportion, 0 none. --plot writes
the curves (its ending names the format).

What to expect: both pay the trunk, and its embeddings' gradient, for all B * L tokens; heads and softmaxes
cost ours B * answers * V, the other B * L * V. So ours should hardly grow with L where the vocabulary is
large, and the other not at all with the answer tokens.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import kd
import numpy as np
import torch

LOSS = 1e-4
OURS, FULL = "ours", "full logits"
AXES = ("batch", "length", "answers", "vocabulary")
Series = dict[str, list[tuple[int, float]]]
"""(size, seconds) of each side."""


def main() -> None:
    chosen = arguments()
    torch.set_num_threads(chosen.threads)
    base = kd.Size(**dict(zip(AXES, chosen.base, strict=True)), device=chosen.device)
    print(
        f"base: {', '.join(f'{name} {getattr(base, name)}' for name in AXES)}; ms, median of {chosen.rounds}"
    )
    found: dict[str, Series] = {}
    for axis in AXES:
        print(f"{axis:12}{OURS:>12}{FULL:>14}{'ratio':>9}")
        found[axis] = {OURS: [], FULL: []}
        for size in grown(base, axis, chosen.doublings):
            times = measured(size, chosen)
            for side, seconds in times.items():
                found[axis][side].append((getattr(size, axis), seconds))
            print(line(getattr(size, axis), times), flush=True)
        slopes = {side: slope(points) for side, points in found[axis].items()}
        print("slope".ljust(12) + f"{slopes[OURS]:12.2f}{slopes[FULL]:14.2f}", flush=True)
    if chosen.plot:
        plot(found, chosen.plot)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--base", type=int, nargs=4, default=[2, 256, 32, 37984], metavar=AXES)
    for name, value in (("doublings", 3), ("rounds", 5), ("threads", 1), ("chunk", kd.CHUNK)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--memory", type=float, default=8.0, help="GiB that a full-logit step may take")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--plot", type=Path)
    return parser.parse_args()


def grown(base: kd.Size, axis: str, doublings: int) -> list[kd.Size]:
    """The base and its doublings; the vocabulary starts at half of it, answers end at the length."""
    start = getattr(base, axis) // (2 if axis == "vocabulary" else 1)
    values = [start * 2**number for number in range(doublings + 1)]
    return [replace(base, **{axis: value}) for value in values if axis != "answers" or value <= base.length]


def measured(size: kd.Size, chosen: argparse.Namespace) -> dict[str, float]:
    """Seconds of ours, and of the full-logit step where it fits."""
    student, teacher = kd.new_model(size, kd.STUDENT), kd.new_teacher(size)
    fits = size.full_gib <= chosen.memory
    with tempfile.TemporaryDirectory() as folder:
        cache = kd.write_cache(size, teacher, Path(folder, "cache"))
        sides: dict[str, Any] = {OURS: kd.our_step(size, student, cache, chosen.chunk)}
        if fits:
            if size.device == "cpu":
                kd.need_memory(size.full_gib + 1)
            found = sides[OURS]()
            with torch.no_grad():
                error = kd.loss_error(found, kd.aligned_loss(size, student, teacher))
            if not error <= LOSS:
                raise SystemExit(f"{size}: the losses differ by {error:.1e}, more than {LOSS}")
            sides[FULL] = kd.full_step(size, student, teacher)
        return {name: clock for name, (clock, _) in kd.measured(sides, chosen.rounds, size.device).items()}


def line(value: int, times: dict[str, float]) -> str:
    said = f"{value:<12}{1e3 * times[OURS]:12.1f}"
    if FULL not in times:
        return said + f"{'too large':>14}"
    return said + f"{1e3 * times[FULL]:14.1f}{times[FULL] / times[OURS]:8.1f}x"


def slope(points: list[tuple[int, float]]) -> float:
    """Of log seconds over log size; nan for fewer than two points."""
    if len(points) < 2:
        return float("nan")
    sizes, seconds = np.log(np.array(points)).T
    return float(np.polyfit(sizes, seconds, 1)[0])


def plot(found: dict[str, Series], out: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.2 * len(found), 3.0), layout="constrained")
    panels = figure.subplots(1, len(found), sharey=True)
    for axes, (axis, series) in zip(panels, found.items(), strict=True):
        for side, marker in ((OURS, "o"), (FULL, "s")):
            if series[side]:
                sizes, seconds = zip(*series[side], strict=True)
                name = f"{side}, slope {slope(series[side]):.2f}"
                axes.loglog(sizes, np.array(seconds), marker=marker, markersize=4, label=name)
        axes.set_xlabel(axis)
        ticks = [size for size, _ in series[OURS]]
        axes.set_xticks(ticks, [f"{size:,}" for size in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    panels[0].set_ylabel("seconds a step")
    figure.savefig(out)
    print(f"plot: {out}")


if __name__ == "__main__":
    main()
