"""Checkpoints of a training stage in a folder that all workers see: whole ones only, the last two.

Decisions:
- Every rank writes its own part into one unfinished folder, which is renamed when all are done: a checkpoint
  that has its name is whole, and a stage that was killed at any moment goes on from the newest of these.
- Two are kept: the newest may have been written by a process that died of what it was about to do next.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

KEPT = 2


class Checkpoints:
    """Of one job.

    Args:
        folder: seen by all ranks. rank: of this process; all of them call ``save`` together.
        barrier: waits for all ranks.
    """

    def __init__(self, folder: Path, rank: int, barrier: Callable[[], None]) -> None:
        self.folder, self.rank, self.barrier = folder, rank, barrier

    def newest(self) -> Path | None:
        """The last whole checkpoint."""
        return max(self._whole(), default=None)

    def save(self, step: int, write: Callable[[Path], None]) -> None:
        """Has each rank ``write`` its part into a folder, which then becomes the checkpoint of ``step``."""
        target = self.folder / f"step-{step:08d}"
        unfinished = target.with_suffix(".unfinished")
        if self.rank == 0:
            shutil.rmtree(unfinished, ignore_errors=True)  # a former attempt's
            unfinished.mkdir(parents=True)
        self.barrier()
        write(unfinished)
        self.barrier()
        if self.rank == 0:
            shutil.rmtree(target, ignore_errors=True)
            unfinished.rename(target)
            for old in sorted(self._whole())[:-KEPT]:
                shutil.rmtree(old, ignore_errors=True)
        self.barrier()  # no rank is killed for being done while the name is not there yet

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
