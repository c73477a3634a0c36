"""open_clip checkpoints as encoders, BiomedCLIP's (Zhang et al., 2023) among them.

What a folder has to hold:
- ``open_clip_config.json`` and the weights, ``open_clip_model.safetensors`` or
  ``open_clip_pytorch_model.bin``.
- Where the text tower is a Hugging Face model (``hf_model_name`` in the config): its tokenizer's files
  (``tokenizer.json`` or ``vocab.txt``, with ``tokenizer_config.json``), and its own ``config.json``. The
  latter may be left out of a BERT with heads of 64, such as BiomedCLIP's, whose repository does not ship it:
  its sizes are read off the weights. Names of hub models in the config are never looked up.

Decisions:
- open_clip builds the model, reads the weights and tokenizes; the pixels are ours, stretched instead of
  cropped (see contrastive.py), with the config's mean and deviation. On square images they are open_clip's.
- A config cannot reach beyond its folder: no hub names for the image tower, no ``trust_remote_code`` for the
  tokenizer, weights only of a pickle.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL.Image import Image, Resampling
from torch import Tensor

from clinkd.model.contrastive import Contrastive, Views, one_by_one, watched
from clinkd.model.encoders import CONFIG, OPEN_CLIP_CONFIG, one_line, read_json

# In the order in which open_clip itself prefers them.
WEIGHTS = (
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin",
)  # fmt: skip
TOKENIZERS = ("tokenizer.json", "vocab.txt")
_BERT = "text.transformer."
_HEAD = 64  # width of a BERT's attention head, in all of the published sizes


class OpenClip(Contrastive):
    """A model of open_clip's.

    Dense features come of ViTs, open_clip's own and timm's, that pool a class token, a mean or (timm) an
    attention pooling over patches; other image towers compare whole images only.
    """

    model: Any

    def __init__(self, model: Any, tokenizer: Any, width: int, device: str | torch.device) -> None:
        super().__init__(
            model, device, width=width, scale=model.logit_scale, bias=model.logit_bias,
            no_dense=_no_dense(model.visual),
        )  # fmt: skip
        self.tokenizer = tokenizer
        side, settings = model.visual.image_size, model.visual.preprocess_cfg
        self.size = (side, side) if isinstance(side, int) else tuple(side)
        self.mean, self.std = (
            torch.tensor(settings[key], dtype=torch.float32)[:, None, None] for key in ("mean", "std")
        )
        linear = settings["interpolation"] == "bilinear"
        self.resampling = Resampling.BILINEAR if linear else Resampling.BICUBIC

    def _pixels(self, images: list[Image]) -> Tensor:
        """[B, 3, H, W], the whole of each image."""
        height, width = self.size
        arrays = [np.array(image.resize((width, height), self.resampling)) for image in images]
        values = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255
        return ((values - self.mean) / self.std).to(self.device)

    def _see(self, images: list[Image]) -> Views:
        pixels, visual = self._pixels(images), self.model.visual
        if self.no_dense:
            whole = _first(self.model.encode_image(pixels))
            empty = [torch.empty(0, self.width, device=self.device)] * len(images)
            return Views(whole, empty, [(0, 0)] * len(images))
        trunk = getattr(visual, "trunk", None)
        last = visual.transformer.resblocks[-1] if trunk is None else trunk.blocks[-1]
        with watched(last) as passage:
            whole = _first(self.model.encode_image(pixels))
        if trunk is None:
            skip, pooled = 1, visual.pool_type == "tok"
        else:
            skip, pooled = trunk.num_prefix_tokens, trunk.global_pool == "token"
        tokens = one_by_one(last, passage.into[:, skip:]) if pooled else passage.out[:, skip:]
        dense = _native_head(visual, tokens) if trunk is None else _timm_head(visual, tokens)
        grid = visual.grid_size if trunk is None else trunk.patch_embed.grid_size
        return Views(whole, list(dense), [tuple(grid)] * len(images))

    def _read(self, texts: list[str]) -> Tensor:
        return self.model.encode_text(self.tokenizer(texts).to(self.device))


def _first(output: Any) -> Tensor:
    """Some towers also return their tokens."""
    return output[0] if isinstance(output, tuple) else output


def _native_head(visual: Any, tokens: Tensor) -> Tensor:
    tokens = visual.ln_post(tokens)
    return tokens if visual.proj is None else tokens @ visual.proj


def _timm_head(visual: Any, tokens: Tensor) -> Tensor:
    """timm's ``forward_head`` of each token, and the projection that open_clip puts behind it."""
    trunk = visual.trunk
    tokens = trunk.norm(tokens)
    if trunk.attn_pool is not None:
        tokens = one_by_one(trunk.attn_pool, tokens)
    return visual.head(trunk.head(trunk.fc_norm(tokens)))


def _no_dense(visual: Any) -> str:
    """Why an image tower has no dense features in the text's space; empty if it has."""
    trunk = getattr(visual, "trunk", None)
    if trunk is None:
        if not hasattr(visual, "transformer"):
            return f"its image tower is a {type(visual).__name__}"
        if visual.attn_pool is not None or visual.pool_type not in ("tok", "avg"):
            return "its image tower pools with open_clip's attentional pooler"
        return ""
    from timm.models.vision_transformer import VisionTransformer

    if not isinstance(trunk, VisionTransformer):
        return f"its image tower is a {type(trunk).__name__}"
    if trunk.global_pool not in ("token", "avg", "map") or hasattr(visual.head, "pool"):
        return f"its image tower pools by {trunk.global_pool or 'a head of its own'}"
    return ""


