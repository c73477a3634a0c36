"""What a teacher's answer may be kept as: bytes of an answer token, and how far loss and gradient go off.

    python benchmarks/teacher_cache_forms.py [--images N] [--steps N] [--student-steps N] [--tokens N]
                                             [--temperatures T ...]

A tiny teacher is trained on phantoms for --steps, a student is cut out of it (fewer layers, fewer neurons)
and trained for --student-steps; both then see the same --tokens answer tokens of phantoms that neither was
trained on. Each form of the teacher's last hidden state goes through ``distill_loss``, each top-k form
through ``distill_loss_topk``; forward KL, a = 0.5. The reference is the exact loss from the float32 states;
all is worked out in float64, so that the errors are the form's alone:

    KL, loss     |found - reference| / reference, of KL and of (a * KL + CE) / (1 + a)
    by hidden    norm(found - reference) / norm(reference), of the loss's gradient by the student's states
    by head      the same by the student's head

Forms: the state in float32, float16, bfloat16 and int8 (one float32 scale a row, its largest entry over 127;
rounded half to even), and the k largest logits in float16 with ids in int32 and one float32 bucket for the
rest, which serves one temperature only. Bytes are given for this model's width and, as "at 3584", for
Qwen2-VL 7B's; those of top-k do not depend on it. This vocabulary is of about a thousand tokens: the same k
leaves out more of one of 151,936, so the errors of top-k are a lower bound here, and its column "left out"
says how much of the teacher's mass is in the bucket.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from phantom_task import phantom_table, task, write_model
from torch import Tensor

from clinkd.distill.losses import DistillLoss, distill_loss, distill_loss_topk, top_k_logits

TOP = (16, 64, 256)
WIDE = 3584  # Qwen2-VL 7B


@dataclass(frozen=True)
class Tokens:
    """Answer tokens as both models see them, float64, and the students' leaves."""

    hidden: Tensor  # [N, H]
    head: Tensor  # [V, H]
    targets: Tensor  # [N]
    taught: Tensor  # [N, Ht], in float32: what the reference is made of
    taught_head: Tensor  # [V, Ht]


