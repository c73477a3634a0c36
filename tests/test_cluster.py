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
