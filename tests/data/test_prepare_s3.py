"""Prepare from a bucket into a bucket, over a server that fails: the same bytes as on a disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty_s3 import BUCKET, Faults, faulty_s3
from malformed import write_corpus

from clinkd import cli, cluster, storage
from clinkd.data import shards
from clinkd.data.index import build_index
from clinkd.data.phantoms import PhantomSpec, write_source
from clinkd.data.prepare import DataError, prepare
from clinkd.data.reading import Place, Records, Wanted

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Faults]]:
    with faulty_s3() as found:
        yield found


@pytest.fixture
def bucket(server: tuple[str, Faults], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A folder of its own in the bucket; the server answers well again afterwards."""
    monkeypatch.setenv(storage.ENDPOINT, server[0])
    yield f"s3://{BUCKET}/{tmp_path.name}"
    server[1].errors = server[1].drops = server[1].slow = 0
    server[1].seen.clear()


def send(folder: Path, where: str) -> None:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            target = storage.locate(where) / path.relative_to(folder).as_posix()
            storage.write_whole(target, path.read_bytes())


def same(uri: str, folder: Path) -> None:
    """All that prepare leaves, to the byte, and nothing else."""
    there = storage.locate(uri)
    for name in ("manifest.json", "quarantine.jsonl"):
        assert (there / name).read_bytes() == (folder / name).read_bytes(), name
    names = [path.name for path in shards.shard_paths(folder)]
    assert storage.names(there / "shards") == names
    for name in names:
        assert (there / "shards" / name).read_bytes() == (folder / "shards" / name).read_bytes()
    assert storage.names(there) == ["manifest.json", "quarantine.jsonl"]
    assert storage.names(there / ".work") == []


@pytest.mark.slow
@pytest.mark.full
def test_a_bucket_that_fails_gives_the_same_bytes(
    bucket: str, server: tuple[str, Faults], tmp_path: Path
) -> None:
    """The malformed corpus, with injected 500s, slow answers and connections that end in mid-answer."""
    corpus = write_corpus(tmp_path / "lab", links=False)
    prepare(corpus.path, tmp_path / "out", images_per_shard=50)
    send(tmp_path / "lab", f"{bucket}/lab")
    faults = server[1]
    faults.errors, faults.drops, faults.slow, faults.delay = 37, 53, 71, 0.5
    manifest = prepare(f"{bucket}/lab/qa.jsonl", f"{bucket}/out", images_per_shard=50)
    faults.errors = faults.drops = faults.slow = 0
    assert min(faults.seen["errors"], faults.seen["drops"], faults.seen["slow"]) >= 5, faults.seen
    assert manifest["records_out"] == 1000 and manifest["by_reason"] == dict(sorted(corpus.reasons.items()))
    same(f"{bucket}/out", tmp_path / "out")


@pytest.mark.slow
def test_prepared_data_in_a_bucket_are_read_like_a_folder(bucket: str, tmp_path: Path) -> None:
    spec = PhantomSpec(12, 64)
    prepare(spec, f"{bucket}/out", images_per_shard=5, test_fraction=0.25)
    prepare(spec, tmp_path / "out", images_per_shard=5, test_fraction=0.25)
    same(f"{bucket}/out", tmp_path / "out")
    assert list(shards.samples(f"{bucket}/out")) == list(shards.samples(tmp_path / "out"))
    names = [row["image"] for row in shards.iter_rows(tmp_path / "out", columns=["image"])][:3]
    assert shards.images(f"{bucket}/out", names) == shards.images(tmp_path / "out", names)
    remote, local = (
        build_index(shards.Shards.of(where), "train") for where in (f"{bucket}/out", tmp_path / "out")
    )
    assert remote.table.equals(local.table)
    place = Place(*remote.place[1].tolist())
    found = [
        Records(shards.Shards.of(where), 1 << 20).record(Wanted(place))
        for where in (f"{bucket}/out", tmp_path / "out")
    ]
    assert found[0] == found[1]
    again = prepare(f"{bucket}/out", f"{bucket}/again", images_per_shard=5, test_fraction=0.25)
    assert again["shards"] == shards.read_manifest(tmp_path / "out")["shards"]


def test_an_outage_is_no_rows_fault(bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading that fails for good ends the run; no image goes to the quarantine for it."""
    lab = tmp_path / "lab"
    write_source(PhantomSpec(4, 64), lab)
    send(lab, f"{bucket}/lab")
    from clinkd.data.validate import Folder, Limits, RowError

    folder = Folder(storage.locate(f"{bucket}/lab/images"), Limits())
    with pytest.raises(RowError, match="missing_image"):
        folder.read("ct_none.png")
    monkeypatch.setattr(storage, "ATTEMPTS", 1)
    monkeypatch.setenv(storage.ENDPOINT, "http://127.0.0.1:9")  # nobody listens there
    gone = Folder(storage.locate(f"{bucket}/lab/images"), Limits())
    with pytest.raises(OSError):
        gone.read("ct_none.png")


def test_names_that_leave_the_folder_leave_it_in_a_bucket_too(bucket: str, tmp_path: Path) -> None:
    lab = tmp_path / "lab"
    write_source(PhantomSpec(4, 64), lab)
    rows = json.loads((lab / "medgrit.json").read_text())
    secret = "../secret/ct_00--D--p--z.png"
    rows.append({"image": secret, "conversations": [["Where?", "Here."]]})
    (lab / "medgrit.json").write_text(json.dumps(rows))
    send(lab, f"{bucket}/lab")
    storage.write_whole(storage.locate(f"{bucket}/lab/secret/ct_00--D--p--z.png"), b"secret")
    manifest = prepare(f"{bucket}/lab", f"{bucket}/out")
    assert manifest["by_reason"] == {"path_escape": 1}


@pytest.mark.slow
@pytest.mark.full
def test_a_mask_folder_in_a_bucket(bucket: str, tmp_path: Path) -> None:
    from test_prepare import mask_folder

    mask_folder(tmp_path / "lab")
    send(tmp_path / "lab", f"{bucket}/lab")
    prepare(tmp_path / "lab", tmp_path / "out", images_per_shard=2)
    prepare(f"{bucket}/lab", f"{bucket}/out", images_per_shard=2)
    same(f"{bucket}/out", tmp_path / "out")


def test_the_commands_take_uris(
    bucket: str, server: tuple[str, Faults], tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "disconnect", lambda: None)  # the Ray of all tests stays
    there = ["--endpoint-url", server[0]]
    assert cli.main(["prepare", "--phantoms", "16", "--out", f"{bucket}/out", *there]) == 0
    assert cli.main(["validate", f"{bucket}/out", *there]) == 0
    assert "whole" in capsys.readouterr().out
    assert cli.main(["data", "show", f"{bucket}/out", "--out", str(tmp_path / "s.png"), *there]) == 0
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    assert cli.main(["validate", f"{bucket}/none", *there]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) >= 1


def test_a_bucket_that_is_not_there_is_one_line(bucket: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file or folder|cannot look into") as caught:
        prepare("s3://nobodys-bucket/lab", tmp_path / "out")
    assert "\n" not in str(caught.value)
