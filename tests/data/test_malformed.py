"""Good rows come out, whatever stands among them; each bad one lies in the quarantine under its reason."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from malformed import IMAGES, PAIRS, Corpus, write_corpus

from clinkd.data import shards
from clinkd.data.prepare import prepare
from clinkd.data.validate import REASONS
from clinkd.data.verify import verify

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> tuple[Path, Corpus, dict]:
    folder = tmp_path_factory.mktemp("malformed")
    corpus = write_corpus(folder)
    return folder / "out", corpus, prepare(corpus.path, folder / "out", images_per_shard=50)


def test_there_are_forty_kinds_and_a_thousand_good_pairs(prepared: tuple[Path, Corpus, dict]) -> None:
    corpus = prepared[1]
    assert len(corpus.kinds) >= 40 and set(corpus.reasons) <= set(REASONS)
    assert sum(len(pairs) for pairs in corpus.good.values()) == IMAGES * PAIRS == 1000


def test_every_good_pair_comes_out_unharmed(prepared: tuple[Path, Corpus, dict]) -> None:
    out, corpus, manifest = prepared
    kept: dict[str, set[tuple[str, str]]] = {}
    for sample in shards.samples(out):
        kept.setdefault(sample["id"], set()).add((sample["question"], sample["answer"]))
    assert kept == corpus.good
    assert manifest["records_out"] == 1000


def test_every_bad_pair_is_refused_for_its_reason(prepared: tuple[Path, Corpus, dict]) -> None:
    out, corpus, manifest = prepared
    assert manifest["by_reason"] == dict(sorted(corpus.reasons.items()))
    lines = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert Counter(line["reason"] for line in lines) == corpus.reasons
    for line in lines:
        assert line["where"].startswith("qa.jsonl:") and line["detail"] and "\n" not in line["detail"]


def test_the_counts_add_up(prepared: tuple[Path, Corpus, dict]) -> None:
    _, corpus, manifest = prepared
    assert manifest["quarantined"] == sum(corpus.reasons.values())
    whole = manifest["records_out"] + manifest["quarantined"] + manifest["duplicates"]
    assert manifest["records_in"] == whole and manifest["duplicates"] == 0


def test_what_came_out_verifies(prepared: tuple[Path, Corpus, dict]) -> None:
    from clinkd.data.prepare import run

    verify(str(prepared[0]), lambda task, jobs: list(run(task, jobs, 0.5, "verify", None)))
