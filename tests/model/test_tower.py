"""States of a frozen tower: what it says, once, and the same bits in whichever batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import asked, images, tiny_model

from clinkd.model import tower
from clinkd.model.clinkd_qwen2vl import set_trainable
from clinkd.model.tower import Shown, State, States, can_keep, merged_states, tower_digest

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch) -> States:
    """A process that has seen nothing."""
    states = States()
    monkeypatch.setattr(tower, "STATES", states)
    return states


@pytest.fixture
def model(tokenizer: Any) -> Any:
    found = tiny_model("qwen2_vl", tokenizer)
    set_trainable(found, train_vision=False)
    return found


def shown(kept: States, names: str) -> Shown:
    keys = tuple(("tower", name) for name in names)
    return Shown(keys, tuple(kept.get(key) for key in keys))


def parts_of(pixels: torch.Tensor, grids: torch.Tensor) -> list[torch.Tensor]:
    return list(pixels.split(grids.prod(-1).tolist()))


def test_merged_states_are_the_towers_features(model: Any, kept: States) -> None:
    pixels, grids = images([[1, 4, 6], [1, 6, 4], [1, 4, 8]])
    with torch.no_grad():
        expected = model.model.get_image_features(pixels, grids).pooler_output
        found = merged_states(model.model.visual, grids, pixels, shown(kept, "abc"))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_an_image_passes_once_and_says_the_same_bits_in_any_batch(model: Any, kept: States) -> None:
    pixels, grids = images([[1, 4, 6], [1, 6, 4], [1, 4, 8]])
    one, two, three = parts_of(pixels, grids)
    passed: list[int] = []
    model.model.visual.patch_embed.register_forward_hook(lambda _, given, out: passed.append(len(out)))
    visual = model.model.visual
    first = merged_states(visual, grids[:2], torch.cat([one, two]), shown(kept, "ab"))
    again = merged_states(visual, grids[[2, 1]], three, shown(kept, "cb"))
    assert passed == [24, 24, 32] and torch.equal(first[1], again[1])
    whole = merged_states(visual, grids, None, shown(kept, "abc"))
    assert len(passed) == 3 and torch.equal(whole[0], first[0])

    fresh = States()  # another process, another batch
    tower.STATES = fresh
    alone = merged_states(visual, grids[1:2], two, shown(fresh, "b"))
    assert torch.equal(alone[0], first[1])


def test_the_merger_learns_and_the_tower_does_not(model: Any, kept: States) -> None:
    pixels, grids = images([[1, 4, 6]])
    merged_states(model.model.visual, grids, pixels, shown(kept, "a"))
    (found,) = merged_states(model.model.visual, grids, None, shown(kept, "a"))
    found.sum().backward()
    assert all(weight.grad is not None for weight in model.model.visual.merger.parameters())
    assert all(weight.grad is None for weight in model.model.visual.blocks.parameters())


def test_hidden_states_are_those_from_pixels(model: Any, kept: States, tokenizer: Any) -> None:
    given = asked(tokenizer)
    given.pop("labels")
    with torch.no_grad():
        expected = model.forward_hidden(**given)
        first = model.forward_hidden(**given, shown=shown(kept, "abc"))
        later = model.forward_hidden(**given | {"pixel_values": None}, shown=shown(kept, "abc"))
    real = given["attention_mask"].bool()
    torch.testing.assert_close(first[real], expected[real], atol=1e-5, rtol=1e-4)
    assert torch.equal(first, later)


def test_the_oldest_make_room() -> None:
    def state(values: int) -> State:
        return State(torch.zeros(values, 1), (1, values, 1))

    states = States(limit=40)
    for name in "abc":
        states.put(("tower", name), state(3))  # 12 bytes each
    assert states.get(("tower", "a")) is not None  # used: younger than b now
    states.put(("tower", "d"), state(3))
    assert states.get(("tower", "b")) is None and states.size == 36 and len(states) == 3
    states.put(("tower", "d"), state(3))
    assert states.size == 36
    states.put(("tower", "large"), state(11))  # more than there is room for
    assert states.get(("tower", "large")) is None and (len(states), states.size) == (3, 36)


def test_another_tower_or_type_has_another_name(model: Any, tokenizer: Any) -> None:
    name = tower_digest(model, torch.float32)
    assert tower_digest(tiny_model("qwen2_vl", tokenizer), torch.float32) == name
    assert tower_digest(model, torch.bfloat16) != name
    with torch.no_grad():
        model.lm_head.weight.add_(1)
        model.model.visual.merger.ln_q.weight.add_(1)
    assert tower_digest(model, torch.float32) == name
    with torch.no_grad():
        next(model.model.visual.blocks[0].parameters()).view(-1)[0] += 1e-3
    assert tower_digest(model, torch.float32) != name


def test_states_are_kept_of_frozen_towers_alone(model: Any, tokenizer: Any) -> None:
    assert can_keep(model)
    set_trainable(model, train_vision=True)
    assert not can_keep(model)
    other = tiny_model("qwen2_5_vl", tokenizer)  # its states come in the order of its windows
    set_trainable(other, train_vision=False)
    assert not can_keep(other)
