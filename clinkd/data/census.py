"""What only one who has seen every part can decide: repeated names and ids, leaks, sides, and the counts.

Decisions:
- Of an image only what is needed stays in memory: 16-byte digests of name, path and id, its case's number,
  its hash's 32 bytes. Millions of images fit into one driver.
- Parts are taken in their order, whichever was ready first: the first of two that claim a name keeps it.
- Cases that share an image, or hold near-duplicates of each other's images, form one group; a group goes to
  one side whole. No row is lost to the leak check.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from clinkd.data import split
from clinkd.data.fingerprint import NEAR, near_pairs
from clinkd.data.parts import Tally
from clinkd.data.records import MODALITIES, TASKS
from clinkd.data.validate import RowError


@dataclass
class _Part:
    number: int
    dropped: list[int] = field(default_factory=list)  # places of repeated rows
    cases: list[int] = field(default_factory=list)  # of each kept record
    modalities: list[int] = field(default_factory=list)
    tasks: list[list[int]] = field(default_factory=list)  # samples of each task, of each kept record


class Census:
    """All parts' light facts, told in the parts' order; what is refused here goes to ``tally``."""

    def __init__(self, tally: Tally) -> None:
        self.tally = tally
        self.parts: list[_Part] = []
        self.by_reason: Counter[str] = Counter()
        self.rows = self.duplicates = self.targets = self.refused_masks = 0
        self._paths: dict[bytes, bytes] = {}  # image name -> path
        self._ids: set[bytes] = set()
        self._cases: dict[str, int] = {}
        self._of_case: list[set[str]] = []  # modalities
        self._shared: list[tuple[int, int]] = []  # cases of one record
        self._hashes: list[bytes] = []
        self._hash_cases: list[int] = []
        self.flat = self.pictures = 0

    @property
    def records(self) -> int:
        return sum(len(part.cases) for part in self.parts)

    def add(self, fact: dict[str, Any]) -> None:
        part = _Part(fact["part"])
        self.rows += fact["rows"]
        self.duplicates += fact["duplicates"]
        self.refused_masks += fact["refused_masks"]
        self.by_reason.update(fact["by_reason"])
        for place, record in enumerate(fact["records"]):
            code = self._repeated(record)
            if code:
                part.dropped.append(place)
                self._refuse(code, record)
            else:
                self._keep(part, record)
        self.parts.append(part)

    def _repeated(self, record: dict[str, Any]) -> str:
        """Why a record cannot stay beside earlier ones, or ""; claims its names and id where it can.

        Only now, among images that passed: a broken row must not take the place of a good one.
        """
        key, claims = _digest(record["id"]), {}
        code = "duplicate_id" if key in self._ids else ""
        for name, path, *_ in record["pictures"]:
            here = _digest(path)
            if self._paths.get(_digest(name), here) != here:
                code = "ambiguous_image"
            claims[_digest(name)] = here
        if not code:
            self._ids.add(key)
            self._paths |= claims
        return code

    def _refuse(self, code: str, record: dict[str, Any]) -> None:
        image = record["pictures"][0][0]
        error = RowError(code, f"{image[:120]!r}, id {record['id'][:120]!r}")
        for mask in record["masks"] or [None] * sum(record["tasks"].values()):
            self.tally.refuse(error, where=record["where"], id=record["id"], image=image, mask=mask)

    def _keep(self, part: _Part, record: dict[str, Any]) -> None:
        cases = []
        for _, _, modality, case, fingerprint in record["pictures"]:
            number = self._cases.setdefault(case, len(self._cases))
            if number == len(self._of_case):
                self._of_case.append(set())
            self._of_case[number].add(modality)
            cases.append(number)
            self.pictures += 1
            if fingerprint is None:
                self.flat += 1
            else:
                self._hashes.append(bytes.fromhex(fingerprint))
                self._hash_cases.append(number)
        self._shared.extend((cases[0], other) for other in cases[1:] if other != cases[0])
        part.cases.append(cases[0])
        part.modalities.append(MODALITIES.index(record["pictures"][0][2]))
        part.tasks.append([record["tasks"].get(task, 0) for task in TASKS])
        self.targets += len(record["masks"])

    def settle(self, seed: int, test_fraction: float, validation_fraction: float = 0.0) -> None:
        """Finds the leaks and gives every case its side."""
        near, pairs = self._near()
        groups = split.groups(len(self._cases), [*self._shared, *near])
        names = sorted(self._cases, key=self._cases.__getitem__)
        members: dict[str, set[str]] = {}
        first: dict[int, str] = {}
        for number, group in enumerate(groups):
            first[group] = min(first.get(group, names[number]), names[number])
        for number, group in enumerate(groups):
            members.setdefault(first[group], set()).update(self._of_case[number])
        sides = split.assign(
            members, seed=seed, test_fraction=test_fraction, validation_fraction=validation_fraction
        )
        self.sides = [sides[first[group]] for group in groups]
        sizes = Counter(groups)
        self.leaks = {
            "hash": f"phash {NEAR}/256",
            "near_duplicates": pairs,
            "joined_cases": sum(size for size in sizes.values() if size > 1),
            "largest_group": max(sizes.values(), default=0),
            "without_content": self.flat,
        }

    def _near(self) -> tuple[list[tuple[int, int]], int]:
        """Pairs of different cases with near-duplicate images, and the number of such pairs of images."""
        if not self._hashes:
            return [], 0
        hashes = np.frombuffer(b"".join(self._hashes), np.uint8).reshape(len(self._hashes), -1)
        cases = np.array(self._hash_cases)
        pairs = cases[near_pairs(hashes)]
        pairs = pairs[pairs[:, 0] != pairs[:, 1]]
        return [(int(a), int(b)) for a, b in np.unique(pairs, axis=0)], len(pairs)

    def sides_of(self, part: _Part) -> list[str]:
        return [self.sides[case] for case in part.cases]

    def counts(self) -> dict[str, Any]:
        """The manifest's counts of what stays."""
        by_task, by_modality, by_split = Counter(dict.fromkeys(TASKS, 0)), Counter[str](), Counter[str]()
        table: dict[str, Counter[str]] = {}
        for part in self.parts:
            for case, modality, tasks in zip(part.cases, part.modalities, part.tasks, strict=True):
                name, side, samples = MODALITIES[modality], self.sides[case], sum(tasks)
                by_task.update(dict(zip(TASKS, tasks, strict=True)))
                by_modality[name] += samples
                by_split[side] += samples
                table.setdefault(name, Counter(train=0, test=0))[side] += 1
        return {
            "by_task": dict(by_task),
            "by_modality": dict(sorted(by_modality.items())),
            "by_split": {
                side: by_split[side] for side in split.SIDES if side != "validation" or by_split[side]
            },
            "images_by_modality": {name: dict(table[name]) for name in sorted(table)},
        }


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
