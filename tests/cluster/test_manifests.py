"""Every overlay, alone and with its components, keeps the project's rules and starts what clinkd accepts."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from policy import RAY_VERSION, RULES
from rendered import KUBERAY, OVERLAYS, kind, pods, render, text

from clinkd.config import RunConfig, load_config
from clinkd.tune.sweep import concurrent_trials

ROOT = KUBERAY.parents[1]
COMMANDS = {"ray_jobs/pipeline.py": "run", "ray_jobs/sweep.py": "sweep"}
WITH = {
    "dev-cpu": ("kueue", "monitoring", "redis-ft", "dashboards"),
    "train-8xh100": ("kueue", "monitoring", "redis-ft", "efa", "dashboards"),
    "sweep-spot": ("monitoring", "redis-ft", "dashboards"),
}
needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not here to render")


def entrypoint(overlay: str, *components: str) -> tuple[str, RunConfig]:
    """The script of an overlay's job and the configuration that it would start with."""
    line = kind(render(overlay, *components), "RayJob")[0]["spec"]["entrypoint"]
    python, script, path, *overrides = shlex.split(line)
    assert python == "python"
    return script, load_config(ROOT / path, overrides)


@needs_kubectl
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_keeps_every_rule(overlay: str, rule) -> None:
    assert rule(render(overlay)) == []


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_an_overlay_keeps_every_rule_with_all_its_components(overlay: str) -> None:
    docs = render(overlay, *WITH[overlay])
    assert [finding for rule in RULES for finding in rule(docs)] == []


@needs_kubectl
@pytest.mark.parametrize("component", sorted(path.name for path in (KUBERAY / "components").iterdir()))
def test_a_component_changes_something_and_keeps_every_rule(component: str) -> None:
    docs = render("train-8xh100", component)
    assert docs != render("train-8xh100")
    assert [finding for rule in RULES for finding in rule(docs)] == []


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_entrypoint_is_a_job_of_clinkds_with_a_configuration_that_it_accepts(overlay: str) -> None:
    script, config = entrypoint(overlay)
    assert script in COMMANDS and (ROOT / script).is_file()
    assert f'main(["{COMMANDS[script]}", *sys.argv[1:]])' in (ROOT / script).read_text()
    assert config.run.root == "/mnt/clinkd/runs"


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_training_workers_of_the_configuration_fit_the_nodes(overlay: str) -> None:
    _, config = entrypoint(overlay)
    nodes = []
    for pod in pods(render(overlay)):
        if pod.role == "submitter":
            continue
        limits = pod.spec["containers"][0]["resources"]["limits"]
        cpus = pod.group["rayStartParams"].get("num-cpus", limits["cpu"])
        node = {"CPU": float(cpus), "GPU": float(limits.get("nvidia.com/gpu", 0))}
        nodes += [node] * pod.group.get("replicas", 1)
    trials = concurrent_trials(config, nodes, data_cpus=1.1)  # raises where not even one fits
    assert trials == {"dev-cpu": 1, "train-8xh100": 1, "sweep-spot": 4}[overlay]


@needs_kubectl
def test_a_patch_leaves_every_container_its_image() -> None:
    """A strategic merge would replace the list of containers, and the image would be gone."""
    for overlay in OVERLAYS:
        for pod in pods(render(overlay)):
            assert all("registry.example.com/clinkd:" in c["image"] for c in pod.spec["containers"])


def test_patches_are_json6902_throughout() -> None:
    for path in KUBERAY.rglob("kustomization.yaml"):
        made = yaml.safe_load(path.read_text())
        assert not {"patchesStrategicMerge", "configurations"} & set(made), path
        for patch in made.get("patches", []):
            steps = yaml.safe_load(patch.get("patch") or (path.parent / patch["path"]).read_text())
            assert isinstance(steps, list) and all({"op", "path"} <= set(step) for step in steps), path


def test_the_version_of_ray_is_that_of_the_lock() -> None:
    assert f"ray=={RAY_VERSION}" in (ROOT / "requirements.lock").read_text().splitlines()


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_schemas_and_the_operators_rules(overlay: str, tmp_path: Path) -> None:
    """By the validator in CLINKD_KUBERAY_VALIDATOR, with the definitions in CLINKD_KUBERAY_CRDS."""
    crds, tool = os.environ.get("CLINKD_KUBERAY_CRDS"), os.environ.get("CLINKD_KUBERAY_VALIDATOR")
    if not crds or not tool:
        pytest.skip("CLINKD_KUBERAY_CRDS and CLINKD_KUBERAY_VALIDATOR do not say where these are")
    for components in ((), WITH[overlay]):
        rendered = text(overlay, *components).split("\n---\n")
        # These are the Prometheus operator's, not KubeRay's.
        known = [doc for doc in rendered if not re.search(r"^kind: (PodMonitor|PrometheusRule)$", doc, re.M)]
        (tmp_path / "all.yaml").write_text("\n---\n".join(known))
        python = os.environ.get("CLINKD_KUBERAY_PYTHON", sys.executable)
        done = subprocess.run([python, tool, "--crds", crds, "--k8s", "1.33", str(tmp_path / "all.yaml")],
                              capture_output=True, text=True, timeout=120)  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
