"""Beginnings that rows share, and a last layer that works on wanted positions alone: the same loss and
gradients as in one plain pass."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import FAMILIES, GUIDANCE, images, tiny_model

from clinkd.model import chat
from clinkd.model.prefix import alike, prefix_lengths

QUESTIONS = ("Where is the liver?", "What is at <box>(1,2),(30,400)</box>?", "Describe it.", "Is it left?")
SHOWN = (0, 1, 1, 0, 2, 1, 0)  # the image of each row; the third is larger
TOKENS = (6, 6, 8)


@pytest.fixture
def asked(tokenizer: Any) -> dict[str, Any]:
    """Seven questions about three images of two sizes, in mixed order."""
    pixels, grid = images([[1, 4, 6], [1, 6, 4], [1, 4, 8]])
    rows = [
        chat.encode(tokenizer, QUESTIONS[at % 4], "The spleen." * (1 + at % 3), TOKENS[image])
        for at, image in enumerate(SHOWN)
    ]
    batch = chat.collate(rows, tokenizer.pad_token_id)
    return batch | {"image_grid_thw": grid, "pixel_values": pixels, "image_index": torch.tensor(SHOWN)}


def guided(mode: str) -> dict[str, Any]:
    if mode == "pair":
        return {"alignment": torch.linspace(0, 1, len(SHOWN))[:, None]}
    if mode == "patch":
        return {"relevance": torch.linspace(0, 1, sum(TOKENS[image] for image in SHOWN))}
    return {}


def learned(
    model: Any, batch: dict[str, Any], *, wanted: bool, **how: Any
) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss over the answers, and the gradients of all weights."""
    labels = batch["labels"]
    chosen = labels[:, 1:] != -100
    given = {key: value for key, value in batch.items() if key != "labels"}
    if wanted:
        how["wanted"] = torch.nn.functional.pad(chosen, (0, 1))
    states = model.forward_hidden(**given, **how)[:, :-1][chosen]
    model.zero_grad()
    loss = torch.nn.functional.cross_entropy(model.lm_head(states), labels[:, 1:][chosen])
    loss.backward()
    return loss.item(), {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", GUIDANCE)
@pytest.mark.parametrize("overhead", [None, 0, 10**6])
def test_loss_and_gradients_are_those_of_one_plain_pass(
    family: str, mode: str, overhead: int | None, tokenizer: Any, asked: dict[str, Any]
) -> None:
    model = tiny_model(family, tokenizer, GUIDANCE[mode]).train()
    scores = guided(mode)
    loss, gradients = learned(model, asked, wanted=False, **scores)
    found, ours = learned(model, asked, wanted=True, overhead=overhead, **scores)
    assert found == pytest.approx(loss, rel=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=2e-6, msg=name)


def test_each_beginning_runs_through_the_text_model_once(tokenizer: Any, asked: dict[str, Any]) -> None:
    """Counted by the rows that show images to the trunk: three, where a plain pass has seven."""
    model, counts = tiny_model("qwen2_vl", tokenizer), []
    model.model.register_forward_pre_hook(
        lambda _, arguments, given: counts.append((len(given["input_ids"]), "mm_encoder_outputs" in given)),
        with_kwargs=True,
    )
    learned(model, asked, wanted=True, overhead=0)
    assert [rows for rows, with_images in counts if with_images] == [3]
    assert sum(rows for rows, with_images in counts if not with_images) == len(SHOWN)
    counts.clear()
    learned(model, asked, wanted=True, overhead=10**6)  # where a pass costs more than it saves
    assert counts == [(len(SHOWN), True)]


def test_rows_begin_alike_with_the_same_tokens_and_the_same_images() -> None:
    ids = torch.tensor([[5, 9, 9, 1, 2], [5, 9, 9, 3, 0], [5, 9, 9, 1, 2], [6, 9, 9, 1, 2], [1, 2, 3, 0, 0]])
    assert prefix_lengths(ids, 9) == [3, 3, 3, 3, 0]
    assert alike(ids, [3, 3, 3, 3, 0], [(0,), (0,), (1,), (0,), ()]) == [0, 0, 2, 3, 4]


def test_what_is_not_wanted_is_not_worked_on(tokenizer: Any, asked: dict[str, Any]) -> None:
    model = tiny_model("qwen2_vl", tokenizer)
    seen = []
    last = model.model.language_model.layers[-1].mlp
    last.gate_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
    wanted = torch.zeros_like(asked["input_ids"], dtype=torch.bool)
    wanted[2, -3:] = True
    given = {key: value for key, value in asked.items() if key != "labels"}
    model.forward_hidden(**given, wanted=wanted)
    model.forward_hidden(**given)
    assert seen[0] == (3, 64) and seen[1] == (*wanted.shape, 64)  # and the next pass is whole again


def test_a_copy_of_the_model_has_its_own_last_layer(tokenizer: Any, asked: dict[str, Any]) -> None:
    model = tiny_model("qwen2_vl", tokenizer)
    twin = copy.deepcopy(model)
    with model.last_layer.only(torch.zeros_like(asked["input_ids"], dtype=torch.bool)):
        given = {key: value for key, value in asked.items() if key != "labels"}
        theirs = twin.forward_hidden(**given)
    torch.testing.assert_close(theirs, model.forward_hidden(**given))
