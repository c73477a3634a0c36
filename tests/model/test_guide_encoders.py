"""Encoders by path: transformers' CLIP, SigLIP and SigLIP 2 (open_clip's: test_open_clip_guide.py)."""

from __future__ import annotations

import json
import pickle
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from encoder_folders import changed, noise, save_clip, save_siglip, save_siglip2, tiny_clip
from PIL import Image

from clinkd.model.contrastive import watched
from clinkd.model.encoder_folder import open_encoder

TEXTS = ["the left kidney", "a scan of the liver", "lung", "the spleen on the right"]
LONG = "the left kidney of the liver " + "spleen " * 40


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("clip"), tiny_clip())


@pytest.fixture(scope="module")
def siglip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_siglip(tmp_path_factory.mktemp("siglip"))[0]


@pytest.fixture(scope="module")
def siglip2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_siglip2(tmp_path_factory.mktemp("siglip2"))[0]


@pytest.fixture(scope="module", params=["clip", "siglip", "siglip2"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"{request.param}_folder")


def own_logits(folder: Path, images: list[Image.Image], **padding: Any) -> torch.Tensor:
    """logits_per_image as a user of transformers would compute them."""
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    inputs = AutoTokenizer.from_pretrained(folder)(TEXTS, return_tensors="pt", **padding)
    seen = AutoImageProcessor.from_pretrained(folder, backend="pil")(images=images, return_tensors="pt")
    keys = ("input_ids",) if padding.get("max_length") else ("input_ids", "attention_mask")
    model = AutoModel.from_pretrained(folder)
    with torch.no_grad():
        return model(**seen, **{key: inputs[key] for key in keys}).logits_per_image


@pytest.mark.parametrize(
    ("kind", "padding"),
    [
        ("clip", {"padding": True}),
        ("siglip", {"padding": "max_length", "max_length": 8}),
        ("siglip2", {"padding": "max_length", "max_length": 8}),
    ],
)
def test_pair_logits_are_the_models_own_on_square_images(
    kind: str, padding: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(f"{kind}_folder")
    images = [noise(seed=1), noise(48, 48, seed=2)]
    encoder = open_encoder(folder)
    texts = encoder.texts(TEXTS)
    ours = torch.stack([encoder.pair_logits(seen, texts) for seen in encoder.images(images)])
    torch.testing.assert_close(ours, own_logits(folder, images, **padding), atol=1e-5, rtol=1e-5)
    assert ours.std() > 1e-3  # else the comparison would say nothing


def test_shapes(folder: Path) -> None:
    encoder = open_encoder(str(folder))
    texts = encoder.texts(TEXTS)
    (seen,) = encoder.images([noise()])
    assert seen.grid == (4, 4)
    assert seen.patches.shape == (16, texts.shape[1]) and seen.whole.shape == texts.shape[1:]
    assert encoder.pair_logits(seen, texts).shape == (4,)
    assert encoder.patch_logits(seen, texts).shape == (16, 4)


def test_clips_patches_come_of_a_last_layer_that_sees_only_itself(clip_folder: Path) -> None:
    """Against the definition: the whole last layer, its attention masked to the diagonal."""
    encoder: Any = open_encoder(clip_folder)
    tower, pixels = encoder.model.vision_model, encoder._pixels([noise()])
    last = tower.encoder.layers[-1]
    with torch.no_grad(), watched(last) as passage:
        tower(pixel_values=pixels)
    diagonal = torch.full((17, 17), float("-inf")).fill_diagonal_(0.0)
    with torch.no_grad():
        tokens = last(passage.into, diagonal[None, None])
        dense = encoder.model.visual_projection(tower.post_layernorm(tokens[0, 1:]))
    (seen,) = encoder.images([noise()])
    expected = torch.nn.functional.normalize(dense, dim=-1)
    torch.testing.assert_close(seen.patches, expected, atol=1e-5, rtol=1e-5)


def test_where_a_siglip_has_one_patch_it_is_the_whole(tmp_path: Path) -> None:
    encoder = open_encoder(save_siglip(tmp_path, side=16, patch=16)[0])
    (seen,) = encoder.images([noise()])
    assert seen.grid == (1, 1)
    torch.testing.assert_close(seen.patches[0], seen.whole)
    texts = encoder.texts(TEXTS)
    torch.testing.assert_close(encoder.patch_logits(seen, texts)[0], encoder.pair_logits(seen, texts))


@pytest.mark.parametrize("size", [(32, 32), (128, 64), (32, 96)])
@pytest.mark.parametrize("cell", [(0, 0), (0, 3), (2, 1), (3, 3)])
def test_a_cell_lies_over_its_part_of_an_image_of_any_shape(
    size: tuple[int, int], cell: tuple[int, int], one_layer: Path
) -> None:
    """With one layer a patch's feature is of its pixels alone: exactly that one has to change."""
    image = noise(*size) if size == (32, 32) else flat_cells(*size)
    encoder = open_encoder(one_layer)
    before, after = encoder.images([image, changed(image, *cell)])
    moved = (before.patches - after.patches).norm(dim=-1).reshape(before.grid)
    assert before.grid == (4, 4)
    assert moved.argmax() == cell[0] * 4 + cell[1]
    elsewhere = moved.clone()
    elsewhere[cell] = 0
    # A stretched image bleeds a little across the borders of a cell, into its neighbours and no further.
    elsewhere[max(0, cell[0] - 1) : cell[0] + 2, max(0, cell[1] - 1) : cell[1] + 2] = 0
    assert elsewhere.max() < 1e-6


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip(tmp_path_factory.mktemp("one"), tiny_clip(layers=1))


def flat_cells(width: int, height: int) -> Image.Image:
    return noise(4, 4).resize((width, height), Image.Resampling.NEAREST)


@pytest.mark.parametrize("cell", [(0, 3), (2, 1)])
def test_siglips_grid_is_turned_the_same_way(siglip_folder: Path, cell: tuple[int, int]) -> None:
    encoder = open_encoder(siglip_folder)
    before, after = encoder.images([noise(), changed(noise(), *cell)])
    assert (before.patches - after.patches).norm(dim=-1).argmax() == cell[0] * 4 + cell[1]


def test_siglip2_keeps_the_shape_of_an_image(siglip2_folder: Path) -> None:
    encoder = open_encoder(siglip2_folder)
    wide, high, square = encoder.images([noise(64, 16), noise(16, 64), noise(32, 32)])
    assert wide.grid == (2, 8) and high.grid == (8, 2) and square.grid == (4, 4)
    assert wide.patches.shape[0] == 16


def test_an_image_is_seen_the_same_in_any_batch(folder: Path) -> None:
    images = [noise(32 + 8 * i, 40, seed=i) for i in range(5)]
    encoder = open_encoder(folder)
    ones = [encoder.images([image])[0] for image in images]
    for alone, together in zip(ones, encoder.images(images), strict=True):
        torch.testing.assert_close(alone.whole, together.whole, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(alone.patches, together.patches, atol=1e-5, rtol=1e-5)


def test_a_text_is_read_the_same_in_any_batch(folder: Path) -> None:
    encoder = open_encoder(folder)
    alone = torch.cat([encoder.texts([text]) for text in (*TEXTS, LONG)])
    torch.testing.assert_close(encoder.texts([*TEXTS, LONG]), alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_a_long_text_loses_its_end(kind: str, request: pytest.FixtureRequest) -> None:
    """Eight positions, two of them the tokenizer's own: six words count."""
    encoder = open_encoder(request.getfixturevalue(f"{kind}_folder"))
    long, six, five = encoder.texts([LONG, *(" ".join(LONG.split()[:count]) for count in (6, 5))])
    torch.testing.assert_close(long, six, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(long, five, atol=1e-4)


def test_nothing_gives_nothing(folder: Path) -> None:
    encoder = open_encoder(folder)
    assert encoder.images([]) == []
    (seen,) = encoder.images([noise()])
    texts = encoder.texts([])
    assert texts.shape == (0, seen.whole.shape[0])
    assert encoder.pair_logits(seen, texts).shape == (0,)
    assert encoder.patch_logits(seen, texts).shape == (16, 0)


def test_what_it_returns_can_be_fitted_on(clip_folder: Path) -> None:
    encoder = open_encoder(clip_folder)
    slope = torch.tensor(1.0, requires_grad=True)
    (encoder.pair_logits(encoder.images([noise()])[0], encoder.texts(TEXTS)) * slope).sum().backward()
    assert slope.grad is not None


@pytest.mark.parametrize("mode", ["L", "RGBA", "I;16"])
def test_an_image_that_is_not_rgb_is_refused(clip_folder: Path, mode: str) -> None:
    with pytest.raises(ValueError, match=f"image 1 is of mode {mode}"):
        open_encoder(clip_folder).images([noise(), Image.new(mode, (32, 32))])


def test_nothing_is_fetched(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert len(open_encoder(folder).images([noise()])) == 1


# What is wrong with a folder, and the one line that says so.
def _without(*names: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return damage


def _kind(kind: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"model_type": kind}))

    return damage


def _half(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    kept = {key: value for key, value in state.items() if not key.startswith("text_model")}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


def _pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"text_projection.weight": Path("anything but a tensor")}, folder / "pytorch_model.bin")


def _broken(folder: Path) -> None:
    (folder / "config.json").write_text("{")


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (_without("config.json"), "neither config.json with a model_type nor open_clip_config.json"),
        (_kind("bert"), "model_type 'bert'; accepted are"),
        (_without("model.safetensors"), "no weights; one of model.safetensors"),
        (_without("tokenizer.json"), "no tokenizer; one of tokenizer.json"),
        (_without("preprocessor_config.json"), "no preprocessor; one of preprocessor_config.json"),
        (_half, "weights are missing, first text_model"),
        (_pickle, "does not load as clip"),
        (_broken, "no JSON can be read"),
    ],
)  # fmt: skip
def test_a_folder_that_is_none(tmp_path: Path, damage: Callable[[Path], None], says: str) -> None:
    damage(save_clip(tmp_path, tiny_clip()))
    with pytest.raises(ValueError, match=says) as caught:
        open_encoder(tmp_path)
    assert "\n" not in str(caught.value)


def test_no_folder_at_all(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        open_encoder(tmp_path / "nowhere")


class _Shout:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("ran"),))


def test_a_pickles_code_does_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = save_clip(tmp_path / "clip", tiny_clip())
    (folder / "model.safetensors").unlink()
    torch.save({"text_projection.weight": _Shout()}, folder / "pytorch_model.bin", pickle_module=pickle)
    with pytest.raises(ValueError, match="does not load as clip"):
        open_encoder(folder)
    assert not (tmp_path / "ran").exists()
