"""Checkpoints: only whole ones have a name, the last two stay."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from clinkd.train.checkpoint import Checkpoints


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
    assert newest is not None and [path.name for path in newest.iterdir()] == ["other"]  # nothing of the half


def test_all_ranks_write_into_one_checkpoint(tmp_path: Path) -> None:
    barrier = threading.Barrier(3)

    def save(rank: int) -> None:
        kept = Checkpoints(tmp_path, rank, lambda: (barrier.wait(10), None)[1])
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
    assert sorted(path.name for path in newest.iterdir()) == ["rank-0", "rank-1", "rank-2"]
