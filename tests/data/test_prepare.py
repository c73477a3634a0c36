"""Prepare, whole: what goes in comes out or is in the quarantine, and the same seed gives the same bytes."""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clinkd.data import shards
from clinkd.data.phantoms import PhantomSpec, draw, write_source
from clinkd.data.prepare import DataError, find_source, prepare
from clinkd.data.records import MODALITIES, TASKS, case_of
from clinkd.data.validate import REASONS

pytestmark = pytest.mark.usefixtures("ray_session")
SPEC = PhantomSpec(images=48, size=64)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Path:
    out = tmp_path_factory.mktemp("prepared")
    prepare(SPEC, out, images_per_shard=20, test_fraction=0.25)
    return out


def quarantine(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]


def hashes(out: Path) -> list[str]:
    return [shard["sha256"] for shard in shards.read_manifest(out)["shards"]]


def adds_up(manifest: dict, out: Path) -> None:
    assert (
        manifest["records_in"] == manifest["records_out"] + manifest["quarantined"] + manifest["duplicates"]
    )
    lines = quarantine(out)
    assert len(lines) == manifest["quarantined"] == sum(manifest["by_reason"].values())
    assert Counter(line["reason"] for line in lines) == manifest["by_reason"]
    assert set(manifest["by_reason"]) <= set(REASONS)
    for counts in ("by_task", "by_modality", "by_split"):
        assert sum(manifest[counts].values()) == manifest["records_out"]
    rows = list(shards.iter_rows(out))
    assert len(rows) == manifest["images"] == sum(shard["rows"] for shard in manifest["shards"])
    assert Counter(sample["task"] for sample in shards.samples(out)) == Counter(manifest["by_task"])
    assert len({row["id"] for row in rows}) == len({row["image"] for row in rows}) == len(rows)


def test_phantoms_come_out_as_drawn(prepared: Path) -> None:
    manifest = shards.read_manifest(prepared)
    adds_up(manifest, prepared)
    assert [shard["rows"] for shard in manifest["shards"]] == [20, 20, 8]
    for index, row in enumerate(shards.iter_rows(prepared)):
        png, record = draw(SPEC, index)
        assert (row["png"], row["id"], row["image"], row["modality"]) == (
            png,
            record.id,
            record.image,
            record.modality,
        )
        assert [turn["question"] for turn in row["turns"]] == [turn.question for turn in record.turns]
        assert (row["width"], row["height"]) == (64, 64)
        assert all(turn["trusted"] for turn in row["turns"])
    sides = {name: {"train": 4, "test": 2} for name in MODALITIES}
    assert Counter(row["split"] for row in shards.iter_rows(prepared)) == {"train": 36, "test": 12}
    assert manifest["images_by_modality"].keys() == sides.keys()
    assert all(min(counts.values()) >= 1 for counts in manifest["images_by_modality"].values())


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_wherever_and_however_often(
    prepared: Path, tmp_path: Path
) -> None:
    for _ in range(2):  # the second time over its own remains
        prepare(SPEC, tmp_path, images_per_shard=20, test_fraction=0.25, cpus=1)
        assert (tmp_path / "manifest.json").read_bytes() == (prepared / "manifest.json").read_bytes()
        for path in shards.shard_paths(prepared):
            assert (tmp_path / "shards" / path.name).read_bytes() == path.read_bytes()
    prepare(SPEC, tmp_path, images_per_shard=20, test_fraction=0.25, seed=1)
    assert hashes(tmp_path) != hashes(prepared)


def test_nothing_but_the_artifacts_stays(prepared: Path) -> None:
    assert sorted(os.listdir(prepared)) == ["manifest.json", "quarantine.jsonl", "shards"]
    assert str(prepared.parent) not in (prepared / "manifest.json").read_text()


def test_a_broken_run_leaves_no_manifest(prepared: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "manifest.json").write_text((prepared / "manifest.json").read_text())
    with pytest.raises(DataError):
        empty = tmp_path / "qa.json"
        (tmp_path / "images").mkdir()
        empty.write_text("[]")
        prepare(empty, out)
    with pytest.raises(DataError, match="no prepared data"):
        shards.read_manifest(out)