def open_open_clip(folder: Path, device: str | torch.device) -> OpenClip:
    """An open_clip folder (see the head of this file).

    Raises:
        ValueError: open_clip is not installed, or something in the folder is missing or does not load.
    """
    settings = read_json(folder / OPEN_CLIP_CONFIG).get("model_cfg")
    if not isinstance(settings, dict) or not {"embed_dim", "vision_cfg", "text_cfg"} <= settings.keys():
        raise ValueError(f"guide {folder}: {OPEN_CLIP_CONFIG} lacks model_cfg, its embed_dim or its towers")
    weights = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if weights is None:
        raise ValueError(f"guide {folder}: no weights; one of {', '.join(WEIGHTS)} has to be there")
    _within_the_folder(folder, settings)
    open_clip, text = _package(), dict(settings["text_cfg"])
    try:
        with TemporaryDirectory() as scratch:
            towers = {}
            if text.get("hf_model_name"):
                # open_clip reads the tower's sizes from wherever this names: hand it a folder of our own.
                sizes = _text_config(folder, weights, str(text["hf_model_name"]))
                (Path(scratch) / CONFIG).write_text(json.dumps(sizes))
                towers["text_cfg"] = text | {"hf_model_name": scratch, "hf_model_pretrained": False}
            model = open_clip.create_model(
                f"local-dir:{folder}", precision="fp32", pretrained_image=False, pretrained_text=False,
                require_pretrained=True, weights_only=True, **towers,
            )  # fmt: skip
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    except _Incomplete as error:
        raise ValueError(str(error)) from None
    except Exception as error:  # whatever a library makes of broken files
        raise ValueError(f"guide {folder}: does not load with open_clip: {one_line(error)}") from error
    if towers and tokenizer.tokenizer.pad_token_id != model.text.config.pad_token_id:
        raise ValueError(f"guide {folder}: tokenizer and text tower pad with different tokens")
    return OpenClip(model, tokenizer, int(settings["embed_dim"]), device)


def _package() -> Any:
    """open_clip, or one line about what to install."""
    try:
        import open_clip
    except ImportError as error:
        raise ValueError(
            f"an open_clip guide needs the package ({one_line(error)}): pip install 'clinkd[open_clip]'"
        ) from error
    except (RuntimeError, OSError, AttributeError) as error:  # operators built for another torch
        raise ValueError(
            f"open_clip does not import ({one_line(error)}): install the torchvision of this torch's build"
        ) from error
    return open_clip


def _within_the_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Refuses a config that would fetch, run code, or lacks a tokenizer beside it."""
    vision, text = settings["vision_cfg"], settings["text_cfg"]
    name = str(vision.get("timm_model_name") or "")
    if ":" in name or "/" in name:
        raise ValueError(f"guide {folder}: timm_model_name {name!r} is no name of an architecture")
    if "trust_remote_code" in (text.get("tokenizer_kwargs") or {}):
        raise ValueError(f"guide {folder}: {OPEN_CLIP_CONFIG} asks for trust_remote_code: no code is run")
    if text.get("hf_model_name") and not text.get("hf_tokenizer_name"):
        raise ValueError(f"guide {folder}: {OPEN_CLIP_CONFIG} has hf_model_name without hf_tokenizer_name")
    if text.get("hf_tokenizer_name") and not any((folder / file).is_file() for file in TOKENIZERS):
        raise ValueError(f"guide {folder}: no tokenizer; one of {', '.join(TOKENIZERS)} has to be there")


class _Incomplete(ValueError):
    """Already says what the folder lacks."""


def _text_config(folder: Path, weights: Path, name: str) -> dict[str, Any]:
    """The config of a text tower: the folder's ``config.json``, else read off a BERT's weights."""
    if (folder / CONFIG).is_file():
        return read_json(folder / CONFIG)
    shapes = {key.removeprefix("module."): shape for key, shape in _shapes(weights).items()}
    shapes = {key.removeprefix(_BERT): shape for key, shape in shapes.items() if key.startswith(_BERT)}
    layers = {key.split(".")[2] for key in shapes if key.startswith("encoder.layer.")}
    try:
        vocabulary, width = shapes["embeddings.word_embeddings.weight"]
        types = shapes["embeddings.token_type_embeddings.weight"][0]
        sizes = {
            "model_type": "bert", "vocab_size": vocabulary, "hidden_size": width, "type_vocab_size": types,
            "num_attention_heads": width // _HEAD, "pad_token_id": 0,
            "max_position_embeddings": shapes["embeddings.position_embeddings.weight"][0],
            "intermediate_size": shapes["encoder.layer.0.intermediate.dense.weight"][0],
            "num_hidden_layers": len(layers),
        }  # fmt: skip
    except (KeyError, ValueError):
        sizes, types, width = {}, 0, 0
    # RoBERTa's weights are called the same, but it has one token type and counts positions differently.
    if not sizes or types != 2 or width % _HEAD:
        raise _Incomplete(
            f"guide {folder}: the text tower {name} is no plain BERT with heads of {_HEAD}; put its "
            f"{CONFIG} beside {OPEN_CLIP_CONFIG}"
        )
    return sizes


def _shapes(weights: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of a checkpoint's tensors, without reading them."""
    if weights.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(weights, framework="pt") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    state = torch.load(weights, map_location="meta", weights_only=True)
    state = state.get("state_dict", state)
    return {key: tuple(value.shape) for key, value in state.items() if hasattr(value, "shape")}
