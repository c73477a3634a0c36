"""The guided model is Qwen2-VL except for its positions."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration

from clinkd.model import chat, presets
from clinkd.model.clinkd_qwen2vl import (
    ClinKDForConditionalGeneration,
    guidance_of,
    load_model,
    new_model,
    save_model,
    set_trainable,
)
from clinkd.model.rope import RopeGuidance
from clinkd.model.students import kept_layers, student_from_teacher, student_with_new_layers

torch.set_num_threads(1)
SIZE = presets.TinySize(hidden=64, layers=3, mlp=96, vision_hidden=32, vision_layers=2, image_size=48)
GUIDED = RopeGuidance(1.5, 2.25, 0.3, 0.7, 0.8, "pair")


def make(tokenizer, guidance=RopeGuidance()):
    torch.manual_seed(3)
    return new_model(presets.tiny_config(SIZE, tokenizer), guidance).eval()


@pytest.fixture
def batch(tokenizer):
    """Three questions about two images of different shape: the second image is asked about twice."""
    torch.manual_seed(5)
    grid = torch.tensor([[1, 4, 6], [1, 6, 4]])
    pixels = torch.randn(48, 3 * SIZE.patch**2)
    questions = ["Where is the liver?", "What is at <box>(1,2),(30,400)</box>?", "Describe it."]
    rows = [chat.encode(tokenizer, question, "The spleen.", 6) for question in questions]
    return {
        **chat.collate(rows, tokenizer.pad_token_id),
        "image_grid_thw": grid, "pixel_values": pixels, "image_index": torch.tensor([0, 1, 1]),
    }  # fmt: skip


def flat(batch):
    """The same with every row's image given for itself."""
    index = batch["image_index"]
    pixels = torch.cat([batch["pixel_values"].split(24)[image] for image in index])
    return {
        "input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"],
        "image_grid_thw": batch["image_grid_thw"][index], "pixel_values": pixels,
    }  # fmt: skip


def hidden(model, batch, **kwargs):
    names = ("input_ids", "attention_mask", "image_grid_thw", "pixel_values", "image_index")
    return model.forward_hidden(**{**{name: batch[name] for name in names}, **kwargs})


