"""What goes into the images, and how a worker's pod ends."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKER = ROOT / "cluster" / "docker"
FILES = ("Dockerfile", "Dockerfile.cpu")


def ray_home() -> Path:
    """Where the installed Ray lies; importing it takes seconds."""
    found = importlib.util.find_spec("ray")
    assert found is not None and found.submodule_search_locations
    return Path(next(iter(found.submodule_search_locations)))


@pytest.fixture
def ray(tmp_path: Path) -> Path:
    """Stands for the command `ray`: writes down its calls; drain-node fails where `refuse` is there."""
    command = tmp_path / "ray"
    lines = ["#!/bin/sh", 'here=$(dirname "$0")', 'echo "$@" >> "$here/calls"']
    lines += ['[ "$1" != drain-node ] || [ ! -e "$here/refuse" ]', ""]
    command.write_text("\n".join(lines))
    command.chmod(0o755)
    return tmp_path


def drain(folder: Path, seconds: int) -> list[str]:
    """The calls of `ray` that the script makes, which sees no process but those of ``folder``/proc."""
    script = (DOCKER / "drain.sh").read_text().replace("/proc/", f"{folder}/proc/")
    env = {"PATH": f"{folder}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script, "clinkd-drain", str(seconds)], env=env, timeout=30)
    assert done.returncode == 0
    return (folder / "calls").read_text().splitlines()


def raylet(folder: Path, seconds: float) -> subprocess.Popen[bytes]:
    """A process that lives so long, and its folder of /proc with a raylet's command line."""
    process = subprocess.Popen(["sleep", str(seconds)])
    (folder / "proc" / "1").mkdir(parents=True)
    (folder / "proc" / "1" / "cmdline").write_bytes(b"/bin/bash\0-c\0ray start --block\0")
    entry = folder / "proc" / str(process.pid)
    entry.mkdir()
    words = [
        b"/opt/venv/raylet",
        b"--raylet_socket_name=/tmp/a b",
        b"--node_id=abc123",
        b"--node_ip_address=10.0.0.1",
    ]
    (entry / "cmdline").write_bytes(b"\0".join(words) + b"\0")
    return process


def test_a_worker_is_drained_by_its_own_id_and_stopped_at_the_deadline(ray: Path) -> None:
    process = raylet(ray, 30)
    started = time.monotonic()
    calls = drain(ray, 1)
    process.kill()
    process.wait()
    assert time.monotonic() - started >= 1
    assert calls[0].startswith("drain-node --node-id abc123 ")
    assert "--reason DRAIN_NODE_REASON_PREEMPTION" in calls[0] and calls[0].endswith(
        "--deadline-remaining-seconds 1"
    )
    assert calls[1:] == ["stop --grace-period 15"]


def test_a_worker_that_refuses_to_be_drained_is_stopped_at_once(ray: Path) -> None:
    (ray / "refuse").touch()
    process = raylet(ray, 30)
    started = time.monotonic()
    calls = drain(ray, 20)
    process.kill()
    process.wait()
    assert time.monotonic() - started < 15
    assert [call.split()[0] for call in calls] == ["drain-node", "stop"]


def test_a_pod_whose_raylet_is_gone_is_stopped_at_once(ray: Path) -> None:
    (ray / "proc").mkdir()
    assert drain(ray, 20) == ["stop --grace-period 15"]


def test_the_drain_speaks_to_ray_as_the_installed_ray_listens() -> None:
    """drain-node is no public command: its options, and the raylet's --node_id, may change with a version."""
    home = ray_home()
    command = (
        (home / "scripts" / "scripts.py")
        .read_text()
        .split("def drain_node(", 1)[0]
        .rsplit("@cli.command", 1)[1]
    )
    options = set(re.findall(r'"(--[a-z-]+)"', command))
    script = (DOCKER / "drain.sh").read_text()
    call = script.split("if ray drain-node", 1)[1].split("; then", 1)[0]
    asked = {word for word in call.split() if word.startswith("--")}
    assert len(asked) == 4 and asked <= options
    assert 'f"--node_id={node_id}"' in (home / "_private" / "services.py").read_text()


@pytest.mark.parametrize("name", FILES)
def test_an_image_runs_as_the_user_of_the_manifests_without_sudo(name: str) -> None:
    text = (DOCKER / name).read_text()
    assert re.findall(r"^USER (.*)$", text, re.MULTILINE) == ["1000:100"]
    assert "sudo" not in text and "useradd --uid 1000 --gid 100" in text


@pytest.mark.parametrize("name", FILES)
def test_an_image_takes_versions_from_the_lock_and_names_every_base(name: str) -> None:
    text = (DOCKER / name).read_text()
    for line in re.findall(r"^.*pip install.*$", text, re.MULTILINE):
        assert "--constraint requirements.lock" in line or "grep '^torch=='" in line, line
    bases = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    arguments = dict(re.findall(r"^ARG (\w+)=(\S+)", text, re.MULTILINE))
    for base in bases:
        version = re.sub(r"\$\{(\w+)\}", lambda found: arguments[found[1]], base).partition(":")[2]
        assert re.match(r"\d+\.\d+", version), base
    lock = (ROOT / "requirements.lock").read_text()
    assert all(re.search(rf"^{package}==", lock, re.MULTILINE) for package in ("torch", "deepspeed", "ray"))


@pytest.mark.parametrize("name", FILES)
def test_an_image_holds_what_the_manifests_start(name: str) -> None:
    text = (DOCKER / name).read_text()
    sent = (DOCKER / f"{name}.dockerignore").read_text().splitlines()
    assert (
        "COPY cluster/docker/drain.sh /usr/local/bin/clinkd-drain" in text and "WORKDIR /opt/clinkd" in text
    )
    assert os.access(DOCKER / "drain.sh", os.X_OK)
    for source in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE):
        assert all((ROOT / path).exists() and f"!{path}" in sent for path in source.split())


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not here")
@pytest.mark.parametrize("name", FILES)
def test_hadolint_finds_nothing(name: str) -> None:
    done = subprocess.run(["hadolint", str(DOCKER / name)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout
