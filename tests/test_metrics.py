"""The table of metrics, and what training tells of itself; a list of what was heard stands in for Ray."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import clinkd
from clinkd import metrics
from clinkd.config import RunConfig, WatchSection
from clinkd.data.shards import DataError
from clinkd.metrics import TABLE, TAGS, Quantity

ROOT = Path(clinkd.__file__).parent
UNITS = {"jobs", "steps", "nats", "seconds", "samples", "tokens", "bytes", "rows", "ratio", "trials", "score"}


class Heard:
    """In the place of Ray's gauges and counters: (name, value, tags), in their order."""

    def __init__(self) -> None:
        self.all: list[tuple[str, float, dict[str, str]]] = []

    def made(self, quantity: Quantity) -> Any:
        heard = self

        class Meter:
            def set(self, value: float, tags: dict[str, str]) -> None:
                assert set(tags) == set(quantity.tags) and quantity.kind == "gauge"
                heard.all.append((quantity.name, value, tags))

            def inc(self, value: float, tags: dict[str, str]) -> None:
                assert set(tags) == set(quantity.tags) and quantity.kind == "counter" and value > 0
                heard.all.append((quantity.name, value, tags))

        return Meter()

    def values(self, quantity: Quantity) -> list[float]:
        return [value for name, value, _ in self.all if name == quantity.name]


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> Iterator[Heard]:
    found = Heard()
    monkeypatch.setattr(metrics, "_in_ray", lambda: True)
    monkeypatch.setattr(metrics, "_made", found.made)
    metrics.about(run="mine", stage="teacher", rank="0")
    yield found
    metrics.about()


@pytest.mark.parametrize("quantity", TABLE, ids=lambda quantity: quantity.name)
def test_a_name_says_area_quantity_and_unit(quantity: Quantity) -> None:
    assert re.fullmatch(r"clinkd_(train|checkpoint|data|reflect|sweep)(_[a-z]+){1,4}", quantity.name)
    assert quantity.unit in UNITS and not quantity.name.endswith("_total")
    assert ("timestamp" in quantity.name) == quantity.name.endswith("_timestamp_seconds")
    assert quantity.description.endswith(".") and len(quantity.description) > 10


def test_a_name_stands_once_and_no_tag_is_outside_of_the_list() -> None:
    assert len({quantity.name for quantity in TABLE}) == len(TABLE)
    assert {tag for quantity in TABLE for tag in quantity.tags} <= set(TAGS)
    assert all(quantity.tags[0] == "run" for quantity in TABLE)


def test_the_name_of_a_run_holds_nothing_but_what_may_stand_in_a_tag() -> None:
    pattern = RunConfig.model_json_schema()["$defs"]["RunSection"]["properties"]["name"]["pattern"]
    assert re.fullmatch(pattern, "qwen2-vl-2b_a.1")
    assert not re.search(pattern, "a patient's name") and not re.search(pattern, "x" * 65)


def calls() -> Iterator[tuple[str, str, set[str] | None]]:
    """(constant, method, names of the tags, or None for a mapping) of each call in the package."""
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Call(
                    func=ast.Attribute(
                        value=ast.Attribute(value=ast.Name(id="metrics"), attr=name), attr=method
                    ),
                    keywords=given,
                ):
                    tags = {word.arg for word in given}
                    yield name, method, None if None in tags else {str(tag) for tag in tags}


def test_every_quantity_is_told_somewhere_and_as_what_it_is() -> None:
    told = set()
    for name, method, tags in calls():
        quantity = getattr(metrics, name)
        assert method == {"gauge": "set", "counter": "add"}[quantity.kind], name
        assert tags is None or tags <= set(quantity.tags), name
        told.add(quantity)
    assert told == set(TABLE)


