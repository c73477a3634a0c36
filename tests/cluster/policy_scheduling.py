"""Rules about machines: which ones, how many, how long, and what may take a pod off them; see ``policy``."""

from __future__ import annotations

from typing import Any

from rendered import Docs, Pod, kind, pods, selects

SPOT = {
    "karpenter.sh/capacity-type": "spot",
    "eks.amazonaws.com/capacityType": "SPOT",
    "cloud.google.com/gke-spot": "true",
    "kubernetes.azure.com/scalesetpriority": "spot",
}


def _terms(pod: Pod) -> list[list[dict[str, Any]]]:
    node = pod.spec.get("affinity", {}).get("nodeAffinity", {})
    wanted = node.get("requiredDuringSchedulingIgnoredDuringExecution", {}).get("nodeSelectorTerms", [])
    return [term.get("matchExpressions", []) for term in wanted]


def _gpus(pod: Pod) -> int:
    return sum(int(c["resources"]["limits"].get("nvidia.com/gpu", 0)) for c in pod.spec["containers"])


def _cluster(docs: Docs) -> dict[str, Any]:
    return kind(docs, "RayJob")[0]["spec"]["rayClusterSpec"]  # type: ignore[no-any-return]


def head_stays(docs: Docs) -> list[str]:
    """A node's drain waits for the driver, and for training of a fixed size, which ends with any node."""
    budgets, found = kind(docs, "PodDisruptionBudget"), []
    scaled = _cluster(docs).get("enableInTreeAutoscaling")
    for pod in pods(docs):
        if pod.role == "submitter" or (pod.role == "worker" and scaled):
            continue
        fitting = [b["spec"] for b in budgets if selects(b["spec"]["selector"], pod.labels)]
        wanted = pod.group["replicas"] if pod.role == "worker" else 1
        # Percentages and maxUnavailable need a controller with a scale, which Ray's pods have not.
        if not any(type(b.get("minAvailable")) is int and b["minAvailable"] >= wanted for b in fitting):
            found.append(f"{pod.where}: no disruption budget with minAvailable {wanted}")
    return found


def drains(docs: Docs) -> list[str]:
    found = []
    for pod in pods(docs):
        if pod.role == "submitter":
            continue
        hook = pod.spec["containers"][0].get("lifecycle", {}).get("preStop", {})
        words = hook.get("exec", {}).get("command", [])
        tool = "clinkd-drain" if pod.role == "worker" else "ray stop"
        if tool not in " ".join(words):
            found.append(f"{pod.where}: no {tool} before the end")
        waits = max((int(word) for word in " ".join(words).split() if word.isdigit()), default=0)
        if not waits + 20 <= pod.spec.get("terminationGracePeriodSeconds", 30) <= 120:
            found.append(
                f"{pod.where}: terminationGracePeriodSeconds leaves no time, or more than spot gives"
            )
    return found


def priority(docs: Docs) -> list[str]:
    known = {doc["metadata"]["name"] for doc in kind(docs, "PriorityClass")}
    found = [f"{pod.where}: priority class {pod.spec.get('priorityClassName')} is not here"
             for pod in pods(docs) if pod.spec.get("priorityClassName") not in known]  # fmt: skip
    return found + [f"{doc['metadata']['name']} is everyone's default"
                    for doc in kind(docs, "PriorityClass") if doc.get("globalDefault")]  # fmt: skip


def gpu_nodes(docs: Docs) -> list[str]:
    """Pods with GPUs ask for nodes that have them and bear their taint; an empty term fits no node."""
    found = []
    for pod in pods(docs):
        terms = _terms(pod)
        if any(not term for term in terms):
            found.append(f"{pod.where}: an empty term of affinity")
        tolerated = any(t.get("key") == "nvidia.com/gpu" for t in pod.spec.get("tolerations", []))
        if bool(_gpus(pod)) != tolerated:
            found.append(
                f"{pod.where}: {_gpus(pod)} GPUs, and {'a' if tolerated else 'no'} toleration of their taint"
            )
        named = terms and all(any(e["key"].startswith("nvidia.com/gpu.") for e in term) for term in terms)
        if _gpus(pod) and not named:
            found.append(f"{pod.where}: any node will do for GPUs")
    return found


def off_spot(docs: Docs) -> list[str]:
    """Driver and submitter, and workers of a fixed size, never stand on a node that may be taken."""
    scaled, found = _cluster(docs).get("enableInTreeAutoscaling"), []
    for pod in pods(docs):
        if pod.role == "worker" and scaled:
            continue
        for term in _terms(pod) or [[]]:
            barred = {
                e["key"] for e in term if e["operator"] == "NotIn" and SPOT.get(e["key"]) in e["values"]
            }
            if missing := set(SPOT) - barred:
                found.append(f"{pod.where}: may stand on spot nodes named by {', '.join(sorted(missing))}")
        found += [f"{pod.where}: tolerates {t['key']}" for t in pod.spec.get("tolerations", [])
                  if t.get("key") in {*SPOT, "spot"}]  # fmt: skip
    return found


def spot_workers(docs: Docs) -> list[str]:
    """What scales stands on spot nodes, whoever hands them out, and bears their taints."""
    if not _cluster(docs).get("enableInTreeAutoscaling"):
        return []
    found = []
    for pod in pods(docs):
        if pod.role != "worker":
            continue
        for term in _terms(pod) or [[]]:
            if not any(e["operator"] == "In" and e["values"] == [SPOT.get(e["key"])] for e in term):
                found.append(f"{pod.where}: a term of affinity takes nodes that are not spot")
        borne = {t.get("key") for t in pod.spec.get("tolerations", [])}
        if missing := {"cloud.google.com/gke-spot", "kubernetes.azure.com/scalesetpriority"} - borne:
            found.append(f"{pod.where}: does not bear {', '.join(sorted(missing))}")
    return found


def fixed_or_scaled(docs: Docs) -> list[str]:
    """A group has one size, or autoscaler v2 has room, a head without work, pods that it replaces itself."""
    cluster, found = _cluster(docs), []
    scaled, groups = cluster.get("enableInTreeAutoscaling"), cluster.get("workerGroupSpecs", [])
    for group in groups:
        low, now, high = (group.get(key, 0) for key in ("minReplicas", "replicas", "maxReplicas"))
        if scaled and not 0 < low <= now <= high:  # clinkd counts its nodes when a job begins
            found.append(f"{group['groupName']}: {low} to {high} replicas, {now} at first")
        if not scaled and not 0 < low == now == high:
            found.append(f"{group['groupName']}: {low} to {high} replicas without an autoscaler")
    if groups and str(cluster["headGroupSpec"]["rayStartParams"].get("num-cpus")) != "0":
        found.append("the head takes work")
    if scaled and cluster.get("autoscalerOptions", {}).get("version") != "v2":
        found.append("autoscaler is not v2")
    if scaled:
        found += [f"{pod.where}: restartPolicy is not Never" for pod in pods(docs)
                  if pod.spec.get("restartPolicy") != "Never"]  # fmt: skip
    return found


def queued(docs: Docs) -> list[str]:
    """A job in a queue of Kueue's begins suspended and has one size; one in none is not suspended."""
    found = []
    for job in kind(docs, "RayJob"):
        queue = "kueue.x-k8s.io/queue-name" in job["metadata"].get("labels", {})
        if queue is not bool(job["spec"].get("suspend")):
            found.append("suspended without a queue, or in a queue and not suspended")
        if queue and _cluster(docs).get("enableInTreeAutoscaling"):
            found.append("Kueue counts a workload whole: no autoscaler in a queue")
    return found
