"""Questions put to a model in parts, each kept as a file as soon as it is answered.

Decisions:
- What is in a part follows from the names of what is asked alone, and a part's seed from its number: a run
  that was killed asks only for the parts that are missing, and what comes out is what would have come out.
- The desks (evaluate/pool.py) stay between rounds; only on GPUs, which training wants for itself, they go.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clinkd.data.shards import DataError
from clinkd.evaluate.pool import AnswerPool
from clinkd.evaluate.predict import PredictSpec
from clinkd.progress import Progress
from clinkd.stages.base import Run, write_whole

PART = 16
"""Records of a part."""


class Records:
    """Reads records of prepared data through Ray Data, and keeps the last that were asked for."""

    def __init__(self, data: Path, blocks: int) -> None:
        self.data, self.blocks = data, blocks
        self._ids: list[str] = []
        self._rows: list[dict[str, Any]] = []

    def __call__(self, ids: list[str]) -> Iterable[dict[str, Any]]:
        from clinkd.data.ingest import read_records

        if ids != self._ids:
            self._rows = list(read_records(self.data, ids=ids, blocks=self.blocks).iter_rows())
            self._ids = ids
        return self._rows


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
        self,
        spec: PredictSpec,
        names: list[str],
        rows: Callable[[list[str]], Iterable[dict[str, Any]]],
        folder: Path,
        title: str,
        seed: int,
    ) -> list[dict[str, Any]]:
        """Answers about the records ``names``, all turns of them, in the order of the samples.

        Args:
            names: sorted.
            rows: gives the records (with ``id``) of some of the names, in any order.
            folder: where the parts are kept.
        """
        folder.mkdir(parents=True, exist_ok=True)
        place = {name: number // PART for number, name in enumerate(names)}
        files = {number: folder / f"part-{number:05d}.jsonl" for number in sorted(set(place.values()))}
        missing = {number for number, file in files.items() if not file.is_file()}
        if missing:
            wanted = [name for name in names if place[name] in missing]
            self.progress.start(title, len(names))
            done = len(names) - len(wanted)
            parts = _parts(rows(wanted), {name: place[name] for name in wanted}, seed)
            for number, answered in self.pool().answers(spec, parts):
                write_whole(files[number], "".join(json.dumps(row) + "\n" for row in answered))
                done += sum(found == number for found in place.values())
                self.progress.update(done, record=False)
        return [json.loads(line) for file in files.values() for line in file.read_text().splitlines()]


def _parts(
    rows: Iterable[dict[str, Any]], place: dict[str, int], seed: int
) -> Iterator[tuple[int, list[dict[str, Any]], int]]:
    """(number, records, seed) of each part as soon as all its records are there.

    Raises:
        DataError: records that never came.
    """
    wanted: dict[int, int] = {}
    for number in place.values():
        wanted[number] = wanted.get(number, 0) + 1
    held: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        number = place[row["id"]]
        held.setdefault(number, []).append(row)
        if len(held[number]) == wanted[number]:
            records = sorted(held.pop(number), key=lambda record: str(record["id"]))
            yield number, records, seed + number
            del wanted[number]
    if wanted:
        missing = sum(count - len(held.get(number, [])) for number, count in wanted.items())
        raise DataError(f"{missing} of the records asked about are not in the prepared data: prepare again")
