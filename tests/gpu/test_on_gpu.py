"""What only a GPU can show: the same numbers as on the CPU, and a whole run in bfloat16 with NCCL.

    pytest tests/gpu          # a minute or two on one GPU; skipped where torch sees none
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_run import CONFIG, SMALL, clinkd, lines

from clinkd.distill.certificate import certify
from clinkd.model import chat, presets
from clinkd.model.clinkd_qwen2vl import new_model
from clinkd.model.generate import generate_answers
from clinkd.model.rope import RopeGuidance

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU here")
SIZE = presets.TinySize(hidden=64, layers=2, mlp=96, vision_hidden=32, vision_layers=1, image_size=48)
QUESTIONS = ["Where is the liver?", "What is at <box>(10,20),(300,400)</box> in it?", "Describe it."]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    texts = [*QUESTIONS, "The liver is at <box>(10,20),(300,400)</box>."]
    return AutoTokenizer.from_pretrained(
        presets.train_tokenizer(texts, tmp_path_factory.mktemp("tokenizer"), 400)
    )


@pytest.fixture(autouse=True)
def whole_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """cuDNN rounds a convolution's inputs to TF32 unless told otherwise."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("given", ["states", "topk"])
def test_the_loss_is_certified_on_the_gpu(divergence: str, dtype: str, given: Any) -> None:
    found = certify(divergence=divergence, dtype=dtype, given=given, chunk_size=4, device="cuda")
    assert found["ok"], found["failures"]


def _asked(tokenizer: Any, mode: str, device: str) -> tuple[Any, dict[str, Any]]:
    """A model and three questions about two images, the same on every device."""
    torch.manual_seed(3)
    guidance = RopeGuidance(1.37, 2.61, 0.33, 0.71, 0.0 if mode == "none" else 0.9, mode)
    model = new_model(presets.tiny_config(SIZE, tokenizer), guidance).eval().to(device)
    torch.manual_seed(5)
    given = {
        "pixel_values": torch.randn(48, 3 * SIZE.patch**2), "image_index": torch.tensor([0, 1, 1]),
        "image_grid_thw": torch.tensor([[1, 4, 6], [1, 6, 4]]),
        "alignment": torch.tensor([[0.1], [0.55], [0.93]]), "relevance": torch.linspace(0, 1, 18),
    }  # fmt: skip
    return model, given


@pytest.mark.parametrize("mode", ["none", "pair", "patch"])
def test_hidden_states_and_gradients_are_the_cpus(tokenizer: Any, mode: str) -> None:
    found = {}
    for device in ("cpu", "cuda"):
        model, given = _asked(tokenizer, mode, device)
        rows = [chat.encode(tokenizer, question, "The liver.", 6) for question in QUESTIONS]
        batch = chat.collate(rows, tokenizer.pad_token_id)
        given = {name: value.to(device) for name, value in given.items()}
        hidden = model.forward_hidden(
            batch["input_ids"].to(device), batch["attention_mask"].to(device), given["image_grid_thw"],
            given["pixel_values"], image_index=given["image_index"], alignment=given["alignment"],
            relevance=given["relevance"],
        )  # fmt: skip
        kept = batch["attention_mask"].bool()
        loss = model.lm_head(hidden)[kept.to(device)].logsumexp(-1).mean()
        loss.backward()
        gradients = [p.grad.cpu() for p in model.parameters() if p.grad is not None]
        found[device] = (hidden.detach().cpu()[kept], torch.cat([each.flatten() for each in gradients]))
    for cpu, cuda in zip(found["cpu"], found["cuda"], strict=True):
        assert (cpu - cuda).norm() / cpu.norm() < 1e-4


@pytest.mark.parametrize("mode", ["none", "pair", "patch"])
def test_answers_are_the_cpus(tokenizer: Any, mode: str) -> None:
    prompts = [chat.encode(tokenizer, question, "", 6)[0] for question in QUESTIONS]
    found = []
    for device in ("cpu", "cuda"):
        model, given = _asked(tokenizer, mode, device)
        found.append(generate_answers(model, tokenizer, prompts, **given, max_new_tokens=12))
    assert found[0] == found[1]


def test_sampled_answers_repeat_with_their_seed(tokenizer: Any) -> None:
    prompts = [chat.encode(tokenizer, question, "", 6)[0] for question in QUESTIONS]
    model, given = _asked(tokenizer, "patch", "cuda")
    how: dict[str, Any] = {"max_new_tokens": 8, "do_sample": True, "num_return_sequences": 3}
    first = generate_answers(model, tokenizer, prompts, **given, **how, seed=7)
    assert first == generate_answers(model, tokenizer, prompts, **given, **how, seed=7)
    assert first != generate_answers(model, tokenizer, prompts, **given, **how, seed=8)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [("compute.zero_stage=2",), ("compute.zero_stage=3", "model.lora.rank=4"), ("distill.teacher=online",)],
    ids=["zero2", "lora-zero3", "online"],
)
def test_a_whole_run_in_bfloat16(tmp_path: Path, options: tuple[str, ...]) -> None:
    gpu = ["compute.workers=1", "compute.gpus_per_worker=1", "compute.precision=bf16"]
    run = ["run", str(CONFIG), *SMALL, *gpu]
    done = clinkd(tmp_path, *run, "compute.max_failures=0", *options)
    assert done.returncode == 0, done.stderr[-4000:]
    folder = tmp_path / "runs" / "tiny"
    assert (folder / "report.html").is_file()
    steps = [row for row in lines(folder / "metrics.jsonl") if "loss" in row]
    assert steps and all(row["loss"] == row["loss"] for row in steps)
    again = clinkd(tmp_path, *run, *options)
    assert again.returncode == 0 and "started" not in again.stderr
