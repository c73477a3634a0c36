"""The guide's scores beside the shards: how well image and question fit, and which patches the question is
about.

Decisions:
- One row per sample. Relevance is kept in steps of 1/255, on the guide's own grid of each image: a hundred
  bytes or two a question, whatever the answering model's resolution. Whoever reads it gets it for the grid
  of merged patches at hand.
- Scores made on the fly go through the same steps (``quantise``), so a model meets in use what it met in
  training.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from clinkd.data.lookup import Lookup

if TYPE_CHECKING:
    import pyarrow as pa

FILE = "scores.parquet"

Grid = tuple[int, int]  # rows, columns


class Score(NamedTuple):
    """What the guide says of one question about a record's images.

    Args:
        alignment: in [0, 1].
        relevance: [cells of all images] uint8, 255 is 1; each image's row by row.
        grids: of each image.
    """

    alignment: float
    relevance: np.ndarray
    grids: tuple[Grid, ...]

    def on(self, merged: Sequence[Grid]) -> np.ndarray:
        """Relevance float32 in [0, 1] on the grids of merged patches of the record's images, end to end.

        Raises:
            ValueError: another number of images than were scored, or an encoder without dense features.
        """
        if len(self.relevance) == 0:
            raise ValueError(
                "scores: the guide's encoder tells no patches apart; it can guide rope.mode=pair"
            )
        if len(merged) != len(self.grids):
            raise ValueError(f"scores: relevance of {len(self.grids)} images for a record of {len(merged)}")
        values = self.relevance.astype(np.float32) / 255
        cells = np.cumsum([rows * columns for rows, columns in self.grids])[:-1]
        parts = zip(np.split(values, cells), self.grids, merged, strict=True)
        return np.concatenate([regrid(part, grid, wanted) for part, grid, wanted in parts])


def mean(scores: Sequence[Score]) -> Score:
    """The score of several questions at once, all about the same images."""
    if len(scores) == 1:
        return scores[0]
    relevance = np.rint(np.mean([score.relevance for score in scores], axis=0)).astype(np.uint8)
    return Score(float(np.mean([score.alignment for score in scores])), relevance, scores[0].grids)


def quantise(relevance: np.ndarray) -> np.ndarray:
    """[0, 1] to uint8."""
    return np.rint(np.clip(relevance, 0, 1) * 255).astype(np.uint8)


def regrid(values: np.ndarray, grid: Grid, merged: Grid) -> np.ndarray:
    """A map over an image, [rows * columns] of ``grid``, as means over the cells of another grid."""
    if grid == merged:
        return values
    down, across = _overlaps(grid[0], merged[0]), _overlaps(grid[1], merged[1])
    return (down @ values.reshape(grid) @ across.T).reshape(-1).astype(values.dtype)


@lru_cache(maxsize=256)
def _overlaps(cells: int, wanted: int) -> np.ndarray:
    """[wanted, cells] share of each wanted cell that lies in each given one; rows add up to 1."""
    edges = np.arange(cells) / cells, np.arange(wanted) / wanted
    ends = [np.append(edge[1:], 1.0) for edge in edges]
    high = np.minimum(ends[0][None, :], ends[1][:, None])
    low = np.maximum(edges[0][None, :], edges[1][:, None])
    shares = np.clip(high - low, 0, None)
    return shares / shares.sum(1, keepdims=True)


def scores_table(samples: Any, alignment: Any, relevance: Any, rows: Any, columns: Any) -> pa.Table:
    """Scores as they are kept; every argument is a column, of Arrow or plain, with a row for each sample.

    Args:
        alignment: float. relevance: lists of uint8. rows, columns: lists, of each image's grid.
    """
    import pyarrow as pa

    kinds = {
        "sample": (samples, pa.string()), "alignment": (alignment, pa.float32()),
        "relevance": (relevance, pa.list_(pa.uint8())), "rows": (rows, pa.list_(pa.uint16())),
        "columns": (columns, pa.list_(pa.uint16())),
    }  # fmt: skip
    return pa.table(
        {
            name: value.cast(kind) if hasattr(value, "cast") else pa.array(value, kind)
            for name, (value, kind) in kinds.items()
        }
    )


def write_scores(folder: Path, samples: Any, alignment: Any, relevance: Any, rows: Any, columns: Any) -> None:
    """The scores' file of one ``scores_table``."""
    write_parts(folder, [scores_table(samples, alignment, relevance, rows, columns)])


def write_parts(folder: Path, tables: Iterable[pa.Table]) -> None:
    """The scores' file, table after table."""
    import pyarrow.parquet as pq

    writer = None
    for table in tables:
        writer = writer or pq.ParquetWriter(folder / FILE, table.schema)
        writer.write_table(table)
    if writer is not None:
        writer.close()


class Scores:
    """All scores of a file, by sample.

    Args:
        path: what the stage guide wrote; None stands for a guidance that asks for none.
    """

    def __init__(self, path: str | Path | None) -> None:
        self._rows: Lookup | None = None
        if path is None:
            return
        import pyarrow.parquet as pq

        table = pq.read_table(path).combine_chunks()
        self._rows = Lookup(table.column("sample"))
        self._alignment = table.column("alignment").to_numpy()
        self._lists = {name: _flat(table.column(name)) for name in ("relevance", "rows", "columns")}

    def __len__(self) -> int:
        return 0 if self._rows is None else len(self._rows)

    def __getitem__(self, sample: str) -> Score:
        """Raises KeyError like ``of``."""
        return self.of([sample])[0]

    def of(self, samples: Sequence[str]) -> list[Score]:
        """The scores of some samples, in their order.

        Raises:
            KeyError: with what to do about it, for a sample that was never scored.
        """
        rows = [-1] * len(samples) if self._rows is None else self._rows.rows(samples).tolist()
        if -1 in rows:
            missing = samples[rows.index(-1)]
            raise KeyError(
                f"scores: the guide never scored sample {missing}; its scores belong to other data"
            )
        return [self._at(row) for row in rows]

    def _at(self, row: int) -> Score:
        found = {name: values[ends[row] : ends[row + 1]] for name, (values, ends) in self._lists.items()}
        grids = zip(found["rows"].tolist(), found["columns"].tolist(), strict=True)
        return Score(float(self._alignment[row]), found["relevance"], tuple(grids))


def _flat(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Values of a column of lists end to end, and where each list begins (and the last one ends)."""
    whole = column.combine_chunks()
    return whole.values.to_numpy(), whole.offsets.to_numpy()
