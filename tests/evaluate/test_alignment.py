"""What the guide's logits are worth, and how they become probabilities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clinkd.data.boxes import parse_boxes
from clinkd.data.phantoms import PhantomSpec, draw
from clinkd.data.regions import coverage, covered
from clinkd.evaluate.alignment import (
    Scorer,
    ScoreSpec,
    auc,
    calibrate,
    of_split,
    pairs,
    parts_of,
    patches,
    some,
)
from clinkd.model import presets
from clinkd.model.clinkd_qwen2vl import load_model
from clinkd.model.tiny_guide import TinyEncoder, TinyGuide, save_guide

SIZE = presets.TinySize(hidden=64, layers=1, mlp=96, vision_hidden=32, vision_layers=1, image_size=112)
SPEC = PhantomSpec(3, size=112)
NAMES = ("liver", "spleen", "left kidney", "polyp")


def row(index: int, split: str) -> dict[str, Any]:
    png, record = draw(SPEC, index)
    turns = [{"task": turn.task, "question": turn.question, "answer": turn.answer} for turn in record.turns]
    return {"id": f"case{index}", "split": split, "png": png, "turns": turns, "more_png": []}


ROWS = [row(index, "test" if index % 2 else "train") for index in range(6)]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("encoder")
    texts = [text for one in ROWS for turn in one["turns"] for text in (turn["question"], turn["answer"])]
    presets.write_new_model(texts, SIZE, out, vocab_size=500, seed=0)
    torch.manual_seed(0)
    save_guide(TinyGuide(load_model(out)), out)
    return out


@pytest.fixture(scope="module")
def table(encoder: Path) -> Any:
    return Scorer(ScoreSpec(str(encoder), NAMES)).scored(ROWS)


def test_every_question_has_its_logits(table: Any, encoder: Path) -> None:
    wanted = [f"{one['id']}#{turn}" for one in ROWS for turn in range(len(one["turns"]))]
    assert table.column("sample").to_pylist() == wanted
    rows, tiny = table.to_pylist(), TinyEncoder(encoder)
    first = [found for found in rows if found["sample"].startswith("case0#")]
    assert all(len(found["patches"]) == found["rows"][0] * found["columns"][0] == 49 for found in first)
    assert [found["own"] for found in first] == pytest.approx([max(found["patches"]) for found in first])
    other = tiny.images([decoded(1)])[0]
    texts = tiny.texts([plain(turn) for turn in ROWS[0]["turns"]])
    assert [found["other"] for found in first] == pytest.approx(
        tiny.pair_logits(other, texts).tolist(), abs=1e-4
    )


def decoded(index: int) -> Any:
    from clinkd.data.images import decode

    return decode(ROWS[index]["png"])


def plain(turn: dict[str, str]) -> str:
    from clinkd.data.regions import without_boxes

    return without_boxes(turn["question"])


def test_a_record_alone_in_its_batch_meets_no_other(encoder: Path) -> None:
    found = Scorer(ScoreSpec(str(encoder), NAMES)).scored(ROWS[:1])
    assert found.column("other").null_count == len(found)
    logits, match = pairs(found)
    assert len(logits) == len(found) and match.all()


def test_what_an_actor_leaves_is_all_it_found_whatever_the_pieces(
    encoder: Path, table: Any, tmp_path: Path
) -> None:
    import pyarrow as pa

    scorer = Scorer(ScoreSpec(str(encoder), NAMES, str(tmp_path)))
    told = [row for rows in (ROWS[3:], ROWS[:3]) for out in scorer.tables([rows]) for row in out.to_pylist()]
    parts = parts_of(tmp_path)
    assert pa.concat_tables(parts).column("sample").to_pylist() == table.column("sample").to_pylist()
    for key in ("regions", "right"):
        assert sum(row[key] for row in told) == sum(table.column(key).to_pylist())
    assert sum(row["samples"] for row in told) == len(table)
    train = some(parts, "train")
    assert train.column("sample").to_pylist() == of_split(table, "train").column("sample").to_pylist()
    few = some(parts, "train", 5)
    wanted = train.column("sample").to_pylist()[:: -(-len(train) // 5)]
    assert few.column("sample").to_pylist() == wanted and len(few) <= 5


def test_the_answers_boxes_tell_which_patches_a_question_is_about(table: Any) -> None:
    turns = [turn for one in ROWS for turn in one["turns"]]
    for turn, found in zip(turns, table.to_pylist(), strict=True):
        boxes = tuple(parse_boxes(turn["answer"], strict=False))
        if not boxes:
            assert found["shown"] is None
            continue
        assert found["shown"] == covered(coverage(boxes, 7, 7)).tolist() and any(found["shown"])
    assert {"vg"} <= {turn["task"] for turn in turns}


def test_retrieval_counts_named_regions_of_the_test_split(table: Any) -> None:
    regions = {row["id"]: 0 for row in ROWS}
    for one in ROWS:
        for turn in one["turns"]:
            named = turn["task"] == "roc" and turn["answer"].strip().lower() in NAMES
            regions[one["id"]] += named and one["split"] == "test"
    for sample, count, right in zip(
        *(table.column(key).to_pylist() for key in ("sample", "regions", "right")), strict=True
    ):
        record, turn = sample.split("#")
        assert count == (regions[record] if turn == "0" else 0) and 0 <= right <= count


def test_calibration_learns_from_the_training_split_alone(table: Any) -> None:
    import pyarrow as pa

    assert len(of_split(table, "train")) + len(of_split(table, "test")) == len(table)
    mixed = table.to_pylist()
    for found in mixed:
        if found["split"] == "test":
            found["own"], found["patches"] = 50.0, [9.0] * len(found["patches"])
    assert calibrate(pa.Table.from_pylist(mixed, table.schema)) == calibrate(table)


def test_without_boxes_patches_are_calibrated_as_images_are(table: Any) -> None:
    import pyarrow as pa

    bare = [found | {"shown": None} for found in table.to_pylist()]
    fitted = calibrate(pa.Table.from_pylist(bare, table.schema))
    assert (fitted.patch_temperature, fitted.patch_bias) == (fitted.temperature, fitted.bias)


def test_patches_line_up_with_what_is_shown(table: Any) -> None:
    logits, shown = patches(table)
    boxed = [found for found in table.to_pylist() if found["shown"] is not None]
    assert logits.tolist() == [value for found in boxed for value in found["patches"]]
    assert shown.tolist() == [value for found in boxed for value in found["shown"]]


def test_auc_by_hand() -> None:
    match = np.array([True, False, True, False])
    assert auc(np.array([4.0, 3.0, 2.0, 1.0]), match) == 0.75
    assert auc(np.array([1.0, 1.0, 1.0, 1.0]), match) == 0.5
    assert auc(np.array([2.0, 1.0, 2.0, 1.0]), match) == 1.0
    assert auc(np.array([1.0, 2.0]), np.array([True, True])) is None
