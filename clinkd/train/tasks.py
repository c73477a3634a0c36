"""What the answering stages train on: turns as batches, and the losses over their answer tokens.

Decisions:
- Questions that share an image share its vision tower pass: a batch names its distinct images once. A
  record's images all stand in front of each of its questions.
- A tower that is frozen sees an image once in a process (model/tower.py); not under ZeRO-3, whose ranks have
  to make as many passes.
- The language model's head meets answer tokens alone; sums leave the module, the loop divides them.
- Under ZeRO-3 the head is registered as an external parameter of the loss module, so it is gathered
  once a step.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clinkd.data.ingest import collect, open_table
from clinkd.data.records import sample_id
from clinkd.data.scores import Scores
from clinkd.distill.losses import answer_loss
from clinkd.model.chat import collate, encode
from clinkd.model.clinkd_qwen2vl import load_model, save_model, set_trainable
from clinkd.model.guide import guide_inputs, merged_grids
from clinkd.model.guided import GuidedModel
from clinkd.model.lora import LoraOptions, add_adapters, merge_adapters, save_adapter, trained_weights
from clinkd.model.pixels import load_processor
from clinkd.model.rope import RopeGuidance
from clinkd.model.tower import can_keep, tower_digest
from clinkd.train.images import ImageStore
from clinkd.train.ledger import Group


@dataclass(frozen=True)
class VqaSpec:
    """How a stage trains a model; travels to the workers by value."""

    model: str  # Hugging Face folder to start from, with tokenizer and preprocessor
    guidance: RopeGuidance
    train_vision: bool
    dtype: str = "float32"
    chunk_size: int = 1024
    gradient_checkpointing: bool = False
    coordinate_weight: float = 1.0
    scores: str | None = None  # the guide's scores, when the guidance wants them
    min_pixels: int | None = None  # of a resized image; None: as the model's folder says
    max_pixels: int | None = None
    lora: LoraOptions | None = None  # text layers train by adapters
    attention: str = "auto"  # see model/attention.py
    bf16: bool = False  # DeepSpeed runs it in bfloat16, whatever its weights come as


PASS = 64
"""What another pass of the text model costs beside its tokens, in tokens: measured on phantoms' models."""


ENCODED = 65_536
"""Turns whose tokens a worker keeps, in four bytes each."""
Encoded = tuple["array[int]", "array[int]"]


