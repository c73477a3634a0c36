"""How models made here start: numbers on a curve, words looking for the patches that show them."""

import torch

from clinkd.model.first_weights import (
    BACK,
    begin,
    begin_layers,
    number_tokens,
    rotation,
    smooth_numbers,
    word_tokens,
)
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


def head(model, layer: int, number: int):
    """Query, key and value weights [d, W] of one head, and what its output adds [W, d]."""
    attention = model.model.language_model.layers[layer].self_attn
    own = slice(number * attention.head_dim, (number + 1) * attention.head_dim)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    return *(part.weight[own].detach() for part in projections), attention.o_proj.weight[:, own].detach()


def test_numbers_find_the_patches_that_show_them_and_words_do_too(tmp_path) -> None:
    model, tokenizer = start(tmp_path)
    begin(model, tokenizer)
    turn = rotation(128)
    assert torch.allclose(turn @ turn.T, torch.eye(128), atol=1e-5)
    table = torch.nn.functional.normalize(model.get_input_embeddings().weight.detach(), dim=-1) * 128**0.5
    numbers = table[[index for index, value in number_tokens(tokenizer) if value % 100 == 0]]
    words = table[word_tokens(tokenizer)]
    for layer in range(3):
        for number, those, others in ((2, numbers, words), (3, words, numbers)):
            query, key, *_ = head(model, layer, number)
            shown = (those @ query.T) @ (those @ turn.T @ key.T).T
            assert (shown.argmax(1) == torch.arange(len(those))).float().mean() > 0.8
            elsewhere = (others @ query.T) @ (those @ turn.T @ key.T).T
            assert shown.diagonal().mean() > 3 * elsewhere.abs().mean()


def test_heads_that_match_numbers_copy_words_and_the_other_way_round(tmp_path) -> None:
    model, tokenizer = start(tmp_path)
    begin(model, tokenizer)
    table = model.get_input_embeddings().weight.detach()
    numbers = table[[index for index, _ in number_tokens(tokenizer)]]
    words = table[word_tokens(tokenizer)]
    for number, brought, left in ((2, words, numbers), (3, numbers, words)):
        *_, value, output = head(model, 0, number)
        copied, not_copied = (rows @ rotation(128).T @ value.T @ output.T for rows in (brought, left))
        assert copied.norm() / brought.norm() > 0.5
        assert copied.norm() / brought.norm() > 1.5 * not_copied.norm() / left.norm()


def test_the_last_layer_brings_the_coordinates_of_a_box_in_their_order(tmp_path) -> None:
    model, tokenizer = start(tmp_path)
    smooth_numbers(model, tokenizer)
    boxes = list(torch.randn(4, 128, 128))
    begin_layers(model, tokenizer, boxes)
    patch = torch.randn(128)
    for number in (2, 3):
        *_, value, output = head(model, 2, number)
        brought = output @ value @ patch
        wanted = output @ output.T @ boxes[number - 2] @ patch  # what its directions hold of the coordinate
        assert torch.nn.functional.cosine_similarity(brought, wanted, dim=0) > 0.999
    *_, value, output = head(model, 1, 3)
    assert not torch.allclose(output, head(model, 2, 3)[3]) or not torch.allclose(value, head(model, 2, 3)[2])


def attended(model, tokens: int) -> torch.Tensor:
    """[heads, L, L] of the first text layer, on words drawn at random."""
    model.set_attn_implementation("eager")
    ids = torch.randint(260, len(model.get_input_embeddings().weight), (1, tokens))
    with torch.no_grad():
        return model.model.language_model(input_ids=ids, output_attentions=True).attentions[0][0]


def test_heads_look_back_by_turns_whatever_the_words(tmp_path) -> None:
    model, tokenizer = start(tmp_path)
    begin_layers(model, tokenizer)
    found = attended(model, 40)
    for number, back in enumerate(BACK[:2]):
        assert {at - int(found[number, at].argmax()) for at in range(12, 40)} == {int(back)}
    assert len({at - int(found[2, at].argmax()) for at in range(12, 40)}) > 3  # no such head


def test_what_stands_there_is_copied_as_it_is(tmp_path) -> None:
    model, tokenizer = start(tmp_path)
    begin_layers(model, tokenizer)
    *_, value, output = head(model, 0, 1)
    product = output @ value
    assert torch.allclose(product, product.T, atol=1e-5)  # half of a projection
    assert torch.allclose(product @ product, 0.5 * product, atol=1e-5)


def test_a_vocabulary_without_numbers_starts_too(tmp_path) -> None:
    from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(train_tokenizer(["one liver"] * 3, tmp_path, vocab_size=300))
    for heads, layers in ((1, 1), (2, 2), (8, 3)):
        model = Qwen2VLForConditionalGeneration(tiny_config(TinySize(heads=heads, layers=layers), tokenizer))
        begin(model, tokenizer)
        assert all(weight.isfinite().all() for weight in model.parameters())
