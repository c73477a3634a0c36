"""Exact checks beside the sentence similarity, which calls "left kidney" and "right kidney" 0.87 alike.

Decisions:
- A check says *conflict*, never *difference*: what one text leaves out contradicts nothing. Silence is the
  similarity's affair.
- Sides, numbers and antonyms are *mentions*: a value with the words it belongs to ("left" of "kidney"). Two
  mentions conflict when they speak of the same thing with other values; where a text has several ("opacity
  in the left lung, the right is clear") they are paired by the words around them, so that swapped sides are
  seen and a changed order is not mistaken for one.
- Negation follows NegEx's idea (Chapman et al., 2001): cues with a scope that ends at a verb or clause;
  only the head nouns of the scope are negated, so "no pleural effusion" does not negate "pleural
  thickening".
- English only; a text without words passes every check.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache

from clinkd.reflect.words import (
    LEVELS,
    MODALITY_WORDS,
    NUMBERS,
    PLACES,
    PREPOSITIONS,
    STOP,
    UNITS,
    VERBS,
    canonical,
    is_content,
    names_in,
    stem,
    tokens,
)

_BREAKS = frozenset(".,;:!?\n") | {"while", "whereas", "but", "however", "although", "though", "except"}
_SIDES = {"left": "left", "right": "right", "lefthand": "left", "righthand": "right"}
_ANTONYMS = {
    "normal": ("state", "normal"), "abnormal": ("state", "abnormal"),
    "benign": ("growth", "benign"), "malignant": ("growth", "malignant"),
}  # fmt: skip
_OPPOSITE = {"normal": "abnormal", "abnormal": "normal", "benign": "malignant", "malignant": "benign"}
_NEGATORS = frozenset(["no", "not", "without", "never", "neither", "nor", "non", "none"])
_NO_THING = PLACES | LEVELS | _NEGATORS | frozenset(_SIDES)
_GRADES = frozenset(["grade", "stage", "type", "class", "segment", "level", "phase", "zone"])
_CUES = re.compile(
    r"\b(?:(?:no|without) (?:\w+ )?(?:evidence|signs?|indications?|suggestions?|features?) (?:of|for)"
    r"|(?:absence|lack) of|free (?:of|from)|negative for|devoid of|(?:rules?|ruling) out|excludes|lacks)\b"
)
_ABSENT = re.compile(
    r"\b(?:not|no longer) (?:be )?(?:seen|present|identified|visible|visualized|evident|observed|detected"
    r"|found|noted|shown|demonstrated|appreciated|apparent|displayed)\b|\b(?:ruled out|excluded|lacking)\b"
)
_NOT_SIDES = re.compile(r"\b(?:from )?(?:left to right|right to left)\b")
_BOTH = re.compile(r"\b(?:left (?:and|or) (?:the )?right|right (?:and|or) (?:the )?left|bilaterally)\b")


@dataclass(frozen=True, slots=True)
class Mention:
    """A value ("left", "3") with the words it belongs to (none: to anything) and its clause's other words."""

    value: str
    head: frozenset[str]
    context: frozenset[str]
    doubled: bool = False  # one of the two sides that "bilateral" stands for


def laterality_conflict(truth: str, answer: str) -> bool:
    """The texts put the same thing on different sides, or one says both sides and the other one."""
    return _disagree(_sides(truth), _sides(answer))


def number_conflict(truth: str, answer: str) -> bool:
    """The texts give the same thing ("nodules", "L" of "L3", millimetres) different numbers."""
    return _disagree(_numbers(truth), _numbers(answer))


def negation_conflict(truth: str, answer: str) -> bool:
    """One text denies what the other states; also yes against no, and normal against abnormal."""
    first, second = _polarity(truth), _polarity(answer)
    if first.verdict and second.verdict and first.verdict != second.verdict:
        return True
    if any(
        one.denied - one.stated & other.stated - other.denied
        for one, other in ((first, second), (second, first))
    ):
        return True
    return any(_disagree(_antonyms(truth, axis), _antonyms(answer, axis)) for axis in ("state", "growth"))


def named_overlap(truth: str, answer: str) -> tuple[float, float] | None:
    """How far two texts name the same organs and findings.

    Returns:
        (shared / the smaller set, F1 of the two sets), in [0, 1]; None when either text names nothing.
    """
    first, second = names_in(truth), names_in(answer)
    if not first or not second:
        return None
    shared = len(first & second)
    return shared / min(len(first), len(second)), 2 * shared / (len(first) + len(second))


