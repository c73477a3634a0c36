"""Writes what is derived: the Grafana dashboards, and rules.yaml as a PrometheusRule.

    python cluster/monitoring/generate.py

Decisions:
- Names come from clinkd/metrics.py, so that a metric which is renamed there takes its panels along.
- Panels are built by Grafana's own SDK (grafana-foundation-sdk, generated from Grafana's schemas): a field
  that Grafana does not know is an error here. Its versions on PyPI carry an epoch, by which pip takes the
  build for Grafana 10.1 for the newest; the pin in pyproject.toml names the one for Grafana 11.6.
- What is made is committed: a cluster needs no Python to apply it, and a test makes it again and compares.
- The rules keep their text, comments and all: the manifest is rules.yaml, indented under a head.
"""

from __future__ import annotations

import json
import textwrap
from pathlib import Path
from typing import Any

from clinkd import metrics as m

HERE = Path(__file__).parent
RULE_HEAD = """\
# Made of rules.yaml by generate.py.
apiVersion: monitoring.coreos.com/v1
kind: PrometheusRule
metadata:
  name: clinkd
  labels:
    app.kubernetes.io/name: clinkd
spec:
"""
SOURCE = "$datasource"
MINE = 'namespace=~"$namespace", run=~"$run"'
TRIALS = 'namespace=~"$namespace", run=~"$run-trial-.*"'
WHOSE = "{{run}} {{stage}}"
JOB = "namespace, run, stage"


def prometheus_rule(rules: str) -> str:
    """The manifest around the text of rules.yaml."""
    return RULE_HEAD + textwrap.indent(rules[rules.index("groups:") :], "  ")


def dashboards() -> dict[str, str]:
    """File name -> JSON; needs grafana-foundation-sdk."""
    return {"clinkd-training.json": _text(_training()), "clinkd-sweeps.json": _text(_sweeps())}


def _text(dashboard: Any) -> str:
    from grafana_foundation_sdk.cog.encoder import JSONEncoder

    return json.dumps(dashboard.build(), cls=JSONEncoder, sort_keys=True, indent=1) + "\n"


# Queries.


def latest(quantity: m.Quantity, labels: str = MINE, by: str = JOB) -> str:
    """Of the processes that tell it (one after another, where workers are started again) the largest."""
    return f"max by ({by}) ({quantity.exposed}{{{labels}}})"


def rate(quantity: m.Quantity, labels: str = MINE) -> str:
    return f"sum by ({JOB}) (rate({quantity.exposed}{{{labels}}}[$__rate_interval]))"


def gained(quantity: m.Quantity) -> str:
    """What came to a counter in the time that is shown."""
    return f"sum by ({JOB}) (increase({quantity.exposed}{{{MINE}}}[$__range]))"


def age(quantity: m.Quantity) -> str:
    """Seconds since; while the driver says that the job is under way."""
    return f"(time() - {latest(quantity)}) and {latest(m.TRAIN_ACTIVE)} > 0"


def trials(states: str) -> str:
    """Trials of a sweep that are in one of the states, a|b."""
    each = latest(m.SWEEP_TRIALS, f'{MINE}, state=~"{states}"', "namespace, run, state")
    return f"sum by (namespace, run) ({each})"


def gpu_use() -> str:
    """Percent, by pod and GPU; Ray's own metric."""
    return 'avg by (namespace, pod, GpuIndex) (ray_node_gpus_utilization{namespace=~"$namespace"})'


def share(part: m.Quantity, whole: m.Quantity, by: str) -> str:
    return f"{latest(part, by=by)} / ({latest(whole, by=by)} > 0)"


# Panels. Width of the page: 24.


def _query(expr: str, legend: str) -> Any:
    from grafana_foundation_sdk.builders.prometheus import Dataquery

    return Dataquery().expr(expr).legend_format(legend)


def _panel(panel: Any, title: str, about: str, unit: str, width: int, queries: dict[str, str]) -> Any:
    from grafana_foundation_sdk.models.dashboard import DataSourceRef

    panel.title(title).description(about).unit(unit).span(width)
    panel.datasource(DataSourceRef(type_val="prometheus", uid=SOURCE))
    for letter, (legend, expr) in zip("ABCDEFGH", queries.items(), strict=False):
        panel.with_target(_query(expr, legend).ref_id(letter))
    return panel


