"""Lists files that were not timed on a device of the recipe, with the reason."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from toolchain.artifacts.onnx_file import OnnxFile
from toolchain.devices.targets_toml import named_target
from toolchain.export.precision import product_of
from toolchain.pipeline.folder import Done
from toolchain.pipeline.stages.base import Run
from toolchain.pipeline.stages.bench import Bench, times_engines
from toolchain.report.record import BenchRow, EngineFacts, FileRow, NotMeasured
from toolchain.targets import get_target

LOST, REFUSED = "the device was lost", "the device cannot do it"


def not_measured(
    run: Run,
    cells: Iterable[tuple[Bench, Done[BenchRow] | None]],
    files: Sequence[FileRow],
    engines: Sequence[EngineFacts],
) -> tuple[NotMeasured, ...]:
    """Each device that lacks some time, with the files that it lacks one of; nothing where nothing was to be timed.

    Args:
        run: with its lost devices and refused comparisons.
        cells: every comparison that was to be made, and what it came to.
        files, engines: what could ship.
    """
    bench = run.job.recipe.bench
    if bench is None or not bench.targets:
        return ()
    lacking: dict[tuple[str, str], dict[tuple[str, str], None]] = {}  # (device, file) → (in a few words, whole) why not
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for cell, done in cells:
        name = cell.where.device.name
        refused = run.refused.get(cell.name)
        why = (LOST, str(run.lost.get(name))) if refused is None else (REFUSED, str(refused))
        if done is None:
            reasons[(name, *why)] = []
        for path in cell.pair:
            whys = lacking.setdefault((name, path.relative_to(run.root).as_posix()), {})
            if done is None:
                whys[why] = None
    reasons |= {(name, LOST, str(run.lost[name])): [] for name in bench.targets if name in run.lost}
    rows: list[FileRow | EngineFacts] = [*(row for row in files if row.refused is None), *engines]
    for row in rows:
        for name in _devices(row, bench.targets):
            known = lacking.get((name, row.path))
            for short, reason in [_why(row, name, bench.targets)] if known is None else known:
                reasons.setdefault((name, short, reason), []).append(row.path)
    return tuple(
        NotMeasured(target=name, short=short, reason=reason, files=tuple(paths))
        for (name, short, reason), paths in reasons.items()
    )


def _devices(row: FileRow | EngineFacts, asked: Sequence[str]) -> Iterator[str]:
    """Those of the recipe's that open files of this kind, for an engine at least the target that it is for."""
    runtimes = {name: named_target(name).runtime for name in asked}
    if isinstance(row, FileRow):
        yield from (name for name, runtime in runtimes.items() if OnnxFile.name in get_target(runtime).takes)
    else:
        yield from [name for name, runtime in runtimes.items() if runtime == row.target] or [row.target]


def _why(row: FileRow | EngineFacts, name: str, asked: Sequence[str]) -> tuple[str, str]:
    """(in a few words, whole) why a file was not to be timed on a device."""
    target = get_target(named_target(name).runtime)
    if isinstance(row, EngineFacts):
        if missing := target.probe().cannot_run or (
            "" if target.measures else "it only builds: nothing is timed on it"
        ):
            return missing.partition(":")[0], missing
        if name not in asked:
            return "not asked for", "bench.targets does not name it"
        if not times_engines(target.name):
            return "its ONNX file is timed", "it times the ONNX files that its engines are built from"
    if product_of(row.precision) not in target.loads:
        return f"takes no {row.precision}", f"it has no products of the type of {row.precision}"
    return "not asked for", f"export.precisions does not name {row.precision}"
