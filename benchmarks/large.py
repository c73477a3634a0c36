"""A whole run over data larger than what its processes may hold: memory, bytes read and disk, by stage.

    python benchmarks/large.py --gigabytes 3 [--out FOLDER] [--json FILE] [--share S] [--limit GB] [--cached]
                               [--set KEY=VALUE ...]

Images of about 1 MB each, phantoms under noise that nothing compresses, are written to FOLDER/raw as a
Med-GRIT folder (and found there the next time). Then `clinkd run` trains tiny models on them, a few steps in
each stage, with two CPU workers. Every process under it is sampled four times a second (processes.py).
Printed are peak memory by kind of process, seconds and bytes read by stage, and what lies on disk beside the
data and run.root when a stage ends. Ends with 1 when the run fails, with 2 when a process holds more than
--limit GB of its own. --set changes the configuration; FOLDER/large.log has what the run said.

The images' cached pages are dropped at every stage's start, so that read_bytes says what comes from the disk;
--cached leaves them. rchar counts what read() gives, libraries' files and pipes too, not what is mapped or
comes by sockets. What a stage does before its first line is told as "after" the one before, and a task of
less than a quarter of a second often as ray::IDLE. "own" is anonymous memory and file pages that no other
process maps (processes.py). Bytes on the driver's network are left out: a process has no counters of its own
for sockets.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from processes import Watch

HERE = Path(__file__).resolve().parent
SIDE, DRAWN = 592, 148
PER_GIGABYTE = 970
CHUNK = 32
LINE = re.compile(r"^(?P<title>[\w-]+(?:: [\w ]+)?): (?P<what>started|done)\b")


@dataclass(frozen=True)
class Made:
    """What FOLDER/raw holds."""

    images: int
    seed: int
    side: int
    bytes: int  # of the images


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=3.0)
    parser.add_argument("--out", type=Path, help="kept; none: a folder that is removed at the end")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--share", type=float, default=0.1, help="distill.share")
    parser.add_argument("--limit", type=float, default=1.5, help="GB that a process may hold of its own")
    parser.add_argument("--cached", action="store_true", help="leave the data in the page cache")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="more of the configuration")
    chosen = parser.parse_args()
    folder = (chosen.out or Path(tempfile.mkdtemp(prefix="clinkd-large-"))).resolve()
    # Short: Ray's sockets lie there, and their paths may have 107 bytes.
    scratch = Path(tempfile.mkdtemp(prefix="large-", dir="/tmp"))
    try:
        made = data_set(folder / "raw", max(32, round(chosen.gigabytes * PER_GIGABYTE)))
        found = measured(folder, scratch, made, chosen)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if chosen.out is None:
            shutil.rmtree(folder, ignore_errors=True)
    show(found)
    if chosen.json:
        chosen.json.write_text(json.dumps(found, indent=1) + "\n")
    if found["code"]:
        print(f"the run failed ({found['code']}); its last lines:", *found["last_lines"], sep="\n  ")
        return 1
    over = {kind: peak["own"] for kind, peak in found["memory"].items() if peak["own"] > chosen.limit * 1e9}
    for kind, own in over.items():
        print(f"{kind} held {own / 1e9:.2f} GB of its own, more than {chosen.limit:g} GB")
    return 2 if over else 0


def data_set(raw: Path, images: int, seed: int = 0) -> Made:
    """The raw data, made where they are not there; a Med-GRIT folder."""
    marker = raw / "made.json"
    if marker.is_file():
        made = Made(**json.loads(marker.read_text()))
        if (made.images, made.seed, made.side) == (images, seed, SIDE):
            print(f"{images} images, {made.bytes / 1e9:.2f} GB, are in {raw}", flush=True)
            return made
    began = time.monotonic()
    shutil.rmtree(raw, ignore_errors=True)
    (raw / "images").mkdir(parents=True)
    spans = [(start, min(start + CHUNK, images)) for start in range(0, images, CHUNK)]
    rows: list[dict[str, Any]] = []
    size = 0
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for part, written in pool.map(write_images, [raw] * len(spans), [seed] * len(spans), spans):
            rows += part
            size += written
    (raw / "medgrit.json").write_text(json.dumps(rows))
    os.sync()  # what is not on the disk yet cannot leave the page cache
    made = Made(images, seed, SIDE, size)
    marker.write_text(json.dumps(asdict(made)))
    print(f"{images} images, {size / 1e9:.2f} GB, made in {time.monotonic() - began:.0f} s", flush=True)
    return made


def write_images(raw: Path, seed: int, span: tuple[int, int]) -> tuple[list[dict[str, Any]], int]:
    """Images ``span`` with their Med-GRIT rows, and the bytes written."""
    import zlib
    from io import BytesIO

    import numpy as np
    from PIL import Image

    from clinkd.data.phantoms import PhantomSpec, draw, to_medgrit

    rows, size = [], 0
    for index in range(*span):
        png, record = draw(PhantomSpec(span[1], size=DRAWN, seed=seed), index)
        pixels = np.asarray(Image.open(BytesIO(png)).convert("RGB"))
        pixels = np.kron(pixels, np.ones((SIDE // DRAWN, SIDE // DRAWN, 1), np.uint8))
        noise = np.random.default_rng([seed, index]).integers(0, 192, pixels.shape, np.uint8)
        buffer = BytesIO()
        Image.fromarray(pixels // 4 + noise).save(buffer, "PNG", compress_type=zlib.Z_HUFFMAN_ONLY)
        size += (raw / "images" / record.image).write_bytes(buffer.getvalue())
        rows.append(to_medgrit(record))
    return rows, size


def configuration(folder: Path, share: float) -> dict[str, Any]:
    """Tiny models, a few steps of everything."""
    return {
        "base": str(HERE.parent / "configs" / "tiny.yaml"),
        "run": {"name": "large", "root": str(folder / "runs")},
        "data": {"source": str(folder / "raw"), "test_fraction": 0.05, "validation_fraction": 0.05},
        "model": {"max_pixels": 112 * 112},
        "guide": {"steps": 6},
        "sft": {"steps": 6},
        "distill": {"share": share, "max_label_tokens": 32, "optim": {"steps": 6}},
        "reflect": {
            "rounds": 1, "samples": 16, "validation": 16, "budget": 8, "candidates": 2, "similarity": "rouge",
            "optim": {"steps": 4},
        },
        "evaluate": {"limit": 32, "text_metrics": False, "max_new_tokens": 16},
        "compute": {"workers": 2, "actors": 2},
    }  # fmt: skip


def measured(folder: Path, scratch: Path, made: Made, chosen: argparse.Namespace) -> dict[str, Any]:
    import yaml

    shutil.rmtree(folder / "runs", ignore_errors=True)  # else its stages would be skipped
    config = folder / "large.yaml"
    config.write_text(yaml.safe_dump(configuration(folder, chosen.share)))
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    paths = [str(HERE.parent), *filter(None, [environment.get("PYTHONPATH")])]
    environment |= {"TMPDIR": str(scratch), "PYTHONPATH": os.pathsep.join(paths), "RAY_AUTH_MODE": "disabled"}
    if not chosen.cached:
        drop_pages(folder)
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "clinkd", "run", str(config), *chosen.set], cwd=folder, env=environment,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
    )  # fmt: skip
    watch, disk = Watch(process.pid), Disk(scratch)
    lines: list[str] = []
    try:
        for line in process.stdout or ():
            lines.append(line.rstrip())
            told(line, watch, disk, None if chosen.cached else folder)
        code = process.wait()
    except BaseException:
        process.terminate()  # the run saves what it has, and ends what it started
        process.wait()
        raise
    finally:
        disk.end(watch.stage)
        watch.stop()
        disk.stop()
        (folder / "large.log").write_text("\n".join(lines) + "\n")
    return {
        "gigabytes": chosen.gigabytes, "made": asdict(made), "code": code,
        "seconds": time.monotonic() - began, "last_lines": lines[-15:], "cached": chosen.cached,
        "memory": {
            kind: peak | {"stage": watch.peak_stage.get(kind, ""), "most": watch.most[kind]}
            for kind, peak in watch.peaks.items()
        },
        "memory_by_stage": {stage: dict(kinds) for stage, kinds in watch.stage_peaks.items()},
        "whole": {"own": watch.whole, "stage": watch.whole_stage},
        "stages": {
            stage: {"seconds": watch.seconds[stage], "disk": disk.at_end.get(stage, {}),
                    "read": {kind: dict(counts) for kind, counts in watch.read[stage].items()}}
            for stage in watch.seconds
        },
        "disk_peaks": dict(disk.peaks), "runs_bytes": size_of(folder / "runs"),
        "prepared_bytes": sum(path.stat().st_size for path in shards(folder)),
        "watching_seconds": watch.own_seconds,
    }  # fmt: skip


def told(line: str, watch: Watch, disk: Disk, folder: Path | None) -> None:
    """A line of the run: which stage is under way from now on. ``folder``: drop its data's cached pages."""
    match = LINE.match(line)
    if not match:
        return
    disk.end(watch.stage)
    watch.stage = match["title"] if match["what"] == "started" else f"after {match['title']}"
    print(f"  {line.rstrip()}", flush=True)
    if folder is not None:
        drop_pages(folder)


