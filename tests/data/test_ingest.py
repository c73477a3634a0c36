"""Records on their way to the workers: one file, the same however the rows arrived."""

from pathlib import Path

import pyarrow as pa
import pytest

from clinkd.data.ingest import collect, decode, open_table, read_records
from clinkd.data.phantoms import PhantomSpec, draw


def table(*names: str) -> pa.Table:
    turns = [[{"task": "vg", "question": name, "answer": "a", "trusted": True}] for name in names]
    return pa.table({"id": list(names), "png": [name.encode() for name in names], "turns": turns})


def test_order_of_arrival_leaves_no_trace(tmp_path: Path) -> None:
    first = collect([table("b", "a"), table("c")], tmp_path / "first.arrow")
    second = collect([table("c", "b"), table("a")], tmp_path / "second.arrow")
    assert first.read_bytes() == second.read_bytes()
    rows = open_table(first)
    assert (rows.ids, len(rows), rows.turn_counts()) == (["a", "b", "c"], 3, [1, 1, 1])
    assert rows.image(1) == b"b" and rows.turns(2)[0]["question"] == "c"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["first.arrow", "second.arrow"]


def test_an_image_comes_back_as_rgb() -> None:
    png, _ = draw(PhantomSpec(1, size=56), 0)
    assert (decode(png).mode, decode(png).size) == ("RGB", (56, 56))


@pytest.mark.usefixtures("ray_session")
def test_records_by_split_and_by_id(tmp_path: Path) -> None:
    from clinkd.data.prepare import prepare

    prepare(PhantomSpec(16, size=56), tmp_path, test_fraction=0.5, images_per_shard=4)
    train, test = (read_records(tmp_path, split=split).take_all() for split in ("train", "test"))
    assert len(train) == len(test) == 8 and not {row["id"] for row in train} & {row["id"] for row in test}
    wanted = sorted(row["id"] for row in train)[:3]
    assert sorted(row["id"] for row in read_records(tmp_path, ids=wanted, blocks=8).take_all()) == wanted
