"""Adapters: only they and the merger train, and merged they are the model that was trained."""

from __future__ import annotations

import json

import pytest
import torch
from families import FAMILIES, GUIDANCE, SIZE, asked, tiny_model

from clinkd.config import ConfigError, check_config, with_values
from clinkd.model import presets
from clinkd.model.clinkd_qwen2vl import load_model, save_model, set_trainable
from clinkd.model.lora import (
    TARGETS,
    LoraOptions,
    add_adapters,
    is_adapted,
    merge_adapters,
    save_adapter,
    trained_weights,
)

torch.set_num_threads(1)
OPTIONS = LoraOptions(rank=4, alpha=8.0)


def adapted(family, tokenizer, mode="pair", options=OPTIONS, train_vision=False):
    model = tiny_model(family, tokenizer, GUIDANCE[mode])
    add_adapters(model, options)
    set_trainable(model, train_vision)
    return model


def trained(model, batch, steps=3):
    """``model`` after some steps of plain AdamW."""
    optimiser = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    for _ in range(steps):
        optimiser.zero_grad()
        model.train()(**batch).loss.backward()
        optimiser.step()
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_new_adapters_change_nothing(family, tokenizer):
    batch = asked(tokenizer, "pair")
    plain = tiny_model(family, tokenizer, GUIDANCE["pair"])(**batch).logits
    assert torch.equal(adapted(family, tokenizer)(**batch).logits, plain)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("train_vision", [True, False])
def test_adapters_and_merger_train_and_the_text_is_frozen_bit_for_bit(family, train_vision, tokenizer):
    model = adapted(family, tokenizer, train_vision=train_vision)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained(model, asked(tokenizer, "pair"))
    adapters = [name for name in before if ".lora_" in name]
    assert len(adapters) == 2 * len(TARGETS) * SIZE.layers
    for name, value in model.state_dict().items():
        trains = ".lora_" in name or ".visual.merger." in name
        trains |= train_vision and ".visual." in name
        assert torch.equal(value, before[name]) != trains, name
    assert not any(".visual." in name for name in adapters)  # its layers bear the same names in Qwen2.5-VL


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_the_merged_folder_is_the_adapted_model_in_plain_transformers_form(family, tokenizer, tmp_path):
    batch = asked(tokenizer, "patch")
    with torch.enable_grad():
        model = trained(adapted(family, tokenizer, "patch"), batch)
    wanted = model(**batch).logits
    plain = tiny_model(family, tokenizer, GUIDANCE["patch"])
    assert not torch.allclose(wanted, plain(**batch).logits, atol=0.1)
    merge_adapters(model)
    assert not is_adapted(model) and model.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(model(**batch).logits, wanted, atol=1e-5, rtol=0)
    save_model(model, tokenizer, presets.image_processor(SIZE), tmp_path)
    torch.testing.assert_close(load_model(tmp_path).eval()(**batch).logits, wanted, atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("train_vision", [True, False])
def test_peft_opens_the_adapter_over_its_start(family, train_vision, tokenizer, tmp_path):
    from peft import PeftModel

    batch = asked(tokenizer, "none")
    model = adapted(family, tokenizer, "none", train_vision=train_vision)
    tiny_model(family, tokenizer, GUIDANCE["none"]).save_pretrained(tmp_path / "start")
    with torch.enable_grad():
        trained(model, batch)
    save_adapter(model, OPTIONS, str(tmp_path / "start"), train_vision, tmp_path / "adapter")
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["peft_type"]) == (4, 8.0, "LORA")
    again = PeftModel.from_pretrained(load_model(written["base_model_name_or_path"]), tmp_path / "adapter")
    assert torch.equal(again.eval()(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("mode", GUIDANCE)
def test_checkpointing_changes_no_gradient_of_an_adapter(mode, tokenizer):
    gradients = []
    for checkpointing in (False, True):
        model = adapted("qwen2_vl", tokenizer, mode).train()
        for name, value in model.named_parameters():
            if "lora_B" in name:  # 0 at first, and then A has no gradient
                torch.nn.init.normal_(value, std=0.1, generator=torch.Generator().manual_seed(1))
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(**asked(tokenizer, mode)).loss.backward()
        gradients.append({name: value.grad for name, value in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name in trained_weights(model):
        assert gradients[0][name].abs().sum() > 0, name
        torch.testing.assert_close(gradients[1][name], gradients[0][name], atol=1e-7, rtol=1e-5)


def test_text_alone_trains_adapters_under_checkpointing_too(tokenizer):
    """No image, so nothing in front of the first layer wants a gradient."""
    model = adapted("qwen2_vl", tokenizer, "none").train()
    model.gradient_checkpointing_enable()
    ids = torch.tensor([[51, 52, 53, 54]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.model.language_model.layers[0].self_attn.q_proj.lora_B.default.weight.grad.abs().sum() > 0


def test_only_named_targets_are_adapted(tokenizer):
    model = adapted("qwen2_5_vl", tokenizer, options=LoraOptions(rank=2, targets=("q_proj", "up_proj")))
    names = {name.split(".lora_")[0].rpartition(".")[2] for name in trained_weights(model) if "lora" in name}
    assert names == {"q_proj", "up_proj"}


def test_wrong_targets_are_one_line_that_names_what_there_is(tokenizer):
    model = tiny_model("qwen2_vl", tokenizer)
    wanted = r"no linear layer fc1 in the text layers; there are down_proj, .*, v_proj"
    with pytest.raises(ValueError, match=wanted) as caught:
        add_adapters(model, LoraOptions(targets=("q_proj", "fc1")))  # fc1 is the vision tower's
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match=r"model\.lora\.targets\.0: .*'q_proj', .*got \"fc1\"") as found:
        check_config({"model": {"lora": {"targets": ["fc1"]}}}, "config.yaml")
    assert "\n" not in str(found.value)


def test_the_configuration_of_adapters():
    config = check_config({"model": {"lora": {"rank": 8}}}, "config.yaml")
    assert LoraOptions(**config.model.lora.model_dump()) == LoraOptions(rank=8)
    assert with_values(check_config({}, ""), {"model.lora.rank": 2}).model.lora.rank == 2
    with pytest.raises(ConfigError, match=r"model\.lora\.targets: .*name at least one"):
        check_config({"model": {"lora": {"targets": []}}}, "config.yaml")
    with pytest.raises(ConfigError, match=r"model\.lora\.rnk: unknown key; did you mean rank\?"):
        check_config({"model": {"lora": {"rnk": 8}}}, "config.yaml")
