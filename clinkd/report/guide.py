"""Where the guide looks, and where the image's patches stand because of it.

Decisions:
- One real sample's sequence is drawn under plain M-RoPE, the released code and the run's own setting. Only
  the text nearest to the image is shown: a long question would leave the gaps no room.
- Only a run guided by patches has that spacing in its model. Any other shows what patch guidance would do at
  its own γ (1 where it has none), and says so.
- A sample's scores that are missing or malformed count as not kept; nothing here raises for them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from markupsafe import Markup

from clinkd.data.regions import without_boxes
from clinkd.data.scores import regrid
from clinkd.report import plots
from clinkd.report.gallery import clip
from clinkd.report.overlays import Budget, ImageError, heat_map
from clinkd.report.positions import PLAIN, RELEASED, Guidance, lay_out, line_means, offsets
from clinkd.report.tables import number

MOST_LOOKS = 6
MOST_PATCHES = 20_000  # of an image; what claims more is no grid of ours
MOST_TEXT = 1_000_000  # tokens
LIKE_NONE = 0.01  # steps that differ by less than this share of α look even


@dataclass(frozen=True)
class Look:
    """One question about one image, and what the guide says of it. None: not kept.

    Args:
        heat: [rows, columns] relevance on the guide's own grid.
        merged: rows and columns of the answering model's merged patches.
        relevance: [merged patches], as the model is given it.
        text: tokens before and after the image.
    """

    sample: str
    image: str
    question: str
    task: str
    alignment: float | None
    heat: np.ndarray | None
    merged: tuple[int, int] | None
    relevance: np.ndarray | None
    text: tuple[int, int] | None


INVENTED = Look("", "", "", "", None, None, (5, 5), None, (5, 5))


def looks(rows: Iterable[Any]) -> list[Look]:
    """The rows of ``ReportInputs.guide_samples`` as far as they can be read."""
    return [_look(row) for row in rows if isinstance(row, Mapping)]


def _look(row: Mapping[str, Any]) -> Look:
    texts = {key: str(row.get(key) or "") for key in ("sample", "image", "question", "task")}
    heat, merged = _heat(row.get("relevance"), _size(row.get("grid"))), _size(row.get("merged"))
    spread = None
    if heat is not None and merged is not None:
        rows, columns = heat.shape
        spread = regrid(heat.ravel(), (rows, columns), merged)
    text = [_count(row.get(key), 0, MOST_TEXT) for key in ("before", "after")]
    around = None if text[0] is None or text[1] is None else (text[0], text[1])
    return Look(**texts, alignment=_share(row.get("alignment")), heat=heat, merged=merged,
                relevance=spread, text=around)  # fmt: skip


def _count(value: object, least: int, most: int) -> int | None:
    found = number(value)
    return int(found) if found is not None and found == int(found) and least <= found <= most else None


def _share(value: object) -> float | None:
    found = number(value)
    return found if found is not None and 0 <= found <= 1 else None


def _size(value: object) -> tuple[int, int] | None:
    if not isinstance(value, Sequence) or len(value) != 2:
        return None
    rows, columns = (_count(side, 1, MOST_PATCHES) for side in value)
    return None if rows is None or columns is None or rows * columns > MOST_PATCHES else (rows, columns)


def _heat(values: object, grid: tuple[int, int] | None) -> np.ndarray | None:
    """float32, which is what the model is given."""
    if grid is None or not isinstance(values, (Sequence, np.ndarray)) or isinstance(values, str):
        return None
    found = [_share(value) for value in np.asarray(values, object).ravel()[: grid[0] * grid[1] + 1]]
    if len(found) != grid[0] * grid[1] or None in found:
        return None
    return np.array(found, np.float32).reshape(grid)


def position_maps(guidance: Mapping[str, Any] | None, samples: Sequence[Look]) -> dict[str, Any]:
    """The maps of one sample on one scale, ``sample`` saying whose they are (None: an invented sequence)."""
    run = None if guidance is None else Guidance.of(guidance)
    look = _most_telling(samples, run)
    (before, after), (rows, columns) = look.text or (0, 0), look.merged or (1, 1)
    shown = [("Plain M-RoPE", PLAIN), ("ClinKD's released code (λ = 2)", RELEASED)]
    shown += [] if run is None else [("This run", run)]
    layouts = [
        lay_out(before, (1, rows, columns), after, values, alignment=look.alignment, relevance=look.relevance)
        for _, values in shown
    ]
    room = max(4, max(rows, columns) // 3)  # text positions shown on either side of the image
    window = max(0.0, before - 1.0 - room), max(_end(layout) for layout in layouts) + room
    made = []
    for index, ((title, values), layout) in enumerate(zip(shown, layouts, strict=True)):
        said = f"{title}: {_placed(layout)}"
        svg = Markup(plots.position_map(f"map{index}", layout, (rows, columns), window, said))
        effect = effect_of(values, look) if title == "This run" else "No guidance."
        made.append({"title": title, "svg": svg, "said": _placed(layout), "effect": effect,
                     "guidance": values})  # fmt: skip
    sample = None if look is INVENTED else {
        "name": clip(look.sample or look.image, 120), "question": clip(look.question),
        "alignment": look.alignment,
    }  # fmt: skip
    mesh = rows * columns > plots.MOST_SQUARES
    return {"maps": made, "sample": sample, "before": before, "after": after, "rows": rows,
            "columns": columns, "cut": before - 1 > room or after > room,
            "drawn": plots.thinning(max(rows, columns)) if mesh else 0}  # fmt: skip


def _most_telling(samples: Sequence[Look], run: Guidance | None) -> Look:
    """The first sample that can be laid out, one with the scores that the run's mode asks for if there is."""
    whole = [look for look in samples if look.merged is not None and look.text is not None]
    asked = {"pair": "alignment", "patch": "relevance"}.get(run.guided if run else "none")
    scored = [look for look in whole if asked is None or getattr(look, asked) is not None]
    return next(iter(scored + whole), INVENTED)


