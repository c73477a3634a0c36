"""What going on takes beyond a checkpoint: the batches a job began with, and a state that fits other ranks.

Decisions:
- A job's steps and the micro-batches of each are those of the number of workers it began with, whoever works
  them off: two workers become one that accumulates twice as often, and the curve stays what it was. Where
  they do not share out evenly, a rank without a micro-batch of its own runs one that counts nothing, for
  collectives want every rank.
- DeepSpeed's shards load at the number of ranks and the ZeRO stage that wrote them. For others rank 0 makes a
  universal checkpoint of them first, once, beside the one it comes from. ZeRO-0 writes no shards: its
  checkpoints fit any number of ranks and no other stage.
- Where a job stands is JSON beside the shards, so that it can be read before an engine is there.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clinkd.data.shards import DataError
from clinkd.train.checkpoint import Checkpoints

BEGUN, STATE, SHARDS, UNIVERSAL = "begun.json", "standing.json", "state", ".universal"


@dataclass(frozen=True)
class Begun:
    """What a job was when it began: optimiser steps, and workers that its batches are dealt for."""

    steps: int
    workers: int


def begun(folder: Path, steps: int, workers: int) -> Begun:
    """How the job whose checkpoints lie in ``folder`` began; it begins now where there are none."""
    path = folder / BEGUN
    if any(child.is_dir() and not child.suffix for child in folder.glob("step-*")) and path.is_file():
        return Begun(**json.loads(path.read_text()))
    found = Begun(steps, workers)
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(asdict(found)))
    os.replace(unfinished, path)
    return found


def places(micros: int, rank: int, world: int) -> list[int | None]:
    """Which of a step's micro-batches a rank works off; None: it runs one that counts nothing."""
    own = [turn * world + rank for turn in range(math.ceil(micros / world))]
    return [place if place < micros else None for place in own]


@dataclass(frozen=True)
class Standing:
    """Where a job stands, as a checkpoint has it.

    ``feed``: where the feed stands; ``ranks`` and ``zero_stage`` wrote the shards; ``begun``: how the job
    began.
    """

    step: int
    ranks: int
    zero_stage: int
    begun: Begun
    feed: dict[str, Any] | None = None

    def write(self, folder: Path) -> None:
        (folder / STATE).write_text(json.dumps(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> Standing:
        kept = json.loads((folder / STATE).read_text())
        return cls(**kept | {"begun": Begun(**kept["begun"])})

    def fits(self, ranks: int, zero_stage: int) -> bool:
        """Whether the shards load as they are."""
        return self.zero_stage == zero_stage and (self.ranks == ranks or zero_stage == 0)


def loadable(
    checkpoints: Checkpoints, world: int, zero_stage: int, barrier: Callable[[], None]
) -> tuple[Path | None, Standing | None, bool]:
    """The newest checkpoint as these ranks can load it; all ranks call it together.

    Returns:
        Its folder, where it stands, and whether it is a universal one; (None, None, False): there is none.

    Raises:
        DataError: it was written under ZeRO-0 and is to go on under another stage, or the other way round; or
            by another version, which kept something else.
    """
    newest = checkpoints.newest()
    if newest is None:
        return None, None, False
    try:
        standing = Standing.read(newest)
    except (OSError, ValueError, KeyError, TypeError):
        raise DataError(
            f"{newest}: its {STATE} is missing or of another version of clinkd; remove {newest.parent} to "
            "begin the stage anew"
        ) from None
    if standing.fits(world, zero_stage):
        return newest, standing, False
    if 0 in (zero_stage, standing.zero_stage):
        raise DataError(
            f"compute.zero_stage: the checkpoint {newest} was written under ZeRO-{standing.zero_stage} and "
            f"cannot go on under ZeRO-{zero_stage}; give {standing.zero_stage}, or remove {newest.parent} "
            "to begin anew"
        )
    universal = newest.with_suffix(UNIVERSAL)
    if checkpoints.rank == 0 and not universal.is_dir():
        _convert(newest, universal)
    barrier()
    return universal, standing, True


def _convert(source: Path, target: Path) -> None:
    from deepspeed.checkpoint.ds_to_universal import main

    unfinished = target.with_suffix(".converting")
    shutil.rmtree(unfinished, ignore_errors=True)
    options = argparse.Namespace(
        input_folder=str(source / SHARDS), output_folder=str(unfinished / SHARDS), num_extract_workers=1,
        num_merge_workers=1, keep_temp_folder=False, strict=True, inject_missing_state=True,
    )  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        main(options)
    unfinished.rename(target)


def keep_lines(path: Path, step: int) -> None:
    """Cuts a metrics file back to the lines of steps up to ``step``; a torn last line goes too."""
    kept = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line)
            except (ValueError, KeyError):
                continue
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text("".join(line + "\n" for line in kept))
    os.replace(unfinished, path)
