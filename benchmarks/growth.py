"""How time and the driver's memory grow with the records: preparation, index, sampler, start, reading.

    python benchmarks/growth.py [--sizes 5000,20000,80000] [--only NAME ...] [--out FOLDER] [--json FILE]

The records are images of 32 x 32 pixels with 8 turns each, as a Med-GRIT folder; what prepare makes of it is
what the others read. Each measurement runs in a process of its own, after the same on 64 records, so that
imports and Ray's start are not counted. Printed are seconds, the growth of the driver's anonymous memory at
its highest (Arrow's and numpy's memory too), how many times the size before took, and the slope of log time
and log memory over log records: 1 is growth in proportion. Then ten million turns are planned, and packed.
--out keeps the data for the next time.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent
WARM = 64
SIDE, COARSE = 32, 8
POOL = 64
"""Phantoms whose turns are dealt out in turn; every record has an image of its own."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sizes", default="5000,20000,80000")
    parser.add_argument("--only", nargs="*", choices=list(MEASURES), default=list(MEASURES))
    parser.add_argument("--out", type=Path, help="kept; none: a folder that is removed at the end")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    chosen = parser.parse_args()
    if chosen.measure:
        print(json.dumps(one(chosen.measure[0], Path(chosen.measure[1]))))
        return
    sizes = sorted(int(size) for size in chosen.sizes.split(","))
    folder = (chosen.out or Path(tempfile.mkdtemp(prefix="clinkd-growth-"))).resolve()
    found: dict[str, dict[int, dict[str, float]]] = {name: {} for name in MEASURES if name in chosen.only}
    try:
        write_raw(folder / str(WARM) / "raw", WARM)
        for size in sizes:
            write_raw(folder / str(size) / "raw", size)
            prepared = (folder / str(size) / "data" / "manifest.json").is_file()
            for name in MEASURES:
                if name in found or (name == "prepare" and not prepared):
                    line = measured(name, folder / str(size))
                    found.setdefault(name, {})[size] = line
                    print(f"{name}, {size} records: {line['seconds']:.2f} s, {line['mb']:.1f} MB", flush=True)
    finally:
        if chosen.out is None:
            shutil.rmtree(folder, ignore_errors=True)
    show(found)
    if "sampler" in chosen.only:
        ten_million()
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1) + "\n")


# --- What is measured. Each gets a prepared folder (prepare: its parent), works under `watched`, and returns
# what that tells. All of them are called in a process of their own, first on 64 records.


def measure_prepare(data: Path) -> dict[str, float]:
    """From the Med-GRIT folder to shards; the driver's part in it."""
    from clinkd.data.prepare import prepare

    shutil.rmtree(data, ignore_errors=True)
    few = data.parent.name == str(WARM)  # cut up all the same, so that all of Ray's workers have started
    with watched() as found:
        prepare(data.parent / "raw", data, images_per_shard=8 if few else 512)
    return found


def measure_index(data: Path) -> dict[str, float]:
    """Where the records of the training split stand."""
    from clinkd.data.index import build_index
    from clinkd.data.shards import Shards

    with watched() as found:
        index = build_index(Shards.of(data), "train")
    index.write(data.parent / "index.arrow")
    return found


def measure_sampler(data: Path) -> dict[str, float]:
    """The plan of one epoch for two lanes, out of the index on the disk."""
    from clinkd.data.index import RecordIndex
    from clinkd.data.sampler import Epoch, SamplerOptions

    path = data.parent / "index.arrow"
    if not path.is_file():
        measure_index(data)
    with watched() as found:
        epoch = Epoch(RecordIndex.read(path), SamplerOptions(0, 8, per_group=4), 0, 2)
    found["steps"] = epoch.rounds
    return found


def measure_start(data: Path) -> dict[str, float]:
    """Index, sampler and the first batch, as a stage's driver and one of its workers make them."""
    from clinkd.data.feed import order_of
    from clinkd.data.index import build_index
    from clinkd.data.reading import KEPT_BYTES, Records
    from clinkd.data.sampler import BatchSampler, Position, SamplerOptions
    from clinkd.data.shards import Shards
    from clinkd.model.rope import RopeGuidance
    from clinkd.train.batches import BatchSpec

    maker = BatchSpec(str(model()), RopeGuidance())
    with watched() as found:
        shards = Shards.of(data)
        index = build_index(shards, "train")
        index.write(data.parent / "start.arrow")
        sampler = BatchSampler(index, SamplerOptions(0, 8, per_group=4), lanes=2)
        maker.make(order_of(index, sampler.batch(Position(), 0), 0), Records(shards, KEPT_BYTES))
    return found


