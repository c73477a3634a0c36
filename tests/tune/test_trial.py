"""What passes between trials of a population: weights, lineage, and the settings that made them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from clinkd.train.checkpoint import Checkpoints
from clinkd.tune.trial import SweepTrial, Trial, digest, newest


def trainable(key: str, rate: float, step: int = 0, reached: Path | None = None) -> Any:
    """Ray Tune's object without Ray Tune: what it saves and loads is the trial it holds."""
    made: Any = object.__new__(SweepTrial)
    unused: Any = None
    made._trial = Trial({"distill.optim.lr": rate}, unused, unused, key, step=step, reached=reached)
    return made


def checkpoint(folder: Path, text: str) -> Path:
    kept = Checkpoints(folder, 0, lambda: None)
    kept.save(4, lambda out: (out / "weights.bin").write_text(text) and None)
    path = kept.newest()
    assert path is not None
    return path


def handed_on(tmp_path: Path, source: Any, other: Any) -> Trial:
    """``other`` after it has loaded what ``source`` saved, in a folder that goes away as Ray Tune's does."""
    folder = tmp_path / "handed"
    folder.mkdir()
    source.save_checkpoint(str(folder))
    other.load_checkpoint(str(folder))
    shutil.rmtree(folder)
    return other._trial


def test_a_clone_knows_whose_it_is_though_it_has_the_others_configuration(tmp_path: Path) -> None:
    reached = checkpoint(tmp_path / "a", "good")
    source = trainable("a", 1e-3, step=4, reached=reached)
    clone = handed_on(tmp_path, source, trainable("b", 8e-4))
    assert clone.cloned is not None
    assert (clone.cloned["trial"], clone.cloned["from"], clone.cloned["step"]) == ("b", "a", 4)
    assert clone.cloned["weights"] == clone.cloned["source"] == digest(reached)
    assert clone.start is not None and (clone.start / "weights.bin").read_text() == "good" and clone.step == 4
    assert newest(clone.start.parent) == clone.start
    assert clone.lineage and clone.settings == [
        {"from": 0, "values": {"distill.optim.lr": 1e-3}}, {"from": 4, "values": {"distill.optim.lr": 8e-4}}
    ]  # fmt: skip


def test_who_was_only_paused_is_no_clone(tmp_path: Path) -> None:
    source = trainable("a", 1e-3, step=4, reached=checkpoint(tmp_path / "a", "good"))
    back = handed_on(tmp_path, source, trainable("a", 1e-3))
    assert back.cloned is None and back.step == 4
    assert back.settings == [{"from": 0, "values": {"distill.optim.lr": 1e-3}}]


def test_a_clone_of_a_clone_has_two_behind_it(tmp_path: Path) -> None:
    reached = checkpoint(tmp_path / "a", "good")
    first = trainable("b", 8e-4)
    one = handed_on(tmp_path, trainable("a", 1e-3, step=4, reached=reached), first)
    one.step, one.reached = 8, checkpoint(tmp_path / "b", "better")
    two = handed_on(tmp_path, first, trainable("c", 9e-4))
    assert two.lineage[:-1] == one.lineage and two.lineage[-1] not in one.lineage
    assert [entry["from"] for entry in two.settings] == [0, 4, 8]


def test_what_has_nothing_to_hand_on_leaves_the_other_as_it_is(tmp_path: Path) -> None:
    other = handed_on(tmp_path, trainable("a", 1e-3), trainable("b", 8e-4))
    assert other.start is None and other.step == 0 and other.cloned is None and not other.lineage
