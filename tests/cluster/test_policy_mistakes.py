"""Each rule catches the mistake that it is there for: made in a rendered overlay, found by that rule."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from typing import Any

import policy
import policy_dashboards as dashboards
import policy_network as network
import policy_scheduling as scheduling
import pytest
from rendered import Docs, kind, render

pytestmark = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not here to render")
Mistake = tuple[str, str, Callable[[Docs], list[str]], Callable[[Docs], Any]]


def job(docs: Docs) -> dict[str, Any]:
    return kind(docs, "RayJob")[0]["spec"]


def cluster(docs: Docs) -> dict[str, Any]:
    return job(docs)["rayClusterSpec"]


def head(docs: Docs) -> dict[str, Any]:
    return cluster(docs)["headGroupSpec"]["template"]["spec"]


def group(docs: Docs) -> dict[str, Any]:
    return cluster(docs)["workerGroupSpecs"][0]


def worker(docs: Docs) -> dict[str, Any]:
    return group(docs)["template"]["spec"]


def submitter(docs: Docs) -> dict[str, Any]:
    return job(docs)["submitterPodTemplate"]["spec"]


def named(docs: Docs, what: str, name: str) -> dict[str, Any]:
    return next(doc for doc in kind(docs, what) if doc["metadata"]["name"] == name)


def without(docs: Docs, what: str, name: str) -> None:
    docs.remove(named(docs, what, name))


def entry(docs: Docs, old: str, new: str) -> None:
    assert old in job(docs)["entrypoint"]
    job(docs)["entrypoint"] = job(docs)["entrypoint"].replace(old, new)


def ray(spec: dict[str, Any]) -> dict[str, Any]:
    return spec["containers"][0]


def env(spec: dict[str, Any], name: str, value: str) -> None:
    ray(spec)["env"].append({"name": name, "value": value})


def volume(spec: dict[str, Any], name: str) -> dict[str, Any]:
    return next(found for found in spec["volumes"] if found["name"] == name)


def unmount(spec: dict[str, Any], name: str) -> None:
    ray(spec)["volumeMounts"] = [mount for mount in ray(spec)["volumeMounts"] if mount["name"] != name]


def storage_door(docs: Docs) -> dict[str, Any]:
    return named(docs, "NetworkPolicy", "object-storage")["spec"]["egress"][0]


def terms(spec: dict[str, Any]) -> list[dict[str, Any]]:
    node = spec["affinity"]["nodeAffinity"]
    return node["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"]


def bear(spec: dict[str, Any], key: str) -> None:
    spec.setdefault("tolerations", []).append({"key": key, "operator": "Exists"})


def board(docs: Docs) -> dict[str, Any]:
    return kind(docs, "Deployment")[0]["spec"]["template"]["spec"]


def part(docs: Docs, name: str) -> dict[str, Any]:
    return next(container for container in board(docs)["containers"] if container["name"] == name)


def argue(docs: Docs, name: str, old: str, new: str) -> None:
    said = part(docs, name)["args"]
    assert any(old in argument for argument in said)
    part(docs, name)["args"] = [argument.replace(old, new) for argument in said]


TRAIN, SWEEP, DEV = "train-8xh100", "sweep-spot", "dev-cpu"
BOARDS = "sweep-spot dashboards"
MISTAKES: list[Mistake] = [
    ("latest", TRAIN, policy.image_pinned, lambda d: ray(worker(d)).update(image="registry/clinkd:latest")),
    ("a port is no tag", TRAIN, policy.image_pinned, lambda d: ray(head(d)).update(image="host:5000/clinkd")),
    ("an image lost in a merge", TRAIN, policy.image_pinned, lambda d: ray(worker(d)).pop("image")),
    ("the autoscaler's own image", SWEEP, policy.image_pinned,
     lambda d: cluster(d)["autoscalerOptions"].update(image="rayproject/ray:nightly")),
    ("burstable memory", TRAIN, policy.requests_are_limits,
     lambda d: ray(worker(d))["resources"]["requests"].update(memory="1Gi")),
    ("no limit of disk", TRAIN, policy.requests_are_limits,
     lambda d: [r.pop("ephemeral-storage") for r in ray(head(d))["resources"].values()]),
    ("an autoscaler without limits", SWEEP, policy.requests_are_limits,
     lambda d: cluster(d)["autoscalerOptions"].pop("resources")),
    ("root", TRAIN, policy.pod_restricted, lambda d: worker(d)["securityContext"].update(runAsUser=0)),
    ("no seccomp", DEV, policy.pod_restricted,
     lambda d: submitter(d)["securityContext"].pop("seccompProfile")),
    ("the host's network", TRAIN, policy.pod_restricted, lambda d: worker(d).update(hostNetwork=True)),
    ("the host's disk", TRAIN, policy.pod_restricted,
     lambda d: worker(d)["volumes"].append({"name": "nvme", "hostPath": {"path": "/mnt/nvme"}})),
    ("privileged", TRAIN, policy.container_restricted,
     lambda d: ray(worker(d))["securityContext"].update(privileged=True)),
    ("a capability", TRAIN, policy.container_restricted,
     lambda d: ray(worker(d))["securityContext"]["capabilities"].update(add=["IPC_LOCK"])),
    ("a writable root", DEV, policy.container_restricted,
     lambda d: ray(head(d))["securityContext"].update(readOnlyRootFilesystem=False)),
    ("root in one container alone", DEV, policy.container_restricted,
     lambda d: ray(head(d))["securityContext"].update(runAsUser=0)),
    ("an open autoscaler", SWEEP, policy.container_restricted,
     lambda d: cluster(d)["autoscalerOptions"].pop("securityContext")),
    ("no place for /tmp", TRAIN, policy.writable_places,
     lambda d: unmount(worker(d), "tmp")),
    ("a home on the root", DEV, policy.writable_places,
     lambda d: next(e for e in ray(submitter(d))["env"] if e["name"] == "HOME").update(value="/root")),
    ("a volume without end", TRAIN, policy.writable_places,
     lambda d: volume(worker(d), "ray-logs")["emptyDir"].clear()),
    ("shared memory on disk", TRAIN, policy.shared_memory,
     lambda d: volume(worker(d), "shared-mem")["emptyDir"].pop("medium")),
    ("shared memory of Docker's 64 MiB", TRAIN, policy.shared_memory,
     lambda d: volume(worker(d), "shared-mem")["emptyDir"].update(sizeLimit="64Mi")),
    ("shared memory as large as all", DEV, policy.shared_memory,
     lambda d: volume(head(d), "shared-mem")["emptyDir"].update(sizeLimit="16Gi")),
    ("a token for all workers", SWEEP, policy.api_tokens,
     lambda d: worker(d).update(automountServiceAccountToken=True)),
    ("an autoscaler without a token", SWEEP, policy.api_tokens,
     lambda d: head(d).update(automountServiceAccountToken=False)),
    ("workers with the head's account", SWEEP, policy.api_tokens,
     lambda d: worker(d).update(serviceAccountName="clinkd-head")),
    ("the namespace's default account", TRAIN, policy.api_tokens,
     lambda d: worker(d).pop("serviceAccountName")),
    ("no role for the bucket", TRAIN, policy.workload_identity,
     lambda d: kind(d, "ServiceAccount")[0]["metadata"].pop("annotations")),
    ("a key in the environment", TRAIN, policy.secrets_by_reference,
     lambda d: env(worker(d), "AWS_SECRET_ACCESS_KEY", "x")),
    ("a password in a URL", SWEEP, policy.secrets_by_reference,
     lambda d: entry(d, "compute.workers=1", "sweep.storage=postgresql://me:word@db/optuna")),
    ("a Secret in git", DEV, policy.secrets_by_reference,
     lambda d: d.append({"kind": "Secret", "metadata": {"name": "s", "namespace": "clinkd-dev"}})),
    ("Redis' password in the text", TRAIN, policy.secrets_by_reference,
     lambda d: cluster(d).update(gcsFaultToleranceOptions={"redisPassword": {"value": "x"}})),
    ("no Ray token", TRAIN, policy.ray_token, lambda d: cluster(d)["authOptions"].update(mode="disabled")),
    ("the token switched off by hand", DEV, policy.ray_token,
     lambda d: env(head(d), "RAY_AUTH_MODE", "disabled")),
    ("another Ray", DEV, policy.ray_token, lambda d: cluster(d).update(rayVersion="2.59.0")),
    ("a cluster that stays", TRAIN, policy.job_ends, lambda d: job(d).update(shutdownAfterJobFinishes=False)),
    ("no deadline", TRAIN, policy.job_ends, lambda d: job(d).pop("activeDeadlineSeconds")),
    ("no second attempt", TRAIN, policy.job_ends, lambda d: job(d).update(backoffLimit=0)),
    ("a new name at each attempt", TRAIN, policy.resumes,
     lambda d: entry(d, "run.name=qwen2-vl-2b", "run.name=$(date +%s)")),
    ("no name", SWEEP, policy.resumes, lambda d: entry(d, "run.name=sweep-distillation ", "")),
    ("runs in the container", TRAIN, policy.resumes, lambda d: entry(d, "/mnt/clinkd/runs", "/tmp/runs")),
    ("workers without the disk", TRAIN, policy.resumes,
     lambda d: worker(d)["volumes"].remove(volume(worker(d), "clinkd"))),
    ("another namespace", TRAIN, network.one_namespace,
     lambda d: named(d, "NetworkPolicy", "dns")["metadata"].update(namespace="default")),
    ("a namespace that takes all", DEV, network.one_namespace,
     lambda d: kind(d, "Namespace")[0]["metadata"]["labels"].pop("pod-security.kubernetes.io/enforce")),
    ("a pod that no policy knows", TRAIN, network.roles,
     lambda d: group(d)["template"]["metadata"]["labels"].pop("clinkd/role")),
    ("no default", TRAIN, network.default_deny, lambda d: without(d, "NetworkPolicy", "default-deny")),
    ("a default that lets out", TRAIN, network.default_deny,
     lambda d: named(d, "NetworkPolicy", "default-deny")["spec"].update(policyTypes=["Ingress"])),
    ("everyone in", TRAIN, network.narrow_doors,
     lambda d: named(d, "NetworkPolicy", "job-api")["spec"]["ingress"][0].pop("from")),
    ("every port", TRAIN, network.narrow_doors,
     lambda d: named(d, "NetworkPolicy", "ray-nodes")["spec"]["egress"][0].pop("ports")),
    ("the node's own role", TRAIN, network.narrow_doors,
     lambda d: storage_door(d)["to"][0]["ipBlock"].pop("except")),
    ("the world on SSH", TRAIN, network.narrow_doors,
     lambda d: storage_door(d)["ports"].append({"protocol": "TCP", "port": 22})),
    ("an operator that is shut out", TRAIN, network.needed_doors,
     lambda d: named(d, "NetworkPolicy", "job-api")["spec"]["ingress"][0]["from"].pop(0)),
    ("a submitter that gets nowhere", SWEEP, network.needed_doors,
     lambda d: without(d, "NetworkPolicy", "submitter")),
    ("no names", DEV, network.needed_doors, lambda d: without(d, "NetworkPolicy", "dns")),
    ("ports left to chance", TRAIN, network.needed_doors,
     lambda d: group(d)["rayStartParams"].pop("node-manager-port")),
    ("a port beside the door", TRAIN, network.needed_doors,
     lambda d: group(d)["rayStartParams"].update({"object-manager-port": "9000"})),
    ("NCCL shut out", TRAIN, network.needed_doors,
     lambda d: named(d, "NetworkPolicy", "ray-nodes")["spec"]["ingress"][0]["ports"].pop()),
    ("no bucket", TRAIN, network.needed_doors, lambda d: without(d, "NetworkPolicy", "object-storage")),
    ("a load balancer", DEV, network.not_exposed,
     lambda d: cluster(d)["headGroupSpec"].update(serviceType="LoadBalancer")),
    ("a port of the node's", DEV, network.not_exposed,
     lambda d: ray(head(d))["ports"][0].update(hostPort=6379)),
    ("the latest proxy", BOARDS, policy.image_pinned,
     lambda d: part(d, "oauth2-proxy").update(image="quay.io/oauth2-proxy/oauth2-proxy:latest")),
    ("dashboards as root", BOARDS, policy.pod_restricted,
     lambda d: board(d)["securityContext"].update(runAsUser=0)),
    ("dashboards with a token", BOARDS, policy.api_tokens,
     lambda d: board(d).pop("automountServiceAccountToken")),
    ("dashboards with the run's role", BOARDS, policy.workload_identity,
     lambda d: named(d, "ServiceAccount", "clinkd-dashboards")["metadata"].update(
         annotations={"eks.amazonaws.com/role-arn": "x"})),
    ("the client's secret in the text", BOARDS, policy.secrets_by_reference,
     lambda d: part(d, "oauth2-proxy")["env"].append({"name": "OAUTH2_PROXY_CLIENT_SECRET", "value": "x"})),
    ("a cookie's secret on the command line", BOARDS, policy.secrets_by_reference,
     lambda d: part(d, "oauth2-proxy")["args"].append("--cookie-secret=abc")),
    ("dashboards that no policy knows", BOARDS, network.roles,
     lambda d: kind(d, "Deployment")[0]["spec"]["template"]["metadata"]["labels"].pop("clinkd/role")),
    ("an identity provider that is out of reach", BOARDS, network.needed_doors,
     lambda d: named(d, "NetworkPolicy", "dashboards")["spec"].pop("egress")),
    ("a Service past the proxy", BOARDS, network.not_exposed,
     lambda d: kind(d, "Service")[0]["spec"]["ports"].append({"port": 8080, "targetPort": 8080})),
    ("a Service of the head's", BOARDS, network.not_exposed,
     lambda d: kind(d, "Service")[0]["spec"]["selector"].update({"clinkd/role": "head"})),
    ("a proxy on a load balancer", BOARDS, network.not_exposed,
     lambda d: kind(d, "Service")[0]["spec"].update(type="LoadBalancer")),
    ("TensorBoard on all addresses", BOARDS, dashboards.behind_the_proxy,
     lambda d: argue(d, "tensorboard", "--host 127.0.0.1", "--bind_all")),
    ("everyone whom the provider knows", BOARDS, dashboards.behind_the_proxy,
     lambda d: argue(d, "oauth2-proxy", "--allowed-group=replace-me", "--allowed-group=")),
    ("a path without a login", BOARDS, dashboards.behind_the_proxy,
     lambda d: part(d, "oauth2-proxy")["args"].append("--skip-auth-route=^/api")),
    ("a cookie without TLS", BOARDS, dashboards.behind_the_proxy,
     lambda d: argue(d, "oauth2-proxy", "--cookie-secure=true", "--cookie-secure=false")),
    ("a proxy that looks elsewhere", BOARDS, dashboards.behind_the_proxy,
     lambda d: argue(d, "oauth2-proxy", "127.0.0.1:8080", "127.0.0.1:8081")),
    ("a study that can be deleted", BOARDS, dashboards.read_alone,
     lambda d: argue(d, "optuna", "mode=ro&", "")),
    ("runs that can be written", BOARDS, dashboards.read_alone,
     lambda d: volume(board(d), "clinkd")["persistentVolumeClaim"].pop("readOnly")),
    ("a driver that is drained", TRAIN, scheduling.head_stays,
     lambda d: without(d, "PodDisruptionBudget", "clinkd-head")),
    ("a budget that Kubernetes ignores", TRAIN, scheduling.head_stays,
     lambda d: named(d, "PodDisruptionBudget", "clinkd-head").update(
         spec={"maxUnavailable": 0, "selector": {"matchLabels": {"clinkd/role": "head"}}})),
    ("a budget for fewer than there are", TRAIN, scheduling.head_stays,
     lambda d: group(d).update(replicas=2)),
    ("a budget for nobody", DEV, scheduling.head_stays,
     lambda d: kind(d, "PodDisruptionBudget")[0]["spec"].update(
         selector={"matchLabels": {"clinkd/role": "hed"}})),
    ("no drain", SWEEP, scheduling.drains, lambda d: ray(worker(d)).pop("lifecycle")),
    ("30 seconds to drain 90", SWEEP, scheduling.drains,
     lambda d: worker(d).update(terminationGracePeriodSeconds=30)),
    ("a class that is not there", TRAIN, scheduling.priority,
     lambda d: worker(d).update(priorityClassName="high")),
    ("first of all by default", TRAIN, scheduling.priority,
     lambda d: kind(d, "PriorityClass")[0].update(globalDefault=True)),
    ("a taint that is not borne", TRAIN, scheduling.gpu_nodes, lambda d: worker(d).pop("tolerations")),
    ("any GPU's node", TRAIN, scheduling.gpu_nodes, lambda d: worker(d).pop("affinity")),
    ("a head on a GPU's node", TRAIN, scheduling.gpu_nodes, lambda d: bear(head(d), "nvidia.com/gpu")),
    ("an empty term", SWEEP, scheduling.gpu_nodes,
     lambda d: terms(worker(d)).append({"matchExpressions": []})),
    ("a driver on spot", SWEEP, scheduling.off_spot, lambda d: head(d).pop("affinity")),
    ("a submitter on GKE's spot", SWEEP, scheduling.off_spot, lambda d: terms(submitter(d))[0].update(
        matchExpressions=terms(submitter(d))[0]["matchExpressions"][:2])),
    ("a head that bears spot's taint", SWEEP, scheduling.off_spot, lambda d: bear(head(d), "spot")),
    ("training on spot", TRAIN, scheduling.off_spot,
     lambda d: terms(worker(d)).append({"matchExpressions": [{"key": "a", "operator": "Exists"}]})),
    ("trials at full price", SWEEP, scheduling.spot_workers,
     lambda d: terms(worker(d))[0]["matchExpressions"].pop()),
    ("spot's taint that is not borne", SWEEP, scheduling.spot_workers,
     lambda d: worker(d).update(tolerations=worker(d)["tolerations"][:2])),
    ("training that might grow", TRAIN, scheduling.fixed_or_scaled, lambda d: group(d).update(maxReplicas=8)),
    ("a sweep from nothing", SWEEP, scheduling.fixed_or_scaled, lambda d: group(d).update(minReplicas=0)),
    ("the old autoscaler", SWEEP, scheduling.fixed_or_scaled,
     lambda d: cluster(d)["autoscalerOptions"].update(version="v1")),
    ("trials on the head", SWEEP, scheduling.fixed_or_scaled,
     lambda d: cluster(d)["headGroupSpec"]["rayStartParams"].update({"num-cpus": "4"})),
    ("pods that start again by themselves", SWEEP, scheduling.fixed_or_scaled,
     lambda d: worker(d).update(restartPolicy="Always")),
    ("suspended for ever", TRAIN, scheduling.queued, lambda d: job(d).update(suspend=True)),
    ("a queue that is jumped", TRAIN, scheduling.queued,
     lambda d: kind(d, "RayJob")[0]["metadata"]["labels"].update({"kueue.x-k8s.io/queue-name": "clinkd"})),
    ("a scaling job in a queue", SWEEP, scheduling.queued,
     lambda d: (job(d).update(suspend=True), kind(d, "RayJob")[0]["metadata"]["labels"].update(
         {"kueue.x-k8s.io/queue-name": "clinkd"}))),
]  # fmt: skip


@pytest.mark.parametrize(("overlay", "rule", "make"), [m[1:] for m in MISTAKES], ids=[m[0] for m in MISTAKES])
def test_a_mistake_is_caught_by_the_rule_that_is_there_for_it(
    overlay: str, rule: Callable[[Docs], list[str]], make: Callable[[Docs], Any]
) -> None:
    docs = render(*overlay.split())
    assert rule(docs) == []
    make(docs)
    assert rule(docs) != []


def test_every_rule_is_tried_on_a_mistake() -> None:
    assert {mistake[2] for mistake in MISTAKES} == set(policy.RULES)
