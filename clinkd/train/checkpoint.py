"""Checkpoints of a training stage in a folder that all workers see: whole ones only, the last two.

Decisions:
- Every rank writes its own part into one unfinished folder, which is renamed when all are done: a checkpoint
  that has its name is whole, and a stage that was killed at any moment goes on from the newest of these.
- Two are kept: the newest may have been written by a process that died of what it was about to do next, or be
  damaged on the disk.
- A manifest of sizes and SHA-256, the ranks sharing the work, is read back before anything is loaded, which
  DeepSpeed does by pickle: what is not byte for byte what was written is set aside under ``.damaged`` with a
  note of what is wrong, and the one before is taken.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clinkd import metrics, storage
from clinkd.data.shards import DataError

KEPT = 2
ROOM = 1 << 20  # bytes free, under which a write that failed is put down to the disk
MANIFEST, FAULT = "manifest.json", "fault.txt"


class Checkpoints:
    """Of one job.

    Args:
        folder: seen by all ranks. rank: of this process, of ``world``; all of them call ``newest`` and
            ``save`` together.
        barrier: waits for all ranks.
    """

    def __init__(self, folder: Path, rank: int, barrier: Callable[[], None], world: int = 1) -> None:
        self.folder, self.rank, self.barrier, self.world = folder, rank, barrier, world
        folder.mkdir(parents=True, exist_ok=True)

    def newest(self) -> Path | None:
        """The last checkpoint that is what was written; damaged ones are set aside, with a warning."""
        if self.rank == 0:
            for path in sorted(self._whole(), reverse=True):
                fault = damage(path)
                if not fault:
                    break
                aside = path.with_name(f"{path.name}.damaged")
                shutil.rmtree(aside, ignore_errors=True)
                path.rename(aside)
                (aside / FAULT).write_text(fault + "\n")
                warnings.warn(f"checkpoint {path}: {fault}; set aside as {aside.name}", stacklevel=2)
        self.barrier()
        return max(self._whole(), default=None)

    def save(self, step: int, write: Callable[[Path], None]) -> int:
        """Has each rank ``write`` its part into a folder, which then becomes the checkpoint of ``step``.

        Returns:
            Bytes of it, on rank 0.

        Raises:
            DataError: the disk is full; what was there before is whole.
        """
        try:
            return self._save(step, write)
        except (OSError, RuntimeError) as error:  # torch's writer hides what the disk said
            free = shutil.disk_usage(self.folder).free
            if getattr(error, "errno", None) not in (errno.ENOSPC, errno.EDQUOT) and free > ROOM:
                raise
            raise DataError(
                f"{self.folder}: no room for the checkpoint of step {step} ({free / 2**20:.0f} MiB free); "
                "make room, and the same command goes on from the one before"
            ) from error

    def _save(self, step: int, write: Callable[[Path], None]) -> int:
        begun = time.time()
        target = self.folder / step_name(step)
        unfinished = target.with_suffix(".unfinished")
        if self.rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)  # a former attempt's
            unfinished.mkdir(parents=True)
        self.barrier()
        write(unfinished)
        self.barrier()
        parts = target.with_suffix(".manifest")
        if self.rank == 0:
            shutil.rmtree(parts, ignore_errors=True)
            parts.mkdir()
        self.barrier()
        own = _files(unfinished)[self.rank :: self.world]
        (parts / str(self.rank)).write_text(json.dumps({name: _facts(unfinished / name) for name in own}))
        self.barrier()
        found: dict[str, Any] = {}
        if self.rank == 0:
            for part in parts.iterdir():
                found |= json.loads(part.read_text())
            (unfinished / MANIFEST).write_text(json.dumps(found, indent=1, sort_keys=True))
            shutil.rmtree(parts)
            shutil.rmtree(target, ignore_errors=True)
            unfinished.rename(target)
            kept = sorted(self._whole())[-KEPT:]
            for old in self.folder.glob("step-*"):
                if old not in kept and old.suffix not in (".damaged", ".sending"):
                    shutil.rmtree(old, ignore_errors=True)
        self.barrier()  # no rank is killed for being done while the name is not there yet
        size = sum(size for size, _ in found.values())
        if self.rank == 0:
            metrics.CHECKPOINT_SAVED.set(time.time())
            metrics.CHECKPOINT_SECONDS.set(time.time() - begun)
            metrics.CHECKPOINT_SIZE.set(size)
        return size

    def adopt(self, source: Path) -> None:
        """Takes over another job's checkpoint, a folder ``step-*``, where it is not there yet."""
        target = self.folder / source.name
        if not target.is_dir():
            unfinished = target.with_suffix(".unfinished")
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.copytree(source, unfinished)
            unfinished.rename(target)

    def _whole(self) -> list[Path]:
        return [path for path in self.folder.glob("step-*") if not path.suffix]


def step_name(step: int) -> str:
    """A checkpoint's folder."""
    return f"step-{step:08d}"


def damage(path: Path) -> str:
    """What of a checkpoint is not what its manifest says; empty: nothing."""
    try:
        written = {name: list(facts) for name, facts in json.loads((path / MANIFEST).read_bytes()).items()}
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, AttributeError, TypeError, OSError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    there = set(_files(path))
    for name in sorted(written.keys() | there):
        if name not in there:
            return f"{name} is missing"
        if name not in written:
            return f"{name} is not in the manifest"
        if _facts(path / name) != written[name]:
            return f"{name} is not what was written"
    return ""


def _files(path: Path) -> list[str]:
    """Relative names of all files but the manifest, sorted."""
    names = (file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())
    return sorted(name for name in names if name != MANIFEST)


def _facts(file: Path) -> list[Any]:
    """Size and SHA-256 of a file, once it is on the disk."""
    with file.open("rb") as opened:
        os.fsync(opened.fileno())
    return [file.stat().st_size, storage.sha256(file)]
