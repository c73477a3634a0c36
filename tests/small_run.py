"""A run on a few phantoms by the command line, whole and small."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

CONFIG = Path(__file__).parent.parent / "configs" / "tiny.yaml"
SMALL = [
    "data.phantoms=48", "data.test_fraction=0.34", "data.validation_fraction=0.2", "guide.steps=4",
    "sft.steps=4", "rope.gamma=0.5", "distill.share=0.5", "distill.optim.steps=4", "reflect.optim.steps=4",
    "reflect.samples=12", "reflect.validation=16", "reflect.budget=4", "reflect.candidates=2",
    "reflect.similarity=rouge", "evaluate.text_metrics=false", "evaluate.max_new_tokens=12",
    "compute.checkpoint_every=2", "sinks.tensorboard=true",
]  # fmt: skip


def clinkd(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "clinkd", *arguments]
    return subprocess.run(
        command, cwd=folder, env=_environment(), capture_output=True, text=True, timeout=1500, check=False
    )


def here(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The same in this process, on the Ray of all tests: for a command that nobody kills."""
    from clinkd import cluster
    from clinkd.cli import main

    said, before = io.StringIO(), Path.cwd()
    started = cluster.started_here()
    os.chdir(folder)
    cluster.adopt(True)  # its workers may stay from stage to stage
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()) as out:
            code = main(list(arguments))
    finally:
        cluster.adopt(started)
        os.chdir(before)
    return subprocess.CompletedProcess(["clinkd", *arguments], code, out.getvalue(), said.getvalue())


def start(folder: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """The same in the background, in a process group of its own that can be killed whole."""
    return subprocess.Popen(
        [sys.executable, "-m", "clinkd", *arguments], cwd=folder, env=_environment(), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


def _environment() -> dict[str, str]:
    return {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
