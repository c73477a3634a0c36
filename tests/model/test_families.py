"""Both families are guided alike: each is its own base class except for its positions."""

from __future__ import annotations

import json

import pytest
import torch
from families import FAMILIES, GUIDANCE, SIZE, asked, tiny_config, tiny_model

from clinkd.data.codec import MODEL_SPELLING
from clinkd.model import clinkd_qwen2vl, presets
from clinkd.model.attention import attention_kernel
from clinkd.model.clinkd_qwen2vl import guidance_of, load_model, new_model, save_model
from clinkd.model.rope import RopeGuidance
from clinkd.model.students import student_from_teacher

torch.set_num_threads(1)


def without_labels(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


def test_the_families_are_those_whose_boxes_can_be_spelled():
    assert tuple(clinkd_qwen2vl.FAMILIES) == FAMILIES == tuple(MODEL_SPELLING)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_unguided_logits_are_the_base_classes(family, tokenizer):
    model = tiny_model(family, tokenizer)
    base = model.plain(model.config).eval()
    base.load_state_dict(model.state_dict())
    inputs = without_labels(asked(tokenizer))
    kinds = (inputs["input_ids"] == model.config.image_token_id).int()
    wanted = base(**inputs, mm_token_type_ids=kinds).logits
    kept = inputs["attention_mask"].bool()
    torch.testing.assert_close(model(**inputs).logits[kept], wanted[kept], atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["pair", "patch"])
def test_guidance_changes_what_the_model_sees(family, mode, tokenizer):
    batch = asked(tokenizer, mode)
    guided = tiny_model(family, tokenizer, GUIDANCE[mode])(**batch).logits
    plain = tiny_model(family, tokenizer, GUIDANCE["none"])(**batch).logits
    assert not torch.allclose(guided, plain, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_folder_keeps_all_and_opens_in_plain_transformers(family, tokenizer, tmp_path):
    model = tiny_model(family, tokenizer, GUIDANCE["pair"])
    out = save_model(model, tokenizer, presets.image_processor(SIZE), tmp_path)
    again, batch = load_model(out).eval(), asked(tokenizer, "pair")
    assert type(again) is type(model) and guidance_of(again.config) == GUIDANCE["pair"]
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits, atol=0, rtol=0)
    assert json.loads((out / "config.json").read_text())["architectures"] == [model.plain.__name__]
    base, info = model.plain.from_pretrained(out, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state = model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in base.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_folder_that_plain_transformers_wrote_is_loaded_whole(family, tokenizer, tmp_path):
    torch.manual_seed(8)
    config = tiny_config(family, tokenizer)
    base = clinkd_qwen2vl.model_class(config).plain(config)
    base.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, GUIDANCE["patch"])
    assert guidance_of(loaded.config) == GUIDANCE["patch"]
    assert all(torch.equal(loaded.state_dict()[name], value) for name, value in base.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_a_student_is_of_its_teachers_family(family, tokenizer):
    teacher = tiny_model(family, tokenizer, GUIDANCE["none"])
    batch, student = asked(tokenizer), student_from_teacher(teacher, 2).eval()
    torch.testing.assert_close(student(**batch).logits, teacher(**batch).logits)


def test_videos_that_are_timed_in_seconds_are_refused(tokenizer):
    model = tiny_model("qwen2_5_vl", tokenizer)
    pads = [model.config.vision_start_token_id] + [model.config.video_token_id] * 4
    with pytest.raises(ValueError, match="qwen2_5_vl times videos in seconds") as caught:
        model(
            input_ids=torch.tensor([pads]), video_grid_thw=torch.tensor([[1, 4, 4]]),
            pixel_values_videos=torch.zeros(16, 3 * SIZE.patch**2),
        )  # fmt: skip
    assert "\n" not in str(caught.value)


def test_another_family_is_refused_in_one_line(tmp_path):
    from transformers import Qwen2Config

    with pytest.raises(ValueError, match="'qwen2'; supported are qwen2_vl, qwen2_5_vl"):
        new_model(Qwen2Config(), RopeGuidance())
    Qwen2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="supported are qwen2_vl, qwen2_5_vl") as caught:
        load_model(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", GUIDANCE)
def test_eager_attention_is_the_fused_kernels(family, mode, tokenizer, tmp_path):
    tiny_model(family, tokenizer, GUIDANCE[mode]).save_pretrained(tmp_path)
    batch, logits = asked(tokenizer, mode), {}
    for kernel in ("eager", "sdpa"):
        model = load_model(tmp_path, attention=kernel).eval()
        assert model.config.text_config._attn_implementation == kernel
        logits[kernel] = model(**batch).logits[batch["attention_mask"].bool()]
    torch.testing.assert_close(logits["eager"], logits["sdpa"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", GUIDANCE)
def test_checkpointing_changes_no_gradient(family, mode, tokenizer):
    gradients = []
    for checkpointing in (False, True):
        model = tiny_model(family, tokenizer, GUIDANCE[mode]).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        passes = []
        model.model.language_model.layers[0].mlp.register_forward_pre_hook(lambda *_, p=passes: p.append(1))
        model(**asked(tokenizer, mode)).loss.backward()
        assert len(passes) == 1 + checkpointing  # run again on the way back
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-7, rtol=1e-5)


def test_flash_attention_is_chosen_where_it_can_run_and_refused_where_not():
    assert attention_kernel("auto", torch.float32) is None
    assert attention_kernel("eager", torch.bfloat16) == "eager"
    with pytest.raises(ValueError, match=r"needs bfloat16 .* not float32"):
        attention_kernel("flash_attention_2", torch.float32)
    with pytest.raises(ValueError, match="none of auto, eager, sdpa, flash_attention_2"):
        attention_kernel("flash", torch.float32)
    if not torch.cuda.is_available():
        assert attention_kernel("auto", torch.bfloat16) is None
        with pytest.raises(ValueError, match="needs a CUDA GPU; choose auto, sdpa or eager"):
            attention_kernel("flash_attention_2", torch.bfloat16)
