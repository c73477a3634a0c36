"""A checkpoint's answers to prepared questions; pool.py spreads them over actors.

Decisions:
- Rows are records: an image is decoded and seen by the vision tower once, whatever is asked about it. All
  images of a record stand in front of each of its questions.
- Inside a batch prompts are sorted by length, so little is padded; answers go back to their samples by name.
- Greedy by default: the published numbers are.
- The guide's scores are read where there are any; where there are none, a guided model's questions are scored
  on the fly, through the same calibration and the same steps.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clinkd.data.records import sample_id
from clinkd.data.scores import Score, Scores

CHUNK = 256
"""Answer tokens whose logits exist at one time, where likelihoods are asked for."""


@dataclass(frozen=True)
class PredictSpec:
    """What an actor needs to answer; travels by value."""

    model: str  # Hugging Face folder, its guidance in its config
    batch_size: int = 64
    max_new_tokens: int = 64
    candidates: int = 1  # answers per question; above 1 they are sampled
    temperature: float = 1.0
    seed: int = 0
    threads: int = 1
    scores: str | None = None  # the guide's scores, when the guidance wants them; else
    guide: str | None = None  # the guide's folder, to score on the fly
    likelihood: bool = False  # of the true answers, in the place of answers
    dtype: str | None = None  # the model runs in; None: float32 on CPUs, the checkpoint's own on GPUs


class Answerer:
    """One actor: a model that answers questions about images."""

    def __init__(self, spec: PredictSpec) -> None:
        import torch
        from transformers import AutoImageProcessor, AutoTokenizer

        from clinkd.model.clinkd_qwen2vl import guidance_of, load_model
        from clinkd.model.guide import load_guide

        torch.set_num_threads(spec.threads)
        self.spec = spec
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = spec.dtype or ("float32" if device == "cpu" else stored_dtype(spec.model))
        self.model: Any = load_model(spec.model, dtype=getattr(torch, dtype))
        self.model = self.model.eval().to(device)
        self.guided = guidance_of(self.model.config).guided
        self.scores = Scores(spec.scores)
        self.guide: Any = None
        if self.guided != "none" and spec.scores is None:
            if spec.guide is None:
                raise ValueError("predict: a guided model needs the guide's scores or the guide")
            self.guide = load_guide(spec.guide, device)
        self.tokenizer = AutoTokenizer.from_pretrained(spec.model)
        self.processor = AutoImageProcessor.from_pretrained(spec.model, backend="pil")

    def answer(self, records: Iterable[dict[str, Any]], seed: int | None = None) -> Iterator[dict[str, Any]]:
        """A row for each turn; ``seed``: in the place of the spec's.

        Under ``likelihood`` a row has no ``responses`` but ``log_likelihood``, the sum over the ``tokens`` of
        the true answer.
        """
        from clinkd.data.images import decode, encoded_images

        seed = self.spec.seed if seed is None else seed

        asked = []
        for record in records:
            images = [decode(png) for png in encoded_images(record)]
            picture = dict(self.processor(images=images, return_tensors="pt"))
            picture["scores"] = self._scores(record, images)
            for number, turn in enumerate(record["turns"]):
                asked.append((self._prompt(turn["question"], picture), picture, record, number, turn))
        asked.sort(key=lambda item: (len(item[0]), item[2]["id"], item[3]))
        for at in range(0, len(asked), self.spec.batch_size):
            yield from self._answer_batch(asked[at : at + self.spec.batch_size], seed)

    def _scores(self, record: dict[str, Any], images: list[Any]) -> list[Score]:
        """Of each of a record's questions; none where the model is not guided."""
        if self.guided == "none":
            return []
        if self.guide is not None:
            return list(self.guide.score([(images, [turn["question"] for turn in record["turns"]])])[0])
        return self.scores.of([sample_id(record["id"], number) for number in range(len(record["turns"]))])

    def _prompt(self, question: str, picture: Any) -> list[int]:
        from clinkd.model.chat import encode

        tokens = (picture["image_grid_thw"].prod(-1) // self.processor.merge_size**2).tolist()
        return encode(self.tokenizer, question, "", tokens)[0]

    def _answer_batch(self, asked: list[tuple[Any, ...]], seed: int) -> Iterator[dict[str, Any]]:
        import torch

        from clinkd.model.guide import guide_inputs, merged_grids

        names = [sample_id(record["id"], number) for _, _, record, number, _ in asked]
        pictures = {record["id"]: picture for _, picture, record, _, _ in asked}
        sizes = [len(picture["image_grid_thw"]) for picture in pictures.values()]
        own = dict(zip(pictures, torch.arange(sum(sizes)).split(sizes), strict=True))
        merge = self.processor.merge_size
        grids = [merged_grids(picture["image_grid_thw"], merge) for _, picture, *_ in asked]
        scores = [picture["scores"][number] for _, picture, _, number, _ in asked if self.guided != "none"]
        extra: dict[str, Any] = guide_inputs(self.guided, scores, grids)
        device = self.model.device
        shown = {
            name: torch.cat([picture[name] for picture in pictures.values()]).to(device)
            for name in ("pixel_values", "image_grid_thw")
        } | {"image_index": torch.cat([own[record["id"]] for _, _, record, _, _ in asked])}  # fmt: skip
        found = self._likelihoods if self.spec.likelihood else self._generate
        for (_, _, record, _, turn), name, said in zip(
            asked, names, found(asked, shown | extra, seed), strict=True
        ):
            yield {
                "sample": name, "image": record["image"], "task": turn["task"],
                "modality": record.get("modality", ""), "question": turn["question"],
                "annotation": turn["answer"], **said,
            }  # fmt: skip

    def _generate(
        self, asked: list[tuple[Any, ...]], inputs: dict[str, Any], seed: int
    ) -> Iterator[dict[str, Any]]:
        from clinkd.model.generate import generate_answers

        answers = generate_answers(
            self.model, self.tokenizer, [prompt for prompt, *_ in asked],
            max_new_tokens=self.spec.max_new_tokens, do_sample=self.spec.candidates > 1,
            temperature=self.spec.temperature, num_return_sequences=self.spec.candidates, seed=seed, **inputs,
        )  # fmt: skip
        return ({"responses": found} for found in answers)

    def _likelihoods(
        self, asked: list[tuple[Any, ...]], inputs: dict[str, Any], seed: int
    ) -> Iterator[dict[str, Any]]:
        import torch

        from clinkd.model.chat import collate, encode

        pairs = []
        for _, picture, _, _, turn in asked:
            tokens = (picture["image_grid_thw"].prod(-1) // self.processor.merge_size**2).tolist()
            pairs.append(encode(self.tokenizer, turn["question"], turn["answer"], tokens))
        batch = {key: value.to(self.model.device) for key, value in
                 collate(pairs, self.tokenizer.pad_token_id).items()}  # fmt: skip
        labels = batch.pop("labels")[:, 1:]
        chosen = labels != -100
        with torch.inference_mode():
            moved = {key: value.to(self.model.device) for key, value in inputs.items()}
            states = self.model.forward_hidden(**batch, **moved)[:, :-1][chosen]
            said = [
                self.model.lm_head(part).float().log_softmax(-1).gather(-1, wanted[:, None])[:, 0]
                for part, wanted in zip(states.split(CHUNK), labels[chosen].split(CHUNK), strict=True)
            ]
        counts = chosen.sum(1).tolist()
        for part in torch.cat(said).double().split(counts):
            yield {"log_likelihood": float(part.sum()), "tokens": len(part)}


def stored_dtype(model: str) -> str:
    """What a checkpoint's config.json says its weights are; float32 where it says nothing."""
    found = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    return str(found.get("dtype") or found.get("torch_dtype") or "float32")


def published(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Answered rows as the published scripts read them: a running id, one response; in the samples' order."""
    kept = ("sample", "image", "task", "question", "annotation")
    ordered = sorted(rows, key=lambda row: _key(row["sample"]))
    return [
        {"id": number, **{key: row[key] for key in kept}, "response": row["responses"][0]}
        for number, row in enumerate(ordered)
    ]


def write_predictions(rows: Iterable[dict[str, Any]], out: Path) -> list[dict[str, Any]]:
    """Writes ``published`` lines."""
    import os

    lines = published(rows)
    unfinished = out.with_name(f".{out.name}.{os.getpid()}")
    unfinished.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    os.replace(unfinished, out)
    return lines


def _key(sample: str) -> tuple[str, int]:
    record, _, turn = sample.rpartition("#")
    return record, int(turn)
