"""No image, case or near-duplicate is in train and in test: made so by prepare, and found by validate."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageEnhance

from clinkd.data import shards
from clinkd.data.fingerprint import NEAR, perceptual_hash
from clinkd.data.phantoms import PhantomSpec, draw
from clinkd.data.prepare import DataError, prepare, run
from clinkd.data.records import case_of
from clinkd.data.verify import verify

pytestmark = pytest.mark.usefixtures("ray_session")
CASES = 24


def check(folder: Path) -> dict[str, Any]:
    return verify(str(folder), lambda task, jobs: list(run(task, jobs, 0.5, "verify", None)))


def lab(folder: Path) -> list[list[str]]:
    """Cases of two slices each; every fourth case holds a copy of the case before, as a lab's exports do:
    the same bytes, another format, another size, another window. Returns the groups of cases."""
    (folder / "images").mkdir(parents=True)
    rows, groups = [], []
    for case in range(CASES):
        copy = case % 4 == 3
        for cut in range(2):
            index = (case - copy) * 2 + (0 if copy else cut)
            picture = Image.open(io.BytesIO(draw(PhantomSpec(CASES * 2), index)[0])).convert("L")
            name = f"ct_00--D--p{case}--z_{cut:04d}"
            path = folder / "images" / f"{name}.png"
            if copy and case % 3 == 0:
                picture = picture.resize((90, 90), Image.Resampling.BILINEAR)
            elif copy and case % 3 == 1:
                picture = ImageEnhance.Contrast(picture).enhance(0.9)
            picture.save(path, "JPEG" if copy and case % 3 == 2 else "PNG")
            rows.append({"id": name, "conversations": [["What does it show?", f"An image, number {index}."]]})
        groups = [*groups[:-1], [*groups[-1], f"D--p{case}"]] if copy else [*groups, [f"D--p{case}"]]
    (folder / "qa.json").write_text(json.dumps(rows))
    return groups


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> tuple[Path, list[list[str]]]:
    folder = tmp_path_factory.mktemp("lab")
    groups = lab(folder)
    prepare(folder / "qa.json", folder / "out", test_fraction=0.3, images_per_shard=10)
    return folder / "out", groups


def test_near_duplicates_of_other_cases_stay_on_one_side(prepared: tuple[Path, list[list[str]]]) -> None:
    out, groups = prepared
    rows = list(shards.iter_rows(out))
    side = {case_of(row["image"]): row["split"] for row in rows}
    assert all(len({side[case] for case in group}) == 1 for group in groups)
    assert set(side.values()) == {"train", "test"} and len(side) == CASES
    assert len(rows) == 2 * CASES  # nothing is lost to the check
    manifest = shards.read_manifest(out)
    assert manifest["leaks"]["joined_cases"] == sum(len(group) for group in groups if len(group) > 1)
    assert manifest["leaks"]["largest_group"] == 2 and manifest["leaks"]["near_duplicates"] >= CASES // 4


def test_by_looking_at_every_pair_there_is_no_leak(prepared: tuple[Path, list[list[str]]]) -> None:
    """Not through the code that made the split."""
    sides: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    for row in shards.iter_rows(prepared[0]):
        text = perceptual_hash(Image.open(io.BytesIO(row["png"])))
        sides[row["split"]].append(np.frombuffer(bytes.fromhex(str(text)), np.uint8))
    train, test = np.stack(sides["train"]), np.stack(sides["test"])
    assert np.unpackbits(train[:, None] ^ test[None], axis=-1).sum(-1).min() > NEAR


def test_without_the_check_this_lab_would_leak(prepared: tuple[Path, list[list[str]]]) -> None:
    from clinkd.data.split import assign

    groups = [group for group in prepared[1] if len(group) > 1]
    alone = assign({f"D--p{case}": {"ct"} for case in range(CASES)}, seed=0, test_fraction=0.3)
    assert any(len({alone[case] for case in group}) == 2 for group in groups)


def test_the_split_follows_from_the_manifest(prepared: tuple[Path, list[list[str]]]) -> None:
    assert check(prepared[0])["leaks"] == shards.read_manifest(prepared[0])["leaks"]


def changed(out: Path, folder: Path, change: Any) -> Path:
    """A copy of prepared data in which ``change`` has been at the first shard's rows and the manifest."""
    import hashlib
    import shutil

    shutil.copytree(out, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    path = folder / "shards" / manifest["shards"][0]["name"]
    rows = pq.read_table(path).to_pylist()
    change(rows, manifest)
    import pyarrow as pa

    pq.write_table(pa.Table.from_pylist(rows, shards.schema()), path)
    manifest["shards"][0]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def swap_side(rows: list[dict], manifest: dict) -> None:
    for row in rows[:2]:  # both slices of one case that stands alone
        row["split"] = "test" if row["split"] == "train" else "train"


def one_slice(rows: list[dict], manifest: dict) -> None:
    rows[0]["split"] = "test" if rows[0]["split"] == "train" else "train"


def another_count(rows: list[dict], manifest: dict) -> None:
    manifest["by_task"]["vg"] += 1


def leak(rows: list[dict], manifest: dict) -> None:
    """A test image's picture turns up in train under another patient's name."""
    train = next(row for row in rows if row["split"] == "train")
    train["png"] = next(row for row in rows if row["split"] == "test")["png"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (swap_side, "split|near-duplicates|by_split|images_by"),
        (one_slice, "case .* in train and in test"),
        (another_count, "by_task"),
        (leak, "near-duplicates, one in train"),
    ],
)
def test_validate_finds_what_was_changed(
    prepared: tuple[Path, list[list[str]]], tmp_path: Path, change: Any, said: str
) -> None:
    folder = changed(prepared[0], tmp_path / "copy", change)
    with pytest.raises(DataError, match=said) as caught:
        check(folder)
    assert "\n" not in str(caught.value)


def test_validate_finds_a_flipped_byte(prepared: tuple[Path, list[list[str]]], tmp_path: Path) -> None:
    folder = changed(prepared[0], tmp_path / "copy", lambda *_: None)
    path = shards.shard_paths(folder)[1]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"part-00001.parquet .* is not what was written"):
        check(folder)
