"""Stage label: the teacher asked once about the training samples that the student learns from.

Decisions:
- The rows lie in a store that all runs under the root (or in a bucket) share; the artifact is the list of the
  samples and where each is. So a changed share, split or image asks the teacher about what is new alone.
- What the teacher was asked is counted: ``new`` samples and ``teacher_passes``, both 0 where all was known.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clinkd import storage
from clinkd.artifacts import Artifact, Draft
from clinkd.config import ConfigError
from clinkd.data.reading import Questions
from clinkd.data.shards import Shards
from clinkd.distill.teacher_cache import write_index
from clinkd.stages.base import Run
from clinkd.stages.models import pixel_limits, teacher_folder
from clinkd.stages.training import share_of, training_index

if TYPE_CHECKING:
    from clinkd.distill.labeller import LabelSpec

MEASURED = 1000
"""Answers whose tokens are counted for the forecast."""


def label(run: Run) -> Artifact:
    """Answers, confidence and states of the training samples, or of ``distill.share`` of their records."""
    options = run.config.distill
    settings = {
        "unlabelled_share": options.unlabelled_share, "share": options.share, "seed": run.config.run.seed,
        "cache": options.cache.model_dump(exclude={"root"}), "max_label_tokens": options.max_label_tokens,
        "best_of": options.best_of, "dtype": run.config.model.dtype,
    } | pixel_limits(run.config)  # fmt: skip
    if options.best_of > 1:
        settings["label_temperature"] = options.label_temperature
    if options.cache.form == "topk":
        settings["student"] = run.config.model.path

    def make(draft: Draft) -> dict[str, Any]:
        model = teacher_folder(run)
        spec = _spec(run, model)
        index = share_of(training_index(run), options.share, run.config.run.seed)
        _forecast(run, model, spec, int(index.starts[-1]))
        questions = Questions(Shards.of(run.done["prepare"].path), index.place)
        asked = _ask(run, spec, questions, "label", int(index.starts[-1]))
        table = write_index(draft.path, asked.drop_columns(["new", "passes"]), spec.store(), spec.form)
        return _counts(run, table, asked)

    return run.stage("label", ["prepare", "teacher"], settings, make, version=3)


def states_along_truth(run: Run, model: Path, questions: Questions, out: Path, title: str) -> None:
    """What ``model`` says along the answers of records of one turn each, as a list that ``TeacherCache``
    reads; its samples are named as the records are. What the store has is not asked again.
    """
    import pyarrow.compute as pc

    out.mkdir(parents=True, exist_ok=True)
    spec = replace(_spec(run, model), hidden_share=0.0)
    asked = _ask(run, spec, questions, title, len(questions)).drop_columns(["new", "passes"])
    names = pc.replace_substring_regex(asked.column("sample"), "#0$", "")
    write_index(out, asked.set_column(0, "sample", names), spec.store(), spec.form)


def _spec(run: Run, model: Path) -> LabelSpec:
    from clinkd.distill.forms import Form
    from clinkd.distill.labeller import LabelSpec
    from clinkd.distill.teacher_cache import teacher_key

    config = _config(model)
    options, cache = run.config.distill, run.config.distill.cache
    try:
        exact = cache.form != "topk"
        form = Form(cache.form) if exact else Form(cache.form, cache.k, _vocabulary(run, config))
    except ValueError as error:
        raise ConfigError(str(error)) from None
    settings = {
        "form": cache.form, "k": form.k, "vocabulary": form.vocabulary, "dtype": run.config.model.dtype,
    } | pixel_limits(run.config)  # fmt: skip
    return LabelSpec(
        model=str(model.resolve()), root=_root(run), key=teacher_key(model, settings), form=form,
        chunk_size=options.chunk_size, max_new_tokens=options.max_label_tokens, best_of=options.best_of,
        temperature=options.label_temperature, hidden_share=options.unlabelled_share,
        seed=run.config.run.seed, dtype=run.config.model.dtype, min_pixels=run.config.model.min_pixels,
        max_pixels=run.config.model.max_pixels, endpoint=storage.endpoint(),
    )  # fmt: skip


def _config(model: Path) -> dict[str, Any]:
    return dict(json.loads((model / "config.json").read_text()))


def _root(run: Run) -> str:
    given = run.config.distill.cache.root or Path(run.config.run.root) / "teacher-cache"
    return str(storage.absolute(storage.locate(given)))


def _text(config: dict[str, Any], key: str) -> int:
    """A number of a model's config.json that stands in its text part, or beside it in older folders."""
    return int(config.get("text_config", {}).get(key) or config[key])


