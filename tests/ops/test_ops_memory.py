"""Bytes on a GPU: what ZeRO splits, and what it never does."""

from __future__ import annotations

import itertools
import json
import os
import socket
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clinkd.ops.memory import RESERVE, Batch, Setting, buffers, choose, distinct, fits, states

COUNTS = st.integers(1, 10**10)
RANKS = st.integers(1, 512)


def total(parameters: int, trained: int, stage: int, ranks: int, element: int = 2) -> float:
    return sum(states(parameters, trained, Setting(stage, ranks, element)).values())


@given(COUNTS, RANKS)
def test_in_bfloat16_the_states_are_the_papers_formulas(n: int, p: int) -> None:
    assert total(n, n, 0, p) == 16 * n
    assert total(n, n, 1, p) == pytest.approx(4 * n + 12 * n / p)
    assert total(n, n, 2, p) == pytest.approx(2 * n + 14 * n / p)
    assert total(n, n, 3, p) == pytest.approx(16 * n / p)


@given(COUNTS, st.floats(0, 1), st.integers(2, 512), st.sampled_from([2, 4]))
def test_a_higher_stage_holds_no_more(n: int, share: float, p: int, element: int) -> None:
    trained = int(n * share)
    held = [total(n, trained, stage, p, element) for stage in (3, 2, 1, 0)]
    assert all(low <= high * (1 + 1e-12) for low, high in itertools.pairwise(held))


@given(COUNTS, st.floats(0, 1), st.integers(0, 3), RANKS, RANKS, st.sampled_from([2, 4]))
def test_more_ranks_hold_no_more_each(n: int, share: float, stage: int, p: int, q: int, element: int) -> None:
    few, many = sorted((p, q))
    trained = int(n * share)
    assert total(n, trained, stage, many, element) <= total(n, trained, stage, few, element) * (1 + 1e-12)


@given(COUNTS, st.integers(0, 3), RANKS)
def test_what_is_frozen_has_weights_alone(n: int, stage: int, p: int) -> None:
    found = states(n, 0, Setting(stage, p, 2))
    assert found["gradients"] == found["optimizer"] == 0
    assert found["weights"] == pytest.approx(2 * n / (p if stage == 3 else 1))


def test_in_float32_zero_keeps_a_copy_of_its_share() -> None:
    assert total(100, 100, 0, 1, 4) == 1600
    assert total(100, 100, 1, 1, 4) == 2000  # on one rank ZeRO costs, it saves nothing
    assert total(100, 100, 1, 4, 4) == 800 + 300


def test_offloaded_states_are_in_main_memory() -> None:
    moved = states(100, 100, Setting(2, 2, 2, offload=True))
    assert moved == {"weights": 200, "gradients": 0, "optimizer": 0}
    assert states(100, 100, Setting(3, 2, 2, offload=True, offload_parameters=True))["weights"] == 0
    assert states(100, 100, Setting(0, 2, 2, offload=True))["optimizer"] == 1200  # there is no ZeRO to do it


@pytest.mark.parametrize(
    ("parameters", "trained", "stage", "ranks"), [(1, 2, 0, 1), (2, -1, 0, 1), (2, 1, 4, 1), (2, 1, 0, 0)]
)
def test_impossible_settings_are_refused(parameters: int, trained: int, stage: int, ranks: int) -> None:
    with pytest.raises(ValueError, match="memory"):
        states(parameters, trained, Setting(stage, ranks, 2))


class Sized:
    """As much of a subject as buffers ask for."""

    parameters, trained, largest = 10**10, 10**10, 10**9


def test_buffers_are_buckets_and_under_zero_3_what_is_gathered() -> None:
    zero = {"reduce_bucket_size": 1000, "overlap_comm": True, "stage3_prefetch_bucket_size": 900}
    assert buffers(Sized(), Setting(0, 8, 2), zero, gpu=True) == 0  # type: ignore[arg-type]
    assert buffers(Sized(), Setting(2, 8, 2), zero, gpu=True) == 4000  # type: ignore[arg-type]
    gathered = buffers(Sized(), Setting(3, 8, 2), zero, gpu=True) - 4000  # type: ignore[arg-type]
    assert gathered == 2 * (10**9 + 900)
    assert buffers(Sized(), Setting(3, 1, 2), zero, gpu=True) == 4000  # type: ignore[arg-type]


def test_on_a_cpu_a_bucket_is_what_is_put_into_it() -> None:
    class Small(Sized):
        trained = 10

    zero = {"reduce_bucket_size": 1000, "overlap_comm": False}
    assert buffers(Small(), Setting(1, 2, 4), zero, gpu=False) == 40  # type: ignore[arg-type]


def test_the_fewest_gpus_first_then_the_stage_that_sends_least() -> None:
    capacity = 10.0 + RESERVE
    needs = {(0, 2): 11.0, (1, 2): 10.5, (2, 2): 10.0, (3, 2): 4.0, (2, 4): 3.0}
    assert choose(needs, capacity) == (2, 2)
    assert choose({(2, 2): 11.0, (3, 2): 4.0, (2, 4): 3.0}, capacity) == (3, 2)
    assert choose({(3, 8): 11.0}, capacity) is None
    assert fits({"weights": 10.0}, capacity) and not fits({"weights": 10.1}, capacity)


@given(st.integers(1, 10_000), st.floats(0, 1e6))
def test_images_seen_are_no_more_than_there_are_or_were_dealt(records: int, dealt: float) -> None:
    assert 0 <= distinct(records, dealt) <= min(records, max(1.0, dealt)) * (1 + 1e-9)
    assert distinct(100, 10_000) == pytest.approx(100)


def test_patches_of_a_batch_are_all_its_images() -> None:
    assert Batch(2, 10, 4, 3, (1, 4, 6)).patches == 72


ENGINE = """
import json, os, sys, torch, torch.distributed as dist
os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[1], "RANK": "0", "LOCAL_RANK": "0",
                "WORLD_SIZE": "1"}
dist.init_process_group("gloo", rank=0, world_size=1)
from clinkd.config import ComputeSection, OptimSection
from clinkd.train.engine import start_engine
found = {}
for stage in (0, 1, 2):
    module = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.Linear(512, 256))
    module[1].requires_grad_(False)
    engine = start_engine(module, OptimSection(), ComputeSection(), stage, 10)
    engine.backward(engine(torch.ones(4, 256)).sum())
    engine.step()
    size = lambda tensors: sum(one.numel() * one.element_size() for one in tensors)
    held = getattr(engine.optimizer, "optimizer", engine.optimizer)
    moments = [v for state in held.state.values() for v in state.values() if v.dim()]
    masters = [w for group in held.param_groups for w in group["params"]] if stage else []
    found[stage] = {"weights": size(engine.module.parameters()), "optimizer": size(moments + masters)}
print(json.dumps(found))
"""


@pytest.mark.slow
def test_float32_states_are_what_the_engine_holds() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", ENGINE, port], capture_output=True, text=True, timeout=600, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    first, second = 256 * 512 + 512, 512 * 256 + 256
    for stage in (0, 1, 2):
        wanted = states(first + second, first, Setting(stage, 1, 4))
        for part in ("weights", "optimizer"):
            assert found[str(stage)][part] == wanted[part], (stage, part)
