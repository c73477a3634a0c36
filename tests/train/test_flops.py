"""The formula of a step's operations, against what torch counts operator by operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from clinkd.model.clinkd_qwen2vl import new_model, set_trainable
from clinkd.model.lora import LoraOptions, add_adapters
from clinkd.model.presets import SPECIAL_TOKENS, TinySize, tiny_config
from clinkd.model.rope import RopeGuidance
from clinkd.model.tiny_guide import TinyGuide
from clinkd.train.flops import Work, flops, image_pairs, squares
from clinkd.train.guide_task import GuideLoss
from clinkd.train.meter import Meter
from clinkd.train.tasks import AnswerLoss

SIZE = TinySize(hidden=64, layers=3, heads=2, mlp=160, vision_hidden=64, vision_layers=3, vision_heads=2)
ROWS, LENGTH, GRID = 2, 60, (1, 8, 12)  # 24 merged patches an image


class Words:
    """As much of a tokenizer as a config asks for."""

    def __len__(self) -> int:
        return 300

    def convert_tokens_to_ids(self, token: str) -> int:
        return SPECIAL_TOKENS.index(token)


def model(family: str = "qwen2_vl") -> Any:
    """A tiny model whose attention is plain matrix products, which torch counts."""
    config = tiny_config(SIZE, Words())
    if family == "qwen2_5_vl":
        from transformers import Qwen2_5_VLConfig

        text = config.text_config.to_dict()
        text.pop("model_type")
        vision = {
            "depth": 3, "hidden_size": 64, "num_heads": 2, "intermediate_size": 160, "out_hidden_size": 64,
            "patch_size": SIZE.patch, "temporal_patch_size": 1, "spatial_merge_size": 2,
            "window_size": 4 * SIZE.patch, "fullatt_block_indexes": [2],
        }  # fmt: skip
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        ids = {name: getattr(config, name) for name in names}
        config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **ids)
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    return new_model(config, RopeGuidance(1.5, 2.0)).train()


def batch() -> dict[str, Tensor]:
    """Rows of one image each, no padding; the last 20 tokens of a row are its answer."""
    words = Words()
    names = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>")
    start, end, image = (words.convert_tokens_to_ids(token) for token in names)
    row = [50, start, *[image] * 24, end, *range(60, 60 + LENGTH - 27)]
    ids = torch.tensor([row] * ROWS)
    labels = ids.clone()
    labels[:, :-20] = -100
    grid = torch.tensor([GRID] * ROWS)
    return {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels,
        "pixel_values": torch.randn(int(grid.prod(1).sum()), 3 * SIZE.patch**2), "image_grid_thw": grid,
    }  # fmt: skip


def counted(module: torch.nn.Module, arguments: dict[str, Tensor]) -> float:
    model = getattr(module, "model", None)
    if hasattr(model, "forward_hidden"):  # the formula is of a plain pass, which spares itself nothing
        plain = model.forward_hidden
        model.forward_hidden = lambda **given: plain(**{**given, "wanted": None})
    with FlopCounterMode(display=False) as counter:
        module(**arguments)["loss"].backward()
    return counter.get_total_flops()


def trained(made: Any) -> None:
    set_trainable(made, True)


def frozen_tower(made: Any) -> None:
    set_trainable(made, False)


def adapters(made: Any) -> None:
    add_adapters(made, LoraOptions(rank=8))
    set_trainable(made, False)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("how", [trained, frozen_tower, adapters])
def test_a_steps_operations_are_torchs_own_count(family: str, how: Callable[[Any], None]) -> None:
    made, arguments = model(family), batch()
    how(made)
    # All logits at once: computed in chunks they would be computed twice, which is no work of the model's.
    module = AnswerLoss(made, chunk_size=10**6)
    meter = Meter(module)
    inputs, operations = meter.count(arguments, 40)
    head = 2 * made.lm_head.weight.numel() * 40  # which the loss computes again for its backward pass
    assert inputs == ROWS * LENGTH
    assert operations == pytest.approx(counted(module, arguments) - head, rel=0.01)


def test_the_guides_operations_are_torchs_own_count() -> None:
    made = model()
    made.requires_grad_(False)
    made.model.visual.requires_grad_(True)
    made.get_input_embeddings().weight.requires_grad_(True)
    module = GuideLoss(TinyGuide(made))
    given = batch()
    patches = 24 * ROWS
    arguments = {
        "pixel_values": given["pixel_values"], "image_grid_thw": given["image_grid_thw"],
        "phrase_ids": torch.tensor([[60, 61, 62], [63, 64, 50]]),
        "phrase_mask": torch.tensor([[1, 1, 1], [1, 1, 0]]),
        "names": torch.tensor([0]), "regions": torch.arange(10), "owners": torch.zeros(10).long(),
        "numbers": torch.full((10, 4), 70),
        "labels": torch.zeros(patches, 2), "known": torch.ones(patches, 2),
    }  # fmt: skip
    inputs, operations = Meter(module).count(arguments, 10)
    assert inputs == 5 + patches  # phrases' tokens, and what a language model would see of the images
    assert operations == pytest.approx(counted(module, arguments), rel=0.01)


def test_all_trained_it_is_six_for_each_weight_and_twelve_for_attention() -> None:
    tokens, weights, layers, width = 100, 5000, 4, 32
    part = Work(tokens, weights, trained=weights, reached=True, attention=layers * width * tokens**2)
    assert flops([part]) == 6 * weights * tokens + 12 * layers * width * tokens * tokens


def test_frozen_and_unreached_it_is_two_for_each_weight() -> None:
    assert flops([Work(10, 7, trained=0, reached=False)]) == 2 * 7 * 10
    assert flops([Work(10, 7, trained=0, reached=True)]) == 4 * 7 * 10


def test_patches_see_their_frame_or_their_window() -> None:
    assert image_pairs((3, 4, 6)) == 3 * 24**2
    # Windows of 4 x 4: of 6 columns, one of 4 and one of 2.
    assert image_pairs((1, 4, 6), 4) == 16**2 + 8**2
    assert squares(10, 4) == 16 + 16 + 4 and squares(10) == 100
