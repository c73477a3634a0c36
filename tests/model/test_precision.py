"""Fractional positions reach the rotary embedding whole, and turn by the angle that was asked for."""

from __future__ import annotations

import copy
import importlib

import pytest
import torch
from families import FAMILIES, GUIDANCE, asked, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from clinkd.model.clinkd_qwen2vl import load_model
from clinkd.model.conversation import packed_positions

torch.set_num_threads(1)
CASTS = {
    "to": lambda model: model.to(torch.bfloat16),
    "bfloat16": lambda model: model.bfloat16(),
    "half": lambda model: model.half(),
    "there and back": lambda model: model.half().float().bfloat16(),
    "a copy": lambda model: copy.deepcopy(model).bfloat16(),
    "from its middle": lambda model: model.model.bfloat16() and model,
}


def frequencies(model):
    """1 / theta ** (2i / d), float64 [d / 2]."""
    config = model.config.text_config
    size = config.hidden_size // config.num_attention_heads
    return config.rope_parameters["rope_theta"] ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)


def rotaries(model):
    return [model.model.language_model.rotary_emb, model.model.visual.rotary_pos_emb]


class Watch:
    """Checks every pass through the text model's rotary embedding, and keeps the positions."""

    def __init__(self, model):
        self.model, self.positions = model, []
        model.model.language_model.rotary_emb.register_forward_hook(self.check)

    def check(self, rotary, args, turned):
        hidden, positions = args
        assert positions.dtype in (torch.float32, torch.float64) and rotary.inv_freq.dtype == torch.float32
        self.positions.append(positions.float())
        wanted = positions.double()[..., None] * frequencies(self.model)  # [3, B, L, d / 2]
        axes = wanted.split(rotary.mrope_section, dim=-1)
        angles = torch.cat([part[axis] for axis, part in enumerate(axes)], dim=-1).repeat(1, 1, 2)
        # As the layers get it: rounded to their type, and no further off than that.
        for found, exact in zip(turned, (angles.cos(), angles.sin()), strict=True):
            assert found.dtype == hidden.dtype
            assert (found.double() - exact).abs().max() <= torch.finfo(found.dtype).eps
        # The angles themselves, to float32: two roundings of a relative 2**-24 each, and the cosine's own.
        for found, exact in zip(rotary.forward(hidden.float(), positions), (angles.cos(), angles.sin()),
                                strict=True):  # fmt: skip
            assert (found.double() - exact).abs().max() <= 2**-23 * (1 + wanted.abs().max())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cast", CASTS)
def test_frequencies_stay_float32_whatever_a_model_is_cast_to(family, cast, tokenizer):
    model = tiny_model(family, tokenizer, GUIDANCE["none"])
    before = [rotary.inv_freq.clone() for rotary in rotaries(model)]
    model = CASTS[cast](model)
    assert model.model.language_model.layers[0].mlp.up_proj.weight.dtype in (torch.bfloat16, torch.float16)
    for rotary, wanted in zip(rotaries(model), before, strict=True):
        for buffer in (rotary.inv_freq, rotary.original_inv_freq):
            assert buffer.dtype == torch.float32 and torch.equal(buffer, wanted)
    torch.testing.assert_close(before[0].double(), frequencies(model), rtol=2**-22, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", GUIDANCE)
def test_a_folder_loaded_in_bfloat16_turns_by_exact_angles(family, mode, tokenizer, tmp_path):
    tiny_model(family, tokenizer, GUIDANCE[mode]).save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype=torch.bfloat16).eval()
    watch, batch = Watch(model), asked(tokenizer, mode)
    model(**batch)
    given_ids = {name: batch[name] for name in ("input_ids", "image_grid_thw", "attention_mask")}
    scores = {name: batch[name] for name in ("alignment", "relevance") if name in batch}
    assert torch.equal(watch.positions[0], model.model.get_rope_index(**given_ids, **scores)[0])
    assert (watch.positions[0] % 1 > 0).any()
    model.generate(
        **{name: value for name, value in batch.items() if name != "labels"}, max_new_tokens=4,
        do_sample=False, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    assert len(watch.positions) == 5 and all((places % 1 > 0).any() for places in watch.positions)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", GUIDANCE)
def test_packed_positions_come_through_a_bfloat16_model(family, mode, tokenizer):
    model = tiny_model(family, tokenizer, GUIDANCE[mode]).bfloat16()
    batch, watch = asked(tokenizer, mode), Watch(model)
    kept = batch["attention_mask"].bool()
    ids = batch["input_ids"][kept][None]
    documents = (torch.arange(3)[:, None].expand_as(kept)[kept] + 1)[None]
    scores = {"relevance": batch["relevance"]} if mode == "patch" else {}
    if mode == "pair":
        scores = {"alignment": batch["alignment"][:, 0]}
    positions = packed_positions(
        ids, documents, batch["image_grid_thw"], guidance=GUIDANCE[mode],
        image_token_id=model.config.image_token_id,
        vision_start_token_id=model.config.vision_start_token_id, **scores,
    )  # fmt: skip
    model.forward_hidden(ids, None, batch["image_grid_thw"], batch["pixel_values"], position_ids=positions)
    assert torch.equal(watch.positions[0], positions[1:]) and (watch.positions[0] % 1 > 0).any()


@settings(max_examples=40, deadline=None)
@given(
    family=st.sampled_from(FAMILIES),
    places=st.lists(st.tuples(*[st.floats(0, 300)] * 3), min_size=2, max_size=6),
    offset=st.floats(-200, 2000),
    seed=st.integers(0, 99),
)
def test_attention_sees_differences_of_positions_alone(family, places, offset, seed):
    """Scores of rotated queries and keys stay when all positions move by one offset on all axes."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    theta, section, size = 1000.0, [2, 3, 3], 16
    frequency = theta ** -(torch.arange(0, size, 2, dtype=torch.float64) / size)
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, 1, 1, len(places), size, generator=generator, dtype=torch.float64)

    def attention(positions):
        axes = (positions[..., None] * frequency).split(section, dim=-1)
        angles = torch.cat([part[axis] for axis, part in enumerate(axes)], dim=-1).repeat(1, 2)[None]
        turned = module.apply_rotary_pos_emb(query, key, angles.cos(), angles.sin())
        return turned[0] @ turned[1].transpose(-1, -2)

    positions = torch.tensor(places, dtype=torch.float64).T  # [3, tokens]
    torch.testing.assert_close(attention(positions + offset), attention(positions), atol=1e-9, rtol=0)
    if float((positions - positions[:, :1]).abs().max()) > 1:
        assert not torch.allclose(attention(positions), attention(positions * 1.5), atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_the_rotary_embedding_moves_with_an_offset_too(family, tokenizer):
    """The same through the model's own embedding, in float32: logits do not move with the origin."""
    model = tiny_model(family, tokenizer, GUIDANCE["none"])
    batch = asked(tokenizer)
    names = ("input_ids", "image_grid_thw", "attention_mask")
    positions, _ = model.model.get_rope_index(**{name: batch[name] for name in names})
    kept = batch["attention_mask"].bool()
    here, there = (model(**batch, position_ids=positions + offset).logits[kept] for offset in (0.0, 37.25))
    torch.testing.assert_close(there, here, atol=2e-4, rtol=0)
