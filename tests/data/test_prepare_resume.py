"""A preparation that was killed goes on with the same command, and comes out the same to the byte."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from clinkd import storage
from clinkd.data import parts, shards
from clinkd.data.phantoms import PhantomSpec, write_source
from clinkd.data.prepare import DataError, prepare


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class Killed(Exception):
    pass


def killed_after(name: str, count: int):
    """A progress view that ends the driver after so many parts of a pass."""

    def step(current: str, done: int, total: int) -> None:
        if (current, done) == (name, count):
            raise Killed

    return step


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    write_source(PhantomSpec(30, 64), tmp_path / "lab")
    return tmp_path / "lab"


def settings(progress=None) -> dict:
    return {"images_per_shard": 5, "test_fraction": 0.3, "progress": progress}


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("place", [("check", 1), ("check", 5), ("write", 1), ("write", 6)])
def test_it_goes_on_where_it_was(lab: Path, tmp_path: Path, place: tuple[str, int]) -> None:
    prepare(lab, tmp_path / "undisturbed", **settings())
    out = tmp_path / "out"
    with pytest.raises(Killed):
        prepare(lab, out, **settings(killed_after(*place)))
    with pytest.raises(DataError, match="no prepared data"):
        shards.read_manifest(out)
    written = "facts" if place[0] == "check" else "written"
    done = {path: path.stat().st_mtime_ns for path in (out / ".work").glob(f"{written}-*.json")}
    assert len(done) >= place[1]
    kept = {path: path.stat().st_ino for path in done}
    watched: list[bool] = []

    def watch(name: str, count: int, total: int) -> None:  # while it runs, what was done stays as it is
        watched.extend(path.stat().st_ino == kept[path] for path in done if path.exists())

    prepare(lab, out, **settings(watch))
    assert watched and all(watched)
    assert tree(out) == tree(tmp_path / "undisturbed")


@pytest.mark.usefixtures("ray_session")
def test_what_changed_in_between_is_checked_again(lab: Path, tmp_path: Path) -> None:
    broken = sorted((lab / "images").iterdir())[0]
    good = broken.read_bytes()
    broken.write_bytes(good[:200])
    with pytest.raises(Killed):
        prepare(lab, tmp_path / "out", **settings(killed_after("write", 6)))
    broken.write_bytes(good)  # repaired before going on
    assert prepare(lab, tmp_path / "out", **settings())["quarantined"] == 0
    prepare(lab, tmp_path / "undisturbed", **settings())
    assert tree(tmp_path / "out") == tree(tmp_path / "undisturbed")


@pytest.mark.usefixtures("ray_session")
def test_other_settings_leave_nothing_of_the_former_run(lab: Path, tmp_path: Path) -> None:
    prepare(lab, tmp_path / "out", images_per_shard=3)
    with pytest.raises(Killed):
        prepare(lab, tmp_path / "out", seed=7, **settings(killed_after("write", 2)))
    prepare(lab, tmp_path / "out", **settings())
    prepare(lab, tmp_path / "undisturbed", **settings())
    assert tree(tmp_path / "out") == tree(tmp_path / "undisturbed")


@pytest.mark.usefixtures("ray_session")
def test_a_former_run_is_a_source(lab: Path, tmp_path: Path) -> None:
    first = prepare(lab, tmp_path / "first", **settings())
    again = prepare(tmp_path / "first", tmp_path / "again", **settings())
    assert again["shards"] == first["shards"] and again["records_in"] == first["records_out"]
    assert again["source"] == {"kind": "parquet", "files": [shard["name"] for shard in first["shards"]]}
    one = prepare(shards.shard_paths(tmp_path / "first")[0], tmp_path / "one", images_per_shard=2)
    assert one["images"] == 5 and len(one["shards"]) == 3


@pytest.mark.usefixtures("ray_session")
def test_rows_of_a_former_run_are_checked_like_others(lab: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    prepare(lab, tmp_path / "first", images_per_shard=30)
    path = shards.shard_paths(tmp_path / "first")[0]
    rows = pq.read_table(path).to_pylist()
    thin = io.BytesIO()
    Image.new("L", (2, 200)).save(thin, "PNG")
    rows[0]["png"] = rows[0]["png"][:-40]
    rows[1]["image"] = "../escape.png"
    rows[2]["turns"] = []
    rows[3]["turns"][0]["answer"] = "a\x00b"
    rows[4]["png"] = None
    rows[5]["png"] = thin.getvalue()
    rows[6]["turns"][0]["trusted"] = False
    rows[7]["more_images"] = [{"image": "ct_2.png", "width": 1, "height": 1}]
    rows[8]["id"] = None
    rows[9]["image"] = "photo.png"
    pq.write_table(pa.Table.from_pylist(rows, shards.schema()), tmp_path / "edited.parquet")
    manifest = prepare(tmp_path / "edited.parquet", tmp_path / "out")
    assert manifest["by_reason"].keys() == {
        "truncated", "path_escape", "no_turns", "control_characters", "zero_byte", "bad_shape",
        "invalid_record", "unknown_modality",
    }  # fmt: skip
    assert manifest["images"] == 22
    assert sum(not sample["trusted"] for sample in shards.samples(tmp_path / "out")) == 1


@pytest.mark.usefixtures("ray_session")
def test_a_parquet_file_without_its_end_is_said(lab: Path, tmp_path: Path) -> None:
    prepare(lab, tmp_path / "first", **settings())
    path = shards.shard_paths(tmp_path / "first")[2]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"part-00002.parquet is no whole Parquet file"):
        prepare(tmp_path / "first", tmp_path / "out")


def test_a_row_group_ends_by_bytes_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow.parquet as pq

    monkeypatch.setattr(parts, "GROUP_BYTES", 1000)
    row = {"id": "a", "image": "ct_a.png", "modality": "ct", "split": "", "png": b"x" * 400, "width": 8,
           "height": 8, "turns": [], "more_images": [], "more_png": []}  # fmt: skip
    count, digest = parts._write_parquet(iter([row] * 7), tmp_path / "t.parquet")
    file = pq.ParquetFile(tmp_path / "t.parquet")
    assert [file.metadata.row_group(n).num_rows for n in range(file.num_row_groups)] == [3, 3, 1]
    assert (count, digest) == (7, storage.sha256(tmp_path / "t.parquet"))


@pytest.mark.slow
def test_kill_9_of_the_command_and_the_same_command_again(tmp_path: Path) -> None:
    """The whole command, its Ray and all, killed twice at random moments of its work."""
    write_source(PhantomSpec(400, 64), tmp_path / "lab")
    command = [sys.executable, "-m", "clinkd", "prepare", "--source", str(tmp_path / "lab")]
    command += ["--images-per-shard", "10", "--out"]
    subprocess.run([*command, str(tmp_path / "undisturbed")], check=True, capture_output=True)
    out, chance, killed = tmp_path / "out", random.Random(0), 0
    while killed < 2:
        victim = subprocess.Popen(
            [*command, str(out)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        begun = len(list(out.glob(".work/*.json")))
        while victim.poll() is None and len(list(out.glob(".work/*.json"))) <= begun:
            time.sleep(0.01)
        time.sleep(chance.random() * 0.5)
        if victim.poll() is None:
            os.killpg(victim.pid, signal.SIGKILL)
            victim.wait()
            killed += 1
            assert not (out / "manifest.json").exists()
        else:
            pytest.fail("it ended before it could be killed")
    subprocess.run([*command, str(out)], check=True, capture_output=True)
    assert tree(out) == tree(tmp_path / "undisturbed")
    manifest = json.loads((out / "manifest.json").read_text())
    for shard in manifest["shards"]:
        assert storage.sha256(out / "shards" / shard["name"]) == shard["sha256"]