def test_nothing_is_written_over_its_own_source(prepared: Path, tmp_path: Path) -> None:
    write_source(PhantomSpec(4, 64), tmp_path / "lab")
    (tmp_path / "link").symlink_to(prepared)
    before = (prepared / "manifest.json").read_bytes()
    for source, out in [
        (prepared, prepared),
        (prepared, tmp_path / "link"),
        (shards.shard_paths(prepared)[0], prepared),
        (tmp_path / "lab", tmp_path / "lab"),
        (tmp_path / "lab" / "medgrit.json", tmp_path / "lab"),
    ]:
        with pytest.raises(DataError, match="holds the source"):
            prepare(source, out)
    assert (prepared / "manifest.json").read_bytes() == before
    assert sorted(os.listdir(tmp_path / "lab")) == ["images", "medgrit.json"]


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[tuple] = []
    prepare(PhantomSpec(4, 64), tmp_path, images_per_shard=2, progress=lambda *news: told.append(news))
    assert told == [("check", 1, 2), ("check", 2, 2), ("write", 1, 2), ("write", 2, 2)]


# The light readers.


def test_samples_are_flat_and_without_pixels(prepared: Path) -> None:
    everything = list(shards.samples(prepared))
    train, test = (list(shards.samples(prepared, split)) for split in ("train", "test"))
    assert len(everything) == len(train) + len(test) and train and test
    assert not {sample["image"] for sample in train} & {sample["image"] for sample in test}
    assert len({sample["sample"] for sample in everything}) == len(everything)
    first = everything[0]
    assert first["sample"] == f"{first['id']}#0" and first["task"] in TASKS
    assert {"sample", "id", "image", "modality", "task", "question", "answer", "trusted"} <= first.keys()
    assert not any(isinstance(value, bytes) for value in first.values())


def test_images_are_found_by_name(prepared: Path) -> None:
    names = [draw(SPEC, index)[1].image for index in (0, 47)]
    assert shards.images(prepared, [*names, "nobody.png"]) == {
        names[0]: draw(SPEC, 0)[0],
        names[1]: draw(SPEC, 47)[0],
    }


def test_a_folder_that_is_not_whole_says_what_to_do(prepared: Path, tmp_path: Path) -> None:
    for text in (None, "{", "[]", "{}"):
        if text is not None:
            (tmp_path / "manifest.json").write_text(text)
        with pytest.raises(DataError, match="clinkd prepare") as caught:
            list(shards.iter_rows(tmp_path))
        assert "\n" not in str(caught.value)
    (tmp_path / "manifest.json").write_text((prepared / "manifest.json").read_text())
    with pytest.raises(DataError, match=r"part-00000.parquet is listed .* not there"):
        shards.shard_paths(tmp_path)


# Med-GRIT.


def test_a_med_grit_folder_gives_the_same_records_as_its_phantoms(tmp_path: Path) -> None:
    write_source(PhantomSpec(9, 64), tmp_path / "lab")
    (tmp_path / "elsewhere").symlink_to(tmp_path / "lab" / "images")
    by_folder = prepare(tmp_path / "lab", tmp_path / "a")
    adds_up(by_folder, tmp_path / "a")
    drawn = prepare(PhantomSpec(9, 64), tmp_path / "b")
    assert by_folder["shards"] == drawn["shards"]
    by_file = prepare(tmp_path / "lab" / "medgrit.json", tmp_path / "c", images=tmp_path / "elsewhere")
    assert by_file == by_folder
    assert by_folder["source"] == {"kind": "medgrit", "files": ["medgrit.json"]}


