"""Rules about who may speak to whom; see ``policy``."""

from __future__ import annotations

import policy_dashboards
from rendered import Docs, all_pods, containers, kind, pods, selects

CLUSTER_WIDE = {"Namespace", "PriorityClass"}
PINNED = (
    "object-manager-port",
    "node-manager-port",
    "runtime-env-agent-port",
    "metrics-export-port",
    "dashboard-agent-grpc-port",
    "dashboard-agent-listen-port",
    "min-worker-port",
    "max-worker-port",
)
"""Ports that Ray draws where it is not told."""
INGRESS = {"app.kubernetes.io/name": "ingress-nginx"}


def default_deny(docs: Docs) -> list[str]:
    whole = [p for p in kind(docs, "NetworkPolicy") if p["spec"]["podSelector"] == {}
             and set(p["spec"]["policyTypes"]) == {"Ingress", "Egress"}
             and not p["spec"].get("ingress") and not p["spec"].get("egress")]  # fmt: skip
    return [] if whole else ["no policy denies everything to all pods"]


def narrow_doors(docs: Docs) -> list[str]:
    """No door without a port, none to everyone but for https, none to a node's own identity."""
    found = []
    for policy in kind(docs, "NetworkPolicy"):
        name = policy["metadata"]["name"]
        rules = [("from", r) for r in policy["spec"].get("ingress", [])]
        for side, rule in rules + [("to", r) for r in policy["spec"].get("egress", [])]:
            peers, ports = rule.get(side), {entry.get("port") for entry in rule.get("ports", [])}
            if not peers or {} in peers:
                found.append(f"{name}: a door {side} everyone")
            if not ports or None in ports:
                found.append(f"{name}: a door on every port")
            for block in [peer["ipBlock"] for peer in peers or [] if "ipBlock" in peer]:
                if block["cidr"].endswith("/0") and (side == "from" or not ports <= {443, 6443}):
                    found.append(f"{name}: {side} the whole world on {sorted(map(str, ports))}")
                if block["cidr"].endswith("/0") and "169.254.0.0/16" not in block.get("except", []):
                    found.append(f"{name}: reaches the metadata of the instance")
    return found


def _open(
    docs: Docs, of: dict[str, str], peer: dict[str, str] | None, port: int, side: str, own: bool = True
) -> bool:
    """Whether a pod labelled ``of`` may take (ingress) or make (egress) a TCP connection with ``peer``."""
    word = {"ingress": "from", "egress": "to"}[side]
    for policy in kind(docs, "NetworkPolicy"):
        if not selects(policy["spec"]["podSelector"], of):
            continue
        for rule in policy["spec"].get(side, []):
            ports = [
                (p["port"], p.get("endPort", p["port"]))
                for p in rule.get("ports", [])
                if p["protocol"] == "TCP"
            ]
            for target in rule.get(word, []):
                inside = own is ("namespaceSelector" not in target) and "ipBlock" not in target
                fits = (
                    "ipBlock" in target
                    if peer is None
                    else inside and selects(target.get("podSelector", {}), peer)
                )
                if fits and any(low <= port <= high for low, high in ports):
                    return True
    return False


def needed_doors(docs: Docs) -> list[str]:
    """What a run needs is open, at both ends; the ports are those that Ray is told to take."""
    by_role = {pod.role: pod for pod in pods(docs)}
    nodes = [pod for pod in by_role.values() if pod.role != "submitter"]
    head, submitter = by_role["head"].labels, by_role["submitter"].labels
    operator = {"app.kubernetes.io/name": "kuberay-operator"}
    found = []

    def need(who: str, port: int, *ends: tuple[dict[str, str], dict[str, str] | None, str, bool]) -> None:
        if not all(_open(docs, of, peer, port, side, own) for of, peer, side, own in ends):
            found.append(f"{who}: {port} is closed")

    for pod in nodes:
        params = pod.group.get("rayStartParams", {})
        pinned = {name: params.get(name) for name in PINNED}
        found += [f"{pod.where}: {name} is left to chance" for name, port in pinned.items() if port is None]
        for other in nodes:
            ports = [int(port) for port in pinned.values() if port] + [32768, 60999]
            for port in ports + ([6379, 8265] if pod.role == "head" else []):
                need(f"{other.where} to {pod.where}", port, (pod.labels, other.labels, "ingress", True),
                     (other.labels, pod.labels, "egress", True))  # fmt: skip
        need(f"{pod.where} to object storage", 443, (pod.labels, None, "egress", False))
    for pod in all_pods(docs):
        need(f"{pod.where} to DNS", 53, (pod.labels, {}, "egress", False))
    need("submitter to head", 8265, (submitter, head, "egress", True), (head, submitter, "ingress", True))
    need("operator to head", 8265, (head, operator, "ingress", False))
    if kind(docs, "RayJob")[0]["spec"]["rayClusterSpec"].get("gcsFaultToleranceOptions"):
        need("head to Redis", 6379, (head, {}, "egress", False))
    if kind(docs, "PodMonitor"):
        prometheus = {"app.kubernetes.io/name": "prometheus"}
        for pod in nodes:
            need(f"Prometheus to {pod.where}", 8080, (pod.labels, prometheus, "ingress", False))
    for pod in all_pods(docs):
        if pod.role == "dashboards":
            need(f"ingress to {pod.where}", 4180, (pod.labels, INGRESS, "ingress", False))
            need(f"{pod.where} to the identity provider", 443, (pod.labels, None, "egress", False))
    return found


def one_namespace(docs: Docs) -> list[str]:
    """All of it in one namespace, which is made here and refuses pods that are not restricted."""
    found, spaces = [], {doc["metadata"]["name"]: doc for doc in kind(docs, "Namespace")}
    for doc in docs:
        name = doc["metadata"].get("namespace")
        if doc["kind"] not in CLUSTER_WIDE and name not in spaces:
            found.append(f"{doc['kind']} {doc['metadata']['name']} is in namespace {name}")
    for name, doc in spaces.items():
        if doc["metadata"].get("labels", {}).get("pod-security.kubernetes.io/enforce") != "restricted":
            found.append(f"namespace {name} takes pods that are not restricted")
    return found


def roles(docs: Docs) -> list[str]:
    """A pod without its labels would be behind no door but the one that is shut."""
    return [
        f"{pod.where}: labels {pod.labels}"
        for pod in all_pods(docs)
        if not pod.role
        or pod.labels.get("clinkd/role") != pod.role
        or pod.labels.get("app.kubernetes.io/name") != "clinkd"
    ]


def not_exposed(docs: Docs) -> list[str]:
    """No Ingress is made here, and no Service but the one inside of the cluster before a login."""
    found = [
        f"{doc['kind']} {doc['metadata']['name']}"
        for doc in docs
        if doc["kind"] == "Ingress"
        or (doc["kind"] == "Service" and not policy_dashboards.before_the_proxy(doc["spec"]))
    ]
    for job in kind(docs, "RayJob"):
        head = job["spec"]["rayClusterSpec"]["headGroupSpec"]
        if head.get("serviceType", "ClusterIP") != "ClusterIP" or head.get("enableIngress"):
            found.append("the head is reachable from outside of the cluster")
    for where, _, container in containers(docs):
        if any("hostPort" in port for port in container.get("ports", [])):
            found.append(f"{where}: a port of the node's")
    return found
