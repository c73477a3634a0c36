"""Copies of checkpoints in a store: whole or not there, whatever the store does."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from faulty_s3 import BUCKET, Faults, faulty_s3

from clinkd.train.checkpoint import Checkpoints, damage
from clinkd.train.offsite import NEWEST, Offsite

ROUNDS = int(os.environ.get("CLINKD_STORE_ROUNDS", "6"))


class Job:
    """A job's folder here and its place in a store."""

    def __init__(self, here: Path, where: str) -> None:
        self.here, self.where = here, where
        self.warnings: list[str] = []
        self.checkpoints = Checkpoints(here, 0, lambda: None)
        self.offsite = Offsite(where, here, self.warnings.append)
        self.offsite.begin()

    def save(self, step: int, size: int = 1000) -> dict[str, bytes]:
        """A checkpoint of two files, copied."""
        content = {"a": os.urandom(size), "state/b": os.urandom(size)}

        def write(folder: Path) -> None:
            (folder / "state").mkdir()
            for name, data in content.items():
                (folder / name).write_bytes(data)

        self.checkpoints.save(step, write)
        self.offsite.send(self.here / f"step-{step:08d}")
        self.offsite.close(60)
        return content


def read(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in ("a", "state/b")}


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch):
    with faulty_s3() as (endpoint, faults):
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        yield faults


@pytest.mark.slow
def test_errors_throttling_and_lost_connections_lose_no_checkpoint(s3: Faults, tmp_path: Path) -> None:
    """Saved, copied, lost here and fetched again, each time byte for byte."""
    where = f"s3://{BUCKET}/copies/distill"
    s3.errors, s3.throttles, s3.drops, s3.slow, s3.delay, s3.stale = 17, 19, 23, 29, 0.3, True
    for step in range(1, ROUNDS + 1):
        job = Job(tmp_path / "here", where)
        wanted = job.save(step)
        shutil.rmtree(job.here)
        again = Job(tmp_path / "here", where)
        newest = again.checkpoints.newest()
        assert newest is not None and newest.name == f"step-{step:08d}" and not damage(newest)
        assert read(newest) == wanted and not job.warnings and not again.warnings
    if ROUNDS >= 6:
        assert all(s3.seen[fault] for fault in ("errors", "throttles", "drops", "slow", "stale"))


def test_a_job_that_is_done_waits_for_no_copy_and_leaves_no_half_one(s3: Faults, tmp_path: Path) -> None:
    s3.slow, s3.delay = 1, 0.3
    job = Job(tmp_path / "here", f"s3://{BUCKET}/done")
    job.checkpoints.save(5, lambda folder: (folder / "a").write_bytes(b"weights"))
    begun = s3.seen["requests"]
    job.offsite.send(tmp_path / "here" / "step-00000005")
    job.offsite.close(0)
    assert s3.seen["requests"] - begun <= 3  # what was under way
    shutil.rmtree(tmp_path / "here")
    assert Job(tmp_path / "here", f"s3://{BUCKET}/done").checkpoints.newest() is None
    assert not job.warnings


def test_two_copies_stay(tmp_path: Path) -> None:
    job = Job(tmp_path / "here", str(tmp_path / "store"))
    for step in (5, 10, 15):
        job.save(step)
    steps = json.loads((tmp_path / "store" / NEWEST).read_text())["steps"]
    assert [name.split("-")[1] for name in steps] == ["00000010", "00000015"]
    assert {path.name for path in (tmp_path / "store").iterdir() if path.is_dir()} == set(steps)
    assert not list((tmp_path / "here").glob("*.sending"))


def test_a_damaged_copy_is_not_taken_but_the_one_before(tmp_path: Path) -> None:
    job = Job(tmp_path / "here", str(tmp_path / "store"))
    wanted = job.save(5)
    job.save(10)
    (newest,) = (tmp_path / "store").glob("step-00000010-*")
    data = bytearray((newest / "a").read_bytes())
    data[3] ^= 1
    (newest / "a").write_bytes(bytes(data))
    other = Job(tmp_path / "elsewhere", str(tmp_path / "store"))
    found = other.checkpoints.newest()
    assert found is not None and found.name == "step-00000005" and read(found) == wanted
    assert "a is not what was written; the one before is taken" in other.warnings[0]


def test_an_attempt_that_was_thought_dead_stops_copying(tmp_path: Path) -> None:
    old = Job(tmp_path / "old", str(tmp_path / "store"))
    old.save(5)
    new = Job(tmp_path / "new", str(tmp_path / "store"))
    wanted = new.save(10)
    old.save(7)
    assert "another attempt" in old.warnings[0]
    third = Job(tmp_path / "third", str(tmp_path / "store"))
    found = third.checkpoints.newest()
    assert found is not None and found.name == "step-00000010" and read(found) == wanted


def test_what_lies_here_goes_before_the_store(tmp_path: Path) -> None:
    Job(tmp_path / "one", str(tmp_path / "store")).save(50)
    other = Job(tmp_path / "two", str(tmp_path / "another"))
    other.save(5)
    same = Job(tmp_path / "two", str(tmp_path / "store"))
    found = same.checkpoints.newest()
    assert found is not None and found.name == "step-00000005"


def test_a_store_that_is_not_there_is_a_warning(s3: Faults, tmp_path: Path) -> None:
    job = Job(tmp_path / "here", "s3://no-such-bucket/copies")
    job.save(5)
    assert job.checkpoints.newest() is not None
    assert job.warnings and all("training goes on" in text for text in job.warnings)


def test_a_manifest_cannot_lead_out_of_the_folder(tmp_path: Path) -> None:
    job = Job(tmp_path / "here", str(tmp_path / "store"))
    job.save(5)
    (copy,) = (tmp_path / "store").glob("step-*")
    listing = json.loads((copy / "manifest.json").read_text())
    listing["../../escaped"] = listing.pop("a")
    (copy / "manifest.json").write_text(json.dumps(listing))
    other = Job(tmp_path / "far" / "here", str(tmp_path / "store"))
    assert other.checkpoints.newest() is None
    assert "outside of its folder" in other.warnings[0] and not list(tmp_path.rglob("escaped"))
