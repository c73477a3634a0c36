"""The learning rate's curve and what DeepSpeed is told."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from clinkd.config import ComputeSection, ConfigError, OptimSection
from clinkd.train.engine import deepspeed_config, hidden_size, learning_rate, parameter_groups


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_the_rate_warms_up_and_never_exceeds_one(schedule: str) -> None:
    optim = OptimSection(schedule=schedule, warmup=0.1)
    curve = [learning_rate(step, 100, optim) for step in range(100)]
    assert curve[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert max(curve) == 1 and min(curve) >= 0.02
    assert all(later <= earlier for earlier, later in itertools.pairwise(curve[9:]))


def test_wsd_is_flat_until_the_last_fifth() -> None:
    optim = OptimSection(schedule="wsd")
    assert learning_rate(79, 100, optim) == 1 and learning_rate(90, 100, optim) == pytest.approx(0.5)


def told(
    tmp_path: Path, file: dict[str, Any] | None = None, stage: int = 2, hidden: int | None = 1536, **compute
) -> dict[str, Any]:
    """DeepSpeed's JSON for ``compute`` with this ``file``."""
    if file is not None:
        (tmp_path / "ds.json").write_text(json.dumps(file))
        compute["deepspeed"] = str(tmp_path / "ds.json")
    return deepspeed_config(OptimSection(clip=0.5), ComputeSection(**compute), stage, hidden)


def zero(*args, **more) -> dict[str, Any]:
    return told(*args, **more)["zero_optimization"]


def test_a_users_keys_lie_under_ours(tmp_path: Path) -> None:
    file = {"gradient_clipping": 9, "wall_clock_breakdown": True, "zero_optimization": {"stage": 0}}
    config = told(tmp_path, file)
    assert config["gradient_clipping"] == 0.5 and config["zero_optimization"]["stage"] == 2
    assert config["wall_clock_breakdown"] is True


def test_what_we_leave_open_is_as_the_users_file_says(tmp_path: Path) -> None:
    wanted = {"overlap_comm": True, "reduce_bucket_size": 77, "stage3_param_persistence_threshold": 5}
    found = zero(tmp_path, {"zero_optimization": wanted}, stage=3)
    assert wanted.items() <= found.items() and found["stage"] == 3
    assert zero(tmp_path, stage=3)["overlap_comm"] is False


def test_what_we_say_goes_before_the_users_file(tmp_path: Path) -> None:
    base = {"overlap_comm": True, "reduce_bucket_size": 77, "round_robin_gradients": True}
    found = zero(tmp_path, {"zero_optimization": base}, overlap_comm=False, bucket_size=1000)
    assert found["overlap_comm"] is False and found["round_robin_gradients"] is True
    assert found["reduce_bucket_size"] == found["allgather_bucket_size"] == 1000


def test_auto_in_the_users_file_says_nothing(tmp_path: Path) -> None:
    file = {"train_batch_size": "auto", "zero_optimization": {"reduce_bucket_size": "auto"}}
    config = told(tmp_path, file, gpus_per_worker=1)
    assert "train_batch_size" not in config
    assert config["zero_optimization"]["reduce_bucket_size"] == 1536**2


def test_on_a_gpu_buckets_follow_the_models_width(tmp_path: Path) -> None:
    found = zero(tmp_path, stage=3, gpus_per_worker=1)
    assert found["overlap_comm"] is True and found["reduce_bucket_size"] == 1536 * 1536
    assert found["stage3_prefetch_bucket_size"] == int(0.9 * 1536 * 1536)
    assert found["stage3_param_persistence_threshold"] == 15360
    assert zero(tmp_path, hidden=128, gpus_per_worker=1)["reduce_bucket_size"] == 2**20
    assert zero(tmp_path, hidden=10**5, gpus_per_worker=1)["reduce_bucket_size"] == 500_000_000
    assert "reduce_bucket_size" not in zero(tmp_path, hidden=None, gpus_per_worker=1)  # DeepSpeed's own