def _end(layout: Any) -> float:
    """Where text goes on, or the image ends."""
    return float(layout.after.min()) if layout.after.size else layout.last


def _placed(layout: Any) -> str:
    (top, bottom), (left, right) = ((axis.min(), axis.max()) for axis in layout.vision[1:])
    after = f" Text goes on at {layout.after.min():.4g}." if layout.after.size else ""
    return f"Rows from {top:.4g} to {bottom:.4g}, columns from {left:.4g} to {right:.4g}.{after}"


def effect_of(run: Guidance, look: Look) -> str:
    """What the guide does to this sample's positions, in words."""
    if run.mode == "none":
        return "Guidance is off: the mode is none, so λ and α alone place the image."
    if run.gamma == 0:
        return (
            f"Guidance is off: γ = 0, so mode {run.mode} changes nothing and λ and α alone place the image."
        )
    said = "not kept" if look.alignment is None else f"s = {look.alignment:.2f}"
    if run.mode == "pair":
        if look.alignment is None:
            return (
                "Pair guidance widens λ by 1 + γ(1 − s). "
                "The alignment of this sample is not known: drawn is λ itself, as for s = 1."
            )
        wide = run.widening(look.alignment)
        gaps = _both(run.lambda_h * wide, run.lambda_w * wide)
        return (
            f"Pair guidance: at the sample's alignment {said}, λ is multiplied by "
            f"1 + {run.gamma:.4g} · (1 − {look.alignment:.2f}) = {wide:.4g}, to {gaps}. Steps stay even."
        )
    if look.relevance is None or look.merged is None:
        return (
            "Patch guidance stretches rows and columns by the guide's relevance. "
            "The relevance of this sample is not known: drawn are even steps."
        )
    return (
        f"Patch guidance: {_ranges(run, look.merged, look.relevance)} The gap λ stays; the sample's "
        f"alignment ({said}) has no part in this mode."
    )


