"""What the guide sees in some of the test split's images, for the report."""

from __future__ import annotations

from typing import Any

from clinkd.data.records import sample_id
from clinkd.data.scores import FILE, Scores
from clinkd.data.shards import LIGHT, iter_rows
from clinkd.stages.base import Run

MOST = 6


def guide_samples(run: Run) -> list[dict[str, Any]]:
    """Rows of ``ReportInputs.guide_samples``: one grounding question of each modality, up to ``MOST``.

    Records with several images are left out: a picture shows one.
    """
    from transformers import AutoTokenizer

    from clinkd.model.pixels import load_processor

    path = run.done["guide"].path / FILE
    chosen: dict[str, tuple[dict[str, Any], int]] = {}
    for row in iter_rows(run.done["prepare"].path, "test", columns=LIGHT):
        turn = next((place for place, turn in enumerate(row["turns"]) if turn["task"] == "vg"), None)
        if turn is not None and not row.get("more_images"):
            chosen.setdefault(row["modality"], (row, turn))
    if not chosen or not path.is_file():
        return []
    scores, model = Scores(path), run.folder / "model"
    tokenizer, processor = AutoTokenizer.from_pretrained(model), load_processor(str(model))
    return [_laid_out(row, turn, scores, tokenizer, processor) for row, turn in list(chosen.values())[:MOST]]


def _laid_out(
    row: dict[str, Any], turn: int, scores: Scores, tokenizer: Any, processor: Any
) -> dict[str, Any]:
    """One question: its scores, and how many tokens stand before, in and after its image."""
    from clinkd.model.chat import encode
    from clinkd.model.pixels import resized
    from clinkd.model.presets import IMAGE

    asked, score = row["turns"][turn], scores[sample_id(row["id"], turn)]
    side = processor.patch_size * processor.merge_size
    high, wide = (length // side for length in resized(processor, row["height"], row["width"]))
    prompt, _ = encode(tokenizer, asked["question"], "", high * wide)
    before = prompt.index(tokenizer.convert_tokens_to_ids(IMAGE))
    return {
        "sample": sample_id(row["id"], turn), "image": row["image"], "question": asked["question"],
        "task": asked["task"], "alignment": score.alignment, "relevance": (score.relevance / 255).tolist(),
        "grid": list(score.grids[0]), "merged": [high, wide], "before": before,
        "after": len(prompt) - before - high * wide,
    }  # fmt: skip
