"""Walks through the tutorials as a reader would: every command, its seconds, its exit code, its last words.

    python tests/tutorials.py [images checkpoint cluster sweep] [--long] [--keep FOLDER]

Each page has a folder of its own with what it says is needed: data from the first page, and for checkpoints
the small teacher that its run left. Unless --long, stages take few steps, a sweep three trials, an ablation
one seed. What a machine by itself has not is left out, with the reason. Exit code 1: a command went wrong.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from command_lines import ROOT, blocks, lines

PAGES = ("images", "checkpoint", "cluster", "sweep")  # the first makes what the others need
SHORT = ["guide.steps=100", "sft.steps=100", "distill.optim.steps=50", "reflect.optim.steps=50"]
TRAINING = {"run", "train", "sweep", "ablate"}
FEWER = {"sweep": ["sweep.trials=3"]}
CHECKPOINTS = ("Qwen2-VL-2B-Instruct", "Qwen2-VL-7B-Instruct")
LEFT_OUT = {
    "s3://": "needs a bucket: tests/test_storage.py and others have one",
    "pairs.json": "needs files that the page only names",
    "runs/a-1": "needs runs that the page only names",
    "sweep.warm_start": "needs a sweep that the page only names",
    "BiomedCLIP": "needs a checkpoint: tests/model/test_open_clip_guide.py makes one",
    "mlflow.lab": "needs a server: tests/test_sinks.py has one",
    "head:8265": "needs a cluster's head: tests/ops/test_submit.py has one",
    "kubectl": "needs a Kubernetes",
    "compute.workers=4": "needs four cores",
    "compute.min_workers=4": "needs four cores",
    "make twin": "stands for itself",
    "benchmarks/": "a part of make bench",
    "optuna-dashboard": "stays until it is ended",
    "tensorboard --logdir": "stays until it is ended",
    "--watch": "stays until it is ended",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("pages", nargs="*", metavar="PAGE", help=f"of {', '.join(PAGES)}; none: all")
    parser.add_argument("--long", action="store_true", help="as many steps, trials and seeds as it says")
    parser.add_argument("--keep", type=Path, metavar="FOLDER", help="where it is done; else it is gone after")
    chosen = parser.parse_args()
    if unknown := set(chosen.pages) - set(PAGES):
        parser.error(f"no page {', '.join(sorted(unknown))}; there are {', '.join(PAGES)}")
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    folder = chosen.keep or Path(tempfile.mkdtemp(prefix="tutorials-"))
    failed = 0
    try:
        for page in PAGES:
            if not chosen.pages or page in chosen.pages:
                failed += walk(page, folder.resolve(), chosen.long)
    finally:
        if not chosen.keep:
            shutil.rmtree(folder, ignore_errors=True)
    raise SystemExit(f"{failed} commands did not go well" if failed else 0)


def walk(page: str, folder: Path, long: bool) -> int:
    """One page in ``folder``/page; returns how many of its commands did not go well."""
    place = folder / page
    place.mkdir(parents=True, exist_ok=True)
    furnish(page, place, folder / "images")
    print(f"\n== docs/your-{page}.md", flush=True)
    begun, failed = time.perf_counter(), 0
    for words in steps(ROOT / "docs" / f"your-{page}.md", place):
        said = " ".join(words) if words[0] != sys.executable else "python ..."
        reason = next((reason for part, reason in LEFT_OUT.items() if part in said), None)
        if reason and "--dry-run" not in words:
            print(f"$ {said}\n  left out: {reason}", flush=True)
            continue
        failed += not done(fitted(words, long), place)
    print(f"== {time.perf_counter() - begun:.0f} s, {failed} did not go well", flush=True)
    return failed


def furnish(page: str, place: Path, first: Path) -> None:
    """What the page says is needed; a checkpoint is the first page's teacher."""
    links = {place / name: ROOT / name for name in ("configs", "cluster", "benchmarks")}
    if page != "images":
        home = place / "shared" if page == "cluster" else place
        models = home / ("models" if page == "cluster" else "checkpoints")
        links[home / "data"] = first / "data"
        teachers = sorted((first / "runs" / "artifacts").glob("teacher-*/model"))
        if not teachers:
            raise SystemExit("there is no run of the first page: walk through images first, with --keep")
        links |= {models / name: teachers[0] for name in CHECKPOINTS}
    for link, target in links.items():
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(target)


def steps(page: Path, place: Path) -> Iterator[list[str]]:
    """The page's commands in their order; its files are written on the way."""
    for block in blocks(page):
        for word in block.words:
            if word.startswith("file="):
                (place / word.removeprefix("file=")).write_text(block.text)
        if block.language == "python" and "run" in block.words:
            yield [sys.executable, "-c", block.text]
        if block.language == "bash":
            for words in lines(block.text):
                yield [word.replace("/mnt/shared", str(place / "shared")) for word in words]


def fitted(words: list[str], long: bool) -> list[str]:
    """A command as this machine can take it: without GPUs and, unless ``long``, of few steps."""
    name = words[1] if words[0] == "clinkd" else ""
    if name == "init" and "--gpus" in words:
        at = words.index("--gpus")
        words = [*words[:at], *words[at + 2 :]]
    if long:
        return words
    if name == "ablate" and "--seeds" in words:
        words = [*words[: words.index("--seeds") + 1], "1", *words[words.index("--seeds") + 2 :]]
    if name in TRAINING and not any(word.startswith("runs/") for word in words):
        words = [*words, *(word for word in [*FEWER.get(name, []), *SHORT] if word not in words)]
    return words


def done(words: list[str], place: Path) -> bool:
    """Runs it and tells; whether it went well (what this machine lacks is no fault of a page: doctor)."""
    began = time.perf_counter()
    ended = subprocess.run(words, cwd=place, capture_output=True, text=True, check=False)
    said = (ended.stdout.strip() or ended.stderr.strip()).splitlines()
    shown = " ".join(words) if words[0] != sys.executable else "python ...  (the block above)"
    print(f"$ {shown}\n  {time.perf_counter() - began:.1f} s, exit code {ended.returncode}")
    for line in said[-2:]:
        print(f"  | {line[:160]}")
    well = ended.returncode in ((0, 1) if words[1] == "doctor" else (0,))
    if not well:
        print(ended.stderr[-2000:])
    sys.stdout.flush()
    return well


if __name__ == "__main__":
    main()
