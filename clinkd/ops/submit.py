"""A clinkd command as a Ray job on a cluster elsewhere: checked here, sent, followed, its exit code returned.

Decisions:
- What is sent is this package and one resolved configuration, nothing else: no data, no runs, no file that
  merely lies beside them. So a job takes the code that the user has, and stays far under Ray's 100 MiB.
- Paths in the configuration have to mean something on the cluster; a relative one is refused here, before
  anything is held.
- A run's name is the job's: submitted while it runs it is followed, not started again; submitted after it
  ended it goes on from what is whole.
- The token comes from the environment (RAY_AUTH_MODE=token, RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH), as Ray
  reads it. A job's metadata name nothing but the command.
"""

from __future__ import annotations

import asyncio
import re
import shlex
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import clinkd
from clinkd.config import ConfigError, RunConfig, to_yaml, with_values

COMMANDS = {
    "pipeline": "run", "teacher": "train teacher", "distill": "train distill", "reflect": "train reflect",
    "label": "label", "sweep": "sweep", "ablate": "ablate",
}  # fmt: skip
PATHS = (
    "run.root", "data.source", "data.images", "model.path", "teacher.path", "guide.path", "reflect.corrector",
    "evaluate.spice_jars", "sweep.warm_start",
)  # fmt: skip
LIMIT = 100 << 20
"""Bytes of a working directory, over which Ray answers 413."""
SENT = "config.yaml"


@dataclass(frozen=True)
class Job:
    """What would be submitted."""

    name: str  # of all attempts; an attempt's is this with a number
    entrypoint: str
    folder: Path  # what is sent
    size: int


class SubmitError(ConfigError):
    """The cluster is not there or refuses, in one line."""


def check(command: str, config: RunConfig) -> None:
    """Refuses what could not work on a cluster.

    Raises:
        ConfigError: an unknown command, or a path that means nothing there.
    """
    if command not in COMMANDS:
        raise ConfigError(f"submit: unknown job {command!r}; one of {', '.join(COMMANDS)}")
    values = config.model_dump()
    for key in PATHS:
        section, _, name = key.partition(".")
        path = values[section][name]
        if path is None or path == "phantoms" or re.match(r"[a-z0-9]+://|/", str(path)):
            continue
        if key == "guide.path" and str(path).startswith("hf-hub:"):
            continue
        why = " and that outlives the job" if key == "run.root" else ""
        raise ConfigError(
            f"{key}: {path} is relative, and a job runs in a folder of its own; give a path or URI that all "
            f"nodes see{why}"
        )


@contextmanager
def packed(command: str, config: RunConfig) -> Iterator[Job]:
    """The job, its folder made for as long as the context lasts.

    Raises:
        ConfigError: it is larger than Ray takes; see also ``check``.
    """
    check(command, config)
    with tempfile.TemporaryDirectory(prefix="clinkd-submit-") as scratch:
        folder = Path(scratch)
        source = Path(clinkd.__file__).parent
        shutil.copytree(source, folder / "clinkd", ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
        if config.compute.deepspeed is not None:
            shutil.copy(config.compute.deepspeed, folder / "deepspeed.json")
            config = with_values(config, {"compute.deepspeed": "deepspeed.json"})
        (folder / SENT).write_text(to_yaml(config), encoding="utf-8")
        sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
        if sum(sizes.values()) > LIMIT:
            big = ", ".join(
                f"{path.relative_to(folder)} ({sizes[path] >> 20} MiB)"
                for path in sorted(sizes, key=lambda path: -sizes[path])[:3]
            )
            raise ConfigError(f"submit: Ray takes {LIMIT >> 20} MiB; the largest files to be sent are {big}")
        words = ["python", "-m", "clinkd", *COMMANDS[command].split(), SENT]
        yield Job(f"clinkd-{command}-{config.run.name}", shlex.join(words), folder, sum(sizes.values()))


def client_of(address: str) -> Any:
    """Ray's job client.

    Raises:
        SubmitError: nobody answers at the address, or it wants a token.
    """
    from ray.job_submission import JobSubmissionClient

    with _in_one_line(address):
        return JobSubmissionClient(address)


def submit(client: Any, job: Job, address: str) -> tuple[str, bool]:
    """Starts the job, unless an attempt of it is under way.

    Returns:
        The attempt's id, and whether it was started now.
    """
    with _in_one_line(address):
        attempts = {
            str(details.submission_id): details.status
            for details in client.list_jobs()
            if details.submission_id and re.fullmatch(rf"{re.escape(job.name)}-\d+", details.submission_id)
        }
        for attempt, status in attempts.items():
            if not status.is_terminal():
                return attempt, False
        number = max((int(attempt.rpartition("-")[2]) for attempt in attempts), default=0) + 1
        attempt = client.submit_job(
            entrypoint=job.entrypoint, submission_id=f"{job.name}-{number}",
            runtime_env={"working_dir": str(job.folder)}, metadata={"command": job.name.split("-")[1]},
        )  # fmt: skip
        return attempt, True


def follow(client: Any, attempt: str, write: Callable[[str], None], address: str) -> int:
    """Hands on the job's log until it ends.

    Returns:
        The command's own exit code; 130 where it was stopped, 1 where it never started.
    """
    from ray.job_submission import JobStatus

    async def tail() -> None:
        async for text in client.tail_job_logs(attempt):
            write(text)

    with _in_one_line(address):
        asyncio.run(tail())
        info = client.get_job_info(attempt)
    if info.status == JobStatus.STOPPED:
        return 130
    if info.driver_exit_code is not None:
        return int(info.driver_exit_code)
    if info.status != JobStatus.SUCCEEDED and info.message:
        write(info.message.strip().splitlines()[-1] + "\n")
    return 0 if info.status == JobStatus.SUCCEEDED else 1


@contextmanager
def _in_one_line(address: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        kind = type(error).__name__
        if kind == "AuthenticationError":
            raise SubmitError(
                f"{address} refuses the token; set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or "
                "RAY_AUTH_TOKEN_PATH) to the cluster's"
            ) from None
        if not isinstance(error, (ConnectionError, RuntimeError, ValueError)) and "requests" not in str(
            type(error).__module__
        ):
            raise
        first = (str(error).strip().splitlines() or [kind])[0]
        raise SubmitError(f"{address}: {first}") from None
