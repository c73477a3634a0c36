"""Captions: the published numbers from one METEOR process, and a plain word where Java or jars lack."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from prediction_rows import GOLDEN, golden, row

from clinkd.data.records import MODALITIES
from clinkd.evaluate.java import JavaError, Meteor, find_java, one_line, package_dir, spice, tokenise
from clinkd.evaluate.score import read_predictions, score_task, score_tasks
from clinkd.evaluate.text_metrics import TextScorer

JAVA = find_java()
needs_java = pytest.mark.skipif(JAVA is None, reason="needs a Java runtime")


@pytest.fixture(scope="module")
def scored():
    return score_tasks({task: read_predictions(GOLDEN / f"{task}.jsonl") for task in ("rc", "mia")})


@pytest.fixture(scope="module")
def scorer():
    with TextScorer() as scorer:
        yield scorer


@needs_java
@pytest.mark.parametrize("task", ["rc", "mia"])
def test_the_golden_captions_score_as_published(scored, task):
    expected, result = golden(f"{task}_expected.json"), scored[task]
    for name, metrics in expected["modality_score_dict"].items():
        for metric, value in metrics.items():
            found = result["modalities"][name][metric.lower()]
            assert found == pytest.approx(value, abs=1.5e-6), (name, metric)
    for metric, value in expected["mean_metric_score"].items():
        assert result["mean"][metric.lower()] == pytest.approx(value, abs=1.5e-6)
    if task == "mia":
        assert result["mean"]["mbmr"] == pytest.approx(expected["mBMR"], abs=1.5e-6)
    json.dumps(result, allow_nan=False)


@needs_java
def test_spice_without_jars_is_null_and_says_why(scored):
    assert scored["rc"]["spice"] is None
    assert scored["rc"]["mean"]["spice"] is None
    assert "CoreNLP" in scored["rc"]["spice_reason"]
    assert "spice" not in scored["mia"]["mean"]


@pytest.mark.slow
@needs_java
def test_every_golden_caption_scores_alone_as_published(scorer):
    """Rows of one modality scored together: METEOR and ROUGE-L of each row."""
    for task in ("rc", "mia"):
        raws = read_predictions(GOLDEN / f"{task}.jsonl")
        texts = golden(f"{task}_expected.json")["processed_response"]
        ids = {m: [r["id"] for r in raws if r["image"].startswith(f"{m}_")] for m in MODALITIES}
        by_id = {r["id"]: r["annotation"] for r in raws}
        scores = scorer.score({m: [(by_id[i], texts[str(i)]) for i in ids[m]] for m in MODALITIES})
        for name, numbers in ids.items():
            for at, number in enumerate(numbers):
                expected = golden(f"{task}_expected.json")["per_item"][str(number)]
                for metric, value in expected.items():
                    found = scores.per_row[name][metric.lower()][at]
                    assert found == pytest.approx(value, abs=1.5e-6), (task, number, metric)


@needs_java
def test_line_breaks_inside_a_caption_shift_nothing():
    captions = ["a\rb", "one\vtwo\fthree", "x\u2028y\u2029z", "p\x85q", "", "\n", "last\r\n", ""]
    tokens = tokenise(JAVA, [captions, [], [""], captions[::-1]])
    assert tokens[0] == ["a b", "one two three", "x y z", "p q", "", "", "last", ""]
    assert tokens[1:] == [[], [""], tokens[0][::-1]]


@needs_java
def test_letters_no_encoding_has_do_not_stop_the_tokeniser():
    assert tokenise(JAVA, [["half \ud800 pair", "\x00", "naïve – café"]])[0][2] == "naïve café"


@needs_java
def test_the_tokeniser_leaves_the_package_as_it_was():
    before = sorted(path.name for path in (package_dir() / "tokenizer").iterdir())
    seen = (package_dir() / "tokenizer").stat().st_mtime_ns
    tokenise(JAVA, [["some words"]])
    assert sorted(path.name for path in (package_dir() / "tokenizer").iterdir()) == before
    assert (package_dir() / "tokenizer").stat().st_mtime_ns == seen


@pytest.mark.slow
@needs_java
def test_captions_of_every_ugly_kind_get_a_number(scorer):
    ugly = ["", "|||", "a ||| b", "?", "\r\r", "EVAL ||| 1", "SCORE", "\ud800", "x" * 5000, "word " * 400]
    pairs = [(truth, answer) for truth in ugly for answer in ugly]
    rows = [row(truth, answer, MODALITIES[i % 3], id=i) for i, (truth, answer) in enumerate(pairs)]
    rows += [row("", "nothing to compare with", "pet", id=i) for i in range(3)]
    result = score_task("mia", rows, scorer=scorer)
    assert result["text_reason"] is None
    assert result["meteor_reason"] is None
    assert all(value is not None for value in result["mean"].values())
    assert result["modalities"]["pet"]["cider"] == 0


@needs_java
def test_spice_with_broken_jars_fails_with_a_reason(tmp_path: Path):
    with pytest.raises(JavaError, match=r"stanford-corenlp-3\.6\.0\.jar"):
        spice(JAVA, tmp_path, ["a"], ["a"])
    for name in ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(JavaError, match="SPICE"):
        spice(JAVA, tmp_path, ["a cyst"], ["a cyst"])


def test_without_java_the_metrics_are_null_with_one_reason(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    result = score_task("mia", [row("No mass.", "A mass.")])
    assert "Java" in result["text_reason"]
    assert set(result["mean"].values()) == {None}
    assert result["modalities"]["ct"]["bleu_1"] is None
    assert result["versions"]["java"] is None
    assert result["honest"]["negation_errors"]["value"] == 1  # needs no Java
    assert result["honest"]["rouge_l_words"]["value"] > 0


def launcher(path: Path, script: str) -> str:
    """A program that stands where Java would."""
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.skipif(os.name != "posix", reason="shell scripts")
def test_a_java_that_fails_costs_the_metrics_and_raises_nothing(tmp_path: Path):
    with TextScorer(launcher(tmp_path / "java", "echo no such machine >&2; exit 3")) as scorer:
        scores = scorer.score({"ct": [("a", "b")]})
    assert "ended with 3: no such machine" in scores.reasons["text"]


@needs_java
def test_a_meteor_that_dies_costs_its_own_column_only(tmp_path: Path):
    fails = "*meteor*) echo out of memory >&2; exit 1;;"
    script = f'case "$*" in {fails} *) exec {shutil.which(JAVA)} "$@";; esac'
    with TextScorer(launcher(tmp_path / "java", script)) as scorer:
        scores = scorer.score({"ct": [("a small cyst", "a small cyst")]})
    assert "out of memory" in scores.reasons["meteor"]
    assert scores.corpus["ct"]["rouge_l"] == 1
    assert scores.corpus["ct"]["meteor"] is None


@pytest.mark.skipif(os.name != "posix", reason="shell scripts")
def test_a_meteor_that_never_answers_is_killed(tmp_path: Path):
    start = time.monotonic()
    with Meteor(launcher(tmp_path / "java", "exec sleep 300"), timeout_s=0.5) as meteor:
        with pytest.raises(JavaError, match="did not answer"):
            meteor.score(["a"], ["a"])
        process = meteor._process
    assert process.poll() is not None
    assert time.monotonic() - start < 10


def test_all_line_breaks_python_and_java_know_become_spaces():
    every = "".join(map(chr, range(0x3000)))
    assert len(one_line(every)) == len(every)
    assert len(one_line(every).splitlines()) == 1
