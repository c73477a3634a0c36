"""The certificate passes for what is right, and does not for what is wrong in the ways seen elsewhere."""

from __future__ import annotations

import pytest
import torch

from clinkd.distill import certificate
from clinkd.distill.certificate import certify, oracle_loss
from clinkd.distill.losses import distill_loss


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "float16"])
def test_every_divergence_and_type_is_certified(divergence, dtype):
    found = certify(divergence=divergence, dtype=dtype, chunk_size=4)
    assert found["ok"], found["failures"]
    assert found["cases"] >= 8 and found["self_teacher_kd"] < 1e-6
    assert found["max_value_error"] <= found["value_tolerance"]


@pytest.mark.parametrize("given", ["topk", "logits"])
@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd"])
@pytest.mark.parametrize("temperature", [0.25, 1.0, 4.0])
def test_other_shapes_of_the_teacher_are_certified(given, divergence, temperature):
    found = certify(given=given, divergence=divergence, temperature=temperature)
    assert found["ok"], found["failures"]
    assert found["loss"]["given"] == given


@pytest.mark.parametrize(
    "options",
    [
        {"scale_t2": True, "temperature": 2.0},
        {"a": 0.0},
        {"a": 20.0},
        {"jsd_beta": 0.1, "divergence": "jsd"},
    ],
)
def test_every_option_is_certified(options):
    assert certify(**options)["ok"]


def test_the_oracle_by_hand():
    """Two tokens of vocabulary, one row: numbers one can check on paper."""
    one, head = torch.tensor([[1.0]]), torch.tensor([[0.0], [1.0]])
    teacher = torch.tensor([[0.0], [0.0]])
    method = {"a": 0.5, "temperature": 1.0, "divergence": "forward_kl"}
    loss = oracle_loss(one, head, torch.tensor([1]), one, teacher, **method)
    q = torch.sigmoid(torch.tensor(1.0, dtype=torch.float64))
    kl = 0.5 * (0.5 / (1 - q)).log() + 0.5 * (0.5 / q).log()
    assert loss.kd.item() == pytest.approx(kl.item()) and loss.ce.item() == pytest.approx(-q.log().item())
    assert loss.total.item() == pytest.approx((0.5 * kl - q.log()).item() / 1.5)


# Losses that are wrong in ways users of other libraries have reported.
def _extra_temperature(*inputs, temperature, **options):
    return distill_loss(*inputs, temperature=2 * temperature, **options)


def _hidden_t2(*inputs, **options):
    return distill_loss(*inputs, **{**options, "scale_t2": True})


def _another_weight(*inputs, a, **options):
    return distill_loss(*inputs, a=a + 0.1, **options)


def _own_count(*inputs, normalizer=None, **options):
    return distill_loss(*inputs, normalizer=None, **options)


def _other_direction(*inputs, divergence, **options):
    return distill_loss(*inputs, divergence="reverse_kl", **options)


class _Off(torch.autograd.Function):
    """The value as it is, its gradient 4% off."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, slope):
        return slope * 1.04


def _gradient_off(*inputs, **options):
    loss = distill_loss(*inputs, **options)
    return loss._replace(total=_Off.apply(loss.total))


@pytest.mark.parametrize(
    "wrong", [_extra_temperature, _hidden_t2, _another_weight, _own_count, _other_direction, _gradient_off]
)
def test_a_wrong_loss_is_caught(monkeypatch, wrong):
    monkeypatch.setattr(certificate, "distill_loss", wrong)
    found = certify()
    assert not found["ok"] and found["failures"]


def test_a_loss_that_is_not_a_number_is_caught(monkeypatch):
    def broken(*inputs, **options):
        loss = distill_loss(*inputs, **options)
        return loss._replace(kd=loss.kd * torch.nan)

    monkeypatch.setattr(certificate, "distill_loss", broken)
    assert not certify()["ok"]


@pytest.mark.parametrize("wrong", [{"dtype": "int8"}, {"temperature": 0.0}, {"divergence": "kl"}])
def test_what_it_refuses(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        certify(**wrong)


def test_the_same_seed_gives_the_same_certificate():
    assert certify(seed=3) == certify(seed=3)
