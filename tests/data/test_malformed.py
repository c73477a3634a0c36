"""Good rows come out, whatever stands among them; each bad one lies in the quarantine under its reason."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from malformed import IMAGES, PAIRS, RECORDS, TURNS, Corpus, write_corpus

from clinkd.data import medgrit, shards
from clinkd.data.boxes import BoxError
from clinkd.data.prepare import prepare
from clinkd.data.validate import REASONS, RowError, check_turn, reason
from clinkd.data.verify import verify

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> tuple[Path, Corpus, dict]:
    folder = tmp_path_factory.mktemp("malformed")
    corpus = write_corpus(folder)
    return folder / "out", corpus, prepare(corpus.path, folder / "out", images_per_shard=50)


@pytest.mark.parametrize("kind", TURNS)
def test_each_kind_of_bad_pair_has_its_reason(kind: str) -> None:
    code, question, answer = TURNS[kind]
    with pytest.raises((RowError, BoxError)) as caught:
        check_turn(question, answer)
    assert reason(caught.value)[0] == code and code in REASONS


@pytest.mark.parametrize("kind", RECORDS)
@pytest.mark.parametrize("name", ["qa.json", "qa.jsonl"])
def test_each_kind_of_bad_record_is_one_pair_in_an_array_as_in_lines(
    kind: str, name: str, tmp_path: Path
) -> None:
    code, record = RECORDS[kind]
    text = json.dumps(record)
    (tmp_path / name).write_text(text if name.endswith("l") else f"[{text}]")
    (entry,) = medgrit.read(tmp_path / name)
    assert entry.rows == 1 and (not entry.reason or entry.reason == code)


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
