"""Rules about the dashboards beside a run: who comes to them has logged in, and changes nothing."""

from __future__ import annotations

import re
from typing import Any

from rendered import Docs, all_pods

PROXY = "oauth2-proxy"
FLAGS = {
    "cookie-secure": "true",
    "insecure-oidc-skip-nonce": "false",
    "code-challenge-method": "S256",
    "http-address": "0.0.0.0:4180",
}


def before_the_proxy(service: dict[str, Any]) -> bool:
    """Whether a Service leads from inside of the cluster to the proxy, and nowhere else."""
    return (
        service.get("type", "ClusterIP") == "ClusterIP"
        and service.get("selector", {}).get("clinkd/role") == "dashboards"
        and [port.get("targetPort") for port in service.get("ports", [])] == ["proxy"]
        and not service.get("externalIPs")
    )


def behind_the_proxy(docs: Docs) -> list[str]:
    """Only the proxy has a port; the others listen on the pod's loopback, where it looks for them."""
    found = []
    for pod in all_pods(docs):
        if pod.role != "dashboards":
            continue
        by_name = {container["name"]: container for container in pod.spec["containers"]}
        arguments = [argument.lstrip("-").partition("=") for argument in by_name[PROXY].get("args", [])]
        flags = {name: value for name, _, value in arguments}
        found += [
            f"{PROXY}: --{name} is {flags.get(name)}" for name in FLAGS if flags.get(name) != FLAGS[name]
        ]
        if not flags.get("allowed-group"):
            found.append(f"{PROXY}: lets in everyone whom the provider knows")
        found += [f"{PROXY}: --{name}" for name in flags if name.startswith("skip-auth")]
        upstreams = {value for name, _, value in arguments if name == "upstream"}
        if any(not upstream.startswith("http://127.0.0.1:") for upstream in upstreams):
            found.append(f"{PROXY}: an upstream outside of its pod")
        ports = {re.findall(r":(\d+)/", upstream)[0] for upstream in upstreams}
        for name, container in by_name.items():
            if name == PROXY:
                continue
            line = " ".join([*container.get("command", []), *container.get("args", [])])
            if container.get("ports") or "--host 127.0.0.1" not in line:
                found.append(f"{pod.where}: {name} can be reached past the proxy")
            if not set(re.findall(r"--port (\d+)", line)) & ports:
                found.append(f"{pod.where}: {name} is where the proxy does not look")
    return found


def read_alone(docs: Docs) -> list[str]:
    """The run's disk is mounted to be read, and a study is opened so: optuna-dashboard can delete."""
    found = []
    for pod in all_pods(docs):
        if pod.role != "dashboards":
            continue
        for volume in pod.spec["volumes"]:
            if "persistentVolumeClaim" in volume and not volume["persistentVolumeClaim"].get("readOnly"):
                found.append(f"{pod.where}: volume {volume['name']} can be written")
        for container in pod.spec["containers"]:
            line = " ".join(container.get("args", []))
            if "sqlite:" in line and "mode=ro" not in line:
                found.append(f"{pod.where}: {container['name']} opens the study to write")
    return found
