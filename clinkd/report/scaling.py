"""Throughput against GPUs as one HTML page: a chart for each stage, the numbers, and what was assumed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from clinkd.report.html import environment, put, signed_script
from clinkd.report.plots import INK, SERIES, new_figure, to_svg


def build_scaling(found: Mapping[str, Any], out: Path) -> Path:
    """Writes the page of what ``ops.scaling`` found and returns ``out``."""
    script, digest = signed_script()
    page = environment(autoescape=True).get_template("scaling.html.j2").render(
        found=found, charts=[Markup(chart(stage)) for stage in found["stages"]], script=script,
        script_hash=digest,
    )  # fmt: skip
    return put(out, page)


def chart(stage: Mapping[str, Any]) -> str:
    """Bands of images a second over GPUs, both on log scales, and the line of perfect scaling."""
    figure, axes = new_figure(5.6, 3.4)
    said = []
    for colour, network in zip(SERIES, stage["networks"], strict=False):
        rows = network["rows"]
        gpus = [row["gpus"] for row in rows]
        low, high = ([row["images_a_second"][at] for row in rows] for at in (0, 1))
        axes.fill_between(gpus, low, high, color=colour, alpha=0.25, linewidth=0)
        axes.plot(gpus, low, color=colour, linewidth=1.6, label=network["name"])
        said.append(f"{network['name']}: {low[-1]:,.0f} to {high[-1]:,.0f} on {gpus[-1]}")
    first = stage["networks"][0]["rows"][0]
    perfect = [first["images_a_second"][1] * count for count in gpus]
    axes.plot(gpus, perfect, color=INK, linewidth=0.8, linestyle=":", label="as one GPU, times their number")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(gpus, [str(count) for count in gpus])
    axes.minorticks_off()
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")  # the default's is TeX
    axes.set_xlabel("GPUs")
    axes.set_ylabel("images a second")
    axes.legend(frameon=False, fontsize=8, labelcolor=INK)
    return to_svg(
        figure, f"scaling-{stage['name']}", f"Images a second of {stage['name']}; {'; '.join(said)}"
    )
