"""Questions put to a model in parts, each kept as a file as soon as it is answered.

Decisions:
- What is in a part follows from what is asked alone, and a part's seed from its number: a run
  that was killed asks only for the parts that are missing, and what comes out is what would have come out.
- The desks (evaluate/pool.py) stay between rounds; only on GPUs, which training wants for itself, they go.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clinkd.data.reading import Questions
from clinkd.evaluate.pool import AnswerPool
from clinkd.evaluate.predict import PredictSpec
from clinkd.progress import Progress
from clinkd.stages.base import Run, write_whole

PART = 16
"""Records of a part."""


@dataclass
class Desks:
    """The actors of a stage, ``gpus`` for each; started when they are first needed."""

    actors: int
    progress: Progress
    gpus: float = 0.0
    _pool: AnswerPool | None = None
    _shared: bool = False

    @classmethod
    def of(cls, run: Run) -> Desks:
        """Return the run's own, which stay for its later stages; on GPUs, or a cluster, new ones."""
        from clinkd import cluster

        compute = run.config.compute
        desks = run.kept.get("desks") or cls(compute.actors, run.progress, compute.gpus_per_actor)
        if cluster.started_here() and not desks.gpus and "desks" not in run.kept:
            run.keep("desks", contextlib.closing(desks))
            desks._shared = True
        return desks

    def pool(self) -> AnswerPool:
        if self._pool is None:
            # No CPU is set aside: training would lack it, when the desks have nothing to do.
            self._pool = AnswerPool(self.actors, cpus=0, gpus=self.gpus)
        return self._pool

    def make_room(self) -> None:
        """Before training: gives back what it needs."""
        if self.gpus:
            self.close()

    def __enter__(self) -> Desks:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._shared:
            self.close()

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def ask(
        self, spec: PredictSpec, questions: Questions, folder: Path, title: str, seed: int
    ) -> list[dict[str, Any]]:
        """Answers about all turns of the records, in their order.

        Args:
            folder: where the parts are kept.
        """
        folder.mkdir(parents=True, exist_ok=True)
        count = -(-len(questions) // PART)
        files = [folder / f"part-{number:05d}.jsonl" for number in range(count)]
        missing = [number for number, file in enumerate(files) if not file.is_file()]
        if missing:
            self.progress.start(title, len(questions))
            done = PART * (count - len(missing))
            parts = (
                (number, questions.part(number * PART, (number + 1) * PART), seed + number)
                for number in missing
            )
            for number, answered in self.pool().answers(spec, questions.shards, parts):
                write_whole(files[number], "".join(json.dumps(row) + "\n" for row in answered))
                done += PART
                self.progress.update(min(done, len(questions)), record=False)
        return [json.loads(line) for file in files for line in file.read_text().splitlines()]
