"""Stage reflect: rounds of predict, judge, correct, select, train.

Decisions:
- Every round keeps what it made in its own folder: answers and candidates part by part, the feedback, the
  model, the answers after. A run that was killed goes on with the first piece that is missing.
- The corrector is the teacher, one made of it by exercises, or the model that is named: it sees the question,
  the truth and the wrong answer, and samples candidates.
- After a round the student answers the round's questions again, and the validation split: how many errors are
  left there decides whether another round begins, and which round's model is kept (none: the one before).
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clinkd import metrics
from clinkd.artifacts import Artifact, Draft
from clinkd.data.reading import Questions
from clinkd.data.shards import Shards
from clinkd.stages.asking import Desks
from clinkd.stages.base import Run, content_digest, write_whole
from clinkd.stages.models import lora_settings, scores, teacher_folder, vqa_spec
from clinkd.stages.training import (
    Training,
    answers,
    corrector,
    fed,
    split_index,
    train,
    training_index,
)

if TYPE_CHECKING:
    import numpy as np

    from clinkd.data.index import RecordIndex
    from clinkd.evaluate.predict import PredictSpec
    from clinkd.reflect.judge import Verdict
    from clinkd.reflect.similarity import TextSimilarity

ROUNDS = "rounds.json"
"""The stage's account: ``before`` (validation before the first round), ``rounds``, ``kept`` (its number)."""


TRAINED = "trained.json"
"""Of a round, written when its model is whole."""


def reflect(run: Run) -> Artifact:
    """The student, trained with feedback on its own wrong answers."""
    config = run.config
    settings = {
        "reflect": config.reflect.model_dump(), "rope": config.rope.model_dump(),
        "train_vision": config.model.train_vision, "seed": config.student_seed,
        "precision": config.compute.precision,
    } | lora_settings(config) | fed(config)  # fmt: skip
    if config.reflect.corrector is not None:
        settings["corrector"] = content_digest(Path(config.reflect.corrector))
    read = ["prepare", "guide", "teacher", "distill"]
    if corrector(run) is not None:
        read.append("corrector")
    if config.reflect.target == "distribution":
        settings["method"] = _method(run)

    def make(draft: Draft) -> dict[str, Any]:
        with Desks.of(run) as desks:
            return _Stage(run, draft, desks).run_all()

    return run.stage("reflect", read, settings, make, version=5)


def right_now(run: Run, answered: list[dict[str, Any]]) -> dict[str, bool]:
    """What the judge finds of some answers, by sample."""
    from clinkd.reflect.rounds import judged, right
    from clinkd.reflect.similarity import load_similarity

    options = run.config.reflect
    return right(answered, judged(answered, load_similarity(options.similarity), options))


def _method(run: Run) -> dict[str, Any]:
    """How the corrector's distribution is approached."""
    options = run.config.distill
    return {"divergence": options.divergence, "temperature": options.temperature,
            "jsd_beta": options.jsd_beta, "scale_t2": options.scale_t2}  # fmt: skip


