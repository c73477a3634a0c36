"""The paper's ablation: what guided positions, distillation and reflection each bring, alone and together.

Decisions:
- All arms start from the same student, see the same images, and take the same number of steps: where an arm
  does not reflect, the steps of the rounds go to the training data alone.
- Arms differ in the keys that ``ARMS`` names; everything else is the configuration's.
- Several seeds of an arm are compared as one side (evaluate/compare.py): the interval is over test images,
  how far seeds lie apart stands beside it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from clinkd.config import ConfigError, RunConfig, with_values
from clinkd.evaluate.compare import compare
from clinkd.stages.base import write_whole
from clinkd.tune.summary import trial_folder
from clinkd.tune.sweep import sweep

UNGUIDED = {"rope.mode": "none"}
TRUTH_ALONE = {
    "distill.a": 0.0, "distill.unlabelled_share": 0.0, "distill.start_quantile": 0.0,
    "distill.end_quantile": 0.0,
}  # fmt: skip
NO_FEEDBACK = {"reflect.share": 0.0, "reflect.replay": 0.0, "reflect.samples": 1, "reflect.budget": 1}
ARMS: dict[str, dict[str, Any]] = {
    "sft": UNGUIDED | TRUTH_ALONE | NO_FEEDBACK,
    "guided": TRUTH_ALONE | NO_FEEDBACK,
    "distilled": UNGUIDED | NO_FEEDBACK,
    "reflected": UNGUIDED | TRUTH_ALONE,
    "all": {},
}
HEADLINE = {
    "vg": "recall_at_50_published", "roc": "recall_published", "rc": "rouge_l_words", "mia": "rouge_l_words",
}  # fmt: skip
"""What a task is first of all asked about."""


def arms(config: RunConfig) -> dict[str, dict[str, Any]]:
    """Values of each arm.

    Raises:
        ConfigError: the configuration lacks what is to be taken away.
    """
    missing = []
    if config.rope.mode == "none":
        missing.append("rope.mode: none, so there is no guidance to take away")
    if not config.distill.a:
        missing.append("distill.a: 0, so nothing is distilled")
    if not config.reflect.rounds or not config.reflect.share:
        missing.append("reflect.rounds or reflect.share: 0, so there is no feedback")
    if missing:
        raise ConfigError("\n".join(missing))
    rounds = {"reflect.rounds": config.reflect.rounds}  # a key of reflection: every arm takes its steps
    return {name: values | rounds for name, values in ARMS.items()}


def ablate(config: RunConfig, seeds: int) -> dict[str, Any]:
    """Trains all arms, ``seeds`` students each, as one sweep, and compares them with the first.

    Returns:
        ``arms``: of each its ``runs`` (folders) and ``against``, what ``compare`` gives for it against plain
        supervised training (null for that itself); ``seeds``.
    """
    fixed = [
        values | {"run.student_seed": seed}
        for seed in range(1, seeds + 1)
        for values in arms(config).values()
    ]
    changed = with_values(
        config, {"sweep.scheduler": "none", "sweep.metric": "score", "sweep.test": True, "sweep.space": {}}
    )
    swept = sweep(changed, fixed)
    rows = {row["trial"]: row for row in swept.rows}
    folders = {
        name: [
            trial_folder(changed, rows[number])
            for number in range(at, len(fixed), len(ARMS))
            if number in rows and rows[number]["state"] == "complete"
        ]
        for at, name in enumerate(ARMS)
    }
    read = {name: [_predictions(folder) for folder in found] for name, found in folders.items()}
    result: dict[str, Any] = {"seeds": seeds, "arms": {}}
    for name, found in folders.items():
        against = compare(read["sft"], read[name]) if name != "sft" and found and read["sft"] else None
        result["arms"][name] = {"runs": [folder.name for folder in found], "against": against}
    write_whole(swept.folder / "ablation.json", json.dumps(result, indent=1))
    text = f"{table(result)}\n\nEvery metric:\n\n{whole_table(result)}\n"
    write_whole(swept.folder / "ablation.md", text)
    return result


def _predictions(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def table(result: dict[str, Any]) -> str:
    """Arms by ``HEADLINE`` in Markdown: mean over seeds; difference to SFT, its 95% interval and p."""
    compared = _compared(result)
    if not compared:
        return "ablation: no arm has ended"
    columns = [(task, metric) for task, metric in _asked(compared) if metric == HEADLINE[task]]
    lines = [["arm", "seeds", *(f"{task} {metric}" for task, metric in columns)]]
    for name, arm in result["arms"].items():
        cells = [_cell(compared, name, task, metric) for task, metric in columns]
        lines.append([name, str(len(arm["runs"])), *cells])
    return _markdown(lines)


def whole_table(result: dict[str, Any]) -> str:
    """The same of every metric, which are the rows."""
    compared = _compared(result)
    lines = [["", *result["arms"]]]
    for task, metric in _asked(compared):
        cells = [_cell(compared, name, task, metric) for name in result["arms"]]
        lines.append([f"{task} {metric}", *cells])
    return _markdown(lines)


def _compared(result: dict[str, Any]) -> dict[str, Any]:
    """Of each arm that has ended and has somebody to be compared with: its numbers by task and metric."""
    return {name: arm["against"]["tasks"] for name, arm in result["arms"].items() if arm["against"]}


def _asked(compared: dict[str, Any]) -> list[tuple[str, str]]:
    """Tasks and metrics that something was asked about."""
    tasks: dict[str, Any] = next(iter(compared.values()), {})
    found = [(task, metric) for task in tasks for metric in tasks[task]]
    return [(task, metric) for task, metric in found if tasks[task][metric]["first"] is not None]


def _cell(compared: dict[str, Any], name: str, task: str, metric: str) -> str:
    if name == "sft":  # what the others are compared with
        return f"{next(iter(compared.values()))[task][metric]['first']:.4f}"
    if name not in compared:
        return "-"
    found = compared[name][task][metric]
    between = f"{found['low']:+.4f}…{found['high']:+.4f}"
    return f"{found['second']:.4f} ({found['difference']:+.4f}, {between}, p {found['p']:.3f})"


def _markdown(lines: list[list[str]]) -> str:
    rows = [lines[0], ["---"] * len(lines[0]), *lines[1:]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
