"""Shared by all tests: one small Ray for the whole session."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import ending
import hypothesis
import pytest
from small_run import CONFIG, SMALL, here

# For the S3 server on loopback; set before Ray starts, whose workers inherit them.
os.environ.update(AWS_ACCESS_KEY_ID="test", AWS_SECRET_ACCESS_KEY="test", AWS_DEFAULT_REGION="us-east-1")

# An example that imports torch, or meets a busy machine, is no slower code.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """A local Ray of six declared CPUs, without dashboard or token; its files go away with it."""
    os.environ["RAY_AUTH_MODE"] = "disabled"  # unset, ray.init would leave a token in the home folder
    import ray

    from clinkd import cluster

    for name, value in (cluster.LOCAL_ENV | cluster.TRAIN_ENV).items():  # as of a Ray that clinkd starts
        os.environ.setdefault(name, value)
    folder = tempfile.mkdtemp(prefix="r", dir="/tmp")  # short: Ray's sockets are files under it
    ray.init(
        num_cpus=6,  # two of which a crew of training workers may keep
        include_dashboard=False,
        _temp_dir=folder,
        object_store_memory=500_000_000,
        log_to_driver=False,
        logging_level="ERROR",
    )
    yield
    for end in ending.before_ray:
        end()
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def finished(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small finished run, guided by pair; for slow tests.

    One process of the suite makes it, each has a copy: tests go on in it.
    """
    suite = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        suite = suite.parent
    made = suite / "finished"
    with (suite / "finished.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (made / "done").is_file():
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir()
            done = here(made, "run", str(CONFIG), *SMALL)
            assert done.returncode == 0, done.stderr
            (made / "done").touch()
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(made, folder, dirs_exist_ok=True)
    return folder
