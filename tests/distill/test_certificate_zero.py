"""The gradient that two ranks of unequal work step along, under every ZeRO stage, is the float64 oracle's."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as multiprocessing
from torch import Tensor, nn

pytestmark = pytest.mark.slow

WIDTH, VOCABULARY, TEACHER_VOCABULARY = 8, 37, 41
COUNTS = ((5, 3), (7, 0), (0, 2), (1, 9))
"""Answer tokens of both ranks: a rank whose rows are all masked among them."""
DIVERGENCES = ("forward_kl", "reverse_kl", "jsd")
RATE = 0.125


class Tiny(nn.Module):
    """As much of a model as the loss needs: a trunk that makes states of ids, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward_hidden(self, input_ids: Tensor, **savings: Any) -> Tensor:
        return self.embed(input_ids)


def batch(counts: tuple[int, int], seed: int) -> list[dict[str, Tensor]]:
    """Of each rank: ids and labels [2, 12], as many answer tokens as it has, the teacher's states at them."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for count in counts:
        ids = torch.randint(VOCABULARY, (2, 12), generator=generator)
        labels = torch.full((2, 12), -100)
        places = torch.randperm(22, generator=generator)[:count]
        labels[places // 11, 1 + places % 11] = ids[places // 11, 1 + places % 11]
        teacher = torch.randn(count, WIDTH, generator=generator)
        found.append({"input_ids": ids, "labels": labels, "teacher_hidden": teacher})
    return found


def worker(rank: int, port: int, out: str, stages: tuple[int, ...]) -> None:
    import os

    os.environ |= {"DS_ACCELERATOR": "cpu", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                   "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank)}  # fmt: skip
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    from clinkd.config import ComputeSection
    from clinkd.train.engine import import_engine

    import_engine(ComputeSection())
    errors = {
        f"ZeRO-{zero} {precision} {divergence}": compare(rank, zero, precision, divergence)
        for zero in stages
        for precision in ("fp32", "bf16")
        for divergence in DIVERGENCES
    }
    if rank == 0:
        Path(out).write_text(json.dumps(errors))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def compare(rank: int, zero: int, precision: str, divergence: str) -> float:
    """The largest error of a gradient entry over all batches, relative to that gradient's largest entry."""
    import deepspeed
    from deepspeed.utils import safe_get_full_fp32_param

    from clinkd.config import ComputeSection, OptimSection
    from clinkd.train.distill_task import DistillLossModule
    from clinkd.train.engine import deepspeed_config

    torch.manual_seed(0)
    method: dict[str, Any] = {"a": 0.7, "temperature": 0.6, "divergence": divergence}
    teacher_head = torch.randn(TEACHER_VOCABULARY, WIDTH)
    module = DistillLossModule(Tiny(), 4, teacher_head, method, zero3=zero == 3)  # type: ignore[arg-type]
    config = deepspeed_config(OptimSection(clip=1e9), ComputeSection(precision=precision), zero)  # type: ignore[arg-type]
    del config["optimizer"]
    engine, *_ = deepspeed.initialize(
        model=module, config=config | {"zero_allow_untested_optimizer": True}, dist_init_required=False,
        optimizer=torch.optim.SGD(module.parameters(), lr=RATE),
    )  # fmt: skip
    weights = (module.model.embed.weight, module.model.lm_head.weight)

    def whole() -> list[Tensor]:
        """Masters, in full precision; each rank takes part."""
        if zero:
            return [safe_get_full_fp32_param(weight).clone() for weight in weights]
        masters = engine.optimizer.fp32_groups[0] if precision == "bf16" else weights
        return [weight.detach().float().clone() for weight in masters]

    worst, before = 0.0, whole()
    for number, counts in enumerate(COUNTS):
        shares = batch(counts, number)
        loss = engine(**shares[rank])["loss"]
        engine.backward(loss * (2 / sum(counts)))
        engine.step()
        after = whole()
        wanted = oracle(before, shares, teacher_head, method, precision)
        for old, new, slope in zip(before, after, wanted, strict=True):
            found = (old.double() - new.double()) / RATE
            worst = max(worst, float((found - slope).abs().max() / slope.abs().max()))
        before = after
    return worst


def oracle(
    weights: list[Tensor],
    shares: list[dict[str, Tensor]],
    teacher_head: Tensor,
    method: dict[str, Any],
    precision: str,
) -> tuple[Tensor, ...]:
    """Gradients by the embedding and the head, of the loss over all ranks' answer tokens."""
    from clinkd.distill.certificate import oracle_loss

    def rounded(value: Tensor) -> Tensor:
        return value.bfloat16() if precision == "bf16" else value

    embed, head = (rounded(weight).double().requires_grad_() for weight in weights)
    ids, labels = (torch.cat([share[name] for share in shares]) for name in ("input_ids", "labels"))
    chosen = labels[:, 1:] != -100
    states = torch.cat([rounded(share["teacher_hidden"]) for share in shares])
    loss = oracle_loss(
        embed[ids[:, :-1][chosen]], head, labels[:, 1:][chosen], states, rounded(teacher_head), **method
    )
    return torch.autograd.grad(loss.total, (embed, head))


@pytest.mark.parametrize("stages", [(2,), pytest.param((0, 1, 3), marks=pytest.mark.full)])
def test_two_ranks_of_unequal_work_step_along_the_oracles_gradient(
    tmp_path: Path, stages: tuple[int, ...]
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = tmp_path / "errors.json"
    multiprocessing.spawn(worker, args=(port, str(out), stages), nprocs=2)
    errors = json.loads(out.read_text())
    assert len(errors) == len(stages) * 2 * 3
    far = {name: error for name, error in errors.items() if error > (2e-2 if "bf16" in name else 1e-4)}
    assert not far, far
