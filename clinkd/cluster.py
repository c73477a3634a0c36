"""Ray: join the cluster there is, or start a small quiet one on this machine.

Decisions:
- ``compute.address`` goes before ``RAY_ADDRESS`` (which a Ray job sets); with neither, Ray starts here.
- A local Ray declares two CPUs more than there are, so that Ray Data's tasks find room beside training
  workers that hold one each; workers are checked against the real cores all the same.
- An address where nobody listens is said at once: Ray itself would try for a long time.
- Variables are set in this process only, and only where the user has set none.
"""

from __future__ import annotations

import logging
import os
import socket
import warnings
from pathlib import Path
from typing import Any

from clinkd.config import ConfigError
from clinkd.interrupt import handlers_kept

TRAIN_ENV = {
    # What transformers says on the way is no news; errors still arrive as such.
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_OFFLINE": "1",
    # Ray Train's controller looks every 2 s by default, and a crew's end waits for that look.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # The default of 60 s is short for workers that import torch and DeepSpeed on a busy machine.
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "300",
}
LOCAL_ENV = {
    # Unset, ray.init would turn token authentication on and leave a token in the home folder.
    "RAY_AUTH_MODE": "disabled",
    # Ray ends idle processes beyond the CPUs' number, to start others a moment later.
    "RAY_num_workers_soft_limit": "10",
    # One more process a stage, to hear that a node is to go: here nobody would be left.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
EXTRA_CPUS = 2
DATA_CPUS = 1.1  # one task of Ray Data, and what actors that only wait declare
STARTING = 8
"""Workers that may start at one time, at least: Ray warns of a few times this, soon reached on two cores."""
STARTS = 3
"""Times to try: Ray gives its own processes 30 s to come up, which on a busy machine they miss."""
_started_here = _connected_here = False


def connect(
    address: str | None = None, workers: int = 0, cpus_per_worker: float = 1.0, gpus_per_worker: float = 0.0
) -> None:
    """Makes Ray available to this process; does nothing more where it already is.

    Args:
        address: of a running cluster; None: ``RAY_ADDRESS``, else a Ray started here.
        workers: training workers that are to run at one time; 0 asks for nothing.

    Raises:
        ConfigError: no cluster at the address, or fewer CPUs or GPUs than the workers need.
    """
    import ray

    global _connected_here
    if not ray.is_initialized():
        _connected_here = True
        target = address or os.environ.get("RAY_ADDRESS") or "local"
        if target == "local":
            check_workers(workers, cpus_per_worker, real_cores())
            with handlers_kept():
                _start()
            check_gpus(workers, gpus_per_worker)
            return
        with handlers_kept():
            _join(target, "compute.address" if address else "RAY_ADDRESS")
    cpus = usable_cpus()
    check_workers(workers, cpus_per_worker, cpus)
    check_gpus(workers, gpus_per_worker)
    if workers and cpus < 2 and not _started_here:
        raise ConfigError(
            f"compute.address: the cluster has {cpus:g} CPU, training and Ray Data take two; "
            "start Ray with more"
        )


def started_here() -> bool:
    """Whether Ray runs on this machine for this command alone."""
    return _started_here


def usable_cpus() -> float:
    """CPUs that training may count on: the real cores here, or all of the cluster's."""
    import ray

    return real_cores() if _started_here else ray.cluster_resources().get("CPU", 0.0)


def data_cpus() -> float:
    """Of ``usable_cpus``, what training leaves to Ray Data; a Ray started here has CPUs beside for that."""
    return 0.0 if _started_here else DATA_CPUS


def declared_cpus(workers: int, cpus_per_worker: float) -> float:
    """CPUs that a training worker declares to Ray, at most ``cpus_per_worker``.

    Ray Data's tasks feed the workers and take a whole CPU: where workers declare all that a cluster has, both
    wait for each other for ever. There a worker declares less than half, or what
    leaves enough.
    """
    import ray

    if _started_here:
        return 0.01  # workers stay between the stages, whose tasks are to find all CPUs (train/crew.py)
    left = ray.cluster_resources().get("CPU", 0.0) - DATA_CPUS
    if workers * cpus_per_worker <= left:
        return cpus_per_worker
    return max(0.01, min(cpus_per_worker * 0.4, left / workers))


def feed_cpus(workers: int, cpus_per_worker: float, tasks: int) -> float:
    """CPUs that a task of a training worker's feed declares, ``tasks`` of them beside each worker.

    All of them must find room at one time: one that waits for another worker's would hold its own worker up,
    for which the other waits in turn.
    """
    import ray

    training = workers * declared_cpus(workers, cpus_per_worker)
    left = max(DATA_CPUS, ray.cluster_resources().get("CPU", 0.0) - training)
    return max(0.01, min(1.0, 0.9 * left / (workers * tasks)))


def logs() -> str:
    """The folder of this Ray's logs, which has one name on all nodes."""
    import ray

    node = ray._private.worker._global_node if ray.is_initialized() else None
    return f"{node.get_session_dir_path() if node else '/tmp/ray/session_latest'}/logs"


def beside_the_driver() -> dict[str, Any]:
    """Options of an actor that may not go away with another node than the one whose loss ends the run."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node_id=here, soft=False)}


def disconnect() -> None:
    """Leaves a cluster that ``connect`` joined, and ends a Ray that it started; one that was there stays."""
    global _started_here, _connected_here
    import ray

    if not _connected_here:
        return
    if ray.is_initialized():
        ray.shutdown()
    _started_here = _connected_here = False


def adopt(started_here: bool) -> None:
    """In a worker of Ray's: whether the command that it works for started this Ray."""
    global _started_here
    _started_here = started_here


def check_workers(workers: int, cpus_per_worker: float, cpus: float) -> None:
    """Refuses more training workers than CPUs: Ray Train would wait for them for ever.

    Raises:
        ConfigError: in one line.
    """
    if workers * cpus_per_worker > cpus + 1e-9:
        raise ConfigError(
            f"compute.workers: {workers} worker{'s' if workers != 1 else ''} of {cpus_per_worker:g} CPU, "
            f"but the cluster has {cpus:g}; lower compute.workers or compute.cpus_per_worker"
        )


def check_gpus(workers: int, gpus_per_worker: float) -> None:
    """The same of GPUs, in the Ray that this process is connected to.

    Raises:
        ConfigError: in one line.
    """
    import ray

    gpus = ray.cluster_resources().get("GPU", 0.0) if gpus_per_worker else 0.0
    if workers * gpus_per_worker > gpus + 1e-9:
        raise ConfigError(
            f"compute.gpus_per_worker: {workers} worker{'s' if workers != 1 else ''} of {gpus_per_worker:g} "
            f"GPU, but the cluster has {gpus:g}; lower compute.workers, or train on CPUs with "
            "compute.gpus_per_worker=0"
        )


def real_cores() -> int:
    """CPU cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return max(1, len(os.sched_getaffinity(0)))
    return os.cpu_count() or 1


def _start() -> None:
    global _started_here
    _defaults(TRAIN_ENV | LOCAL_ENV | ({} if _has_gpu() else {"DS_ACCELERATOR": "cpu"}))
    if real_cores() < STARTING:
        _defaults({"RAY_worker_maximum_startup_concurrency": str(STARTING)})
    for left in reversed(range(STARTS)):
        try:
            _init()
            break
        except Exception as error:  # of no class of its own
            if "timed out" not in str(error) or not left:
                raise
    _quiet_data()
    _started_here = True


def _init() -> None:
    import ray

    try:
        ray.init(
            address="local",
            num_cpus=real_cores() + EXTRA_CPUS,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except Exception:
        ray.shutdown()  # whatever of it has come up
        raise


def _quiet_data() -> None:
    """Ray Data's own bars and logs stand down: progress.py shows what a user wants to see."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    warnings.filterwarnings("ignore", module="ray.data")
    logging.getLogger("ray.data").setLevel(logging.ERROR)


def _join(address: str, where: str) -> None:
    import ray

    _defaults(TRAIN_ENV)
    if address.startswith(("http://", "https://")):
        raise ConfigError(
            f"{where}: {address} is a dashboard's address, for `ray job submit`; "
            "give host:port of the head, or ray://host:10001"
        )
    _listening(address, where)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{where}: no Ray cluster at {address}: {reason}") from None
    _quiet_data()


def _listening(address: str, where: str) -> None:
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return  # "auto", or a name that Ray knows to resolve
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"{where}: nothing listens at {address} ({error}); start Ray there, or leave the address out"
        ) from None


def _defaults(values: dict[str, str]) -> None:
    for name, value in values.items():
        os.environ.setdefault(name, value)


def _has_gpu() -> bool:
    """Whether a driver of NVIDIA or AMD shows a device; without importing torch."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists() or Path("/dev/dxg").exists()
