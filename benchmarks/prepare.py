"""Prepare at two sizes: seconds, records a second, the ratio of the times, and each process's peak memory.

    python benchmarks/prepare.py --records 20000

writes twice as many phantoms as a Med-GRIT folder (JSON and images) once, then prepares the first half and
the whole, in turn, ``--rounds`` times each, in one Ray. The source is read and written on the local disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import psutil


class Peaks:
    """The largest resident memory of each process under this one, sampled four times a second."""

    def __init__(self) -> None:
        self.mib: dict[str, float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        me = psutil.Process()
        while not self._stop.wait(0.25):
            for process in [me, *me.children(recursive=True)]:
                try:
                    name = "driver" if process == me else process.name()
                    memory = process.memory_info()
                    own = (memory.rss - memory.shared) / 2**20  # without the object store, which all map
                except psutil.Error:
                    continue
                self.mib[name] = max(self.mib.get(name, 0.0), own)

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def draw(folder: Path, count: int, start: int, stop: int) -> list[dict]:
    from clinkd.data.phantoms import PhantomSpec
    from clinkd.data.phantoms import draw as phantom

    rows = []
    for index in range(start, stop):
        png, record = phantom(PhantomSpec(count), index)
        (folder / "images" / record.image).write_bytes(png)
        talk = [[turn.question, turn.answer] for turn in record.turns]
        rows.append({"id": record.id, "image": record.image, "conversations": talk})
    return rows


def write_lab(folder: Path, records: int) -> None:
    (folder / "images").mkdir(parents=True)
    step = 1000
    with ProcessPoolExecutor() as pool:
        jobs = [
            pool.submit(draw, folder, records, start, min(start + step, records))
            for start in range(0, records, step)
        ]
        rows = [row for job in jobs for row in job.result()]
    for name, share in (("half.json", rows[: records // 2]), ("whole.json", rows)):
        with (folder / name).open("w") as file:
            json.dump(share, file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--records", type=int, default=20_000, help="records of the smaller size")
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    from clinkd import cluster
    from clinkd.data.phantoms import PhantomSpec
    from clinkd.data.prepare import prepare

    folder = Path(tempfile.mkdtemp(prefix="clinkd-bench-"))
    try:
        started = time.monotonic()
        write_lab(folder / "lab", 2 * arguments.records)
        print(f"{2 * arguments.records} phantoms drawn in {time.monotonic() - started:.0f} s")
        cluster.connect()
        prepare(PhantomSpec(64), folder / "warm", images_per_shard=16)  # workers started, modules imported
        peaks = Peaks()
        seconds: dict[str, list[float]] = {"half": [], "whole": []}
        for _ in range(arguments.rounds):
            for name in ("half", "whole"):
                started = time.monotonic()
                manifest = prepare(folder / "lab" / f"{name}.json", folder / "out")
                seconds[name].append(time.monotonic() - started)
                count, spent = manifest["images"], seconds[name][-1]
                print(f"{name}: {count} records in {spent:.1f} s, {count / spent:.0f}/s")
                shutil.rmtree(folder / "out")
        peaks.stop()
        cluster.disconnect()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    half, whole = (statistics.median(seconds[name]) for name in ("half", "whole"))
    print(f"twice the records take {whole / half:.2f} times the time")
    for name, mib in sorted(peaks.mib.items(), key=lambda item: -item[1]):
        print(f"  peak of {name}: {mib:.0f} MiB")


if __name__ == "__main__":
    main()
