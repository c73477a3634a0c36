"""Tiny models of both families, with one tokenizer and one image processor; a batch for them."""

from __future__ import annotations

from typing import Any

import torch

from clinkd.model import chat, presets
from clinkd.model.clinkd_qwen2vl import new_model
from clinkd.model.rope import RopeGuidance

FAMILIES = ("qwen2_vl", "qwen2_5_vl")
SIZE = presets.TinySize(hidden=64, layers=2, mlp=96, vision_hidden=32, vision_layers=2, image_size=48)
GUIDANCE = {
    "none": RopeGuidance(1.37, 2.61, 0.33, 0.71),
    "pair": RopeGuidance(1.37, 2.61, 0.33, 0.71, 0.9, "pair"),
    "patch": RopeGuidance(1.37, 2.61, 0.33, 0.71, 0.9, "patch"),
}


def tiny_config(family: str, tokenizer: Any, size: presets.TinySize = SIZE) -> Any:
    config = presets.tiny_config(size, tokenizer)
    if family == "qwen2_vl":
        return config
    from transformers import Qwen2_5_VLConfig

    text = config.text_config.to_dict()
    text.pop("model_type")
    vision = {
        "depth": size.vision_layers, "hidden_size": size.vision_hidden, "num_heads": size.vision_heads,
        "intermediate_size": 64, "out_hidden_size": size.hidden, "patch_size": size.patch,
        "temporal_patch_size": 1, "spatial_merge_size": 2, "initializer_range": 0.08,
        "window_size": 4 * size.patch, "fullatt_block_indexes": [size.vision_layers - 1],
    }  # fmt: skip
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    ids = {name: getattr(config, name) for name in names}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)


def tiny_model(family: str, tokenizer: Any, guidance: RopeGuidance = RopeGuidance(), seed: int = 3) -> Any:
    torch.manual_seed(seed)
    return new_model(tiny_config(family, tokenizer), guidance).eval()


def images(grids: list[list[int]], seed: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixel values and grids of images of random noise."""
    torch.manual_seed(seed)
    grid = torch.tensor(grids)
    return torch.randn(int(grid.prod(-1).sum()), 3 * SIZE.patch**2), grid


def asked(tokenizer: Any, mode: str = "none") -> dict[str, torch.Tensor]:
    """Three questions with answers, each about an image of its own shape, and the scores of ``mode``."""
    pixels, grid = images([[1, 4, 6], [1, 6, 4], [1, 4, 8]])
    questions = ["Where is the liver?", "What is at <box>(1,2),(30,400)</box>?", "Describe it."]
    rows = [
        chat.encode(tokenizer, question, "The spleen.", tokens)
        for question, tokens in zip(questions, (6, 6, 8), strict=True)
    ]
    found = chat.collate(rows, tokenizer.pad_token_id) | {"pixel_values": pixels, "image_grid_thw": grid}
    return found | scores(mode, 3, 20)


def scores(mode: str, rows: int, patches: int) -> dict[str, torch.Tensor]:
    if mode == "pair":
        return {"alignment": torch.linspace(0.05, 0.95, rows)[:, None]}
    return {"relevance": torch.linspace(0, 1, patches).roll(patches // 3)} if mode == "patch" else {}