def test_task_files_about_one_image_meet_in_one_record(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    stems = [f"ct_00--D--p{number}--z_1" for number in range(5)]
    for stem in stems:
        Image.new("L", (32, 32)).save(tmp_path / "images" / f"{stem}.png")
    box = "<box>(1,2),(3,4)</box>"
    files = {
        "VG": [["Where is the liver?", f"At {box}."]],
        "RO": [[f"What is at {box}?", "A liver that is long to tell of"]],
        "MII": [["What?", "A CT."], ["What?", "A CT image."], ["What?", "A CT."]],
    }
    for name, pairs in files.items():
        rows = [{"id": stem, "conversations": pairs} for stem in (stems if name == "VG" else stems[::-1])]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    manifest = prepare(tmp_path, tmp_path / "out", images_per_shard=2)
    adds_up(manifest, tmp_path / "out")
    assert manifest["by_task"] == {"vg": 5, "roc": 5, "rc": 0, "mia": 10}
    assert (manifest["images"], manifest["duplicates"], manifest["records_in"]) == (5, 5, 25)


def test_strict_makes_the_first_bad_row_an_error(tmp_path: Path) -> None:
    write_source(PhantomSpec(2, 64), tmp_path)
    rows = json.loads((tmp_path / "medgrit.json").read_text())
    prepare(tmp_path, tmp_path / "out", strict=True)
    rows[1]["conversations"][2][1] = ""
    (tmp_path / "medgrit.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"strict: empty_text at medgrit.json\[1\]"):
        prepare(tmp_path, tmp_path / "out", strict=True)
    assert prepare(tmp_path, tmp_path / "out")["by_reason"] == {"empty_text": 1}


def test_one_corrupted_image_among_good_ones_takes_only_its_own_rows(tmp_path: Path) -> None:
    write_source(PhantomSpec(10, 64), tmp_path)
    broken = sorted((tmp_path / "images").iterdir())[4]
    broken.write_bytes(broken.read_bytes()[:500])
    manifest = prepare(tmp_path, tmp_path / "out")
    assert manifest["images"] == 9 and set(manifest["by_reason"]) == {"truncated"}
    assert {line["image"] for line in quarantine(tmp_path / "out")} == {broken.name}


def test_no_patient_is_on_both_sides(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    rows = []
    for case in range(20):
        for kind in ("ct_00", "mr_t1"):
            for cut in range(3):
                stem = f"{kind}--D--p{case}--z_{cut:04d}"
                Image.new("L", (16, 16), case).save(tmp_path / "images" / f"{stem}.png")
                rows.append({"id": stem, "conversations": [["What?", "An image."]]})
    (tmp_path / "qa.json").write_text(json.dumps(rows))
    prepare(tmp_path, tmp_path / "out", test_fraction=0.2, images_per_shard=16)
    sides: dict[str, set[str]] = {}
    for row in shards.iter_rows(tmp_path / "out"):
        sides.setdefault(case_of(row["image"]), set()).add(row["split"])
    assert all(len(side) == 1 for side in sides.values())
    assert Counter(next(iter(side)) for side in sides.values()) == {"train": 16, "test": 4}


# SA-Med2D.


def mask_folder(folder: Path) -> None:
    """Six images with two good masks each, and masks that are bad in every way."""
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    spots = np.zeros((64, 64), np.uint8)
    spots[8:24, 8:24] = 255
    for number in range(6):
        stem = f"ct_00--D--p{number}--z_1"
        Image.new("L", (64, 64), number).save(folder / "images" / f"{stem}.png")
        for instance in range(2):
            Image.fromarray(spots.T if instance else np.roll(spots, 20 + number)).save(
                folder / "masks" / f"{stem}--0003_{instance:03d}.png"
            )
    masks, images = folder / "masks", folder / "images"
    Image.new("L", (64, 64)).save(masks / "ct_00--D--p0--z_1--0004_000.png")  # empty
    Image.new("L", (64, 9)).save(masks / "ct_00--D--p1--z_1--0004_000.png")  # wrong size
    Image.fromarray(255 - spots).save(masks / "ct_00--D--p2--z_1--0004_000.png")  # inverted
    Image.new("L", (64, 64), 9).save(masks / "ct_00--D--p3--z_1--0004_000.png")  # full
    (masks / "ct_00--D--p4--z_1--0004_000.png").write_bytes(b"no image")
    Image.fromarray(spots).save(masks / "ct_00--D--nobody--z_1--0004_000.png")  # no such image
    Image.fromarray(spots).save(masks / "ct_00--D--p4--z_1--tumor.png")  # no class number
    (images / "ct_00--D--p5--z_1.png").write_bytes(b"no image")
    Image.new("L", (64, 64)).save(images / "ct_00--D--lonely--z_1.png")


def test_a_mask_folder_adds_up_mask_by_mask(tmp_path: Path) -> None:
    mask_folder(tmp_path)
    manifest = prepare(tmp_path, tmp_path / "out", images_per_shard=2)
    adds_up(manifest, tmp_path / "out")
    assert manifest["by_reason"] == {
        "mask_bad_name": 1,
        "mask_empty": 1,
        "mask_full": 1,
        "mask_inverted": 1,
        "mask_orphan": 1,
        "mask_unreadable": 1,
        "mask_wrong_size": 1,
        "no_masks": 1,
        "unreadable_image": 2,
    }
    assert manifest["masks"] == {"in": 19, "targets": 10, "quarantined": 9}
    assert manifest["by_task"] == {"vg": 5, "roc": 10, "rc": 5, "mia": 5}
    assert manifest["images"] == 5


def test_a_union_mask_is_a_target_like_its_instances(tmp_path: Path) -> None:
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    stem = "ct_00--D--p0--z_1"
    Image.new("L", (64, 64)).save(tmp_path / "images" / f"{stem}.png")
    pixels = np.zeros((3, 64, 64), np.uint8)
    pixels[1, 8:16, 8:16] = pixels[2, 40:56, 40:60] = 255
    pixels[0] = pixels[1] | pixels[2]
    for instance, mask in enumerate(pixels):
        Image.fromarray(mask).save(tmp_path / "masks" / f"{stem}--0003_{instance:03d}.png")
    manifest = prepare(tmp_path, tmp_path / "out")
    adds_up(manifest, tmp_path / "out")
    assert manifest["masks"] == {"in": 3, "targets": 3, "quarantined": 0}
    assert manifest["by_task"] == {"vg": 2, "roc": 2, "rc": 1, "mia": 1}


@pytest.fixture
def real_smoke() -> Path:
    shared = Path(os.environ.get("CLINKD_SHARED", Path(__file__).parents[3] / "shared")) / "real-smoke"
    if not shared.is_dir():
        pytest.skip(f"no real images in {shared} (set CLINKD_SHARED)")
    return shared


def test_real_images_give_a_target_or_a_reason_for_each_mask(real_smoke: Path, tmp_path: Path) -> None:
    manifest = prepare(real_smoke, tmp_path, images_per_shard=5)
    adds_up(manifest, tmp_path)
    assert manifest["images"] == 18
    assert manifest["masks"]["in"] == manifest["masks"]["targets"] + manifest["masks"]["quarantined"] == 43
    assert all(manifest["by_task"][task] >= 18 for task in TASKS)
    for row in shards.iter_rows(tmp_path):
        assert row["png"] == (real_smoke / "images" / row["image"]).read_bytes()
    assert manifest["source"] == {"kind": "samed2d", "name": "real-smoke"}


# What the user got wrong.


def test_a_wrong_source_is_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "table.csv").write_text("a,b")
    (tmp_path / "qa.json").write_text("[]")
    for folder in ("nothing/images", "nothing/masks"):
        (tmp_path / folder).mkdir(parents=True)
    cases: list[tuple[Any, str]] = [
        (tmp_path / "none", "check data.source"),
        (tmp_path / "empty", "holds neither"),
        (tmp_path / "table.csv", "is not .json"),
        (tmp_path / "qa.json", "--images"),
        (tmp_path / "nothing", r"no usable image .*it is empty"),
        (PhantomSpec(0), "above 0"),
    ]
    for source, said in cases:
        with pytest.raises(DataError, match=said) as caught:
            prepare(source, tmp_path / "out")
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="images_dir"):
        find_source(tmp_path / "qa.json", tmp_path / "none")
    for fraction in (-0.1, 1.0, float("nan")):
        with pytest.raises(DataError, match="test fraction"):
            prepare(SPEC, tmp_path / "out", test_fraction=fraction)
    for fraction in (-0.1, 0.9, float("nan")):
        with pytest.raises(DataError, match="validation fraction"):
            prepare(SPEC, tmp_path / "out", validation_fraction=fraction)


def test_a_validation_side_comes_out_of_what_test_leaves(prepared: Path, tmp_path: Path) -> None:
    from clinkd import cli

    manifest = prepare(SPEC, tmp_path, images_per_shard=20, test_fraction=0.25, validation_fraction=0.25)
    adds_up(manifest, tmp_path)
    assert manifest["validation_fraction"] == 0.25 and set(manifest["by_split"]) == {
        "train", "validation", "test",
    }  # fmt: skip
    without, split = (
        {row["id"]: row["split"] for row in shards.iter_rows(out)} for out in (prepared, tmp_path)
    )
    assert all((split[name] == "test") == (side == "test") for name, side in without.items())
    assert Counter(split.values()) == {"train": 24, "validation": 12, "test": 12}
    assert cli.main(["validate", str(tmp_path)]) == 0  # from the shards alone


def test_data_of_which_nothing_is_good_says_why(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "qa.json").write_text(json.dumps([{"id": "ct_1", "conversations": [["q", "a"]]}]))
    with pytest.raises(DataError, match=r"no usable image .*1 missing_image.*quarantine.jsonl"):
        prepare(tmp_path, tmp_path / "out")
    assert [line["reason"] for line in quarantine(tmp_path / "out")] == ["missing_image"]


def test_a_broken_index_is_an_error_and_not_a_row(tmp_path: Path) -> None:
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    (tmp_path / "SAMed2D_v1.json").write_text('{"images/a.png": [')
    with pytest.raises(DataError, match=r"SAMed2D_v1\.json"):
        prepare(tmp_path, tmp_path / "out")
