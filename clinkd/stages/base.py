"""What all stages share: a run, its artifacts, and how one is made once and skipped when whole.

Decisions:
- A stage's fingerprint comes from the fingerprints of what it reads and the settings that matter to it;
  numbers of workers and where things run do not.
- Artifacts lie in ``<root>/artifacts`` and are shared by all runs under the root, so a sweep's trials
  find the
  teacher and its cache. ``<root>/<name>`` holds what a person opens: eval.json, predictions.jsonl,
  report.html.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from clinkd import storage
from clinkd.artifacts import Artifact, Draft, Store, fingerprint
from clinkd.config import ConfigError, RunConfig, to_yaml
from clinkd.data.codec import MODEL_SPELLING
from clinkd.interrupt import terminable
from clinkd.progress import Progress, duration
from clinkd.sinks import check_sinks, open_sinks

if TYPE_CHECKING:
    from clinkd.data.index import RecordIndex
    from clinkd.stages.forecast import Forecast
    from clinkd.train.crew import Crew
    from clinkd.train.loop import TrainJob


CREW = ".crew"
"""Where Ray Train keeps its notes in a run's folder while workers are there."""


@dataclass
class Run:
    """One run: its configuration, its artifacts so far, and its progress view."""

    config: RunConfig
    progress: Progress
    store: Store
    done: dict[str, Artifact] = field(default_factory=dict)
    log: list[dict[str, Any]] = field(default_factory=list)  # rows of the report's table of stages
    salt: dict[str, Any] = field(default_factory=dict)  # of a student's fingerprint, beside its settings
    forecast: Forecast | None = None  # of the time left; None where nothing is known of it
    _connected: bool = False
    _crew: Crew | None = None
    _lent: bool = False
    _at_the_end: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    indices: dict[str, RecordIndex] = field(default_factory=dict)  # of the data's splits, once looked at
    kept: dict[str, Any] = field(default_factory=dict)  # what stages share, by name

    @property
    def folder(self) -> Path:
        return Path(self.config.run.root) / self.config.run.name

    def connect(self) -> None:
        """Ray, when the first stage that is not skipped needs it."""
        if not self._connected:
            from clinkd import cluster

            compute = self.config.compute
            cluster.connect(
                compute.address, compute.workers, compute.cpus_per_worker, compute.gpus_per_worker
            )
            self._connected = True

    def start_training_workers(self) -> None:
        """Start them while other work goes on, where they stay for all stages anyway."""
        from clinkd import cluster

        if cluster.started_here() and not self.config.compute.gpus_per_worker:
            self._workers().start()

    def _workers(self) -> Crew:
        from clinkd.train.crew import Crew

        if self._crew is None:
            self._crew = Crew(self.config.compute, self.folder / CREW)
        return self._crew

    def train(self, job: TrainJob) -> None:
        """Runs a training job; its workers stay for the next one where Ray is this run's own."""
        from clinkd import cluster

        workers = self._workers()
        stays = self._lent or cluster.started_here()
        try:
            workers.fit(job)
        finally:
            if self.config.compute.gpus_per_worker:
                workers.close()
            elif not stays:
                self.dismiss()

    def forecast_all(self) -> None:
        """Measure this machine and show how long the whole run will take, then and with each line."""
        from clinkd.stages.forecast import PROBE_S, Forecast, expected, probe

        stages = expected(self.config)
        if stages is None:
            return
        self.forecast = Forecast(stages, probe() / PROBE_S)
        self.progress.run_left = self.forecast.left
        self.progress.say(
            f"run: about {duration(self.forecast.left())} on this machine, if no stage is there yet "
            "(measured in its first second)"
        )

    def lend(self, crew: Crew) -> None:
        """Workers that train for this run and stay when it ends."""
        self._crew, self._lent = crew, True

    def keep(self, name: str, shared: contextlib.AbstractContextManager[Any]) -> None:
        """Keep something that later stages share; it is closed when the run ends."""
        self.kept[name] = self._at_the_end.enter_context(shared)

    def dismiss(self, wait: bool = True) -> None:
        """End the training workers, and close what stages shared."""
        self.kept.clear()
        self._at_the_end.close()
        if self._crew is not None and not self._lent:
            self._crew.close(wait)
            self._crew = None
            shutil.rmtree(self.folder / CREW, ignore_errors=True)

    def stage(
        self,
        name: str,
        inputs: list[str],
        settings: dict[str, Any],
        make: Callable[[Draft], dict[str, Any]],
        version: int = 1,
        ray: bool = True,
    ) -> Artifact:
        """Finds the stage's artifact or makes it; ``make`` writes into the draft and returns counts.

        ``ray``: False for a stage that works in this process alone, so that Ray need not start for it.
        """
        read = {other: self.done[other].fingerprint for other in inputs}
        mark = fingerprint(name, read, settings, version)
        artifact = self.store.find(name, mark)
        skipped = artifact is not None
        if self.forecast is not None:
            self.forecast.begin(name)
        if artifact is None:
            if ray:
                self.connect()
            with self.store.build(name, mark, read, settings) as draft:
                artifact = draft.artifact or draft.commit(make(draft))
        else:
            self.progress.skipped(name, artifact.meta["seconds"])
        if self.forecast is not None:
            self.forecast.end(name, skipped)
        self.done[name] = artifact
        self.log.append(
            {"stage": name, "fingerprint": mark[:12], "seconds": artifact.meta["seconds"],
             "counts": artifact.meta["counts"], "skipped": skipped}
        )  # fmt: skip
        return artifact


