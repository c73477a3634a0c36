"""What the guide learns of a batch: the regions of each image and the phrases that speak of them."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from feeding import batch, source, write_shard

from clinkd.data.boxes import GRID, parse_boxes
from clinkd.data.images import decode
from clinkd.data.phantoms import PhantomSpec
from clinkd.data.regions import coverage, covered, region_pairs
from clinkd.data.sampler import Position, SamplerOptions
from clinkd.data.shards import iter_rows
from clinkd.model.rope import RopeGuidance
from clinkd.train.guide_task import GuideBatchSpec, GuideTask, _taught
from clinkd.train.tasks import VqaSpec

SAID = {"task": "mia", "question": "What is shown?", "answer": "Nothing much.", "trusted": True}


@pytest.fixture(scope="module")
def prepared(ray_session, tmp_path_factory) -> Path:
    from clinkd.data.prepare import prepare

    out = tmp_path_factory.mktemp("prepared")
    prepare(PhantomSpec(images=24), out, test_fraction=0.3, images_per_shard=12)
    return out


@pytest.fixture(scope="module")
def task(prepared: Path, start: Path, tmp_path_factory) -> GuideTask:
    spec = VqaSpec(str(start), RopeGuidance(), train_vision=True)
    options = SamplerOptions(0, 4, per_group=1_000_000)
    return GuideTask(
        spec, source(prepared, tmp_path_factory.mktemp("index"), GuideBatchSpec(spec.model), options)
    )


@pytest.fixture(scope="module")
def turns(prepared: Path, task: GuideTask) -> list[list[dict[str, Any]]]:
    """Of each record of the index."""
    rows = {row["id"]: row for row in iter_rows(prepared)}
    index = task.source.records()
    return [rows[index.id(record)]["turns"] for record in range(len(index))]


@pytest.fixture(scope="module")
def images(prepared: Path, task: GuideTask) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pixels and grid of each record of the index, by the processor."""
    rows = {row["id"]: row for row in iter_rows(prepared)}
    index, found = task.source.records(), []
    for record in range(len(index)):
        made = task.processor(images=[decode(rows[index.id(record)]["png"])], return_tensors="pt")
        found.append((made["pixel_values"], made["image_grid_thw"]))
    return found


def defined(task: GuideTask, turns: Any, images: Any, records: list[int]) -> dict[str, torch.Tensor]:
    """The batch of these records by the definition, made of nothing that is kept."""
    pairs = [region_pairs(turns[record]) for record in records]
    texts = list(dict.fromkeys(pair.phrase for found in pairs for pair in found))
    names = list(dict.fromkeys(pair.phrase for found in pairs for pair in found if pair.name))
    ids = task.tokenizer(
        [f" {text}" for text in texts], padding=True, padding_side="right", return_tensors="pt"
    )
    seen = [images[record] for record in records]
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


def test_batches_are_the_definitions_however_often_a_record_was_dealt(task, turns, images) -> None:
    sampler = task.source.sampler(1)
    for step, position in enumerate(islice(sampler.walk(Position()), 18)):  # three epochs, most of it kept
        groups = sampler.batch(position, 0).groups
        inputs, count = batch(task, groups, step, 18)
        wanted = defined(task, turns, images, list(dict.fromkeys(record for record, _ in groups)))
        assert inputs.keys() == wanted.keys() and count == len(wanted["regions"])
        for key, value in wanted.items():
            assert inputs[key].dtype == value.dtype, key
            if key == "pixel_values":
                torch.testing.assert_close(inputs[key], value, atol=2e-6, rtol=0)
            else:
                assert torch.equal(inputs[key], value), key


def test_a_kept_record_is_not_changed_by_its_batches(task, turns, images) -> None:
    groups = [(record, (0,)) for record in (3, 1, 2)]
    first, _ = batch(task, groups)
    for value in first.values():
        value.zero_()  # pixels too: they are copied into a batch
    again, _ = batch(task, groups)
    assert again["labels"].sum() > 0 and again["phrase_ids"].sum() > 0
    wanted = defined(task, turns, images, [3, 1, 2])["pixel_values"]
    torch.testing.assert_close(again["pixel_values"], wanted, atol=2e-6, rtol=0)


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


@pytest.mark.parametrize("records", [2, 0])
def test_records_without_regions_make_a_batch_and_so_do_none(prepared, start, tmp_path, records) -> None:
    rows = [row | {"turns": [SAID]} for row in islice(iter_rows(prepared), 2)]
    spec = VqaSpec(str(start), RopeGuidance(), train_vision=True)
    folder = write_shard(tmp_path / "data", [row | {"split": "train"} for row in rows])
    mine = GuideTask(spec, source(folder, tmp_path, GuideBatchSpec(spec.model)))
    inputs, count = batch(mine, [(record, (0,)) for record in range(records)])
    assert count == min(1, records) and inputs["phrase_ids"].shape[0] == 1
    assert inputs["labels"].shape == (32 if records else 1, 1)
    assert inputs["regions"].shape == (0,) and inputs["numbers"].shape == (0, 4)
    assert mine.build()(**inputs)["loss"].item() == 0
