"""Artifacts: whole or not there, whatever is killed; made once, by one process at a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from clinkd.artifacts import ArtifactBusy, Store, fingerprint

SETTINGS = {"steps": 3, "lr": 0.1}
FP = fingerprint("distill", {"data": "aa"}, SETTINGS)


def build(store: Store, files: dict[str, str], fp: str = FP):
    with store.build("distill", fp, {"data": "aa"}, SETTINGS) as draft:
        for name, text in files.items():
            path = draft.path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return draft.commit({"samples": 2})


def child(root: Path, body: str) -> subprocess.Popen:
    """A process that runs ``body`` with ``store`` and ``fp``, and prints ``ready`` when told to."""
    code = "import os, time\nfrom pathlib import Path\nfrom clinkd import artifacts\n"
    code += "from clinkd.artifacts import *\n"
    code += f"store, fp = Store(Path({str(root)!r})), {FP!r}\n" + textwrap.dedent(body)
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=dict(os.environ)
    )


def kill_when_ready(process: subprocess.Popen) -> None:
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "ready"
    process.send_signal(signal.SIGKILL)
    process.wait(10)


# Fingerprints
def test_a_fingerprint_does_not_depend_on_the_order_of_keys() -> None:
    assert fingerprint("a", {"x": "1", "y": "2"}, {"p": 1, "q": [1, 2]}) == fingerprint(
        "a", {"y": "2", "x": "1"}, {"q": [1, 2], "p": 1}
    )


def test_stage_inputs_settings_and_version_all_change_the_fingerprint() -> None:
    base = ("distill", {"data": "aa"}, SETTINGS)
    others = [
        fingerprint("label", *base[1:]),
        fingerprint("distill", {"data": "ab"}, SETTINGS),
        fingerprint("distill", {"data": "aa"}, SETTINGS | {"steps": 4}),
        fingerprint(*base, version=2),
    ]
    assert len({FP, *others}) == 5


def test_a_fingerprint_refuses_nan() -> None:
    with pytest.raises(ValueError):
        fingerprint("a", {}, {"lr": float("nan")})


# Commit and find
def test_a_committed_artifact_is_found_with_its_counts_and_files(tmp_path: Path) -> None:
    made = build(Store(tmp_path), {"model.bin": "abc", "logs/loss.txt": "1"})
    found = Store(tmp_path).find("distill", FP)
    assert found is not None and found.path == made.path == tmp_path / f"distill-{FP[:12]}"
    assert found.meta["counts"] == {"samples": 2} and found.meta["settings"] == SETTINGS
    assert set(found.meta["files"]) == {"model.bin", "logs/loss.txt"}
    assert found.meta["files"]["model.bin"][0] == 3
    assert found.meta["versions"]["python"] and found.verify() == []


def test_what_the_writers_hashed_is_not_read_again(tmp_path: Path) -> None:
    with Store(tmp_path).build("label", FP, {}, {}) as draft:
        (draft.path / "large").write_text("x")
        draft.know({"large": "0" * 64})
        made = draft.commit()
    assert made.meta["files"]["large"] == [1, "0" * 64] and made.verify() == ["large"]


def test_nothing_is_found_before_the_commit(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.build("distill", FP, {}, {}) as draft:
        (draft.path / "model.bin").write_text("abc")
        assert store.find("distill", FP) is None
    assert store.find("distill", FP) is None


def test_work_is_there_for_the_next_attempt_and_gone_after_the_commit(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(KeyError), store.build("distill", FP, {}, {}) as draft:
        (draft.work / "step").write_text("7")
        raise KeyError
    with store.build("distill", FP, {}, {}) as draft:
        assert (draft.work / "step").read_text() == "7"
        (draft.path / "model.bin").write_text("abc")
        artifact = draft.commit()
    assert sorted(p.name for p in artifact.path.iterdir()) == ["artifact.json", "model.bin"]


def test_seconds_are_summed_over_attempts(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with store.build("distill", FP, {}, {}):
        time.sleep(0.3)
    time.sleep(0.5)
    assert 0.3 <= build(store, {"a": "1"}).meta["seconds"] < 0.7


def test_building_again_what_is_there_keeps_the_first(tmp_path: Path) -> None:
    first = build(Store(tmp_path), {"a": "1"})
    with Store(tmp_path).build("distill", FP, {}, {}) as draft:
        assert draft.artifact is not None
        (draft.path / "a").write_text("other")
        assert draft.commit().path == first.path
    assert (first.path / "a").read_text() == "1"
    assert not draft.path.exists()


# Damage
@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda path: (path / "a").unlink(), "a is missing"),
        (lambda path: (path / "a").write_text("12345"), "a has 5 bytes, 1 were written"),
        (lambda path: (path / "artifact.json").unlink(), "no artifact.json"),
        (lambda path: (path / "artifact.json").write_text('{"files"'), "cannot be read"),
        (lambda path: (path / "artifact.json").write_text("[]"), "cannot be read"),
    ],
)
def test_a_damaged_artifact_is_reported_and_set_aside(tmp_path: Path, damage, said: str) -> None:
    messages: list[str] = []
    store = Store(tmp_path, messages.append)
    for number in (1, 2):
        damage(build(store, {"a": "1"}).path)
        assert store.find("distill", FP) is None
        assert (tmp_path / f"distill-{FP[:12]}.damaged-{number}").is_dir()
    assert len(messages) == 2 and all(said in message and "\n" not in message for message in messages)


def test_verify_finds_changed_bytes_of_the_same_size(tmp_path: Path) -> None:
    artifact = build(Store(tmp_path), {"a": "1", "b": "2"})
    (artifact.path / "b").write_text("3")
    assert artifact.verify() == ["b"]


# Two processes, and killed ones
def test_a_second_process_is_told_who_builds(tmp_path: Path) -> None:
    body = "with store.build('distill', fp, {}, {}):\n    print('ready', flush=True)\n    time.sleep(60)"
    process = child(tmp_path, body)
    assert process.stdout is not None and process.stdout.readline().strip() == "ready"
    try:
        with pytest.raises(ArtifactBusy, match=f"process {process.pid} on ") as error:
            build(Store(tmp_path), {"a": "1"})
        assert "\n" not in str(error.value)
        other = fingerprint("distill", {}, {"other": 1})
        assert build(Store(tmp_path), {"a": "1"}, other)
    finally:
        process.kill()
        process.wait(10)
    assert build(Store(tmp_path), {"a": "1"})  # the lock went with the process


def test_killed_while_it_writes_the_next_attempt_goes_on(tmp_path: Path) -> None:
    kill_when_ready(child(tmp_path, """
        with store.build('distill', fp, {}, {}) as draft:
            (draft.work / 'step').write_text('7')
            print('ready', flush=True)
            time.sleep(60)
    """))  # fmt: skip
    store = Store(tmp_path)
    assert store.find("distill", FP) is None
    with store.build("distill", FP, {}, {}) as draft:
        assert draft.artifact is None and (draft.work / "step").read_text() == "7"
        (draft.path / "a").write_text("1")
        assert draft.commit().verify() == []


@pytest.mark.parametrize(
    "moment", ["_listing", "_write_synced", "replace_marker", "_finish", "replace_folder"]
)
def test_killed_at_any_moment_of_the_commit_it_is_whole_or_not_there(tmp_path: Path, moment: str) -> None:
    kill_when_ready(child(tmp_path, f"""
        def stop(*a, **k):
            print('ready', flush=True)
            time.sleep(60)
        replace = os.replace
        moment = {moment!r}
        if moment in ('_listing', '_write_synced'):
            setattr(artifacts, moment, stop)
        elif moment == '_finish':
            listed = '*.partial/artifact.json'
            Store._finish = lambda self, *a: stop() if list(self.root.glob(listed)) else None
        else:
            folder = moment == 'replace_folder'
            os.replace = lambda a, b: stop() if Path(a).is_dir() == folder else replace(a, b)
        with store.build('distill', fp, {{}}, {{}}) as draft:
            (draft.work / 'step').write_text('7')
            (draft.path / 'a').write_text('1')
            draft.commit()
    """))  # fmt: skip
    store = Store(tmp_path)
    found = store.find("distill", FP)
    if found is None:
        found = build(store, {"a": "1"})
        assert moment in ("_listing", "_write_synced", "replace_marker")
    assert found.verify() == [] and (found.path / "a").read_text() == "1"
    assert sorted(p.name for p in found.path.iterdir()) == ["a", "artifact.json"]
    assert set(json.loads((found.path / "artifact.json").read_text())["files"]) == {"a"}
