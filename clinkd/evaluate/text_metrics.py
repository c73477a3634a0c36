"""BLEU, METEOR, ROUGE-L, CIDEr and optionally SPICE per modality, rounded and averaged as the published
scripts do.

Decisions:
- The scorers of pycocoevalcap are called one by one: its own `COCOEvalCap` builds SPICE first and fails
  without network.
- METEOR loads while the captions are tokenised and the other scorers run; one scorer may serve several tasks.
- All metrics stand on the PTB tokeniser, a Java program. Without Java they are null with one reason: numbers
  from another tokeniser under the published names would be no measurement of the published metric.
- A METEOR or SPICE that fails costs its own column, not the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clinkd.data.records import MODALITIES
from clinkd.evaluate.java import JavaError, Meteor, find_java, spice, tokenise

BLEU = ("bleu_1", "bleu_2", "bleu_3", "bleu_4")
METRICS = (*BLEU, "meteor", "rouge_l", "cider")
MBMR = (*BLEU, "meteor", "rouge_l")
NO_JARS = "SPICE needs the jars of Stanford CoreNLP 3.6.0; no directory with them was given"

Pairs = Sequence[tuple[str, str]]
"""(annotation, cleaned response) of each row."""


@dataclass(frozen=True)
class TextScores:
    """``corpus[group][metric]``, unrounded; ``per_row[group][metric]``, a number a row; why one is absent."""

    corpus: dict[str, dict[str, Any]]
    per_row: dict[str, dict[str, list[float]]]
    reasons: dict[str, str] = field(default_factory=dict)  # "text" for all, or a metric's name


class TextScorer:
    """Scores groups of captions; holds at most one METEOR process. Use as a context manager.

    Args:
        java: the launcher, or None for the one `find_java` finds.
        timeout_s: limit for each Java step of a call, seconds.
    """

    def __init__(self, java: str | None = None, timeout_s: float = 1800) -> None:
        self.java = java or find_java()
        self.timeout_s = timeout_s
        self._meteor: Meteor | None = None

    def __enter__(self) -> TextScorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the METEOR process, if there is one; the next call of `score` starts another."""
        if self._meteor is not None:
            self._meteor.close()
            self._meteor = None

    def score(self, groups: Mapping[str, Pairs], spice_jars: Path | None = None) -> TextScores:
        """Every metric of each group with rows; SPICE only with ``spice_jars``. No Java raises nothing."""
        groups = {name: pairs for name, pairs in groups.items() if pairs}
        reasons = {} if spice_jars else {"spice": NO_JARS}
        if not self.java:
            reasons["text"] = "no Java on PATH: the PTB tokeniser and METEOR need a Java runtime"
            return TextScores({}, {}, reasons)
        if not groups:
            return TextScores({}, {}, reasons)
        try:
            self._start_meteor(reasons)
            sides = [[pair[side] for pair in pairs] for pairs in groups.values() for side in (0, 1)]
            tokens = tokenise(self.java, sides, self.timeout_s)
        except JavaError as error:
            return TextScores({}, {}, {**reasons, "text": str(error)})
        sided = {name: (tokens[2 * i], tokens[2 * i + 1]) for i, name in enumerate(groups)}
        scores = TextScores({}, {}, reasons)
        for name, (references, hypotheses) in sided.items():
            scores.corpus[name], scores.per_row[name] = _python_scores(references, hypotheses)
        self._add_meteor(sided, scores)
        if spice_jars:
            self._add_spice(sided, scores, spice_jars)
        return scores

    def _start_meteor(self, reasons: dict[str, str]) -> None:
        try:
            self._meteor = self._meteor or Meteor(str(self.java), self.timeout_s)
        except JavaError as error:
            reasons["meteor"] = str(error)

    def _add_meteor(self, sided: dict[str, tuple[list[str], list[str]]], scores: TextScores) -> None:
        try:
            if self._meteor is not None:
                answers = {name: self._meteor.score(*sides) for name, sides in sided.items()}
                for name, (corpus, rows) in answers.items():
                    scores.corpus[name]["meteor"], scores.per_row[name]["meteor"] = corpus, rows
        except JavaError as error:
            scores.reasons["meteor"] = str(error)
            self.close()
        except BaseException:  # answers of an interrupted call must not be read by the next
            self.close()
            raise

    def _add_spice(
        self, sided: dict[str, tuple[list[str], list[str]]], scores: TextScores, jars: Path
    ) -> None:
        references, hypotheses = (
            [line for sides in sided.values() for line in sides[side]] for side in (0, 1)
        )
        try:
            rows = spice(str(self.java), jars, references, hypotheses, self.timeout_s * 4)
        except JavaError as error:
            scores.reasons["spice"] = str(error)
            return
        for name, (group, _) in sided.items():
            scores.per_row[name]["spice"], rows = rows[: len(group)], rows[len(group) :]
            scores.corpus[name]["spice"] = np.mean(scores.per_row[name]["spice"])


def _python_scores(
    references: list[str], hypotheses: list[str]
) -> tuple[dict[str, Any], dict[str, list[float]]]:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    truths = {i: [line] for i, line in enumerate(references)}
    answers = {i: [line] for i, line in enumerate(hypotheses)}
    bleu, bleu_rows = Bleu(4).compute_score(truths, answers, verbose=0)
    rouge, rouge_rows = Rouge().compute_score(truths, answers)
    if any(line.strip() for line in references):
        cider, cider_rows = Cider().compute_score(truths, answers)
    else:  # CIDEr's document frequencies do not exist: the scripts stop here
        cider, cider_rows = np.float64(0), np.zeros(len(references))
    corpus = {**dict(zip(BLEU, bleu, strict=True)), "meteor": None, "rouge_l": rouge, "cider": cider}
    rows = {
        **dict(zip(BLEU, bleu_rows, strict=True)),
        "rouge_l": rouge_rows.tolist(),
        "cider": cider_rows.tolist(),
    }
    return corpus, rows


def published_means(scores: TextScores, *, mbmr: bool, with_spice: bool) -> dict[str, Any]:
    """``{"modalities", "mean"}``: each metric rounded to 6 decimals, averaged over the eight, rounded again.

    A modality without rows scores 0; a metric that could not be had is null everywhere. ROUGE-L, CIDEr and
    SPICE stay numpy floats until they are rounded: numpy and Python round differently in the last decimal.
    mBMR is the mean of BLEU-1 to BLEU-4, METEOR and ROUGE-L, not rounded.
    """
    metrics = (*METRICS, "spice") if with_spice else METRICS
    absent = {m for m in metrics if "text" in scores.reasons or m in scores.reasons}
    modalities: dict[str, dict[str, Any]] = {}
    mean: dict[str, Any] = {}
    for name in MODALITIES:
        corpus = scores.corpus.get(name, {})
        modalities[name] = {m: None if m in absent else round(corpus.get(m, 0.0), 6) for m in metrics}
    for metric in metrics:
        values = [modalities[name][metric] for name in MODALITIES]
        mean[metric] = None if metric in absent else round(sum(values) / len(MODALITIES), 6)
    if mbmr:
        mean["mbmr"] = None if "meteor" in absent else sum(mean[m] for m in MBMR) / len(MBMR)
    return {"modalities": {name: _plain(row) for name, row in modalities.items()}, "mean": _plain(mean)}


def _plain(row: dict[str, Any]) -> dict[str, float | None]:
    """Python floats; null for what is undefined (SPICE can be nan, which JSON has no word for)."""
    return {
        name: float(value) if value is not None and np.isfinite(value) else None
        for name, value in row.items()
    }
