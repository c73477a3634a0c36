"""The report: one HTML file of everything a run knows about itself, opened with no network.

Decisions:
- Answers, questions and file names are untrusted text. Jinja2's autoescape is on for every template, and the
  page carries a content security policy that loads nothing and runs one script only, named by its hash.
- Every list is cut to a length and all images share a byte budget, so that the file stays under 5 MB whatever
  the run holds.
- What a run does not have (no feedback, no sweep, no Java) is said in a sentence; nothing here raises for it.
- The page is whole without its script: that only filters the gallery and copies commands.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from clinkd.data.boxes import from_qwen
from clinkd.data.records import TASK_NAMES
from clinkd.report import gallery, guide, plots, rounds, tables
from clinkd.report.overlays import Budget, heat_legend
from clinkd.report.planned import against_plan
from clinkd.report.positions import Guidance
from clinkd.report.throughput import throughput

MODALITY_TITLES = {
    "ct": "CT",
    "mr": "MR",
    "x": "X-ray",
    "pet": "PET",
    "endoscopy": "Endoscopy",
    "dermoscopy": "Dermoscopy",
    "fundus": "Fundus",
    "ultrasound": "Ultrasound",
}
FEEDBACK_BYTES = 900_000  # of data URIs
GALLERY_BYTES = 2_600_000
GUIDE_BYTES = 300_000
MOST_CONFIG = 60_000  # characters
MOST_ROWS = 200  # of stages and of trials
CURRICULUM = (
    ("admitted_share", "Pseudo-labels admitted", "share of samples"),
    ("admitted_margin", "The bar: smallest margin admitted", "mean p1 - p2"),
)


@dataclass(frozen=True)
class ReportInputs:
    """All a report is made from; whatever is empty is reported as missing.

    Args:
        name: the run's name.
        evaluation: eval.json.
        metrics: rows of metrics.jsonl.
        predictions: rows with sample, task, image, question, annotation and response.
        feedback: rows of feedback.parquet; ``round`` is read where a row has it, else all count as round 1;
            ``after`` and ``mended``: what the student says after the round, and whether it is right.
        reflection: the stage's account, rounds.json.
        images: gives the bytes of those of the named images that exist.
        config: the run's configuration, YAML text.
        versions: software and versions.
        stages: rows {stage, fingerprint, seconds, counts, skipped}.
        guide: numbers of the Med-CLIP guide: retrieval_at_1, chance, regions, pair_auc, patch_auc and others.
        guide_samples: what the guide says of some questions: rows with sample, image, question, task,
            alignment in [0, 1], relevance (row by row, each in [0, 1]) on the guide's grid [rows, columns],
            merged [rows, columns] of the answering model, and how many tokens stand before and after the
            image. What a row does not have, or has as None, is left away.
        sweep: rows of the trials' table, in the order to print.
        guidance: the run's rotary parameters: lambda_h, lambda_w, alpha_h, alpha_w, gamma, mode.
        certificate: what ``distill.certificate.certify`` found for the loss that the student learned by.
        plan: what ``clinkd plan --save`` said before the run.
        commands: (what it does, command) for the page's last part; empty: those that follow from the name.
    """

    name: str
    evaluation: Mapping[str, Any] = field(default_factory=dict)
    metrics: Sequence[Mapping[str, Any]] = ()
    predictions: Sequence[Mapping[str, Any]] = ()
    feedback: Sequence[Mapping[str, Any]] = ()
    reflection: Mapping[str, Any] = field(default_factory=dict)
    images: gallery.Images = lambda names: {}
    config: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    stages: Sequence[Mapping[str, Any]] = ()
    guide: Mapping[str, Any] = field(default_factory=dict)
    guide_samples: Sequence[Mapping[str, Any]] = ()
    sweep: Sequence[Mapping[str, Any]] = ()
    guidance: Mapping[str, Any] | None = None
    certificate: Mapping[str, Any] = field(default_factory=dict)
    plan: Mapping[str, Any] = field(default_factory=dict)
    commands: Sequence[tuple[str, str]] = ()


def environment(autoescape: bool) -> Environment:
    """The templates of this folder, with their filters."""
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters.update(pct=percent, points=points, score=plain_score, duration=duration)
    made.filters.update(clip=gallery.clip, cell=cell, rate=rate, boxed=boxed, words=words)
    made.filters.update(md=marked_down)
    return made


def build_markdown(run: ReportInputs, out: Path) -> Path:
    """Writes the report's numbers as Markdown: no images, questions or answers. Returns ``out``."""
    text = (
        environment(autoescape=False)
        .get_template("report.md.j2")
        .render(**_numbers(run), **_provenance(run), outcomes=rounds.outcomes(run.reflection)[:MOST_ROWS])
    )
    return put(out, text)


