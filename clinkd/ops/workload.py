"""How much there is to learn from: records, questions, tokens and bytes, and where each number comes from.

Decisions:
- Phantoms are drawn, a few of them, and counted; prepared data say by their manifest and a shard; of a source
  that is not prepared only what the user says is known, else the published data set's size is taken, and the
  plan says that it is assumed.
- Tokens of text are counted as the tokenizer's pieces (words, whole numbers, punctuation): no tokenizer is
  needed, and one made here spells all but rare numbers so.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from clinkd.config import RunConfig
from clinkd.data.codec import smart_resize
from clinkd.data.shards import DataError

DRAWN = 32
"""Phantoms that are drawn to count."""
LOOKED = 500
"""Records of prepared data whose text is counted."""
CHAT = 16
"""Tokens that a chat template adds around a question, a system prompt apart: measured on Qwen2-VL's."""
OWN_CHAT = 9
"""The same of the template of models made here."""
_PIECES = re.compile(r"\d+| ?[^\W\d]+|[^\w\s]+|\s+")
_BOX = re.compile(r"</?box>")

# Med-GRIT-270k (BiRD, Huang et al. 2024, arXiv:2406.18146), rounded: 240,000 questions to train on.
ASSUMED = {"records": 60_000, "questions": 240_000, "side": 512, "bytes": 150_000}


@dataclass(frozen=True)
class Workload:
    """What the training split holds.

    Args:
        records: images, in the training split and in all. turns: questions about one.
        height, width: of an image, pixels. text, answer: tokens of a prompt without its image and of an
            answer, mean; longest: of both together. image_bytes: of an encoded image. known: where it comes
            from.
    """

    records: int
    all_records: int
    turns: float
    height: int
    width: int
    text: float
    answer: float
    longest: int
    image_bytes: float
    known: str

    def groups(self, per_image: int) -> int:
        """Groups of an epoch, as the ledger deals them."""
        return max(1, round(self.records * -(-self.turns // per_image)))

    def grid(self, patch: int, merge: int, limits: tuple[int, int]) -> tuple[int, int, int]:
        """(frames, rows, columns) of an image's patches after the processor's resize."""
        high, wide = smart_resize(
            self.height, self.width, factor=patch * merge, min_pixels=limits[0], max_pixels=limits[1]
        )
        return 1, high // patch, wide // patch


def workload_of(config: RunConfig, records: int | None = None, questions: int | None = None) -> Workload:
    """Of the configured data.

    Args:
        records, questions: of the training split, where the user knows better.

    Raises:
        DataError: prepared data that cannot be read.
    """
    from clinkd.data.shards import MANIFEST

    source = config.data.source
    if source == "phantoms":
        found = _phantoms(config)
    elif _is_prepared(source, config.data.endpoint_url, MANIFEST):
        found = _prepared(source)
    else:
        found = _assumed(config)
    if records or questions:
        total = questions or round(found.turns * (records or found.records))
        count = records or found.records
        count = min(count, total)
        share = found.all_records / found.records
        found = replace(
            found, records=count, all_records=round(count * share), turns=total / count,
            known=f"{found.known}; records and questions as given",
        )  # fmt: skip
    return found


def pieces(text: str) -> int:
    """About the tokens of a text; a box's tags are one token each."""
    return len(_PIECES.findall(_BOX.sub("", text))) + len(_BOX.findall(text))


def _train_share(config: RunConfig) -> float:
    return 1 - config.data.test_fraction - config.data.validation_fraction


def _phantoms(config: RunConfig) -> Workload:
    from clinkd.data.phantoms import PhantomSpec, draw

    count, size = config.data.phantoms, config.data.phantom_size
    spec = PhantomSpec(count, size, config.run.seed)
    drawn = [draw(spec, index) for index in range(min(count, DRAWN))]
    texts = [(turn.question, turn.answer) for _, record in drawn for turn in record.turns]
    return _counted(
        texts, OWN_CHAT, records=max(1, round(count * _train_share(config))), all_records=count,
        turns=statistics.mean(len(record.turns) for _, record in drawn), height=size, width=size,
        image_bytes=statistics.mean(len(png) for png, _ in drawn),
        known=f"{len(drawn)} of the phantoms, drawn and counted",
    )  # fmt: skip


def _counted(texts: Sequence[tuple[str, str]], chat: int, **facts: Any) -> Workload:
    asked = [pieces(question) + chat for question, _ in texts]
    answered = [pieces(answer) + 1 for _, answer in texts]
    both = [one + other for one, other in zip(asked, answered, strict=True)]
    return Workload(text=statistics.mean(asked), answer=statistics.mean(answered), longest=max(both), **facts)


def _is_prepared(source: str, endpoint: str | None, manifest: str) -> bool:
    from clinkd import storage

    if "://" in source:
        storage.configure(endpoint)
    return storage.stamp(storage.locate(source) / manifest) is not None


def _prepared(source: str) -> Workload:
    """By the manifest's counts and the light columns of its first records."""
    from itertools import islice

    from clinkd import storage
    from clinkd.data.shards import LIGHT, SHARDS, iter_rows, read_manifest

    manifest = read_manifest(source)
    looked = list(islice(iter_rows(source, "train", columns=LIGHT), LOOKED))
    texts = [(turn["question"], turn["answer"]) for row in looked for turn in row["turns"]]
    if not texts:
        raise DataError(f"{source}: no training record in it; see its quarantine.jsonl")
    folder = storage.locate(source) / SHARDS
    stamps = [storage.stamp(folder / shard["name"]) or "0" for shard in manifest["shards"]]
    images = _images(manifest)
    questions = manifest["by_split"].get("train", manifest["records_out"])
    return _counted(
        texts, CHAT, records=images, all_records=manifest["images"], turns=questions / max(1, images),
        height=int(statistics.median(row["height"] for row in looked)),
        width=int(statistics.median(row["width"] for row in looked)),
        image_bytes=sum(int(stamp.partition(":")[0]) for stamp in stamps) / max(1, manifest["images"]),
        known=f"{source}/manifest.json, and the first {len(looked):,} records",
    )  # fmt: skip


def _images(manifest: dict[str, Any]) -> int:
    """Images of the training split."""
    counts = [by_split.get("train", 0) for by_split in manifest.get("images_by_modality", {}).values()]
    return sum(counts) or manifest["images"]


def _assumed(config: RunConfig) -> Workload:
    records = ASSUMED["records"]
    return Workload(
        records=records, all_records=round(records / _train_share(config)),
        turns=ASSUMED["questions"] / records, height=ASSUMED["side"], width=ASSUMED["side"],
        text=40, answer=40, longest=200, image_bytes=ASSUMED["bytes"],
        known=f"assumed, {config.data.source} is not prepared: Med-GRIT-270k's size, images of "
        f"{ASSUMED['side']} x {ASSUMED['side']}",
    )  # fmt: skip
