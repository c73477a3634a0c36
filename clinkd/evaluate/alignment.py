"""The guide's logits of every (image, question), by Ray Data actors, and what the guide is worth.

Decisions:
- Every question also meets the images of another record of its batch: pairs that do not belong together, for
  the calibration. Where a batch holds one record, there is none.
- Which patches a question's words are about is told by the boxes of its answer, where it has any; one with
  a box of its own need not say in words what lies there.
- Retrieval R@1 is measured on test regions of records with one image (of several, no box may say which it
  lies in): the mean logit of a region's patches has to be largest for its own name among all names of the
  test split; chance is one over their number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clinkd import storage
from clinkd.data.records import sample_id

if TYPE_CHECKING:
    import pyarrow as pa

    from clinkd.model.guide import Calibration

MOST_FITTED = 1_000_000  # patches that the calibration is fitted on
MOST_ROWS = 1 << 16  # questions that it is fitted on, and that AUC is measured on


@dataclass(frozen=True)
class ScoreSpec:
    """What a scoring actor needs; travels by value."""

    encoder: str  # folder of the encoder
    names: tuple[str, ...]  # the names regions are ranked against
    folder: str = ""  # where an actor leaves what it has found, seen by all
    threads: int = 1


class Scorer:
    """One actor: the guide's encoder over records."""

    def __init__(self, spec: ScoreSpec) -> None:
        import torch

        from clinkd.model.guide import open_any

        torch.set_num_threads(spec.threads)
        self.spec = spec
        self.encoder = open_any(spec.encoder, "cuda" if torch.cuda.is_available() else "cpu")
        self.names = self.encoder.texts(list(spec.names))

    def tables(self, batches: Iterable[list[dict[str, Any]]]) -> Iterator[pa.Table]:
        """See ``data.pieces.Work``: leaves a part with the rows of all records (``scored``), and tells how
        many ``samples`` are in it, and of retrieval ``regions`` and ``right``."""
        import pyarrow as pa
        import pyarrow.compute as pc

        part = pa.concat_tables(self.scored(records) for records in batches).combine_chunks()
        name = hashlib.sha256(part.column("sample")[0].as_py().encode()).hexdigest()[:32]
        path = Path(self.spec.folder) / f"{name}.arrow"
        with storage.whole(path) as file, pa.ipc.new_file(file, part.schema) as writer:
            writer.write_table(part)
        sums = {key: [pc.sum(part.column(key)).as_py()] for key in ("regions", "right")}
        yield pa.table({"samples": [len(part)]} | sums)

    def scored(self, records: list[dict[str, Any]]) -> pa.Table:
        """One row per sample.

        Returns:
            Columns ``sample, split``; ``own, other`` (logits of the question with its record's images, and
            with another's); ``patches`` (logits of all cells), ``rows, columns`` (of each image's grid),
            ``shown`` (whether each cell is what the question is about; null where no box says);
            ``regions, right`` (retrieval; of a record's first sample).
        """
        from clinkd.data.images import decode, encoded_images
        from clinkd.data.regions import without_boxes
        from clinkd.model.guide import pair_logits, patch_logits

        shown = [[decode(png) for png in encoded_images(record)] for record in records]
        seen = iter(self.encoder.images([image for images in shown for image in images]))
        found = [[next(seen) for _ in images] for images in shown]
        texts = self.encoder.texts(
            [without_boxes(turn["question"]) for record in records for turn in record["turns"]]
        )
        questions = texts.split([len(record["turns"]) for record in records])
        rows: list[dict[str, Any]] = []
        for number, (record, images, asked) in enumerate(zip(records, found, questions, strict=True)):
            others = found[(number + 1) % len(found)]
            own = pair_logits(self.encoder, images, asked).tolist()
            other = (
                pair_logits(self.encoder, others, asked).tolist() if len(found) > 1 else [None] * len(asked)
            )
            patches, grids = patch_logits(self.encoder, images, asked)
            plain = len(images) == 1 and patches.shape[1] > 0
            regions = self._retrieved(record, images[0]) if plain else (0, 0)
            rows += _rows(record, grids, own, other, patches, regions)
        return _table(rows)

    def _retrieved(self, record: dict[str, Any], seen: Any) -> tuple[int, int]:
        """Test regions of a record that have a name, and how many of them rank their own name first."""
        import torch

        from clinkd.data.boxes import parse_boxes
        from clinkd.data.regions import coverage

        regions = right = 0
        logits = None
        for turn in record["turns"] if record["split"] == "test" else []:
            name = turn["answer"].strip().lower()
            boxes = tuple(parse_boxes(turn["question"], strict=False))
            if turn["task"] != "roc" or name not in self.spec.names or not boxes:
                continue
            if logits is None:
                logits = self.encoder.patch_logits(seen, self.names).float().cpu()
            share = torch.from_numpy(coverage(boxes, *seen.grid))
            best = int(((share[:, None] * logits).sum(0) / share.sum().clamp(min=1e-6)).argmax())
            regions, right = regions + 1, right + (self.spec.names[best] == name)
        return regions, right