class Counting:
    """The work of an actor that counts the turns of what it reads: all of labelling but the model."""

    def tables(self, batches: Any) -> Iterator[Any]:
        import pyarrow as pa

        yield pa.table({"turns": [len(record["turns"]) for records in batches for record in records]})


def measure_reading(data: Path) -> dict[str, float]:
    """All records through two actors that read them, as labelling, scoring and predicting do."""
    from clinkd.data.index import build_index
    from clinkd.data.pieces import work_on
    from clinkd.data.reading import Questions
    from clinkd.data.shards import Shards

    shards = Shards.of(data)
    index = build_index(shards, None)
    with watched() as found:
        tables = list(work_on(Questions(shards, index.place), Counting, actors=2))
    assert sum(sum(table.column("turns").to_pylist()) for table in tables) == index.starts[-1]
    return found


@functools.cache
def model() -> Path:
    """A tokenizer and an image processor."""
    from clinkd.data.boxes import to_qwen
    from clinkd.model.presets import TinySize, write_new_model

    turns = [turn for record in records() for turn in record.turns]
    texts = [to_qwen(text) for turn in turns for text in (turn.question, turn.answer)]
    size = TinySize(hidden=64, layers=1, heads=2, mlp=64, vision_hidden=32, vision_layers=1)
    return write_new_model(
        texts, size, Path(tempfile.mkdtemp(prefix="clinkd-growth-model-")), vocab_size=800, seed=0
    )


def ten_million() -> None:
    """An epoch of ten million turns, planned and packed."""
    import pyarrow as pa

    from clinkd.data.index import RecordIndex
    from clinkd.data.sampler import Epoch, SamplerOptions

    count = 1_250_000
    at = np.arange(count, dtype=np.int32)
    columns = {
        "shard": at // 4096,
        "group": at % 4096 // 64,
        "row": at % 64,
        "turns": np.full(count, 8, np.int32),
    }
    columns |= {"group_bytes": np.full(count, 4 << 20)}
    index = RecordIndex(pa.table({"id": pa.array(at.astype(str))} | columns))
    tokens = np.random.default_rng(0).integers(40, 90, 8 * count).astype(np.int32)
    ends = np.arange(0, 8 * count + 1, 8, dtype=np.int32)
    listed = pa.ListArray.from_arrays(pa.array(ends), pa.array(tokens))
    measured_index = RecordIndex(index.table.append_column("lengths", listed))
    for name, of, options in (
        ("planned", index, SamplerOptions(0, 8, per_group=4)),
        ("planned and packed", measured_index, SamplerOptions(0, 8, per_group=4, tokens=2048)),
    ):
        with watched() as found:
            Epoch(of, options, 0, 8)
        print(f"ten million turns {name}: {found['seconds']:.1f} s, {found['mb']:.0f} MB", flush=True)


# --- End of what is measured.

MEASURES: dict[str, Callable[[Path], dict[str, float]]] = {
    "prepare": measure_prepare,
    "index": measure_index,
    "sampler": measure_sampler,
    "start": measure_start,
    "reading": measure_reading,
}


@contextlib.contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Seconds of the block, and MB by which this process's anonymous memory grew at most meanwhile."""
    import gc

    gc.collect()
    found: dict[str, float] = {}
    before = peak = anonymous()
    stop = threading.Event()

    def follow() -> None:
        nonlocal peak
        while not stop.wait(0.02):
            peak = max(peak, anonymous())

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    began = time.perf_counter()
    try:
        yield found
    finally:
        found["seconds"] = time.perf_counter() - began
        peak = max(peak, anonymous())
        stop.set()
        thread.join()
        found["mb"] = (peak - before) / 1e6


