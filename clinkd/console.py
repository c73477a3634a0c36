"""What the commands print about data and scores, as text."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def account(manifest: dict[str, Any]) -> str:
    """The manifest in a few lines: what came in, what was refused and why."""
    split = manifest["by_split"]
    lines = [
        f"{manifest['records_in']} question/answer pairs read: {manifest['records_out']} kept on "
        f"{manifest['images']} images, {manifest['quarantined']} quarantined, "
        f"{manifest['duplicates']} duplicates",
        "tasks: " + ", ".join(f"{name} {count}" for name, count in manifest["by_task"].items()),
        "modalities: " + ", ".join(f"{name} {count}" for name, count in manifest["by_modality"].items()),
        "split: " + ", ".join(f"{count} {side}" for side, count in split.items()),
    ]
    if manifest["by_reason"]:
        lines.append(
            "refused: " + ", ".join(f"{name} {count}" for name, count in manifest["by_reason"].items())
        )
    return "\n".join(lines)


def first_of_each(quarantine: Path) -> Iterator[dict[str, Any]]:
    seen = set()
    with quarantine.open(encoding="utf-8") as file:
        for line in file:
            row = json.loads(line)
            if row["reason"] not in seen:
                seen.add(row["reason"])
                yield row


def table(result: dict[str, Any]) -> str:
    """Scores by modality, the mean below, then what was left out."""
    names = list(dict.fromkeys(name for row in result["modalities"].values() for name in row))
    rows = [["", *names]]
    for label, row in [*result["modalities"].items(), ("mean", result["mean"])]:
        rows.append([label, *(_cell(row.get(name)) for name in names)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    lines.append(f"{result['rows']} rows read")
    if result["skipped"]:
        lines.append("skipped: " + ", ".join(f"{name} {count}" for name, count in result["skipped"].items()))
    reasons = (result.get(key) for key in ("text_reason", "meteor_reason", "spice_reason"))
    return "\n".join([*lines, *dict.fromkeys(reason for reason in reasons if reason)])


def certificate(found: dict[str, Any]) -> str:
    """A loss certificate: what was held against the oracle, how far it was off, what is allowed."""
    lines = ["loss: " + ", ".join(f"{name} {value}" for name, value in found["loss"].items())]
    for kind in ("value", "gradient"):
        error, room = found[f"max_{kind}_error"], found[f"{kind}_tolerance"]
        lines.append(f"{kind}: off by {error:.1e} at most, {room:.1e} allowed (relative)")
    lines.append(f"self-teacher: KD {found['self_teacher_kd']:.1e}")
    lines += found["failures"]
    return "\n".join([*lines, f"{found['cases']} cases: {'certified' if found['ok'] else 'FAILED'}"])


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4f}"
    return "-" if value is None else str(value)


def comparison(result: dict[str, Any]) -> str:
    """Of each task and metric: both sides, their difference with its interval, and p."""
    lines = [f"{'metric':26}{'first':>9}{'second':>9}{'difference':>12}{'95% interval':>20}{'p':>9}"]
    for task, metrics in result["tasks"].items():
        left = f", {result['left_out'][task]} left out" if result["left_out"][task] else ""
        lines.append(f"{task} ({result['rows'][task]} questions in common{left})")
        for name, found in metrics.items():
            if found["difference"] is None:
                lines.append(f"  {name:24}{'nothing to measure':>18}")
                continue
            span = "" if found["low"] is None else f"{found['low']:+.4f} {found['high']:+.4f}"
            sure = "" if found["p"] is None else f"{found['p']:.4f}"
            lines.append(
                f"  {name:24}{found['first']:9.4f}{found['second']:9.4f}{found['difference']:+12.4f}"
                f"{span:>20}{sure:>9}"
            )
    return "\n".join(lines)
