"""Images on their way into a batch: a frozen tower's are cut and seen once in a process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from feeding import answers, source, write_shard
from feeding import batch as batch_of
from phantom_rows import phantom_model, phantom_row

from clinkd.data.phantoms import PhantomSpec
from clinkd.data.tasks import FeedError
from clinkd.model import tower
from clinkd.model.pixels import Numbers
from clinkd.model.rope import RopeGuidance
from clinkd.train import batches, tasks
from clinkd.train.meter import Meter
from clinkd.train.tasks import SupervisedTask, VqaSpec

SPEC = PhantomSpec(images=8, size=56)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return phantom_model(SPEC, tmp_path_factory.mktemp("model"), layers=1)


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch) -> tower.States:
    """A process that has seen nothing."""
    states = tower.States()
    for module in (tower, tasks):
        monkeypatch.setattr(module, "STATES", states)
    batches.batch_maker.cache_clear()
    return states


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows: list[dict[str, Any]] = [phantom_row(SPEC, number) for number in range(3)]
    rows[2]["more_png"] = [phantom_row(SPEC, 3)["png"]]  # a record of two images
    return write_shard(tmp_path_factory.mktemp("data") / "prepared", rows)


@pytest.fixture
def make(folder: Path, prepared: Path, tmp_path: Path) -> Any:
    def task(*, train_vision: bool = False, zero: int = 0, **how: Any) -> SupervisedTask:
        spec = VqaSpec(str(folder), RopeGuidance(), train_vision, **how)
        return SupervisedTask(spec, source(prepared, tmp_path, answers(spec)), zero)

    return task


def batch(of: Any, *groups: tuple[int, tuple[int, ...]]) -> dict[str, Any]:
    return batch_of(of, groups)[0]


def test_pixels_come_with_what_the_tower_has_not_seen(make: Any) -> None:
    mine = make()
    module = mine.build()
    first = batch(mine, (0, (0, 1)), (1, (0,)))
    assert first["shown"].unseen == [0, 1]
    assert len(first["pixel_values"]) == first["image_grid_thw"].prod(-1).sum()
    module(**first)
    mixed = batch(mine, (2, (0,)), (1, (0,)))
    assert mixed["shown"].unseen == [0, 1]  # the two images of one record
    assert len(mixed["pixel_values"]) == mixed["image_grid_thw"][:2].prod(-1).sum()
    module(**mixed)
    assert batch(mine, (0, (0,)), (2, (1,)))["pixel_values"] is None


def test_the_next_trial_finds_what_this_one_saw(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = [(0, (0, 1, 2)), (2, (0,))]
    mine = make()
    before = mine.build()(**batch(mine, *groups))["loss"]

    def never(*_: Any) -> Any:
        raise AssertionError("seen again")

    monkeypatch.setattr(Numbers, "__call__", never)
    other = make()
    module, again = other.build(), batch(other, *groups)
    assert again["pixel_values"] is None and torch.equal(module(**again)["loss"], before)


def test_the_loss_is_that_of_pixels(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = make()
    found = mine.build()(**batch(mine, (0, (0, 1)), (2, (0,))))["loss"]
    monkeypatch.setattr(SupervisedTask, "keeps", False)
    plain = make()
    given = batch(plain, (0, (0, 1)), (2, (0,)))
    assert "shown" not in given
    torch.testing.assert_close(plain.build()(**given)["loss"], found, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    "how", [{"train_vision": True}, {"zero": 3}, {"min_pixels": 100 * 28 * 28, "max_pixels": 200 * 28 * 28}]
)
def test_who_may_not_share_does_not(make: Any, how: dict[str, Any]) -> None:
    mine = make()
    module = mine.build()
    module(**batch(mine, (0, (0,))))
    other = make(**how)
    if "zero" not in how:  # its module is registered with DeepSpeed
        other.build()
    assert len(batch(other, (0, (0,)))["pixel_values"])  # trained, under ZeRO-3, or cut into other patches


def test_an_image_is_cut_once_while_it_is_kept(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = make()
    batch(mine, (0, (0,)), (2, (0,)))

    def never(*_: Any) -> Any:
        raise AssertionError("cut again")

    monkeypatch.setattr(batches, "cut", never)
    batch(make(), (2, (0,)), (0, (1,)))
    with pytest.raises(FeedError, match="cut again"):
        batch(mine, (1, (0,)))


def test_another_images_bytes_are_another_image(make: Any) -> None:
    mine = make()
    mine.build()
    assert len(set(batch(mine, (0, (0,)), (1, (0,)), (2, (0,)))["shown"].keys)) == 4


def test_an_image_that_does_not_pass_the_tower_costs_no_operations(make: Any) -> None:
    mine = make()
    module = mine.build()
    meter = Meter(module)
    first = batch(mine, (0, (0,)))
    module(**first)
    later = batch(mine, (0, (0,)))
    (_, seen), (tokens, again) = meter.count(first, 5), meter.count(later, 5)
    assert tokens == meter.count(first, 5)[0] and 0 < again < seen
