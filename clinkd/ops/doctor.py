"""Whether this machine can do what clinkd asks of it: one line a check, with the remedy.

Decisions:
- A check tries the thing itself where that is cheap (a socket is bound, a file goes to the bucket and back)
  and reads a version only where nothing can be tried.
- ``failed`` is what stops the main job, ``warning`` what some of it goes without; only the first gives exit
  code 1.
- Nothing secret is printed: where credentials come from, never what they are.
"""

from __future__ import annotations

import importlib
import os
import shutil
import socket
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from clinkd import storage

State = Literal["ok", "warning", "failed"]
SHM = Path("/dev/shm")
LEAST_SHM, LEAST_DISK = 2.0, 10.0
"""GiB: Ray's object store and the DataLoader's buffers; a small run's artifacts and checkpoints."""
PACKAGES = ("ray", "deepspeed", "transformers", "optuna", "pyarrow")
PORTS = {6379: "Ray's head", 8265: "Ray's dashboard", 10001: "Ray's client"}


@dataclass(frozen=True)
class Finding:
    """What a check found, in one line, and what to do where it is not well."""

    name: str
    state: State
    found: str
    remedy: str = ""

    def line(self) -> str:
        return f"{self.state:8}{self.name:16}{self.found}" + (f"; {self.remedy}" if self.remedy else "")


def doctor(root: Path, bucket: str | None = None) -> Iterator[Finding]:
    """All checks, one after the other.

    Args:
        root: where runs would be kept. bucket: a URI that a file is written to, read back from and removed.
    """
    checks: list[Callable[[], Finding]] = [
        python, torch, *map(_package, PACKAGES), gpu, compiler, java, memory, shared_memory,
        lambda: disk(root), ports,
    ]  # fmt: skip
    if bucket is not None:
        checks.append(lambda: round_trip(bucket))
    for check in checks:
        try:
            yield check()
        except Exception as error:
            yield Finding(getattr(check, "__name__", "check"), "failed", f"{type(error).__name__}: {error}")


def python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    inside = sys.prefix != sys.base_prefix or "CONDA_PREFIX" in os.environ
    if not inside:
        return Finding("Python", "warning", f"{found}, no virtual environment", "python3 -m venv .venv")
    return Finding("Python", "ok", found)


def _package(name: str) -> Callable[[], Finding]:
    def check() -> Finding:
        try:
            found = version(name)
        except PackageNotFoundError:
            return Finding(name, "failed", "not installed", "make install, or pip install clinkd")
        try:
            if name == "deepspeed" and not shutil.which("nvidia-smi"):
                os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else it warns that it chose that
            importlib.import_module(name)
        except Exception as error:
            first = (str(error).splitlines() or [type(error).__name__])[0]
            return Finding(name, "failed", f"{found} does not import ({first})", f"reinstall {name}")
        return Finding(name, "ok", found)

    return check


def torch() -> Finding:
    found = _package("torch")()
    if found.state != "ok":
        return found
    import torch as library

    built = f"CUDA {library.version.cuda}" if library.version.cuda else "CPU build"
    return Finding("torch", "ok", f"{found.found}, {built}, {library.get_num_threads()} threads")


def gpu() -> Finding:
    import torch as library

    count = library.cuda.device_count() if library.cuda.is_available() else 0
    if count:
        properties = library.cuda.get_device_properties(0)
        each = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        return Finding("GPU", "ok", f"{count} x {each}")
    if shutil.which("nvidia-smi"):
        remedy = "install torch's CUDA build" if not library.version.cuda else "look at the driver's version"
        return Finding("GPU", "warning", "a driver is there, torch sees no GPU", remedy)
    return Finding("GPU", "ok", "none; everything runs on CPUs")


