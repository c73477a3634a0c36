"""What copying checkpoints to a slow bucket costs training: the same job without and with it.

    python benchmarks/offsite.py [--steps N] [--every N] [--delay S] [--rounds N] [--workers N]

Both sides are jobs of one Ray Train crew under ZeRO-1 on phantoms, with a checkpoint every so many steps; on
one side each is copied to an S3 server on loopback that answers every request --delay seconds late. Sides
alternate; the first job warms up and does not count. Printed: seconds of all steps of a job and of the whole
job (which waits for its last copy), medians over rounds, and their ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))  # the S3 server with faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--delay", type=float, default=0.2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=1)
    chosen = parser.parse_args()
    os.environ.update(
        RAY_AUTH_MODE="disabled", AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test",
        AWS_DEFAULT_REGION="us-east-1", DS_ACCELERATOR="cpu",
    )  # fmt: skip
    from faulty_s3 import BUCKET, faulty_s3

    with faulty_s3() as (endpoint, faults), tempfile.TemporaryDirectory() as folder:
        faults.slow, faults.delay = 1, chosen.delay
        os.environ["AWS_ENDPOINT_URL_S3"] = endpoint
        found = measure(Path(folder), f"s3://{BUCKET}/copies", chosen)
        print(f"{faults.seen['requests']} requests, each {1e3 * chosen.delay:.0f} ms late")
    for at, what in enumerate(("steps", "whole job")):
        without, copied = (
            statistics.median(times[at] for times in found[side]) for side in ("none", "copied")
        )
        print(f"{what}: {without:.2f} s without, {copied:.2f} s with copies, ratio {copied / without:.3f}")


def measure(folder: Path, store: str, chosen: argparse.Namespace) -> dict[str, list[tuple[float, float]]]:
    import ray
    from phantom_task import phantom_table, task, write_model, write_shards

    from clinkd import cluster
    from clinkd.config import ComputeSection, OptimSection
    from clinkd.model.presets import TinySize
    from clinkd.train.crew import Crew
    from clinkd.train.loop import TrainJob

    cluster.connect(workers=chosen.workers)
    table = phantom_table(64)
    size = TinySize(
        hidden=128, layers=3, heads=4, mlp=384, vision_hidden=96, vision_layers=3, patch=14, image_size=112
    )
    model = write_model(table, size, folder / "model")
    compute = ComputeSection(workers=chosen.workers, checkpoint_every=chosen.every)
    ray.cloudpickle.register_pickle_by_value(sys.modules["phantom_task"])
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)

    data = write_shards(table, folder / "data")

    def make() -> Any:
        return task(data, model, folder, 5, 5)

    with Crew(compute, folder / "crew") as crew:
        for turn in range(2 * chosen.rounds + 1):
            side = "copied" if turn % 2 else "none"
            out = folder / f"{side}-{turn}"
            out.mkdir()
            job = TrainJob(
                stage="teacher", make_task=make, optim=OptimSection(batch_size=5, questions_per_image=5),
                compute=compute, zero_stage=1, steps=chosen.steps, seed=0, out=str(out),
                work=str(out / "work"),
                store=f"{store}/{turn}" if side == "copied" else None,
            )  # fmt: skip
            begun = time.perf_counter()
            crew.fit(job)
            whole = time.perf_counter() - begun
            lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
            if turn:
                found[side].append((sum(line["seconds"] for line in lines), whole))
            print(
                f"{side}: {sum(line['seconds'] for line in lines):.2f} s of steps, {whole:.2f} s", flush=True
            )
    cluster.disconnect()
    return found


if __name__ == "__main__":
    main()
