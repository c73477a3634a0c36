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

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from clinkd.data.feed import Arrays
from clinkd.data.sampler import Batch
from clinkd.distill.losses import answer_loss
from clinkd.model.clinkd_qwen2vl import load_model, save_model, set_trainable
from clinkd.model.guided import GuidedModel
from clinkd.model.lora import LoraOptions, add_adapters, merge_adapters, save_adapter, trained_weights
from clinkd.model.pixels import Numbers, load_processor
from clinkd.model.rope import RopeGuidance
from clinkd.model.tower import STATES, Shown, can_keep, tower_digest
from clinkd.train.batches import KEYS
from clinkd.train.feed import Feed, FeedSpec, Share


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
    """Turns with their targets; the teacher's task, and the base of the others."""

    keeps = True
    """Whether the states of a frozen tower may take the place of pixels."""

    def __init__(self, spec: VqaSpec, source: FeedSpec, zero_stage: int = 0) -> None:
        from transformers import AutoTokenizer

        self.spec, self.source, self.zero3 = spec, source, zero_stage == 3
        self.tokenizer = AutoTokenizer.from_pretrained(spec.model)
        self.processor = load_processor(spec.model, spec.min_pixels, spec.max_pixels)
        tokens = self.tokenizer.convert_ids_to_tokens(list(range(len(self.tokenizer))))
        self.numbers = torch.tensor(
            [at for at, text in enumerate(tokens) if text.isascii() and text.isdigit()]
        )
        self._converter: Numbers | None = None
        self.tower: str | None = None  # digest of a frozen tower whose states take the place of pixels

    def feed(self, share: Share, device: torch.device) -> Feed:
        """This rank's micro-batches."""
        return Feed(self, self.source, share, device)

    def choose(self, batch: Batch, lane: int, step: int, total: int) -> Batch:
        """What of a batch of the sampler is trained on in a step, or in its place."""
        return batch

    def facts(self, step: int, total: int) -> dict[str, float]:
        """What the metrics' line of a step tells beside its losses; follows from the step alone."""
        return {}

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
            self.tower = tower_digest(model, torch.bfloat16 if self.spec.bf16 else dtype)
        return model

    def build(self) -> nn.Module:
        return AnswerLoss(self.load(), self.spec.chunk_size, self.zero3, self.spec.coordinate_weight)

    def arguments(
        self, arrays: Arrays, batch: Batch, step: int, device: torch.device
    ) -> tuple[dict[str, Any], int]:
        """The loss module's arguments of a batch's arrays, and the tokens that its sums are over."""
        keys = arrays.pop(KEYS)
        pictures = self.pictures(arrays, keys, device)
        # Copies: the arrays may lie in the object store, where torch may not write.
        inputs: dict[str, Any] = {name: torch.from_numpy(value.copy()) for name, value in arrays.items()}
        inputs |= pictures
        if self.spec.coordinate_weight != 1:
            inputs["coordinates"] = self.coordinates(inputs["labels"])
        return {"attention_mask": None} | inputs, int((inputs["labels"][:, 1:] != -100).sum())

    def pictures(self, arrays: Arrays, keys: Any, device: torch.device) -> dict[str, Any]:
        """The distinct images of a batch; takes what it is made of out of ``arrays``.

        Returns:
            ``image_grid_thw`` [images, 3] and ``pixel_values`` [patches, values]; with a frozen tower also
            ``shown``, and the pixels are of the images alone that it has not seen (None: it has seen all).
        """
        pixels, channels, grids = (arrays.pop(name) for name in ("pixels", "channels", "image_grid_thw"))
        found = {"image_grid_thw": torch.from_numpy(grids.copy())}
        numbers = self._numbers(device)
        if self.tower is None:
            return found | {"pixel_values": numbers(pixels, channels, grids)}
        names = tuple((self.tower, key.decode()) for key in keys.tolist())
        shown = Shown(names, tuple(STATES.get(name) for name in names))
        values = None
        if unseen := shown.unseen:
            parts = numbers.parts(pixels, channels, grids)
            chosen = np.concatenate([parts[image] for image in unseen])
            values = numbers(chosen, channels[unseen], grids[unseen])
        return found | {"pixel_values": values, "shown": shown}

    def _numbers(self, device: torch.device) -> Numbers:
        if self._converter is None:
            self._converter = Numbers(self.processor, device)
        return self._converter

    def coordinates(self, labels: Tensor) -> Tensor:
        """[B, L]: answer tokens that are whole numbers between box tokens."""
        sides: Any = self.tokenizer.convert_tokens_to_ids(["<|box_start|>", "<|box_end|>"])
        start, end = sides
        inside = labels.eq(start).cumsum(1) > labels.eq(end).cumsum(1)
        return inside & torch.isin(labels, self.numbers)

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
