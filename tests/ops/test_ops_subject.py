"""Models without weights: their parameters are the real ones, and so is what a layer keeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from clinkd.config import ConfigError, LoraSection, RunConfig, load_config, with_values
from clinkd.model.published import published_name
from clinkd.ops import subject
from clinkd.ops.subject import Subject, saved_bytes, source_of

TINY = load_config(Path(__file__).parents[2] / "configs" / "tiny.yaml")


def released(name: str) -> RunConfig:
    return with_values(RunConfig(), {"model.path": name, "teacher.path": name})


# Sums of the tensors in the released checkpoints' model.safetensors.index.json.
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("Qwen2-VL-2B-Instruct", 2_208_985_600),
        ("Qwen2-VL-7B-Instruct", 8_291_375_616),
        ("Qwen2.5-VL-3B-Instruct", 3_754_622_976),
        ("Qwen2.5-VL-7B-Instruct", 8_292_166_656),
    ],
)
def test_released_checkpoints_have_their_published_sizes(name: str, parameters: int) -> None:
    made = Subject(source_of(released(f"checkpoints/{name}"), "student"), train_vision=True)
    assert made.parameters == made.trained == parameters
    assert next(made.model.parameters()).device.type == "meta"


def test_a_frozen_tower_and_adapters_leave_little_to_train() -> None:
    source = source_of(released("Qwen2-VL-2B-Instruct"), "student")
    frozen = Subject(source, train_vision=False)
    assert frozen.trained < frozen.parameters and not frozen.tower_trains and frozen.head_trains
    adapted = Subject(source, train_vision=False, lora=LoraSection(rank=8))
    assert adapted.trained < 0.05 * adapted.parameters and not adapted.head_trains
    assert adapted.parameters > frozen.parameters


def test_the_student_is_cut_out_of_its_teacher() -> None:
    teacher, student = (Subject(source_of(TINY, role), train_vision=True) for role in ("teacher", "student"))
    assert student.parameters < teacher.parameters
    assert "cut out" in student.source.where and student.head == teacher.head
    with pytest.raises(ConfigError, match=r"model\.tiny"):
        source_of(with_values(TINY, {"model.tiny.layers": 9}), "student")


def test_a_folders_own_config_is_taken(tmp_path: Path) -> None:
    made = source_of(TINY, "teacher")
    made.config.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"min_pixels": 784, "max_pixels": 7840}))
    found = source_of(with_values(TINY, {"teacher.path": str(tmp_path)}), "teacher")
    assert Subject(found, train_vision=True).parameters == Subject(made, train_vision=True).parameters
    assert found.pixels == (784, 7840)


def test_a_path_that_says_nothing_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.path: .* holds no config\.json"):
        source_of(released(str(tmp_path / "mine")), "student")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        source_of(released(str(tmp_path)), "student")


@pytest.mark.parametrize(
    ("path", "name"),
    [("a/Qwen2-VL-7B-Instruct/", "qwen2-vl-7b"), ("qwen2-vl-2b", "qwen2-vl-2b"), ("Qwen2-VL-72B", None),
     ("my-Qwen2-VL-7B", None), ("Qwen2.5_VL-3B", "qwen2.5-vl-3b"), ("", None)],
)  # fmt: skip
def test_released_checkpoints_are_known_by_the_folders_name(path: str, name: str | None) -> None:
    assert published_name(path) == name


@pytest.mark.parametrize("masked", [False, True])
def test_what_a_text_layer_keeps_is_what_it_keeps_on_a_cpu(masked: bool) -> None:
    """The real layer with torch's fused kernel, which the meta device does not have."""
    made = Subject(source_of(TINY, "student"), train_vision=False)
    rows, length = (3, 40) if masked else (1, 40)
    text = made.model.model.language_model
    layer = type(text.layers[0])(text.config, 0).train()
    layer.self_attn.config._attn_implementation = "sdpa"
    try:
        states = torch.randn(rows, length, made.head[1], requires_grad=True)
        rotary = type(text.rotary_emb)(text.config)
        turned = rotary(states, torch.arange(length).expand(3, rows, length).float())
        mask = torch.ones(rows, 1, length, length, dtype=torch.bool) if masked else None
        real = saved_bytes(lambda: layer(states, attention_mask=mask, position_embeddings=turned), layer)
    finally:
        layer.self_attn.config._attn_implementation = subject.COUNTED
    assert made.layer_bytes(rows, length, torch.float32) == pytest.approx(real, rel=0.03)


def test_bfloat16_keeps_about_half_and_eager_attention_its_scores() -> None:
    source = source_of(TINY, "student")
    fused, eager = Subject(source, train_vision=False), Subject(source, train_vision=False, attention="eager")
    assert 0.5 < fused.layer_bytes(2, 60, torch.bfloat16) / fused.layer_bytes(2, 60, torch.float32) < 0.65
    extra = [
        eager.layer_bytes(2, n, torch.float32) - fused.layer_bytes(2, n, torch.float32) for n in (100, 200)
    ]
    assert 3.5 < extra[1] / extra[0] < 4.5  # grows with the square


def test_what_a_block_of_the_tower_keeps_is_what_it_keeps_on_a_cpu() -> None:
    made, patches = Subject(source_of(TINY, "teacher"), train_vision=True), 64
    config = made.config.vision_config
    kind = type(made.model.model.visual.blocks[0])
    config._attn_implementation = "sdpa"
    try:
        block = kind(config).train()
        states = torch.randn(2 * patches, config.embed_dim, requires_grad=True)
        angle = torch.randn(2 * patches, config.embed_dim // config.num_heads)
        ends = torch.tensor([0, patches, 2 * patches], dtype=torch.int32)
        real = saved_bytes(lambda: block(states, cu_seqlens=ends, position_embeddings=(angle, angle)), block)
    finally:
        config._attn_implementation = subject.COUNTED
    assert made.block_bytes(2, (1, 8, 8), torch.float32) == pytest.approx(real, rel=0.05)


def test_a_frozen_tower_keeps_nothing() -> None:
    source, grid = source_of(TINY, "student"), (1, 8, 8)
    assert Subject(source, train_vision=False).block_bytes(2, grid, torch.float32) == 0
    one, two = (Subject(source, train_vision=True).block_bytes(n, grid, torch.float32) for n in (1, 2))
    assert two == pytest.approx(2 * one, rel=0.01)
