"""Generation with a KV cache is generation without one, token by token, greedy and sampled."""

from __future__ import annotations

import pytest
import torch
from families import FAMILIES, GUIDANCE, images, scores, tiny_model
from transformers import GenerationConfig

from clinkd.model import chat, presets

torch.set_num_threads(1)
GRIDS = [
    [1, 4, 6], [1, 6, 4], [1, 2, 8], [1, 8, 6], [1, 4, 4], [1, 2, 2], [1, 6, 8], [1, 4, 10],
]  # fmt: skip
QUESTIONS = [
    "Where?", "Where is the liver?", "What is at <box>(10,20),(300,400)</box> in it?", "Describe it.",
    "Is the left kidney larger than the right kidney in this image?", "What?", "Name the organ, please.",
    "Which of <box>(1,2),(3,4)</box> and <box>(5,6),(7,8)</box> is the spleen?",
]  # fmt: skip
NEW = 10


def batch_of_eight(tokenizer, mode):
    """Prompts of eight lengths padded on the left, an image of its own size for each."""
    pixels, grid = images(GRIDS)
    tokens = (grid.prod(-1) // 4).tolist()
    rows = [
        (chat.encode(tokenizer, text, "", count)[0], [])
        for text, count in zip(QUESTIONS, tokens, strict=True)
    ]
    batch = chat.collate(rows, tokenizer.pad_token_id, side="left")
    batch.pop("labels")
    lengths = batch["attention_mask"].sum(1).tolist()
    assert len(set(lengths)) == 8
    return batch | {"pixel_values": pixels, "image_grid_thw": grid} | scores(mode, 8, sum(tokens))


def talkative(family, tokenizer, mode):
    """A model that says something else to everyone: a head of its own, and attention that looks somewhere.

    With the embeddings as its head, a new model repeats its last token whatever it is shown. It writes no
    image's tokens: read again without a cache, they would ask for an image.
    """
    model = tiny_model(family, tokenizer, GUIDANCE[mode])
    head, config = torch.randn_like(model.lm_head.weight), model.config
    head[[config.image_token_id, config.video_token_id, config.vision_start_token_id]] = 0
    model.lm_head.weight = torch.nn.Parameter(head)
    for layer in model.model.language_model.layers:
        for part in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            part.weight.data *= 3
    return model


def cached(model, tokenizer, batch, **settings):
    config = GenerationConfig(
        max_new_tokens=NEW, eos_token_id=tokenizer.convert_tokens_to_ids(presets.IM_END),
        pad_token_id=tokenizer.pad_token_id, top_k=0, top_p=1.0, use_cache=True, **settings,
    )  # fmt: skip
    return model.generate(**batch, generation_config=config)[:, batch["input_ids"].shape[1] :]


def uncached(model, tokenizer, batch, choose):
    """Every token from the logits of the whole row so far."""
    end, pad = tokenizer.convert_tokens_to_ids(presets.IM_END), tokenizer.pad_token_id
    ids, mask = batch["input_ids"], batch["attention_mask"]
    done = torch.zeros(len(ids), dtype=torch.bool)
    written = []
    for _ in range(NEW):
        logits = model(**batch | {"input_ids": ids, "attention_mask": mask}, use_cache=False).logits[:, -1]
        token = torch.where(done, pad, choose(logits.float()))
        done |= token == end
        written.append(token)
        ids = torch.cat([ids, token[:, None]], 1)
        mask = torch.cat([mask, torch.ones_like(token)[:, None]], 1)
        if done.all():
            break
    return torch.stack(written, 1)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", GUIDANCE)
def test_greedy(family, mode, tokenizer):
    model, batch = talkative(family, tokenizer, mode), batch_of_eight(tokenizer, mode)
    written = cached(model, tokenizer, batch, do_sample=False)
    assert len({tuple(row) for row in written.tolist()}) == 8  # so that a mix-up would show
    assert torch.equal(written, uncached(model, tokenizer, batch, lambda logits: logits.argmax(-1)))


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", GUIDANCE)
def test_greedy_in_bfloat16(family, mode, tokenizer):
    """Logits of 8 bits tie, and a tie goes either way: each token is a likeliest one to that precision."""
    model, batch = talkative(family, tokenizer, mode).bfloat16(), batch_of_eight(tokenizer, mode)
    written = cached(model, tokenizer, batch, do_sample=False)
    whole = torch.cat([batch["input_ids"], written[:, :-1]], 1)
    kept = torch.cat([batch["attention_mask"], torch.ones_like(written[:, :-1])], 1)
    inputs = batch | {"input_ids": whole, "attention_mask": kept}
    logits = model(**inputs, use_cache=False).logits[:, -written.shape[1] :].float()
    best, chosen = logits.max(-1).values, logits.gather(-1, written[..., None])[..., 0]
    assert (best - chosen <= 2**-5 * best.abs()).all() and (chosen == best).float().mean() > 0.9


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", GUIDANCE)
def test_sampled_with_the_same_draws(family, mode, tokenizer):
    model, batch = talkative(family, tokenizer, mode), batch_of_eight(tokenizer, mode)
    torch.manual_seed(11)
    written = cached(model, tokenizer, batch, do_sample=True, temperature=0.8)

    def choose(logits):
        return torch.multinomial((logits / 0.8).softmax(-1), 1).squeeze(1)

    torch.manual_seed(11)
    assert torch.equal(written, uncached(model, tokenizer, batch, choose))
    torch.manual_seed(12)
    assert not torch.equal(written, uncached(model, tokenizer, batch, choose)[:, : written.shape[1]])


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_positions_are_the_same_with_and_without_a_cache(family, tokenizer):
    """Bit for bit, whatever logits of 8 bits do."""
    model, batch = talkative(family, tokenizer, "pair"), batch_of_eight(tokenizer, "pair")
    model.to(torch.bfloat16)
    seen = []
    model.model.language_model.rotary_emb.register_forward_pre_hook(lambda _, args: seen.append(args[1]))
    written = cached(model, tokenizer, batch, do_sample=False)
    steps = torch.cat([places.float().expand(3, 8, -1) for places in seen], dim=2)
    seen.clear()
    whole = torch.cat([batch["input_ids"], written[:, :-1]], 1)
    kept = torch.cat([batch["attention_mask"], torch.ones_like(written[:, :-1])], 1)
    model(**batch | {"input_ids": whole, "attention_mask": kept}, use_cache=False)
    assert seen[0].dtype == torch.float32 and torch.equal(steps, seen[0])
