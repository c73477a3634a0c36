"""Files on a disk and in a bucket: whole or not there, whatever the server does."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty_s3 import BUCKET, Faults, faulty_s3

from clinkd import storage


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Faults]]:
    with faulty_s3() as found:
        yield found


@pytest.fixture(params=["disk", "bucket"])
def folder(request, server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(storage.ENDPOINT, server[0])
    where = tmp_path if request.param == "disk" else f"s3://{BUCKET}/{tmp_path.name}"
    return storage.locate(str(where))


@pytest.mark.parametrize("name", ["a.png", "with space--v1.2.png", "a#b%20c?.png"])
def test_what_was_written_is_read(folder: Path, name: str) -> None:
    path = folder / name
    assert storage.stamp(path) is None
    storage.write_whole(path, b"one")
    first = storage.stamp(path)
    assert storage.read_stamped(path) == (b"one", first) and path.open("rb").read() == b"one"
    storage.write_whole(path, "two!")
    assert storage.read_stamped(path)[0] == b"two!" and storage.stamp(path) != first
    assert storage.names(folder) == [name]
    storage.remove(folder)
    assert storage.names(folder) == [] and storage.stamp(path) is None


def test_a_block_that_raises_leaves_nothing(folder: Path) -> None:
    with pytest.raises(RuntimeError), storage.whole(folder / "half.bin") as file:
        file.write(b"half")
        raise RuntimeError
    assert storage.names(folder) == []
    storage.write_whole(folder / "half.bin", b"before")
    with pytest.raises(RuntimeError), storage.whole(folder / "half.bin") as file:
        raise RuntimeError
    assert (folder / "half.bin").read_bytes() == b"before"


def test_a_file_that_is_not_there_or_too_large_is_not_read(folder: Path) -> None:
    with pytest.raises(FileNotFoundError):
        storage.read_stamped(folder / "none")
    storage.write_whole(folder / "large", b"x" * 11)
    with pytest.raises(OverflowError):
        storage.read_stamped(folder / "large", limit=10)
    storage.write_whole(folder / "empty", b"")
    assert storage.read_stamped(folder / "empty")[0] == b""


def test_parquet_is_read_where_it_lies(folder: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with storage.whole(folder / "t.parquet") as file:
        pq.write_table(pa.table({"x": [1, 2, 3]}), file)
    paths, filesystem = storage.arrow_source([folder / "t.parquet"])
    assert pq.read_table(paths[0], filesystem=filesystem)["x"].to_pylist() == [1, 2, 3]


@pytest.mark.slow
def test_errors_slow_answers_and_lost_connections_are_borne(server, monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint, faults = server
    monkeypatch.setenv(storage.ENDPOINT, endpoint)
    folder = storage.locate(f"s3://{BUCKET}/faults")
    faults.errors, faults.drops, faults.slow, faults.delay = 4, 7, 9, 0.2
    try:
        for number in range(16):
            path = folder / f"{number}.bin"
            storage.write_whole(path, bytes([number]) * 5000)
            assert storage.read_stamped(path)[0] == bytes([number]) * 5000
    finally:
        faults.errors = faults.drops = faults.slow = 0
    assert min(faults.seen["errors"], faults.seen["drops"], faults.seen["slow"]) >= 3
    assert len(storage.names(folder)) == 16


def test_a_path_of_this_machine_is_no_uri() -> None:
    for text in ("data", "/data", "./a b", "C:\\data", "file:///data"):
        assert not storage.is_remote(storage.locate(text))
    assert storage.locate("file:///data") == Path("/data")
    assert storage.is_remote("s3://bucket/x") and storage.is_remote(storage.locate("s3://bucket/x/"))
    with pytest.raises(ValueError):
        storage.locate("nonsense://x").exists()
