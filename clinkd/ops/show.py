"""A plan as text: a few tables, each number with its unit, warnings last."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Plan = Mapping[str, Any]


def show(plan: Plan) -> str:
    """The plan as lines."""
    parts = (_stages, _models, _memory, _zero, _time, _disk, _checkpoints, _rest, _warnings)
    return "\n".join(line for part in parts for line in part(plan))


def _stages(plan: Plan) -> Iterator[str]:
    yield f"{'stage':12}{'steps':>22}{'images a step':>16}{'questions a step':>18}"
    for row in _trained(plan):
        steps = f"{row['steps']:,}"
        if not row["given"]:
            steps = f"{steps} ({row['epochs']:g} epochs)"
        questions = f"<= {row['questions_a_step']:,}"
        yield f"{row['name']:12}{steps:>22}{row['images_a_step']:>16,}{questions:>18}"


def _trained(plan: Plan) -> list[Mapping[str, Any]]:
    return [row for row in plan["stages"] if not row.get("asks")]


def _models(plan: Plan) -> Iterator[str]:
    for model in plan["models"]:
        trains = f"{_count(model['trained'])} train" if model["trained"] else "given, none train"
        yield f"{model['role']}: {_count(model['parameters'])} parameters, {trains} ({model['where']})"
    data = plan["data"]
    yield (
        f"data: {data['records']:,} training images of {data['width']} x {data['height']}, "
        f"{data['turns']:.1f} questions each, {data['text']:.0f} + {data['answer']:.0f} tokens beside the "
        f"image ({data['known']})"
    )


def _memory(plan: Plan) -> Iterator[str]:
    rows = _trained(plan)
    where = f"GPU ({plan['device']})" if plan["capacity"] else "worker's process, beside its libraries"
    names = [name for name in _names(rows) if any(row["memory"].get(name) for row in rows)]
    yield ""
    yield f"memory of a {where}, {_unit(rows)[1]}, at the peak of a step:"
    heads = [*names, "total"]
    measured = any(row["measured"] for row in rows)
    yield (
        f"{'stage':12}{'ZeRO':>5}"
        + "".join(f"{head:>12}" for head in heads)
        + (f"{'measured':>12}" if measured else "")
    )
    unit = _unit(rows)[0]
    for row in rows:
        values = [*(row["memory"].get(name, 0.0) for name in names), row["total"]]
        line = f"{row['name']:12}{row['zero_stage']:>5}" + "".join(
            f"{value / unit:>12.2f}" for value in values
        )
        if row["measured"]:
            line += f"{row['measured']['grown_at_end'] / unit:>12.2f}"
        yield line


def _names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row["memory"]))


def _unit(rows: Sequence[Mapping[str, Any]]) -> tuple[float, str]:
    return (1e9, "GB") if max((row["total"] for row in rows), default=0) > 2e9 else (1e6, "MB")


def _zero(plan: Plan) -> Iterator[str]:
    for table in plan["zero"]:
        ranks = list(table["rows"][0]["bytes"])
        yield ""
        yield (
            f"{table['stage']}, GB of each GPU by ZeRO stage and number of GPUs "
            f"(* fits the {table['usable'] / 1e9:.0f} GB that can be used):"
        )
        yield f"{'ZeRO':12}" + "".join(f"{number:>9}" for number in ranks)
        for row in table["rows"]:
            cells = []
            for number in ranks:
                need = row["bytes"][number]
                cells.append(f"{need / 1e9:>8.1f}{'*' if need <= table['usable'] else ' '}")
            yield f"{row['zero_stage'] or '0 (DDP)':<12}" + "".join(cells)
        yield f"fewest GPUs: {_choice(table['best'])}; as configured: {_choice(table['best_here'])}"


def _choice(best: Sequence[int] | None) -> str:
    return "no stage fits" if best is None else f"ZeRO-{best[0]} on {best[1]}"


def _time(plan: Plan) -> Iterator[str]:
    yield ""
    priced = plan["price"] is not None
    yield f"{'work':20}{'FLOPs':>10}{'hours':>22}" + (f"{'US dollars':>18}" if priced else "")
    for row in plan["stages"]:
        work = row["flops"] if row.get("asks") else row["flops_a_step"] * row["steps"]
        line = f"{row['name']:20}{work:>10.2g}{_band(row['hours']):>22}"
        if priced:
            line += f"{_band(row['price']):>18}"
        if row.get("asks"):
            line += f"  {row['answers']:,} answers, at least"
        elif row["measured"]:
            line += f"  measured: {row['measured']['seconds']:.3g} s a step"
        yield line
    rate = f", {plan['price_an_hour']:g} dollars an hour" if priced else ""
    yield (
        f"{'total':20}{'':10}{_band(plan['hours']):>22}"
        + (f"{_band(plan['price']):>18}" if priced else "")
        + f"  on {plan['devices']:g} x {plan['device']}{rate}"
    )


def _band(pair: Sequence[float]) -> str:
    low, high = (f"{value:,.0f}" if value >= 100 else f"{value:.2g}" for value in pair)
    return low if low == high else f"{low} - {high}"


def _disk(plan: Plan) -> Iterator[str]:
    yield ""
    disk = plan["disk"]
    parts = ", ".join(
        f"{name.replace('_', ' ')} {_bytes(size)}" for name, size in disk.items() if name != "total"
    )
    yield f"disk: {_bytes(disk['total'])} at most: {parts}"
    parts = ", ".join(
        f"{name.replace('_', ' ')} {_bytes(size)}" for name, size in plan["node"].items() if size
    )
    yield f"main memory of a node, at most: {parts}"


def _checkpoints(plan: Plan) -> Iterator[str]:
    for entry in plan["checkpoints"][:2]:
        yield (
            f"checkpoints of {entry['stage']}: {_bytes(entry['bytes'])} each, best every "
            f"{_time_of(entry['best_seconds'])} ({entry['best_steps']:,} steps) with a failure every "
            f"{_time_of(3600 * entry['mtbf_hours'])}; configured: every {entry['every_steps']:,} steps, "
            f"{_time_of(entry['every_seconds'])}"
        )


def _rest(plan: Plan) -> Iterator[str]:
    yield from plan["reflection"]
    yield from plan["sweep"]


def _warnings(plan: Plan) -> Iterator[str]:
    for line in plan["warnings"]:
        yield f"warning: {line}"


def _count(number: float) -> str:
    for unit, name in ((1e9, "billion"), (1e6, "million")):
        if number >= unit:
            return f"{number / unit:.3g} {name}"
    return f"{number:,.0f}"


def _bytes(size: float) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size / 1e3:.3g} kB"


def _time_of(seconds: float) -> str:
    for unit, name in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:,.3g} {name}"
    return f"{seconds:.3g} s"