@dataclass
class _Stage:
    """The rounds of one run."""

    run: Run
    draft: Draft
    desks: Desks

    def run_all(self) -> dict[str, Any]:
        from clinkd.reflect.rounds import best_round, finished

        options = self.run.config.reflect
        self._forecast()
        model = self.run.done["distill"].path / "model"
        before = self._validation(0, model, None)
        rounds: list[dict[str, Any]] = []
        errors = [before["error_rate"]]
        was_right = self._was_right(0)
        for number in range(1, options.rounds + 1):
            rounds.append(self._round(number, model, was_right))
            errors.append(rounds[-1]["validation"]["error_rate"])
            self._publish(number, rounds[-1])
            model, was_right = self._folder(number) / "model", self._was_right(number)
            if number < options.rounds and finished(errors, options.patience):
                self.run.progress.say(f"reflect: round {number} was the last, no gain on validation")
                break
        kept = best_round(errors)
        self._keep(kept, len(rounds))
        write_whole(
            self.draft.path / ROUNDS, json.dumps({"before": before, "rounds": rounds, "kept": kept}, indent=1)
        )
        told = {f"round_{number}": _in_short(facts) for number, facts in enumerate(rounds, 1)}
        return told | {"kept": f"round {kept}" if kept else "the student before the rounds"}

    def _forecast(self) -> None:
        """How many answers are generated at most."""
        from clinkd.reflect.rounds import generations

        options = self.run.config.reflect
        asked = generations(options, self._validation_size)
        self.run.progress.say(
            f"reflect: a round generates at most {asked['student']:,} answers of the student and "
            f"{asked['corrector']:,} candidates of the corrector; {asked['whole']:,} in all"
        )

    @cached_property
    def _similarity(self) -> TextSimilarity:
        from clinkd.reflect.similarity import load_similarity

        return load_similarity(self.run.config.reflect.similarity)

    def _folder(self, number: int) -> Path:
        folder = self.draft.path / f"round-{number}"
        folder.mkdir(exist_ok=True)
        return folder

    # A round, piece by piece.

    def _round(self, number: int, model: Path, was_right: dict[str, bool]) -> dict[str, Any]:
        folder = self._folder(number)
        account = folder / "round.json"
        if account.is_file():
            return dict(json.loads(account.read_text()))
        answered = self._answers(number, "answers", model)
        verdicts = self._judged(answered)
        if not (folder / "feedback.parquet").is_file():
            self._collect(number, model, answered, verdicts)
        if not (folder / TRAINED).is_file():
            self._train(number, model, answered, verdicts)
        facts = self._account(number, answered, verdicts, was_right)
        write_whole(account, json.dumps(facts, indent=1))
        self.run.progress.record(stage="reflect", round=number, event="round", **_in_short(facts))
        return facts

    def _publish(self, number: int, facts: dict[str, Any]) -> None:
        names = {"run": self.run.config.run.name, "round": str(number)}
        metrics.REFLECT_ANSWERED.set(facts["before"]["answered"], **names)
        metrics.REFLECT_WRONG.set(facts["before"]["wrong"], **names)
        if (error := facts["validation"]["error_rate"]) is not None:
            metrics.REFLECT_ERROR.set(error, **names)

    def _judged(self, answered: list[dict[str, Any]]) -> list[Verdict]:
        from clinkd.reflect.rounds import judged

        return judged(answered, self._similarity, self.run.config.reflect)

    def _answers(self, number: int, name: str, model: Path) -> list[dict[str, Any]]:
        """A student's answers to the round's training samples; ``name``: of the folder that keeps them."""
        from clinkd.reflect.rounds import choose_records

        config, index = self.run.config, training_index(self.run)
        chosen = choose_records(index.turns, config.reflect.samples, config.student_seed, number)
        title = f"reflect: {name} of round {number}"
        return self._ask(self._student(model), index, chosen, self._folder(number) / name, title)

    def _ask(
        self, spec: PredictSpec, index: RecordIndex, chosen: np.ndarray, folder: Path, title: str
    ) -> list[dict[str, Any]]:
        return self.desks.ask(spec, Questions(self._shards, index.place[chosen]), folder, title, 0)

    @cached_property
    def _shards(self) -> Shards:
        return Shards.of(self.run.done["prepare"].path)

    def _student(self, model: Path) -> PredictSpec:
        from clinkd.evaluate.predict import PredictSpec

        options = self.run.config.evaluate
        return PredictSpec(
            str(model.resolve()), options.batch_size, options.max_new_tokens,
            scores=scores(self.run, self.run.config.rope), dtype=self.run.config.model.dtype,
        )  # fmt: skip

    @cached_property
    def _corrector(self) -> Path:
        given, done = self.run.config.reflect.corrector, self.run.done
        if "corrector" in done:
            return (done["corrector"].path / "model").resolve()
        return (Path(given) if given else teacher_folder(self.run)).resolve()

    def _collect(
        self, number: int, model: Path, answered: list[dict[str, Any]], verdicts: list[Verdict]
    ) -> None:
        """Correct and select; feedback.parquet is written last."""
        from clinkd.distill.teacher_cache import teacher_key
        from clinkd.reflect import rounds

        options, folder = self.run.config.reflect, self._folder(number)
        wrong = rounds.worst(answered, verdicts, options.budget)
        self.run.progress.say(
            f"reflect: round {number}: {sum(verdict.needs_correction for verdict in verdicts)} of "
            f"{len(answered)} answers were wrong, {len(wrong)} are put to the corrector"
        )
        rows: list[dict[str, Any]] = []
        if wrong:
            found = self._candidates(number, [row for row, _ in wrong])
            models = {"student": teacher_key(model, {}), "corrector": teacher_key(self._corrector, {})}
            rows = rounds.choose(wrong, found, self._similarity, options, models)
        used = sum(row["source"] == "candidate" for row in rows)
        self.run.progress.record(
            stage="reflect", round=number, event="selected", corrected=len(rows), candidates=used
        )
        unfinished = folder / "feedback.tmp"
        rounds.write_feedback(rows, unfinished)
        unfinished.rename(folder / "feedback.parquet")

    def _candidates(self, number: int, wrong: list[dict[str, Any]]) -> dict[str, list[str]]:
        """The corrector's candidates by sample; none where its distribution along the truth is the target."""
        from clinkd.evaluate.predict import PredictSpec
        from clinkd.reflect.rounds import correction_turn
        from clinkd.stages.label import states_along_truth

        config, folder = self.run.config, self._folder(number)
        title = f"reflect: corrections of round {number}"
        index = training_index(self.run)
        samples = sorted(wrong, key=lambda row: str(row["sample"]))
        records = index.find([row["sample"].rpartition("#")[0] for row in samples])
        instead = tuple((str(row["sample"]), (correction_turn(row),)) for row in samples)
        questions = Questions(self._shards, index.place[records], instead)
        if config.reflect.target == "distribution":
            states_along_truth(self.run, self._corrector, questions, folder / "soft", title)
            return {row["sample"]: [] for row in samples}
        spec = PredictSpec(
            str(self._corrector), config.evaluate.batch_size, config.evaluate.max_new_tokens,
            candidates=config.reflect.candidates, temperature=config.reflect.temperature,
            dtype=config.model.dtype,
        )  # fmt: skip
        seed = 1_000_000 * config.student_seed + 10_000 * number
        rows = self.desks.ask(spec, questions, folder / "candidates", title, seed)
        return {row["sample"].removesuffix("#0"): row["responses"] for row in rows}

    def _train(
        self, number: int, model: Path, answered: list[dict[str, Any]], verdicts: list[Verdict]
    ) -> None:
        """Trains on the full data with shares of feedback and replay."""
        import pyarrow.parquet as pq

        from clinkd.train.reflect_task import Feedback, ReflectTask
        from clinkd.train.targets import Corrections

        run, folder = self.run, self._folder(number)
        options, zero = run.config.reflect, run.config.compute.zero_stage
        kept = (folder / "feedback.parquet").resolve()
        wrong = pq.read_table(kept, columns=["sample"]).column("sample").to_pylist()
        had_right = [
            row["sample"]
            for row, verdict in zip(answered, verdicts, strict=True)
            if options.replay and not verdict.needs_correction
        ]
        soft = str((folder / "soft").resolve()) if (folder / "soft").is_dir() else None
        feedback = Feedback(wrong, options.share, had_right, options.replay, soft=soft, method=_method(run))
        spec = vqa_spec(
            run, model, run.config.rope, train_vision=run.config.model.train_vision,
            coordinate_weight=options.optim.coordinate_weight, lora=run.config.model.lora,
        )  # fmt: skip
        self.desks.make_room()
        training = Training(
            f"reflect-{number}", options.optim, zero, seed=run.config.student_seed, out=folder
        )
        maker = answers(run, spec, Corrections(str(kept), soft))
        counts = train(
            run, self.draft, training, maker, lambda source: ReflectTask(spec, source, feedback, zero)
        )
        write_whole(folder / TRAINED, json.dumps({key: counts[key] for key in ("steps", "loss")}))

    # What became of it.

    def _account(
        self, number: int, answered: list[dict[str, Any]], verdicts: list[Verdict], was_right: dict[str, bool]
    ) -> dict[str, Any]:
        import pyarrow.parquet as pq

        from clinkd.reflect.rounds import right, tally

        folder, options = self._folder(number), self.run.config.reflect
        model = folder / "model"
        after = self._answers(number, "after", model)
        sources = pq.read_table(folder / "feedback.parquet", columns=["source"])["source"].to_pylist()
        before = tally(answered, verdicts)
        return {
            "before": before, "after": tally(after, self._judged(after), right(answered, verdicts)),
            "corrected": len(sources), "from_candidates": sources.count("candidate"),
            "generated": {
                "student": len(answered) + len(after) + self._validation_size,
                "corrector": len(sources) * (options.candidates if options.target == "text" else 0),
            },
            "validation": self._validation(number, model, was_right),
        } | json.loads((folder / TRAINED).read_text())  # fmt: skip

    @cached_property
    def _validation_records(self) -> np.ndarray:
        """Records of the validation split that are answered."""
        from clinkd.reflect.rounds import choose_records

        turns = split_index(self.run, "validation").turns
        return choose_records(turns, self.run.config.reflect.validation, 0, 0)

    @property
    def _validation_size(self) -> int:
        """Their turns."""
        return int(split_index(self.run, "validation").turns[self._validation_records].sum())

    def _validated(self, number: int, model: Path) -> list[dict[str, Any]]:
        folder, title = self._folder(number) / "validation", f"reflect: validation after round {number}"
        index = split_index(self.run, "validation")
        return self._ask(self._student(model), index, self._validation_records, folder, title)

    def _validation(self, number: int, model: Path, was_right: dict[str, bool] | None) -> dict[str, Any]:
        from clinkd.reflect.rounds import tally

        answered = self._validated(number, model)
        found = tally(answered, self._judged(answered), was_right)
        if answered:
            self.run.progress.say(
                f"reflect: after round {number}, {found['wrong']} of {len(answered)} answers to the "
                "validation split are wrong"
            )
        return found

    def _was_right(self, number: int) -> dict[str, bool]:
        """Of the validation samples after a round, whose answers are there."""
        from clinkd.reflect.rounds import right

        answered = self._validated(number, Path())
        return right(answered, self._judged(answered))

    def _keep(self, kept: int, rounds: int) -> None:
        """The chosen round's model as the stage's; the others' are not kept, they are the largest part."""
        target = self.draft.path / "model"
        if not target.is_dir():
            source = self._folder(kept) if kept else self.run.done["distill"].path
            for name in ("adapter", "model"):
                if (source / name).is_dir():
                    unfinished = self.draft.path / f"{name}.tmp"
                    shutil.rmtree(unfinished, ignore_errors=True)
                    shutil.copytree(source / name, unfinished, copy_function=_link)
                    unfinished.rename(self.draft.path / name)
        for number in range(1, rounds + 1):
            for name in ("adapter", "model"):
                shutil.rmtree(self._folder(number) / name, ignore_errors=True)


def _link(source: str, target: str) -> None:
    """A second name for a file of the same disk; a copy elsewhere."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _in_short(facts: dict[str, Any]) -> dict[str, Any]:
    """A round's account in a line: numbers, no texts."""
    before, after, checked = facts["before"], facts["after"], facts["validation"]
    return {
        "answered": before["answered"], "wrong": before["reasons"], "corrected": facts["corrected"],
        "from_candidates": facts["from_candidates"], "fixed": after["fixed"], "broke": after["broke"],
        "still_wrong": after["wrong"], "validation_error": checked["error_rate"],
        "steps": facts["steps"], "loss": facts["loss"],
    }  # fmt: skip
