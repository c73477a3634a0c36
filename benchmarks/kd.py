"""The two sides of the distillation benchmarks (distill.py, distill_growth.py): one step each.

Ours: the trunk's hidden states at the answer tokens, the teacher's from a cache (float16, read in every
step), ``distill_loss``. The full-logit side: what ClinKD's README writes down, a teacher's forward pass in
every step, whole logits of both models, both softmaxes and the divergence at all positions. Its temporaries
are dropped as soon as they can be, and the teacher's softmax is taken once, which the published code does
not do: it needs about three [B, L, V] buffers fewer than theirs.

Models are text-only Qwen2-VLs with random weights, heads of width 64, MLPs of four times the width, and
tied heads (as Qwen2-VL 2B, whose vocabulary of 151,936 is the default). A step ends with the gradients of
all of the student's weights but the vision tower's, which sees nothing here; there is no optimiser.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional

from clinkd.config import DistillSection
from clinkd.distill.forms import Form
from clinkd.distill.losses import DistillLoss, distill_loss
from clinkd.distill.teacher_cache import Store, TeacherCache, write_index

IGNORED = -100
LAYERS, STUDENT, TEACHER = 2, 256, 512  # widths
A, TEMPERATURE = 0.5, 0.5
CHUNK = DistillSection().chunk_size
BUFFERS = 8  # [B, L, V] of float32 that the full-logit step holds at its peak


@dataclass(frozen=True)
class Size:
    batch: int = 2
    length: int = 1024
    answers: int = 64  # the last tokens of each sequence
    vocabulary: int = 151_936
    device: str = "cpu"

    @property
    def full_gib(self) -> float:
        """What the full-logit step takes beside the models, about."""
        return BUFFERS * self.batch * self.length * self.vocabulary * 4 / 2**30

    def tokens(self) -> tuple[Tensor, Tensor]:
        """Token ids and labels [B, L]; labels are the ids themselves at answer tokens, else -100."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(self.vocabulary - 8, (self.batch, self.length), generator=generator)
        labels = ids.clone()
        labels[:, : self.length - self.answers] = IGNORED
        return ids.to(self.device), labels.to(self.device)


def new_model(size: Size, width: int) -> Any:
    """A trunk and a head; weights start wide enough for the two models to disagree."""
    from transformers import Qwen2VLConfig

    from clinkd.model import clinkd_qwen2vl
    from clinkd.model.rope import RopeGuidance

    special = [size.vocabulary - 1 - number for number in range(4)]
    config_class: Any = Qwen2VLConfig
    config = config_class(
        text_config={
            "vocab_size": size.vocabulary, "hidden_size": width, "intermediate_size": 4 * width,
            "num_hidden_layers": LAYERS, "num_attention_heads": width // 64,
            "num_key_value_heads": width // 64, "initializer_range": 0.06, "bos_token_id": None,
            "eos_token_id": None, "pad_token_id": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]},
        },
        vision_config={"depth": 1, "embed_dim": 32, "hidden_size": width, "num_heads": 2},
        image_token_id=special[0], video_token_id=special[1], vision_start_token_id=special[2],
        vision_end_token_id=special[3], tie_word_embeddings=True, initializer_range=0.06,
    )  # fmt: skip
    torch.manual_seed(width)
    model: Any = clinkd_qwen2vl.new_model(config, RopeGuidance())
    model = model.to(size.device)
    model.model.visual.requires_grad_(False)
    return model


def new_teacher(size: Size) -> Any:
    return new_model(size, TEACHER).eval().requires_grad_(False)


def answer_rows(size: Size) -> tuple[Tensor, Tensor]:
    """Which positions predict an answer token [B, L - 1], and those tokens [N]."""
    labels = size.tokens()[1][:, 1:]
    chosen = labels != IGNORED
    return chosen, labels[chosen]


def states(model: Any, ids: Tensor, chosen: Tensor) -> Tensor:
    """Last hidden states [N, H] at the chosen positions."""
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
    return hidden[:, :-1][chosen]


def write_cache(size: Size, teacher: Any, out: Path) -> Path:
    """The teacher asked once, in the form of the stage label: a sample is a sequence."""
    ids, (chosen, _) = size.tokens()[0], answer_rows(size)
    with torch.inference_mode():
        found = states(teacher, ids, chosen).cpu()
    names = [str(row) for row in range(size.batch)]
    head = teacher.lm_head.weight.detach().cpu()
    out.mkdir(parents=True)
    keep(out, Form(), names, chosen.sum(1).tolist(), found, head)
    return out


