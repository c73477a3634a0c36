"""What a step's line says of its batch: tokens without padding, whatever kind of feed it came by."""

from __future__ import annotations

from pathlib import Path

import torch

from clinkd.model.conversation import Document, pack_documents
from clinkd.train.meter import Meter, document_lengths, peak_memory_gib, speed


def test_padding_is_no_input() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])  # padded on the left, as for generation
    assert document_lengths({"input_ids": mask, "attention_mask": mask}) == [3, 5]


def test_without_mask_and_positions_all_is_input() -> None:
    assert document_lengths({"input_ids": torch.zeros(2, 7, dtype=torch.long)}) == [7, 7]


def test_packed_documents_are_told_by_their_positions() -> None:
    from clinkd.model.conversation import packed_positions
    from clinkd.model.rope import RopeGuidance

    texts = [[Document([5] * 4, [5] * 4), Document([6] * 3, [6] * 3)], [Document([7] * 2, [7] * 2)]]
    packed = pack_documents(texts, 0)
    positions = packed_positions(
        packed["input_ids"], packed["documents"], torch.zeros(0, 3, dtype=torch.long),
        guidance=RopeGuidance(), image_token_id=100, vision_start_token_id=101,
    )  # fmt: skip
    arguments = {"input_ids": packed["input_ids"], "attention_mask": None, "position_ids": positions}
    assert packed["input_ids"].numel() == 14 and document_lengths(arguments) == [4, 3, 2]


def test_a_module_without_a_model_of_ours_has_no_operations() -> None:
    module = torch.nn.Linear(3, 1)
    assert Meter(module).count({"x": torch.zeros(4, 3)}, 4) == (0, 0.0)
    assert speed(0.5, 0, 0.0) == {"seconds": 0.5}


def test_rates_are_of_the_step() -> None:
    found = speed(0.5, 1000, 3e12)
    assert found == {"seconds": 0.5, "input_tokens": 1000, "tokens_per_s": 2000, "tflops_per_s": 6}


def test_memory_is_this_processes_peak() -> None:
    before = peak_memory_gib(torch.device("cpu"))
    held = torch.ones(2**27)  # half a GiB
    after = peak_memory_gib(torch.device("cpu"))
    assert held.sum() > 0 and 0 < before <= after
    assert after >= 0.5


def test_a_jobs_peak_begins_anew_and_the_libraries_are_those_of_the_first(monkeypatch) -> None:
    from clinkd.train import meter

    monkeypatch.setattr(meter, "_libraries", None)
    first = meter.begin_memory()
    held = torch.ones(2**27)  # half a GiB
    assert held.sum() > 0
    high = peak_memory_gib(torch.device("cpu"))
    del held
    assert meter.begin_memory() == first
    if Path("/proc/self/clear_refs").exists():
        assert high - peak_memory_gib(torch.device("cpu")) > 0.4