def compiler() -> Finding:
    """Check for the compilers that DeepSpeed needs on a machine with GPUs, where it builds its operators."""
    found = next(filter(None, (shutil.which(name) for name in ("g++", "c++", "clang++"))), None)
    if not shutil.which("nvidia-smi"):
        return Finding("C++ compiler", "ok", found or "none; on CPUs nothing is compiled")
    if found is None:
        return Finding("C++ compiler", "warning", "none", "apt install g++: DeepSpeed's operators need it")
    if not (shutil.which("nvcc") or os.environ.get("CUDA_HOME")):
        return Finding(
            "C++ compiler",
            "warning",
            f"{found}, no nvcc",
            "set CUDA_HOME, or use an image with built operators",
        )
    return Finding("C++ compiler", "ok", found)


def java() -> Finding:
    from clinkd.evaluate.java import find_java, java_version

    launcher = find_java()
    found = java_version(launcher) if launcher else None
    if found is None:
        remedy = "apt install default-jre-headless, or evaluate.text_metrics=false"
        return Finding("Java", "warning", "none: no METEOR, no PTB tokens", remedy)
    return Finding("Java", "ok", found)


def memory() -> Finding:
    import psutil

    whole = psutil.virtual_memory()
    found = f"{whole.available / 2**30:.0f} of {whole.total / 2**30:.0f} GiB free"
    if whole.available < 4 * 2**30:
        return Finding("memory", "warning", found, "the small run wants 4 GiB")
    return Finding("memory", "ok", found)


def shared_memory() -> Finding:
    if not SHM.is_dir():
        return Finding("shared memory", "ok", "no /dev/shm; Ray keeps objects in files")
    whole = shutil.disk_usage(SHM)
    found = f"{whole.free / 2**30:.1f} of {whole.total / 2**30:.1f} GiB free in {SHM}"
    if whole.free < LEAST_SHM * 2**30:
        return Finding(
            "shared memory", "warning", found, "docker: --shm-size=8g; Kubernetes: a memory emptyDir"
        )
    return Finding("shared memory", "ok", found)


def disk(root: Path) -> Finding:
    there = next(path for path in (root.absolute(), *root.absolute().parents) if path.exists())
    free = shutil.disk_usage(there).free / 2**30
    with tempfile.TemporaryFile(dir=there if there.is_dir() else there.parent) as probe:
        probe.write(b"clinkd")
    found = f"{free:.0f} GiB free under {there}"
    if free < LEAST_DISK:
        return Finding(
            "disk", "warning", found, f"runs want {LEAST_DISK:.0f} GiB; give run.root=/another/folder"
        )
    return Finding("disk", "ok", found)


def ports() -> Finding:
    """Loopback sockets can be had; a taken standard port only matters to ``ray start``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
    taken = [f"{port} ({what})" for port, what in PORTS.items() if _listening(port)]
    if taken:
        return Finding("ports", "ok", f"in use: {', '.join(taken)}; `ray start` would need others")
    return Finding("ports", "ok", "free for Ray")


def _listening(port: int) -> bool:
    with socket.socket() as probe:
        probe.settimeout(0.5)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def round_trip(bucket: str) -> Finding:
    """A few bytes to the bucket and back."""
    import time

    place = storage.locate(bucket) / f"clinkd-doctor-{uuid.uuid4().hex}"
    text = uuid.uuid4().bytes * 4096
    begun = time.monotonic()
    try:
        with storage.whole(place) as file:
            file.write(text)
        back = place.read_bytes()
        place.unlink()
    except Exception as error:
        if not storage.outage(error):
            raise
        first = (str(error).splitlines() or [type(error).__name__])[0]
        remedy = "credentials come from the environment, a profile or a role; endpoint: AWS_ENDPOINT_URL_S3"
        return Finding("storage", "failed", f"{bucket}: {first}", remedy)
    if back != text:
        return Finding("storage", "failed", f"{bucket}: other bytes came back than were written")
    return Finding("storage", "ok", f"{bucket}: 64 KiB there and back in {time.monotonic() - begun:.2f} s")
