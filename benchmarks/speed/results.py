"""What a figure is: our seconds or bytes beside their floor and the peers'. Table and JSON."""

import dataclasses
import math
from typing import Any

from rich import box
from rich.table import Table

from benchmarks.speed import measure


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """One row of the table.

    Attributes:
      name: what was measured.
      workload: on which network or tree.
      unit: ``"s"`` or ``"B"``.
      ours: one value a round, the less the better.
      floor: what the machine allows, in the same rounds; empty where there is none.
      floor_is: the floor in words.
      target: the largest ratio of ours to the floor that will do.
      peers: for each peer that can do it its values in the same rounds.
      ahead: how many times as much the best peer is to take at the least.
      checks: what must hold beside the target, in words.
      details: further numbers for the JSON.
    """

    name: str
    workload: str
    ours: list[float]
    unit: str = "s"
    floor: list[float] = dataclasses.field(default_factory=list)
    floor_is: str = ""
    target: float | None = None
    peers: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    ahead: float | None = None
    checks: dict[str, bool] = dataclasses.field(default_factory=dict)
    details: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A figure that was not measured, and why."""

    name: str
    workload: str
    why: str


def record(figure: Figure) -> dict[str, Any]:
    """What is written as JSON: medians, quartiles, ratios to the floor and of the peers to ours."""
    content = dataclasses.asdict(figure)
    content["ours"] = measure.summary(figure.ours)
    content["floor"] = measure.summary(figure.floor) if figure.floor else None
    content["ratio_to_floor"] = measure.ratio(figure.ours, figure.floor) if figure.floor else None
    content["peers"] = {name: measure.summary(values) for name, values in figure.peers.items()}
    content["ratio_of_peers"] = {
        name: measure.ratio(values, figure.ours) for name, values in figure.peers.items()
    }
    content["target_met"] = target_met(figure)
    content["ahead_met"] = ahead_met(figure)
    return content


def target_met(figure: Figure) -> bool | None:
    """Whether the median ratio to the floor is within the target; None where there is none."""
    if figure.target is None or not figure.floor:
        return None
    return bool(measure.ratio(figure.ours, figure.floor)["median"] <= figure.target)


def ahead_met(figure: Figure) -> bool | None:
    """Whether even the best peer takes ``ahead`` times as much; None where no peer was measured."""
    if figure.ahead is None or not figure.peers:
        return None
    ratios = [measure.ratio(values, figure.ours)["median"] for values in figure.peers.values()]
    return min(ratios) >= figure.ahead


def table(figures: list[Figure]) -> Table:
    """One row a figure: ours, how many floors that is (quartiles), the peers in units of ours."""
    drawn = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for column in ("figure", "workload"):
        drawn.add_column(column, overflow="fold")
    for column in ("ours", "x floor", "target", "peers x ours", "target"):
        drawn.add_column(column, justify="right", overflow="fold")
    for figure in figures:
        drawn.add_row(*_cells(figure))
    return drawn


def failures(figures: list[Figure]) -> list[str]:
    """What is not as it must be, a line each: targets missed, checks that do not hold."""
    lines = []
    for figure in figures:
        name = f"{figure.name}, {figure.workload}"
        if target_met(figure) is False:
            ratio = measure.ratio(figure.ours, figure.floor)["median"]
            lines.append(f"{name}: {ratio:.3g} times its floor, target {figure.target:g}")
        if ahead_met(figure) is False:
            lines.append(f"{name}: not {figure.ahead:g} times ahead of every peer")
        lines += [f"{name}: not so: {words}" for words, holds in figure.checks.items() if not holds]
    return lines


def _cells(figure: Figure) -> tuple[str, ...]:
    ours = with_unit(measure.summary(figure.ours)["median"], figure.unit)
    floors = _spread(measure.ratio(figure.ours, figure.floor)) if figure.floor else ""
    peers = [
        f"{name} {measure.ratio(values, figure.ours)['median']:.3g}"
        for name, values in figure.peers.items()
    ]
    target = _target(figure.target, target_met(figure), "<=")
    ahead = _target(figure.ahead, ahead_met(figure), ">=")
    return figure.name, figure.workload, ours, floors, target, "\n".join(peers), ahead


def with_unit(value: float, unit: str) -> str:
    """A number in three digits with a prefix of its unit.

    Example:
      >>> from benchmarks.speed.results import with_unit
      >>> with_unit(0.0123, "s"), with_unit(4.5e9, "B"), with_unit(0.0, "s")
      ('12.3 ms', '4.5 GB', '0 s')
    """
    power = 0 if value == 0 else min(3, max(-3, math.floor(math.log10(abs(value)) / 3)))
    prefix = {-3: "n", -2: "u", -1: "m", 0: "", 1: "k", 2: "M", 3: "G"}[power]
    return f"{value / 1000**power:.3g} {prefix}{unit}"


def _spread(ratio: dict[str, Any]) -> str:
    low, high = ratio["quartiles"]
    return f"{ratio['median']:.3g} ({low:.3g}-{high:.3g})"


def _target(value: float | None, met: bool | None, sign: str) -> str:
    return "" if met is None else f"{sign} {value:g} {'met' if met else 'MISSED'}"
