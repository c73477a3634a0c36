"""Adapters in the real loop: every ZeRO stage, a resume, and what is saved."""

from __future__ import annotations

from pathlib import Path

import pytest

from clinkd.data.phantoms import PhantomSpec

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def prepared(ray_session, tmp_path_factory) -> Path:
    from clinkd.data.prepare import prepare

    out = tmp_path_factory.mktemp("prepared")
    prepare(PhantomSpec(images=24), out, test_fraction=0.3, images_per_shard=12)
    return out


def spec_of(start: Path, **more):
    from clinkd.model.lora import LoraOptions
    from clinkd.model.rope import RopeGuidance
    from clinkd.train.tasks import VqaSpec

    guidance = RopeGuidance(1.5, 2.0, 0.5, 0.75)
    return VqaSpec(str(start), guidance, train_vision=False, lora=LoraOptions(rank=4, alpha=8.0), **more)


@pytest.mark.parametrize("stages", [(0, 3), pytest.param((0, 1, 2, 3), marks=pytest.mark.full)])
def test_zero_stages_train_one_curve_of_adapters(prepared, start, tmp_path, stages) -> None:
    import torch
    from tiny_training import train_each

    from clinkd.model.clinkd_qwen2vl import load_model

    ways = {
        zero: (
            tmp_path / str(zero),
            spec_of(start, gradient_checkpointing=zero % 2 == 1),
            {"zero": zero, "steps": 6},
        )
        for zero in stages
    }
    curves, models = {}, {}
    for zero, lines in train_each(prepared, ways).items():
        curves[zero] = [line["ce"] for line in lines]
        models[zero] = load_model(tmp_path / str(zero) / "model").state_dict()
    before = load_model(start).state_dict()
    for zero in stages:
        assert curves[zero] == pytest.approx(curves[0], rel=2e-3)
        assert curves[zero][-1] < 0.95 * curves[zero][0]
        assert models[zero].keys() == before.keys()
        for name, value in models[zero].items():
            assert torch.allclose(value, models[0][name], atol=5e-3), name
            adapted = "language_model.layers" in name and "_proj.weight" in name
            if adapted or "merger.mlp" in name:
                assert not torch.equal(value, before[name]), f"{name} was not trained"
            elif "merger" not in name:
                assert torch.equal(value, before[name]), f"{name} was frozen"


def test_the_adapter_beside_the_model_is_the_model(prepared, start, tmp_path) -> None:
    """In the engine's bfloat16 too: what was frozen is the start's own, to the last bit."""
    import torch
    from peft import PeftModel
    from tiny_training import train

    from clinkd.model.clinkd_qwen2vl import load_model

    train(prepared, tmp_path / "out", spec_of(start, bf16=True), zero=1, steps=4, precision="bf16")
    folder = tmp_path / "out"
    names = {path.name for path in (folder / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names
    merged, before = load_model(folder / "model").eval(), load_model(start)
    assert torch.equal(merged.lm_head.weight, before.lm_head.weight)
    opened = PeftModel.from_pretrained(load_model(start, merged_guidance(merged)), folder / "adapter").eval()
    image = torch.randn(64, 3 * 14 * 14 * merged.config.vision_config.temporal_patch_size)
    ids = torch.tensor([[30, *[merged.config.image_token_id] * 16, 31, 32, 33]])
    shown = {"pixel_values": image, "image_grid_thw": torch.tensor([[1, 8, 8]])}
    with torch.no_grad():
        found, wanted = (model(input_ids=ids, **shown).logits for model in (opened, merged))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def merged_guidance(model):
    from clinkd.model.clinkd_qwen2vl import guidance_of

    return guidance_of(model.config)


def test_a_resume_changes_no_adapter(prepared, start, tmp_path) -> None:
    from tiny_training import train

    how = {"zero": 2, "steps": 8}
    calm = train(prepared, tmp_path / "calm", spec_of(start), **how)
    train(prepared, tmp_path / "torn", spec_of(start), **how, until=3)
    torn = train(prepared, tmp_path / "torn", spec_of(start), **how)
    assert [line["loss"] for line in torn] == [line["loss"] for line in calm]
    same = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("calm", "torn")]
    assert same[0] == same[1]
