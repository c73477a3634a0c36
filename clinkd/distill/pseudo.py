"""Pseudo-labels: which of the teacher's answers the student may learn from.

Decisions:
- Of several candidates the one that passes and of which the teacher is surest wins; the first at a draw, and
  the greedy answer is the first.
- An answer that never ended was cut off at the limit: what is missing cannot be judged.
- A grounding question without a box that can be read would teach to talk instead of to point.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

REASONS = {
    "too_long": "the answer had not ended after max_new_tokens",
    "empty": "nothing was said",
    "no_box": "a grounding question was answered without a box that can be read",
}


class Candidate(NamedTuple):
    """An answer of the teacher.

    Args:
        text: boxes as ``<box>``. ended: whether it came to its end token.
        confidence: mean log-probability of its tokens under the teacher.
    """

    text: str
    ended: bool
    confidence: float


def is_hidden(sample: str, share: float, seed: int) -> bool:
    """Whether the student may not see this sample's true answer; a pure function of its name."""
    digest = hashlib.sha256(f"{seed}:{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < share


def fault(task: str, candidate: Candidate) -> str | None:
    """Why an answer is no pseudo-label, one of ``REASONS``; None where it is one."""
    from clinkd.data.boxes import parse_boxes

    if not candidate.ended:
        return "too_long"
    if not candidate.text.strip():
        return "empty"
    if task == "vg" and not any(parse_boxes(candidate.text, strict=False)):
        return "no_box"
    return None


def choose(task: str, candidates: Sequence[Candidate]) -> tuple[int, str | None]:
    """The place of the answer to keep, and why it cannot be learned from (None: it can).

    Raises:
        ValueError: no candidate.
    """
    if not candidates:
        raise ValueError("pseudo-labels: no candidate")
    faults = [fault(task, candidate) for candidate in candidates]
    good = [place for place, wrong in enumerate(faults) if wrong is None]
    among = good or range(len(candidates))
    best = max(among, key=lambda place: (candidates[place].confidence, -place))
    return best, faults[best]