def build_report(run: ReportInputs, out: Path) -> Path:
    """Writes the report to the file ``out`` (beside it first, then moved into place) and returns ``out``."""
    script, digest = signed_script()
    page = environment(autoescape=True).get_template("report.html.j2").render(
        **_numbers(run),
        **_charts(run),
        **_pictures(run),
        **_provenance(run),
        script=script,
        script_hash=digest,
    )  # fmt: skip
    return put(out, page)


def signed_script() -> tuple[Markup, str]:
    """The pages' script, and its digest for the content security policy."""
    script = environment(autoescape=True).get_template("script.js.j2").render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    return Markup(script), digest


def put(out: Path, text: str) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = out.with_name(f".{out.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8", errors="replace")
    os.replace(beside, out)
    return out


def _numbers(run: ReportInputs) -> dict[str, Any]:
    cards = tables.summary_cards(run.evaluation)
    parts = {task: tables.mapping(run.evaluation.get(task)) for task in TASK_NAMES}
    baselines = tables.mapping(run.evaluation.get("baselines"))
    return {
        "name": run.name,
        "cards": cards,
        "overall": tables.overall(cards),
        "table": tables.task_table(run.evaluation),
        "text_tables": {task: tables.text_table(task, parts[task]) for task in ("rc", "mia")},
        "text_missing": {
            task: tables.why_missing(task, parts[task], tables.headline(task, parts[task]))
            for task in ("rc", "mia")
        },
        "spice_missing": parts["rc"].get("spice_reason")
        if tables.task_mean(parts["rc"], "spice") is None
        else None,
        "honest": {
            task: tables.honest_rows(tables.mapping(part.get("honest"))) for task, part in parts.items()
        },
        "skipped": tables.skipped_rows(run.evaluation)[:MOST_ROWS],
        "baseline_box": baselines.get("vg_box"),
        "baseline_answer": baselines.get("roc_answer"),
        "sizes": tables.recall_by_size(run.predictions),
        "confusions": tables.confusions(run.predictions),
        "guide": {str(key): value for key, value in run.guide.items() if tables.number(value) is not None},
        "task_names": TASK_NAMES,
        "modality_names": MODALITY_TITLES,
    }


def _charts(run: ReportInputs) -> dict[str, Any]:
    stage_charts = []
    for index, line in enumerate(plots.curves(run.metrics, "loss")):
        svg = Markup(plots.chart(f"loss{index}", [line], "loss"))
        stage_charts.append(
            {
                "title": line.label,
                "svg": svg,
                "first": line.values[0],
                "last": line.values[-1],
                "lowest": line.values.min(),
                "steps": int(line.steps[-1]),
                "dropped": line.dropped,
            }
        )
    terms = (("kd", "Distillation term (KL)", "kd"), ("ce", "Cross-entropy term", "ce"))
    return {
        "stage_charts": stage_charts,
        "distill_charts": _curves(run.metrics, terms),
        "distilled": _distilled(run.metrics),
        "curriculum_charts": _curves(run.metrics, CURRICULUM),
    }


