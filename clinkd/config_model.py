"""The sections of the configuration that say what models are; ``config`` holds all the others."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TinySection(Section):
    """Sizes of a model made here; ignored where a path is given."""

    hidden: int = Field(128, ge=32, multiple_of=16, description="width; a multiple of 8 x heads")
    layers: int = Field(3, ge=1, description="text layers; of a student cut out of its teacher too")
    heads: int = Field(4, ge=1, description="attention heads of a layer")
    mlp: int = Field(384, ge=32, description="neurons of a layer; of a student cut out of its teacher too")

    @model_validator(mode="after")
    def _divisible(self) -> TinySection:
        if self.hidden % (8 * self.heads):
            raise ValueError(f"hidden ({self.hidden}) must be a multiple of 8 x heads ({self.heads})")
        return self


class VisionSection(Section):
    """The vision tower of models made here; teacher, student and guide share its shape."""

    hidden: int = Field(64, ge=16, multiple_of=16, description="width")
    layers: int = Field(3, ge=1, description="blocks")
    heads: int = Field(2, ge=1, description="attention heads of a block")
    patch: int = Field(8, ge=4, description="pixels a side of a patch")
    image_size: int = Field(112, ge=28, description="pixels a side that images are resized to")


class LoraSection(Section):
    """Adapters in the text layers (LoRA), in the place of training these layers' own weights."""

    rank: int = Field(16, ge=1, description="columns of an adapter's two matrices")
    alpha: float = Field(32.0, gt=0, description="an adapter's product is added times alpha / rank")
    dropout: float = Field(
        0.0, ge=0, lt=1, description="of an adapter's input; above 0, a resumed run draws anew"
    )
    targets: tuple[
        Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"], ...
    ] = Field(
        ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
        description="linear layers of the text layers that get one",
    )

    @field_validator("targets")
    @classmethod
    def _some(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        if not targets:
            raise ValueError("name at least one, or leave lora out")
        return targets


class ModelSection(Section):
    """The student, and what teacher and student have in common."""

    path: str | None = Field(
        None, description="folder of a Qwen2-VL or Qwen2.5-VL checkpoint for the student; none: made here"
    )
    tiny: TinySection = TinySection()
    vision: VisionSection = VisionSection()
    vocab_size: int = Field(1024, ge=300, description="most tokens of a tokenizer made here")
    init: Literal["teacher_layers", "new_layers", "random"] = Field(
        "teacher_layers",
        description="initialization of a student made here: evenly chosen layers of the teacher; new text "
        "layers over the vision tower and embeddings of a teacher made here; all weights random",
    )
    train_vision: bool = Field(
        False, description="train the student's vision tower too (the paper freezes it)"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="type of the weights as models are loaded; bfloat16 halves them"
    )
    lora: LoraSection | None = Field(
        None, description="the student's text layers train by adapters; none: by all their weights"
    )
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = Field(
        "auto",
        description="kernel of all training; auto: flash attention where its package and a GPU are there and "
        "the model runs in bfloat16, else transformers' choice",
    )
    min_pixels: int | None = Field(
        None,
        ge=1,
        description="smallest area that images are resized to, for student and teacher; none: as the model's "
        "preprocessor_config.json says (Qwen2-VL's released inference: 200704, which is 256 x 28 x 28)",
    )
    max_pixels: int | None = Field(
        None,
        ge=1,
        description="largest area that images are resized to; none: as preprocessor_config.json says "
        "(released inference: 1003520, which is 1280 x 28 x 28)",
    )

    @model_validator(mode="after")
    def _ordered(self) -> ModelSection:
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels ({self.min_pixels}) is above max_pixels ({self.max_pixels})")
        return self


class TeacherTinySection(TinySection):
    """Sizes of a teacher made here; of its own, so that naming one of them leaves the others as they are."""

    layers: int = Field(4, ge=1, description="text layers")


class TeacherSection(Section):
    """The teacher: a checkpoint by path, or a model trained here."""

    path: str | None = Field(
        None, description="folder of the teacher's checkpoint; none: the stage teacher trains one"
    )
    tiny: TeacherTinySection = TeacherTinySection()
    train_vision: bool = Field(True, description="train the teacher's vision tower, where it is trained here")
