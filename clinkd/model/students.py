"""Students made of their teachers: cut out of them, or with text layers of their own."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clinkd.model.first_weights import begin_layers
from clinkd.model.guided import GuidedModel


def kept_layers(teacher_layers: int, layers: int) -> list[int]:
    """``layers`` of the teacher's, evenly spread from the first to the last.

    Raises:
        ValueError: fewer than one, or more than the teacher has.
    """
    if not 1 <= layers <= teacher_layers:
        raise ValueError(f"student: {layers} layers from a teacher of {teacher_layers}")
    if layers == 1:
        return [0]
    return [round(number * (teacher_layers - 1) / (layers - 1)) for number in range(layers)]


def student_from_teacher(teacher: GuidedModel, layers: int, mlp: int | None = None) -> GuidedModel:
    """A student cut out of its teacher: ``layers`` of its text layers, ``mlp`` neurons in each, all the rest.

    Of a layer's neurons those stay whose weights are largest (the product of their three norms).

    Raises:
        ValueError: see ``kept_layers``; or more neurons than the teacher has.
    """
    kept = kept_layers(teacher.config.text_config.num_hidden_layers, layers)
    width = teacher.config.text_config.intermediate_size
    if mlp is not None and not 1 <= mlp <= width:
        raise ValueError(f"student: {mlp} neurons from a teacher's MLP of {width}")
    config = copy.deepcopy(teacher.config)
    config.text_config.num_hidden_layers = layers
    config.text_config.intermediate_size = mlp or width
    if config.text_config.layer_types is not None:
        config.text_config.layer_types = [config.text_config.layer_types[number] for number in kept]
    student = type(teacher)(config)
    nn.Module.to(student, teacher.device, teacher.dtype)
    prefix = "model.language_model.layers."
    state = {name: value for name, value in teacher.state_dict().items() if not name.startswith(prefix)}
    student.load_state_dict(state, strict=False)
    for number, source in enumerate(kept):
        layer = teacher.model.language_model.layers[source]
        student.model.language_model.layers[number].load_state_dict(_fewer_neurons(layer, mlp or width))
    return student


def student_with_new_layers(
    teacher: GuidedModel,
    tokenizer: Any,
    layers: int,
    mlp: int,
    seed: int,
    boxes: Sequence[Tensor] | None = None,
) -> GuidedModel:
    """Return a student with the teacher's vision tower and token embeddings, and text layers of its own.

    Args:
        teacher: a model made here, whose width and heads the student shares.
        tokenizer: the teacher's. layers, mlp: text layers, and neurons of each.
        seed, boxes: of the text layers' initialization (``first_weights.begin_layers``).
    """
    config = copy.deepcopy(teacher.config)
    config.text_config.num_hidden_layers = layers
    config.text_config.intermediate_size = mlp
    config.text_config.layer_types = ["full_attention"] * layers
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        student = type(teacher)(config)
    nn.Module.to(student, teacher.device, teacher.dtype)
    own = ("model.language_model.layers.", "model.language_model.norm.")
    shared = {name: value for name, value in teacher.state_dict().items() if not name.startswith(own)}
    student.load_state_dict(shared, strict=False)
    begin_layers(student, tokenizer, boxes, seed)
    return student


def _fewer_neurons(layer: nn.Module, count: int) -> dict[str, Tensor]:
    """A text layer's weights with the ``count`` largest neurons of its MLP, in their order."""
    state = dict(layer.state_dict())
    gate, up, down = (state[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
    size = gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)
    chosen = size.topk(count).indices.sort().values
    state["mlp.gate_proj.weight"], state["mlp.up_proj.weight"] = gate[chosen], up[chosen]
    state["mlp.down_proj.weight"] = down[:, chosen]
    return state
