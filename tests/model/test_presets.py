"""Tiny models: their tokenizer writes anything, their weights start wide enough."""

from __future__ import annotations

import pytest
import torch

from clinkd.data.boxes import format_box, to_qwen
from clinkd.data.phantoms import PhantomSpec, draw
from clinkd.model import presets
from clinkd.model.clinkd_qwen2vl import new_model
from clinkd.model.rope import RopeGuidance

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    records = [draw(PhantomSpec(8), index)[1] for index in range(8)]
    texts = [text for record in records for turn in record.turns for text in (turn.question, turn.answer)]
    out = presets.train_tokenizer(map(to_qwen, texts), tmp_path_factory.mktemp("tokenizer"), 512)
    return AutoTokenizer.from_pretrained(out)


@pytest.mark.parametrize("text", ["", "left kidney at (3,45)", "Übermaß 𝛌\n\n\ttabs  and spaces", "日本"])
def test_the_tokenizer_writes_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text), clean_up_tokenization_spaces=False) == text


def test_special_tokens_are_one_piece_each(tokenizer):
    ids = tokenizer.encode("".join(presets.SPECIAL_TOKENS))
    assert tokenizer.convert_ids_to_tokens(ids) == list(presets.SPECIAL_TOKENS)
    assert (tokenizer.eos_token, tokenizer.pad_token) == (presets.IM_END, presets.PAD)


def test_a_box_keeps_its_tokens_around_its_numbers(tokenizer):
    tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode(to_qwen(format_box((1, 22, 333, 1000)))))
    assert (tokens[0], tokens[-1]) == ("<|box_start|>", "<|box_end|>")


def test_weights_start_at_the_presets_width(tokenizer):
    torch.manual_seed(0)
    model = new_model(presets.tiny_config(presets.TinySize(), tokenizer), RopeGuidance()).model
    text = model.language_model.layers[0].mlp.up_proj.weight
    vision = model.visual.blocks[0].mlp.fc1.weight
    assert text.std().item() == pytest.approx(0.06, rel=0.05)
    assert vision.std().item() == pytest.approx(0.08, rel=0.05)
    assert model.language_model.embed_tokens.weight.std().item() == pytest.approx(0.06, rel=0.05)


def test_any_image_becomes_about_the_presets_area():
    from PIL import Image

    size = presets.TinySize()
    batch = presets.image_processor(size)(images=[Image.new("RGB", (300, 150))], return_tensors="pt")
    _, rows, columns = batch["image_grid_thw"][0].tolist()
    assert columns > rows and rows * columns * size.patch**2 <= size.image_size**2
    assert len(batch["pixel_values"]) == rows * columns
