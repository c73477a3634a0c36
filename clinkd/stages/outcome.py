"""What a trained model is worth: predictions on unseen images, their scores, and the report.

Decisions:
- ``eval.json`` and ``predictions.jsonl`` are copied from the artifact to the run's folder, where a
  person looks.
- The baselines are fitted on the training split and measured on the test split, by the protocol's own
  scoring.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from clinkd.artifacts import Artifact, Draft
from clinkd.config import ConfigError, to_yaml
from clinkd.data.index import RecordIndex
from clinkd.data.reading import Questions
from clinkd.progress import Progress
from clinkd.stages import certificate
from clinkd.stages.asking import Desks
from clinkd.stages.base import Run, content_digest, write_whole
from clinkd.stages.guide_view import guide_samples
from clinkd.stages.models import scores
from clinkd.stages.reflection import ROUNDS, right_now
from clinkd.stages.training import split_index

GUIDE = "guide"  # the guide's folder in the kept model's


def evaluate(run: Run, model: str) -> Artifact:
    """Answers of the model that stage ``model`` made, on the test split, scored."""
    from clinkd.data.records import TASKS

    options = run.config.evaluate
    settings = options.model_dump(exclude={"batch_size"})

    def make(draft: Draft) -> dict[str, Any]:
        lines = _predict(run, run.done[model].path / "model", draft)
        result = score(lines, run.done["prepare"].path, options.text_metrics, options.spice_jars)
        write_whole(draft.path / "eval.json", json.dumps(result, indent=1))
        means = {"vg": result["vg"]["mean"]["recall_at_50"], "roc": result["roc"]["mean"]["recall"]}
        run.progress.finish(**means)
        run.progress.record(stage="evaluate", event="test", **{task: result[task]["mean"] for task in TASKS})
        return {"predictions": len(lines)} | means

    artifact = run.stage("evaluate", ["prepare", "guide", model], settings, make)
    for name in ("eval.json", "predictions.jsonl"):
        write_whole(run.folder / name, (artifact.path / name).read_text())
    return artifact


def validate(
    run: Run, model: Path, questions: int, desks: Desks, metrics: Collection[str]
) -> dict[str, float]:
    """Scores of a model on the validation split, for choosing between trials.

    Args:
        questions: asked at most, of whole records in their order.
        metrics: what is wanted, of ``config_sweep.METRICS``.

    Returns:
        ``likelihood``, the geometric mean of the probabilities of true answers' tokens; and where more
        is wanted, ``vg`` (Recall@0.5), ``roc`` (recall), ``score`` (their mean) and, if wanted, ``rc``
        and ``mia`` (ROUGE-L), each the mean over modalities. All in [0, 1].

    Raises:
        ConfigError: no validation split, or no answer of a task in it that can be scored.
    """
    from clinkd.data.records import TASKS
    from clinkd.evaluate.predict import published
    from clinkd.evaluate.score import score_tasks

    def asked(likelihood: bool) -> list[dict[str, Any]]:
        with tempfile.TemporaryDirectory(prefix="clinkd-") as folder:
            return _answers(run, model, desks, "validation", questions, Path(folder), likelihood)

    scored: dict[str, float] = {}
    if "likelihood" in metrics:
        rows = asked(likelihood=True)
        scored["likelihood"] = math.exp(
            sum(row["log_likelihood"] for row in rows) / sum(row["tokens"] for row in rows)
        )
        if set(metrics) == {"likelihood"}:
            return scored
    found, text = published(asked(likelihood=False)), bool({"rc", "mia"} & set(metrics))
    by_task = {task: [row for row in found if row["task"] == task] for task in TASKS}
    wanted = TASKS if text else ("vg", "roc")
    result = score_tasks({task: by_task[task] for task in wanted}, text_metrics=text)
    for task in wanted:
        left = result[task]["skipped"]
        if by_task[task] and sum(left.values()) == len(by_task[task]):  # a 0 would look like a poor model
            reasons = ", ".join(f"{reason} {count}" for reason, count in left.items())
            raise ConfigError(
                f"sweep.metric: of {len(by_task[task])} {task} questions of the validation split no answer "
                f"can be scored ({reasons}); take likelihood"
            )
    scored |= {"vg": result["vg"]["mean"]["recall_at_50"], "roc": result["roc"]["mean"]["recall"]}
    scored["score"] = (scored["vg"] + scored["roc"]) / 2
    return scored | ({task: result[task]["mean"]["rouge_l"] for task in ("rc", "mia")} if text else {})


def _answers(
    run: Run,
    model: Path,
    desks: Desks,
    split: str,
    limit: int | None,
    folder: Path,
    likelihood: bool = False,
) -> list[dict[str, Any]]:
    """What a model says to the split's first ``limit`` questions; parts are kept in ``folder``."""
    from clinkd.data.shards import Shards
    from clinkd.evaluate.predict import PredictSpec

    options, index = run.config.evaluate, split_index(run, split)
    if not len(index):
        raise ConfigError(
            f"data.{split}_fraction: no {split} sample was left by the split; raise it or add cases"
        )
    spec = PredictSpec(
        str(model.resolve()), options.batch_size, options.max_new_tokens, seed=run.config.run.seed,
        scores=scores(run, run.config.rope), likelihood=likelihood, dtype=run.config.model.dtype,
    )  # fmt: skip
    chosen = index.place[first_records(index, limit)]
    questions = Questions(Shards.of(run.done["prepare"].path), chosen)
    return desks.ask(spec, questions, folder, "evaluate", 0)


