"""open_clip's checkpoints as encoders, in the layouts they are published in.

Needs the extra ``open_clip``. Its torchvision changes transformers for the whole process, so that these tests
can also be run apart, with a folder of open_clip, timm and torchvision on PYTHONPATH.
"""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_folders import changed, noise, save_tokenizer
from PIL import Image

from clinkd.model.contrastive import watched
from clinkd.model.encoder_folder import open_encoder

open_clip: Any = pytest.importorskip("open_clip", reason="the extra 'open_clip' is not installed")

TEXTS = ["the left kidney", "a scan of the liver", "lung", "the spleen on the right"]
VIT = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
NATIVE_TEXT = {"context_length": 16, "width": 32, "heads": 2, "layers": 2}
MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]


def save_folder(out: Path, settings: dict[str, Any], built: dict[str, Any] | None = None, **more: Any) -> Any:
    """A folder as ``push_to_hf_hub`` leaves it; ``built`` are the settings to build by, where they differ."""
    torch.manual_seed(0)
    out.mkdir(exist_ok=True)
    model = (open_clip.CustomTextCLIP if built else open_clip.CLIP)(**(built or settings)).eval()
    for weight in model.parameters():
        weight.data += 0.05 * torch.randn_like(weight)
    torch.save(model.state_dict(), out / "open_clip_pytorch_model.bin")
    config = {"model_cfg": settings, "preprocess_cfg": {"mean": MEAN, "std": STD} | more}
    (out / "open_clip_config.json").write_text(json.dumps(config))
    return model


def native(out: Path, **vision: Any) -> Any:
    settings = {"embed_dim": 16, "vision_cfg": VIT | vision, "text_cfg": NATIVE_TEXT}
    return save_folder(out, settings)


def bert_sizes(**more: Any) -> dict[str, Any]:
    return {
        "model_type": "bert", "vocab_size": 30, "hidden_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 16,
    } | more  # fmt: skip


def biomed(out: Path, **more: Any) -> Any:
    """As BiomedCLIP's repository is: a timm ViT with a class token, a BERT that only the hub knows."""
    out.mkdir(exist_ok=True)
    vision = {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160} | more
    text = {
        "hf_model_name": "somewhere/BiomedBERT", "hf_tokenizer_name": "somewhere/BiomedBERT",
        "hf_proj_type": "mlp", "hf_pooler_type": "cls_last_hidden_state_pooler", "context_length": 8,
    }  # fmt: skip
    local = out.parent / f"{out.name}-bert"
    local.mkdir()
    (local / "config.json").write_text(json.dumps(bert_sizes()))
    settings = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    built = settings | {"text_cfg": text | {"hf_model_name": str(local), "hf_model_pretrained": False}}
    model = save_folder(out, settings, built)
    save_tokenizer(out)
    return model


@pytest.fixture(scope="module")
def native_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("native")
    return folder, native(folder)


