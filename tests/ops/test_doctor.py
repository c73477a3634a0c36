"""What the doctor says of a machine: one line a check, and what to do."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
from faulty_s3 import BUCKET, faulty_s3

from clinkd.cli import main
from clinkd.ops import doctor as ward
from clinkd.ops.doctor import doctor


def test_this_machine_can_do_the_main_job(tmp_path: Path) -> None:
    found = list(doctor(tmp_path / "not" / "there" / "yet"))
    assert not [finding for finding in found if finding.state == "failed"]
    assert len({finding.name for finding in found}) == len(found) >= 14
    for finding in found:
        assert finding.state == "ok" or finding.remedy  # no complaint without what to do
        assert "\n" not in finding.line()


def test_a_bucket_is_tried_and_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with faulty_s3() as (endpoint, _):
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", endpoint)
        found = ward.round_trip(f"s3://{BUCKET}/checks")
        assert found.state == "ok" and "there and back" in found.found
        import boto3

        assert "Contents" not in boto3.client("s3", endpoint_url=endpoint).list_objects_v2(
            Bucket=BUCKET, Prefix="checks"
        )
        missing = ward.round_trip("s3://no-such-bucket/checks")
    assert missing.state == "failed" and "credentials come from" in missing.remedy


def test_a_package_that_is_not_there_is_named_with_the_remedy() -> None:
    found = ward._package("no-such-package")()
    assert (found.state, found.found) == ("failed", "not installed") and "install" in found.remedy


def test_a_missing_java_is_a_warning_and_a_compiler_is_needed_for_gpus_alone(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    assert ward.java().state == "warning" and ward.java().remedy
    assert ward.compiler().state == "ok"
    (tmp_path / "nvidia-smi").write_text("")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert ward.compiler().state == "warning" and ward.compiler().remedy


def test_little_room_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ward, "LEAST_DISK", 1e9)
    monkeypatch.setattr(ward, "LEAST_SHM", 1e9)
    assert ward.disk(tmp_path).state == "warning" and "run.root" in ward.disk(tmp_path).remedy
    if ward.SHM.is_dir():
        assert "--shm-size" in ward.shared_memory().remedy


def test_a_port_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setattr(ward, "PORTS", {taken.getsockname()[1]: "a dashboard"})
        assert "a dashboard" in ward.ports().found


def test_the_command_fails_where_a_check_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(ward, "PACKAGES", ("no-such-package",))
    assert main(["doctor", "--root", str(tmp_path)]) == 1
    assert "failed  no-such-package" in capsys.readouterr().out
