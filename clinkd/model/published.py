"""The released checkpoints' dimensions, for when their folders are elsewhere.

Values are those of their config.json files on the Hugging Face hub, as far as sizes follow from them.
"""

from __future__ import annotations

import re
from typing import Any

_QWEN2_VISION: dict[str, Any] = {
    "depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14,
    "temporal_patch_size": 2, "spatial_merge_size": 2,
}  # fmt: skip
_QWEN2_5_VISION: dict[str, Any] = {
    "depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420, "patch_size": 14,
    "temporal_patch_size": 2, "spatial_merge_size": 2, "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}  # fmt: skip

# family, hidden, MLP, layers, heads, key/value heads, vocabulary, whether the head is the embedding
_SIZES: dict[str, tuple[str, int, int, int, int, int, int, bool]] = {
    "qwen2-vl-2b": ("qwen2_vl", 1536, 8960, 28, 12, 2, 151_936, True),
    "qwen2-vl-7b": ("qwen2_vl", 3584, 18944, 28, 28, 4, 152_064, False),
    "qwen2.5-vl-3b": ("qwen2_5_vl", 2048, 11008, 36, 16, 2, 151_936, True),
    "qwen2.5-vl-7b": ("qwen2_5_vl", 3584, 18944, 28, 28, 4, 152_064, False),
}
NAMES = tuple(_SIZES)
MIN_PIXELS, MAX_PIXELS = 56 * 56, 28 * 28 * 16384
"""Limits of resized images in their preprocessor_config.json."""


def published_name(path: str) -> str | None:
    """The released checkpoint that a folder is named after ("DIR/Qwen2-VL-7B-Instruct"); None: none."""
    last = re.split(r"[/\\]", path.rstrip("/\\"))[-1].lower().replace("_", "-")
    return next((name for name in NAMES if last == name or last.startswith(f"{name}-")), None)


def published_config(name: str) -> Any:
    """The transformers config of a released checkpoint, one of ``NAMES``."""
    from transformers import Qwen2_5_VLConfig, Qwen2VLConfig

    family, hidden, mlp, layers, heads, pairs, vocabulary, tied = _SIZES[name]
    text = {
        "hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": pairs, "vocab_size": vocabulary,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
    }  # fmt: skip
    if family == "qwen2_vl":
        vision = _QWEN2_VISION | {"hidden_size": hidden}
        return Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)
    vision = _QWEN2_5_VISION | {"out_hidden_size": hidden}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=tied)