def test_the_optimiser_is_one_that_needs_no_compiler() -> None:
    def params(**compute: Any) -> dict[str, Any]:
        return deepspeed_config(OptimSection(), ComputeSection(**compute), 2)["optimizer"]["params"]

    assert params()["torch_adam"] and params()["fused"]
    assert params(gpus_per_worker=1)["torch_adam"] and params(gpus_per_worker=1)["fused"]
    assert not params(gpus_per_worker=1, cpu_offload=True)["torch_adam"]


def test_muon_trains_the_matrices_between_embeddings_and_head() -> None:
    module = torch.nn.ModuleDict(
        {
            "embed_tokens": torch.nn.Embedding(5, 4),
            "layer": torch.nn.Linear(4, 4),
            "lm_head": torch.nn.Linear(4, 5),
        }
    )
    optim = OptimSection(lr=1e-3, muon_lr=0.02)
    rates = {
        id(parameter): group["lr"]
        for group in parameter_groups(module, optim)
        for parameter in group["params"]
    }
    found = {name: rates[id(parameter)] for name, parameter in module.named_parameters()}
    assert found.pop("layer.weight") == 0.02 and set(found.values()) == {1e-3}
    assert deepspeed_config(optim, ComputeSection(), 0)["optimizer"]["type"] == "Muon"


def test_on_a_cpu_nothing_overlaps_and_buckets_are_small(tmp_path: Path) -> None:
    for stage in (1, 2, 3):
        found = zero(tmp_path, stage=stage, hidden=128)
        assert found["overlap_comm"] is False
        assert 2 * 10**6 < found["reduce_bucket_size"] == found["allgather_bucket_size"] < 10**7
    assert zero(tmp_path, stage=0) == {"stage": 0}


def test_parameters_are_offloaded_under_zero_3_alone(tmp_path: Path) -> None:
    how = {"cpu_offload": True, "zero_stage": 1, "teacher_zero_stage": 3}
    teacher, student = (zero(tmp_path, stage=stage, offload_parameters=True, **how) for stage in (3, 1))
    assert teacher["offload_param"]["device"] == "cpu" and "offload_param" not in student
    assert teacher["offload_optimizer"]["device"] == student["offload_optimizer"]["device"] == "cpu"
    assert "offload_param" not in zero(tmp_path, stage=3, **how)
    with pytest.raises(ValueError, match="zero_stage: 3"):
        ComputeSection(offload_parameters=True, cpu_offload=True)


def test_every_preset_is_a_configuration_of_deepspeeds(tmp_path: Path) -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    for stage in range(4):
        for gpus in (0, 1):
            made = DeepSpeedZeroConfig(**zero(tmp_path, stage=stage, gpus_per_worker=gpus))
            assert made.stage == stage and (stage == 0 or made.overlap_comm == bool(gpus))


def test_the_width_is_the_language_models() -> None:
    from transformers import Qwen2VLConfig

    whole = torch.nn.ModuleList([torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)])
    assert hidden_size(whole) is None
    whole[1].config = Qwen2VLConfig(text_config={"hidden_size": 96}, vision_config={"hidden_size": 700})
    assert hidden_size(whole) == 96


@pytest.mark.parametrize("text", ["[1]", "{"])
def test_a_file_that_is_no_json_object_is_a_users_mistake(tmp_path: Path, text: str) -> None:
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(ConfigError, match=r"compute\.deepspeed"):
        deepspeed_config(OptimSection(), ComputeSection(deepspeed=str(tmp_path / "ds.json")), 0)


@pytest.mark.slow
def test_on_a_cpu_no_extension_is_compiled() -> None:
    program = (
        "import sys\n"
        "from clinkd.config import ComputeSection\n"
        "from clinkd.train.engine import import_engine\n"
        "import_engine(ComputeSection())\n"
        "from deepspeed.comm.torch import build_shm_op\n"
        "print(build_shm_op(), 'torch.utils.cpp_extension' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1:] == ["None False"], done.stderr[-1000:]
