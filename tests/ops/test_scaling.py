"""Throughput on many GPUs: what is sent, how long that takes, and what limits it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_run import CONFIG

from clinkd.cli import main
from clinkd.config import load_config
from clinkd.ops.scaling import (
    HOP_INSIDE,
    NETWORKS,
    RANKS,
    Network,
    Pieces,
    Traffic,
    scaling,
    seconds,
    throughput,
    traffic,
    useful,
)

SEVEN = CONFIG.parent / "qwen2_vl_7b.yaml"


def volume(zero: int, micro: int = 1, trained: int = 1000, parameters: int = 1000) -> float:
    sent = traffic(trained, parameters, zero, 2, micro, 500, 10)
    return sum(each.size * each.sweeps for each in sent) / 2


def test_what_a_step_sends_is_the_papers() -> None:
    """2 N, 2 N, 2 N and 3 N elements (ZeRO, section 7)."""
    assert [volume(zero) for zero in range(4)] == [2000, 2000, 2000, 3000]


def test_micro_batches_are_sent_for_from_zero_2_on() -> None:
    assert [volume(zero, micro=4) for zero in range(4)] == [2000, 2000, 5000, 12000]


def test_frozen_weights_are_gathered_by_zero_3_alone() -> None:
    assert [volume(zero, trained=100) for zero in range(4)] == [200, 200, 200, 2100]


def test_within_a_node_it_is_a_ring() -> None:
    sent, network = Traffic(8e9, 1, 1), Network("n", 100e9, 1e9)
    assert seconds(sent, 4, network) == pytest.approx(8e9 * 3 / 4 / 100e9 + 3 * HOP_INSIDE)
    assert seconds(sent, 1, network) == 0


def test_between_nodes_each_gpu_carries_its_part_over_its_share_of_the_link() -> None:
    sent, network = Traffic(8e9, 1, 0), Network("n", float("inf"), 1e9)
    assert seconds(sent, 16, network) == pytest.approx(1e9 * 1 / 2 / 1e9)
    assert seconds(sent, 64, network) == pytest.approx(1e9 * 7 / 8 / 1e9)


@given(
    st.floats(1e-3, 10), st.floats(0, 1e11), st.integers(1, 64), st.floats(0, 100), st.sampled_from(NETWORKS)
)
def test_a_band_lies_under_perfect_scaling(compute, size, images, write, network) -> None:  # type: ignore[no-untyped-def]
    pieces = Pieces(compute, (Traffic(size, 2, 3),), images, write, 1e9)
    alone = throughput(pieces, 1, network)[1]
    for ranks in RANKS:
        low, high = throughput(pieces, ranks, network)
        assert 0 < low <= high <= ranks * alone * (1 + 1e-9)


def test_cpus_that_cannot_keep_up_are_the_limit() -> None:
    quick = Pieces(0.1, (), 100, 0.0, read=1e6)
    assert throughput(quick, 8, NETWORKS[0]) == pytest.approx((8000, 8000))
    assert throughput(replace(quick, read=300), 8, NETWORKS[0]) == pytest.approx((2400, 2400))


def test_more_gpus_fail_more_often() -> None:
    shares = [useful(60.0, ranks) for ranks in RANKS]
    assert shares == sorted(shares, reverse=True) and 0.5 < shares[-1] < shares[0] < 1
    assert useful(0.0, 512) == 1


def test_seven_billion_parameters_fit_eight_gpus_and_a_slow_link_costs() -> None:
    found = scaling(load_config(SEVEN), "h100")
    stage = next(stage for stage in found["stages"] if stage["name"] == "distill")
    assert 1 < stage["fits"] <= 8 and found["image_seconds"] > 0
    last = [network["rows"][-1]["images_a_second"][0] for network in stage["networks"]]
    assert last == sorted(last, reverse=True) and last[0] > 2 * last[-1]


def test_the_page_has_a_chart_a_stage_and_asks_the_network_for_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", str(SEVEN), "--scale", str(tmp_path / "s.html"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["scaling"]
    page = (tmp_path / "s.html").read_text()
    assert page.count("<svg") == len(found["stages"]) and "://" not in page
    assert "What is assumed" in page and "512" in page
