"""A read of prepared records, by clinkd and by Ray Data's newer Parquet reader, whose default that is.

    python benchmarks/reads.py [--records N] [--rounds N]

Both read the training split of the same phantoms to its last row in one Ray, one after the other in every
round, and are checked to bring the same records. Printed are median seconds, and how many times faster
clinkd's read is. The newer reader asks for 32 actors to read Parquet footers, in every read.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--records", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    from clinkd import cluster
    from clinkd.data.phantoms import PhantomSpec
    from clinkd.data.prepare import prepare

    with tempfile.TemporaryDirectory(prefix="clinkd-reads-") as scratch:
        cluster.connect()
        try:
            data = Path(scratch, "data")
            prepare(PhantomSpec(chosen.records), data)
            ours, newer = measured(data, chosen.rounds)
        finally:
            cluster.disconnect()
    print(f"Ray Data's newer reader: {newer:.2f} s")
    print(f"clinkd's read: {ours:.2f} s, {newer / ours:.1f}x")


def measured(data: Path, rounds: int) -> tuple[float, float]:
    """Median seconds of ours and of the newer reader; a first round, not counted, starts processes."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds + 1):
        (mine, took), (theirs, other) = timed(our_ids, data), timed(newer_ids, data)
        if mine != theirs:
            raise SystemExit(f"{len(mine)} records and {len(theirs)}: the readers differ")
        seconds[0].append(took)
        seconds[1].append(other)
    return statistics.median(seconds[0][1:]), statistics.median(seconds[1][1:])


def timed(read, data: Path) -> tuple[list[str], float]:
    begun = time.perf_counter()
    ids = read(data)
    return sorted(ids), time.perf_counter() - begun


def our_ids(data: Path) -> list[str]:
    from clinkd.data.ingest import read_records

    return [row["id"] for row in read_records(data, split="train").iter_rows()]


def newer_ids(data: Path) -> list[str]:
    import ray.data
    from ray.data.expressions import col

    from clinkd import storage
    from clinkd.data.shards import shard_paths

    paths, filesystem = storage.arrow_source(shard_paths(data))
    ray.data.DataContext.get_current().use_datasource_v2 = True
    rows = ray.data.read_parquet(paths, filesystem=filesystem)
    return [row["id"] for row in rows.filter(expr=col("split") == "train").iter_rows()]


if __name__ == "__main__":
    main()
