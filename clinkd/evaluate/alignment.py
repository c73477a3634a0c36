"""The guide's scores of every (image, question), by Ray Data actors, and what the guide is worth.

Decisions:
- Raw scores are the largest patch logit over all of a record's images: a question about several is aligned
  with them if one of them shows what it asks about. They are calibrated on the training split: a question
  with its own images against the same question with another record's of the batch.
- Retrieval R@1 is measured on test regions of records with one image (of several, no box may say which it
  lies in): the mean logit of a region's patches has to be largest for its own name among all names of the
  test split; chance is one over their number.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clinkd.data.records import sample_id


@dataclass(frozen=True)
class ScoreSpec:
    """What a scoring actor needs; travels by value."""

    guide: str  # folder of the guide: a model's folder with guide.safetensors
    names: tuple[str, ...]  # the names regions are ranked against
    threads: int = 1


class Scorer:
    """One actor: the guide over records."""

    def __init__(self, spec: ScoreSpec) -> None:
        import torch
        from transformers import AutoImageProcessor, AutoTokenizer

        from clinkd.model.clinkd_qwen2vl import load_model
        from clinkd.model.guide import load_guide

        torch.set_num_threads(spec.threads)
        self.spec = spec
        self.guide, _ = load_guide(Path(spec.guide), load_model(spec.guide))
        self.tokenizer = AutoTokenizer.from_pretrained(spec.guide)
        self.processor = AutoImageProcessor.from_pretrained(spec.guide)
        self.names = self._phrases(list(spec.names))

    def _phrases(self, texts: list[str]) -> Any:
        import torch

        # A leading space, as in training: the tokens of words inside a sentence.
        spaced = [f" {text}" for text in texts]
        ids = self.tokenizer(spaced, padding=True, padding_side="right", return_tensors="pt")
        with torch.inference_mode():
            return self.guide.phrases(ids["input_ids"], ids["attention_mask"])

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Rows ``sample, split, own, other`` (raw scores) and, for regions of the test split, ``right``."""
        import torch

        from clinkd.data.ingest import decode, pngs
        from clinkd.model.guide import image_scores

        images = [
            [decode(png) for png in pngs({key: batch[key][row] for key in batch})]
            for row in range(len(batch["id"]))
        ]
        seen = self.processor(images=[image for shown in images for image in shown], return_tensors="pt")
        grids = seen["image_grid_thw"].split([len(shown) for shown in images])
        # Patches of each record: of all its images.
        counts = [int(grid.prod(-1).sum()) // self.processor.merge_size**2 for grid in grids]
        texts = [_plain(turn["question"]) for turns in batch["turns"] for turn in turns]
        with torch.inference_mode():
            patches = self.guide.patches(seen["pixel_values"], seen["image_grid_thw"])
            scores = image_scores(self.guide.logits(patches, self._phrases(texts)), counts)
            named = self.guide.logits(patches, self.names).split(counts)
        out: dict[str, list[Any]] = {
            key: [] for key in ("sample", "split", "own", "other", "regions", "right")
        }
        column = 0
        for row, turns in enumerate(batch["turns"]):
            regions = right = 0
            if len(grids[row]) == 1:
                regions, right = self._retrieved(list(turns), named[row], grids[row][0])
            for number in range(len(turns)):
                out["sample"].append(sample_id(batch["id"][row], number))
                out["split"].append(batch["split"][row])
                out["own"].append(float(scores[row, column]))
                out["other"].append(float(scores[(row + 1) % len(images), column]))
                out["regions"].append(regions if number == 0 else 0)
                out["right"].append(right if number == 0 else 0)
                column += 1
        return out

    def _retrieved(self, turns: list[dict[str, Any]], logits: Any, grid: Any) -> tuple[int, int]:
        """Regions of a record that have a name, and how many of them rank their own name first."""
        import torch

        from clinkd.data.boxes import parse_boxes
        from clinkd.data.regions import coverage

        _, rows, columns = (
            grid // torch.tensor([1, self.processor.merge_size, self.processor.merge_size])
        ).tolist()
        regions = right = 0
        for turn in turns:
            name = turn["answer"].strip().lower()
            boxes = tuple(parse_boxes(turn["question"], strict=False))
            if turn["task"] != "roc" or name not in self.spec.names or not boxes:
                continue
            share = torch.from_numpy(coverage(boxes, rows, columns))
            best = int(((share[:, None] * logits).sum(0) / share.sum().clamp(min=1e-6)).argmax())
            regions, right = regions + 1, right + (self.spec.names[best] == name)
        return regions, right


def _plain(question: str) -> str:
    """A question without its boxes: the guide knows words."""
    from clinkd.data.regions import without_boxes

    return without_boxes(question)


def score(
    records: Any, spec: ScoreSpec, *, actors: int, cpus: float = 0.5, batch: int = 32
) -> Iterator[dict]:
    """Rows of :class:`Scorer` for a Ray Dataset of records."""
    import ray.data

    yield from records.map_batches(
        Scorer, fn_constructor_args=(spec,), batch_size=batch,
        compute=ray.data.ActorPoolStrategy(size=actors), num_cpus=cpus,
    ).iter_rows()  # fmt: skip
