"""What training declares to Ray, so that Ray Data always finds a CPU to feed it from."""

import pytest

from clinkd import cluster
from clinkd.config import ConfigError


@pytest.mark.parametrize("total", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("workers", [1, 2, 4, 8])
def test_workers_leave_a_cpu_to_ray_data(monkeypatch: pytest.MonkeyPatch, total: int, workers: int) -> None:
    import ray

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": float(total)})
    declared = cluster.declared_cpus(workers, 1.0)
    assert 0 < declared <= 1
    if total > 1:
        assert total - workers * declared >= 1
    if workers <= total - 2:
        assert declared == 1


@pytest.mark.parametrize("total", [1, 2, 4, 8, 64])
@pytest.mark.parametrize("workers", [1, 2, 8])
def test_all_tasks_of_all_feeds_find_room_beside_training(
    monkeypatch: pytest.MonkeyPatch, total: int, workers: int
) -> None:
    import ray

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": float(total)})
    each = cluster.feed_cpus(workers, 1.0, 3)
    assert 0 < each <= 1
    if total > 1:
        assert workers * (cluster.declared_cpus(workers, 1.0) + 3 * each) <= total
    assert total < 64 or each == 1


def test_more_workers_than_cpus_are_one_line() -> None:
    with pytest.raises(ConfigError, match=r"compute.workers: 3 workers of 1 CPU, but the cluster has 2"):
        cluster.check_workers(3, 1.0, 2.0)
    cluster.check_workers(2, 1.0, 2.0)


def test_more_gpus_than_there_are_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray Train would wait for them for ever."""
    import ray

    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0, "GPU": 1.0})
    with pytest.raises(ConfigError, match=r"2 workers of 1 GPU, but the cluster has 1; .*gpus_per_worker=0"):
        cluster.check_gpus(2, 1.0)
    cluster.check_gpus(2, 0.5)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0})
    cluster.check_gpus(2, 0.0)
    with pytest.raises(ConfigError, match="the cluster has 0"):
        cluster.check_gpus(1, 1.0)


@pytest.mark.parametrize(("misses", "tries"), [(0, 1), (2, 3), (9, cluster.STARTS)])
def test_a_ray_that_misses_its_own_deadline_is_started_again(
    monkeypatch: pytest.MonkeyPatch, misses: int, tries: int
) -> None:
    begun = []

    def init() -> None:
        begun.append(1)
        if len(begun) <= misses:
            raise Exception("The current node timed out during startup. This could happen because ...")

    monkeypatch.setattr(cluster, "_init", init)
    monkeypatch.setattr(cluster, "_started_here", False)
    if misses < cluster.STARTS:
        cluster._start()
    else:
        with pytest.raises(Exception, match="timed out during startup"):
            cluster._start()
    assert len(begun) == tries


def test_another_error_of_its_start_is_passed_on_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(cluster, "_init", init)
    with pytest.raises(OSError, match="no space left"):
        cluster._start()