class AnswerLoss(nn.Module):
    """Cross-entropy of a model's answers, as a sum over the batch's answer tokens."""

    shares = True
    """Whether rows that begin alike may share that beginning; train/loop.py says no under ZeRO-2 and 3."""

    def __init__(
        self,
        model: GuidedModel,
        chunk_size: int,
        zero3: bool = False,
        coordinate_weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.model, self.chunk_size, self.coordinate_weight = model, chunk_size, coordinate_weight
        # ZeRO-3 gathers weights in every pass, and all ranks have to make as many.
        self.overhead = None if zero3 else PASS
        if zero3:
            import deepspeed

            deepspeed.zero.register_external_parameter(self, model.lm_head.weight)

    def hidden(self, labels: Tensor, **inputs: Any) -> tuple[Tensor, Tensor]:
        """States [N, H] that predict the N answer tokens, and those tokens [N]."""
        chosen = labels[:, 1:] != -100
        # A layer that is computed again forgets what was wanted; ZeRO-3 gathers by hooks of its own.
        whole = self.overhead is None or getattr(self.model, "is_gradient_checkpointing", False)
        wanted = None if whole else F.pad(chosen, (0, 1))
        states = self.model.forward_hidden(
            **inputs, overhead=self.overhead, wanted=wanted, share=self.shares
        )[:, :-1]
        return states[chosen], labels[:, 1:][chosen]

    def cross_entropy(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Summed over the tokens."""
        weight = self.model.lm_head.weight
        return answer_loss(hidden, weight, targets, chunk_size=self.chunk_size, normalizer=1.0)

    def forward(self, labels: Tensor, coordinates: Tensor | None = None, **inputs: Any) -> dict[str, Tensor]:
        """``coordinates`` [B, L]: the answer tokens that weigh ``coordinate_weight``."""
        hidden, targets = self.hidden(labels, **inputs)
        ce = loss = self.cross_entropy(hidden, targets)
        if coordinates is not None:
            heavy = coordinates[:, 1:][labels[:, 1:] != -100]
            loss = ce + (self.coordinate_weight - 1) * self.cross_entropy(hidden[heavy], targets[heavy])
        return {"loss": loss, "ce": ce}


class SupervisedTask:
    """Turns with their true answers; the teacher's task, and the base of the others."""

    keeps = True
    """Whether the states of a frozen tower may take the place of pixels."""
    images: ImageStore

    def __init__(self, rows: Any, scratch: Path, spec: VqaSpec, zero_stage: int = 0) -> None:
        path = getattr(rows, "kept", None) or scratch / "rows.arrow"
        if not path.is_file():
            collect(rows.iter_batches(batch_format="pyarrow", batch_size=256), path)
        self.table = open_table(path)
        self.prepare(spec, zero_stage)
        self.images = ImageStore(self.table, self.processor)
        self.ids = self.table.ids
        self.scores = Scores(spec.scores)
        self._encoded: dict[tuple[int, int], Encoded] = {}

    def prepare(self, spec: VqaSpec, zero_stage: int) -> None:
        """Tokenizer and processor: what a task has wherever its samples come from."""
        from transformers import AutoTokenizer

        self.spec, self.zero3 = spec, zero_stage == 3
        self.tokenizer = AutoTokenizer.from_pretrained(spec.model)
        self.processor = load_processor(spec.model, spec.min_pixels, spec.max_pixels)
        tokens = self.tokenizer.convert_ids_to_tokens(list(range(len(self.tokenizer))))
        self.numbers = torch.tensor(
            [at for at, text in enumerate(tokens) if text.isascii() and text.isdigit()]
        )

    def turn_counts(self) -> Sequence[int]:
        return self.table.turn_counts()

    def load(self) -> GuidedModel:
        dtype = getattr(torch, self.spec.dtype)
        model = load_model(
            self.spec.model, self.spec.guidance, dtype, attention=self.spec.attention,
            runs_in=torch.bfloat16 if self.spec.bf16 else dtype,
        )  # fmt: skip
        if self.spec.lora is not None:
            add_adapters(model, self.spec.lora)
        set_trainable(model, self.spec.train_vision)
        if self.spec.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        model.train()
        if self.keeps and not self.zero3 and can_keep(model):
            self.images.tower = tower_digest(model, torch.bfloat16 if self.spec.bf16 else dtype)
        return model

    def build(self) -> nn.Module:
        return AnswerLoss(self.load(), self.spec.chunk_size, self.zero3, self.spec.coordinate_weight)

    def encoded(self, record: int, turn: int) -> Encoded:
        """Prompt and answer ids of one turn."""
        if (record, turn) in self._encoded:
            return self._encoded[record, turn]
        grids = self.images.grids(record)
        asked = self.table.turns(record)[turn]
        tokens = (grids.prod(-1) // self.processor.merge_size**2).tolist()
        prompt, answer = encode(self.tokenizer, asked["question"], self.answer(record, turn), tokens)
        found = array("i", prompt), array("i", answer)
        if len(self._encoded) < ENCODED:
            self._encoded[record, turn] = found
        return found

    def row(self, record: int, turn: int, step: int, total: int) -> tuple[Sequence[int], Sequence[int]]:
        """Prompt and answer ids that stand in the batch of a step for a turn."""
        return self.encoded(record, turn)

    def answer(self, record: int, turn: int) -> str:
        """What the model is to say."""
        return str(self.table.turns(record)[turn]["answer"])

    def batch(self, groups: list[Group], step: int, total: int) -> tuple[dict[str, Any], int]:
        rows = [self.row(record, turn, step, total) for record, turns in groups for turn in turns]
        inputs = collate(rows, self.tokenizer.pad_token_id) | self.pictures(groups)
        guided = self.spec.guidance.guided
        if guided != "none":
            grids = [self.images.grids(record) for record, turns in groups for _ in turns]
            merged = [merged_grids(grid, self.processor.merge_size) for grid in grids]
            inputs |= guide_inputs(guided, [self.scores[name] for name in self.names(groups)], merged)
        if self.spec.coordinate_weight != 1:
            inputs["coordinates"] = self.coordinates(inputs["labels"])
        return inputs, int((inputs["labels"][:, 1:] != -100).sum())

    def names(self, groups: list[Group]) -> list[str]:
        return [sample_id(self.ids[record], turn) for record, turns in groups for turn in turns]

    def coordinates(self, labels: Tensor) -> Tensor:
        """[B, L]: answer tokens that are whole numbers between box tokens."""
        sides: Any = self.tokenizer.convert_tokens_to_ids(["<|box_start|>", "<|box_end|>"])
        start, end = sides
        inside = labels.eq(start).cumsum(1) > labels.eq(end).cumsum(1)
        return inside & torch.isin(labels, self.numbers)

    def pictures(self, groups: list[Group]) -> dict[str, Any]:
        """The distinct images (``ImageStore.batch``), and which of them each row shows, row after row."""
        records = list(dict.fromkeys(record for record, _ in groups))
        found = self.images.batch(records)
        sizes = [len(self.images.grids(record)) for record in records]
        own = dict(zip(records, torch.arange(sum(sizes)).split(sizes), strict=True))
        index = [number for record, turns in groups for _ in turns for number in own[record].tolist()]
        return found | {"image_index": torch.tensor(index)}

    def save(self, state: dict[str, Any], out: Path) -> None:
        """Writes a plain Hugging Face folder; ``state`` is the loss module's.

        Of adapters, it is the merged model; they themselves lie beside it, in ``adapter``.
        """
        model = load_model(self.spec.model, self.spec.guidance, getattr(torch, self.spec.dtype))
        own = {key[len("model.") :]: value
               for key, value in state.items() if key.startswith("model.")}  # fmt: skip
        if self.spec.lora is None:
            own.setdefault("lm_head.weight", own["model.language_model.embed_tokens.weight"])
            model.load_state_dict(own)
        else:
            self._save_adapter(model, own, out.with_name("adapter"))
        save_model(model, self.tokenizer, self.processor, out)

    def _save_adapter(self, model: GuidedModel, own: dict[str, Any], out: Path) -> None:
        """Writes the adapters out of ``own`` and merges them into ``model``, which is the start.

        What was frozen stays the start's, bit for bit, in whatever precision the engine ran it.
        """
        assert self.spec.lora is not None
        add_adapters(model, self.spec.lora)
        set_trainable(model, self.spec.train_vision)
        model.load_state_dict({name: own[name] for name in trained_weights(model)}, strict=False)
        save_adapter(model, self.spec.lora, self.spec.model, self.spec.train_vision, out)
        merge_adapters(model)
