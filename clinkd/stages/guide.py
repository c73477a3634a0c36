"""Stage guide: trains the Med-CLIP or takes the user's, measures it, and scores every (image, question).

Decisions:
- A teacher made here starts where the guide that is trained here ends, so that one is trained for it even
  where another encoder scores.
- Nobody asks a guide of a run without guidance whose teacher is given: it would cost that teacher's tower.
- Logits are kept until all are there: the calibration is fitted on the training split, then one pass over
  the logits makes the scores. The encoder sees each image once.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clinkd.artifacts import Artifact, Draft
from clinkd.config import ConfigError, OptimSection
from clinkd.data.reading import Questions
from clinkd.data.scores import scores_table, write_parts
from clinkd.data.shards import Shards
from clinkd.stages.base import Run, content_digest, write_whole
from clinkd.stages.models import guidance, pixel_limits, start_model, teacher_rope, vqa_spec
from clinkd.stages.training import Training, train

if TYPE_CHECKING:
    import pyarrow as pa

    from clinkd.model.guide import Calibration

RETRIEVAL = "retrieval.json"


def guide(run: Run) -> Artifact:
    """The guide (model/guide.py), its scores, and the folder in which the teacher starts."""
    config = run.config
    if config.teacher.path is not None and guidance(config.rope).guided == "none":
        return run.stage("guide", [], {"guide": None}, _none)
    settings = {
        "guide": config.guide.model_dump(exclude=None if config.guide.path else {"path"}),
        "teacher": config.teacher.tiny.model_dump(),
        "path": config.teacher.path, "vision": config.model.vision.model_dump(),
        "vocab_size": config.model.vocab_size, "seed": config.run.seed,
        "window": config.feed.window_mib,
    } | pixel_limits(config)  # fmt: skip
    if config.guide.path:
        settings["encoder"] = content_digest(Path(config.guide.path))

    def make(draft: Draft) -> dict[str, Any]:
        from clinkd.model.guide import OWN, write_settings
        from clinkd.model.tiny_guide import WEIGHTS

        counts: dict[str, Any] = {}
        given = config.guide.path and str(Path(config.guide.path).resolve())
        trained = not given or config.teacher.path is None
        if trained and not (draft.path / OWN / WEIGHTS).is_file():
            counts = _train(run, draft)
        retrieval, calibration = _score(run, draft, given or str((draft.path / OWN).resolve()))
        write_settings(draft.path, given or OWN, calibration)
        write_whole(draft.path / RETRIEVAL, json.dumps(retrieval))
        run.progress.record(stage="guide", event="retrieval", **retrieval)
        return counts | retrieval

    return run.stage("guide", ["prepare"], settings, make, version=7)


def _none(draft: Draft) -> dict[str, Any]:
    write_whole(draft.path / RETRIEVAL, "{}")
    return {}


def _train(run: Run, draft: Draft) -> dict[str, Any]:
    from clinkd.train.guide_task import GuideBatchSpec, GuideTask

    options, workers = run.config.guide, run.config.compute.workers
    start = start_model(run, draft, run.config.teacher.tiny, run.config.teacher.path, run.config.run.seed)
    spec = vqa_spec(run, start, teacher_rope(), train_vision=run.config.teacher.path is None)
    optim = OptimSection(
        steps=options.steps, batch_size=max(1, options.batch_size // workers), lr=options.lr, warmup=0.1,
        muon_lr=options.muon_lr, questions_per_image=1_000_000,
    )  # fmt: skip
    maker = GuideBatchSpec(spec.model, spec.min_pixels, spec.max_pixels)
    training = Training("guide", optim, 0, whole_records=True)
    return train(run, draft, training, maker, lambda source: GuideTask(spec, source))


def _score(run: Run, draft: Draft, encoder: str) -> tuple[dict[str, Any], Calibration]:
    """Scores of all samples, calibrated on the training split; retrieval on the test split."""
    from clinkd.data.shards import samples
    from clinkd.evaluate.alignment import auc, calibrate, grounded, pairs, parts_of, patches, some

    asked = samples(run.done["prepare"].path, "test")
    names = sorted({item["answer"].strip().lower() for item in asked if item["task"] == "roc"})
    folder = draft.work / "logits"
    regions, right = _logits(run, encoder, names or ["nothing"], folder)
    parts = parts_of(folder)
    if guidance(run.config.rope).guided == "patch" and not any(_cells(part) for part in parts):
        raise ConfigError(
            f"guide.path: {run.config.guide.path} tells no patches of an image apart; choose rope.mode=pair, "
            "or a guide with a vision transformer"
        )
    calibration = calibrate(some(parts, "train"))
    if calibration.temperature <= 0:
        run.progress.say(
            "guide: its logits do not tell questions of these images from others; gamma guides by noise"
        )
    write_parts(draft.path, (_scores(part, calibration) for part in parts))
    tested = some(parts, "test")
    found = {
        "retrieval_at_1": right / regions if regions else None,
        "chance": 1 / len(names) if names else None, "regions": regions,
        "pair_auc": auc(*pairs(grounded(tested))), "patch_auc": auc(*patches(tested)), **asdict(calibration),
    }  # fmt: skip
    run.progress.finish(retrieval_at_1=found["retrieval_at_1"], chance=found["chance"])
    return found, calibration


def _cells(part: pa.Table) -> int:
    return len(part.column("patches").combine_chunks().flatten())


def _logits(run: Run, encoder: str, names: list[str], folder: Path) -> tuple[int, int]:
    """Has the encoder say something of every sample, into parts in ``folder``.

    Args:
        names: classes that regions may have.

    Returns:
        Test regions that have a name, and how many of them ranked their own name first.
    """
    from clinkd.data.index import build_index
    from clinkd.data.pieces import work_on
    from clinkd.evaluate.alignment import Scorer, ScoreSpec

    shutil.rmtree(folder, ignore_errors=True)  # of another encoder, or in other pieces
    folder.mkdir(parents=True)
    shards, compute = Shards.of(run.done["prepare"].path), run.config.compute
    index = build_index(shards, None)
    run.progress.start("guide: scores", int(index.starts[-1]))
    done = regions = right = 0
    scorer = partial(Scorer, ScoreSpec(encoder, tuple(names), str(folder.resolve())))
    questions = Questions(shards, index.place)
    for table in work_on(questions, scorer, actors=compute.actors, gpus=compute.gpus_per_actor):
        for told in table.to_pylist():
            done += told["samples"]
            regions, right = regions + told["regions"], right + told["right"]
        run.progress.update(done, record=False)
    return regions, right


def _scores(part: pa.Table, calibration: Calibration) -> pa.Table:
    import pyarrow as pa

    logits = part.column("patches").combine_chunks()
    relevance = pa.array(calibration.relevance(logits.values.to_numpy()))
    return scores_table(
        part.column("sample"), calibration.alignment(part.column("own").to_numpy()),
        pa.ListArray.from_arrays(logits.offsets, relevance), part.column("rows"), part.column("columns"),
    )  # fmt: skip