def _distilled(metrics: Sequence[Mapping[str, Any]]) -> dict[str, float] | None:
    """Return how far the student was from its teacher at first and at last; None without a teacher.

    Means over a twentieth of the steps, ``kd`` in nats per answer token.
    """
    found = [line["kd"] for line in metrics if line.get("stage") == "distill" and "kd" in line]
    if len(found) < 2:
        return None
    few = max(1, len(found) // 20)
    first, last = found[0], sum(found[-few:]) / few
    return {"steps": len(found), "first": first, "last": last, "share": 1 - last / first if first else 0.0}


def _curves(
    metrics: Sequence[Mapping[str, Any]], fields: Iterable[tuple[str, str, str]]
) -> list[dict[str, Any]]:
    """Title and chart of each (field, title, name of its axis) that was logged."""
    made = []
    for name, title, axis in fields:
        lines = plots.curves(metrics, name)
        if lines:
            made.append({"title": title, "svg": Markup(plots.chart(name.replace("_", "-"), lines, axis))})
    return made


def _pictures(run: ReportInputs) -> dict[str, Any]:
    cards, rows = gallery.choose(run.predictions), gallery.choose_feedback(run.feedback)
    wanted = {card.image for card in cards} | {str(row.get("image", "")) for row in rows}
    samples = guide.looks(run.guide_samples)
    wanted |= {look.image for look in guide.scored(samples)}
    wanted.discard("")
    images = run.images(sorted(wanted)) if wanted else {}
    feedback_budget, gallery_budget = Budget(FEEDBACK_BYTES), Budget(GALLERY_BYTES)
    events = [row for row in run.metrics if row.get("stage") == "reflect" and "event" in row]
    return {
        "corrections": gallery.corrections(rows, images, feedback_budget),
        "rounds": gallery.reflection_rounds(run.feedback)[:MOST_ROWS],
        "outcomes": rounds.outcomes(run.reflection)[:MOST_ROWS],
        "by_reason": rounds.by_reason(run.reflection),
        "by_group": rounds.by_group(run.reflection)[:MOST_ROWS],
        "events": [_event(row) for row in events[:MOST_ROWS]],
        "gallery": gallery.pictured(cards, images, gallery_budget),
        "refused": feedback_budget.refused + gallery_budget.refused,
        "placed": guide.position_maps(run.guidance, samples),
        "looks": guide.look_cards(samples, run.guidance, images, Budget(GUIDE_BYTES)),
        "run_rope": None if run.guidance is None else Guidance.of(run.guidance),
        "heat_legend": heat_legend(),
    }


def _event(row: Mapping[str, Any]) -> dict[str, Any]:
    facts = {key: value for key, value in row.items() if key not in ("stage", "round", "event", "time")}
    return {"round": row.get("round", ""), "event": row["event"], "facts": pairs(facts)}


def _provenance(run: ReportInputs) -> dict[str, Any]:
    stages = []
    for row in list(run.stages)[:MOST_ROWS]:
        stages.append(
            {
                "stage": str(row.get("stage", "")),
                "fingerprint": str(row.get("fingerprint", "")),
                "seconds": tables.number(row.get("seconds")),
                "counts": pairs(tables.mapping(row.get("counts"))),
                "skipped": bool(row.get("skipped")),
            }
        )
    keys = list(dict.fromkeys(str(key) for row in run.sweep for key in row))[:24]
    return {
        "stages": stages,
        "throughput": throughput(run.metrics),
        "planned": against_plan(run.plan, run.metrics),
        "seconds": sum(row["seconds"] or 0.0 for row in stages),
        "config": gallery.clip(run.config, MOST_CONFIG),
        "config_hash": hashlib.sha256(run.config.encode("utf-8", "replace")).hexdigest(),
        "certificate": run.certificate,
        "versions": {**tables.mapping(run.evaluation.get("versions")), **run.versions},
        "sweep_keys": keys,
        "sweep": [[row.get(key) for key in keys] for row in list(run.sweep)[:MOST_ROWS]],
        "sweep_left_out": max(0, len(run.sweep) - MOST_ROWS),
        "commands": list(run.commands) or default_commands(run.name),
    }


def default_commands(name: str) -> list[tuple[str, str]]:
    """What reruns, rescores and redraws a run of this name in the usual place."""
    folder = shlex.quote(f"runs/{name}")
    made = [
        ("Run all of it again, with the configuration below saved as run.yaml", "clinkd run run.yaml"),
        ("Write this report again", f"clinkd report {folder}"),
    ]
    for task, title in TASK_NAMES.items():
        made.append(
            (
                f"Score {title} again",
                f"clinkd evaluate --task {task} --predictions {folder}/predictions.jsonl --json",
            )
        )
    return made


def pairs(facts: Mapping[str, Any]) -> str:
    """Counts and facts in a line: "rows 1,200, quarantined 3", inner tables in parentheses."""
    said = []
    for key, value in list(facts.items())[:16]:
        if isinstance(value, Mapping):
            text = f"({pairs(value)})"
        else:
            text = json.dumps(value, default=str) if isinstance(value, list) else cell(value)
        said.append(f"{str(key).replace('_', ' ')} {gallery.clip(text, 160)}")
    return ", ".join(said)


def cell(value: object) -> str:
    """A value of any kind for a table: numbers short, the rest as text, cut to a length."""
    if value is None:
        return "—"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return gallery.clip(value, 100)


def rate(value: float | None) -> str:
    """Three figures that count: "1,234", "41.2", "0.00123"."""
    if value is None:
        return "—"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def boxed(text: str) -> Markup:
    """Text with its well-formed boxes set apart as coordinates; all else as it came, escaped."""
    pieces = re.split(r"<box>\((\d+),(\d+)\),\((\d+),(\d+)\)</box>", from_qwen(text))
    made = [escape(pieces[0])]
    for start in range(1, len(pieces), 5):
        x1, y1, x2, y2, rest = pieces[start : start + 5]
        made.append(Markup('<code class="box">{},{} {},{}</code>{}').format(x1, y1, x2, y2, rest))
    return Markup("").join(made)


def words(code: str) -> str:
    """A judge's code as words."""
    return re.sub(r"\biou\b", "IoU", code.replace("_", " "))


def marked_down(value: object) -> str:
    """Text for a cell of a Markdown table: one line, nothing in it that Markdown or HTML reads."""
    plain = " ".join(gallery.clip(value).split())
    return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", plain)


def percent(value: float | None) -> str:
    return "—" if value is None else f"{100 * value:.1f}"


def points(value: float | None) -> str:
    """A difference in percentage points, with its sign."""
    return "—" if value is None else f"{100 * value:+.1f}".replace("-", "−")


def plain_score(value: float | None) -> str:
    return "—" if value is None else f"{value:.2f}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "—"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