def lines(title: str, about: str, unit: str, queries: dict[str, str]) -> Any:
    """Curves over time; ``queries``: legend -> expression."""
    from grafana_foundation_sdk.builders.timeseries import Panel

    return _panel(Panel().height(8).fill_opacity(0).line_width(1), title, about, unit, 12, queries)


def number(title: str, about: str, unit: str, queries: dict[str, str], steps: dict[float, str]) -> Any:
    """The present value; ``steps``: from which value on it has another colour than green."""
    from grafana_foundation_sdk.builders.dashboard import ThresholdsConfig
    from grafana_foundation_sdk.builders.stat import Panel
    from grafana_foundation_sdk.models.dashboard import Threshold, ThresholdsMode

    colours = [Threshold(value=None, color="green")]
    colours += [Threshold(value=value, color=colour) for value, colour in steps.items()]
    limits = ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(colours)
    return _panel(Panel().height(4).thresholds(limits).no_value("none"), title, about, unit, 6, queries)


def _page(title: str, uid: str, runs: str) -> Any:
    """An empty dashboard; ``runs``: of which metric the runs are offered."""
    from grafana_foundation_sdk.builders import dashboard as build
    from grafana_foundation_sdk.models.dashboard import (
        DataSourceRef,
        VariableOption,
        VariableRefresh,
        VariableSort,
    )

    def choice(name: str, query: str) -> Any:
        return (
            build.QueryVariable(name)
            .query({"query": query, "refId": name})
            .datasource(DataSourceRef(type_val="prometheus", uid=SOURCE))
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
            .sort(VariableSort.ALPHABETICAL_ASC)
            .multi(True)
            .include_all(True)
            .all_value(".*")
            .current(VariableOption(selected=True, text="All", value="$__all"))
        )

    page = build.Dashboard(title).uid(uid).tags(["clinkd"]).refresh("30s").time("now-6h", "now").readonly()
    return (
        page.timezone("browser")
        .with_variable(build.DatasourceVariable("datasource").type("prometheus"))
        .with_variable(choice("namespace", f"label_values({runs}, namespace)"))
        .with_variable(choice("run", f'label_values({runs}{{namespace=~"$namespace"}}, run)'))
    )


def _filled(page: Any, panels: list[Any]) -> Any:
    from grafana_foundation_sdk.builders.dashboard import Row

    for number_of, panel in enumerate(panels, 1):
        panel.id(number_of)
        page = page.with_row(panel) if isinstance(panel, Row) else page.with_panel(panel)
    return page