def keep(
    folder: Path, form: Form, names: list[str], counts: list[int], states: Tensor, head: Tensor
) -> TeacherCache:
    """A store with a row for each name, as ``label`` writes it; ``states`` [tokens, Ht] row after row."""
    store, columns, first, rows = Store(folder, "store"), form.pack(states, head)[0], 0, []
    light: dict[str, Any] = {"answer": "", "source": "truth", "reason": None}
    light |= {"p1": 1.0, "margin": 1.0, "entropy": 0.0, "off": 0.0}
    for name, count in zip(names, counts, strict=True):
        own = {column: values[first : first + count].tobytes() for column, values in columns.items()}
        rows.append(light | {"key": name, "tokens": count} | own)
        first += count
    store.open({})
    if form.name != "topk":
        store.keep_head(head)
    store.write(rows, form.columns)
    write_index(folder, pa.table({"sample": names, "task": ["rc"] * len(names), "key": names}), store, form)
    return TeacherCache(folder)


def our_step(size: Size, student: Any, cache: Path, chunk: int = CHUNK) -> Callable[[], DistillLoss]:
    """One step from the cache that stands in ``cache``; its head is in memory, as in a training worker."""
    opened = TeacherCache(cache)
    assert opened.head is not None
    names = [str(row) for row in range(size.batch)]
    head = opened.head.to(size.device, copy=True)  # a copy is no longer pages of a file, yet to be read
    ids, (chosen, targets) = size.tokens()[0], answer_rows(size)

    def step() -> DistillLoss:
        student.zero_grad()
        taught = opened.read(names)["teacher_hidden"].to(size.device, torch.float32)
        hidden = states(student, ids, chosen)
        loss = distill_loss(
            hidden, student.lm_head.weight, targets, taught, head, a=A, temperature=TEMPERATURE,
            chunk_size=chunk,
        )  # fmt: skip
        loss.total.backward()
        return loss

    return step


def full_step(size: Size, student: Any, teacher: Any) -> Callable[[], Tensor]:
    """One step of the published trainer; its KL is masked by labels that were not shifted, as theirs is."""
    ids, labels = size.tokens()

    def step() -> Tensor:
        student.zero_grad()
        outputs = student(input_ids=ids, labels=labels, use_cache=False)
        with torch.no_grad():
            taught = teacher(input_ids=ids, use_cache=False).logits
            log_p = (taught / TEMPERATURE).log_softmax(-1)
        log_q = (outputs.logits / TEMPERATURE).log_softmax(-1)
        each = (log_p.exp() * (log_p - log_q)).sum(-1)
        del log_p, log_q
        kd = each[labels != IGNORED].mean()
        loss = (A * kd + outputs.loss) / (1 + A)
        loss.backward()
        return loss

    return step


def aligned_loss(size: Size, student: Any, teacher: Any) -> DistillLoss:
    """From whole logits of a teacher asked online; KL and CE both where answer tokens are predicted."""
    ids, (chosen, targets) = size.tokens()[0], answer_rows(size)
    logits = student(input_ids=ids, use_cache=False).logits[:, :-1][chosen]
    with torch.no_grad():
        log_p = (teacher(input_ids=ids, use_cache=False).logits[:, :-1][chosen] / TEMPERATURE).log_softmax(-1)
    kd = (log_p.exp() * (log_p - (logits / TEMPERATURE).log_softmax(-1))).sum(-1).mean()
    ce = functional.cross_entropy(logits, targets)
    return DistillLoss((A * kd + ce) / (1 + A), kd, ce)


def loss_error(found: DistillLoss, wanted: DistillLoss) -> float:
    """The largest relative difference of total, KD and CE."""
    pairs = zip(found, wanted, strict=True)
    return max(abs(one.item() - other.item()) / abs(other.item()) for one, other in pairs)


def measured(sides: dict[str, Callable[[], Any]], rounds: int, device: str) -> dict[str, tuple[float, float]]:
    """Median seconds of each side, by the clock and of CPU; sides alternate, the first round is dropped."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, side in sides.items():
            start, used = time.perf_counter(), time.process_time()
            side()
            if device != "cpu":
                torch.cuda.synchronize()
            if turn:
                times[name].append((time.perf_counter() - start, time.process_time() - used))
    return {name: median(found) for name, found in times.items()}


def median(pairs: list[tuple[float, float]]) -> tuple[float, float]:
    """Of clock and CPU seconds, each for itself."""
    clock, cpu = zip(*pairs, strict=True)
    return statistics.median(clock), statistics.median(cpu)


def need_memory(gib: float) -> None:
    """Raises SystemExit where the machine has less than that to give: it would kill somebody's process."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) / 2**20
    if free < gib:
        raise SystemExit(f"the full-logit side takes about {gib:.1f} GiB, {free:.1f} GiB are free")
