"""The project's own rules for its Kubernetes manifests, over the rendered documents.

Each rule is a function of all documents of one overlay and returns findings, one line each; none is good.
They say what neither a schema nor the operator refuses: what is safe, what ends, what is found again. Who may
speak to whom is in ``policy_network``, on which machines what runs in ``policy_scheduling``; RULES has all.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from typing import Any

import policy_dashboards
import policy_network
import policy_scheduling
from rendered import Docs, all_pods, containers, kind, pods, quantity

RAY_VERSION = "2.60.0"
SECRET_NAMES = re.compile(r"(SECRET|TOKEN|PASSW|CREDENTIAL|(ACCESS|API|PRIVATE)_?KEY)", re.IGNORECASE)
SECRET_TEXT = re.compile(
    r"://[^/\s:]+:[^@\s]+@|\bAKIA[0-9A-Z]{16}\b|(password|token|secret|api_key)=\S", re.IGNORECASE
)


def image_pinned(docs: Docs) -> list[str]:
    found = []
    for where, _, container in containers(docs):
        image = container.get("image") or ""
        tag = image.rsplit("/", 1)[-1].partition(":")[2]
        digest = re.search(r"@sha256:[0-9a-f]{64}$", image)
        if not digest and (not tag or "latest" in tag or not re.search(r"\d", tag)) and image != "of:head":
            found.append(f"{where}: image {image!r} has no version and no digest")
    return found


def requests_are_limits(docs: Docs) -> list[str]:
    found = []
    for where, _, container in containers(docs):
        resources = container.get("resources", {})
        if resources.get("requests") != resources.get("limits"):
            found.append(f"{where}: requests are not the limits")
        if missing := {"cpu", "memory", "ephemeral-storage"} - set(resources.get("limits", {})):
            found.append(f"{where}: no limit of {', '.join(sorted(missing))}")
    return found


def pod_restricted(docs: Docs) -> list[str]:
    want = {"runAsNonRoot": True, "runAsUser": 1000, "runAsGroup": 100, "fsGroup": 100,
            "seccompProfile": {"type": "RuntimeDefault"}}  # fmt: skip
    found = []
    for pod in all_pods(docs):
        context = pod.spec.get("securityContext", {})
        found += [
            f"{pod.where}: {key} is {context.get(key)}" for key in want if context.get(key) != want[key]
        ]
        found += [f"{pod.where}: {key}" for key in ("hostNetwork", "hostPID", "hostIPC") if pod.spec.get(key)]
        found += [f"{pod.where}: hostPath" for volume in pod.spec.get("volumes", []) if "hostPath" in volume]
    return found


def container_restricted(docs: Docs) -> list[str]:
    want = {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    found = []
    for where, _, container in containers(docs):
        context = container.get("securityContext", {})
        found += [f"{where}: {key} is {context.get(key)}" for key in want if context.get(key) != want[key]]
        over = set(context) - set(want)  # what a container says goes before the pod's
        found += [f"{where}: {key} is not the pod's" for key in sorted(over)]
    return found


def writable_places(docs: Docs) -> list[str]:
    """The root filesystem is read-only: /tmp and HOME are volumes, and no volume can fill a node's disk."""
    found = []
    for where, pod, container in containers(docs):
        volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
        mounts = {mount["mountPath"]: mount["name"] for mount in container.get("volumeMounts", [])}
        home = next((entry.get("value") for entry in container.get("env", []) if entry["name"] == "HOME"), "")
        for place in ("/tmp", home or "HOME"):
            if "emptyDir" not in volumes.get(mounts.get(place, ""), {}):
                found.append(f"{where}: {place} cannot be written")
        for volume in volumes.values():
            if "emptyDir" in volume and "sizeLimit" not in (volume["emptyDir"] or {}):
                found.append(f"{where}: volume {volume['name']} has no sizeLimit")
    return found


def shared_memory(docs: Docs) -> list[str]:
    """Ray's object store is in memory, takes the 30% that Ray gives it, and leaves the processes theirs."""
    found = []
    for pod in pods(docs):
        if pod.role == "submitter":
            continue
        container = pod.spec["containers"][0]
        name = next((m["name"] for m in container["volumeMounts"] if m["mountPath"] == "/dev/shm"), None)
        volume = next((v.get("emptyDir") or {} for v in pod.spec["volumes"] if v["name"] == name), {})
        memory = quantity(container["resources"]["limits"]["memory"])
        if volume.get("medium") != "Memory":
            found.append(f"{pod.where}: /dev/shm is no memory")
        elif not 0.3 * memory <= quantity(volume.get("sizeLimit", 0)) <= 0.5 * memory:
            found.append(
                f"{pod.where}: /dev/shm of {volume.get('sizeLimit')} does not suit {memory / 2**30:g}Gi"
            )
    return found