def _training() -> Any:
    from grafana_foundation_sdk.builders.dashboard import Row

    page = _page("clinkd: training", "clinkd-training", m.TRAIN_ACTIVE.exposed)
    panels = [
        Row("Now"),
        number("Done", "Optimiser steps of the stage.", "percentunit",
               {WHOSE: share(m.TRAIN_STEP, m.TRAIN_TOTAL, JOB)}, {}),
        number("Last finite step", "Seconds since; ClinkdNoProgress from half an hour on.", "s",
               {WHOSE: age(m.TRAIN_FINITE)}, {600: "orange", 1800: "red"}),
        number("Last checkpoint", "Seconds since; what a node's end would cost.", "s",
               {WHOSE: age(m.CHECKPOINT_SAVED)}, {1800: "orange", 3600: "red"}),
        number("Steps left out", "Loss or gradients were not finite, in the time shown.", "short",
               {WHOSE: gained(m.TRAIN_NONFINITE)}, {1: "orange", 10: "red"}),
        Row("Training"),
        lines("Loss", "Mean a token, of the last finite step.", "short", {WHOSE: latest(m.TRAIN_LOSS)}),
        lines("Steps", "Done, of all.", "short",
              {WHOSE: latest(m.TRAIN_STEP), f"{WHOSE} planned": latest(m.TRAIN_TOTAL)}),
        lines("Samples a second", "Over all ranks.", "short", {WHOSE: rate(m.TRAIN_SAMPLES)}),
        lines("Input tokens a second", "Over all ranks, no padding.", "short",
              {WHOSE: rate(m.TRAIN_TOKENS)}),
        lines("Time of a step", "Of the last one; checkpoints not counted.", "s",
              {WHOSE: latest(m.TRAIN_SECONDS)}),
        lines("Under way", "Training jobs that a driver waits for.", "short",
              {f"{WHOSE} ZeRO-{{{{zero_stage}}}}": latest(m.TRAIN_ACTIVE, by=f"{JOB}, zero_stage")}),
        Row("GPUs"),
        lines("Use", "Each GPU of the pods that Ray runs in.", "percent",
              {"{{pod}} {{GpuIndex}}": gpu_use()}),
        lines("Memory that torch holds", "By rank.", "bytes",
              {f"{WHOSE} rank {{{{rank}}}}": latest(m.TRAIN_GPU, by=f"{JOB}, rank")}),
        Row("Checkpoints"),
        lines("Age", "Of the last checkpoint, and of the newest whole copy in the store.", "s",
              {WHOSE: age(m.CHECKPOINT_SAVED), f"{WHOSE} copy": age(m.CHECKPOINT_COPIED)}),
        lines("Copies behind", "From the newest checkpoint sent to the newest whose copy is whole.", "s",
              {WHOSE: f"{latest(m.CHECKPOINT_SENT)} - {latest(m.CHECKPOINT_COPIED)}"}),
        lines("Size", "Bytes of the last checkpoint.", "bytes", {WHOSE: latest(m.CHECKPOINT_SIZE)}),
        lines("Time of saving", "Training waits so long.", "s", {WHOSE: latest(m.CHECKPOINT_SECONDS)}),
        Row("Data and reflection"),
        lines("Rows", "What prepare read, refused, and found a second time.", "short",
              {"{{run}} read": latest(m.DATA_READ, by="namespace, run"),
               "{{run}} refused": latest(m.DATA_QUARANTINED, by="namespace, run"),
               "{{run}} repeats": latest(m.DATA_DUPLICATE, by="namespace, run")}),
        lines("Wrong answers", "Of a round's training questions; of the validation split after it.",
              "percentunit",
              {"{{run}} round {{round}}":
                   share(m.REFLECT_WRONG, m.REFLECT_ANSWERED, "namespace, run, round"),
               "{{run}} validation after {{round}}":
                   latest(m.REFLECT_ERROR, by="namespace, run, round")}),
    ]  # fmt: skip
    return _filled(page, panels)


def _sweeps() -> Any:
    from grafana_foundation_sdk.builders.dashboard import Row

    ended, best = trials("complete|pruned|fail"), latest(m.SWEEP_BEST, by="namespace, run, metric")
    page = _page("clinkd: sweeps", "clinkd-sweeps", m.SWEEP_TRIALS.exposed)
    panels = [
        Row("Now"),
        number("Ended", "Trials, of all that are wanted.", "percentunit",
               {"{{run}}": f"{ended} / {latest(m.SWEEP_WANTED, by='namespace, run')}"}, {}),
        number("Running", "Trials at this moment.", "short", {"{{run}}": trials("running")}, {}),
        number("Failed", "Of the trials that ended; ClinkdTrialsFail from a quarter on.", "percentunit",
               {"{{run}}": f"{trials('fail')} / ({ended} > 0)"}, {0.1: "orange", 0.25: "red"}),
        number("Best", "Score on the validation split.", "short", {"{{run}} {{metric}}": best}, {}),
        Row("Trials"),
        lines("By state", "Running, waiting, complete, pruned, failed.", "short",
              {"{{run}} {{state}}": latest(m.SWEEP_TRIALS, by="namespace, run, state")}),
        lines("Best so far", "Of each metric of the sweep.", "short", {"{{run}} {{metric}}": best}),
        lines("Loss", "A curve a trial, named by the digest of its values.", "short",
              {WHOSE: latest(m.TRAIN_LOSS, TRIALS)}),
        lines("Steps", "Done by each trial.", "short", {WHOSE: latest(m.TRAIN_STEP, TRIALS)}),
        lines("Samples a second", "Of each trial.", "short", {WHOSE: rate(m.TRAIN_SAMPLES, TRIALS)}),
        lines("Use of GPUs", "Each GPU of the pods that Ray runs in.", "percent",
              {"{{pod}} {{GpuIndex}}": gpu_use()}),
    ]  # fmt: skip
    return _filled(page, panels)


def main() -> None:
    (HERE / "prometheus-rule.yaml").write_text(prometheus_rule((HERE / "rules.yaml").read_text()))
    for name, text in dashboards().items():
        (HERE / "dashboards" / name).write_text(text)


if __name__ == "__main__":
    main()
