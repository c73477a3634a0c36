"""The file for `ray up`: Ray's own schema takes it, and it is as careful as the manifests."""

from __future__ import annotations

import importlib.util
import json
import shlex
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from clinkd.config import load_config
from clinkd.tune.sweep import concurrent_trials

ROOT = Path(__file__).parents[2]
FILE = ROOT / "cluster" / "launcher" / "aws.yaml"
RAY = importlib.util.find_spec("ray")
assert RAY is not None and RAY.origin  # found, not imported: that takes seconds
SCHEMA = json.loads((Path(RAY.origin).parent / "autoscaler" / "ray-schema.json").read_text())


@pytest.fixture
def given() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text())


def test_rays_schema_takes_it(given: dict[str, Any]) -> None:
    jsonschema.validate(given, SCHEMA)
    assert given["head_node_type"] in given["available_node_types"]
    least = sum(kind.get("min_workers", 0) for kind in given["available_node_types"].values())
    assert least <= given["max_workers"]


def test_rays_schema_refuses_a_key_that_it_does_not_know(given: dict[str, Any]) -> None:
    given["head_node"] = {}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(given, SCHEMA)


def test_the_driver_takes_no_work_and_only_workers_stand_on_spot(given: dict[str, Any]) -> None:
    head, worker = given["available_node_types"]["head"], given["available_node_types"]["spot-gpu"]
    assert head["resources"]["CPU"] == 0 and "InstanceMarketOptions" not in head["node_config"]
    assert worker["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}


def test_machines_are_closed_and_leave_no_images_behind(given: dict[str, Any]) -> None:
    assert given["provider"]["use_internal_ips"] and not given["provider"]["cache_stopped_nodes"]
    for kind in given["available_node_types"].values():
        machine = kind["node_config"]
        assert machine["MetadataOptions"]["HttpTokens"] == "required" and machine["SecurityGroupIds"]
        assert all(disk["Ebs"]["Encrypted"] for disk in machine["BlockDeviceMappings"])
    options = " ".join(given["docker"]["run_options"])
    assert "--cap-drop ALL" in options and "--privileged" not in options


def test_every_process_of_ray_needs_the_token_and_no_token_is_in_the_repository(
    given: dict[str, Any],
) -> None:
    options = " ".join(given["docker"]["run_options"])
    target, source = next(iter(given["file_mounts"].items()))
    assert "--env RAY_AUTH_MODE=token" in options and f"--env RAY_AUTH_TOKEN_PATH={target}" in options
    assert source in (ROOT / ".gitignore").read_text().splitlines()


def test_the_sweep_in_its_head_is_one_that_fits_the_smallest_cluster(given: dict[str, Any]) -> None:
    lines = [line.lstrip("# ").rstrip() for line in FILE.read_text().splitlines() if line.startswith("#")]
    shown = " ".join(lines).split("python ", 1)[1].split("'", 1)[0]
    script, path, *overrides = shlex.split(shown)
    assert (ROOT / script).is_file()
    kind = given["available_node_types"]["spot-gpu"]
    config = load_config(ROOT / path, overrides)
    assert concurrent_trials(config, [kind["resources"]] * kind["min_workers"], data_cpus=1.1) == 4
