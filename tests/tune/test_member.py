"""What passes between trials of a population, and what is remembered of them where the sweep is cut off."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from clinkd.config import RunConfig, check_config
from clinkd.train.checkpoint import Checkpoints
from clinkd.tune.member import KEPT, Member, Segments, digest
from clinkd.tune.search import drawn_by, population
from clinkd.tune.trial import newest

UNUSED: Any = None


def member(number: int, rate: float, step: int = 0, reached: Path | None = None) -> Member:
    weights = digest(reached) if reached else ""
    return Member(
        {"distill.optim.lr": rate}, UNUSED, UNUSED, number, step=step, reached=reached, weights=weights
    )


def sweep_in(runs: Path) -> RunConfig:
    return check_config({"run": {"root": str(runs)}, "sweep": {"scheduler": "pbt"}}, "test")


def checkpoint(folder: Path, text: str) -> Path:
    kept = Checkpoints(folder, 0, lambda: None)
    kept.save(4, lambda out: (out / "weights.bin").write_text(text) and None)
    path = kept.newest()
    assert path is not None
    return path


def handed_on(source: Member, other: Member) -> Member:
    """``other`` after it has taken what ``source`` handed on, through JSON as Ray Tune carries it."""
    other.take(json.loads(json.dumps(source.hand_on())))
    return other


def test_a_clone_has_the_others_weights_and_its_own_values(tmp_path: Path) -> None:
    reached = checkpoint(tmp_path / "a", "good")
    clone = handed_on(member(0, 1e-3, step=4, reached=reached), member(1, 8e-4))
    shutil.rmtree(tmp_path / "a")  # the other goes on, and its folder with it
    assert clone.cloned is not None
    assert (clone.cloned["trial"], clone.cloned["from"], clone.cloned["step"]) == (1, 0, 4)
    assert clone.start is not None and (clone.start / "weights.bin").read_text() == "good" and clone.step == 4
    assert clone.cloned["weights"] == clone.cloned["source"] == digest(clone.start)
    assert newest(clone.start.parent) == clone.start
    assert clone.lineage and clone.settings == [
        {"from": 0, "values": {"distill.optim.lr": 1e-3}}, {"from": 4, "values": {"distill.optim.lr": 8e-4}}
    ]  # fmt: skip


def test_who_was_only_paused_is_no_clone(tmp_path: Path) -> None:
    source = member(0, 1e-3, step=4, reached=checkpoint(tmp_path / "a", "good"))
    back = handed_on(source, member(0, 1e-3))
    assert back.cloned is None and back.step == 4
    assert back.settings == [{"from": 0, "values": {"distill.optim.lr": 1e-3}}]


def test_a_clone_of_a_clone_has_two_behind_it(tmp_path: Path) -> None:
    reached = checkpoint(tmp_path / "a", "good")
    one = handed_on(member(0, 1e-3, step=4, reached=reached), member(1, 8e-4))
    one.step, one.reached = 8, checkpoint(tmp_path / "b", "better")
    two = handed_on(one, member(2, 9e-4))
    assert two.lineage[:-1] == one.lineage and two.lineage[-1] not in one.lineage
    assert [entry["from"] for entry in two.settings] == [0, 4, 8]


def test_clones_of_one_with_the_same_values_are_told_apart(tmp_path: Path) -> None:
    source = member(0, 1e-3, step=4, reached=checkpoint(tmp_path / "a", "good"))
    source.base = sweep_in(tmp_path)
    salts = []
    for number in (1, 2):
        clone = handed_on(source, member(number, 1e-3))
        clone.base = source.base
        salts.append(clone.salt())
    assert salts[0]["lineage"] == salts[1]["lineage"] and salts[0] != salts[1]


def test_what_has_nothing_to_hand_on_leaves_the_other_as_it_is() -> None:
    other = handed_on(member(0, 1e-3), member(1, 8e-4))
    assert other.start is None and other.step == 0 and other.cloned is None and not other.lineage


def test_the_lineage_is_the_same_wherever_the_checkpoint_lies(tmp_path: Path) -> None:
    found = []
    for place in ("a", "b"):
        source = member(0, 1e-3, step=4, reached=checkpoint(tmp_path / place, "good"))
        found.append(handed_on(source, member(1, 8e-4)).lineage)
    assert found[0] == found[1]


def noted(folder: Path, segments: Segments, step: int) -> Path:
    """A rung of step ``step``, noted; its draft."""
    draft = folder / f"draft-{step}"
    reached = checkpoint(draft / "work", str(step))
    told = {"step": step, "draft": str(draft), "settings": "[]", "cloned": "", "likelihood": step / 10}
    segments.keep({"key": f"key {step}", "told": told, "reached": str(reached), "weights": digest(reached)})
    return draft


def test_rungs_are_remembered_by_what_led_to_them_and_old_drafts_go(tmp_path: Path) -> None:
    segments = Segments(sweep_in(tmp_path), 3)
    drafts = [noted(tmp_path, segments, step) for step in (2, 4, 6)]
    again = Segments(sweep_in(tmp_path), 3)
    found = [again.find(f"key {step}") for step in (2, 4, 6, 8)]
    assert [rung and rung["told"]["likelihood"] for rung in found] == [0.2, 0.4, 0.6, None]
    assert Segments(sweep_in(tmp_path), 4).find("key 2") is None
    assert [draft.is_dir() for draft in drafts] == [False, True, True] and KEPT == 2
    again.discard()
    assert not any(draft.is_dir() for draft in drafts)


def test_a_draft_that_goes_on_is_not_thrown_away_with_its_earlier_rungs(tmp_path: Path) -> None:
    segments = Segments(sweep_in(tmp_path), 3)
    (tmp_path / "draft").mkdir()
    for step in (2, 4, 6, 8):
        told = {"step": step, "draft": str(tmp_path / "draft")}
        segments.keep({"key": f"key {step}", "told": told, "reached": "", "weights": ""})
    assert (tmp_path / "draft").is_dir()
    segments.discard()
    assert not (tmp_path / "draft").exists()


def test_nothing_outside_the_runs_is_thrown_away(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    segments = Segments(sweep_in(tmp_path / "runs"), 0)
    told = {"step": 2, "draft": str(tmp_path / "runs" / ".." / "elsewhere")}
    segments.keep({"key": "a", "told": told, "reached": "", "weights": ""})
    segments.discard()
    assert (tmp_path / "elsewhere").is_dir()


def test_a_known_rung_is_told_again_without_training(tmp_path: Path) -> None:
    one = member(0, 1e-3)
    one.base = sweep_in(tmp_path)
    reached = checkpoint(tmp_path / "draft", "good")
    told = {"step": 4, "done": False, "draft": "", "settings": "[]", "cloned": "", "likelihood": 0.5}
    Segments(one.base, 0).keep(
        {"key": one.key, "told": told, "reached": str(reached), "weights": digest(reached)}
    )
    assert one.advance() == told and (one.step, one.reached) == (4, reached)
    assert one.hand_on()["weights"] == digest(reached)


def test_without_its_checkpoint_it_says_so_in_the_place_of_beginning_anew(tmp_path: Path) -> None:
    one = member(0, 1e-3, step=4, reached=tmp_path / "gone")
    one.base = check_config({"run": {"root": str(tmp_path)}, "sweep": {"scheduler": "pbt"}}, "test")
    back = handed_on(one, member(0, 1e-3))
    back.base = one.base
    with pytest.raises(RuntimeError, match=r"checkpoint of step 4 is gone; put .* away"):
        back.advance()


def test_who_is_there_first_waits_for_those_who_are_not_there_yet() -> None:
    """Played again, a member is at its next rung before Ray Tune has added the other."""
    base = check_config({
        "sweep": {"scheduler": "pbt", "grace": 2, "metric": "likelihood", "space": {
            "distill.optim.lr": {"kind": "loguniform", "low": 1e-5, "high": 1e-2}}},
    }, "test")  # fmt: skip
    search = SimpleNamespace(
        asker=SimpleNamespace(wanted=2), trials={"0": None, "1": None}, numbers={}, look=lambda *_: True
    )
    scheduler = population(search, base)  # type: ignore[arg-type]
    run: Any = SimpleNamespace(search_alg=None, trials=[])
    run.get_live_trials = run.get_trials = lambda: run.trials

    def added(number: int) -> Any:
        kept = SimpleNamespace(num_to_keep=None)
        manager = SimpleNamespace(checkpoint_manager=SimpleNamespace(checkpoint_config=kept))
        values = {"distill.optim.lr": 10.0 ** -(number + 3)}
        trial = Scheduled(f"id-{number}", {"trial": {"number": number, "values": values}}, manager)
        run.trials.append(trial)
        scheduler.on_trial_add(run, trial)
        return trial

    first = added(0)
    assert scheduler.on_trial_result(run, first, {"step": 2, "likelihood": 0.2}) == "PAUSE"
    first.status = "PAUSED"
    assert scheduler._next_perturbation_sync == 2 and scheduler.choose_trial_to_run(run) is None
    second = added(1)
    assert scheduler.on_trial_result(run, second, {"step": 2, "likelihood": 0.1}) in ("PAUSE", "NOOP")
    assert scheduler._next_perturbation_sync == 4  # together they went on


@dataclass(eq=False)
class Scheduled:
    """What Ray Tune's scheduler reads of a trial."""

    trial_id: str
    config: dict[str, Any]
    run_metadata: Any
    status: str = "RUNNING"
    experiment_tag: str = "0"
    checkpoint: Any = None
    temporary_state: Any = field(default_factory=lambda: SimpleNamespace(saving_to=None))

    def is_finished(self) -> bool:
        return False


def test_draws_follow_from_their_seed_and_leave_the_generators_as_they_were() -> None:
    def draws() -> tuple[float, float]:
        return random.random(), float(np.random.rand())

    random.seed(1), np.random.seed(1)
    calm = draws()
    found = []
    for seed in ("0 1 50", "0 1 50", "0 2 50"):
        random.seed(1), np.random.seed(1)
        with drawn_by(seed):
            found.append(draws())
        assert draws() == calm
    assert found[0] == found[1] != found[2]
