"""Records put before actors: each once, in their order, and a record that cannot be read is named."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from feeding import write_shard
from phantom_rows import phantom_row

from clinkd.data.index import build_index
from clinkd.data.phantoms import PhantomSpec
from clinkd.data.pieces import work_on
from clinkd.data.reading import Questions
from clinkd.data.shards import Shards
from clinkd.data.tasks import FeedError

SPEC = PhantomSpec(9, size=56)
pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module", autouse=True)
def here() -> None:
    import ray.cloudpickle

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import a test module


class Named:
    """Names what it is shown, and how large its image is."""

    def tables(self, batches: Any) -> Iterator[Any]:
        import pyarrow as pa

        for records in batches:
            names = [record["id"] for record in records]
            sizes = [len(record["png"]) for record in records]
            turns = [len(record["turns"]) for record in records]
            yield pa.table({"id": names, "bytes": sizes, "turns": turns})


def test_each_record_comes_once_with_its_image(tmp_path: Path) -> None:
    rows = [phantom_row(SPEC, number) for number in range(9)]
    shards = Shards.of(write_shard(tmp_path / "data", rows))
    place = build_index(shards, None).place
    found = [row for table in work_on(Questions(shards, place), Named, actors=2) for row in table.to_pylist()]
    wanted = [
        {"id": row["id"], "bytes": len(row["png"]), "turns": len(row["turns"])}
        for row in sorted(rows, key=lambda row: row["id"])
    ]
    assert sorted(found, key=lambda row: row["id"]) == wanted
    asked = ({"task": "mia", "question": "What?", "answer": "That.", "trusted": True},)
    other = Questions(shards, place[4:6], (("a#0", asked), ("b#0", asked)))
    (first, second) = [row for table in work_on(other, Named, actors=2) for row in table.to_pylist()]
    assert {first["id"], second["id"]} == {"a#0", "b#0"} and first["turns"] == second["turns"] == 1


def test_a_shard_that_was_torn_meanwhile_is_named(tmp_path: Path) -> None:
    folder = write_shard(tmp_path / "data", [phantom_row(SPEC, number) for number in range(5)])
    shards = Shards.of(folder)
    place = build_index(shards, None).place
    path = folder / "shards" / "part-00000.parquet"
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(FeedError, match=r"part-00000.parquet: row group 0 cannot be read .*changed since"):
        list(work_on(Questions(shards, place), Named, actors=1))
