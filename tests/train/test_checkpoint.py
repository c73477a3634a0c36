"""Checkpoints: only whole ones have a name, the last two stay."""

from __future__ import annotations

import json
import random
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from clinkd.data.shards import DataError
from clinkd.train.checkpoint import FAULT, MANIFEST, Checkpoints, damage


def alone(folder: Path) -> Checkpoints:
    return Checkpoints(folder, 0, lambda: None)


def test_the_newest_of_the_last_two_is_taken_up(tmp_path: Path) -> None:
    kept = alone(tmp_path / "teacher")
    assert kept.newest() is None
    for step in (5, 10, 100):
        kept.save(step, lambda folder: (folder / "state").write_text("whole"))
    newest = kept.newest()
    assert newest is not None and newest.name == "step-00000100"
    names = sorted(path.name for path in (tmp_path / "teacher").iterdir())
    assert names == ["step-00000010", "step-00000100"]


def test_what_was_not_finished_is_no_checkpoint(tmp_path: Path) -> None:
    kept = alone(tmp_path)
    kept.save(5, lambda folder: (folder / "state").write_text("whole"))

    def dies(folder: Path) -> None:
        (folder / "state").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        kept.save(10, dies)
    newest = kept.newest()
    assert newest is not None and newest.name == "step-00000005"
    kept.save(10, lambda folder: (folder / "other").write_text("whole"))
    newest = kept.newest()
    assert newest is not None  # and it has nothing of the half
    assert sorted(path.name for path in newest.iterdir()) == [MANIFEST, "other"]


def test_all_ranks_write_into_one_checkpoint(tmp_path: Path) -> None:
    barrier = threading.Barrier(3)

    def save(rank: int) -> None:
        kept = Checkpoints(tmp_path, rank, lambda: (barrier.wait(10), None)[1], world=3)
        for step in (1, 2, 3):
            kept.save(step, lambda folder: (folder / f"rank-{rank}").touch())
            assert kept.newest() == tmp_path / f"step-{step:08d}"

    threads = [threading.Thread(target=save, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    newest = alone(tmp_path).newest()
    assert newest is not None and newest.name == "step-00000003"
    assert sorted(path.name for path in newest.iterdir()) == [MANIFEST, "rank-0", "rank-1", "rank-2"]
    assert set(json.loads((newest / MANIFEST).read_text())) == {"rank-0", "rank-1", "rank-2"}


# Damage


def written(folder: Path) -> Checkpoints:
    """Two checkpoints of three files each."""
    kept = alone(folder)
    for step in (5, 10):
        noise = random.Random(step)

        def write(path: Path, noise: random.Random = noise) -> None:
            for name in ("state/model.pt", "state/optimizer.pt", "latest"):
                (path / name).parent.mkdir(exist_ok=True)
                (path / name).write_bytes(noise.randbytes(997))

        kept.save(step, write)
    return kept


def files(path: Path) -> list[Path]:
    return sorted(file for file in path.rglob("*") if file.is_file())


@pytest.mark.parametrize("seed", range(100))
def test_a_flipped_bit_is_found_and_the_one_before_is_taken(tmp_path: Path, seed: int) -> None:
    kept, chance = written(tmp_path), random.Random(seed)
    victim = chance.choice(files(tmp_path / "step-00000010"))
    content = bytearray(victim.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    victim.write_bytes(content)
    with pytest.warns(UserWarning, match="step-00000010") as caught:
        assert kept.newest() == tmp_path / "step-00000005"
    aside = tmp_path / "step-00000010.damaged"
    assert (aside / FAULT).read_text().strip() in str(caught[0].message)
    assert kept.newest() == tmp_path / "step-00000005"  # and it is said once


@pytest.mark.parametrize("seed", range(20))
def test_a_missing_file_is_found(tmp_path: Path, seed: int) -> None:
    kept = written(tmp_path)
    victim = random.Random(seed).choice(files(tmp_path / "step-00000010"))
    victim.unlink()
    with pytest.warns(UserWarning, match=f"{victim.name} is missing"):
        assert kept.newest() == tmp_path / "step-00000005"


def test_a_file_too_many_is_not_loaded_either(tmp_path: Path) -> None:
    kept = written(tmp_path)
    (tmp_path / "step-00000010" / "state" / "more.pt").touch()
    with pytest.warns(UserWarning, match="not in the manifest"):
        assert kept.newest() == tmp_path / "step-00000005"


def test_where_all_are_damaged_there_is_none(tmp_path: Path) -> None:
    kept = written(tmp_path)
    for path in tmp_path.glob("step-*"):
        (path / MANIFEST).write_text("[]")
    with pytest.warns(UserWarning, match="cannot be read"):
        assert kept.newest() is None


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "clinkd", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)  # errors may hold a file open


def test_a_full_disk_is_said_leaves_the_one_before_whole_and_passes(small_disk: Path) -> None:
    import torch

    kept = alone(small_disk / "work")
    weights = torch.arange(300_000, dtype=torch.float32)

    def write(folder: Path) -> None:
        torch.save(weights, folder / "weights.pt")

    kept.save(5, write)
    (small_disk / "other").write_bytes(bytes(2_500_000))
    with pytest.raises(DataError, match=r"no room for the checkpoint of step 10 .*; make room") as caught:
        kept.save(10, write)
    assert "\n" not in str(caught.value)
    newest = kept.newest()
    assert newest is not None and newest.name == "step-00000005" and not damage(newest)
    (small_disk / "other").unlink()
    kept.save(10, write)
    newest = kept.newest()
    assert newest is not None and newest.name == "step-00000010"