def shards(folder: Path) -> list[Path]:
    return sorted((folder / "runs").glob("artifacts/prepare-*/**/*.parquet"))


def drop_pages(folder: Path) -> None:
    """Has the kernel forget the data's pages, so that a reader reads from the disk."""
    raw = folder / "raw"
    for path in [raw / "medgrit.json", *(raw / "images").iterdir(), *shards(folder)]:
        try:
            handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError:  # a part of a preparation under way
            continue
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


class Disk:
    """Bytes in the run's own temporary folder and in /dev/shm (as they grew), every two seconds.

    Files that are open and have no name any more are not seen.
    """

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self.peaks: dict[str, int] = defaultdict(int)
        self.at_end: dict[str, dict[str, int]] = {}
        self._shm = shm_used()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, name="disk", daemon=True)
        self._thread.start()

    def _follow(self) -> None:
        while not self._stop.wait(2):
            self.look()

    def look(self) -> dict[str, int]:
        found: Counter[str] = Counter()
        for entry in children(self.scratch):
            size = size_of(entry)
            if entry.name == "ray":
                logs = sum(size_of(path) for path in entry.glob("session_*/logs"))
                found.update({"Ray's logs": logs, "Ray, without logs": size - logs})
            else:
                kind = re.sub(r"(?<=-)\w{8}$|(?<=^tmp)\w{8}$|(?<=^crew)\w{8}$", "*", entry.name)
                found[kind] += size
        found["shared memory"] = max(0, shm_used() - self._shm)
        for name, value in found.items():
            self.peaks[name] = max(self.peaks[name], value)
        return dict(found)

    def end(self, stage: str) -> None:
        self.at_end[stage] = self.look()

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()


