"""The actor that asks the teacher: answers where wanted, and what it says at their tokens.

Decisions:
- Turns go through the teacher in batches of like length; an image passes the vision tower once, however many
  turns ask about it.
- An actor reads the records that it is given itself. A sample that the store knows costs its key alone. What
  is new becomes parts of ``PART_BYTES``, written by the actor: rows never pass through the driver.
- Turns whose truth the student may not see carry the teacher's own answer, the surest of ``best_of``
  (``pseudo``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clinkd import storage
from clinkd.data.lookup import Lookup
from clinkd.data.records import sample_id
from clinkd.distill.forms import Form
from clinkd.distill.pseudo import Candidate, choose, is_hidden
from clinkd.distill.teacher_cache import Part, Store, sample_key

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class LabelSpec:
    """What a labelling actor needs; travels by value."""

    model: str  # the teacher's Hugging Face folder
    root: str  # of the stores
    key: str  # of this one
    form: Form = field(default_factory=Form)
    batch_size: int = 64  # turns in one pass
    chunk_size: int = 1024
    max_new_tokens: int = 64
    best_of: int = 1
    temperature: float = 0.7  # of the candidates after the first
    threads: int = 1
    hidden_share: float = 0.0  # share of the turns whose true answers the student may not see
    seed: int = 0
    dtype: str = "float32"
    min_pixels: int | None = None
    max_pixels: int | None = None
    endpoint: str | None = None  # of an S3 that is not Amazon's

    def store(self) -> Store:
        return Store(self.root, self.key)


@dataclass
class _Turn:
    """A turn on its way through the teacher; ``row`` is its record's place in the batch."""

    sample: str
    row: int
    task: str
    question: str
    key: str
    answer: str | None  # None: the teacher's own
    prompt: list[int] = field(default_factory=list)


