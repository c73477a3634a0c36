"""Where else a run's numbers go: TensorBoard, MLflow, Weights & Biases, through one interface.

Decisions:
- Numbers and settings only, named ``stage/number``: no question, no answer and no image's name leaves the
  run's folder this way.
- A run that goes on is the same run there: its ids are kept in ``sinks.json`` beside its metrics, with the
  digest of the settings they belong to.
- A sink that fails is left out with one line; the work goes on. A package that is missing is a mistake of the
  configuration, said before anything starts.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from clinkd.artifacts import fingerprint
from clinkd.config import ConfigError, RunConfig

FILE = "sinks.json"
NOT_NUMBERS = ("stage", "step", "total", "event", "record", "round")
EXPERIMENT = "clinkd"
BATCH_SECONDS = 5.0  # between two requests to a tracking server


class Sink(Protocol):
    """One place for numbers; made open, ``identity`` is what it needs to go on with the same run."""

    identity: str

    def log(self, stage: str, step: int, numbers: Mapping[str, float]) -> None: ...

    def close(self, done: bool) -> None: ...


class TensorBoard:
    """Event files in ``folder``, for ``tensorboard --logdir``."""

    identity = ""

    def __init__(self, folder: Path) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder), flush_secs=10)

    def log(self, stage: str, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self, done: bool) -> None:
        self._writer.close()


class MLflow:
    """A run of the experiment ``clinkd`` on a tracking server, in a database, or in a folder.

    Args:
        where: a tracking URI (``http://``, ``sqlite:///``, ``databricks``) or a folder.
        settings: kept as the run's parameters. identity: of the run to go on with; empty: a new one.
    """

    def __init__(self, where: str, name: str, settings: Mapping[str, Any], identity: str) -> None:
        if "://" not in where and not where.startswith("databricks"):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # a folder is what was asked for
            where = Path(where).resolve().as_uri()
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=where)
        self._waiting: list[Any] = []
        self._sent = time.monotonic()
        if identity:
            self._client.update_run(identity, status="RUNNING")
            self.identity = identity
            return
        experiment = self._client.get_experiment_by_name(EXPERIMENT)
        number = experiment.experiment_id if experiment else self._client.create_experiment(EXPERIMENT)
        self.identity = self._client.create_run(number, run_name=name).info.run_id
        params = [Param(key, str(value)[:500]) for key, value in settings.items()]
        for at in range(0, len(params), 100):  # the most that one request takes
            self._client.log_batch(self.identity, params=params[at : at + 100])

    def log(self, stage: str, step: int, numbers: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._waiting += [Metric(name, value, now, step) for name, value in numbers.items()]
        if len(self._waiting) >= 900 or time.monotonic() - self._sent >= BATCH_SECONDS:
            self._send()

    def _send(self) -> None:
        waiting, self._waiting, self._sent = self._waiting, [], time.monotonic()
        for at in range(0, len(waiting), 1000):
            self._client.log_batch(self.identity, metrics=waiting[at : at + 1000])

    def close(self, done: bool) -> None:
        self._send()
        self._client.set_terminated(self.identity, "FINISHED" if done else "FAILED")


class Wandb:
    """A run of a Weights & Biases project; ``WANDB_MODE=offline`` keeps it in ``folder``."""

    def __init__(
        self, project: str, name: str, settings: Mapping[str, Any], folder: Path, identity: str
    ) -> None:
        import wandb

        self.identity = identity or uuid.uuid4().hex[:12]
        self._run = wandb.init(
            project=project, name=name, config=dict(settings), dir=str(folder), id=self.identity,
            resume="allow", settings=wandb.Settings(silent=True, disable_git=True, console="off"),
        )  # fmt: skip
        self._stages: set[str] = set()

    def log(self, stage: str, step: int, numbers: Mapping[str, float]) -> None:
        if stage not in self._stages:  # each stage counts its own steps
            self._stages.add(stage)
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        self._run.log({f"{stage}/step": step, **numbers})

    def close(self, done: bool) -> None:
        self._run.finish(exit_code=0 if done else 1)


class Sinks:
    """All sinks of a run, fed with the lines of its metrics.jsonl; safe to feed from several threads."""

    def __init__(self, sinks: Mapping[str, Sink], say: Callable[[str], None]) -> None:
        self._sinks, self._say, self._lock = dict(sinks), say, threading.Lock()

    def line(self, line: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl; its texts are left out."""
        stage = str(line.get("stage", "run"))
        step = next((line[key] for key in ("step", "round") if isinstance(line.get(key), int)), 0)
        prefix = f"{stage}/{line['event']}" if "event" in line else stage
        numbers = dict(_numbers({k: v for k, v in line.items() if k not in NOT_NUMBERS}, prefix))
        if numbers:
            self._each(lambda sink: sink.log(stage, step, numbers))

    def close(self, done: bool) -> None:
        self._each(lambda sink: sink.close(done))

    def _each(self, action: Callable[[Sink], None]) -> None:
        failed: list[str] = []
        with self._lock:
            for name, sink in list(self._sinks.items()):
                try:
                    action(sink)
                except Exception as error:  # whatever a tracking server does, the work goes on
                    del self._sinks[name]
                    failed.append(f"sinks.{name}: {_told(error)}; left out from here on")
        for text in failed:  # not under the lock: who says it may be waiting for it
            self._say(text)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def _numbers(values: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}/{key}")
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}/{key}", float(value)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A configuration by dotted keys."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def check_sinks(config: RunConfig) -> None:
    """Raises:
    ConfigError: a sink is wanted whose package is not installed.
    """
    for key, package in (("mlflow", "mlflow"), ("wandb", "wandb"), ("tensorboard", "tensorboardX")):
        if getattr(config.sinks, key) and find_spec(package) is None:
            raise ConfigError(f"sinks.{key}: {package} is not installed; pip install 'clinkd[{key}]'")


@contextlib.contextmanager
def open_sinks(config: RunConfig, folder: Path, say: Callable[[str], None]) -> Iterator[Sinks]:
    """The sinks that the configuration names; a failure inside marks their runs as failed."""
    values = config.model_dump(exclude={"sinks"})
    digest, file = fingerprint("run", {}, values), folder / FILE
    kept: dict[str, str] = {}
    with contextlib.suppress(OSError, ValueError):
        kept = json.loads(file.read_text())
    known = kept if kept.get("settings") == digest else {"settings": digest}
    opened: dict[str, Sink] = {}
    options, name, settings = config.sinks, config.run.name, _flat(values)
    makers: dict[str, Callable[[str], Sink]] = {
        "tensorboard": lambda _: TensorBoard(folder / "tensorboard"),
        "mlflow": lambda identity: MLflow(str(options.mlflow), name, settings, identity),
        "wandb": lambda identity: Wandb(str(options.wandb), name, settings, folder, identity),
    }
    for key, make in makers.items():
        if not getattr(options, key):
            continue
        try:
            opened[key] = make(known.get(key, ""))
        except Exception as error:
            say(f"sinks.{key}: {_told(error)}; the run goes on without it")
            continue
        known[key] = opened[key].identity
    if opened:
        file.write_text(json.dumps(known))
    sinks = Sinks(opened, say)
    try:
        yield sinks
    except BaseException:
        sinks.close(done=False)
        raise
    sinks.close(done=True)
