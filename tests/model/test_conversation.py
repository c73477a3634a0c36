"""Packed documents against each for itself: the same logits, losses and gradients; no one sees another."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from clinkd.data.scores import Score
from clinkd.model import chat, presets
from clinkd.model.clinkd_qwen2vl import new_model
from clinkd.model.conversation import Document, encode_conversation, pack_documents, packed_positions
from clinkd.model.guide import guide_inputs, merged_grids
from clinkd.model.rope import RopeGuidance

torch.set_num_threads(1)
SIZE = presets.TinySize(hidden=64, layers=3, mlp=96, vision_hidden=32, vision_layers=2, image_size=48)
GRIDS = torch.tensor([[1, 4, 6], [1, 6, 4], [1, 2, 4]])
TOKENS = [6, 6, 2]
PATCHES = [24, 24, 8]
TALKS = [  # (turns, images): one image, none, several, one that is shared
    ([("Where is the liver?", "At <box>(1,2),(30,400)</box>."), ("What is beside it?", "The spleen.")], (0,)),
    ([("Is a CT made of X-rays?", "Yes.")], ()),
    ([("Compare both.", "The kidney moved."), ("How far?", "A little."), ("Sure?", "Yes.")], (1, 2)),
    ([("Describe it.", "A CT with two kidneys.")], (1,)),
]
GUIDANCES = {
    "plain": RopeGuidance(),
    "lambda 2": RopeGuidance(2.0, 2.0),
    "pair": RopeGuidance(1.5, 2.25, 0.3, 0.7, 0.8, "pair"),
    "patch": RopeGuidance(1.5, 2.25, 0.3, 0.7, 0.8, "patch"),
}


@pytest.fixture
def pixels():
    torch.manual_seed(5)
    return torch.randn(sum(PATCHES), 3 * SIZE.patch**2)


def make(tokenizer, guidance, attention="sdpa"):
    torch.manual_seed(3)
    config = presets.tiny_config(SIZE, tokenizer)
    config._attn_implementation = attention
    model = new_model(config, guidance).eval()
    assert model.config._attn_implementation == attention
    return model


def documents(tokenizer):
    found = []
    for number, (turns, images) in enumerate(TALKS):
        ids, labels = encode_conversation(tokenizer, turns, [TOKENS[image] for image in images])
        relevance = np.arange(4 * len(images), dtype=np.uint8) * 20 + number
        found.append(Document(ids, labels, images, Score(0.2 * number, relevance, ((2, 2),) * len(images))))
    return found


def scores_of(model, documents, packed):
    guided = RopeGuidance(**model.config.rope_guidance).guided
    merged = [merged_grids(GRIDS[list(document.images)], 2) for document in documents]
    scores = [document.score for document in documents]
    return guide_inputs(guided, scores, merged, packed=packed) if documents else {}


def batch_of(model, tokenizer, rows, pad=0):
    """The packed batch of ``rows``, with ``pad`` more tokens of padding, and its positions."""
    packed = pack_documents(rows, tokenizer.pad_token_id)
    for name, value in (("input_ids", tokenizer.pad_token_id), ("labels", -100), ("documents", 0)):
        packed[name] = torch.nn.functional.pad(packed[name], (0, pad), value=value)
    guidance = RopeGuidance(**model.config.rope_guidance)
    shown = [document for row in rows for document in row if document.images]
    positions = packed_positions(
        packed["input_ids"], packed["documents"], GRIDS[packed["image_index"]], guidance=guidance,
        image_token_id=model.config.image_token_id,
        vision_start_token_id=model.config.vision_start_token_id,
        **scores_of(model, shown, packed=True),
    )  # fmt: skip
    return packed, positions


def forward(model, tokenizer, rows, pixels, pad=0):
    """Logits [B, L, V] and the packed batch of ``rows``."""
    packed, positions = batch_of(model, tokenizer, rows, pad)
    hidden = model.forward_hidden(
        packed["input_ids"], None, GRIDS, pixels, image_index=packed["image_index"], position_ids=positions
    )
    return model.lm_head(hidden), packed


def alone(model, document, pixels):
    """Logits [L, V] of one conversation, the way the base class takes it: no packing, no positions given."""
    ids = torch.tensor([list(document.ids)])
    chosen = [pixels.split(PATCHES)[image] for image in document.images]
    images = (
        {"pixel_values": torch.cat(chosen), "image_grid_thw": GRIDS[list(document.images)]} if chosen else {}
    )
    scores = scores_of(model, [document] if chosen else [], packed=False)
    return model(input_ids=ids, attention_mask=torch.ones_like(ids), **images, **scores).logits[0]


def pieces(logits, packed):
    """Logits of each document, in order."""
    kept = packed["documents"]
    return [
        logits[row][kept[row] == number]
        for row in range(len(kept))
        for number in range(1, kept[row].max() + 1)
    ]


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("guidance", GUIDANCES)
def test_packed_logits_are_the_unpacked_ones(tokenizer, pixels, guidance, attention):
    model = make(tokenizer, GUIDANCES[guidance], attention)
    talks = documents(tokenizer)
    wanted = [alone(model, document, pixels) for document in talks]
    for rows, pad in (([talks], 0), ([talks], 7), ([talks[:2], talks[2:]], 0), ([[d] for d in talks], 3)):
        logits, packed = forward(model, tokenizer, rows, pixels, pad)
        for found, expected in zip(pieces(logits, packed), wanted, strict=True):
            torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_rows_may_be_laid_end_to_end(tokenizer, pixels):
    """What flash attention is given: one row for all, padding in between."""
    model = make(tokenizer, GUIDANCES["lambda 2"])
    talks = documents(tokenizer)
    packed, positions = batch_of(model, tokenizer, [talks[:2], talks[2:]], pad=4)
    both = [packed["input_ids"], positions], [packed["input_ids"].view(1, -1), positions.view(4, 1, -1)]
    one, other = (
        model.forward_hidden(ids, None, GRIDS, pixels, image_index=packed["image_index"], position_ids=where)
        for ids, where in both
    )
    kept = packed["documents"] > 0
    torch.testing.assert_close(other.view_as(one)[kept], one[kept], atol=1e-5, rtol=0)


def test_losses_and_gradients_are_the_unpacked_ones(tokenizer, pixels):
    import torch.nn.functional as F

    talks = documents(tokenizer)
    gradients, losses = [], []
    for packed_rows in (True, False):
        model = make(tokenizer, GUIDANCES["lambda 2"])
        loss = torch.zeros(())
        for rows in [[talks]] if packed_rows else [[[document]] for document in talks]:
            logits, packed = forward(model, tokenizer, rows, pixels, pad=5)
            loss = loss + F.cross_entropy(
                logits[:, :-1].flatten(0, 1), packed["labels"][:, 1:].flatten(), reduction="sum"
            )
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: value.grad for name, value in model.named_parameters()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
    for name, value in gradients[0].items():
        assert (value is not None and value.abs().sum() > 0) or "k_proj.bias" in name, name
        torch.testing.assert_close(value, gradients[1][name], atol=2e-4, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_no_document_sees_another(tokenizer, pixels, attention):
    model = make(tokenizer, GUIDANCES["lambda 2"], attention)
    talks = documents(tokenizer)
    before = pieces(*forward(model, tokenizer, [talks], pixels))
    ids, labels = encode_conversation(tokenizer, [("Wholly different words?", "No.")], [TOKENS[0]])
    changed = [Document(ids, labels, (0,)), *talks[1:]]
    other = pixels.clone()
    other[: PATCHES[0]] += 3
    for rows, values, which in ((changed, pixels, 0), (talks, other, 0)):
        after = pieces(*forward(model, tokenizer, [rows], values))
        assert after[which].shape != before[which].shape or (after[which] - before[which]).abs().max() > 1e-2
        for number in range(1, len(talks)):
            torch.testing.assert_close(after[number], before[number], atol=1e-5, rtol=0)


def test_without_the_text_axis_documents_would_leak(tokenizer, pixels):
    """The check above can fail: three axes and no mask are one long document."""
    model = make(tokenizer, GUIDANCES["plain"])
    talks = documents(tokenizer)
    packed = pack_documents([talks], tokenizer.pad_token_id)
    positions = packed_positions(
        packed["input_ids"], packed["documents"], GRIDS[packed["image_index"]], guidance=RopeGuidance(),
        image_token_id=model.config.image_token_id,
        vision_start_token_id=model.config.vision_start_token_id,
    )  # fmt: skip
    assert positions.shape == (4, *packed["input_ids"].shape)
    with torch.no_grad():
        hidden = model.forward_hidden(
            packed["input_ids"],
            None,
            GRIDS,
            pixels,
            image_index=packed["image_index"],
            position_ids=positions[1:],
        )
        last = pieces(model.lm_head(hidden), packed)[-1]
        assert (last - alone(model, talks[-1], pixels)).abs().max() > 1e-3


def test_one_turn_about_one_image_is_encode(tokenizer):
    for question, answer in (
        ("Where is the liver?", "At <box>(1,2),(30,400)</box>."),
        ("a <|im_end|> b", ""),
    ):
        prompt, reply = chat.encode(tokenizer, question, answer, 9)
        ids, labels = encode_conversation(tokenizer, [(question, answer)], [9])
        assert ids == prompt + reply and labels == [-100] * len(prompt) + reply


def test_several_turns_and_images_read_as_the_template_writes_them(tokenizer):
    turns = [("First?", "One."), ("Second?", "Two.")]
    ids, labels = encode_conversation(tokenizer, turns, [2, 3])
    image = "<|vision_start|>{}<|vision_end|>"
    pads = [image.format("<|image_pad|>" * count) for count in (2, 3)]
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == (
        f"<|im_start|>user\n{''.join(pads)}First?<|im_end|>\n<|im_start|>assistant\nOne.<|im_end|>\n"
        "<|im_start|>user\nSecond?<|im_end|>\n<|im_start|>assistant\nTwo.<|im_end|>"
    )
    assert tokenizer.decode([label for label in labels if label != -100]) == "One.<|im_end|>Two.<|im_end|>"
    with pytest.raises(ValueError, match="0 turns"):
        encode_conversation(tokenizer, [], [1])


def test_a_template_that_drops_earlier_turns_is_refused(tokenizer):
    import copy

    forgetful = copy.deepcopy(tokenizer)
    forgetful.chat_template = "{{ messages[-1]['content'] }}"
    with pytest.raises(ValueError, match="rewrites earlier turns"):
        encode_conversation(forgetful, [("a", "b"), ("c", "d")], [1])


def test_no_document_predicts_the_next_ones_first_token():
    greedy = Document([1, 2], [1, 2])  # labels where an answer may not begin
    packed = pack_documents([[greedy, greedy], [greedy]], pad_id=0)
    assert packed["labels"].tolist() == [[-100, 2, -100, 2], [-100, 2, -100, -100]]
    assert packed["documents"].tolist() == [[1, 1, 2, 2], [1, 1, 0, 0]]


def test_a_batch_without_image_still_runs_the_tower(tokenizer):
    """All parameters take part with gradient 0, as sharded engines expect of every rank."""
    model = make(tokenizer, GUIDANCES["plain"])
    for part in model.parameters():
        part.requires_grad_(True)
    ran = []
    model.model.visual.register_forward_hook(lambda *_: ran.append(True))
    ids = torch.full((1, 2), tokenizer.pad_token_id)
    positions = torch.arange(2.0).expand(4, 1, 2)
    grid, values = torch.tensor([[1, 2, 2]]), torch.zeros(4, 3 * SIZE.patch**2)
    nothing = torch.zeros(0, dtype=torch.long)
    hidden = model.forward_hidden(ids, None, grid, values, image_index=nothing, position_ids=positions)
    hidden.sum().backward()
    assert ran
    for name, value in model.model.visual.named_parameters():
        assert value.grad is not None and not value.grad.any(), name
