"""A training step of the project's loop (Ray Train, DeepSpeed) against a bare torch loop.

    python benchmarks/train_step.py [--zero N ...] [--steps N] [--warm N] [--rounds N] [--threads N]

Both sides train the same model (text of 4 layers x 256; phantoms) on the same batches of the same sampler in
the same order, with torch's AdamW, the same groups, clipping and schedule, on one process with as many
threads. Ours is ``clinkd.train.crew.Crew`` with one worker, for each ZeRO stage; the bare loop runs in a
process of its own, without Ray or DeepSpeed, and makes its batches with the same task. Ray is started before
each of our runs and gone before the next bare one.

A round is one run of every side; a run is --warm steps that are not counted and --steps that are, each from
the making of its batch to its line in the metrics. Printed are medians over the steps of all rounds, by the
clock and by the process's CPU seconds, which other work disturbs less, and their ratios. In the first round
the losses of all steps are held against the bare loop's before anything is printed: the first five within
1e-4, relative, the rest within 1e-2, for rounding grows with each step.

"Where it goes" is the mean of a step in ms, by timers around the parts of either loop. On our side all-reduce
is the loop's own two (counts, sums of the losses) and DeepSpeed's of gradients, which are not counted again
in the parts that call them; moving the batch and reading the losses is in the rest. Timers are in the times
above.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

from step_times import PARTS, Times, timed_worker

MOST = 1.05


def main() -> None:
    chosen = arguments()
    os.environ["RAY_AUTH_MODE"] = "disabled"  # unset, ray.init leaves a token in the home folder
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ["OMP_NUM_THREADS"] = str(chosen.threads)  # what Ray sets for its workers
    from phantom_task import phantom_table, write_model

    from clinkd.model.presets import TinySize

    size = TinySize(
        hidden=256, layers=4, heads=4, mlp=1024, vision_hidden=64, vision_layers=2, patch=14, image_size=112
    )
    sides = ["bare", *(f"ZeRO {zero}" for zero in chosen.zero)]
    found: dict[str, list[Path]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        table = phantom_table(chosen.images)
        write_model(table, size, Path(folder, "model"))
        for turn in range(chosen.rounds):
            for side in sides:
                out = Path(folder, f"{side}-{turn}")
                out.mkdir()
                run = (
                    (run_bare, (chosen, table, out))
                    if side == "bare"
                    else (run_ours, (chosen, table, out, side))
                )
                process = multiprocessing.get_context("spawn").Process(target=run[0], args=run[1])
                process.start()
                process.join()
                if process.exitcode:
                    raise SystemExit(f"{side}: ended with {process.exitcode}")
                found[side].append(out)
                clock = statistics.median(one for one, _ in counted(out, chosen)[0])
                print(f"round {turn + 1}: {side}: {1e3 * clock:.1f} ms a step", flush=True)
            if turn == 0:
                compare({side: outs[0] for side, outs in found.items()})
        report(found, chosen)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--zero", type=int, nargs="+", default=[0, 1, 2], choices=[0, 1, 2])
    for name, value in (
        ("steps", 40), ("warm", 10), ("rounds", 3), ("threads", 1), ("images", 48), ("batch", 4),
        ("questions", 4),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=value)
    return parser.parse_args()


def options(chosen: argparse.Namespace) -> Any:
    from clinkd.config import OptimSection

    return OptimSection(batch_size=chosen.batch, questions_per_image=chosen.questions, lr=1e-3, vision_lr=0.1)


def run_ours(chosen: argparse.Namespace, table: Any, out: Path, side: str) -> None:
    """The stage as the project runs it, its worker's steps timed."""
    import phantom_task
    import step_times
    from ray import cloudpickle

    from clinkd import cluster
    from clinkd.config import ComputeSection
    from clinkd.train.crew import Crew
    from clinkd.train.loop import TrainJob

    for module in (
        phantom_task,
        step_times,
        sys.modules[__name__],
    ):  # workers do not find this folder's modules
        cloudpickle.register_pickle_by_value(module)
    compute = ComputeSection(
        workers=1, cpus_per_worker=chosen.threads, checkpoint_every=10**6, max_failures=0
    )
    model, zero = out.parent / "model", int(side.split()[1])

    data, optim = phantom_task.write_shards(table, out / "data"), options(chosen)

    def make_task() -> Any:
        from clinkd.train import loop

        loop.Worker = timed_worker(loop.Worker, out)  # type: ignore[misc]  # run_job makes one next
        return phantom_task.task(data, model, out, optim.batch_size, optim.questions_per_image)

    job = TrainJob(
        "bench", make_task, options(chosen), compute, zero, chosen.warm + chosen.steps, seed=0, out=str(out),
        work=str(out / "work"),
    )  # fmt: skip
    cluster.connect(workers=1, cpus_per_worker=chosen.threads)
    with Crew(compute, out / "crew") as crew:
        crew.fit(job)
    cluster.disconnect()


