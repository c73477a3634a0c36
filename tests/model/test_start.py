"""How models made here start: numbers on a curve, words looking for the patches that show them."""

import torch

from clinkd.model.presets import (
    TinySize,
    match_images,
    rotation,
    smooth_numbers,
    tiny_config,
    train_tokenizer,
)


def start(tmp_path):
    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

    torch.manual_seed(0)
    texts = [f"the liver at ({n},{n + 5}),({n + 9},{n + 12})" for n in range(0, 900, 3)] * 2
    tokenizer = AutoTokenizer.from_pretrained(train_tokenizer(texts, tmp_path, vocab_size=1600))
    return Qwen2VLForConditionalGeneration(tiny_config(TinySize(), tokenizer)), tokenizer


def test_near_numbers_begin_alike_and_far_ones_do_not(tmp_path) -> None:
    model, tokenizer = start(tmp_path)
    before = model.get_input_embeddings().weight.detach().clone()
    smooth_numbers(model, tokenizer)
    table = torch.nn.functional.normalize(model.get_input_embeddings().weight.detach(), dim=-1)
    one, near, far, word = (tokenizer.convert_tokens_to_ids(text) for text in ("300", "306", "900", "Ġliver"))
    assert table[one] @ table[near] > 0.95 > 0.4 > abs(table[one] @ table[far])
    assert torch.equal(model.get_input_embeddings().weight[word], before[word])


def test_a_word_attends_to_its_rotated_self_and_not_to_itself(tmp_path) -> None:
    model, _ = start(tmp_path)
    match_images(model)
    turn = rotation(128)
    assert torch.allclose(turn @ turn.T, torch.eye(128), atol=1e-5)
    words = torch.nn.functional.normalize(torch.randn(20, 128), dim=-1) * 128**0.5
    for layer in model.model.language_model.layers:
        query, key = layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight
        shown, same = (words @ query.T) @ (words @ turn.T @ key.T).T, (words @ query.T) @ (words @ key.T).T
        assert (shown.argmax(1) == torch.arange(20)).all()
        assert shown.diagonal().mean() > 10 * same.diagonal().mean().abs()


def test_what_is_attended_to_is_copied(tmp_path) -> None:
    model, _ = start(tmp_path)
    match_images(model, copy=0.5)
    attention = model.model.language_model.layers[0].self_attn
    product = attention.o_proj.weight @ attention.v_proj.weight
    assert torch.allclose(product, 0.5 * torch.eye(128), atol=1e-5)
