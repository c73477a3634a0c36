"""Guided rotary positions, as mixins for the models of the Qwen2-VL family.

Decisions:
- The guidance is a plain dict ``rope_guidance`` on the family's own config: saving and loading keep it, and a
  saved folder (architecture and tensor names are the family's) still opens in plain transformers, which then
  lays images out as M-RoPE.
- Positions are worked out where the base class does it, from ``input_ids`` and grids alone:
  ``mm_token_type_ids`` is accepted and not needed.
- During generation positions travel as float64 and are cast to float32 by the rotary embedding, so that "last
  position + 1", which is how transformers continues them, rounds like ``text position + delta``.
- Only three axes are handed on, never a fourth for text: masks come from ``attention_mask``. Packed rows
  bring all four of their own (``conversation.packed_positions``), and no mask.
- Frequencies stay float32 whatever the weights are cast to: in bfloat16, whose 8 bits cannot even count to
  300, a fractional position would turn by another angle than was asked for.
- A mixin stands in front of the family's class and calls past it by ``super(self.plain, self)`` where the
  family's method must not run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from clinkd.model.patches import as_product
from clinkd.model.prefix import LastLayer, alike, hidden_by_prefix, prefix_lengths
from clinkd.model.rope import RopeGuidance, guided_rope_index
from clinkd.model.rows import hidden_by_groups, length_groups
from clinkd.model.tower import Shown, merged_states

if TYPE_CHECKING:
    from transformers import GenerationMixin, PreTrainedModel

    class _Trunk(PreTrainedModel):
        config: Any
        rope_deltas: Any
        visual: Any
        language_model: Any

    class _Model(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
        config: Any
        lm_head: nn.Linear
else:  # transformers reads a class's annotation of config as its config_class
    _Trunk = _Model = object


PUBLISHED_NAMES = {
    r"^visual": "model.visual",
    r"^model(?!\.(language_model|visual))": "model.language_model",
}
"""Weights' names in the published folders, and in what plain transformers saves, to the module's own.

