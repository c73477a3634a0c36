"""The online teacher says what its folder's model says, and nothing of it trains."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from clinkd.data.images import decode
from clinkd.data.phantoms import PhantomSpec, draw
from clinkd.distill.online import OnlineTeacher
from clinkd.model import presets
from clinkd.model.chat import collate, encode
from clinkd.model.clinkd_qwen2vl import load_model
from clinkd.model.pixels import load_processor

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    turns = draw(PhantomSpec(1, size=56), 0)[1].turns
    size = presets.TinySize(hidden=64, layers=2, mlp=96, vision_hidden=32, vision_layers=1, image_size=56)
    texts = [text for turn in turns for text in (turn.question, turn.answer)]
    return presets.write_new_model(texts, size, tmp_path_factory.mktemp("model"), vocab_size=400, seed=0)


def asked(folder: Path) -> dict[str, torch.Tensor]:
    """Two turns about one image; of the first the answer is empty."""
    from transformers import AutoTokenizer

    tokenizer, processor = AutoTokenizer.from_pretrained(folder), load_processor(str(folder))
    image, record = draw(PhantomSpec(1, size=56), 0)
    seen = processor(images=[decode(image)], return_tensors="pt")
    tokens = int(seen["image_grid_thw"].prod()) // processor.merge_size**2
    turns = zip(record.turns[:2], ("", record.turns[1].answer), strict=True)
    rows = [encode(tokenizer, turn.question, answer, tokens) for turn, answer in turns]
    return collate(rows, tokenizer.pad_token_id) | {
        "pixel_values": seen["pixel_values"], "image_grid_thw": seen["image_grid_thw"],
        "image_index": torch.tensor([0, 0]),
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_its_states_and_head_make_the_models_logits_at_the_answer_tokens(folder, dtype) -> None:
    batch = asked(folder)
    teacher = OnlineTeacher(folder, dtype=dtype)
    model = load_model(folder, dtype=dtype).eval()
    with torch.no_grad():
        logits = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"],
            pixel_values=batch["pixel_values"].repeat(2, 1),
            image_grid_thw=batch["image_grid_thw"].repeat(2, 1),
        ).logits  # fmt: skip
    wanted = logits[:, :-1][batch["labels"][:, 1:] != -100]
    found = teacher.states(**batch) @ teacher.head.T
    assert found.dtype == dtype and len(found) == int((batch["labels"] != -100).sum())
    near = {"atol": 2e-2, "rtol": 2e-2} if dtype == torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-5}
    torch.testing.assert_close(found, wanted, **near)


def test_it_has_no_gradient_and_keeps_no_graph(folder) -> None:
    teacher = OnlineTeacher(folder)
    states = teacher.states(**asked(folder))
    assert not states.requires_grad and not teacher.head.requires_grad
    assert teacher.weights() and not any(weight.requires_grad for weight in teacher.weights().values())
    assert not isinstance(teacher, torch.nn.Module)
