"""Stage reflect: rounds of predict, judge, correct, select, train.

Decisions:
- Every round keeps what it made in its own folder (answers, feedback, model); a run that was killed
  goes on with the first piece that is missing.
- The corrector is the teacher: it sees the question, the truth and the wrong answer, and samples candidates.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from clinkd.artifacts import Artifact, Draft
from clinkd.stages.base import Run, write_whole
from clinkd.stages.models import lora_settings, scores, teacher_folder, vqa_spec
from clinkd.stages.training import train, turn_counts


def reflect(run: Run) -> Artifact:
    """The student, trained with feedback on its own wrong answers."""
    config = run.config
    settings = {
        "reflect": config.reflect.model_dump(), "rope": config.rope.model_dump(),
        "train_vision": config.model.train_vision, "seed": config.student_seed,
        "precision": config.compute.precision,
    } | lora_settings(config)  # fmt: skip

    def make(draft: Draft) -> dict[str, Any]:
        model, counts = run.done["distill"].path / "model", {}
        for number in range(1, config.reflect.rounds + 1):
            counts[f"round_{number}"] = _round(run, draft, model, number)
            model = draft.path / f"round-{number}" / "model"
        shutil.copytree(model, draft.path / "model", dirs_exist_ok=True)
        return counts

    return run.stage("reflect", ["prepare", "guide", "teacher", "distill"], settings, make)


def _round(run: Run, draft: Draft, model: Path, number: int) -> dict[str, Any]:
    folder = draft.path / f"round-{number}"
    folder.mkdir(exist_ok=True)
    summary = folder / "summary.json"
    if not (folder / "feedback.parquet").is_file():
        write_whole(summary, json.dumps(_collect(run, folder, model, number)))
    counts = json.loads(summary.read_text())
    if not (folder / "model" / "config.json").is_file():
        counts |= _train_round(run, draft, folder, model, number)
    return counts


def _collect(run: Run, folder: Path, model: Path, number: int) -> dict[str, Any]:
    """Predict, judge, correct, select; feedback.parquet is written last."""
    from clinkd.data.ingest import record_images
    from clinkd.reflect import rounds
    from clinkd.reflect.similarity import load_similarity

    options, data = run.config.reflect, run.done["prepare"].path
    similarity = load_similarity(options.similarity)
    answered = _answers(run, folder / "answers.jsonl", model, number)
    wrong, reasons = rounds.misses(answered, similarity, options)
    run.progress.record(stage="reflect", round=number, event="judged", answered=len(answered), wrong=reasons)
    run.progress.say(
        f"reflect: round {number}: {sum(reasons.values())} of {len(answered)} answers were wrong"
    )
    rows: list[dict[str, Any]] = []
    if wrong:
        pictures = record_images(data, {row["sample"].rpartition("#")[0] for row, _ in wrong})
        corrected = _corrections(run, rounds.correction_records(wrong, pictures), number)
        rows = rounds.choose(wrong, corrected, similarity, options)
    used = sum(row["source"] == "candidate" for row in rows)
    run.progress.record(stage="reflect", round=number, event="selected", corrected=len(rows), candidates=used)
    unfinished = folder / "feedback.tmp"
    rounds.write_feedback(rows, unfinished)
    unfinished.rename(folder / "feedback.parquet")
    return {"answered": len(answered), "wrong": reasons, "corrected": len(rows), "from_candidates": used}


def _answers(run: Run, path: Path, model: Path, number: int) -> list[dict[str, Any]]:
    """The student's answers to this round's training samples; kept, so that they are made once."""
    if path.is_file():
        return [json.loads(line) for line in path.read_text().splitlines()]
    from clinkd.data.ingest import read_records
    from clinkd.evaluate.predict import PredictSpec, predict
    from clinkd.reflect.rounds import choose_records

    turns = turn_counts(run)
    chosen = choose_records(list(turns.items()), run.config.reflect.samples, run.config.student_seed, number)
    total = sum(turns[record] for record in chosen)
    rows = read_records(run.done["prepare"].path, ids=chosen, blocks=run.blocks)
    spec = PredictSpec(
        str(model.resolve()), run.config.evaluate.batch_size, run.config.evaluate.max_new_tokens,
        scores=scores(run, run.config.rope),
    )  # fmt: skip
    run.progress.start(f"reflect: answers of round {number}", total)
    found = []
    for row in predict(rows, spec, actors=run.config.compute.actors):
        found.append(row)
        run.progress.update(len(found), record=False)
    found.sort(key=lambda row: row["sample"])
    write_whole(path, "".join(json.dumps(row) + "\n" for row in found))
    return found


def _corrections(run: Run, records: list[dict[str, Any]], number: int) -> dict[str, list[str]]:
    """Candidates of the corrector, by sample."""
    import ray.data

    from clinkd.evaluate.predict import PredictSpec, predict

    options = run.config.reflect
    spec = PredictSpec(
        str(teacher_folder(run).resolve()), run.config.evaluate.batch_size,
        run.config.evaluate.max_new_tokens, candidates=options.candidates, temperature=options.temperature,
        seed=run.config.student_seed + number,
    )  # fmt: skip
    run.progress.start(f"reflect: corrections of round {number}", len(records))
    found: dict[str, list[str]] = {}
    for row in predict(
        ray.data.from_items(records, override_num_blocks=min(run.blocks, len(records))),
        spec,
        actors=run.config.compute.actors,
    ):
        found[row["sample"].removesuffix("#0")] = row["responses"]
        run.progress.update(len(found), record=False)
    return found


def _train_round(run: Run, draft: Draft, folder: Path, model: Path, number: int) -> dict[str, Any]:
    """Trains on the full data with a share of feedback."""
    import pyarrow.parquet as pq

    from clinkd.train.tasks import ReflectTask

    config = run.config
    table = pq.read_table(folder / "feedback.parquet", columns=["sample", "chosen"])
    feedback = dict(zip(table.column("sample").to_pylist(), table.column("chosen").to_pylist(), strict=True))
    spec = vqa_spec(
        run, model, config.rope, train_vision=config.model.train_vision,
        coordinate_weight=config.reflect.optim.coordinate_weight, lora=config.model.lora,
    )  # fmt: skip
    share, zero = config.reflect.share, config.compute.zero_stage
    counts = train(
        run, draft, f"reflect-{number}", config.reflect.optim, zero,
        lambda rows, scratch: ReflectTask(rows, scratch, spec, feedback, share, zero), out=folder,
        seed=config.student_seed,
    )  # fmt: skip
    return {"steps": counts["steps"], "loss": counts["loss"]}
