"""Artifacts: what a stage made, addressed by what it was made from.

Decisions:
- An artifact's name is ``<stage>-<first 12 of its fingerprint>``: same inputs and settings, same folder, so
  runs and trials share what they have in common.
- A stage writes into ``<name>.partial``. ``commit`` lists all files with size and SHA-256 in
  ``artifact.json``, syncs all to disk and renames the folder: there is never a half artifact under a final
  name, whatever is killed. A kill between listing and renaming is finished by whoever looks next.
- The partial folder outlives a killed attempt, so that a stage resumes inside; its ``work/`` is for
  what only the stage itself needs (checkpoints), and is gone after the commit.
- Building takes an flock, which the kernel releases with the process: no stale locks. The lock's file stays.
- An artifact found damaged is renamed to ``<name>.damaged-N`` and reported, then counts as not there.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import os
import platform
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from clinkd import storage

MARKER, WORK, ATTEMPTS = "artifact.json", "work", ".attempts.jsonl"
UNFINISHED = ".artifact.json.tmp"
PACKAGES = ("clinkd", "torch", "transformers", "deepspeed", "ray", "pyarrow", "numpy")


class ArtifactBusy(RuntimeError):
    """Another process builds this artifact; one line says which."""


def fingerprint(stage: str, inputs: Mapping[str, str], settings: Mapping[str, Any], version: int = 1) -> str:
    """SHA-256 of the canonical JSON of all that decides what a stage makes.

    Args:
        inputs: fingerprints of the artifacts read, by name.
        settings: the part of the configuration that matters to the stage, JSON types only.
        version: of the stage's code; raise it when the same settings come to make something else.

    Raises:
        TypeError, ValueError: settings that JSON cannot hold (NaN among them).
    """
    value = {"stage": stage, "inputs": dict(inputs), "settings": dict(settings), "version": version}
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Artifact:
    """A whole artifact; ``meta`` is its artifact.json."""

    stage: str
    path: Path
    fingerprint: str
    meta: dict[str, Any]

    def verify(self) -> list[str]:
        """Reads every byte: the files whose content is not what was committed."""
        return [
            name
            for name, (_, digest) in self.meta["files"].items()
            if storage.sha256(self.path / name) != digest
        ]


class Draft:
    """An artifact in the making: write into ``path``, keep what only resuming needs in ``work``.

    ``artifact`` is set when another process had made it in the meantime: there is nothing left to do.
    """

    def __init__(
        self, store: Store, stage: str, fp: str, inputs: Mapping[str, str], settings: Mapping
    ) -> None:
        self.stage, self.fingerprint = stage, fp
        self.path = store.root / f"{_name(stage, fp)}.partial"
        self.artifact: Artifact | None = None
        self._store, self._inputs, self._settings = store, dict(inputs), dict(settings)
        self._before, self._started = 0.0, time.time()
        self._digests: dict[str, str] = {}

    def know(self, digests: Mapping[str, str]) -> None:
        """SHA-256 of files by their name in ``path``, as who wrote them worked them out: a commit need not
        read these again."""
        self._digests.update(digests)

    @property
    def work(self) -> Path:
        """A folder that survives between attempts and is deleted by the commit."""
        folder = self.path / WORK
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    def commit(self, counts: Mapping[str, Any] | None = None) -> Artifact:
        """Makes the artifact final; the draft is not to be written to any more."""
        if self.artifact is not None:
            shutil.rmtree(self.path, ignore_errors=True)
            return self.artifact
        files = _listing(self.path, self._digests)
        meta: dict[str, Any] = {
            "stage": self.stage,
            "fingerprint": self.fingerprint,
            "inputs": self._inputs,
            "settings": self._settings,
            "counts": dict(counts or {}),
            "seconds": round(self._before + time.time() - self._started, 3),
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "versions": versions(),
            "files": files,
        }
        for name in files:
            _sync(self.path / name)
        _write_synced(self.path / MARKER, json.dumps(meta, indent=1, ensure_ascii=False) + "\n")
        self.artifact = self._store._finish(self.stage, self.fingerprint)
        if self.artifact is None:
            raise RuntimeError(f"{self.path} changed while it was committed")
        return self.artifact

    def _open(self) -> None:
        """Adds up the former attempts and notes this one."""
        self.path.mkdir(parents=True, exist_ok=True)
        self._before = _seconds_before(self.path)
        self._note({"started": self._started})

    def _note(self, line: dict[str, float]) -> None:
        if self.path.is_dir():
            with (self.path / ATTEMPTS).open("a") as file:
                file.write(json.dumps(line) + "\n")


class Store:
    """All artifacts under one root, shared by every run beside it.

    Args:
        root: usually ``<run.root>/artifacts``; made when needed.
        report: told, in one line, what was set aside as damaged.
    """

    def __init__(self, root: Path, report: Callable[[str], None] | None = None) -> None:
        self.root = Path(root).absolute()
        self._report = report or logging.getLogger(__name__).warning

    def find(self, stage: str, fp: str) -> Artifact | None:
        """The artifact, if it is there and whole: marker present, every file there with its size.

        A damaged one is set aside as ``.damaged-N`` and reported; the answer is None then.
        """
        path = self.root / _name(stage, fp)
        if not path.is_dir():
            with contextlib.suppress(ArtifactBusy):  # the builder itself is at it
                if (path.parent / f"{path.name}.partial" / MARKER).is_file():
                    with self._locked(stage, fp):
                        return self._finish(stage, fp)
            if not path.is_dir():
                return None
        meta, fault = _inspect(path, fp)
        if not fault:
            return Artifact(stage, path, fp, meta)
        aside = self._set_aside(path)
        if aside is not None:
            self._report(f"{path} is damaged ({fault}): set aside as {aside.name}; it will be made again")
        return None

    @contextlib.contextmanager
    def build(
        self, stage: str, fp: str, inputs: Mapping[str, str], settings: Mapping[str, Any]
    ) -> Iterator[Draft]:
        """Locks the artifact for this process and yields its draft, with all a killed attempt left in it.

        Raises:
            ArtifactBusy: another process builds it.
        """
        with self._locked(stage, fp):
            draft = Draft(self, stage, fp, inputs, settings)
            draft.artifact = self._finish(stage, fp) or self.find(stage, fp)
            draft._open()
            try:
                yield draft
            finally:
                if draft.artifact is not None:
                    shutil.rmtree(draft.path, ignore_errors=True)
                draft._note({"ended": time.time()})

    @contextlib.contextmanager
    def _locked(self, stage: str, fp: str) -> Iterator[None]:
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / f"{_name(stage, fp)}.lock").open("a+") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read().strip() or "another process"
                raise ArtifactBusy(
                    f"{_name(stage, fp)}: {holder} is building it; wait until that ends, or end it, "
                    "and run this again"
                ) from None
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            yield

    def _finish(self, stage: str, fp: str) -> Artifact | None:
        """Renames a partial folder whose listing is complete; the lock is held. None: nothing to finish."""
        path = self.root / _name(stage, fp)
        partial = path.parent / f"{path.name}.partial"
        if path.exists() or not (partial / MARKER).is_file():
            return None
        meta, fault = _inspect(partial, fp)
        if fault:  # written to after the listing: the stage goes on and lists anew
            (partial / MARKER).unlink()
            return None
        shutil.rmtree(partial / WORK, ignore_errors=True)
        (partial / ATTEMPTS).unlink(missing_ok=True)
        for folder in (*(p for p in partial.rglob("*") if p.is_dir()), partial):
            _sync(folder)
        os.replace(partial, path)
        _sync(self.root)
        return Artifact(stage, path, fp, meta)

    def _set_aside(self, path: Path) -> Path | None:
        number = 1
        while (aside := path.parent / f"{path.name}.damaged-{number}").exists():
            number += 1
        try:
            path.rename(aside)
        except FileNotFoundError:  # another process was faster
            return None
        return aside


@functools.cache
def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that results depend on; null for what is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def _name(stage: str, fp: str) -> str:
    return f"{stage}-{fp[:12]}"


def _inspect(path: Path, fp: str) -> tuple[dict[str, Any], str]:
    """(meta, what is wrong with it or "")."""
    try:
        meta = json.loads((path / MARKER).read_text(encoding="utf-8"))
        files = dict(meta["files"])
        sizes = {name: int(size) for name, (size, _) in files.items()}
    except FileNotFoundError:
        return {}, f"no {MARKER}"
    except (ValueError, TypeError, KeyError, OSError) as error:
        return {}, f"{MARKER} cannot be read: {error}"
    if meta.get("fingerprint") != fp:
        return {}, f"{MARKER} holds another fingerprint"
    for name, size in sizes.items():
        try:
            found = (path / name).stat().st_size
        except OSError:
            return {}, f"{name} is missing"
        if found != size:
            return {}, f"{name} has {found} bytes, {size} were written"
    return meta, ""


def _listing(path: Path, known: Mapping[str, str]) -> dict[str, list[Any]]:
    """{relative name: [bytes, SHA-256]} of all files but the marker, the attempts and ``work/``.

    ``known``: digests that need not be worked out.
    """
    files = {}
    for file in sorted(path.rglob("*")):
        relative = file.relative_to(path)
        if file.is_file() and relative.parts[0] not in (WORK, MARKER, ATTEMPTS, UNFINISHED):
            name = relative.as_posix()
            files[name] = [file.stat().st_size, known.get(name) or storage.sha256(file)]
    return files


def _seconds_before(path: Path) -> float:
    """Working seconds of former attempts; one that was killed lasted until its newest file."""
    lines = []
    with contextlib.suppress(FileNotFoundError):
        for text in (path / ATTEMPTS).read_text().splitlines():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(text))
    total, begun = 0.0, None
    for line in lines:
        if "started" in line:
            begun = line["started"]
        elif begun is not None:
            total, begun = total + line["ended"] - begun, None
    if begun is not None:
        newest = max((p.stat().st_mtime for p in path.rglob("*")), default=begun)
        total += max(0.0, newest - begun)
        with (path / ATTEMPTS).open("a") as file:
            file.write("\n" + json.dumps({"ended": max(begun, newest)}) + "\n")
    return total


def _write_synced(path: Path, text: str) -> None:
    beside = path.parent / UNFINISHED
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
