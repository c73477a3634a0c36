"""What rounds of reflection came to, from the stage's account (``rounds.json``), as rows for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clinkd.data.records import MODALITIES
from clinkd.report.tables import mapping, number

Account = Mapping[str, Any]


def outcomes(reflection: Account) -> list[dict[str, Any]]:
    """A row a round: errors before and after on its own questions, what was fixed and broke, validation."""
    rows = [
        {"round": None, "kept": reflection.get("kept") == 0, "validation": _rate(reflection.get("before"))}
    ]
    for at, facts in enumerate(_rounds(reflection), 1):
        before, after = mapping(facts.get("before")), mapping(facts.get("after"))
        rows.append(
            {
                "round": at, "asked": number(before.get("answered")), "before": _rate(before),
                "after": _rate(after), "fixed": number(after.get("fixed")),
                "broke": number(after.get("broke")), "corrected": number(facts.get("corrected")),
                "chosen": number(facts.get("from_candidates")),
                "generated": sum(int(number(n) or 0) for n in mapping(facts.get("generated")).values()),
                "validation": _rate(facts.get("validation")), "kept": reflection.get("kept") == at,
            }
        )  # fmt: skip
    return rows if len(rows) > 1 else []


def by_reason(reflection: Account) -> list[dict[str, Any]]:
    """A row a reason: its share of the answers to the validation split before the first round and after each.

    Where nothing was validated: of each round's own questions, before it.
    """
    measured = [mapping(reflection.get("before"))]
    measured += [mapping(facts.get("validation")) for facts in _rounds(reflection)]
    if not number(measured[0].get("answered")):
        measured = [mapping(facts.get("before")) for facts in _rounds(reflection)]
    names = sorted({str(name) for part in measured for name in mapping(part.get("reasons"))})
    return [
        {"reason": name, "rates": [_share(part, name) for part in measured]}
        for name in [*names, *(["all"] if names else [])]
    ]


def by_group(reflection: Account) -> list[dict[str, Any]]:
    """A row a round and task, then modality: errors before and after on the round's questions."""
    rows = []
    for at, facts in enumerate(_rounds(reflection), 1):
        before, after = mapping(facts.get("before")), mapping(facts.get("after"))
        for kind in ("by_task", "by_modality"):
            for name, part in sorted(mapping(after.get(kind)).items(), key=lambda item: _order(item[0])):
                was = mapping(mapping(before.get(kind)).get(name))
                rows.append(
                    {"round": at, "group": str(name), "asked": number(part.get("answered")),
                     "before": _rate(was), "after": _rate(part), "fixed": number(part.get("fixed")),
                     "broke": number(part.get("broke"))}
                )  # fmt: skip
    return rows


def _rounds(reflection: Account) -> Sequence[Mapping[str, Any]]:
    found = reflection.get("rounds")
    return [mapping(item) for item in found] if isinstance(found, list) else []


def _rate(part: Any) -> float | None:
    return number(mapping(part).get("error_rate"))


def _share(part: Mapping[str, Any], reason: str) -> float | None:
    if reason == "all":
        return _rate(part)
    answered = number(part.get("answered"))
    return (number(mapping(part.get("reasons")).get(reason)) or 0.0) / answered if answered else None


def _order(name: object) -> tuple[int, str]:
    known = list(MODALITIES)
    return (known.index(str(name)) if name in known else -1, str(name))
