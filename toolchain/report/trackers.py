"""A gate's numbers for services that draw them over time. They are for charts; the gate never reads them back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from toolchain.gate import GateResult
from toolchain.gate.metrics import METRICS
from toolchain.gate.starts import COSTS
from toolchain.measure.samples import B

NS_PER_MS = 1e6


@dataclass(frozen=True)
class Point:
    """One measured value, smaller being better."""

    cell: str
    measure: str
    unit: str
    value: float
    lo: float | None = None
    hi: float | None = None
    extra: str = ""


def to_github_benchmark(result: GateResult) -> list[dict[str, str | float]]:
    """What github-action-benchmark reads as `customSmallerIsBetter`."""
    rows = []
    for point in points(result):
        row: dict[str, str | float] = {
            "name": f"{point.cell}: {point.measure}",
            "unit": point.unit,
            "value": point.value,
        }
        if point.lo is not None and point.hi is not None:
            row["range"] = f"{point.lo:.6g} … {point.hi:.6g}"
        rows.append({**row, "extra": point.extra})
    return rows


def to_bencher(result: GateResult) -> dict[str, dict[str, dict[str, float]]]:
    """Bencher Metric Format: cell → measure → value, with bounds where there are any.

    Bencher's own measures keep their units: `latency` is in nanoseconds, `file-size` in bytes.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    for point in points(result):
        scale = NS_PER_MS if point.measure == "latency" else 1
        metric = {"value": point.value * scale}
        if point.lo is not None and point.hi is not None:
            metric |= {"lower_value": point.lo * scale, "upper_value": point.hi * scale}
        name = "file-size" if point.measure == "size" else point.measure.replace(" ", "-")
        found.setdefault(point.cell, {})[name] = metric
    return found


def points(result: GateResult) -> Iterator[Point]:
    """Every number of every cell once: its size, what its checks counted or measured, its latency if it was timed."""
    for cell in result.cells:
        yield Point(cell.name, "size", "bytes", cell.artifact.size_bytes, extra=f"sha256 {cell.artifact.sha256}")
        amounts = {check.unit: check for check in cell.checks if check.unit != "ratio"}
        for unit in (*(each.unit for each in METRICS.values()), *(each.unit for each in COSTS.values())):
            check = amounts.get(unit)
            if unit != "bytes" and check is not None and check.value is not None:
                yield Point(cell.name, unit, unit, check.value, check.lo, check.hi, extra=check.reason)
        ratios = {check.name: check for check in cell.checks if check.unit == "ratio"}
        for first in cell.comparisons[:1]:
            workload = f"{cell.target}, batch {cell.batch}, threads {cell.threads}, {first.verdict}"
            time = amounts.get("ms")
            bounds = (None, None) if time is None else (time.lo, time.hi)
            yield Point(cell.name, "latency", "ms", first.latency_ms(B), *bounds, extra=workload)
        for name, check in ratios.items():
            if check.value is not None:
                measure = f"{name.partition('.')[2].replace('_', ' ')} ratio"
                yield Point(cell.name, measure, "ratio", check.value, check.lo, check.hi, extra=check.reason)
