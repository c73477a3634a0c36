"""The teacher asked once: its last hidden states at the answer tokens, kept for every epoch and every trial.

Decisions:
- Kept is the state after the last norm, in float16 [N, Ht], and the teacher's head once: logits made of
  them are the teacher's own (to half precision), at a fraction of the size.
- Ray Data actors fill it; a part file is named by the records in it and written whole, so a killed
  build goes on with the parts that are missing.
- Turns whose truth the student may not see carry the teacher's greedy answer instead, with its confidence.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clinkd.data.records import sample_id

HEAD = "head.safetensors"


@dataclass(frozen=True)
class LabelSpec:
    """What a labelling actor needs; travels by value."""

    model: str  # the teacher's Hugging Face folder
    batch_size: int = 64  # turns in one pass
    chunk_size: int = 1024
    max_new_tokens: int = 64
    threads: int = 1
    hidden_share: float = 0.0  # share of the turns whose true answers the student may not see
    seed: int = 0


def is_hidden(sample: str, share: float, seed: int) -> bool:
    """Whether the student may not see this sample's true answer; a pure function of its name."""
    import hashlib

    digest = hashlib.sha256(f"{seed}:{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share


class Labeller:
    """One actor: the teacher's answers where wanted, and its states at the answer tokens."""

    def __init__(self, spec: LabelSpec) -> None:
        import torch
        from transformers import AutoImageProcessor, AutoTokenizer

        from clinkd.model.clinkd_qwen2vl import load_model

        torch.set_num_threads(spec.threads)
        self.spec = spec
        self.model: Any = load_model(spec.model)
        self.model = self.model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = AutoTokenizer.from_pretrained(spec.model)
        self.processor = AutoImageProcessor.from_pretrained(spec.model, backend="pil")

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Ray Data's batch of records to one row per sample."""
        from clinkd.data.ingest import decode, pngs

        rows = [{key: batch[key][row] for key in batch} for row in range(len(batch["id"]))]
        pictures = [
            self.processor(images=[decode(png) for png in pngs(row)], return_tensors="pt") for row in rows
        ]
        asked = [
            _Asked(sample_id(record, number), row, turn)
            for row, (record, turns) in enumerate(zip(batch["id"], batch["turns"], strict=True))
            for number, turn in enumerate(turns)
        ]
        self._answer([item for item in asked if self._unseen(item)], pictures)
        found: list[dict[str, Any]] = []
        for at in range(0, len(asked), self.spec.batch_size):
            found += self._states(asked[at : at + self.spec.batch_size], pictures)
        keys = ("sample", "task", "answer", "source", "tokens", "hidden", "p1", "margin")
        return {key: [row[key] for row in found] for key in keys}

    def _unseen(self, item: _Asked) -> bool:
        return not item.turn["trusted"] or is_hidden(item.name, self.spec.hidden_share, self.spec.seed)

    def _encode(self, item: _Asked, pictures: list[Any], answer: str) -> tuple[list[int], list[int]]:
        from clinkd.model.chat import encode

        tokens = (pictures[item.row]["image_grid_thw"].prod(-1) // self.processor.merge_size**2).tolist()
        return encode(self.tokenizer, item.turn["question"], answer, tokens)

    def _answer(self, items: list[_Asked], pictures: list[Any]) -> None:
        """Greedy answers of the teacher in place of the truth, batches of like length."""
        from clinkd.model.generate import generate_answers

        items = sorted(items, key=lambda item: len(item.turn["question"]))
        for at in range(0, len(items), self.spec.batch_size):
            part = items[at : at + self.spec.batch_size]
            images = _images(part, pictures)
            prompts = [self._encode(item, pictures, "")[0] for item in part]
            found = generate_answers(
                self.model, self.tokenizer, prompts, **images, max_new_tokens=self.spec.max_new_tokens
            )
            for item, texts in zip(part, found, strict=True):
                item.answer, item.source = texts[0], "teacher"

    def _states(self, items: list[_Asked], pictures: list[Any]) -> list[dict[str, Any]]:
        import torch

        from clinkd.distill.losses import confidence_margin
        from clinkd.model.chat import collate

        pairs = [self._encode(item, pictures, item.answer) for item in items]
        batch, device = collate(pairs, self.tokenizer.pad_token_id), self.model.device
        inputs = {key: value.to(device) for key, value in _images(items, pictures).items()}
        with torch.inference_mode():
            hidden = self.model.forward_hidden(
                input_ids=batch["input_ids"].to(device),
                attention_mask=batch["attention_mask"].to(device),
                **inputs,
            )[:, :-1]
            chosen = (batch["labels"][:, 1:] != -100).to(device)
            p1, margin, _ = confidence_margin(
                hidden[chosen], self.model.lm_head.weight, chunk_size=self.spec.chunk_size
            )
        counts = chosen.sum(1).tolist()
        parts = zip(items, *(part.split(counts) for part in (hidden[chosen], p1, margin)), strict=True)
        return [
            {"sample": item.name, "task": item.turn["task"], "answer": item.answer, "source": item.source,
             "tokens": len(states), "hidden": states.to(torch.float16).cpu().numpy().tobytes(),
             "p1": float(sure.mean()), "margin": float(ahead.mean())}
            for item, states, sure, ahead in parts
        ]  # fmt: skip


@dataclass
class _Asked:
    """A turn on its way through the teacher; ``row`` is its record's place in the batch."""

    name: str
    row: int
    turn: dict[str, Any]
    answer: str = ""
    source: str = "truth"

    def __post_init__(self) -> None:
        self.answer = self.turn["answer"]


def _images(items: list[_Asked], pictures: list[Any]) -> dict[str, Any]:
    """The distinct images of some turns, and which of them each turn shows, turn after turn."""
    import torch

    rows = list(dict.fromkeys(item.row for item in items))
    sizes = [len(pictures[row]["image_grid_thw"]) for row in rows]
    own = dict(zip(rows, torch.arange(sum(sizes)).split(sizes), strict=True))
    return {
        "pixel_values": torch.cat([pictures[row]["pixel_values"] for row in rows]),
        "image_grid_thw": torch.cat([pictures[row]["image_grid_thw"] for row in rows]),
        "image_index": torch.cat([own[item.row] for item in items]),
    }


def write_head(model: Path, out: Path) -> None:
    """The teacher's head, once, beside its states."""
    from safetensors.torch import save_file

    from clinkd.model.clinkd_qwen2vl import load_model

    save_file({"head": load_model(model).lm_head.weight.detach().clone()}, out / HEAD)


class TeacherCache:
    """Reads a cache: states, answers and margins by sample."""

    def __init__(self, folder: Path) -> None:
        import pyarrow.parquet as pq
        from safetensors.torch import load_file

        self.head = load_file(folder / HEAD)["head"].float()  # [Vt, Ht]
        table = pq.read_table(folder / "states")
        self._row = {name: row for row, name in enumerate(table.column("sample").to_pylist())}
        self._hidden = table.column("hidden").combine_chunks()
        self.answers = dict(zip(self._row, table.column("answer").to_pylist(), strict=True))
        self.margins = dict(zip(self._row, table.column("margin").to_pylist(), strict=True))

    def __contains__(self, sample: str) -> bool:
        return sample in self._row

    def hidden(self, sample: str) -> np.ndarray:
        """The teacher's states at the sample's answer tokens, float16 [N, Ht]."""
        raw = self._hidden[self._row[sample]].as_py()
        return np.frombuffer(raw, np.float16).reshape(-1, self.head.shape[1])
