"""The guide's scores beside the shards: sample id to alignment in [0, 1]."""

from __future__ import annotations

from pathlib import Path

FILE = "scores.parquet"


def write_scores(samples: list[str], alignment: list[float], folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"sample": samples, "alignment": alignment}), folder / FILE)


def read_scores(path: str | Path | None) -> dict[str, float]:
    """All scores of a file; none for None, which stands for a guidance that asks for none."""
    if path is None:
        return {}
    import pyarrow.parquet as pq

    table = pq.read_table(path)
    return dict(zip(table.column("sample").to_pylist(), table.column("alignment").to_pylist(), strict=True))
