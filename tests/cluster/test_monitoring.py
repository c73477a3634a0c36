"""Alerts and dashboards: made of their sources, about metrics that exist, and queries that Prometheus reads.

promtool is looked for on PATH and at CLINKD_PROMTOOL (the Debian package `prometheus` brings it).
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from rendered import KUBERAY, kind, render

from clinkd.metrics import TABLE

MONITORING = KUBERAY.parent / "monitoring"
DASHBOARDS = sorted((MONITORING / "dashboards").glob("*.json"))
RAYS_OWN = {"ray_node_gpus_utilization"}
PROMTOOL = os.environ.get("CLINKD_PROMTOOL") or shutil.which("promtool")
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="promtool is not here to read queries")
needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not here to render")
LABELS = {
    "namespace",
    "pod",
    "job",
    "GpuIndex",
    "stage",
    "run",
    "round",
    "rank",
    "zero_stage",
    "metric",
    "state",
}


def made() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", MONITORING / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rules(text: str | None = None) -> list[dict[str, Any]]:
    """Of rules.yaml, or of a text like it."""
    text = text or (MONITORING / "rules.yaml").read_text()
    return [rule for group in yaml.safe_load(text)["groups"] for rule in group["rules"]]


def queries(node: Any) -> Iterator[str]:
    """Expressions of a dashboard, its variables' among them."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == "expr":
                yield value
            elif key == "query" and isinstance(value, str) and "label_values" in value:
                yield re.fullmatch(r"label_values\((.*), \w+\)", value)[1]  # type: ignore[index]
            else:
                yield from queries(value)
    elif isinstance(node, list):
        for value in node:
            yield from queries(value)


def all_queries() -> list[tuple[str, str]]:
    """(where, expression) of alerts and dashboards."""
    found = [(rule["alert"], rule["expr"]) for rule in rules()]
    for path in DASHBOARDS:
        found += [(path.name, expr) for expr in queries(json.loads(path.read_text()))]
    return found


def promtool(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(PROMTOOL), *map(str, arguments)], capture_output=True, text=True, timeout=60)


def test_every_metric_that_is_asked_for_is_in_the_table_and_asked_for_with_its_tags() -> None:
    known = {quantity.exposed: set(quantity.tags) for quantity in TABLE}
    asked = all_queries()
    assert len(asked) > 40
    for where, expr in asked:
        names = set(re.findall(r"\bray_\w+", expr))
        assert names <= known.keys() | RAYS_OWN, (where, names - known.keys())
        assert "clinkd_" not in re.sub(r"\bray_clinkd_", "", expr), where
        for by in re.findall(r"(\w+) by \(([^)]*)\) \((ray_clinkd_\w+)\{", expr):
            assert set(by[1].split(", ")) - {"namespace"} <= known[by[2]], (where, by)


def test_every_metric_is_shown_on_a_dashboard_or_watched_by_an_alert() -> None:
    text = " ".join(expr for _, expr in all_queries())
    assert [quantity.exposed for quantity in TABLE if not re.search(rf"\b{quantity.exposed}\b", text)] == []


def test_an_alert_names_only_labels_that_its_series_can_have() -> None:
    for rule in rules():
        said = " ".join(rule["annotations"].values())
        assert set(re.findall(r"\$labels\.(\w+)", said)) <= LABELS
        assert {"summary", "description"} == set(rule["annotations"])
        assert rule["labels"]["severity"] in ("warning", "critical")


def test_every_alert_is_explained_to_who_gets_it() -> None:
    text = (KUBERAY.parent / "README.md").read_text()
    assert [rule["alert"] for rule in rules() if f"`{rule['alert']}`" not in text] == []


def test_the_operators_manifest_is_made_of_the_rules() -> None:
    written = (MONITORING / "prometheus-rule.yaml").read_text()
    assert written == made().prometheus_rule((MONITORING / "rules.yaml").read_text())
    assert yaml.safe_load(written)["spec"] == yaml.safe_load((MONITORING / "rules.yaml").read_text())


@pytest.mark.skipif(
    importlib.util.find_spec("grafana_foundation_sdk") is None, reason="grafana-foundation-sdk is not here"
)
def test_the_dashboards_are_what_the_generator_makes() -> None:
    written = {path.name: path.read_text() for path in DASHBOARDS}
    assert written == made().dashboards()


@pytest.mark.parametrize("path", DASHBOARDS, ids=lambda path: path.stem)
def test_a_dashboard_has_a_stable_name_and_panels_that_say_what_they_show(path: Path) -> None:
    board = json.loads(path.read_text())
    assert board["uid"] == path.stem and board["editable"] is False
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    for panel in panels:
        assert panel["title"] and panel["description"] and panel["targets"], panel["title"]
        assert panel["datasource"]["uid"] == "$datasource"
        assert panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24


@needs_promtool
def test_prometheus_reads_every_query(tmp_path: Path) -> None:
    """As recording rules: promtool of every age checks these."""
    plain = {"$__rate_interval": "5m", "$__range": "6h"}
    listed = []
    for number, (_, expr) in enumerate(all_queries()):
        for name, value in plain.items():
            expr = expr.replace(name, value)
        listed.append({"record": f"query:{number}", "expr": expr})
    path = tmp_path / "queries.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "all", "rules": listed}]}))
    done = promtool("check", "rules", path)
    assert done.returncode == 0 and f"{len(listed)} rules found" in done.stdout, done.stdout + done.stderr