transformers renames them for its own classes alone, and starts at random what it does not find.
"""


def guidance_of(config: Any) -> RopeGuidance:
    """The guidance a config carries; M-RoPE where it carries none."""
    return RopeGuidance(**(getattr(config, "rope_guidance", None) or {}))


class GuidedTrunk(_Trunk):
    """Before a family's trunk: positions follow ``config.rope_guidance``, frequencies stay float32."""

    videos: ClassVar[bool] = True
    """Whether the family's videos step by one position a frame, as ``guided_rope_index`` has it."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        embed = self.visual.patch_embed
        embed.proj = as_product(embed.proj)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """What ``to``, ``bfloat16`` and ``half`` go through: frequencies move, and keep their type."""
        kept = {
            (module, name): buffer
            for module in self.modules()
            for name, buffer in module.named_buffers(recurse=False)
            if name in ("inv_freq", "original_inv_freq")
        }
        super()._apply(fn, recurse)
        for (module, name), before in kept.items():
            after = getattr(module, name)
            if after.dtype != before.dtype:
                setattr(module, name, before.to(after.device))
        return self

    def get_rope_index(  # type: ignore[override]
        self,
        input_ids: Tensor,
        mm_token_type_ids: Tensor | None = None,
        image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        attention_mask: Tensor | None = None,
        *,
        alignment: Tensor | None = None,
        relevance: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Positions float32 [3, B, L] and deltas float64 [B, 1]; see ``guided_rope_index``.

        Raises:
            ValueError: its errors; or videos of a family that times them in seconds.
        """
        if video_grid_thw is not None and len(video_grid_thw) and not self.videos:
            raise ValueError(
                f"clinkd model: {self.config.model_type} times videos in seconds, which guided positions do "
                "not know; give frames as images"
            )
        return guided_rope_index(
            input_ids,
            image_grid_thw,
            attention_mask,
            guidance=guidance_of(self.config),
            image_token_id=self.config.image_token_id,
            vision_start_token_id=self.config.vision_start_token_id,
            spatial_merge_size=self.config.vision_config.spatial_merge_size,
            video_token_id=self.config.video_token_id,
            video_grid_thw=video_grid_thw,
            alignment=alignment,
            relevance=relevance,
        )

    def compute_3d_position_ids(  # type: ignore[override]
        self,
        input_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        mm_token_type_ids: Tensor | None = None,
        alignment: Tensor | None = None,
        relevance: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor | None:
        """Positions of a first pass (and the deltas, which are kept), or of tokens behind a cache.

        None, which the text model reads as 0, 1, 2, …, where there is nothing but embeddings to go by.
        """
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if past == 0 and input_ids is not None:
            positions, self.rope_deltas = self.get_rope_index(
                input_ids,
                image_grid_thw=image_grid_thw,
                video_grid_thw=video_grid_thw,
                attention_mask=attention_mask,
                alignment=alignment,
                relevance=relevance,
            )
            return positions
        if past == 0 or self.rope_deltas is None:
            return None
        given = input_ids if input_ids is not None else inputs_embeds
        assert given is not None
        rows, length = given.shape[:2]
        if attention_mask is not None:
            text = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
        else:
            text = torch.arange(past, past + length, device=given.device).expand(rows, -1)
        deltas = self.rope_deltas.repeat_interleave(rows // len(self.rope_deltas), dim=0)
        return (text + deltas.to(text.device)).float().expand(3, -1, -1)

    def forward(  # type: ignore[override]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        *,
        image_grid_thw: Tensor | None = None,
        video_grid_thw: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        alignment: Tensor | None = None,
        relevance: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        if position_ids is None:
            position_ids = self.compute_3d_position_ids(
                input_ids,
                inputs_embeds,
                image_grid_thw=image_grid_thw,
                video_grid_thw=video_grid_thw,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                alignment=alignment,
                relevance=relevance,
            )
        if position_ids is None:  # embeddings alone: keep the base class from reading stale deltas
            self.rope_deltas = None
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            image_grid_thw=image_grid_thw,
            video_grid_thw=video_grid_thw,
            mm_token_type_ids=mm_token_type_ids,
            **kwargs,
        )


class GuidedModel(_Model):
    """What every ClinKD model is, before its family's class: ``forward`` and ``generate`` take the guide's
    scores too.

    ``alignment`` is [B, 1] (or None), ``relevance`` [merged image patches of the batch] (or None), both as in
    ``guided_rope_index``, which raises ValueError where the guidance asks for scores that are missing.
    """

    plain: ClassVar[type]
    """The family's own class."""
    trunk: ClassVar[type]
    """A :class:`GuidedTrunk`."""

    def __init__(self, config: Any) -> None:
        # Past the family's class, whose own trunk would be built only to be thrown away.
        super(self.plain, self).__init__(config)  # type: ignore[arg-type]
        self.model: Any = self.trunk(config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.last_layer = LastLayer(self.model.language_model.layers[-1])
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As transformers does, from the family's folders too, whatever their weights are called."""
        return super().from_pretrained(*args, **{"key_mapping": PUBLISHED_NAMES} | kwargs)

    def forward_hidden(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        image_grid_thw: Tensor,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        image_index: Tensor | None = None,
        alignment: Tensor | None = None,
        relevance: Tensor | None = None,
        position_ids: Tensor | None = None,
        overhead: int | None = None,
        wanted: Tensor | None = None,
        share: bool = True,
        shown: Shown | None = None,
    ) -> Tensor:
        """Last hidden states, one vision tower pass per distinct image.

        Args:
            input_ids, attention_mask: [B, L].
            image_grid_thw: [images, 3] of the distinct images.
            pixel_values: [patches, values] of the distinct images; or else
            image_features: [merged patches, H] of the distinct images, as the merger gives them; or else
            shown: what a frozen tower said of the distinct images; pixel_values are then of its unseen ones.
            image_index: [vision segments] the image of each segment of the batch, mostly one a row; None:
                segment i shows image i. Images that no segment shows run through the tower all the same,
                with weight 0, so that every rank of a sharded model does the same work.
            alignment: [B, 1]. relevance: [merged patches over the segments].
            position_ids: [4, B, L] of packed rows (``conversation.packed_positions``), without an
                attention_mask; None: from the ids.
            overhead: what another pass of the text model costs, in tokens; rows padded on the right are then
                taken in groups of like length where that saves more padding, and with ``wanted`` rows that
                begin with the same images share that beginning. None: one pass for all.
            wanted: bool [B, L], behind the row's last image; states elsewhere may be anything. None: all.
            share: whether rows may share a beginning.

        Returns:
            [B, L, H], after the last norm; ``lm_head`` makes logits of it.

        Raises:
            ValueError: neither or both of pixel_values and image_features, or scores missing.
        """
        images: dict[str, Any] = {}
        unseen, shape = None, input_ids.shape
        if position_ids is not None and "flash" in str(self.config.text_config._attn_implementation):
            # It tells packed documents apart in a batch of one alone; laid end to end, rows stay documents.
            input_ids, position_ids = input_ids.reshape(1, -1), position_ids.reshape(4, 1, -1)
        if image_index is None or len(image_index):
            outputs, grids = self.encode_images(
                image_grid_thw, pixel_values, image_features, image_index, shown
            )
            images = {"mm_encoder_outputs": outputs, "image_grid_thw": grids}
            if overhead is not None and attention_mask is not None and bool(attention_mask[:, 0].all()):
                shared = self._sharing(input_ids, image_index, overhead) if share else None
                if wanted is not None and shared is not None:
                    same, prefixes = shared
                    return hidden_by_prefix(
                        self, same, prefixes, input_ids, attention_mask, images, wanted, overhead
                    )  # fmt: skip
                groups = length_groups(attention_mask.sum(1).tolist(), overhead)
                if len(groups) > 1:
                    return hidden_by_groups(
                        self, groups, input_ids, attention_mask, images, alignment, relevance, wanted
                    )  # fmt: skip
        else:
            unseen = self._image_parts(image_grid_thw, pixel_values, image_features, shown)
        with self.last_layer.only(None if wanted is None else wanted.reshape(input_ids.shape)):
            hidden = self.model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                use_cache=False,
                alignment=alignment,
                relevance=relevance,
                **images,
            ).last_hidden_state.view(*shape, -1)
        return hidden if unseen is None else hidden + 0 * torch.cat(unseen).sum().to(hidden.dtype)

    def _sharing(
        self, input_ids: Tensor, image_index: Tensor | None, overhead: int
    ) -> tuple[list[int], list[int]] | None:
        """(first row that begins alike, tokens of that beginning) of each row, where sharing them pays."""
        if guidance_of(self.config).guided != "none" or image_index is None:
            return None  # guided, a question moves its image's tokens
        prefixes = prefix_lengths(input_ids, self.config.image_token_id)
        counts = input_ids.eq(self.config.vision_start_token_id).sum(1).tolist()
        if not all(prefixes) or sum(counts) != len(image_index):
            return None
        same = alike(input_ids, prefixes, [tuple(part.tolist()) for part in image_index.split(counts)])
        saved = sum(length for row, length in enumerate(prefixes) if same[row] != row)
        return (same, prefixes) if saved > overhead else None

    def encode_images(
        self,
        image_grid_thw: Tensor,
        pixel_values: Tensor | None = None,
        image_features: Tensor | None = None,
        image_index: Tensor | None = None,
        shown: Shown | None = None,
    ) -> tuple[dict[str, BaseModelOutputWithPooling], Tensor]:
        """``mm_encoder_outputs`` and grids [segments, 3] of segments that show ``image_index``; see above."""
        parts = self._image_parts(image_grid_thw, pixel_values, image_features, shown)
        grids = image_grid_thw
        if image_index is not None:
            parts = tuple(parts[image] for image in image_index.tolist())
            grids = image_grid_thw[image_index.to(image_grid_thw.device)]
        return {"image": BaseModelOutputWithPooling(pooler_output=tuple(parts))}, grids  # type: ignore[arg-type]

    def _image_parts(
        self,
        image_grid_thw: Tensor,
        pixel_values: Tensor | None,
        image_features: Tensor | None,
        shown: Shown | None = None,
    ) -> tuple[Tensor, ...]:
        """[merged patches, H] of each distinct image."""
        if shown is not None:
            return merged_states(self.model.visual, image_grid_thw, pixel_values, shown)
        if (pixel_values is None) == (image_features is None):
            raise ValueError("clinkd model: give either pixel_values or image_features")
        if image_features is None:
            return tuple(self.model.get_image_features(pixel_values, image_grid_thw).pooler_output)
        merge = self.config.vision_config.spatial_merge_size
        return image_features.split((image_grid_thw.prod(-1) // merge**2).tolist())

    def prepare_inputs_for_generation(  # type: ignore[override]
        self,
        input_ids: Tensor,
        alignment: Tensor | None = None,
        relevance: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Lets the scores through ``generate``; the positions made from them come in ``kwargs``."""
        return super().prepare_inputs_for_generation(input_ids, **kwargs)  # type: ignore[misc, arg-type]

    def _prepare_position_ids_for_generation(
        self, inputs_tensor: Tensor, model_kwargs: dict[str, Any]
    ) -> Tensor:
        """float64 [3, B, L] positions of the prompt, or of what stands behind a cache."""
        family: Any = super(self.plain, self)  # type: ignore[arg-type]
        text = family._prepare_position_ids_for_generation(inputs_tensor, model_kwargs)
        given = model_kwargs.get("input_ids")
        ids = given if given is not None and given.shape[1] > 0 else inputs_tensor
        cache = model_kwargs.get("past_key_values")
        if cache is not None and cache.get_seq_length() > 0 and self.model.rope_deltas is not None:
            return (text + self.model.rope_deltas).expand(3, -1, -1)
        if ids.ndim != 2:  # embeddings: nothing tells where images stand
            self.model.rope_deltas = None
            return text.double().expand(3, ids.shape[0], -1)
        names = ("image_grid_thw", "video_grid_thw", "attention_mask", "alignment", "relevance")
        positions, deltas = self.model.get_rope_index(ids, **{name: model_kwargs.get(name) for name in names})
        self.model.rope_deltas = deltas
        positions = positions.double()
        positions[:, :, -1] = text[:, -1] + deltas[:, 0]  # unrounded: what follows is counted from here
        return positions

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """As transformers does, under the name of the base class, which every tool knows."""
        super().save_pretrained(save_directory, *args, **kwargs)
        path = Path(save_directory) / "config.json"
        if path.exists():
            content = json.loads(path.read_text())
            content["architectures"] = [self.plain.__name__]
            path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
