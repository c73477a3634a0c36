"""One distillation step, from the cached teacher and at answer tokens alone, against full logits online.

    python benchmarks/distill.py [--answers N ...] [--rounds N] [--threads N] [--chunk N] [--device cpu|cuda]

A step is the student's forward pass, the loss and the backward pass to its weights, without optimiser: batch
2 x 1,024 tokens, vocabulary 151,936, student of 2 layers x 256, teacher of 2 x 512, heads tied, forward KL,
a = 0.5, T = 0.5, float32. What the sides do stands in kd.py; the teacher's cache is written beforehand,
reading the states out of it is part of our step. --answers are the answer tokens of each sequence; the
full-logit side does the same work for any number of them and is measured once.

Before anything is timed, our loss (total, KL, CE) is held against one from whole logits of both models at the
same positions: within 1e-4, relative; and for the fewest answer tokens all gradients, within 1e-3 of each
one's largest entry. The difference holds the float16 of the cache. Both look at the positions that predict
answer tokens; the published snippet masks its KL by labels that were not shifted (one token late against its
own CE), and the side that is timed follows it in that.

Sides alternate within a round, a first round is not counted, ratios are of the medians, by the clock and by
this process's CPU seconds, which other work disturbs less. Peak memory is what the resident set of a fresh
process grows by in its first step (on CUDA: torch's allocated memory), gradients included, weights not. The
full-logit side takes 10 GiB or so; with less than 12 GiB free nothing is run.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import kd
import torch

FASTER, LESS_MEMORY, LOSS, GRADIENT = 8.0, 0.25, 1e-4, 1e-3


def main() -> None:
    chosen = arguments()
    torch.set_num_threads(chosen.threads)
    size = kd.Size(chosen.batch, chosen.length, min(chosen.answers), chosen.vocabulary, device=chosen.device)
    if chosen.memory_of:
        print(json.dumps(memory(size, chosen.memory_of, chosen.cache, chosen.chunk)))
        return
    if size.device == "cpu":
        kd.need_memory(size.full_gib + 2.5)
    sizes = {f"ours, {answers} answer tokens": replace(size, answers=answers) for answers in chosen.answers}
    with tempfile.TemporaryDirectory() as folder:
        caches = {name: Path(folder, str(one.answers)) for name, one in sizes.items()}
        times = timed(sizes, caches, chosen)
        grown = {name: fresh(one, name, caches[name], chosen) for name, one in sizes.items()}
        grown["full logits"] = fresh(size, "full logits", Path(folder), chosen)
    table(times, grown)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    default = kd.Size()
    parser.add_argument("--answers", type=int, nargs="+", default=[64, 256, 1024])
    for name, value in (
        ("rounds", 5), ("threads", 1), ("chunk", kd.CHUNK), ("batch", default.batch),
        ("length", default.length), ("vocabulary", default.vocabulary),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)  # how this script starts itself
    parser.add_argument("--cache", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def timed(
    sizes: dict[str, kd.Size], caches: dict[str, Path], chosen: argparse.Namespace
) -> dict[str, tuple[float, float]]:
    """Checks all sides, then measures them; the caches stay written."""
    size = min(sizes.values(), key=lambda one: one.answers)
    student, teacher = kd.new_model(size, kd.STUDENT), kd.new_teacher(size)
    sides: dict[str, Any] = {"full logits": kd.full_step(size, student, teacher)}
    for name, one in sizes.items():
        kd.write_cache(one, teacher, caches[name])
        sides[name] = kd.our_step(one, student, caches[name], chosen.chunk)
        check(name, one, student, teacher, sides[name], gradients=one == size)
    return kd.measured(sides, chosen.rounds, size.device)


def check(name: str, size: kd.Size, student: Any, teacher: Any, step: Any, gradients: bool) -> None:
    found = step()
    mine = {key: value.grad.clone() for key, value in student.named_parameters() if value.grad is not None}
    student.zero_grad()
    with torch.set_grad_enabled(gradients):
        wanted = kd.aligned_loss(size, student, teacher)
    error = kd.loss_error(found, wanted)
    said = f"{name}: total {found.total.item():.6f}, KL {found.kd.item():.6f}, CE {found.ce.item():.6f}; "
    print(f"{said}off the full logits' by {error:.1e}", flush=True)
    if not error <= LOSS:
        raise SystemExit(f"{name}: the losses differ by {error:.1e}, more than {LOSS}")
    if not gradients:
        return
    wanted.total.backward()
    named = dict(student.named_parameters())
    if mine.keys() != {key for key, value in named.items() if value.grad is not None}:
        raise SystemExit(f"{name}: the sides give gradients to different weights")
    worst = max(
        ((value - named[key].grad).abs().max() / named[key].grad.abs().max()).item()
        for key, value in mine.items()
        if named[key].grad.abs().max() > 1e-9  # keys' biases: attention does not feel them
    )
    print(f"{name}: gradients of {len(mine)} weights, off by {worst:.1e} of the largest entry at most")
    if not worst <= GRADIENT:
        raise SystemExit(f"{name}: the gradients differ by {worst:.1e}, more than {GRADIENT}")


def fresh(size: kd.Size, side: str, cache: Path, chosen: argparse.Namespace) -> dict[str, float]:
    """``memory`` in a process of its own."""
    command = [sys.executable, __file__, "--memory-of", side, "--cache", str(cache)]
    for name in ("batch", "length", "answers", "vocabulary", "device"):
        command += [f"--{name}", str(getattr(size, name))]
    for name in ("chunk", "threads"):
        command += [f"--{name}", str(getattr(chosen, name))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def memory(size: kd.Size, side: str, cache: Path, chunk: int) -> dict[str, float]:
    """GiB that the first step takes beyond what the process holds before it, and that it holds then."""
    student = kd.new_model(size, kd.STUDENT)
    step: Any
    if side == "full logits":
        step = kd.full_step(size, student, kd.new_teacher(size))
    else:
        step = kd.our_step(size, student, cache, chunk)
    if size.device != "cpu":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        peak = torch.cuda.max_memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # the high-water mark back to what is held now
        before = resident("VmRSS")
        step()
        peak = resident("VmHWM")
    return {"grown": (peak - before) / 2**30, "before": before / 2**30}


def resident(field: str) -> int:
    """Bytes, by this process's own status."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def table(times: dict[str, tuple[float, float]], grown: dict[str, dict[str, float]]) -> None:
    print(
        f"{'side':28}{'step s':>9}{'faster':>9}{'CPU s':>9}{'less':>8}{'peak GiB':>10}{'of full':>9}"
        f"{'held GiB':>10}"
    )
    base, whole = times["full logits"], grown["full logits"]["grown"]
    for name, (clock, cpu) in times.items():
        peak = grown[name]["grown"]
        print(
            f"{name:28}{clock:9.3f}{base[0] / clock:8.1f}x{cpu:9.3f}{base[1] / cpu:7.1f}x{peak:10.2f}"
            f"{peak / whole:9.3f}{grown[name]['before']:10.2f}"
        )
    first = list(times)[1]
    faster, share = base[0] / times[first][0], grown[first]["grown"] / whole
    for said, met in (
        (f"{faster:.1f}x faster, at least {FASTER:.0f}x wanted", faster >= FASTER),
        (f"{share:.3f} of the peak memory, at most {LESS_MEMORY} wanted", share <= LESS_MEMORY),
    ):
        print(f"{first}: {said}: {'met' if met else 'MISSED'}")


if __name__ == "__main__":
    main()
