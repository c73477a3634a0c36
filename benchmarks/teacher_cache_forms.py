"""What each form of the teacher's cache costs in bytes, and in exactness of the loss and its gradient.

    python benchmarks/teacher_cache_forms.py [--steps N] [--images N] [--temperatures T ...] [--width N]

A tiny teacher and a tiny student learn phantoms, the student for half as many steps, so that they disagree.
Every form packs the teacher's states at the answer tokens and gives them back as a training step gets them.
The loss (a = 1, forward KL) and its gradients by the student's states and head are held against those from
the states as they came. Errors are relative: of the loss to its value, of a gradient to its norm. "of a
step" is the time to read a batch's rows from a store on disk, as a share of the tiny student's forward and
backward pass: of a larger model's it is less.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from kd import keep
from torch import Tensor

from clinkd.data.phantoms import PhantomSpec, draw
from clinkd.distill.forms import Form
from clinkd.distill.losses import distill_loss, distill_loss_topk
from clinkd.distill.summary import tail_at
from clinkd.model.chat import collate, encode

FORMS = ("float16", "bfloat16", "int8", "topk 16", "topk 64", "topk 256")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, value in (("steps", 150), ("images", 48), ("width", 128), ("batch", 32), ("rounds", 7)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.5, 1.0, 2.0])
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    turns, tokenizer, (student, teacher) = learned(chosen)
    batch, names, counts = collated(turns[: chosen.batch], tokenizer)
    with torch.no_grad():
        states = teacher.forward_hidden(**batch["inputs"])[:, :-1][batch["chosen"]]
    head = teacher.lm_head.weight.detach()
    step = median(lambda: ours(student, batch, states, head, 1.0), chosen.rounds)
    print(f"{len(states)} answer tokens of {len(names)} turns; a student's step takes {step * 1e3:.0f} ms")
    print(
        f"{'form':12}{'T':>5}{'loss off':>11}{'by states':>11}{'by head':>10}{'B/token':>9}{'of a step':>11}"
    )
    for name in FORMS:
        kind, _, k = name.partition(" ")
        form = Form(kind, int(k or 64), len(head) if k else None)  # type: ignore[arg-type]
        with tempfile.TemporaryDirectory() as folder:
            cache = keep(Path(folder), form, names, counts, states, head)
            read = median(lambda cache=cache: cache.read(names), chosen.rounds)
            given = cache.read(names)
        for temperature in chosen.temperatures:
            errors = compare(student, batch, (states, head), given, form, temperature)
            print(
                f"{name:12}{temperature:5.1f}"
                + "".join(f"{error:{w}.1e}" for error, w in zip(errors, (11, 11, 10), strict=True))
                + f"{form.token_bytes(chosen.width):9,}{read / step:11.2%}"
            )


def learned(chosen: argparse.Namespace) -> tuple[list[tuple[Any, Any]], Any, tuple[Any, Any]]:
    """(Turn, picture) of all phantoms, the tokenizer, and a student and a teacher that learnt them."""
    from transformers import AutoImageProcessor, AutoTokenizer

    from clinkd.data.boxes import to_qwen
    from clinkd.data.images import decode
    from clinkd.model.clinkd_qwen2vl import load_model
    from clinkd.model.presets import TinySize, write_new_model

    drawn = [draw(PhantomSpec(chosen.images), index) for index in range(chosen.images)]
    texts = [
        to_qwen(text) for _, record in drawn for turn in record.turns for text in (turn.question, turn.answer)
    ]
    size = TinySize(hidden=chosen.width, layers=3, heads=4, mlp=384, patch=14)
    with tempfile.TemporaryDirectory() as folder:
        path = write_new_model(texts, size, Path(folder), vocab_size=1024, seed=0)
        tokenizer, processor = (
            AutoTokenizer.from_pretrained(path),
            AutoImageProcessor.from_pretrained(path, backend="pil"),
        )
        models = (load_model(path), load_model(path))
    turns = [
        (turn, processor(images=[decode(image)], return_tensors="pt"))
        for image, record in drawn
        for turn in record.turns
    ]
    for model, steps in zip(models, (chosen.steps // 2, chosen.steps), strict=True):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for number in range(steps):
            first = number * 8 % (len(turns) - 8)
            batch, _, _ = collated(turns[first : first + 8], tokenizer)
            hidden = model.forward_hidden(**batch["inputs"])[:, :-1][batch["chosen"]]
            torch.nn.functional.cross_entropy(model.lm_head(hidden), batch["targets"]).backward()
            optimizer.step()
            optimizer.zero_grad()
    return turns, tokenizer, models


def collated(turns: list[tuple[Any, Any]], tokenizer: Any) -> tuple[dict[str, Any], list[str], list[int]]:
    pairs = [encode(tokenizer, turn.question, turn.answer, int(picture["image_grid_thw"].prod()) // 4)
             for turn, picture in turns]  # fmt: skip
    batch = collate(pairs, tokenizer.pad_token_id)
    labels = batch.pop("labels")[:, 1:]
    pictures = {
        name: torch.cat([picture[name] for _, picture in turns])
        for name in ("pixel_values", "image_grid_thw")
    }
    chosen = labels != -100
    found = {"inputs": batch | pictures, "chosen": chosen, "targets": labels[chosen]}
    return found, [f"t{number}#0" for number in range(len(turns))], chosen.sum(1).tolist()


def ours(student: Any, batch: dict[str, Any], states: Tensor, head: Tensor, temperature: float) -> None:
    """A student's step."""
    hidden = student.forward_hidden(**batch["inputs"])[:, :-1][batch["chosen"]]
    own = student.lm_head.weight
    distill_loss(hidden, own, batch["targets"], states, head, a=1.0, temperature=temperature).total.backward()
    student.zero_grad()


def compare(
    student: Any,
    batch: dict[str, Any],
    exact: Any,
    given: dict[str, Tensor],
    form: Form,
    temperature: float,
) -> tuple[float, ...]:
    """Errors of the divergence and of its gradients by the student's states and head."""
    with torch.no_grad():
        hidden = student.forward_hidden(**batch["inputs"])[:, :-1][batch["chosen"]]
    sides = []
    for cached in (False, True):
        mine, head = own = [
            hidden.clone().requires_grad_(), student.lm_head.weight.detach().clone().requires_grad_()
        ]  # fmt: skip
        targets = batch["targets"]
        how: dict[str, Any] = {"a": 1.0, "temperature": temperature}
        if not cached:
            loss = distill_loss(mine, head, targets, exact[0], exact[1], **how)
        elif form.name == "topk":
            tail = tail_at(given["tails"], temperature)
            loss = distill_loss_topk(
                mine,
                head,
                targets,
                given["top_logits"].float(),
                given["top_ids"].long(),
                tail,
                vocabulary=form.vocabulary or len(head),
                **how,
            )
        else:
            states = given["teacher_hidden"].float()
            loss = distill_loss(mine, head, targets, states, exact[1], **how)
        sides.append((loss.kd.detach(), *torch.autograd.grad(loss.kd, own)))
    return tuple(float((found - wanted).norm() / wanted.norm()) for wanted, found in zip(*sides, strict=True))


def median(run: Any, rounds: int) -> float:
    times = []
    for _ in range(rounds + 1):
        begun = time.perf_counter()
        run()
        times.append(time.perf_counter() - begun)
    return statistics.median(times[1:])


if __name__ == "__main__":
    main()