def children(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def size_of(path: Path) -> int:
    """Bytes that a file or folder takes on the disk; what goes away meanwhile is left out."""
    try:
        if path.is_symlink() or not path.is_dir():
            return path.lstat().st_blocks * 512
    except OSError:
        return 0
    return sum(size_of(child) for child in children(path))


def shm_used() -> int:
    try:
        there = os.statvfs("/dev/shm")
    except OSError:
        return 0
    return (there.f_blocks - there.f_bfree) * there.f_frsize


def show(found: dict[str, Any]) -> None:
    size = found["made"]["bytes"]
    print(f"\n{'peak MB by kind of process':46}{'own':>7}{'anon':>7}{'rss':>7}{'-shm':>7}{'most':>6}  own in")
    for kind, peak in sorted(found["memory"].items(), key=lambda item: -item[1]["own"]):
        numbers = "".join(f"{peak[name] / 1e6:7.0f}" for name in ("own", "pss_anon", "rss", "rss_unshared"))
        print(f"{kind[:45]:46}{numbers}{peak['most']:6}  {peak['stage']}")
    print(f"{'all at one time':46}{found['whole']['own'] / 1e6:7.0f}{'':27}  {found['whole']['stage']}")
    title = f"MB read of a data set of {size / 1e6:.0f}"
    print(f"\n{title:36}{'s':>7}{'rchar':>9}{'x':>6}{'driver':>9}{'x':>6}{'disk':>9}{'x':>6}{'written':>9}")
    whole: Counter[str] = Counter()
    for stage, facts in found["stages"].items():
        line = Counter(
            {"seconds": facts["seconds"], "driver": facts["read"].get("driver", {}).get("rchar", 0)}
        )
        for counts in facts["read"].values():
            line.update(counts)
        whole.update(line)
        if facts["seconds"] >= 0.5 or line["rchar"] > size / 20:
            print(row(stage, line, size))
    print(row("the whole run", whole, size))
    print(
        f"prepared {found['prepared_bytes'] / 1e6:.0f} MB; run.root takes {found['runs_bytes'] / 1e6:.0f} MB "
        f"on the disk; the sampling took {found['watching_seconds']:.1f} s of CPU"
    )
    names = sorted(name for name, value in found["disk_peaks"].items() if value >= 1e5)
    print("\nMB elsewhere, at a stage's end".ljust(37) + "".join(f"{name[:18]:>19}" for name in names))
    for stage, facts in found["stages"].items():
        if facts["disk"]:
            print(
                stage[:35].ljust(36) + "".join(f"{facts['disk'].get(name, 0) / 1e6:19.1f}" for name in names)
            )
    print("at most".ljust(36) + "".join(f"{found['disk_peaks'][name] / 1e6:19.1f}" for name in names))


def row(name: str, line: Counter[str], size: int) -> str:
    said = f"{name[:35]:36}{line['seconds']:7.1f}"
    for key in ("rchar", "driver", "read_bytes"):
        said += f"{line[key] / 1e6:9.0f}{line[key] / size:6.2f}"
    return said + f"{line['write_bytes'] / 1e6:9.0f}"


if __name__ == "__main__":
    sys.exit(main())
