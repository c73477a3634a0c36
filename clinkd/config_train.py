"""The sections of the configuration that say how students and teachers learn; see ``config``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from clinkd.config_model import Section


class OptimSection(Section):
    """Optimiser and length of one training stage."""

    steps: int | None = Field(None, ge=1, description="optimiser steps; none: from epochs")
    epochs: float = Field(1.0, gt=0, description="passes over the training samples, where steps is none")
    batch_size: int = Field(8, ge=1, description="micro-batch of samples per worker")
    accumulation: int = Field(1, ge=1, description="micro-batches that make one optimiser step")
    lr: float = Field(1e-3, gt=0, description="highest learning rate")
    vision_lr: float = Field(1.0, gt=0, description="learning rate of the vision tower as a multiple of lr")
    warmup: float = Field(0.03, ge=0, lt=1, description="share of the steps")
    schedule: Literal["cosine", "wsd", "constant"] = Field(
        "cosine", description="after warm-up; wsd: constant, then linear to 2% over the last fifth"
    )
    muon_lr: float | None = Field(
        None,
        gt=0,
        description="highest learning rate of Muon, which trains the matrices between embeddings and head, "
        "AdamW the rest; needs ZeRO stage 0; none: AdamW trains all",
    )
    weight_decay: float = Field(0.01, ge=0, description="AdamW and Muon weight decay")
    clip: float = Field(1.0, gt=0, description="norm that gradients are clipped to")
    coordinate_weight: float = Field(
        1.0,
        ge=1,
        description="weight of a box's coordinates in the cross-entropy; other tokens weigh 1",
    )
    questions_per_image: int = Field(
        1, ge=1, description="questions that share one image (and its vision tower pass) in a batch"
    )


class CacheSection(Section):
    """What is kept of the teacher's answers, and where."""

    form: Literal["float16", "bfloat16", "int8", "topk"] = Field(
        "float16",
        description="of each answer token: the teacher's last hidden state (int8: half as large, rounded by "
        "token), or its k largest logits with the rest as one bucket, which is an approximation",
    )
    k: int = Field(64, ge=1, description="logits kept by topk")
    root: str | None = Field(
        None, description="folder or s3:// URI that holds the stores; none: teacher-cache under run.root"
    )


class DistillSection(Section):
    """Distillation from the teacher, before the full data."""

    a: float = Field(0.5, ge=0, description="weight of the divergence: (a*KD + CE) / (1 + a)")
    temperature: float = Field(
        0.5,
        gt=0,
        description="that both distributions are softened at, inside the divergence (0.5 as released)",
    )
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = Field(
        "forward_kl",
        description="of teacher p and student q: KL(p||q), KL(q||p), or their generalised Jensen-Shannon",
    )
    jsd_beta: float = Field(0.5, gt=0, lt=1, description="of jsd: beta KL(p||m) + (1-beta) KL(q||m)")
    scale_t2: bool = Field(False, description="multiply the divergence by temperature squared")
    cache: CacheSection = CacheSection()
    chunk_size: int = Field(1024, ge=1, description="answer tokens whose logits exist at one time")
    share: float = Field(1.0, gt=0, le=1, description="share of the training images that the teacher labels")
    unlabelled_share: float = Field(
        0.2, ge=0, le=1, description="share of those whose true answers are hidden from the student"
    )
    best_of: int = Field(
        1,
        ge=1,
        description="answers of the teacher to each of these: the greedy one and sampled ones; the "
        "surest that passes is learned from",
    )
    label_temperature: float = Field(0.7, gt=0, description="that the sampled ones are drawn at")
    max_label_tokens: int = Field(64, ge=1, description="an answer that has not ended by then is refused")
    start_quantile: float = Field(0.5, ge=0, le=1, description="margin quantile admitted first (curriculum)")
    end_quantile: float = Field(0.0, ge=0, le=1, description="margin quantile admitted at the end")
    teacher: Literal["cache", "online"] = Field(
        "cache",
        description="where the teacher's states come from: what label kept of them, or the teacher itself, "
        "loaded beside the student",
    )
    on_policy: float = Field(
        0.0, ge=0, le=1, description="share of the steps that learn from the student's own sampled answers"
    )
    sample_temperature: float = Field(1.0, gt=0, description="at which the student samples them")
    max_new_tokens: int = Field(32, ge=1, description="of an answer that the student samples")
    optim: OptimSection = OptimSection()

    @model_validator(mode="after")
    def _possible(self) -> DistillSection:
        if self.cache.form == "topk" and not 0.2 <= self.temperature <= 5:
            raise ValueError(f"temperature ({self.temperature}) has to lie in [0.2, 5] with cache.form topk")
        if self.on_policy and self.teacher != "online":
            raise ValueError("on_policy above 0 needs teacher: online, no cache has such answers")
        if self.on_policy and not self.a:
            raise ValueError("on_policy above 0 needs a above 0: only the divergence teaches there")
        return self


class ReflectSection(Section):
    """Training with feedback on the model's own wrong answers."""

    rounds: int = Field(1, ge=0, description="at most")
    patience: int = Field(
        1, ge=1, description="rounds without fewer errors on the validation split after which no other begins"
    )
    validation: int = Field(
        512, ge=0, description="samples of the validation split that are answered after each round"
    )
    corrector: str | None = Field(
        None, description="folder of the model that corrects, of the Qwen2-VL family; none: the teacher"
    )
    exercises: OptimSection | None = Field(
        None,
        description="training that makes a corrector of the teacher, half of the questions being exercises "
        "in correcting; none: the teacher corrects as it is",
    )
    samples: int = Field(512, ge=1, description="training samples the student answers in a round")
    candidates: int = Field(4, ge=1, description="corrections the corrector samples for each miss")
    budget: int = Field(256, ge=1, description="most misses corrected in a round, the worst first")
    temperature: float = Field(0.7, gt=0, description="at which the corrector samples its candidates")
    weight: float = Field(0.5, ge=0, le=1, description="w of w*similarity + (1-w)*IoU")
    floor: float = Field(
        0.6, ge=0, le=1, description="score under which no candidate is learned from; the truth is then"
    )
    iou_threshold: float = Field(0.5, gt=0, lt=1, description="IoU under which a box is a miss")
    similarity_threshold: float = Field(
        0.85, ge=0, le=1, description="likeness to the truth under which a text is a miss"
    )
    similarity: str = Field(
        "auto", description="'minilm', 'rouge', 'auto', or the folder of a sentence encoder"
    )
    target: Literal["text", "distribution"] = Field(
        "text",
        description="what is learned where the student was wrong: the chosen text, or the distribution that "
        "the corrector, who sees the truth, gives along the truth (privileged distillation; divergence and "
        "temperature as in distill)",
    )
    share: float = Field(
        0.25, ge=0, le=1, description="share of feedback in a batch; the rest is the full training data"
    )
    replay: float = Field(
        0.0, ge=0, le=1, description="share of what was right in a batch, so that it stays right"
    )
    optim: OptimSection = OptimSection()

    @model_validator(mode="after")
    def _whole(self) -> ReflectSection:
        if self.share + self.replay > 1:
            raise ValueError(f"share ({self.share}) and replay ({self.replay}) are more than 1 together")
        if self.corrector is not None and self.exercises is not None:
            raise ValueError("give either corrector, a model that can correct, or exercises for the teacher")
        return self
