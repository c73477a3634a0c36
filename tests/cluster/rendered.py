"""Rendered manifests: made by kubectl, and read as pod templates; for the rules and their tests."""

from __future__ import annotations

import copy
import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

Docs = list[dict[str, Any]]
KUBERAY = Path(__file__).parents[2] / "cluster" / "kuberay"
OVERLAYS = ("dev-cpu", "train-8xh100", "sweep-spot")
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
SIZES = {"Ki": 2**10, "Mi": 2**20, "Gi": 2**30, "Ti": 2**40, "m": 1e-3, "": 1.0}


@functools.cache
def text(overlay: str, *components: str) -> str:
    """What ``kubectl kustomize`` makes of an overlay with components."""
    if not components:
        return _kustomize(KUBERAY / "overlays" / overlay)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch).resolve()
        parts = [KUBERAY / "overlays" / overlay, *(KUBERAY / "components" / name for name in components)]
        first, *others = (os.path.relpath(part, folder) for part in parts)
        # Said again: what is laid on from outside would be in no namespace.
        name = yaml.safe_load((parts[0] / "kustomization.yaml").read_text())["namespace"]
        outer = {"namespace": name, "resources": [first], "components": others}
        (folder / "kustomization.yaml").write_text(yaml.safe_dump(outer))
        return _kustomize(folder)


def _kustomize(folder: Path) -> str:
    kubectl = shutil.which("kubectl")
    assert kubectl is not None
    done = subprocess.run([kubectl, "kustomize", str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def render(overlay: str, *components: str) -> Docs:
    """The documents, new ones at each call."""
    return copy.deepcopy(_documents(overlay, *components))


@functools.cache
def _documents(overlay: str, *components: str) -> Docs:
    return [doc for doc in yaml.load_all(text(overlay, *components), Loader=LOADER) if doc]


class Pod(NamedTuple):
    """One pod template: ``role`` is head, worker or submitter of a RayJob, ``group`` its worker group; or
    the role that a Deployment gives itself."""

    where: str
    role: str
    labels: dict[str, str]
    spec: dict[str, Any]
    group: dict[str, Any]


def kind(docs: Docs, name: str) -> list[dict[str, Any]]:
    return [doc for doc in docs if doc["kind"] == name]


def pods(docs: Docs) -> Iterator[Pod]:
    for job in kind(docs, "RayJob"):
        spec, cluster = job["spec"], job["spec"]["rayClusterSpec"]
        groups = [("head", cluster["headGroupSpec"], "head")]
        groups += [(f"workers {g['groupName']}", g, "worker") for g in cluster.get("workerGroupSpecs", [])]
        for where, group, role in groups:
            template = group["template"]
            yield Pod(where, role, template.get("metadata", {}).get("labels", {}), template["spec"], group)
        template = spec.get("submitterPodTemplate") or {"spec": {"containers": []}}
        labels = template.get("metadata", {}).get("labels", {})
        yield Pod("submitter", "submitter", labels, template["spec"], {})


def all_pods(docs: Docs) -> Iterator[Pod]:
    """Those of the run, and those of Deployments beside it."""
    yield from pods(docs)
    for doc in kind(docs, "Deployment"):
        template = doc["spec"]["template"]
        labels = template.get("metadata", {}).get("labels", {})
        role = doc["spec"]["selector"]["matchLabels"].get("clinkd/role", "")
        yield Pod(f"deployment {doc['metadata']['name']}", role, labels, template["spec"], {})


def containers(docs: Docs) -> Iterator[tuple[str, Pod, dict[str, Any]]]:
    """All containers, and the autoscaler's as the operator will make it."""
    for pod in all_pods(docs):
        for container in [*pod.spec.get("initContainers", []), *pod.spec["containers"]]:
            yield f"{pod.where}: {container['name']}", pod, container
        options = kind(docs, "RayJob")[0]["spec"]["rayClusterSpec"].get("autoscalerOptions")
        if pod.role == "head" and options is not None:
            yield "head: autoscaler", pod, {"name": "autoscaler", "image": "of:head"} | options


def quantity(text: Any) -> float:
    number, unit = re.fullmatch(r"([0-9.]+)([KMGT]i|m|)", str(text)).groups()  # type: ignore[union-attr]
    return float(number) * SIZES[unit]


def selects(selector: dict[str, Any] | None, labels: dict[str, str]) -> bool:
    """Whether a label selector (matchLabels; In, NotIn and Exists) picks these labels; {} picks all."""
    if selector is None:
        return False
    if any(labels.get(key) != value for key, value in selector.get("matchLabels", {}).items()):
        return False
    for term in selector.get("matchExpressions", []):
        has = labels.get(term["key"])
        good = {"In": has in term.get("values", []), "Exists": has is not None}
        if not good.get(term["operator"], has not in term.get("values", [])):
            return False
    return True
