"""In what form a cache keeps what the teacher says of an answer token.

Decisions:
- "float16" and "bfloat16" keep the state after the last norm; with the teacher's head it gives the whole
  distribution. "int8" halves that again: a scale for each token, rounding measured. "topk" keeps the largest
  logits and the mass of the rest: no head, but an approximation.
- A form packs a sample's tokens into byte strings and gives tensors back, with the names that the loss takes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from clinkd.distill.losses import CHUNK_SIZE
from clinkd.distill.summary import NODES, top_k_logits

FormName = Literal["float16", "bfloat16", "int8", "topk"]
HEAD = "teacher_hidden"
"""What a batch has where the loss needs the teacher's head."""


@dataclass(frozen=True)
class Form:
    """How states [N, Ht] are kept.

    Args:
        name: see above.
        k: of "topk". vocabulary: of "topk", the common prefix of both vocabularies.
    """

    name: FormName = "float16"
    k: int = 64
    vocabulary: int | None = None

    def __post_init__(self) -> None:
        if self.name not in get_args(FormName):
            raise ValueError(f"distill.cache.form: {self.name!r} is none of {', '.join(get_args(FormName))}")
        if self.name == "topk" and not (self.vocabulary and 0 < self.k < self.vocabulary):
            raise ValueError(
                f"distill.cache.k: {self.k} of a vocabulary of {self.vocabulary}: it has to be smaller"
            )

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the byte strings of a sample."""
        return {"int8": ("states", "scales"), "topk": ("top", "ids", "tails")}.get(self.name, ("states",))

    def token_bytes(self, width: int) -> int:
        """Bytes of one answer token of a teacher of ``width``."""
        if self.name == "topk":
            return self.k * (2 + 4) + NODES * 4
        return width + 4 if self.name == "int8" else 2 * width

    def pack(
        self, hidden: Tensor, head: Tensor, chunk_size: int = CHUNK_SIZE
    ) -> tuple[dict[str, np.ndarray], Tensor]:
        """What is kept of N tokens.

        Args:
            hidden: [N, Ht]. head: [Vt, Ht].

        Returns:
            For each column uint8 [N, bytes]; and [N] how far off the kept states are, relative to their norm
            (of "topk", whose kept logits are of the states as they came: the rounding of these logits).
        """
        if self.name == "topk":
            assert self.vocabulary is not None
            top, ids, tails = top_k_logits(
                hidden, head, k=self.k, vocabulary=self.vocabulary, chunk_size=chunk_size
            )
            kept = {"top": top.half(), "ids": ids.int(), "tails": tails.float()}
            return _bytes(kept), _off(top, kept["top"])
        states = hidden.float()
        if self.name == "int8":
            scales = states.abs().amax(1, keepdim=True).clamp(min=1e-12) / 127
            rounded = (states / scales).round()
            return _bytes({"states": rounded.char(), "scales": scales}), _off(states, rounded * scales)
        halved = states.to(getattr(torch, self.name))
        return _bytes({"states": halved}), _off(states, halved)

    def unpack(self, kept: Mapping[str, Sequence[bytes]], width: int) -> dict[str, Tensor]:
        """The samples' tokens end to end.

        Returns:
            ``teacher_hidden`` [N, width]; or of "topk" ``top_logits``, ``top_ids`` [N, k] and ``tails``
            [N, NODES].
        """
        if self.name == "topk":
            return {
                "top_logits": _tensor(kept["top"], torch.float16, self.k),
                "top_ids": _tensor(kept["ids"], torch.int32, self.k),
                "tails": _tensor(kept["tails"], torch.float32, NODES),
            }
        if self.name == "int8":
            states = _tensor(kept["states"], torch.int8, width)
            return {HEAD: states * _tensor(kept["scales"], torch.float32, 1)}
        return {HEAD: _tensor(kept["states"], getattr(torch, self.name), width)}


def _bytes(kept: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    found = {}
    for name, value in kept.items():
        raw = value.cpu().flatten().view(torch.uint8).numpy()
        found[name] = raw.reshape(len(value), value.shape[1] * value.element_size())
    return found


def _tensor(parts: Sequence[bytes], dtype: torch.dtype, width: int) -> Tensor:
    raw = bytearray().join(parts)
    if not raw:
        return torch.zeros(0, width, dtype=dtype)
    return torch.frombuffer(raw, dtype=dtype).view(-1, width)


def _off(wanted: Tensor, kept: Tensor) -> Tensor:
    """[N] of the difference's norm by the norm."""
    wanted = wanted.float()
    return (wanted - kept.float()).norm(dim=1) / wanted.norm(dim=1).clamp(min=1e-12)
