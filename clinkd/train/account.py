"""Which samples each step trained on, for who wants to look it up (``watch.samples``).

Decisions:
- Each rank writes lines into a file of its own beside the metrics: nothing more travels between ranks.
- Rank 0 cuts all files back to the checkpoint that a job goes on from. The others write only after a step,
  which takes all ranks together, so no line of theirs is lost. However often a job was killed, and whoever
  went on with it, the lines of all files are what its weights were trained on.
- They are named as they come: what a curriculum holds back is not among them, and in reflection mistakes
  stand in the place of a share of what was dealt.
"""

from __future__ import annotations

import json
from pathlib import Path

from clinkd.train.resume import keep_lines

FILE = "samples-{}.jsonl"


class Account:
    """Of one rank.

    Args:
        folder: the job's metrics lie there; seen by all ranks. kept: whether anybody asks for it.
    """

    def __init__(self, folder: Path, rank: int, kept: bool = True) -> None:
        self.folder, self.rank, self.kept = folder, rank, kept
        self._dealt: list[str] = []

    def begin(self, step: int) -> None:
        """A job goes on from ``step``."""
        self._dealt = []
        if self.kept and self.rank == 0:
            for path in self.folder.glob(FILE.format("*")):
                keep_lines(path, step)

    def deal(self, samples: list[str]) -> None:
        """They stand in the step under way."""
        self._dealt += samples

    def write(self, step: int) -> None:
        """That step is done."""
        if not self.kept:
            return
        line = {"step": step, "samples": self._dealt}
        with (self.folder / FILE.format(self.rank)).open("a") as lines:
            lines.write(json.dumps(line) + "\n")
        self._dealt = []


def dealt(folder: Path) -> dict[int, list[str]]:
    """Samples of each step, over all ranks."""
    found: dict[int, list[str]] = {}
    for path in sorted(folder.glob(FILE.format("*"))):
        for text in path.read_text().splitlines():
            line = json.loads(text)
            found.setdefault(line["step"], []).extend(line["samples"])
    return dict(sorted(found.items()))