def test_without_ray_nothing_happens_and_none_is_imported_or_started() -> None:
    script = (
        "import sys; from clinkd import metrics as m\n"
        "tell = lambda: [q.set(1, run='a') if q.kind == 'gauge' else q.add(1) for q in m.TABLE]\n"
        "tell(); assert 'ray' not in sys.modules\n"
        "import ray; tell(); assert not ray.is_initialized() and m._made.cache_info().currsize == 0\n"
    )
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", script], capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_a_client_of_a_distant_ray_is_no_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Client:
        class ray:
            is_connected = staticmethod(lambda: True)

    monkeypatch.setitem(sys.modules, "ray", type("ray", (), {"is_initialized": staticmethod(lambda: True)}))
    monkeypatch.delitem(sys.modules, "ray.util.client", raising=False)
    assert metrics._in_ray()
    monkeypatch.setitem(sys.modules, "ray.util.client", Client)
    assert not metrics._in_ray()


def test_a_ray_that_takes_no_metrics_is_told_of_once_and_ends_no_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(quantity: Quantity) -> Any:
        raise RuntimeError("no agent")

    monkeypatch.setattr(metrics, "_in_ray", lambda: True)
    monkeypatch.setattr(metrics, "_made", broken)
    monkeypatch.setattr(metrics, "_failed", False)
    with pytest.warns(UserWarning, match="no metrics here"):
        metrics.TRAIN_STEP.set(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        metrics.TRAIN_STEP.set(2)
        metrics.TRAIN_SAMPLES.add(2)


def test_what_a_process_is_about_goes_with_each_number_and_is_replaced_by_the_next_job(heard: Heard) -> None:
    metrics.TRAIN_STEP.set(1)
    metrics.about(run="mine", stage="distill")
    metrics.TRAIN_STEP.set(2)
    metrics.TRAIN_GPU.set(3)
    metrics.TRAIN_STEP.set(4, stage="said")
    assert [tags["stage"] for _, _, tags in heard.all] == ["teacher", "distill", "distill", "said"]
    assert heard.all[2][2] == {"run": "mine", "stage": "distill", "rank": ""}


def test_a_counter_takes_no_step_back_or_on_the_spot(heard: Heard) -> None:
    metrics.TRAIN_SAMPLES.add(0)
    metrics.TRAIN_SAMPLES.add(3)
    assert heard.values(metrics.TRAIN_SAMPLES) == [3]


def test_rank_0_tells_of_a_step_and_a_loss_that_is_no_number_is_not_sent(heard: Heard) -> None:
    import torch

    from clinkd.train.meter import Totals, publish

    totals, cpu = Totals(8.0, 4, 100, 0.0, False, False, [0.1, 0.1]), torch.device("cpu")
    publish(3, 10, 16.0, totals, 0.5, cpu, rank=1)
    assert heard.all == []
    publish(3, 10, 16.0, totals, 0.5, cpu, rank=0)
    publish(4, 10, float("nan"), totals, 0.5, cpu, rank=0)
    assert heard.values(metrics.TRAIN_STEP) == [3, 4] and heard.values(metrics.TRAIN_LOSS) == [2.0]
    assert heard.values(metrics.TRAIN_SAMPLES) == [4, 4] and heard.values(metrics.TRAIN_TOKENS) == [100, 100]


def test_the_time_of_the_last_finite_step_stands_still_while_steps_are_left_out(
    heard: Heard, tmp_path: Path
) -> None:
    from clinkd.train.guard import Guard

    before = time.time()
    guard, other = Guard(WatchSection(), "teacher", tmp_path / "e"), Guard(WatchSection(), "teacher", None)
    for watching in (guard, other):
        watching.step(1, 2.0, 0.1, [], applied=True)
        watching.step(2, float("nan"), 0.1, [], applied=False)
        watching.step(3, 2.0, 0.1, [], applied=False)  # its gradients were not
    (finite,) = heard.values(metrics.TRAIN_FINITE)
    assert before <= finite <= time.time()
    assert heard.values(metrics.TRAIN_NONFINITE) == [1, 1]
    assert len(heard.values(metrics.TRAIN_NONFINITE_AT)) == 2
    with pytest.raises(DataError):
        Guard(WatchSection(nonfinite="stop"), "t", tmp_path / "e").step(1, float("inf"), 0.1, [], True)
    assert len(heard.values(metrics.TRAIN_NONFINITE)) == 3


def test_a_checkpoint_is_told_of_when_it_is_whole(heard: Heard, tmp_path: Path) -> None:
    from clinkd.train.checkpoint import Checkpoints

    def full(folder: Path) -> None:
        raise ValueError("a rank failed")

    kept = Checkpoints(tmp_path, 0, lambda: None)
    with pytest.raises(ValueError):
        kept.save(5, full)
    assert heard.all == []
    kept.save(10, lambda folder: (folder / "part").write_bytes(b"x" * 100) and None)
    assert heard.values(metrics.CHECKPOINT_SIZE) == [100]
    assert len(heard.values(metrics.CHECKPOINT_SAVED)) == len(heard.values(metrics.CHECKPOINT_SECONDS)) == 1


def test_a_copy_that_fails_leaves_the_time_of_the_last_whole_copy_where_it_was(
    heard: Heard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clinkd import storage
    from clinkd.train.checkpoint import Checkpoints
    from clinkd.train.offsite import Offsite

    kept, said = Checkpoints(tmp_path / "here", 0, lambda: None), []
    store = Offsite(str(tmp_path / "store"), kept.folder, said.append)
    store.begin()
    for step in (1, 2):
        kept.save(step, lambda folder: (folder / "part").write_bytes(b"x") and None)
        if step == 2:
            monkeypatch.setattr(storage, "copy_to", lambda *_: (_ for _ in ()).throw(OSError(5, "gone")))
        store.send(kept.folder / f"step-{step:08d}")
        store.close(20)
    sent, copied = heard.values(metrics.CHECKPOINT_SENT), heard.values(metrics.CHECKPOINT_COPIED)
    assert len(sent) == 2 and said
    assert copied[1:] == sent[:1] and copied[0] <= sent[0] < sent[1]


def test_a_job_is_under_way_until_it_ends_however_it_ends(heard: Heard, tmp_path: Path) -> None:
    from clinkd.config import ComputeSection, OptimSection
    from clinkd.train.crew import _announced
    from clinkd.train.loop import TrainJob

    job = TrainJob(
        stage="distill", make_task=lambda rows, scratch: None, optim=OptimSection(), compute=ComputeSection(),  # type: ignore[arg-type,return-value]
        zero_stage=2, steps=1, seed=0, out=str(tmp_path), work=str(tmp_path), run="mine",
    )  # fmt: skip
    with pytest.raises(KeyboardInterrupt), _announced(job):
        assert heard.values(metrics.TRAIN_ACTIVE) == [1]
        raise KeyboardInterrupt
    assert heard.values(metrics.TRAIN_ACTIVE) == [1, 0]
    assert heard.all[0][0] == metrics.TRAIN_BEGUN.name
    assert heard.all[-1][2] == {"run": "mine", "stage": "distill", "zero_stage": "2"}


def test_a_sweep_tells_how_many_trials_are_in_each_state_and_the_best_of_each_metric(heard: Heard) -> None:
    import optuna

    from clinkd.tune.sweep import _publish

    class Asked:
        config = RunConfig.model_validate({"run": {"name": "swept"}, "sweep": {"metric": ["vg", "roc"]}})
        wanted = 5

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(directions=["maximize"] * 2)
    for values in ([0.2, 0.9], [0.7, 0.1]):
        study.tell(study.ask(), values)
    study.tell(study.ask(), state=optuna.trial.TrialState.FAIL)
    study.ask()
    trials = study.get_trials()
    _publish(trials, [trial for trial in trials if trial.state.is_finished()], Asked())  # type: ignore[arg-type]
    states = {tags["state"]: value for name, value, tags in heard.all if name == metrics.SWEEP_TRIALS.name}
    assert states == {"running": 1, "waiting": 0, "complete": 2, "pruned": 0, "fail": 1}
    best = {tags["metric"]: value for name, value, tags in heard.all if name == metrics.SWEEP_BEST.name}
    assert best == {"vg": 0.7, "roc": 0.9} and heard.values(metrics.SWEEP_WANTED) == [5]
    assert {tags["run"] for _, _, tags in heard.all} == {"swept"}