def _rows(
    record: dict[str, Any], grids: tuple[tuple[int, int], ...], own: list[float], other: list[Any],
    patches: np.ndarray, retrieved: tuple[int, int],
) -> Iterator[dict[str, Any]]:  # fmt: skip
    for number, turn in enumerate(record["turns"]):
        regions, right = retrieved if number == 0 else (0, 0)
        yield {
            "sample": sample_id(record["id"], number), "split": record["split"], "own": own[number],
            "other": other[number], "patches": patches[number], "shown": _shown(turn, grids),
            "rows": [rows for rows, _ in grids], "columns": [columns for _, columns in grids],
            "regions": regions, "right": right,
        }  # fmt: skip


def _shown(turn: dict[str, Any], grids: tuple[tuple[int, int], ...]) -> Any:
    """[cells] bool, or None where no box says what the question is about (or in which image), or no cells."""
    from clinkd.data.boxes import parse_boxes
    from clinkd.data.regions import coverage, covered

    boxes = tuple(parse_boxes(turn["answer"], strict=False))
    if not boxes or len(grids) != 1 or grids[0] == (0, 0):
        return None
    return covered(coverage(boxes, *grids[0]))


def _table(rows: list[dict[str, Any]]) -> pa.Table:
    import pyarrow as pa

    kinds = {
        "sample": pa.string(), "split": pa.string(), "own": pa.float32(), "other": pa.float32(),
        "patches": pa.list_(pa.float32()), "shown": pa.list_(pa.bool_()), "rows": pa.list_(pa.uint16()),
        "columns": pa.list_(pa.uint16()), "regions": pa.int64(), "right": pa.int64(),
    }  # fmt: skip
    return pa.table({key: pa.array([row[key] for row in rows], kind) for key, kind in kinds.items()})


def parts_of(folder: Path) -> list[pa.Table]:
    """The parts that actors left, mapped, by their first samples."""
    import pyarrow as pa

    found = [pa.ipc.open_file(pa.memory_map(str(path))).read_all() for path in folder.glob("*.arrow")]
    return sorted(found, key=lambda part: str(part.column("sample")[0]))


def some(parts: Sequence[pa.Table], split: str, most: int = MOST_ROWS) -> pa.Table:
    """Rows of a split, ``most`` of them at most, evenly out of all parts."""
    import pyarrow as pa
    import pyarrow.compute as pc

    masks = [pc.equal(part.column("split"), split).to_numpy() for part in parts]
    stride = max(1, -(-sum(int(mask.sum()) for mask in masks) // most))
    found, passed = [], 0
    for part, mask in zip(parts, masks, strict=True):
        rows = np.flatnonzero(mask)
        number = passed + np.arange(len(rows))
        passed += len(rows)
        found.append(part.take(pa.array(rows[number % stride == 0])))
    return pa.concat_tables(found)


def of_split(table: pa.Table, split: str) -> pa.Table:
    import pyarrow.compute as pc

    return table.filter(pc.equal(table.column("split"), split))


def grounded(table: pa.Table) -> pa.Table:
    """Rows whose answer's boxes say which patches the question's words are about."""
    import pyarrow.compute as pc

    return table.filter(pc.is_valid(table.column("shown")))


def pairs(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Logits of questions with their own images and with another record's, and which are which."""
    own, other = (table.column(key).drop_null().to_numpy() for key in ("own", "other"))
    return np.concatenate([own, other]), np.repeat([True, False], [len(own), len(other)])


def patches(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Logits of patches, and whether the question is about them, where a box says it."""
    import pyarrow.compute as pc

    boxed = grounded(table)
    logits, shown = (
        pc.list_flatten(boxed.column(key)).to_numpy(zero_copy_only=False) for key in ("patches", "shown")
    )
    return logits, shown.astype(bool)


def auc(logits: np.ndarray, match: np.ndarray) -> float | None:
    """Area under the ROC curve: how often a match has the larger logit; None without both kinds."""
    from scipy.stats import rankdata

    hits = int(match.sum())
    if not 0 < hits < len(match):
        return None
    ranks = rankdata(logits)[match].sum()
    return float((ranks - hits * (hits + 1) / 2) / (hits * (len(match) - hits)))


def calibrate(table: pa.Table) -> Calibration:
    """Fitted on the training split; patches without one box to learn from take the images' own."""
    import torch

    from clinkd.model.guide import Calibration, fit_calibration

    train = of_split(table, "train")
    logits, match = pairs(train)
    pair = fit_calibration(torch.tensor(logits), torch.tensor(match))
    logits, shown = patches(train)
    if not shown.any():
        return Calibration(*pair, *pair)
    chosen = np.random.default_rng(0).permutation(len(logits))[:MOST_FITTED]
    return Calibration(*pair, *fit_calibration(torch.tensor(logits[chosen]), torch.tensor(shown[chosen])))