def _both(high: float, wide: float) -> str:
    return f"{high:.4g}" if high == wide else f"{high:.4g} and {wide:.4g}"


def _ranges(guidance: Guidance, merged: tuple[int, int], relevance: np.ndarray) -> str:
    """The smallest and largest step of rows and of columns."""
    said = []
    for line, places, alpha in zip(
        ("row", "column"), offsets((1, *merged), guidance, relevance),
        (guidance.alpha_h, guidance.alpha_w), strict=True,
    ):  # fmt: skip
        steps = np.diff(places)
        if not steps.size:
            said.append(f"there is one {line} only")
        elif steps.max() - steps.min() < LIKE_NONE * alpha:
            said.append(f"{line} steps stay at {alpha:.3g}")
        else:
            said.append(f"{line} steps run from {steps.min():.3g} to {steps.max():.3g} (even: {alpha:.3g})")
    return f"{said[0]}, {said[1]}."


def look_cards(
    samples: Sequence[Look], guidance: Mapping[str, Any] | None, images: Mapping[str, bytes], budget: Budget
) -> list[dict[str, Any]]:
    """Images with the guide's relevance over them, and the spacing it leads to under patch guidance."""
    run = PLAIN if guidance is None else Guidance.of(guidance)
    patch = replace(run, gamma=run.gamma or 1.0, mode="patch")
    cards = []
    for index, look in enumerate(scored(samples)):
        heat = look.heat
        assert heat is not None
        picture, problem = _pictured(look.image, heat, images, budget)
        peak = _peak(heat)
        card: dict[str, Any] = {
            "sample": clip(look.sample, 120), "question": clip(look.question), "task": clip(look.task, 20),
            "alignment": look.alignment, "picture": picture, "problem": problem, "peak": peak,
            "alt": f"{clip(look.image, 80)}, relevance to “{clip(without_boxes(look.question), 200)}”: "
            + peak, "grid": heat.shape, "merged": look.merged, "svg": None, "said": "",
        }  # fmt: skip
        if look.merged is not None and look.relevance is not None:
            card["said"] = _capital(_ranges(patch, look.merged, look.relevance))
            drawn = plots.thinning(max(look.merged))
            card["said"] += f" One line in {drawn} is drawn." if drawn > 1 else ""
            card["svg"] = _spacing(f"look{index}", patch, look.merged, look.relevance, card["said"])
        cards.append(card)
    return cards


def scored(samples: Sequence[Look]) -> list[Look]:
    """Those that are shown: the first whose relevance was kept."""
    return [look for look in samples if look.heat is not None][:MOST_LOOKS]


def _pictured(
    name: str, heat: np.ndarray, images: Mapping[str, bytes], budget: Budget
) -> tuple[str | None, str]:
    if name not in images:
        return None, "The image was not found in the run's data."
    try:
        picture = budget.take(heat_map(images[name], heat))
    except ImageError:
        return None, "The image cannot be read."
    return picture, "" if picture else "Left out to keep this file small."


def _peak(heat: np.ndarray) -> str:
    high, low = float(heat.max()), float(heat.min())
    if high - low < 0.005:
        return f"relevance is {high:.2f} everywhere."
    row, column = divmod(int(heat.argmax()), heat.shape[1])
    rows, columns = heat.shape
    return (
        f"highest ({high:.2f}) in row {row + 1} of {rows}, column {column + 1} of {columns}; "
        f"lowest {low:.2f}, mean {math.fsum(heat.ravel()) / heat.size:.2f}."
    )


def _spacing(name: str, patch: Guidance, merged: tuple[int, int], relevance: np.ndarray, said: str) -> Markup:
    grid = (1, *merged)
    means = line_means(grid, relevance, 1), line_means(grid, relevance, 2)
    even, guided = offsets(grid, replace(patch, mode="none")), offsets(grid, patch, relevance)
    return Markup(plots.spacing(name, even, guided, means, f"Even spacing beside patch guidance. {said}"))


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