def _predict(run: Run, model: Path, draft: Draft) -> list[dict[str, Any]]:
    from clinkd.evaluate.predict import write_predictions

    with Desks.of(run) as desks:
        found = _answers(run, model, desks, "test", run.config.evaluate.limit, draft.work / "answers")
    return write_predictions(found, draft.path / "predictions.jsonl")


def first_records(index: RecordIndex, limit: int | None) -> np.ndarray:
    """Whole records in their order until ``limit`` samples are reached; None: all."""
    if limit is None:
        return np.arange(len(index))
    return np.flatnonzero(index.starts[:-1] < limit)


def score(
    lines: list[dict[str, Any]], data: Path, text_metrics: bool, spice_jars: str | None
) -> dict[str, Any]:
    """The whole eval.json: the four tasks, the baselines, versions."""
    from clinkd.data.records import TASKS
    from clinkd.data.shards import samples
    from clinkd.evaluate.baselines import baselines
    from clinkd.evaluate.score import score_tasks, versions

    by_task = {task: [line for line in lines if line["task"] == task] for task in TASKS}
    result: dict[str, Any] = dict(
        score_tasks(by_task, spice_jars=Path(spice_jars) if spice_jars else None, text_metrics=text_metrics)
    )

    def trained(task: str) -> Iterator[dict[str, Any]]:
        for sample in samples(data, "train"):
            if sample["task"] == task:
                yield {"image": sample["image"], "annotation": sample["answer"]}

    result["baselines"] = baselines(trained("vg"), by_task["vg"], trained("roc"), by_task["roc"])
    result["versions"] = versions()
    return result


def report(run: Run) -> Path:
    """``report.html`` and ``report.md`` of the run's folder, from what lies there and in its artifacts."""
    from clinkd.artifacts import versions
    from clinkd.data.shards import images
    from clinkd.report.html import ReportInputs, build_markdown, build_report
    from clinkd.report.planned import read_plan

    data = run.done["prepare"].path
    inputs = ReportInputs(
        name=run.config.run.name,
        evaluation=json.loads((run.folder / "eval.json").read_text()),
        metrics=_lines(
            [path for item in run.done.values() for path in sorted(item.path.rglob("metrics.jsonl"))]
        ),
        feedback=_feedback(run),
        reflection=_account(run),
        guide=json.loads((run.done["guide"].path / "retrieval.json").read_text()),
        guide_samples=guide_samples(run),
        guidance=run.config.rope.model_dump(),
        predictions=_lines([run.folder / "predictions.jsonl"]),
        images=lambda names: images(data, list(names)),
        config=to_yaml(run.config),
        certificate=json.loads((run.done["distill"].path / certificate.FILE).read_text()),
        versions={key: value or "not installed" for key, value in versions().items()},
        stages=run.log,
        plan=read_plan(run.folder),
    )
    path = build_report(inputs, run.folder / "report.html")
    build_markdown(inputs, run.folder / "report.md")
    shutil.copyfile(run.done["prepare"].path / "manifest.json", run.folder / "manifest.json")
    return path


