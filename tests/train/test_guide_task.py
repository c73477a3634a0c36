"""What the guide learns of a batch: the regions of each image and the phrases that speak of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from clinkd.data.boxes import GRID, parse_boxes
from clinkd.data.phantoms import PhantomSpec
from clinkd.data.regions import coverage, covered, region_pairs
from clinkd.data.shards import shard_paths
from clinkd.model.rope import RopeGuidance
from clinkd.train.guide_task import GuideTask, _taught
from clinkd.train.ledger import Ledger
from clinkd.train.tasks import VqaSpec


@pytest.fixture(scope="module")
def prepared(ray_session, tmp_path_factory) -> Path:
    from clinkd.data.prepare import prepare

    out = tmp_path_factory.mktemp("prepared")
    prepare(PhantomSpec(images=24), out, test_fraction=0.3, images_per_shard=12)
    return out


class Rows:
    """The shards as Ray Data would deal them, without Ray."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def iter_batches(self, **_: Any) -> Any:
        yield from (pq.read_table(str(path)) for path in shard_paths(self.folder))


@pytest.fixture(scope="module")
def task(prepared: Path, start: Path, tmp_path_factory) -> GuideTask:
    spec = VqaSpec(str(start), RopeGuidance(), train_vision=True)
    return GuideTask(Rows(prepared), tmp_path_factory.mktemp("scratch"), spec)


def defined(task: GuideTask, records: list[int]) -> dict[str, torch.Tensor]:
    """The batch of these records by the definition, made of nothing that is kept."""
    pairs = [region_pairs(task.table.turns(record)) for record in records]
    texts = list(dict.fromkeys(pair.phrase for found in pairs for pair in found))
    names = list(dict.fromkeys(pair.phrase for found in pairs for pair in found if pair.name))
    ids = task.tokenizer(
        [f" {text}" for text in texts], padding=True, padding_side="right", return_tensors="pt"
    )
    seen = [task.images[record] for record in records]
    labels, known, regions, owners, numbers, before = [], [], [], [], [], 0
    for found, (_, grids) in zip(pairs, seen, strict=True):
        _, rows, columns = (grids[0] // torch.tensor([1, 2, 2])).tolist()
        label, sure = np.zeros((2, rows * columns, len(texts)), np.float32)
        best: dict[int, tuple[float, str, tuple[int, ...]]] = {}
        for pair in found:
            for box in pair.boxes:
                share = coverage((box,), rows, columns)
                for cell in np.flatnonzero(covered(share)).tolist():
                    if not pair.name:
                        label[cell, texts.index(pair.phrase)] = 1
                    elif share[cell] > best.get(cell, (0.0,))[0]:
                        best[cell] = (share[cell], pair.phrase, box)
            if not pair.name:
                sure[:, texts.index(pair.phrase)] = 1
        for cell, (_, name, box) in sorted(best.items()):
            regions.append(before + cell)
            owners.append(names.index(name))
            written = [task.tokenizer.encode(str(value), add_special_tokens=False) for value in box]
            numbers.append([tokens[0] for tokens in written])
        labels.append(label)
        known.append(sure)
        before += rows * columns
    return {
        "pixel_values": torch.cat([values for values, _ in seen]),
        "image_grid_thw": torch.cat([grids for _, grids in seen]),
        "phrase_ids": ids["input_ids"], "phrase_mask": ids["attention_mask"],
        "names": torch.tensor([texts.index(name) for name in names]), "regions": torch.tensor(regions),
        "owners": torch.tensor(owners), "numbers": torch.tensor(numbers),
        "labels": torch.from_numpy(np.concatenate(labels)), "known": torch.from_numpy(np.concatenate(known)),
    }  # fmt: skip


def test_batches_are_the_definitions_bit_for_bit_however_often_a_record_was_dealt(task: GuideTask) -> None:
    ledger = Ledger(task.turn_counts(), 1_000_000, 0)
    for step in range(18):  # three epochs of 24 records, so that most of it is kept from before
        groups = ledger.share(step * 4, 0, 4)
        batch, count = task.batch(groups, step, 18)
        wanted = defined(task, list(dict.fromkeys(record for record, _ in groups)))
        assert batch.keys() == wanted.keys() and count == len(wanted["regions"])
        for key, value in wanted.items():
            assert batch[key].dtype == value.dtype and torch.equal(batch[key], value), key


def test_a_kept_record_is_not_changed_by_its_batches(task: GuideTask) -> None:
    groups = [(record, (0,)) for record in (3, 1, 2)]
    first, _ = task.batch(groups, 0, 1)
    for value in first.values():
        value.zero_()  # pixels too: they are copied into a batch
    again, _ = task.batch(groups, 0, 1)
    assert again["labels"].sum() > 0 and again["phrase_ids"].sum() > 0
    assert torch.equal(again["pixel_values"], defined(task, [3, 1, 2])["pixel_values"])


def test_a_patch_belongs_to_the_region_that_covers_most_of_it() -> None:
    half = GRID // 2
    turns = [
        {"task": "roc", "question": f"<box>(0,0),({half},{GRID})</box>", "answer": "Liver"},
        {"task": "roc", "question": f"<box>(0,0),({GRID // 4},{half})</box>", "answer": "Spleen"},
        {"task": "vg", "question": "Where is the liver?", "answer": f"<box>(0,0),({half},{GRID})</box>"},
    ]
    assert parse_boxes(turns[0]["question"], strict=False)
    found = _taught(region_pairs(turns), 2, 2, int)
    assert found.regions == [0, 2] and found.owners == ["liver", "liver"]  # the spleen has half of cell 0
    assert found.names == ["liver", "spleen"] and found.numbers == [[0, 0, half, GRID]] * 2
    ((text, cells),) = found.spoken
    assert text == "Where is the liver?" and cells.tolist() == [0, 2]


def test_records_without_regions_make_a_batch(task: GuideTask, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "_taught", lambda record, grid: _taught([], 4, 4, int))
    batch, count = task.batch([(0, (0,)), (1, (0,))], 0, 1)
    assert count == 1 and batch["labels"].shape == (32, 1) and batch["phrase_ids"].shape[0] == 1
    assert batch["regions"].shape == (0,) and batch["numbers"].shape == (0, 4)