@needs_promtool
def test_the_alerts_fire_when_they_are_to_and_else_not() -> None:
    done = promtool("test", "rules", MONITORING / "rules-test.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_unit_test_sees_each_alert_fire() -> None:
    tests = yaml.safe_load((MONITORING / "rules-test.yaml").read_text())["tests"]
    looked = [look for test in tests for look in test.get("alert_rule_test", [])]
    assert {look["alertname"] for look in looked if look["exp_alerts"]} == {rule["alert"] for rule in rules()}


def spoilt() -> Iterator[tuple[str, str, str]]:
    """(what, old, new): changes to the rules, each of which a unit test has to notice."""
    yield "no progress within an hour is no alarm", "> 1800", "> 3600"
    yield (
        "a stage that is done alarms",
        "(ray_clinkd_train_active_jobs) > 0",
        "(ray_clinkd_train_active_jobs) >= 0",
    )
    yield (
        "a worker that died is forgotten",
        "_finite_step_timestamp_seconds[6h]",
        "_finite_step_timestamp_seconds[5m]",
    )
    yield (
        "a first step that never comes is forgotten",
        "or ray_clinkd_train_begun",
        "and ray_clinkd_train_begun",
    )
    yield (
        "any pause is a drop",
        "min_over_time(ray_clinkd_train_active_jobs[10m])) > 0",
        "max_over_time(ray_clinkd_train_active_jobs[2h])) > 0",
    )
    yield "a drop has to be total", "0.6 *", "0.01 *"
    yield "every copy under way is behind", "    for: 15m\n", "    for: 0m\n"
    yield "no row may be refused", "> 0.05", "> 0.01"
    yield "one failed trial is enough", '{state="fail"}) >= 3', '{state="fail"}) >= 1'
    yield "a short pause of a GPU is idleness", "for: 30m", "for: 1m"
    yield "everybody's targets are ours", 'up{job=~".*/clinkd-ray"}', "up"


@needs_promtool
@pytest.mark.parametrize(("old", "new"), [way[1:] for way in spoilt()], ids=[way[0] for way in spoilt()])
def test_a_rule_that_is_spoilt_is_noticed_by_the_unit_tests(old: str, new: str, tmp_path: Path) -> None:
    text = (MONITORING / "rules.yaml").read_text()
    assert old in text
    (tmp_path / "rules.yaml").write_text(text.replace(old, new))
    changed = {rule["alert"] for rule in rules(text.replace(old, new)) if rule not in rules()}
    suite = yaml.safe_load((MONITORING / "rules-test.yaml").read_text())
    suite["tests"] = [
        test
        for test in suite["tests"]
        if "promql_expr_test" in test or changed & {look["alertname"] for look in test["alert_rule_test"]}
    ]
    (tmp_path / "rules-test.yaml").write_text(yaml.safe_dump(suite))
    done = promtool("test", "rules", tmp_path / "rules-test.yaml")
    assert done.returncode == 1 and "FAILED" in done.stdout + done.stderr


@needs_kubectl
def test_the_component_brings_monitor_rules_and_dashboards_into_the_runs_namespace() -> None:
    docs = render("train-8xh100", "monitoring")
    (rule,), (monitor,) = kind(docs, "PrometheusRule"), kind(docs, "PodMonitor")
    assert rule["spec"] == yaml.safe_load((MONITORING / "rules.yaml").read_text())
    (boards,) = [doc for doc in kind(docs, "ConfigMap") if "grafana_dashboard" in doc["metadata"]["labels"]]
    assert boards["data"] == {path.name: path.read_text() for path in DASHBOARDS}
    assert {doc["metadata"]["namespace"] for doc in (rule, monitor, boards)} == {"clinkd-train"}
    assert re.fullmatch(".*/clinkd-ray", f"clinkd-train/{monitor['metadata']['name']}")


@needs_kubectl
def test_the_monitor_finds_the_port_of_head_and_workers() -> None:
    docs = render("train-8xh100", "monitoring")
    (endpoint,) = kind(docs, "PodMonitor")[0]["spec"]["podMetricsEndpoints"]
    cluster = kind(docs, "RayJob")[0]["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        ports = {
            port["name"]: port["containerPort"]
            for port in group["template"]["spec"]["containers"][0]["ports"]
        }
        assert str(ports[endpoint["port"]]) == group["rayStartParams"]["metrics-export-port"]


def test_the_generator_needs_no_sdk_for_the_rules() -> None:
    script = (
        "import sys; sys.modules['grafana_foundation_sdk'] = None\n"
        "import generate; assert 'rules:' in generate.prometheus_rule('groups:\\n- rules: []')"
    )
    env = os.environ | {"PYTHONPATH": f"{MONITORING}:{KUBERAY.parents[1]}"}
    assert subprocess.run([sys.executable, "-c", script], env=env, timeout=60).returncode == 0
