"""The conditions of a latency measurement, its row in the report, and the check of a required speedup."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from toolchain.devices.targets_toml import LocalSettings, named_target
from toolchain.errors import MeasurementError, Slowdown
from toolchain.measure.comparison import UNDECIDED, Comparison
from toolchain.measure.samples import A, B
from toolchain.on_device.runner import fingerprint
from toolchain.report.record import BenchRow, Calls, Interval, Place, Report
from toolchain.targets import get_target


def runtime(target: str) -> list[str]:
    """The runtime and device of a target as they are now; what another one built or measured does not hold for it."""
    info = get_target(target).probe()
    return [info.runtime, info.version, info.device]


def builder(target: str) -> list[Any]:
    """The runtime of a target and the details of its probe, such as its converter: what a built file depends on."""
    info = get_target(target).probe()
    return [info.runtime, info.version, info.device, dict(info.details)]


def conditions(target: str, threads: int) -> list[Any]:
    """What latency depends on besides the files: runtime, device, and the machine without what this process loaded."""
    machine = {name: fact for name, fact in fingerprint(threads)["machine"].items() if name != "runtimes"}
    return [runtime(target), machine]


def conditions_of(name: str, threads: int) -> list[Any]:
    """The same for a target that targets.toml may name; of one elsewhere, how it is reached.

    What runs there is in the result's fingerprint: a board that is off must not undo what was measured on it.
    """
    settings = named_target(name)
    if isinstance(settings, LocalSettings):
        return [*conditions(settings.runtime, threads), settings.affinity]
    return [settings.model_dump(mode="json")]


def bench_row(
    target: str, precision: str, pair: tuple[str, str], comparison: Comparison, rivals: tuple[str, str] | None = None
) -> BenchRow:
    """What the report keeps of a comparison.

    Args:
        target: name of the device.
        precision: of what was timed as B.
        pair: paths of A and B, below the run's folder.
        comparison: with the raw samples.
        rivals: the precisions of a duel.
    """
    return BenchRow(
        target=target,
        batch=comparison.scenario.batch,
        threads=comparison.scenario.threads,
        precision=precision,
        baseline=pair[0],
        path=pair[1],
        dense_ms=comparison.latency_ms("A"),
        compressed_ms=comparison.latency_ms("B"),
        ratio=Interval(**comparison.ratio.to_ratio()),
        control=Interval(**comparison.control.to_ratio()),
        tau=comparison.design.tau,
        tau_min=comparison.tau_min,
        verified_speedup_at_least=comparison.verified_speedup_at_least,
        verdict=comparison.verdict,
        environment=comparison.environment,
        summary=comparison.headline,
        rivals=rivals,
        calls=(_calls(comparison, A), _calls(comparison, B)),
    )


def _calls(comparison: Comparison, variant: str) -> Calls:
    samples = [each for session in comparison.sessions for slot in session.slots_ns(variant) for each in slot]
    return Calls(**{f"p{share}": float(np.percentile(samples, share)) / 1e6 for share in (5, 25, 50, 75, 95)})


def require_speed(report: Report, precisions: Collection[str], least: float | None = None) -> None:
    """Holds the fastest of the files that were asked for against the dense one, in each place where they were timed.

    Args:
        report: of the run.
        precisions: of the files that the recipe asks for. Others are timed beside them, and nothing is required of those.
        least: the speedup that one of them has to have verified in each place; None where none is required.

    Raises:
        Slowdown: in some place the fastest of them is slower than the dense file by more than the tolerance.
        MeasurementError: a speedup is required and in some place none of them verified it.
    """
    if least is not None and not report.bench:
        raise MeasurementError(f"a speedup of {least:g} was required, but the recipe measures nothing; add [bench]")
    asked = [row for row in report.bench if row.precision in precisions]
    places = {row.place: [each for each in asked if each.place == row.place] for row in report.bench}
    for rows in places.values():
        fastest = min(rows, key=lambda row: row.ratio.point, default=None)
        if fastest is not None and fastest.verdict == "regressed":
            raise Slowdown(
                f"the compressed model is slower than the dense one: {fastest}: {fastest.summary}. Shrink it further, or take "
                f"{fastest.target} out of bench.targets where speed does not matter."
            )
    if least is None:
        return
    for (target, batch, threads), rows in places.items():
        place = Place(target=target, batch=batch, threads=threads)
        best = max(rows, key=lambda row: (row.verified_speedup_at_least or 0.0, -row.ratio.point), default=None)
        if best is None:
            raise MeasurementError(
                f"a speedup of {least:g} was required on {place}, where no file of export.precisions was timed; add a precision "
                f"that {target} runs, or take it out of bench.targets"
            )
        verified = best.verified_speedup_at_least
        if verified is None or verified < least:
            shown = "no speedup was verified" if verified is None else f"{verified:.2f} was verified"
            what = "measure again on a quieter machine" if best.verdict in UNDECIDED else "shrink it further"
            raise MeasurementError(
                f"a speedup of {least:g} was required on {place}; {shown} ({best.precision}: {best.verdict}). Ask for less, or {what}."
            )
