"""Caption metrics of eight modalities: one scorer for all, against a METEOR process for each.

    python benchmarks/text_metrics.py [--pairs N] [--modalities N] [--rounds N]

--pairs captions of phantoms for each of --modalities, a third of the answers being the truth, a third another
phantom's, a third the truth with words left out. One side is `TextScorer`; the other does as the published
scripts do: for each modality the two tokeniser runs, BLEU, METEOR in a process of its own, ROUGE-L and CIDEr
of pycocoevalcap. Both run in every round, one after the other; the ratio is of the medians. Their numbers are
compared.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

from clinkd.data.phantoms import PhantomSpec, draw
from clinkd.data.records import MODALITIES
from clinkd.evaluate.text_metrics import BLEU, Pairs, TextScorer

Scores = dict[str, dict[str, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    for name, value in (("pairs", 1000), ("modalities", 8), ("rounds", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    chosen = parser.parse_args()
    groups = captions(chosen.pairs, chosen.modalities)
    sides = {"a process for each modality": by_modality, "one scorer": at_once}
    times: dict[str, list[float]] = {name: [] for name in sides}
    found: dict[str, Scores] = {}
    for _ in range(chosen.rounds):
        for name, side in sides.items():
            start = time.perf_counter()
            found[name] = side(groups)
            times[name].append(time.perf_counter() - start)
    theirs, ours = found.values()
    worst = max(abs(theirs[group][key] - ours[group][key]) for group in groups for key in theirs[group])
    medians = [statistics.median(rounds) for rounds in times.values()]
    print(f"{chosen.pairs} pairs x {chosen.modalities} modalities; metrics differ by at most {worst:.1e}")
    for (name, rounds), seconds in zip(times.items(), medians, strict=True):
        each = " ".join(f"{value:.1f}" for value in rounds)
        print(f"{name:30}{seconds:8.1f} s ({each}) {medians[0] / seconds:6.2f}x")


def captions(pairs: int, modalities: int) -> dict[str, Pairs]:
    """(truth, answer) of phantoms' captions and image analyses, the same in every run."""
    rng = random.Random(0)
    spec = PhantomSpec(4000)
    texts: list[str] = []
    number = 0
    while len(texts) < pairs:
        turns = draw(spec, number % spec.images)[1].turns
        texts += [turn.answer for turn in turns if turn.task in ("rc", "mia")]
        number += 1
    return {
        name: [(text, _answer(rng, text, texts)) for text in rng.sample(texts[:pairs], pairs)]
        for name in list(MODALITIES)[:modalities]
    }


def _answer(rng: random.Random, truth: str, others: list[str]) -> str:
    kind = rng.randrange(3)
    if kind == 0:
        return truth
    if kind == 1:
        return rng.choice(others)
    return " ".join(word for word in truth.split() if rng.random() > 0.3) or truth


def at_once(groups: dict[str, Pairs]) -> Scores:
    with TextScorer() as scorer:
        scores = scorer.score(groups)
    assert "text" not in scores.reasons and "meteor" not in scores.reasons, scores.reasons
    return {
        name: {key: float(value) for key, value in row.items()} for name, row in scores.corpus.items()
    }


def by_modality(groups: dict[str, Pairs]) -> Scores:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    found: Scores = {}
    for name, pairs in groups.items():
        tokenizer = PTBTokenizer()
        truths, answers = (
            tokenizer.tokenize({i: [{"caption": pair[side]}] for i, pair in enumerate(pairs)})
            for side in (0, 1)
        )
        bleu, _ = Bleu(4).compute_score(truths, answers, verbose=0)
        row = dict(zip(BLEU, bleu, strict=True))
        for key, scorer in (("meteor", Meteor()), ("rouge_l", Rouge()), ("cider", Cider())):
            row[key], _ = scorer.compute_score(truths, answers)
        found[name] = {key: float(value) for key, value in row.items()}
    return found


if __name__ == "__main__":
    main()
