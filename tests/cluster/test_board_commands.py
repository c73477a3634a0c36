"""What the component `dashboards` starts, started here: on loopback, over a study that it cannot change."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from rendered import KUBERAY

BIN = Path(sys.executable).parent
TOOLS = ("optuna-dashboard", "tensorboard")
needs_tools = pytest.mark.skipif(
    any(shutil.which(tool, path=str(BIN)) is None for tool in TOOLS),
    reason=f"{' or '.join(TOOLS)} is not here",
)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@contextmanager
def started(name: str, port: str, **env: str) -> Iterator[subprocess.Popen[bytes]]:
    """A container's command with its port replaced, and its waiting shortened."""
    text = (KUBERAY / "components" / "dashboards" / "deployment.yaml").read_text()
    pod = yaml.safe_load(text)["spec"]["template"]["spec"]
    (container,) = [found for found in pod["containers"] if found["name"] == name]
    own = {"optuna": "8080", "tensorboard": "6006"}[name]
    line = container["args"][0]
    assert f"--port {own}" in line
    line = line.replace(f"--port {own}", f"--port {port}").replace("sleep 10", "sleep 0.2")
    given = os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"} | env
    process = subprocess.Popen(
        [*container["command"], line], env=given, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


def page(url: str, method: str = "GET") -> tuple[int, str]:
    """Status and text, once somebody listens."""
    for _ in range(240):
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method=method), timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as refused:
            return refused.code, ""
        except OSError:
            time.sleep(0.25)
    raise AssertionError(f"nobody listens at {url}")


@needs_tools
@pytest.mark.slow
def test_optuna_dashboard_waits_for_the_study_shows_it_and_cannot_delete_it(tmp_path: Path) -> None:
    import optuna

    port, database = free_port(), tmp_path / "study.db"
    with started("optuna", port, STUDY=str(database)) as process:
        time.sleep(0.5)
        assert process.poll() is None  # there is no study yet
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        unfinished = tmp_path / "new.db"
        study = optuna.create_study(study_name="swept", storage=f"sqlite:///{unfinished}")
        study.tell(study.ask(), 0.5)
        unfinished.rename(database)
        before = database.read_bytes()
        status, text = page(f"http://127.0.0.1:{port}/api/studies")
        assert status == 200 and "swept" in text
        assert page(f"http://127.0.0.1:{port}/api/studies/1", "DELETE")[0] >= 400
        assert database.read_bytes() == before


@needs_tools
@pytest.mark.slow
def test_tensorboard_answers_under_the_path_that_the_proxy_hands_on(tmp_path: Path) -> None:
    port = free_port()
    with started("tensorboard", port, RUNS=str(tmp_path)):
        assert page(f"http://127.0.0.1:{port}/tensorboard/")[0] == 200
        assert page(f"http://127.0.0.1:{port}/")[0] == 404
