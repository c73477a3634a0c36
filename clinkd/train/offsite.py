"""Copies of a job's checkpoints in a bucket or on another disk, for when the folder of the run is gone.

Decisions:
- Copying happens in a thread of rank 0 while training goes on, from hard links: the folder that a checkpoint
  had may be gone before its copy is done. Of several that wait only the newest is copied.
- A copy counts once ``newest.json`` names it, written last. It is found by reading that file alone: listings
  of a bucket may be stale. Folders carry the attempt's own mark, so that one which was thought dead and wakes
  up writes beside the new one, never over it, and sees by ``attempt.json`` that it has to stop.
- What comes back is checked against its manifest like any checkpoint; one that is not whole is not taken.
- A store that fails costs a warning, never the training.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clinkd import metrics, storage
from clinkd.train.checkpoint import KEPT, MANIFEST, damage

NEWEST, ATTEMPT = "newest.json", "attempt.json"
FETCHES = 3


class Offsite:
    """The store of one job, on its rank 0.

    Args:
        where: a folder or URI of this job alone. folder: of its checkpoints here.
        warn: is told in a line what fails.
    """

    def __init__(self, where: str, folder: Path, warn: Callable[[str], None]) -> None:
        self.place, self.folder, self.warn = storage.locate(where), folder, warn
        self.mark = uuid.uuid4().hex[:8]
        self._wanted: Path | None = None
        self._sent = 0.0  # when; unix seconds
        self._fenced = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._busy = False

    def begin(self) -> None:
        """Fetches the newest copy where there is no checkpoint here, and makes this the job's attempt."""
        metrics.CHECKPOINT_COPIED.set(time.time())  # there is nothing yet that is not copied
        with self._warning("cannot be read"):
            if not any(path.is_dir() and not path.suffix for path in self.folder.glob("step-*")):
                self._fetch()
            storage.make_folder(self.place)
            storage.write_whole(self.place / ATTEMPT, json.dumps({"attempt": self.mark}))

    def send(self, checkpoint: Path) -> None:
        """Has a checkpoint copied; returns at once."""
        if self._fenced:
            return
        linked = self.folder / f"{checkpoint.name}.sending"
        shutil.rmtree(linked, ignore_errors=True)
        shutil.copytree(checkpoint, linked, copy_function=_link)
        with self._changed:
            if self._wanted is not None and self._wanted != linked:
                shutil.rmtree(self._wanted, ignore_errors=True)
            self._wanted, self._sent = linked, time.time()
            metrics.CHECKPOINT_SENT.set(self._sent)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="offsite", daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def close(self, seconds: float) -> None:
        """Waits until what was sent is there, at most so long; 0 gives up at once what is under way."""
        if not seconds:
            self._fenced, self.warn = True, lambda text: None
            return
        with self._changed:
            done = self._changed.wait_for(lambda: self._wanted is None and not self._busy, seconds)
        if not done:
            self.warn(f"{self.place}: the last checkpoint's copy took over {seconds:g} s and was given up")

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._wanted is not None)
                linked, self._wanted, self._busy = self._wanted, None, True
                sent = self._sent
            assert linked is not None
            with self._warning("cannot be written"):
                self._copy(linked, sent)
            shutil.rmtree(linked, ignore_errors=True)
            with self._changed:
                self._busy = False
                self._changed.notify_all()

    def _copy(self, linked: Path, sent: float) -> None:
        if self._read(ATTEMPT).get("attempt", self.mark) != self.mark:
            self._fenced = True
            self.warn(f"{self.place}: another attempt of this job writes there; this one stops copying")
            return
        name = f"{linked.stem}-{self.mark}"
        files = sorted(path for path in linked.rglob("*") if path.is_file())
        for path in sorted(files, key=lambda path: path.name == MANIFEST):
            if self._fenced:
                return
            storage.copy_to(path, self.place / name / path.relative_to(linked).as_posix())
        before = [other for other in self._read(NEWEST).get("steps", []) if other != name]
        steps = [*before, name]
        storage.write_whole(self.place / NEWEST, json.dumps({"steps": steps[-KEPT:]}))
        metrics.CHECKPOINT_COPIED.set(sent)
        for old in steps[:-KEPT]:
            storage.remove(self.place / old)

    def _fetch(self) -> None:
        for name in reversed(self._read(NEWEST).get("steps", [])):
            step = str(name).rpartition("-")[0]
            unfinished = self.folder / f"{step}.unfinished"
            for _ in range(FETCHES):
                shutil.rmtree(unfinished, ignore_errors=True)
                fault = self._get(str(name), unfinished)
                if not fault:
                    unfinished.rename(self.folder / step)
                    return
            self.warn(f"{self.place / name}: {fault}; the one before is taken")

    def _get(self, name: str, target: Path) -> str:
        """Copies a checkpoint from the store; returns what is wrong with it, empty where nothing is."""
        source = self.place / name
        try:
            files = json.loads((source / MANIFEST).read_bytes())
            for file in [*files, MANIFEST]:
                inside = (target / file).resolve()
                if not inside.is_relative_to(target.resolve()):
                    return f"{MANIFEST} names {file}, outside of its folder"
                inside.parent.mkdir(parents=True, exist_ok=True)
                storage.copy_from(source / file, inside)
        except FileNotFoundError as error:
            return f"a file is missing ({error})"
        except (OSError, ValueError) as error:
            return str(error)
        return damage(target)

    def _read(self, name: str) -> dict[str, Any]:
        try:
            found = json.loads((self.place / name).read_bytes())
        except (FileNotFoundError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    @contextlib.contextmanager
    def _warning(self, what: str) -> Any:
        try:
            yield
        except Exception as error:
            if not storage.outage(error):
                raise
            first = (str(error).splitlines() or [type(error).__name__])[0]
            self.warn(f"{self.place} {what} ({first}); training goes on without copies of its checkpoints")


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)
