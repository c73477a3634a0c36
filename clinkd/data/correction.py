"""What the corrector is told, and exercises for a corrector that is trained here.

Decisions:
- What stays the same from round to round (question, truth) comes first, what changes last, so that a prefix
  behind the image can be shared.
- Boxes of question and truth stay as they are; the wrong answer may be anything the model produced, so
  control tokens are taken out (one of them would end the corrector's turn) and a loop is cut short.
- The instructions hold no tag themselves: every ``<box>`` of the prompt is a box.
- A good correction keeps the truth and adds what helps to see it. What follows from a truth's box alone is
  the part of the image it lies in, so that is what an exercise asks a small corrector to add. Not to a
  classification: its answer is a name, and a student that learns to say more there names worse.
"""

from __future__ import annotations

import re

from clinkd.data.boxes import from_qwen, parse_boxes
from clinkd.data.templates import place

MAX_WRONG = 400  # characters of the wrong answer that are shown

_SPECIAL = re.compile(r"<\|[^|<>]*\|>|</?img>")
_SPAN = re.compile(r"(<box>[^<>]*</box>)")
_TAG = re.compile(r"</?box>")


def correction_prompt(question: str, truth: str, wrong: str) -> str:
    """The text beside the image for one correction; boxes as ``<box>`` spans (see ``to_qwen``)."""
    return (
        f"{question.strip()}\n"
        f"What is true: {truth.strip()}\n"
        f"A wrong first answer: {_shown(wrong)}\n"
        "Look at the image and answer the question in full, in your own words. Keep the facts, sides and "
        "coordinates of what is true, and do not mention the first answer."
    )


def elaborated(task: str, truth: str) -> str | None:
    """A grounding's ``truth`` with the part of the image its one box lies in; None where nothing is added."""
    boxes = parse_boxes(truth, strict=False)
    if task != "vg" or len(boxes) != 1:
        return None
    where = f"the {place(boxes[0])} of the image"
    return None if where in truth else f"In {where}: {truth.strip()}"


def _shown(wrong: str) -> str:
    """The wrong answer on one line: whole boxes only, at most ``MAX_WRONG`` characters."""
    text = " ".join(_SPECIAL.sub(" ", from_qwen(wrong)).split())
    shown = ""
    for index, part in enumerate(_SPAN.split(text)):  # words and boxes by turns
        room = MAX_WRONG - len(shown)
        if index % 2 == 0:
            part = _TAG.sub("", part)
        if len(part) > room:
            return (shown + ("" if index % 2 else part[:room])).rstrip() + " …"
        shown += part
    return shown.strip() or "(none)"
