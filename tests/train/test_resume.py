"""A job goes on where it stands: with other workers, after a signal, past steps that would spoil it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from line_task import train_line
from safetensors.torch import load_file

from clinkd.config import WatchSection
from clinkd.data.shards import DataError
from clinkd.train.account import dealt
from clinkd.train.checkpoint import Checkpoints
from clinkd.train.resume import Begun, Standing, begun, loadable, places


@given(st.integers(1, 24), st.integers(1, 9))
def test_any_number_of_workers_shares_a_step_out_whole(micros: int, world: int) -> None:
    ranks = [places(micros, rank, world) for rank in range(world)]
    assert len({len(own) for own in ranks}) == 1  # collectives want every rank
    assert sorted(place for own in ranks for place in own if place is not None) == list(range(micros))


def test_a_job_keeps_the_steps_and_workers_it_began_with(tmp_path: Path) -> None:
    folder = tmp_path / "distill"
    assert begun(folder, 40, 2) == Begun(40, 2)
    assert begun(folder, 80, 1) == Begun(80, 1)  # nothing was trained: it begins now
    (folder / "step-00000005").mkdir()
    assert begun(folder, 40, 2) == Begun(80, 1)
    (folder / "step-00000005").rename(folder / "step-00000005.damaged")
    assert begun(folder, 40, 2) == Begun(40, 2)


@pytest.mark.parametrize(
    ("ranks", "zero", "fits"), [(2, 1, True), (1, 1, False), (2, 2, False), (2, 0, False)]
)
def test_shards_fit_the_ranks_and_stage_that_wrote_them(
    tmp_path: Path, ranks: int, zero: int, fits: bool
) -> None:
    standing = Standing(5, 2, 1, Begun(40, 2), {"epoch": 0, "round": 5})
    standing.write(tmp_path)
    assert Standing.read(tmp_path) == standing and standing.fits(ranks, zero) is fits
    assert Standing(5, 2, 0, Begun(40, 2)).fits(7, 0)


@pytest.mark.parametrize("kept", [None, "{}", '{"step": 5, "more": 1}', "not json"])
def test_a_checkpoint_of_another_version_is_refused_with_what_to_do(tmp_path: Path, kept: str | None) -> None:
    checkpoints = Checkpoints(tmp_path / "distill", 0, lambda: None)
    checkpoints.save(5, lambda folder: (folder / "standing.json").write_text(kept) if kept else None)
    with pytest.raises(DataError, match=r"remove .*distill to begin the stage anew"):
        loadable(checkpoints, 2, 1, lambda: None)


def column(lines: list[dict], key: str) -> list[float]:
    return [line[key] for line in lines]


@pytest.mark.slow
def test_two_workers_then_one_then_two_learn_what_two_do(ray_session: None, tmp_path: Path) -> None:
    """Also from one ZeRO stage to another: the same samples in each step, the same curve and weights."""
    watch = WatchSection(samples=True)
    ways = {"1": (1, 1, 1), "3": (3, 3, 3), "change": (2, 1, 2), "muon": (0, 0, 0)}
    rates = {way: 0.02 if way == "muon" else None for way in ways}
    calm = {
        way: train_line(tmp_path / f"calm-{way}", zero=stages[0], watch=watch, muon_lr=rates[way])
        for way, stages in ways.items()
    }
    lines = {}
    for workers, until, phase in ((2, 5, 0), (1, 9, 1), (2, None, 2)):
        for way, stages in ways.items():
            lines[way] = train_line(
                tmp_path / way, zero=stages[phase], workers=workers, until=until, dealt=2, watch=watch,
                muon_lr=rates[way],
            )  # fmt: skip
    for way in ways:
        assert column(lines[way], "step") == list(range(1, 13))
        assert column(lines[way], "x") == column(calm[way], "x")
        assert column(lines[way], "lr") == column(calm[way], "lr")
        assert column(lines[way], "loss") == pytest.approx(column(calm[way], "loss"), rel=1e-4), way
        ours, theirs = (
            load_file(tmp_path / name / "model" / "model.safetensors") for name in (way, f"calm-{way}")
        )
        assert all(ours[key].allclose(theirs[key], rtol=1e-4, atol=1e-6) for key in theirs)
        found, wanted = (dealt(tmp_path / name) for name in (way, f"calm-{way}"))
        assert [sorted(step) for step in found.values()] == [sorted(step) for step in wanted.values()]
        epochs = [step for step in found if step <= 8], [step for step in found if step > 8]  # 4 of 32 a step
        first, second = ([sample for step in epoch for sample in found[step]] for epoch in epochs)
        assert sorted(map(int, first)) == list(range(32)) and len(set(second)) == len(second)
        assert [(line["event"], line["step"]) for line in events(tmp_path / way)] == [
            ("resumed", 5), ("resumed", 9)
        ]  # fmt: skip


@pytest.mark.slow
def test_a_checkpoint_of_zero_0_goes_on_under_no_other_stage(ray_session: None, tmp_path: Path) -> None:
    train_line(tmp_path / "job", zero=0, until=5)
    with pytest.raises(DataError, match=r"compute\.zero_stage: .* give 0, or remove"):
        train_line(tmp_path / "job", zero=1)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [pytest.param(1, marks=pytest.mark.full), 3])
def test_asked_to_stop_it_saves_and_goes_on_where_it_was(
    ray_session: None, tmp_path: Path, zero: int
) -> None:
    calm = train_line(tmp_path / "calm", zero=zero)
    stop = (7, tmp_path / "job" / "work" / "line" / "stop")
    first = train_line(tmp_path / "job", zero=zero, stop=stop)
    assert 7 <= len(first) <= 8 and not (tmp_path / "job" / "model").exists()
    again = train_line(tmp_path / "job", zero=zero)
    assert again[: len(first)] == first  # no step was taken twice
    assert column(again, "loss") == column(calm, "loss")


@pytest.mark.slow
@pytest.mark.parametrize(
    "zero",
    [
        0,  # the one stage that goes back to its checkpoint
        1,
        *(pytest.param(stage, marks=pytest.mark.full) for stage in (2, 3)),
    ],
)
def test_a_step_that_is_not_finite_is_left_out(ray_session: None, tmp_path: Path, zero: int) -> None:
    """ZeRO-0 goes back to its last checkpoint, the others leave the weights alone."""
    calm = train_line(tmp_path / "calm", zero=zero)
    lines = train_line(tmp_path / "job", zero=zero, nan=(8,))
    (event,) = {line["event"] for line in events(tmp_path / "job")}
    assert event == "nonfinite"
    told = [line for line in lines if "loss" in line]
    assert column(told, "step") == [step for step in range(1, 13) if step != 8]
    assert column(told, "x") == [line["x"] for line in calm if line["step"] != 8]  # the rest comes as ever
    assert column(told, "lr") == [line["lr"] for line in calm if line["step"] != 8]
    assert column(told, "loss")[:7] == column(calm, "loss")[:7]
    state = load_file(tmp_path / "job" / "model" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in state.values())


@pytest.mark.slow
def test_training_that_stays_without_numbers_ends_with_advice(ray_session: None, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not finite, 3 times in a row; lower the learning rate"):
        train_line(tmp_path / "job", zero=1, nan=(6, 7, 8, 9), watch=WatchSection(patience=2))


@pytest.mark.slow
def test_a_folder_that_is_gone_comes_back_from_the_store(ray_session: None, tmp_path: Path) -> None:
    calm = train_line(tmp_path / "calm", zero=1)
    store = str(tmp_path / "store")
    first = train_line(tmp_path / "job", zero=1, until=8, store=store)
    shutil.rmtree(tmp_path / "job" / "work")
    again = train_line(tmp_path / "job", zero=1, store=store)
    assert again[:8] == first  # these steps were not taken again
    assert column(again, "step") == list(range(1, 13)) and column(again, "loss") == column(calm, "loss")


def events(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