class Labeller:
    """One actor; see above."""

    def __init__(self, spec: LabelSpec) -> None:
        import torch
        from transformers import AutoTokenizer

        from clinkd.model.clinkd_qwen2vl import load_model
        from clinkd.model.pixels import load_processor

        torch.set_num_threads(spec.threads)
        self.spec = spec
        self.model: Any = load_model(spec.model, dtype=getattr(torch, spec.dtype))
        self.model = self.model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer = AutoTokenizer.from_pretrained(spec.model)
        self.processor = load_processor(spec.model, spec.min_pixels, spec.max_pixels)
        storage.configure(spec.endpoint)
        self.store = spec.store()
        if spec.form.name != "topk":
            self.store.keep_head(self.model.lm_head.weight)
        self.known = Lookup(self.store.known())
        self.passes = 0

    def tables(self, batches: Iterable[list[dict[str, Any]]]) -> Iterator[pa.Table]:
        """Records to a row for each sample: ``sample, task, key``; see ``data.pieces.Work``.

        ``new`` says whether the teacher was asked about it, ``passes`` (on the first row) how often it ran.
        """
        part = Part(self.store, self.spec.form.columns)
        found = [self._labelled(records, part) for records in batches]
        part.write()
        yield from found

    def _labelled(self, records: list[dict[str, Any]], part: Part) -> pa.Table:
        import pyarrow as pa

        from clinkd.data.images import encoded_images

        images = [encoded_images(record) for record in records]
        turns = [turn for row, record in enumerate(records) for turn in self._turns(record, row, images[row])]
        there = self.known.rows([turn.key for turn in turns]) >= 0
        new = {
            turn.key: turn
            for turn, known in zip(turns, there.tolist(), strict=True)
            if not known and turn.key not in part.keys
        }  # of twins one
        before = self.passes
        if new:
            part.add(self._label(list(new.values()), images))
        passes = [self.passes - before] + [0] * (len(turns) - 1)
        columns = {
            "sample": [turn.sample for turn in turns], "task": [turn.task for turn in turns],
            "key": [turn.key for turn in turns], "new": [turn.key in new for turn in turns],
            "passes": passes[: len(turns)],
        }  # fmt: skip
        kinds = [pa.string()] * 3 + [pa.bool_(), pa.int64()]
        return pa.table(
            {name: pa.array(values, kind)
             for (name, values), kind in zip(columns.items(), kinds, strict=True)}
        )  # fmt: skip

    def _turns(self, record: dict[str, Any], row: int, images: list[bytes]) -> list[_Turn]:
        asking = {name: getattr(self.spec, name) for name in ("best_of", "max_new_tokens")}
        if self.spec.best_of > 1:
            asking |= {"temperature": self.spec.temperature, "seed": self.spec.seed}
        found = []
        for number, turn in enumerate(record["turns"]):
            sample = sample_id(record["id"], number)
            hidden = not turn["trusted"] or is_hidden(sample, self.spec.hidden_share, self.spec.seed)
            # Its answer decides a row; the task only what is refused, and that only of the teacher's own.
            key = sample_key(
                images, turn["question"], asking | {"task": turn["task"]} if hidden else turn["answer"]
            )
            answer = None if hidden else turn["answer"]
            found.append(_Turn(sample, row, turn["task"], turn["question"], key, answer))
        return found

    def _label(self, turns: list[_Turn], images: list[list[bytes]]) -> list[dict[str, Any]]:
        """Rows of a part."""
        import torch

        with torch.inference_mode():
            seen = self._see(turns, images)
            for turn in turns:
                turn.prompt = self._encode(turn, seen, "")[0]
            asked = [turn for turn in turns if turn.answer is None]
            written = self._answers(asked, seen)
            told = [(turn, turn.answer, True) for turn in turns if turn.answer is not None]
            told += [(turn, text, ended) for turn, texts in zip(asked, written, strict=True)
                     for text, ended in texts]  # fmt: skip
            states = self._states([(turn, str(text)) for turn, text, _ in told], seen)
        found: dict[str, list[tuple[Candidate, dict[str, Any]]]] = {}
        for (turn, text, ended), row in zip(told, states, strict=True):
            candidate = Candidate(str(text), ended, row.pop("confidence"))
            found.setdefault(turn.key, []).append((candidate, row))
        return [self._row(turn, found[turn.key]) for turn in turns]

    def _row(self, turn: _Turn, found: list[tuple[Candidate, dict[str, Any]]]) -> dict[str, Any]:
        place, reason = (0, None)
        if turn.answer is None:
            place, reason = choose(turn.task, [candidate for candidate, _ in found])
        candidate, row = found[place]
        source = "truth" if turn.answer is not None else "teacher"
        row = row | {"key": turn.key, "answer": candidate.text, "source": source, "reason": reason}
        if reason is not None:  # nothing to learn from it
            row |= {"tokens": 0} | dict.fromkeys(self.spec.form.columns, b"")
        return row

    def _see(self, turns: list[_Turn], images: list[list[bytes]]) -> dict[int, tuple[Any, Any]]:
        """Of each record that is asked about: its images' grids [n, 3] and features [merged patches, H]."""
        import torch

        from clinkd.data.images import decode

        rows = list(dict.fromkeys(turn.row for turn in turns))
        found = [
            self.processor(images=[decode(png) for png in images[row]], return_tensors="pt") for row in rows
        ]
        seen = {}
        for at in range(0, len(rows), 16):
            part = found[at : at + 16]
            grids = [one["image_grid_thw"] for one in part]
            pixels = torch.cat([one["pixel_values"] for one in part]).to(self.model.device, self.model.dtype)
            parts = self.model.model.get_image_features(pixels, torch.cat(grids).to(self.model.device))
            self.passes += 1
            features = iter(parts.pooler_output)
            for row, grid in zip(rows[at : at + 16], grids, strict=True):
                seen[row] = (grid, torch.cat([next(features) for _ in grid]))
        return seen

    def _encode(self, turn: _Turn, seen: dict[int, Any], answer: str) -> tuple[list[int], list[int]]:
        from clinkd.model.chat import encode

        tokens = (seen[turn.row][0].prod(-1) // self.processor.merge_size**2).tolist()
        return encode(self.tokenizer, turn.question, answer, tokens)

    def _answers(self, turns: list[_Turn], seen: dict[int, Any]) -> list[list[tuple[str, bool]]]:
        """Of each turn the teacher's answers, the greedy one first, and whether each came to its end."""
        from clinkd.model.chat import decode_answer
        from clinkd.model.generate import generate_ids
        from clinkd.model.presets import IM_END

        end = self.tokenizer.convert_tokens_to_ids(IM_END)
        found: dict[int, list[list[int]]] = {place: [] for place in range(len(turns))}
        ways: list[dict[str, Any]] = [{}]
        if self.spec.best_of > 1:
            ways.append(
                {"do_sample": True, "temperature": self.spec.temperature, "seed": self.spec.seed,
                 "num_return_sequences": self.spec.best_of - 1}
            )  # fmt: skip
        for places in self._batches([len(turn.prompt) for turn in turns]):
            shown = _images([turns[place] for place in places], seen)
            prompts = [turns[place].prompt for place in places]
            for way in ways:
                written = generate_ids(
                    self.model, self.tokenizer, prompts, None, shown["image_grid_thw"], shown["image_index"],
                    image_features=shown["image_features"], max_new_tokens=self.spec.max_new_tokens, **way,
                )  # fmt: skip
                self.passes += 1
                for place, answers in zip(places, written, strict=True):
                    found[place] += answers
        return [[(decode_answer(self.tokenizer, ids), end in ids) for ids in found[place]] for place in found]

    def _states(self, told: list[tuple[_Turn, str]], seen: dict[int, Any]) -> list[dict[str, Any]]:
        """Of each answer: tokens, confidence, p1, margin, entropy and its form's columns."""
        from clinkd.model.chat import collate

        pairs = [self._encode(turn, seen, text) for turn, text in told]
        rows: list[dict[str, Any]] = [{}] * len(told)
        for places in self._batches([len(prompt) + len(answer) for prompt, answer in pairs]):
            batch = collate([pairs[place] for place in places], self.tokenizer.pad_token_id)
            shown = _images([told[place][0] for place in places], seen)
            for place, row in zip(places, self._pass(batch, shown), strict=True):
                rows[place] = row
        return rows

    def _pass(self, batch: dict[str, Any], shown: dict[str, Any]) -> list[dict[str, Any]]:
        from clinkd.distill.summary import confidence_margin, target_log_probabilities

        device, head = self.model.device, self.model.lm_head.weight
        self.passes += 1
        hidden = self.model.forward_hidden(
            input_ids=batch["input_ids"].to(device), attention_mask=batch["attention_mask"].to(device),
            **{name: value.to(device) for name, value in shown.items()},
        )[:, :-1]  # fmt: skip
        labels = batch["labels"][:, 1:].to(device)
        chosen = labels != -100
        states, size = hidden[chosen], self.spec.chunk_size
        sure = confidence_margin(states, head, chunk_size=size)
        said = target_log_probabilities(states, head, labels[chosen], chunk_size=size)
        kept, off = self.spec.form.pack(states, head, size)
        rows, first = [], 0
        for count in chosen.sum(1).tolist():
            span = slice(first, first := first + count)
            numbers = zip(("p1", "margin", "entropy"), sure, strict=True)
            rows.append(
                {name: values[span].tobytes() for name, values in kept.items()}
                | {name: float(values[span].mean()) for name, values in numbers}
                | {"tokens": count, "off": float(off[span].max()), "confidence": float(said[span].mean())}
            )
        return rows

    def _batches(self, lengths: list[int]) -> list[list[int]]:
        """Places in batches of like length."""
        places = sorted(range(len(lengths)), key=lambda place: lengths[place])
        size = self.spec.batch_size
        return [places[at : at + size] for at in range(0, len(places), size)]


def _images(turns: list[_Turn], seen: dict[int, tuple[Any, Any]]) -> dict[str, Any]:
    """The distinct images of some turns, and which of them each turn shows, turn after turn."""
    import torch

    rows = list(dict.fromkeys(turn.row for turn in turns))
    sizes = [len(seen[row][0]) for row in rows]
    own = dict(zip(rows, torch.arange(sum(sizes)).split(sizes), strict=True))
    return {
        "image_features": torch.cat([seen[row][1] for row in rows]),
        "image_grid_thw": torch.cat([seen[row][0] for row in rows]),
        "image_index": torch.cat([own[turn.row] for turn in turns]),
    }


def answer_tokens(model: Path, texts: list[str]) -> int:
    """Tokens of some answers, their ends among them."""
    from transformers import AutoTokenizer

    from clinkd.model.chat import encode

    tokenizer = AutoTokenizer.from_pretrained(model)
    return sum(len(encode(tokenizer, "", text, 1)[1]) for text in texts)