def run_bare(chosen: argparse.Namespace, table: Any, out: Path) -> None:
    """What one would write without Ray and DeepSpeed."""
    import phantom_task
    import torch

    from clinkd.train.engine import learning_rate, parameter_groups
    from clinkd.train.feed import Share

    os.setsid()  # as Ray's workers: Linux may share cores out by session
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    optim, total, times = options(chosen), chosen.warm + chosen.steps, Times()
    data = phantom_task.write_shards(table, out / "data")
    task = phantom_task.task(data, out.parent / "model", out, optim.batch_size, optim.questions_per_image)
    feed = task.feed(Share(1, 1, (0,), 0, total, total), torch.device("cpu"))
    module = task.build()
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(
        parameter_groups(module, optim), lr=optim.lr, betas=(0.9, 0.98), weight_decay=optim.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: learning_rate(step, total, optim))
    with (out / "metrics.jsonl").open("w") as lines:
        for step in range(total):
            with times.step():
                with times.part("batch"):
                    inputs, tokens, *_ = next(feed)
                with times.part("forward"):
                    loss = module(**inputs)["loss"] / tokens
                with times.part("backward"):
                    loss.backward()
                with times.part("optimiser"):
                    torch.nn.utils.clip_grad_norm_(weights, optim.clip)
                    optimiser.step()
                    schedule.step()
                    optimiser.zero_grad()
                with times.part("log"):
                    samples = len(inputs["input_ids"])
                    lines.write(
                        json.dumps({"step": step + 1, "loss": loss.item(), "samples": samples}) + "\n"
                    )
    times.write(out)


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def compare(outs: dict[str, Path]) -> None:
    wanted = losses(outs["bare"])
    for side, out in outs.items():
        found = losses(out)
        if len(found) != len(wanted):
            raise SystemExit(f"{side}: {len(found)} steps, the bare loop took {len(wanted)}")
        off = [abs(one - other) / other for one, other in zip(found, wanted, strict=True)]
        if not (max(off[:5]) <= 1e-4 and max(off) <= 1e-2):
            raise SystemExit(
                f"{side}: losses off the bare loop's by {max(off[:5]):.1e}, later {max(off):.1e}"
            )
        print(
            f"{side}: losses {found[0]:.3f} to {found[-1]:.3f}, off the bare loop's by {max(off):.1e} at most"
        )


def counted(out: Path, chosen: argparse.Namespace) -> tuple[list[Any], list[Any]]:
    found = json.loads((out / "times.json").read_text())
    return found["steps"][chosen.warm :], found["parts"][chosen.warm :]


def report(found: dict[str, list[Path]], chosen: argparse.Namespace) -> None:
    lines = (found["bare"][0] / "metrics.jsonl").read_text().splitlines()[chosen.warm :]
    samples = statistics.mean(json.loads(line)["samples"] for line in lines)
    print(f"\n{samples:.1f} samples a step, {chosen.threads} threads; {chosen.rounds} x {chosen.steps} steps")
    print(
        f"{'side':10}{'ms':>9}{'samples/s':>11}{'ratio':>8}{'CPU ms':>9}{'ratio':>8}  where it goes, mean ms"
    )
    base = None
    for side, outs in found.items():
        both = [counted(out, chosen) for out in outs]
        steps = [step for steps, _ in both for step in steps]
        parts = [part for _, parts in both for part in parts]
        clock, cpu = (statistics.median(column) for column in zip(*steps, strict=True))
        base = base or (clock, cpu)
        mean = {name: 1e3 * statistics.mean(part.get(name, 0.0) for part in parts) for name in PARTS}
        mean["rest"] = 1e3 * statistics.mean(clock for clock, _ in steps) - sum(mean.values())
        print(
            f"{side:10}{1e3 * clock:9.1f}{samples / clock:11.1f}{clock / base[0]:8.3f}{1e3 * cpu:9.1f}"
            f"{cpu / base[1]:8.3f}  " + ", ".join(f"{name} {spent:.1f}" for name, spent in mean.items())
        )
        if side != "bare":
            print(f"{side}: at most {MOST}x wanted: {'met' if clock / base[0] <= MOST else 'MISSED'}")


if __name__ == "__main__":
    main()