@contextlib.contextmanager
def open_run(config: RunConfig, stream: IO[str] | None = None) -> Iterator[Run]:
    """A run's folder, progress (shown on ``stream``) and store; a Ray that was started here ends with it."""
    from clinkd import cluster

    storage.configure(config.data.endpoint_url)
    check_inputs(config)
    check_sinks(config)
    folder = Path(config.run.root) / config.run.name
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "config.yaml", to_yaml(config))
    with terminable(), Progress(folder / "metrics.jsonl", stream=stream) as progress:
        if "_ray_pkg_" in str(Path.cwd()) and not Path(config.run.root).is_absolute():  # a job's working_dir
            progress.say(
                f"run.root: {config.run.root} lies in the job's copy of --working-dir, which Ray removes "
                "in time; give run.root=/a/folder/that/stays"
            )
        run = Run(config, progress, Store(Path(config.run.root) / "artifacts", progress.say))
        with open_sinks(config, folder, progress.say) as sinks:
            progress.also = sinks.line
            try:
                yield run
                run.dismiss()
            finally:
                run.dismiss(wait=False)
                if run._connected:
                    cluster.disconnect()


def check_inputs(config: RunConfig) -> None:
    """Says at once what would fail late.

    Raises:
        ConfigError: a model path without a model, more workers than CPUs. DataError: a source that is
        not there.
    """
    from clinkd import cluster
    from clinkd.data.prepare import find_source

    if storage.is_remote(config.run.root):
        raise ConfigError(
            f"run.root: {config.run.root} is no folder; a run's artifacts lie on a local or shared disk, and "
            "compute.checkpoint_store copies checkpoints to a bucket"
        )
    given = {
        "model.path": config.model.path, "teacher.path": config.teacher.path,
        "reflect.corrector": config.reflect.corrector,
    }  # fmt: skip
    for key, path in given.items():
        if path is not None and not (Path(path) / "config.json").is_file():
            raise ConfigError(
                f"{key}: {path} holds no config.json; give the folder of a Qwen2-VL or Qwen2.5-VL checkpoint"
            )
        if path is not None:
            check_family(key, Path(path))
        if path is not None and key != "model.path":
            check_unguided(key, Path(path))
    if config.guide.path is not None and not Path(config.guide.path).is_dir():
        raise ConfigError(
            f"guide.path: {config.guide.path} is no folder; give that of a CLIP, SigLIP or open_clip model"
        )
    made_alone = config.model.path is None and config.model.init != "teacher_layers"
    if config.teacher.path is not None and made_alone:
        raise ConfigError(
            "model.path: a teacher by path needs a student by path, or one cut out of it "
            "(model.init: teacher_layers): they share a vocabulary"
        )
    if config.data.source != "phantoms":
        find_source(config.data.source, config.data.images)
    if not (config.compute.address or os.environ.get("RAY_ADDRESS")):
        cluster.check_workers(config.compute.workers, config.compute.cpus_per_worker, cluster.real_cores())


def check_unguided(key: str, path: Path) -> None:
    """Refuses a teacher or corrector whose positions a guide moves.

    A teacher's store serves students under every guidance; a corrector is asked without the guide's scores.

    Raises:
        ConfigError: it is one of clinkd's own, trained under guidance.
    """
    found = json.loads((path / "config.json").read_text(encoding="utf-8")).get("rope_guidance") or {}
    if found.get("mode", "none") != "none" and found.get("gamma"):
        raise ConfigError(
            f"{key}: {path} was trained with positions guided by {found['mode']}; a teacher's and a "
            "corrector's are not: give one trained with rope.mode=none or rope.gamma=0 "
            "(a run's own teacher lies in its stage teacher)"
        )


def check_family(key: str, path: Path) -> None:
    """Refuses a checkpoint of a family that nothing here can load.

    Raises:
        ConfigError: its config.json is unreadable, or names another ``model_type``.
    """
    try:
        kind = json.loads((path / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"{key}: {path}/config.json cannot be read ({error})") from None
    if kind not in MODEL_SPELLING:
        raise ConfigError(f"{key}: {path} is of type {kind!r}; supported are {', '.join(MODEL_SPELLING)}")


def write_whole(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def content_digest(*roots: Path) -> str:
    """A digest of files by name, size and time of change; cheap, and enough to see that something changed."""
    digest = hashlib.sha256()
    for root in roots:
        for path in [root] if root.is_file() else sorted(root.rglob("*")):
            if path.is_file():
                stat = path.stat()
                name = path.relative_to(root.parent)
                digest.update(f"{name}\0{stat.st_size}\0{stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()