def anonymous() -> int:
    """Bytes of this process's anonymous memory."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise RuntimeError("no RssAnon in /proc/self/status: this benchmark needs Linux")


def one(name: str, folder: Path) -> dict[str, float]:
    """A measurement in this process: once on few records, then on those of ``folder``."""
    os.environ["RAY_AUTH_MODE"] = "disabled"
    from clinkd import cluster

    cluster.connect()
    try:
        warm = folder.parent / str(WARM) / "data"
        if name != "prepare" and not warm.is_dir():
            measure_prepare(warm)
        MEASURES[name](warm)
        return MEASURES[name](folder / "data")
    finally:
        cluster.disconnect()


def measured(name: str, folder: Path) -> dict[str, float]:
    """The same in a process of its own."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    paths = [str(HERE.parent), *filter(None, [environment.get("PYTHONPATH")])]
    command = [sys.executable, str(HERE / "growth.py"), "--measure", name, str(folder)]
    done = subprocess.run(
        command, env=environment | {"PYTHONPATH": os.pathsep.join(paths)}, stdout=subprocess.PIPE, text=True,
        check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{name} of {folder.name} records failed ({done.returncode})")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def write_raw(raw: Path, count: int) -> None:
    """A Med-GRIT folder, made where it is not there; the JSON comes last."""
    if (raw / "medgrit.json").is_file():
        return
    began = time.monotonic()
    shutil.rmtree(raw, ignore_errors=True)
    (raw / "images").mkdir(parents=True)
    spans = [(start, min(start + 2000, count)) for start in range(0, count, 2000)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        rows = [row for part in pool.map(write_images, [raw] * len(spans), spans) for row in part]
    unfinished = raw / "medgrit.tmp"
    with unfinished.open("w") as file:
        json.dump(rows, file)
    unfinished.replace(raw / "medgrit.json")
    print(f"{count} records written in {time.monotonic() - began:.1f} s", flush=True)


def write_images(raw: Path, span: tuple[int, int]) -> list[dict[str, Any]]:
    """Clouds of noise, no two alike (prepare looks for near-duplicates), with the turns of phantoms."""
    from dataclasses import replace
    from io import BytesIO

    from PIL import Image

    from clinkd.data.phantoms import image_name, to_medgrit

    pool, rows = records(), []
    for index in range(*span):
        coarse = np.random.default_rng([1, index]).integers(0, 256, (COARSE, COARSE), np.uint8)
        pixels = np.kron(coarse, np.ones((SIDE // COARSE, SIDE // COARSE), np.uint8))
        buffer, name = BytesIO(), image_name(index)
        Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
        (raw / "images" / name).write_bytes(buffer.getvalue())
        rows.append(to_medgrit(replace(pool[index % POOL], id=name[:-4], image=name)))
    return rows


@functools.cache
def records() -> list[Any]:
    """Phantoms' records of 8 turns."""
    from clinkd.data.phantoms import PhantomSpec, draw

    spec = PhantomSpec(POOL, size=56, min_objects=3, max_objects=3)  # 2 turns of each object, and two
    return [draw(spec, index)[1] for index in range(POOL)]


def show(found: dict[str, dict[int, dict[str, float]]]) -> None:
    print(
        f"\n{'':16}{'records':>10}{'s':>9}{'times':>8}{'us/record':>11}{'MB':>9}{'times':>8}{'B/record':>10}"
    )
    for name, lines in found.items():
        last: dict[str, float] = {}
        for size, line in lines.items():
            said = f"{name:16}{size:10}"
            for key, scale, width in (("seconds", 1e6, 9), ("mb", 1e6, 9)):
                times = f"{line[key] / last[key]:8.2f}" if last.get(key, 0) > 0 else f"{'':8}"
                share = line[key] * scale / size
                said += f"{line[key]:{width}.2f}{times}{share:{11 if key == 'seconds' else 10}.0f}"
            print(said)
            last = line
        print(f"{'  slope':26}{slope(lines, 'seconds'):9.2f}{'':19}{slope(lines, 'mb'):9.2f}")


def slope(lines: dict[int, dict[str, float]], key: str) -> float:
    """Of log value over log records; nan for fewer than two sizes, or where nothing grew."""
    points = [(size, line[key]) for size, line in lines.items() if line[key] > 0]
    if len(points) < 2:
        return float("nan")
    sizes, values = np.log(np.array(points)).T
    return float(np.polyfit(sizes, values, 1)[0])


if __name__ == "__main__":
    main()