@pytest.mark.parametrize(
    ("guidance", "scores"),
    [
        (RopeGuidance(), {}),
        (GUIDED, {"alignment": torch.tensor([[0.1], [0.9], [0.5]])}),
        (RopeGuidance(1.5, 2.25, 0.3, 0.7, 0.8, "patch"), {"relevance": torch.linspace(0, 1, 18)}),
    ],
)
def test_rows_in_groups_of_like_length_give_what_one_pass_gives(tokenizer, batch, guidance, scores):
    """Two groups (a pass costs nothing), the longer row between the shorter ones."""
    assert batch["attention_mask"].sum(1).argmax() == 1
    model, found = make(tokenizer, guidance), []
    for overhead in (None, 0):
        model.zero_grad()
        states = hidden(model, batch, overhead=overhead, **scores)[batch["attention_mask"].bool()]
        states.square().sum().backward()
        found.append([states.detach(), *(weight.grad for weight in model.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_unguided_logits_are_the_base_classes(tokenizer, batch):
    model = make(tokenizer)
    base = Qwen2VLForConditionalGeneration(model.config).eval()
    base.load_state_dict(model.state_dict())
    inputs = flat(batch)
    kinds = (inputs["input_ids"] == model.config.image_token_id).int()
    wanted = base(**inputs, mm_token_type_ids=kinds).logits
    kept = inputs["attention_mask"].bool()
    torch.testing.assert_close(model(**inputs).logits[kept], wanted[kept], atol=1e-5, rtol=0)
    torch.testing.assert_close(model(**inputs, mm_token_type_ids=kinds).logits, model(**inputs).logits)


@torch.no_grad()
def test_guidance_changes_what_the_model_sees_and_so_does_alignment(tokenizer, batch):
    plain, guided = make(tokenizer), make(tokenizer, GUIDED)
    low, high = torch.full((3, 1), 0.1), torch.full((3, 1), 0.9)
    assert not torch.allclose(hidden(plain, batch), hidden(guided, batch, alignment=high), atol=1e-4)
    assert not torch.allclose(
        hidden(guided, batch, alignment=low), hidden(guided, batch, alignment=high), atol=1e-4
    )


def test_pair_guidance_without_alignment_is_an_error(tokenizer, batch):
    with pytest.raises(ValueError, match="alignment"):
        hidden(make(tokenizer, GUIDED), batch)


def test_loss_takes_the_scores_along(tokenizer, batch):
    model = make(tokenizer, GUIDED)
    result = model(**flat(batch), labels=batch["labels"], alignment=torch.full((3, 1), 0.5))
    result.loss.backward()
    assert torch.isfinite(result.loss) and model.model.visual.patch_embed.proj.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_questions_that_share_an_image_share_its_tower_pass(tokenizer, batch):
    model = make(tokenizer, GUIDED)
    alignment = torch.tensor([[0.2], [0.5], [0.9]])
    passes = []
    handle = model.model.visual.register_forward_hook(lambda *args: passes.append(len(args[1][0])))
    shared = hidden(model, batch, alignment=alignment)
    handle.remove()
    assert passes == [48]
    apart = model(**flat(batch), alignment=alignment).logits
    torch.testing.assert_close(model.lm_head(shared), apart, atol=1e-5, rtol=0)
    features = torch.cat(
        model.model.get_image_features(batch["pixel_values"], batch["image_grid_thw"]).pooler_output
    )
    given = hidden(model, batch, alignment=alignment, pixel_values=None, image_features=features)
    torch.testing.assert_close(given, shared, atol=1e-5, rtol=0)


def test_a_folder_that_plain_transformers_wrote_is_loaded_whole(tokenizer, tmp_path):
    """Its weights have the published checkpoints' names; the text layers would else start at random."""
    from safetensors.torch import load_file, save_file

    torch.manual_seed(8)
    base = Qwen2VLForConditionalGeneration(presets.tiny_config(SIZE, tokenizer))
    base.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert "model.layers.0.mlp.up_proj.weight" in stored and "visual.merger.ln_q.weight" in stored
    loaded = load_model(tmp_path).state_dict()
    assert loaded.keys() == base.state_dict().keys()
    assert all(torch.equal(loaded[name], value) for name, value in base.state_dict().items())
    direct = ClinKDForConditionalGeneration.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(direct[name], value) for name, value in base.state_dict().items())
    stored.pop("model.layers.0.mlp.up_proj.weight")
    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lacks 1 weights"):
        load_model(tmp_path)


def test_images_come_once_in_one_form(tokenizer, batch):
    with pytest.raises(ValueError, match="either"):
        hidden(make(tokenizer), batch, pixel_values=None)


@torch.no_grad()
def test_a_saved_folder_keeps_guidance_and_opens_in_plain_transformers(tokenizer, batch, tmp_path):
    model = make(tokenizer, GUIDED)
    out = save_model(model, tokenizer, presets.image_processor(SIZE), tmp_path / "model")
    alignment = torch.full((3, 1), 0.4)
    again = load_model(out).eval()
    assert guidance_of(again.config) == GUIDED
    torch.testing.assert_close(
        hidden(again, batch, alignment=alignment), hidden(model, batch, alignment=alignment), atol=0, rtol=0
    )
    assert guidance_of(load_model(out, RopeGuidance(3.0)).config).lambda_h == 3.0
    assert json.loads((out / "config.json").read_text())["architectures"] == [
        "Qwen2VLForConditionalGeneration"
    ]
    base, info = Qwen2VLForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert torch.equal(base.lm_head.weight, model.lm_head.weight)
    assert {"model.safetensors", "tokenizer.json", "preprocessor_config.json"} <= {
        path.name for path in out.iterdir()
    }
    assert load_model(out, dtype=torch.bfloat16).dtype == torch.bfloat16


@torch.no_grad()
def test_a_plain_qwen_folder_loads_unguided_unless_told(tokenizer, tmp_path):
    Qwen2VLForConditionalGeneration(presets.tiny_config(SIZE, tokenizer)).save_pretrained(tmp_path)
    assert guidance_of(load_model(tmp_path).config) == RopeGuidance()
    model = load_model(tmp_path, GUIDED)
    assert isinstance(model, ClinKDForConditionalGeneration) and guidance_of(model.config) == GUIDED


def test_guidance_reaches_the_trunk_when_it_is_set_on_loading(tokenizer, batch, tmp_path):
    make(tokenizer).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="alignment"):
        hidden(load_model(tmp_path, GUIDED), batch)


@pytest.mark.parametrize("train_vision", [True, False])
def test_the_merger_always_trains(tokenizer, train_vision):
    model = make(tokenizer)
    set_trainable(model, train_vision)
    visual = model.model.visual
    assert {p.requires_grad for p in visual.merger.parameters()} == {True}
    for part in (visual.blocks, visual.patch_embed):
        assert {p.requires_grad for p in part.parameters()} == {train_vision}
    assert {p.requires_grad for p in model.model.language_model.parameters()} == {True}


def test_layers_are_spread_from_first_to_last():
    assert kept_layers(28, 4) == [0, 9, 18, 27]
    assert kept_layers(3, 3) == [0, 1, 2] and kept_layers(3, 1) == [0]
    for layers in (0, 4):
        with pytest.raises(ValueError, match="layers"):
            kept_layers(3, layers)


@torch.no_grad()
def test_a_student_with_new_layers_shares_all_but_its_text_layers(tokenizer):
    teacher = make(tokenizer, GUIDED)
    student = student_with_new_layers(teacher, tokenizer, 2, 16, seed=3)
    again = student_with_new_layers(teacher, tokenizer, 2, 16, seed=3)
    taught, own = teacher.state_dict(), student.state_dict()
    layers = {name for name in own if name.startswith("model.language_model.layers.")}
    assert all(torch.equal(own[name], taught[name]) for name in own.keys() - layers if ".norm." not in name)
    assert {name.split(".")[3] for name in layers} == {"0", "1"}
    assert student.config.text_config.intermediate_size == 16
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(own[name], taught[name]) and torch.equal(own[name], again.state_dict()[name])


@torch.no_grad()
def test_a_student_is_made_of_its_teachers_weights(tokenizer, batch):
    teacher = make(tokenizer, GUIDED)
    alignment = torch.full((3, 1), 0.4)
    whole = student_from_teacher(teacher, 3).eval()
    torch.testing.assert_close(
        hidden(whole, batch, alignment=alignment), hidden(teacher, batch, alignment=alignment)
    )
    student = student_from_teacher(teacher, 2)
    source, copied = teacher.model.language_model.layers, student.model.language_model.layers
    assert len(copied) == 2 and teacher.config.text_config.num_hidden_layers == 3
    assert torch.equal(copied[1].mlp.up_proj.weight, source[2].mlp.up_proj.weight)
    assert student.lm_head.weight.data_ptr() == student.model.language_model.embed_tokens.weight.data_ptr()
    narrow = student_from_teacher(teacher, 2, mlp=8)
    assert narrow.model.language_model.layers[1].mlp.up_proj.weight.shape[0] == 8
    assert narrow.config.text_config.intermediate_size == 8
    student.lm_head.weight.add_(1)  # a copy, not a share
    assert not torch.equal(student.lm_head.weight, teacher.lm_head.weight)
