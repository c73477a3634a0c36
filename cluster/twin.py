"""A cluster on one machine: nodes that are Ray's own processes, one of which is lost while training.

    python cluster/twin.py --out runs/twin            (or: make twin)

A head without CPUs for work, and nodes beside it, all with token authentication. The whole pipeline goes to
them by ``clinkd submit``; in the middle of distillation the node of a training worker is killed with all that
ran on it, another one joins, and the job goes on. At the end it says what ran where and whether anything was
lost: exit code 0 only where every count adds up.

A node here is a raylet that declares two CPUs; cores and memory are shared, so times say nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

BIN = Path(sys.executable).parent
CONFIG = Path(__file__).parent.parent / "configs" / "tiny.yaml"
STEPS = 40
SMALL = [
    "run.name=twin", "data.phantoms=96", "data.test_fraction=0.25", "data.validation_fraction=0.2",
    "guide.steps=20", "sft.steps=40", f"distill.optim.steps={STEPS}", "reflect.samples=24",
    "reflect.budget=8", "reflect.validation=16", "reflect.optim.steps=8", "reflect.similarity=rouge",
    "compute.checkpoint_every=8", "evaluate.max_new_tokens=12", "evaluate.text_metrics=false",
]  # fmt: skip


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    options.add_argument("--nodes", type=int, default=4, help="beside the head (default: %(default)s)")
    options.add_argument(
        "--out", type=Path, default=Path("runs/twin"), help="for its run and logs (%(default)s)"
    )
    options.add_argument("overrides", nargs="*", help="KEY=VALUE, after the twin's own")
    given = options.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that the nodes end too
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="t", dir="/tmp", ignore_cleanup_errors=True) as scratch,
        Twin(Path(scratch), out / "raylets.log").up(given.nodes) as twin,
    ):
        told = disturbed(twin, out, given.overrides)
    (out / "twin.json").write_text(json.dumps(told, indent=1), encoding="utf-8")
    print(json.dumps(told, indent=1))
    return 0 if all(told["whole"].values()) else 1


def disturbed(twin: Twin, out: Path, overrides: list[str]) -> dict[str, Any]:
    """Submits the pipeline, takes a node away and gives another; what came of it."""
    runs = out / "runs"
    say(f"submitting the pipeline; its log: {out / 'job.log'}")
    command = [
        str(BIN / "clinkd"), "submit", "pipeline", str(CONFIG), *SMALL, f"run.root={runs}", *overrides,
        "--address", twin.address,
    ]  # fmt: skip
    with (out / "job.log").open("w") as log:
        job = subprocess.Popen(command, env=twin.environment, stdout=log, stderr=subprocess.STDOUT)
    try:
        at = await_step(runs / "artifacts", STEPS // 3, job)
        lost, held = twin.node_of("RayTrainWorker"), twin.actors()
        say(f"distillation is at step {at}: killing {lost}, which holds {held[lost]}")
        twin.kill(lost)
        say("another node joins")
        joined = twin.add()
        say("waiting for the job")
        code = job.wait(timeout=3600)
        ran = twin.tasks()
    finally:
        job.kill()
    return {
        "nodes": len(twin.nodes), "lost": {"node": lost, "at_step": at, "held": held[lost]}, "joined": joined,
        "workers_before": held, "tasks_by_node": ran, "exit_code": code,
    } | {"whole": accounts(runs, code, ran, joined)}  # fmt: skip


def accounts(runs: Path, code: int, ran: dict[str, int], joined: str) -> dict[str, bool]:
    """What must hold after it: by name, whether it does."""
    artifacts = runs / "artifacts"
    steps = [row["step"] for row in rows(next(artifacts.glob("distill-*/metrics.jsonl"), None))]
    (prepared,) = artifacts.glob("prepare-*/manifest.json")
    manifest = json.loads(prepared.read_text())
    kept = manifest["records_out"] + manifest["quarantined"] + manifest["duplicates"]
    answers = rows(runs / "twin" / "predictions.jsonl")
    return {
        "the job ended well": code == 0,
        f"steps 1 to {STEPS} are there once each": steps == list(range(1, STEPS + 1)),
        "every record that was read is counted": manifest["records_in"] == kept,
        "every test question has its answer": [row["id"] for row in answers]
        == list(range(manifest["by_split"]["test"])),
        "work was spread over several nodes": len([node for node, count in ran.items() if count]) > 1,
    }


def rows(path: Path | None) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path and path.is_file() else []


def await_step(artifacts: Path, step: int, job: subprocess.Popen[Any]) -> int:
    until = time.monotonic() + 3600
    while time.monotonic() < until and job.poll() is None:
        for path in artifacts.glob("distill-*.partial/metrics.jsonl"):
            if (taken := len(path.read_text().splitlines())) >= step:
                return taken
        time.sleep(0.2)
    raise SystemExit(f"distillation did not reach step {step}; see the job's log")


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Twin:
    """Raylets on loopback. ``nodes``: their processes, by a name that Ray has as a resource."""

    def __init__(self, scratch: Path, log: Path) -> None:
        self.scratch, self.log = scratch, log
        self.port, dashboard = free_port(), free_port()
        self.address = f"http://127.0.0.1:{dashboard}"
        self.nodes: dict[str, subprocess.Popen[Any]] = {}
        kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        self.environment = kept | {
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(16),
            "RAY_num_workers_soft_limit": "10", "RAY_worker_maximum_startup_concurrency": "8",
            "RAY_health_check_failure_threshold": "20",  # a node that is busy is not a node that is lost
            "PATH": f"{BIN}:{os.environ['PATH']}",
        }  # fmt: skip
        self._head = ["--head", f"--port={self.port}", f"--dashboard-port={dashboard}", "--num-cpus=0",
                      "--dashboard-host=127.0.0.1", "--include-dashboard=true",
                      f"--ray-client-server-port={free_port()}"]  # fmt: skip

    @contextmanager
    def up(self, nodes: int) -> Iterator[Twin]:
        try:
            say(f"starting a head and {nodes} nodes")
            self._start("head", self._head)
            self._await_nodes(1)
            for _ in range(nodes):
                self.add()
            yield self
        finally:
            for name in list(self.nodes):
                self.kill(name)

    def add(self) -> str:
        """Starts one more node and waits until Ray counts it."""
        name = f"node-{len(self.nodes)}"
        self._start(name, [f"--address=127.0.0.1:{self.port}", "--num-cpus=2"])
        self._await_nodes(sum(process.poll() is None for process in self.nodes.values()))
        return name

    def kill(self, name: str) -> None:
        """SIGKILL for the node and all that it started."""
        found = self.nodes[name]
        try:
            family = [psutil.Process(found.pid), *psutil.Process(found.pid).children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        for process in family:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        found.wait()

    def actors(self) -> dict[str, list[str]]:
        """Classes of the living actors, by node."""
        names = self._names()
        found: dict[str, list[str]] = {name: [] for name in names.values()}
        for actor in self._state("actors", state="ALIVE"):
            found[names.get(actor["node_id"], "gone")].append(actor["class_name"])
        return {name: sorted(held) for name, held in found.items()}

    def node_of(self, actor: str) -> str:
        """A node, not the head, that holds a living actor of this class."""
        held = self.actors()
        return next(name for name, classes in held.items() if name != "head" and actor in classes)

    def tasks(self) -> dict[str, int]:
        """How many of Ray Data's tasks each node has finished."""
        names = self._names()
        finished = (task for task in self._state("tasks", state="FINISHED") if task["type"] == "NORMAL_TASK")
        return dict(Counter(names.get(str(task["node_id"]), "gone") for task in finished))

    def _start(self, name: str, arguments: list[str]) -> None:
        ports = [f"--{kind}-port={free_port()}" for kind in ("dashboard-agent-listen", "dashboard-agent-grpc",
                 "metrics-export", "node-manager", "object-manager")]  # fmt: skip
        with self.log.open("a") as log:
            self.nodes[name] = subprocess.Popen(
                [str(BIN / "ray"), "start", "--block", *arguments, *ports, "--node-ip-address=127.0.0.1",
                 f"--resources={json.dumps({name: 1})}", "--object-store-memory=200000000",
                 "--disable-usage-stats",
                 # A node that unpacks the job's code writes over that of the nodes it shares a folder with.
                 f"--temp-dir={self.scratch / name}"],
                env=self.environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def _await_nodes(self, count: int) -> None:
        until = time.monotonic() + 300
        while time.monotonic() < until:
            try:
                if len(self._names()) >= count:
                    return
            except Exception:  # the head is coming up
                pass
            time.sleep(0.5)
        raise SystemExit(f"{count} nodes did not come up; see {self.log}")

    def _names(self) -> dict[str, str]:
        """Ray's id of each living node, and our name for it."""
        nodes = self._state("nodes", state="ALIVE")
        return {
            node["node_id"]: next(name for name in node["resources_total"] if name in self.nodes)
            for node in nodes
        }

    def _state(self, what: str, **wanted: str) -> list[dict[str, Any]]:
        import requests

        filters = {
            key: part for name, value in wanted.items()
            for key, part in (("filter_keys", name), ("filter_predicates", "="), ("filter_values", value))
        }  # fmt: skip
        answer = requests.get(
            f"{self.address}/api/v0/{what}", params=filters | {"detail": "1", "limit": "10000"}, timeout=30,
            headers={"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"},
        )  # fmt: skip
        answer.raise_for_status()
        return list(answer.json()["data"]["result"]["result"])


if __name__ == "__main__":
    sys.exit(main())