@pytest.fixture(scope="module")
def biomed_folder(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    folder = tmp_path_factory.mktemp("biomed") / "clip"
    return folder, biomed(folder)


@pytest.fixture(scope="module", params=["native", "biomed"])
def made(request: pytest.FixtureRequest) -> tuple[Path, Any]:
    return request.getfixturevalue(f"{request.param}_folder")


def test_pair_logits_are_the_models_own_on_square_images(made: tuple[Path, Any]) -> None:
    folder, model = made
    images = [noise(seed=1), noise(48, 48, seed=2)]
    side = model.visual.image_size[0]
    transform = open_clip.image_transform(side, is_train=False, mean=MEAN, std=STD)
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
    with torch.no_grad():
        seen = model.encode_image(torch.stack([transform(image) for image in images]), normalize=True)
        own = seen @ model.encode_text(tokens, normalize=True).T * model.logit_scale.exp()
    encoder = open_encoder(folder)
    texts = encoder.texts(TEXTS)
    ours = torch.stack([encoder.pair_logits(one, texts) for one in encoder.images(images)])
    torch.testing.assert_close(ours, own, atol=1e-5, rtol=1e-5)
    assert ours.std() > 1e-3


def test_patches_come_of_a_last_layer_that_sees_only_itself(made: tuple[Path, Any]) -> None:
    """Against the definition: the whole last layer, its attention masked to the diagonal."""
    folder, model = made
    encoder: Any = open_encoder(folder)
    visual, image = model.visual, noise()
    trunk = getattr(visual, "trunk", None)
    last = visual.transformer.resblocks[-1] if trunk is None else trunk.blocks[-1]
    with torch.no_grad(), watched(last) as passage:
        visual(encoder._pixels([image]))
    count = passage.into.shape[1]
    diagonal = torch.full((count, count), float("-inf")).fill_diagonal_(0.0)
    with torch.no_grad():
        tokens = last(passage.into, attn_mask=diagonal)[0, 1:]
        dense = visual.ln_post(tokens) @ visual.proj if trunk is None else visual.head(trunk.norm(tokens))
    (seen,) = encoder.images([image])
    expected = torch.nn.functional.normalize(dense, dim=-1)
    torch.testing.assert_close(seen.patches, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("pool", ["avg", "map"])
def test_pooled_tokens_are_taken_as_they_are(tmp_path: Path, pool: str) -> None:
    """Each patch, as the pooling of an image that were this token alone."""
    folder = tmp_path / "clip"
    biomed(folder, timm_model_name={"avg": "test_vit", "map": "test_vit3"}[pool], timm_pool=pool)
    encoder: Any = open_encoder(folder)
    (seen,) = encoder.images([noise()])
    assert seen.grid == (10, 10) and seen.patches.shape == (100, 16)
    visual = encoder.model.visual
    with torch.no_grad():
        tokens = visual.trunk.forward_features(encoder._pixels([noise()]))
        one = tokens[:, visual.trunk.num_prefix_tokens + 7].unsqueeze(1)
        pooled = visual.trunk.attn_pool(one) if pool == "map" else one.mean(1)
        own = visual.head(visual.trunk.fc_norm(pooled))[0]
    expected = torch.nn.functional.normalize(own, dim=-1)
    torch.testing.assert_close(seen.patches[7], expected, atol=1e-5, rtol=1e-5)


def test_a_native_vit_that_pools_a_mean(tmp_path: Path) -> None:
    native(tmp_path, pool_type="avg", image_size=8)
    (seen,) = open_encoder(tmp_path).images([noise()])
    assert seen.grid == (1, 1)
    torch.testing.assert_close(seen.patches[0], seen.whole)


@pytest.mark.parametrize("size", [(32, 32), (128, 64)])
@pytest.mark.parametrize("cell", [(0, 3), (2, 1)])
def test_a_cell_lies_over_its_part_of_an_image_of_any_shape(
    tmp_path: Path, size: tuple[int, int], cell: tuple[int, int]
) -> None:
    native(tmp_path, layers=1)
    image = noise(4, 4).resize(size, Image.Resampling.NEAREST)
    before, after = open_encoder(tmp_path).images([image, changed(image, *cell)])
    moved = (before.patches - after.patches).norm(dim=-1)
    assert before.grid == (4, 4) and moved.argmax() == cell[0] * 4 + cell[1]


def test_results_do_not_depend_on_the_batch(made: tuple[Path, Any]) -> None:
    encoder = open_encoder(made[0])
    images = [noise(32 + 8 * i, 40, seed=i) for i in range(3)]
    ones = [encoder.images([image])[0] for image in images]
    for alone, together in zip(ones, encoder.images(images), strict=True):
        torch.testing.assert_close(alone.whole, together.whole, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(alone.patches, together.patches, atol=1e-5, rtol=1e-5)
    alone_texts = torch.cat([encoder.texts([text]) for text in TEXTS])
    torch.testing.assert_close(encoder.texts(TEXTS), alone_texts, atol=1e-5, rtol=1e-5)


def test_a_long_text_loses_its_end(biomed_folder: tuple[Path, Any]) -> None:
    encoder = open_encoder(biomed_folder[0])
    long = "the left kidney of the liver " + "spleen " * 40
    whole, six, five = encoder.texts([long, *(" ".join(long.split()[:count]) for count in (6, 5))])
    torch.testing.assert_close(whole, six, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(whole, five, atol=1e-4)


def test_nothing_gives_nothing(made: tuple[Path, Any]) -> None:
    encoder = open_encoder(made[0])
    assert encoder.images([]) == [] and encoder.texts([]).shape == (0, 16)


def test_a_resnet_compares_whole_images_only(tmp_path: Path) -> None:
    native(tmp_path, layers=[1, 1, 1, 1], width=8, image_size=64)
    encoder = open_encoder(tmp_path)
    (seen,) = encoder.images([noise()])
    texts = encoder.texts(TEXTS)
    assert encoder.pair_logits(seen, texts).shape == (4,)
    assert seen.grid == (0, 0)
    with pytest.raises(ValueError, match="no patch features: its image tower is a ModifiedResNet"):
        encoder.patch_logits(seen, texts)


def test_the_bias_of_a_siglip_is_applied(tmp_path: Path) -> None:
    settings = {"embed_dim": 16, "vision_cfg": VIT, "text_cfg": NATIVE_TEXT, "init_logit_bias": -10}
    save_folder(tmp_path, settings)
    encoder = open_encoder(tmp_path)
    (seen,) = encoder.images([noise()])
    texts = encoder.texts(TEXTS)
    bias = encoder.pair_logits(seen, torch.zeros_like(texts))
    assert bias[0] == pytest.approx(-10, abs=1)


def test_nothing_is_fetched(biomed_folder: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Though the config names a hub model for its text tower."""

    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert open_encoder(biomed_folder[0]).texts(TEXTS).shape == (4, 16)


def test_safetensors_are_read_as_well(biomed_folder: tuple[Path, Any], tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = shutil.copytree(biomed_folder[0], tmp_path / "clip")
    state = torch.load(folder / "open_clip_pytorch_model.bin", weights_only=True)
    save_file({key: value.clone() for key, value in state.items()}, folder / "open_clip_model.safetensors")
    (folder / "open_clip_pytorch_model.bin").unlink()
    torch.testing.assert_close(open_encoder(folder).texts(TEXTS), open_encoder(biomed_folder[0]).texts(TEXTS))


def test_the_text_towers_config_may_lie_in_the_folder(
    biomed_folder: tuple[Path, Any], tmp_path: Path
) -> None:
    folder = shutil.copytree(biomed_folder[0], tmp_path / "clip")
    (folder / "config.json").write_text(json.dumps(bert_sizes(num_attention_heads=4)))
    other = open_encoder(folder).texts(TEXTS)  # the same weights in other heads say something else
    assert not torch.allclose(other, open_encoder(biomed_folder[0]).texts(TEXTS), atol=1e-4)


def edited(folder: Path, out: Path, part: str, **changes: Any) -> Path:
    """A copy of a folder with its config's part changed."""
    shutil.copytree(folder, out)
    config = json.loads((out / "open_clip_config.json").read_text())
    config["model_cfg"][part] = config["model_cfg"][part] | changes
    (out / "open_clip_config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize(
    ("part", "changes", "says"),
    [
        ("vision_cfg", {"timm_model_name": "hf-hub:somewhere/vit"}, "no name of an architecture"),
        ("text_cfg", {"tokenizer_kwargs": {"trust_remote_code": True}}, "no code is run"),
        ("text_cfg", {"hf_tokenizer_name": ""}, "without hf_tokenizer_name"),
        ("text_cfg", {"hf_proj_type": "linear"}, "does not load with open_clip"),
    ],
)  # fmt: skip
def test_a_config_that_is_refused(
    biomed_folder: tuple[Path, Any], tmp_path: Path, part: str, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        open_encoder(edited(biomed_folder[0], tmp_path / "clip", part, **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("open_clip_pytorch_model.bin", "no weights; one of open_clip_model.safetensors"),
        ("tokenizer.json", "no tokenizer; one of tokenizer.json"),
    ],
)
def test_a_file_that_is_missing(
    biomed_folder: tuple[Path, Any], tmp_path: Path, name: str, says: str
) -> None:
    folder = shutil.copytree(biomed_folder[0], tmp_path / "clip")
    (folder / name).unlink()
    with pytest.raises(ValueError, match=says):
        open_encoder(folder)


def test_a_text_tower_that_is_no_plain_bert_needs_its_config(
    biomed_folder: tuple[Path, Any], tmp_path: Path
) -> None:
    folder = shutil.copytree(biomed_folder[0], tmp_path / "clip")
    state = torch.load(folder / "open_clip_pytorch_model.bin", weights_only=True)
    types = "text.transformer.embeddings.token_type_embeddings.weight"  # a RoBERTa's one
    torch.save(state | {types: state[types][:1]}, folder / "open_clip_pytorch_model.bin")
    with pytest.raises(ValueError, match="no plain BERT with heads of 64; put its"):
        open_encoder(folder)


class _Shout:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("ran"),))


@pytest.mark.parametrize("kind", ["native", "biomed"])
def test_a_pickles_code_does_not_run(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(request.getfixturevalue(f"{kind}_folder")[0], tmp_path / "clip")
    torch.save({"logit_scale": _Shout()}, folder / "open_clip_pytorch_model.bin")
    with pytest.raises(ValueError, match="does not load with open_clip"):
        open_encoder(folder)
    assert not (tmp_path / "ran").exists()
