"""What the published scores do not see in an answer's words: whole words, left against right, presence
against absence.

Decisions:
- Boxes and special tokens are no words. A word is a run of letters and digits, lower-cased.
- Laterality is judged on "left kidney" against "right kidney" wherever the truth names a side with a thing;
  where it only names one side at all ("on the left"), on that. "From left to right" is reading order and
  "left of the image" is a place in the picture, neither is a side of the body.
- Negation is judged per answer by cue words: an answer errs when the truth denies something and it does not,
  or the other way round. Scope is not parsed.
"""

from __future__ import annotations

import re

_NOT_WORDS = re.compile(r"<box>.*?</box>|<\|[^|<>]*\|>|<[^<>\s]{1,20}>", re.S)
_WORD = re.compile(r"[^\W_]+")
_ORDER = re.compile(r"\b(?:left[\s-]+to[\s-]+right|right[\s-]+to[\s-]+left)\b")
_PLACE = re.compile(
    r"\b(?:(?:upper|lower|top|bottom|middle|central?)[\s-]+)?(?:left|right)\s+(?:(?:part|side|half)\s+)?"
    r"of the (?:image|picture|scan|frame|figure|photograph)\b"
)
_NEGATION = re.compile(
    r"\b(?:no|not|none|never|neither|nor|without|absent|absence|cannot|free of|negative for|fails? to)\b"
    r"|n['’]t\b"
)
_NOT_NEGATION = re.compile(r"\b(?:not only|no doubt|not necessarily|no change in)\b")
# Words after a side that are not the thing it belongs to.
_LINKS = frozenset(
    {"and", "or", "of", "in", "on", "at", "to", "is", "are", "was", "with", "the", "a", "an", "side", "sided"}
    | {"from", "by", "for", "as", "that", "which"}
)
_OTHER = {"left": "right", "right": "left"}


def plain(text: str) -> str:
    """Lower-cased, boxes and special tokens left out."""
    return _NOT_WORDS.sub(" ", text).lower()


def words(text: str) -> list[str]:
    return _WORD.findall(plain(text))


def whole_words(annotation: str, response: str) -> bool | None:
    """Whether every word of the annotation is a whole word of the response; None when it has no word."""
    wanted = set(words(annotation))
    return wanted <= set(words(response)) if wanted else None


def laterality_error(annotation: str, response: str) -> bool | None:
    """Whether the response puts a thing on the wrong side; None when the annotation names no one side."""
    truth, answer = _sides(annotation), _sides(response)
    things = {(side, thing) for side, thing in truth if thing and (_OTHER[side], thing) not in truth}
    sides = {side for side, _ in truth}
    if not things and len(sides) != 1:
        return None
    if any((_OTHER[side], thing) in answer and (side, thing) not in answer for side, thing in things):
        return True
    said = {side for side, _ in answer}
    return len(sides) == 1 and bool(said) and not sides & said


def _sides(text: str) -> set[tuple[str, str]]:
    """(side, the thing's name or "") for every left and right that is a side of the body."""
    found = words(_PLACE.sub(" ", _ORDER.sub(" ", plain(text))))
    pairs = zip(found, [*found[1:], ""], strict=False)
    return {
        (word, "" if after in _LINKS or after in _OTHER else after) for word, after in pairs if word in _OTHER
    }


def negated(text: str) -> bool:
    return _NEGATION.search(_NOT_NEGATION.sub(" ", plain(text))) is not None


def negation_error(annotation: str, response: str) -> bool | None:
    """Whether one of the two denies and the other does not; None when either says nothing in words."""
    if not words(annotation) or not words(response):
        return None
    return negated(annotation) != negated(response)