def modality_conflict(truth: str, answer: str) -> bool:
    """The texts name modalities, and none in common ("CT image", "fundus image")."""
    first, second = (
        {MODALITY_WORDS[word] for word in tokens(text) if word in MODALITY_WORDS} for text in (truth, answer)
    )
    return bool(first and second and not first & second)


def sides_of(text: str) -> frozenset[str]:
    """The sides ``text`` speaks of: "left", "right"; both for "bilateral"."""
    return frozenset(mention.value for mention in _sides(text))


def _clauses(words: Iterable[str]) -> Iterator[list[str]]:
    clause: list[str] = []
    for word in words:
        if word in _BREAKS:
            yield clause
            clause = []
        else:
            clause.append(word)
    yield clause


def _content(words: Iterable[str]) -> frozenset[str]:
    return frozenset(canonical(word) for word in words if is_content(word) and word not in _NO_THING)


def _head(clause: list[str], at: int) -> frozenset[str]:
    """What the word at ``at`` belongs to: nouns after it, else those before ("kidney on the left")."""
    after = at + 1
    while after < len(clause) and clause[after] in PLACES:
        after += 1
    if after < len(clause) and clause[after] == "of":  # "the left half of the liver"
        after += 2 if clause[after + 1 : after + 2] == ["the"] else 1
    phrase = _phrase(clause[after : after + 4])
    if phrase:
        return phrase
    before = at
    while before > 0 and (not is_content(clause[before - 1]) or clause[before - 1] in LEVELS | PLACES):
        before -= 1
    return _phrase(reversed(clause[max(0, before - 2) : before]))


def _phrase(words: Iterable[str]) -> frozenset[str]:
    found = []
    for word in words:
        if not is_content(word) or word in _SIDES or word == "bilateral" or word in NUMBERS:
            break
        found.append(word)
    return _content(found)


@lru_cache(maxsize=16384)
def _sides(text: str) -> tuple[Mention, ...]:
    mentions = []
    for clause in _clauses(_replaced(text, (_NOT_SIDES, " "), (_BOTH, "bilateral"))):
        for at, word in enumerate(clause):
            if word not in _SIDES and word not in ("bilateral", "both"):
                continue
            head = _head(clause, at)
            context = _content(clause) - head - {"bilateral"}
            if word in _SIDES:
                mentions.append(Mention(_SIDES[word], head, context))
            elif word == "bilateral" or head:
                mentions += [Mention(side, head, context, doubled=True) for side in ("left", "right")]
    return tuple(mentions)


@lru_cache(maxsize=16384)
def _numbers(text: str) -> tuple[Mention, ...]:
    mentions = []
    for clause in _clauses(tokens(text)):
        for at, word in enumerate(clause):
            value = float(word) if word[0].isdecimal() else NUMBERS.get(word)
            if value is None:
                continue
            before = clause[at - 1] if at else ""
            scale, head = _unit_or_noun(clause[at + 1 : at + 7])
            if word[0].isdecimal() and (
                before in _GRADES or (len(before) == 1 and before.isalpha() and before not in "ax")
            ):
                scale, head = 1.0, frozenset({before})  # "grade 3", "L3", "T2"
            if head or word[0].isdecimal():  # "one of them" counts nothing
                mentions.append(Mention(f"{value * scale:g}", head, _content(clause) - head - {word}))
    return tuple(mentions)


def _unit_or_noun(words: list[str]) -> tuple[float, frozenset[str]]:
    """(factor to millimetres, head) of a number: in "3 x 4 cm" both are centimetres."""
    rest = list(words)
    while rest and (rest[0] in ("x", "by", "×") or rest[0][0].isdecimal()):
        rest.pop(0)
    if rest and (unit := stem(rest[0])) in UNITS:
        return UNITS[unit], frozenset({"mm"})
    return 1.0, _content(["%"]) if rest[:1] == ["%"] else _phrase(rest[:2])


@lru_cache(maxsize=16384)
def _antonyms(text: str, axis: str) -> tuple[Mention, ...]:
    mentions = []
    for clause in _clauses(tokens(text)):
        for at, word in enumerate(clause):
            if word in _ANTONYMS and _ANTONYMS[word][0] == axis:
                value = _ANTONYMS[word][1]
                if "not" in clause[max(0, at - 2) : at]:
                    value = _OPPOSITE[value]
                head = _head(clause, at) - frozenset(_ANTONYMS)
                mentions.append(Mention(value, head, _content(clause) - head - frozenset(_ANTONYMS)))
    return tuple(mentions)


