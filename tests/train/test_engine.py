"""The learning rate's curve and what DeepSpeed is told."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from clinkd.config import ComputeSection, ConfigError, OptimSection
from clinkd.train.engine import deepspeed_config, learning_rate


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


def test_a_users_keys_lie_under_ours(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(
        json.dumps({"gradient_clipping": 9, "zero_optimization": {"overlap_comm": False, "stage": 0}})
    )
    config = deepspeed_config(OptimSection(clip=0.5), ComputeSection(deepspeed=str(path)), 2)
    assert config["gradient_clipping"] == 0.5
    assert config["zero_optimization"] == {"overlap_comm": False, "stage": 2}


@pytest.mark.parametrize("text", ["[1]", "{"])
def test_a_file_that_is_no_json_object_is_a_users_mistake(tmp_path: Path, text: str) -> None:
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(ConfigError, match=r"compute\.deepspeed"):
        deepspeed_config(OptimSection(), ComputeSection(deepspeed=str(tmp_path / "ds.json")), 0)


@pytest.mark.slow
def test_a_lock_file_that_a_killed_process_left_holds_nobody_up() -> None:
    program = (
        "import os; os.environ['DS_ACCELERATOR'] = 'cpu'\n"
        "from torch.utils.cpp_extension import _get_build_directory\n"
        "from clinkd.train.engine import load_collectives\n"
        "from pathlib import Path\n"
        "Path(_get_build_directory('deepspeed_shm_comm', False), 'lock').touch()\n"
        "load_collectives(); print('loaded')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "loaded" in done.stdout, done.stderr[-1000:]