def _lines(paths: list[Path]) -> list[dict[str, Any]]:
    return [json.loads(line) for path in paths if path.is_file() for line in path.read_text().splitlines()]


def _account(run: Run) -> dict[str, Any]:
    """What the rounds of reflection came to; empty where there were none."""
    if "reflect" not in run.done:
        return {}
    return dict(json.loads((run.done["reflect"].path / ROUNDS).read_text()))


def _feedback(run: Run) -> list[dict[str, Any]]:
    """What every round of reflection kept, with its number and what the student said after it."""
    import pyarrow.parquet as pq

    if "reflect" not in run.done:
        return []
    found = []
    for path in sorted(run.done["reflect"].path.glob("round-*/feedback.parquet")):
        number = int(path.parent.name.removeprefix("round-"))
        said = {row["sample"]: row for row in _lines(sorted(path.parent.glob("after/part-*.jsonl")))}
        rows = pq.read_table(path).to_pylist()
        mended = right_now(run, [said[row["sample"]] for row in rows])
        for row in rows:
            name = row["sample"]
            now = {"after": said[name]["responses"][0], "mended": mended[name]}
            found.append(row | {"round": number} | now)
    return found


def keep_model(run: Run, stage: str) -> None:
    """The trained student as a plain Hugging Face folder beside the report."""
    source, target = run.done[stage].path / "model", run.folder / "model"
    mark = run.folder / "model.fingerprint"
    if target.is_dir() and mark.is_file() and mark.read_text() == run.done[stage].fingerprint:
        return
    unfinished = run.folder / ".model.unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(source, unfinished)
    shutil.rmtree(target, ignore_errors=True)
    if scores(run, run.config.rope):
        from clinkd.model.guide import copy_guide

        copy_guide(run.done["guide"].path, unfinished / GUIDE)
    unfinished.rename(target)
    write_whole(mark, run.done[stage].fingerprint)


def _guide_of(checkpoint: Path, given: Path | None) -> str | None:
    """The guide that scores a guided checkpoint's questions on the fly; None for one that needs none."""
    from transformers import AutoConfig

    from clinkd.model.clinkd_qwen2vl import guidance_of

    mode = guidance_of(AutoConfig.from_pretrained(checkpoint)).guided
    if mode == "none":
        return None
    folder = given or checkpoint / GUIDE
    if not (folder / "guide.json").is_file():
        raise ConfigError(
            f"--guide: {folder} holds no guide.json, and the checkpoint is guided ({mode}); give "
            "the folder that the stage guide made, or the checkpoint of a finished run (runs/NAME/model)"
        )
    return str(folder.resolve())


def predict_folder(
    checkpoint: Path, data: str | Path, out: Path, split: str, batch_size: int, max_new_tokens: int,
    guide: Path | None = None, actors: int = 2,
) -> int:  # fmt: skip
    """Answers of any checkpoint to any prepared data; returns their number.

    What is answered lies beside ``out`` until all is: killed, the same call goes on there.

    Raises:
        ConfigError: a guided checkpoint without its guide. DataError: no record in the split.
    """
    import ray

    from clinkd.artifacts import fingerprint
    from clinkd.data.index import build_index
    from clinkd.data.shards import DataError, Shards, read_manifest
    from clinkd.evaluate.predict import PredictSpec, write_predictions

    spec = PredictSpec(
        str(checkpoint.resolve()), batch_size, max_new_tokens, guide=_guide_of(checkpoint, guide)
    )
    shards = Shards.of(data)
    index = build_index(shards, split)
    if not len(index):
        raise DataError(f"--split: {data} holds no record of the split {split!r}")
    asked = {"split": split, "shards": read_manifest(data)["shards"], "model": content_digest(checkpoint)}
    mark = fingerprint("predict", {}, asdict(spec) | asked)
    parts = out.with_name(f".{out.name}.{mark[:12]}")
    gpus = min(1.0, ray.cluster_resources().get("GPU", 0.0) / actors)
    with Progress() as progress, Desks(actors, progress, gpus) as desks:
        questions = Questions(shards, index.place)
        found = desks.ask(spec, questions, parts, "predict", 0)
    count = len(write_predictions(found, out))
    shutil.rmtree(parts)
    return count