def _disagree(first: tuple[Mention, ...], second: tuple[Mention, ...]) -> bool:
    """Pairs mentions of one thing, most alike first (by the words around; a bonus for the same value)."""
    pairs = []
    for i, a in enumerate(first):
        for j, b in enumerate(second):
            if not a.head or not b.head or a.head & b.head:
                union = a.context | b.context
                alike = len(a.context & b.context) / len(union) if union else 1.0
                pairs.append((-(alike + 0.5 * (a.value == b.value)), a.value != b.value, i, j))
    left, right = set(range(len(first))), set(range(len(second)))
    for _, differ, i, j in sorted(pairs):
        if i in left and j in right:
            if differ:
                return True
            left.discard(i)
            right.discard(j)
    # A side of "bilateral" that is left over, while the other text does give the thing a side.
    return any((first[i].doubled and i in left) or (second[j].doubled and j in right) for *_, i, j in pairs)


@dataclass(frozen=True, slots=True)
class _Polarity:
    denied: frozenset[str]
    stated: frozenset[str]
    verdict: str  # a leading "yes" or "no", else ""


@lru_cache(maxsize=16384)
def _polarity(text: str) -> _Polarity:
    words = _replaced(text, (_CUES, "no"), (_ABSENT, "absent"))
    denied: set[str] = set()
    stated: set[str] = set()
    piece: list[str] = []
    for word in [*words, "."]:
        if word in _BREAKS and word != ",":
            _scan(piece, denied, stated)
            piece = []
        else:
            piece.append(word)
    verdict = words[0] if words[:1] in (["yes"], ["no"]) and words[1:2] in ([], ["."], [","]) else ""
    return _Polarity(frozenset(denied), frozenset(stated), verdict)


def _scan(piece: list[str], denied: set[str], stated: set[str]) -> None:
    scoped: set[int] = set()
    for at, word in enumerate(piece):
        if at in scoped:
            continue
        if word in _NEGATORS:
            start, end = _scope(piece, at)
        elif word == "absent":
            start = max((i + 1 for i in range(at) if piece[i] == ","), default=0)
            end = at
            if not any(is_content(other) for other in piece[start:end]):  # "an absent kidney"
                start, end = _scope(piece, at)
        else:
            continue
        scoped |= {*range(start, end), at}
        denied |= _heads(piece[start:end])
    stated |= _content(word for i, word in enumerate(piece) if i not in scoped)


def _scope(piece: list[str], at: int) -> tuple[int, int]:
    """The words a cue denies: up to a verb, but not into a joined clause that has a verb of its own."""
    start = at + 1
    if piece[at] == "non":
        return start, min(start + 1, len(piece))
    while start < len(piece) and piece[start] in VERBS:  # "does not show a mass"
        start += 1
    for end in range(start, len(piece)):
        if piece[end] in VERBS:
            return start, end
        if piece[end] in (",", "and") and _opens_clause(piece[end + 1 :]):
            return start, end
    return start, len(piece)


def _opens_clause(rest: list[str]) -> bool:
    """Whether what follows "," or "and" says something of its own; "…, or Z is seen" is still denied."""
    if rest[:1] in (["or"], ["nor"]):
        return False
    joined = next((k for k, word in enumerate(rest) if word in (",", "and")), len(rest))
    return rest[:1] in (["with"], ["there"], ["it"]) or any(word in VERBS for word in rest[:joined])


def _heads(words: list[str]) -> set[str]:
    """Last content word of every joined part before a preposition: "pleural effusion or air in the chest"."""
    heads, current, closed = set(), "", False
    for word in [*words, ","]:
        if word in (",", "and", "or", "nor"):
            if current:
                heads.add(current)
            current, closed = "", False
        elif word in PREPOSITIONS:
            closed = bool(current)
        elif not closed and word not in STOP and _content([word]):
            current = canonical(word)
    return heads


def _replaced(text: str, *rules: tuple[re.Pattern[str], str]) -> list[str]:
    joined = " ".join(tokens(text))
    for pattern, common in rules:
        joined = pattern.sub(common, joined)
    return joined.split()