def _vocabulary(run: Run, teacher: dict[str, Any]) -> int:
    """The common prefix of the vocabularies of teacher and student."""
    own = _text(teacher, "vocab_size")
    if run.config.model.path is None:  # made here, with the teacher's tokens
        return own
    student = json.loads((Path(run.config.model.path) / "config.json").read_text())
    return min(own, _text(student, "vocab_size"))


def _about(spec: LabelSpec) -> dict[str, Any]:
    return {
        "teacher": spec.model, "form": spec.form.name, "k": spec.form.k, "vocabulary": spec.form.vocabulary,
        "dtype": spec.dtype,
    }  # fmt: skip


def _forecast(run: Run, model: Path, spec: LabelSpec, total: int) -> None:
    """Says how large the rows will be, reckoned from some of the answers.

    Raises:
        ConfigError: they will not fit on the disk.
    """
    from clinkd.data.shards import samples
    from clinkd.distill.labeller import answer_tokens

    store, form, width = spec.store(), spec.form, _text(_config(model), "hidden_size")
    training = samples(run.done["prepare"].path, "train")
    some = [item["answer"] for item in islice(training, 0, None, max(1, total // MEASURED))]
    tokens = round(answer_tokens(model, some) / len(some) * total)
    size = tokens * form.token_bytes(width)
    known = len(store.parts())
    run.progress.say(
        f"label: {total:,} samples, about {tokens:,} answer tokens: {_readable(size)} as {form.name} "
        f"({form.token_bytes(width):,} bytes a token) in {store.folder}"
        + (f"; {known:,} parts are there, what they hold is not asked again" if known else "")
    )
    if not storage.is_remote(store.folder) and not known:
        above = next(folder for folder in store.folder.parents if folder.exists())
        free = shutil.disk_usage(above).free
        if size > free:
            raise ConfigError(
                f"distill.cache: {_readable(size)} will not fit: {_readable(free)} are free in {above}; "
                "choose form=topk or int8, a smaller distill.share, or another cache.root"
            )


def _readable(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:,.1f} TiB"


def _ask(run: Run, spec: LabelSpec, questions: Questions, title: str, total: int) -> Any:
    """A table of all turns of the records: ``sample, task, key``, whether it was ``new`` to the store, and
    (on some rows) how often the teacher ran (``passes``)."""
    import pyarrow as pa

    from clinkd.data.pieces import work_on
    from clinkd.distill.labeller import Labeller

    spec.store().open(_about(spec))
    compute = run.config.compute
    run.progress.start(title, total)
    tables, done = [], 0
    found = work_on(questions, partial(Labeller, spec), actors=compute.actors, gpus=compute.gpus_per_actor)
    for table in found:
        tables.append(table)
        done += len(table)
        run.progress.update(done, record=False)
    return pa.concat_tables(tables)


def _counts(run: Run, table: Any, asked: Any) -> dict[str, Any]:
    """What was asked, learned and refused; the figures add up to the samples."""
    import pyarrow.compute as pc

    ways = table.group_by(["source", "reason"]).aggregate([("sample", "count")]).to_pylist()
    by_way = {(way["source"], way["reason"]): way["sample_count"] for way in ways}
    reasons = {reason: count for (_, reason), count in by_way.items() if reason is not None}
    taught = by_way.get(("teacher", None), 0)
    counts = {
        "samples": len(table), "truths": len(table) - taught - sum(reasons.values()), "pseudo_labels": taught,
        "refused": sum(reasons.values()), "new": pc.sum(asked.column("new")).as_py(),
        "teacher_passes": pc.sum(asked.column("passes")).as_py(),
    }  # fmt: skip
    run.progress.record(stage="label", event="refused", **reasons)
    run.progress.finish(**counts)
    return counts | {f"refused_{reason}": count for reason, count in sorted(reasons.items())}
