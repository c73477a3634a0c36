"""How models made here start: numbers on a curve, words looking for the patches that show them."""

import torch

from clinkd.model.first_weights import BACK, look_back, look_up, rotation, smooth_numbers
from clinkd.model.presets import TinySize, tiny_config, train_tokenizer


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
    turn = rotation(128)
    assert torch.allclose(turn @ turn.T, torch.eye(128), atol=1e-5)
    words = torch.nn.functional.normalize(torch.randn(20, 128), dim=-1) * 128**0.5
    for layer in model.model.language_model.layers:
        with torch.no_grad():
            look_up(layer.self_attn)
        query, key = layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight
        shown, same = (words @ query.T) @ (words @ turn.T @ key.T).T, (words @ query.T) @ (words @ key.T).T
        assert (shown.argmax(1) == torch.arange(20)).all()
        assert shown.diagonal().mean() > 5 * same.diagonal().mean().abs()


def test_what_a_patch_shows_is_copied_as_the_word(tmp_path) -> None:
    model, _ = start(tmp_path)
    attention = model.model.language_model.layers[0].self_attn
    with torch.no_grad():
        look_up(attention, copy=0.7)
    words = torch.randn(20, 128)
    patches = words @ rotation(128).T
    copied = patches @ attention.v_proj.weight.T @ attention.o_proj.weight.T
    assert torch.allclose(copied, 0.7 * words, atol=1e-4)


def attended(model, tokens: int) -> torch.Tensor:
    """[heads, L, L] of the first text layer, on words drawn at random."""
    model.set_attn_implementation("eager")
    ids = torch.randint(260, len(model.get_input_embeddings().weight), (1, tokens))
    with torch.no_grad():
        return model.model.language_model(input_ids=ids, output_attentions=True).attentions[0][0]


def test_heads_look_back_by_turns_whatever_the_words(tmp_path) -> None:
    model, _ = start(tmp_path)
    with torch.no_grad():
        look_back(model.model.language_model.layers[0].self_attn, 2, 1000.0)
    found = attended(model, 40)
    for head, back in enumerate(BACK):
        assert {at - int(found[head, at].argmax()) for at in range(12, 40)} == {int(back)}
    assert len({at - int(found[2, at].argmax()) for at in range(12, 40)}) > 3  # no such head


def test_what_stands_there_is_copied_as_it_is(tmp_path) -> None:
    model, _ = start(tmp_path)
    attention = model.model.language_model.layers[0].self_attn
    with torch.no_grad():
        look_up(attention)
        look_back(attention, 2, 1000.0, copy=0.5)
    own = slice(0, 64)
    product = attention.o_proj.weight[:, own] @ attention.v_proj.weight[own]
    assert torch.allclose(product, product.T, atol=1e-5)  # half of a projection
    assert torch.allclose(product @ product, 0.5 * product, atol=1e-5)


def test_the_chat_templates_words_are_one_token_each(tmp_path) -> None:
    _, tokenizer = start(tmp_path)
    talk = tokenizer.apply_chat_template([{"role": "user", "content": ""}], add_generation_prompt=True)
    ids = talk["input_ids"] if isinstance(talk, dict) or hasattr(talk, "keys") else talk
    assert len(ids) == len(["<start>", "user", "\n", "<end>", "\n", "<start>", "assistant", "\n"])
