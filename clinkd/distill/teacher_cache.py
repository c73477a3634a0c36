"""The teacher asked once: its last hidden states at the answer tokens, kept for every epoch and every trial.

Decisions:
- Kept is the state after the last norm, in float16 [N, Ht], and the teacher's head once: logits made of
  them are the teacher's own (to half precision), at a fraction of the size.
- Ray Data actors fill it; a part file is named by the records in it and written whole, so a killed
  build goes on with the parts that are missing.
- Turns whose truth the student may not see carry the teacher's greedy answer instead, with its confidence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clinkd.data.records import sample_id

HEAD = "head.safetensors"


@dataclass(frozen=True)
class LabelSpec:
    """What a labelling actor needs; travels by value."""

    model: str  # the teacher's Hugging Face folder
    batch_size: int = 32
    chunk_size: int = 1024
    max_new_tokens: int = 64
    threads: int = 1
    hidden_share: float = 0.0  # share of the turns whose true answers the student may not see
    seed: int = 0
    alignment: Mapping[str, float] = field(default_factory=dict)


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
        self.processor = AutoImageProcessor.from_pretrained(spec.model)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        from clinkd.data.ingest import decode

        rows: list[dict[str, Any]] = []
        for record in range(len(batch["id"])):
            picture = self.processor(images=decode(bytes(batch["png"][record])), return_tensors="pt")
            rows += self._label_record(batch["id"][record], list(batch["turns"][record]), picture)
        keys = ("sample", "task", "answer", "source", "tokens", "hidden", "p1", "margin")
        return {key: [row[key] for row in rows] for key in keys}

    def _label_record(self, record: str, turns: list[dict[str, Any]], picture: Any) -> list[dict[str, Any]]:
        from clinkd.model.chat import encode

        tokens = int(picture["image_grid_thw"][0].prod()) // self.processor.merge_size**2
        names = [sample_id(record, number) for number in range(len(turns))]
        unseen = [
            not turn["trusted"] or is_hidden(name, self.spec.hidden_share, self.spec.seed)
            for name, turn in zip(names, turns, strict=True)
        ]
        answers = self._answers(turns, unseen, picture, tokens)
        pairs = [
            encode(self.tokenizer, turn["question"], answer, tokens)
            for turn, answer in zip(turns, answers, strict=True)
        ]
        labelled = self._states(pairs, picture)
        return [
            {"sample": name, "task": turn["task"], "answer": answer, "tokens": len(pair[1]),
             "source": "teacher" if hidden else "truth", **states}
            for name, turn, answer, hidden, pair, states in zip(
                names, turns, answers, unseen, pairs, labelled, strict=True
            )
        ]  # fmt: skip

    def _answers(self, turns: list[Any], unseen: list[bool], picture: Any, tokens: int) -> list[str]:
        """The truth where the student may see it, the teacher's greedy answer elsewhere."""
        from clinkd.model.chat import encode
        from clinkd.model.generate import generate_answers

        wanted = [index for index, hidden in enumerate(unseen) if hidden]
        answers = [turn["answer"] for turn in turns]
        if wanted:
            device = self.model.device
            found = generate_answers(
                self.model, self.tokenizer,
                [encode(self.tokenizer, turns[index]["question"], "", tokens)[0] for index in wanted],
                picture["pixel_values"].to(device), picture["image_grid_thw"].to(device), [0] * len(wanted),
                max_new_tokens=self.spec.max_new_tokens,
            )  # fmt: skip
            for index, texts in zip(wanted, found, strict=True):
                answers[index] = texts[0]
        return answers

    def _states(self, pairs: list[tuple[list[int], list[int]]], picture: Any) -> list[dict[str, Any]]:
        import torch

        from clinkd.distill.losses import confidence_margin
        from clinkd.model.chat import collate

        batch, device = collate(pairs, self.tokenizer.pad_token_id), self.model.device
        with torch.inference_mode():
            hidden = self.model.forward_hidden(
                input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device),
                image_grid_thw=picture["image_grid_thw"].to(device),
                pixel_values=picture["pixel_values"].to(device),
                image_index=torch.zeros(len(pairs), dtype=torch.long),
            )  # fmt: skip
            found = []
            for row, labels in zip(hidden[:, :-1], batch["labels"][:, 1:].to(device) != -100, strict=True):
                states = row[labels]
                p1, margin, _ = confidence_margin(
                    states, self.model.lm_head.weight, chunk_size=self.spec.chunk_size
                )
                found.append(
                    {"hidden": states.to(torch.float16).cpu().numpy().tobytes(), "p1": float(p1.mean()),
                     "margin": float(margin.mean())}
                )  # fmt: skip
        return found


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
