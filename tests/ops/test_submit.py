"""A command as a Ray job: what is sent and refused; and on a real head with a token, what comes back."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from small_run import CONFIG, SMALL

from clinkd.cli import main
from clinkd.config import ConfigError, load_config
from clinkd.ops.submit import COMMANDS, packed

ROOT = ["run.root=/mnt/shared/runs"]


def test_what_is_sent_is_the_package_and_one_configuration(tmp_path: Path) -> None:
    with packed("distill", load_config(CONFIG, [*ROOT, "run.name=a.b"])) as job:
        assert job.name == "clinkd-distill-a.b"
        assert job.entrypoint == "python -m clinkd train distill config.yaml"
        names = {path.name for path in job.folder.iterdir()}
        assert names == {"clinkd", "config.yaml"} and job.size < 5 << 20
        assert not list(job.folder.rglob("__pycache__"))
        assert load_config(job.folder / "config.yaml", []).run.root == "/mnt/shared/runs"
    assert not job.folder.exists()


def test_a_deepspeed_file_goes_along(tmp_path: Path) -> None:
    base = tmp_path / "zero.json"
    base.write_text('{"zero_optimization": {"stage": 1}}')
    with packed("pipeline", load_config(CONFIG, [*ROOT, f"compute.deepspeed={base}"])) as job:
        assert load_config(job.folder / "config.yaml", []).compute.deepspeed == "deepspeed.json"
        assert (job.folder / "deepspeed.json").read_text() == base.read_text()


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("run.root=runs", "run.root: runs is relative"),
        ("data.source=lab/train.json", "data.source: lab/train.json is relative"),
        ("teacher.path=../teacher", "teacher.path"),
    ],
)
def test_a_path_that_means_nothing_there_is_refused(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said), packed("pipeline", load_config(CONFIG, [*ROOT, override])):
        pass


def test_an_unknown_job_names_those_there_are() -> None:
    with pytest.raises(ConfigError, match="one of pipeline, teacher"), packed("x", load_config(CONFIG, ROOT)):
        pass


def test_more_than_ray_takes_is_refused_with_what_is_big(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("clinkd.ops.submit.LIMIT", 1 << 10)
    with (
        pytest.raises(ConfigError, match=r"largest files .*\.py"),
        packed("pipeline", load_config(CONFIG, ROOT)),
    ):
        pass


@pytest.mark.parametrize("job", COMMANDS)
def test_a_dry_run_reaches_for_nothing(job: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["submit", job, str(CONFIG), *ROOT, "--address", "http://127.0.0.1:1", "--dry-run"]
    assert main(arguments) == 0
    assert f"python -m clinkd {COMMANDS[job]} config.yaml" in capsys.readouterr().err


def test_where_nobody_listens_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "pipeline", str(CONFIG), *ROOT, "--address", "http://127.0.0.1:1"]) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert said[-1].startswith("error: http://127.0.0.1:1: Failed to connect")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Head:
    """A Ray head of its own on loopback, with token authentication."""

    def __init__(self, folder: str) -> None:
        self.port = free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        self.environment = kept | {
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a-token-of-the-tests-0123456789",
            "RAY_num_workers_soft_limit": "10", "RAY_worker_maximum_startup_concurrency": "8",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }  # fmt: skip
        ports = [f"--{name}-port={free_port()}" for name in ("dashboard-agent-listen", "dashboard-agent-grpc",
                 "metrics-export", "ray-client-server")]  # fmt: skip
        self.process = subprocess.Popen(
            [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--num-cpus=4",
             "--node-ip-address=127.0.0.1", f"--port={free_port()}", "--include-dashboard=true",
             "--dashboard-host=127.0.0.1", f"--dashboard-port={self.port}", f"--temp-dir={folder}", *ports,
             "--object-store-memory=300000000", "--disable-usage-stats"],
            env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True,
        )  # fmt: skip

    def clinkd(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.command(*arguments), env=self.environment | environment, capture_output=True, text=True,
            timeout=600, check=False,
        )  # fmt: skip

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, "-m", "clinkd", "submit", *arguments, "--address", self.address]

    def await_answer(self) -> None:
        until = time.monotonic() + 180
        while time.monotonic() < until:
            with socket.socket() as probe:
                if not probe.connect_ex(("127.0.0.1", self.port)):
                    return
            time.sleep(0.5)
        raise AssertionError("the head's dashboard does not answer")


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with tempfile.TemporaryDirectory(prefix="h", dir="/tmp", ignore_cleanup_errors=True) as folder:
        made = Head(folder)
        try:
            made.await_answer()
            yield made
        finally:
            os.killpg(made.process.pid, signal.SIGTERM)
            try:
                made.process.wait(5)
            except subprocess.TimeoutExpired:
                os.killpg(made.process.pid, signal.SIGKILL)


@pytest.fixture
def runs(finished: Path, tmp_path: Path) -> list[str]:
    """Arguments of the finished run, which a job finds whole."""
    shutil.copytree(finished / "runs", tmp_path / "runs")
    return [str(CONFIG), *SMALL, f"run.root={tmp_path / 'runs'}"]


@pytest.mark.slow
def test_exit_codes_logs_and_tokens(head: Head, runs: list[str]) -> None:
    done = head.clinkd("pipeline", *runs)
    assert done.returncode == 0, done.stderr
    assert "skipped distill" in done.stdout and "clinkd-pipeline-tiny-1: submitted" in done.stderr
    failed = head.clinkd("pipeline", *runs, "compute.workers=64", "run.name=wide", "distill.a=9")
    assert failed.returncode == 2 and "compute.workers: 64 workers" in failed.stdout
    for token in ("", "another"):
        refused = head.clinkd("pipeline", *runs, RAY_AUTH_TOKEN=token)
        assert refused.returncode == 2 and "RAY_AUTH_TOKEN" in refused.stderr
        assert len(refused.stderr.strip().splitlines()) == 2  # what would be sent, and why not


@pytest.mark.slow
def test_stopped_it_goes_on_by_the_same_command(head: Head, runs: list[str], tmp_path: Path) -> None:
    """`ray job stop` is a SIGTERM: the step under way is saved. While it runs the command follows it."""
    arguments = [
        "distill", *runs, "run.name=stopped", "distill.optim.steps=160", "compute.checkpoint_every=1000"
    ]  # fmt: skip
    first = head.clinkd(*arguments, "--no-wait")
    assert first.returncode == 0 and "clinkd-distill-stopped-1: submitted" in first.stderr
    metrics = awaited(tmp_path / "runs" / "artifacts", 5)
    following = subprocess.Popen(
        head.command(*arguments), env=head.environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip
    read_until(following, "under way already")
    ray = [str(Path(sys.executable).parent / "ray"), "job", "stop", f"--address={head.address}"]
    subprocess.run([*ray, "clinkd-distill-stopped-1"], env=head.environment, check=True, capture_output=True)
    following.communicate(timeout=120)
    assert following.returncode == 130
    taken = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    saved = max(path.name for path in metrics.parent.glob("work/distill/step-*"))
    assert taken == list(range(1, len(taken) + 1)) and saved == f"step-{taken[-1]:08d}"

    again = head.clinkd(*arguments, "distill.optim.steps=160")
    assert again.returncode == 0, again.stdout
    assert "clinkd-distill-stopped-2: submitted" in again.stderr
    (whole,) = (path for path in changed(tmp_path / "runs" / "artifacts"))
    steps = [line["step"] for line in map(json.loads, (whole / "metrics.jsonl").read_text().splitlines())]
    assert steps == list(range(1, 161))


def read_until(process: subprocess.Popen[str], text: str) -> None:
    assert process.stdout
    said = []
    for line in process.stdout:
        said.append(line)
        if text in line:
            return
    raise AssertionError(f"it ended without {text!r}: {''.join(said)}")


def awaited(artifacts: Path, step: int) -> Path:
    until = time.monotonic() + 400
    while time.monotonic() < until:
        for path in artifacts.glob("distill-*.partial/metrics.jsonl"):
            if len(path.read_text().splitlines()) >= step:
                return path
        time.sleep(0.5)
    raise AssertionError(f"distillation did not reach step {step}")


def changed(artifacts: Path) -> list[Any]:
    """Students of 160 steps."""
    found = (path for path in artifacts.glob("distill-*/artifact.json"))
    return [path.parent for path in found if json.loads(path.read_text())["counts"]["steps"] == 160]