def api_tokens(docs: Docs) -> list[str]:
    """Only the autoscaler's head holds a token of the Kubernetes API, and through an account of its own."""
    job = kind(docs, "RayJob")[0]["spec"]["rayClusterSpec"]
    accounts = {doc["metadata"]["name"]: doc for doc in kind(docs, "ServiceAccount")}
    found = []
    for pod in all_pods(docs):
        name, needed = (
            pod.spec.get("serviceAccountName"),
            pod.role == "head" and bool(job.get("enableInTreeAutoscaling")),
        )
        if name not in accounts:
            found.append(f"{pod.where}: account {name} is not here")
        elif accounts[name].get("automountServiceAccountToken") is not needed:
            found.append(f"{pod.where}: account {name}: automountServiceAccountToken is not {needed}")
        if pod.spec.get("automountServiceAccountToken") is not needed:
            found.append(f"{pod.where}: automountServiceAccountToken is not {needed}")
    return found


def workload_identity(docs: Docs) -> list[str]:
    known = (
        "eks.amazonaws.com/role-arn",
        "iam.gke.io/gcp-service-account",
        "azure.workload.identity/client-id",
    )
    runs = {pod.spec.get("serviceAccountName") for pod in pods(docs)}
    found = []
    for doc in kind(docs, "ServiceAccount"):
        has = bool(set(known) & set(doc["metadata"].get("annotations", {})))
        if has is not (doc["metadata"]["name"] in runs):
            found.append(f"account {doc['metadata']['name']}: {'an' if has else 'no'} identity for storage")
    return found


def secrets_by_reference(docs: Docs) -> list[str]:
    found = [f"Secret {doc['metadata']['name']} lies in the manifests" for doc in kind(docs, "Secret")]

    def walk(node: Any, path: str) -> None:
        if isinstance(node, dict):
            if SECRET_NAMES.search(str(node.get("name", ""))) and "value" in node:
                found.append(f"{path}: {node['name']} has its value in the text")
            for key, value in node.items():
                if key == "redisPassword" and "value" in value:
                    found.append(f"{path}: redisPassword has its value in the text")
                walk(value, f"{path}.{key}")
        elif isinstance(node, list):
            for number, value in enumerate(node):
                walk(value, f"{path}[{number}]")
        elif isinstance(node, str) and SECRET_TEXT.search(node):
            found.append(f"{path}: looks like a credential")

    for doc in docs:
        walk(doc, doc["kind"])
    return found


def ray_token(docs: Docs) -> list[str]:
    found = []
    for job in kind(docs, "RayJob"):
        cluster = job["spec"]["rayClusterSpec"]
        if cluster.get("authOptions", {}).get("mode") != "token":
            found.append("authOptions.mode is not token")
        if cluster.get("rayVersion") != RAY_VERSION:
            found.append(f"rayVersion is not {RAY_VERSION}, which the lock has")
    for where, _, container in containers(docs):
        if any(entry["name"] == "RAY_AUTH_MODE" for entry in container.get("env", [])):
            found.append(f"{where}: RAY_AUTH_MODE goes before authOptions")
    return found


def job_ends(docs: Docs) -> list[str]:
    found = []
    for job in kind(docs, "RayJob"):
        spec = job["spec"]
        if not spec.get("shutdownAfterJobFinishes"):
            found.append("the cluster stays after the job")
        found += [f"no {key}" for key in ("backoffLimit", "activeDeadlineSeconds", "ttlSecondsAfterFinished")
                  if not spec.get(key)]  # fmt: skip
    return found


def resumes(docs: Docs) -> list[str]:
    """Each attempt has the same run.name, and a run.root that outlives the cluster and all nodes see."""
    words = shlex.split(kind(docs, "RayJob")[0]["spec"]["entrypoint"])
    given = dict(word.split("=", 1) for word in words if "=" in word)
    found = []
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", given.get("run.name", "")):
        found.append(f"run.name {given.get('run.name')!r} is not the same in each attempt")
    root = given.get("run.root", "")
    if re.match(r"(s3|gs|abfs)://", root):
        return found
    for pod in pods(docs):
        claims = {v["name"] for v in pod.spec["volumes"] if "persistentVolumeClaim" in v}
        mounts = [
            m["mountPath"]
            for c in pod.spec["containers"]
            for m in c.get("volumeMounts", [])
            if m["name"] in claims
        ]
        if pod.role != "submitter" and not any(root.startswith(f"{place}/") for place in mounts):
            found.append(f"{pod.where}: run.root {root!r} goes with the cluster")
    return found


RULES: tuple[Callable[[Docs], list[str]], ...] = (
    image_pinned,
    requests_are_limits,
    pod_restricted,
    container_restricted,
    writable_places,
    shared_memory,
    api_tokens,
    workload_identity,
    secrets_by_reference,
    ray_token,
    job_ends,
    resumes,
    policy_network.one_namespace,
    policy_network.roles,
    policy_network.default_deny,
    policy_network.narrow_doors,
    policy_network.needed_doors,
    policy_network.not_exposed,
    policy_dashboards.behind_the_proxy,
    policy_dashboards.read_alone,
    policy_scheduling.head_stays,
    policy_scheduling.drains,
    policy_scheduling.priority,
    policy_scheduling.gpu_nodes,
    policy_scheduling.off_spot,
    policy_scheduling.spot_workers,
    policy_scheduling.fixed_or_scaled,
    policy_scheduling.queued,
)