Form = tuple[Callable[[float], DistillLoss], Callable[[int], int]]
"""The loss at a temperature; bytes of an answer token for a state of a width."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, value in (("images", 160), ("steps", 200), ("student-steps", 20), ("tokens", 512)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.5, 1.0])
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        tokens = answer_tokens(chosen, Path(folder))
    forms = {name: state_form(tokens, *form) for name, form in STATES.items()}
    forms |= {f"top {k} and tail": top_form(tokens, k) for k in TOP if k < len(tokens.head)}
    width = tokens.taught.shape[1]
    shape = f"{len(tokens.targets)} answer tokens, state of {width}, vocabulary of {len(tokens.head)}"
    for temperature in chosen.temperatures:
        print(f"\nT = {temperature:g}; {shape}")
        table(tokens, forms, temperature)


def answer_tokens(chosen: argparse.Namespace, folder: Path) -> Tokens:
    """Trains the two models and asks them about phantoms that come after those trained on."""
    from clinkd.model.presets import TinySize
    from clinkd.model.students import student_from_teacher
    from clinkd.train.tasks import AnswerLoss

    rows = phantom_table(chosen.images + chosen.images // 4)
    size = TinySize(hidden=128, layers=4, heads=4, mlp=384, vision_hidden=64, vision_layers=2, patch=14)
    start = write_model(rows, size, folder / "start")
    training = task(rows.slice(0, chosen.images), start, folder / "train")
    unseen = task(rows.slice(chosen.images), start, folder / "unseen")
    teacher = training.build()
    train(teacher, training, chosen.steps, "teacher")
    student = AnswerLoss(student_from_teacher(teacher.model, 2, 192).train(), chunk_size=1024)
    train(student, training, chosen.student_steps, "student")
    found: list[tuple[Tensor, ...]] = []
    with torch.no_grad():
        while sum(len(targets) for _, _, targets in found) < chosen.tokens:
            record = len(found)
            if record == len(unseen.ids):
                raise SystemExit(f"--tokens {chosen.tokens}: {len(unseen.ids)} images have too few answers")
            turns = tuple(range(unseen.turn_counts()[record]))
            inputs, _ = unseen.batch([(record, turns)], 0, 1)
            hidden, targets = student.hidden(**inputs)
            found.append((hidden, teacher.hidden(**inputs)[0], targets))
    hidden, taught, targets = (torch.cat(parts)[: chosen.tokens] for parts in zip(*found, strict=True))
    heads = [module.model.lm_head.weight.detach().double() for module in (student, teacher)]
    return Tokens(hidden.double(), heads[0], targets, taught, heads[1])


def train(module: Any, training: Any, steps: int, name: str, groups: int = 4, turns: int = 4) -> None:
    """A plain loop; ``groups`` images with ``turns`` questions each in a step."""
    from clinkd.train.ledger import Ledger

    ledger = Ledger(training.turn_counts(), turns, 0)
    optimiser = torch.optim.AdamW(module.parameters(), lr=2e-3, betas=(0.9, 0.98))
    for step in range(steps):
        inputs, tokens = training.batch(ledger.take(step * groups, groups), step, steps)
        loss = module(**inputs)["loss"] / tokens
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
        if step in (0, steps - 1):
            print(f"{name}: step {step + 1} of {steps}, loss {loss.item():.3f}", flush=True)


def as_int8(states: Tensor) -> Tensor:
    """To int8 with a float32 scale of each row, and back."""
    scale = states.abs().amax(1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (states / scale).round().to(torch.int8).float() * scale  # torch rounds half to even


STATES: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[int], int]]] = {
    "state float32": (lambda states: states, lambda width: 4 * width),
    "state float16": (lambda states: states.to(torch.float16), lambda width: 2 * width),
    "state bfloat16": (lambda states: states.to(torch.bfloat16), lambda width: 2 * width),
    "state int8": (as_int8, lambda width: width + 4),
}


def state_form(tokens: Tokens, keep: Callable[[Tensor], Tensor], size: Callable[[int], int]) -> Form:
    kept = keep(tokens.taught).double()

    def loss(temperature: float) -> DistillLoss:
        return distill_loss(
            tokens.hidden, tokens.head, tokens.targets, kept, tokens.taught_head, a=0.5,
            temperature=temperature,
        )  # fmt: skip

    return loss, size


def top_form(tokens: Tokens, k: int) -> Form:
    vocabulary = len(tokens.taught_head)

    def loss(temperature: float) -> DistillLoss:
        logits, ids, tail = top_k_logits(
            tokens.taught.double(), tokens.taught_head, k=k, temperature=temperature, vocabulary=vocabulary
        )
        return distill_loss_topk(
            tokens.hidden, tokens.head, tokens.targets, logits.half().double(), ids.int().long(),
            tail.float().double(), vocabulary=vocabulary, a=0.5, temperature=temperature,
        )  # fmt: skip

    return loss, lambda width: k * (2 + 4) + 4


def table(tokens: Tokens, forms: dict[str, Form], temperature: float) -> None:
    tokens.hidden.requires_grad_(), tokens.head.requires_grad_()
    p = (tokens.taught.double() @ tokens.taught_head.T / temperature).softmax(1).sort(1, descending=True)[0]
    print(
        f"{'form':18}{'bytes':>8}{'at 3584':>9}{'KL':>10}{'loss':>10}{'by hidden':>11}{'by head':>10}"
        f"{'left out':>11}"
    )
    wanted = values(tokens, partial(forms["state float32"][0], temperature))
    for name, (loss, size) in forms.items():
        found = values(tokens, partial(loss, temperature))
        errors = [abs(one - other) / abs(other) for one, other in zip(found[:2], wanted[:2], strict=True)]
        errors += [
            ((one - other).norm() / other.norm()).item()
            for one, other in zip(found[2:], wanted[2:], strict=True)
        ]
        width = tokens.taught.shape[1]
        k = int(name.split()[1]) if name.startswith("top") else len(tokens.head)
        print(
            f"{name:18}{size(width):8}{size(WIDE):9}{errors[0]:10.1e}{errors[1]:10.1e}{errors[2]:11.1e}"
            f"{errors[3]:10.1e}{p[:, k:].sum(1).mean().item():11.1e}"
        )
    print(
        f"exact: KL {wanted[0]:.4f}, loss {wanted[1]:.4f}; the teacher's first choice: {p[:, 0].mean():.3f}"
    )


def values(tokens: Tokens, loss: Callable[[], DistillLoss]) -> tuple[Any, ...]:
    """KL, loss, and the loss's gradients by hidden states and head."""
    found = loss()
    slopes = torch.autograd.grad(found.total, (tokens.hidden, tokens.head))
    return (found.kd.item(), found.total.item(), *slopes)


if __name__ == "__main__":
    main()
