"""A sweep in TensorBoard: a folder a trial with its scores at the rungs, and the hparams plugin's table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


class Board:
    """Event files under ``folder``, written as the driver hears of rungs.

    A trial that goes on after a kill writes into the same folder: TensorBoard reads the files together.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writers: dict[int, Any] = {}

    def rung(self, number: int, scores: Mapping[str, float], step: int) -> None:
        from tensorboardX import SummaryWriter

        if number not in self._writers:
            self._writers[number] = SummaryWriter(str(self.folder / f"trial-{number:04d}"), flush_secs=2)
        for name, value in scores.items():
            self._writers[number].add_scalar(name, value, step)

    def ended(self, number: int, values: Mapping[str, Any], scores: Mapping[str, float]) -> None:
        from tensorboardX.summary import hparams

        writer = self._writers.pop(number, None)
        if writer is None:
            return
        plain = {
            key: value if isinstance(value, (bool, int, float, str)) else json.dumps(value)
            for key, value in values.items()
        }
        for summary in hparams(plain, dict(scores)):
            writer.file_writer.add_summary(summary)
        writer.close()

    def close(self) -> None:
        for writer in self._writers.values():
            writer.close()
        self._writers = {}
