"""Suggests files to ship: the smallest, the fastest in each place and overall, and the faster kind of int8."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from toolchain.measure.comparison import UNDECIDED
from toolchain.report.record import (
    BenchRow,
    Counts,
    EngineRow,
    Fastest,
    FileRow,
    Int8Choice,
    Quickest,
    Shippable,
    Suggestion,
)
from toolchain.targets import is_target

PlaceKey = tuple[str, int, int]
ROUNDING = 1e-9
"""Slack for rounding when shares of images are compared with `accuracy_loss`."""


def suggestion(
    files: Sequence[FileRow],
    bench: Sequence[BenchRow],
    accuracy_loss: float,
    int8: Sequence[Int8Choice] = (),
    engines: Sequence[EngineRow] = (),
) -> Suggestion:
    """Which compressed file to take: the smallest, and in each place the fastest, as it was timed there.

    Args:
        files: those of the run.
        bench: comparisons with the dense file.
        accuracy_loss: how much less accurate than the compressed fp32 file a file may be, as a share of the images; of outputs
            without labels, how much larger their error may be. Where neither is known every file that passed parity is within it.
        int8: what `int8_choices` found; in each of its places the other kind of int8 is no candidate for the fastest.
        engines: those of the run; an engine that was not run and compared with its file is no candidate.
    """
    compressed = [row for row in files if row.model == "compressed" and row.refused is None]
    whole = next(row for row in compressed if row.precision == "fp32")

    def within(row: Shippable) -> bool:
        best, loss = loss_of(whole), loss_of(row)
        return best is None or loss is None or loss - best <= accuracy_loss + ROUNDING

    offered: list[Shippable] = [
        *compressed,
        *(row for row in engines if row.ran and row.model == "compressed"),
    ]
    good = [row for row in offered if within(row)]
    left_out = [row.path for row in offered if not within(row)]
    timed = [row for row in bench if row.path not in left_out and row.verdict not in UNDECIDED]
    chosen = {row.place: row.chosen for row in int8}
    candidates = [row for row in timed if not _lost(row, timed, chosen.get(row.place))]
    fastest = []
    for place in dict.fromkeys(row.place for row in bench):
        there = [row for row in candidates if row.place == place]
        if there:
            best = min(there, key=lambda row: row.ratio.point)
            fastest.append(Fastest(**_where(best.place), path=best.path, ratio=best.ratio))
    return Suggestion(
        accuracy_loss=accuracy_loss,
        smallest=min(good, key=lambda row: row.bytes or 0).path,
        fastest=tuple(fastest),
        quickest=tuple(_quickest(candidates)),
        left_out=tuple(left_out),
    )


def _lost(row: BenchRow, timed: Sequence[BenchRow], chosen: str | None) -> bool:
    """Whether a file is of the kind of int8 that lost its place to the chosen one, which is a candidate there."""
    kinds = {each.precision for each in timed if each.place == row.place} & set(_int8_kinds())
    return chosen in kinds and row.precision in kinds - {chosen}


def _int8_kinds() -> tuple[str, ...]:
    """What precisions are int8; the converters are loaded when that is asked, and not to read a report."""
    from toolchain.export.precision import int8_kinds

    return int8_kinds()


def _where(place: PlaceKey) -> dict[str, Any]:
    """The fields of a `Place`."""
    return dict(zip(("target", "batch", "threads"), place, strict=True))


def _quickest(bench: Sequence[BenchRow]) -> Iterator[Quickest]:
    """On this machine, where several of its runtimes were timed at one batch and number of threads, the least time."""
    alike: dict[tuple[str, int, int], list[BenchRow]] = {}
    for row in bench:
        if is_target(row.target):  # devices of targets.toml may be others, or other cores of this one
            alike.setdefault((str(row.environment["cpu"]), row.batch, row.threads), []).append(row)
    for (machine, *_), rows in alike.items():
        if len({row.target for row in rows}) > 1:
            best = min(rows, key=lambda row: row.compressed_ms)
            yield Quickest(**_where(best.place), machine=machine, path=best.path, ms=best.compressed_ms)


def loss_of(row: Counts) -> float | None:
    """What a form of the model loses: the share of images that it is wrong about, by classes or by the neighbours of its features.

    Without labels it is the share of the dense outputs' variance by which its own are off.
    """
    if row.features is not None:
        knn = row.features.knn
        return row.features.error if knn is None else 1 - knn.right / knn.total
    return row.error if row.total is None or row.wrong is None else row.wrong / row.total


def int8_choices(duels: Sequence[BenchRow], bench: Sequence[BenchRow]) -> tuple[Int8Choice, ...]:
    """In each place the faster of the two fastest kinds of int8, by a comparison of their own; none where fp32 is faster than it.

    Args:
        duels: comparisons of one kind of int8 with another.
        bench: comparisons with the dense file.

    Returns:
        One choice for each duel, and one without a ratio where there is one kind of int8 alone.
    """
    lone = [
        _lone(place, shares, kinds[0])
        for place in dict.fromkeys(row.place for row in bench)
        if len(kinds := [name for name in _int8_kinds() if name in (shares := _shares(bench, place))]) == 1
        and "fp32" in shares
        and all(duel.place != place for duel in duels)
    ]
    return (*lone, *(_duelled(duel, _shares(bench, duel.place)) for duel in duels))


def _shares(bench: Sequence[BenchRow], place: PlaceKey) -> dict[str, float]:
    """Precision → its share of the dense file's time, of the valid comparisons in a place."""
    return {row.precision: row.ratio.point for row in bench if row.place == place and row.verdict != "invalid"}


def _lone(place: PlaceKey, shares: dict[str, float], kind: str) -> Int8Choice:
    slower = shares[kind] >= shares["fp32"]
    chosen = None if slower else kind
    return Int8Choice(**_where(place), chosen=chosen, ratio=None, verified=False, slower_than_fp32=slower)


def _duelled(duel: BenchRow, shares: dict[str, float]) -> Int8Choice:
    ratio, control = duel.ratio, duel.control
    noise = max(abs(control.lo - 1), abs(control.hi - 1))  # what the control sees where there is nothing to see
    assert duel.rivals is not None
    faster = duel.rivals[ratio.point < 1]
    loses = shares[faster] >= shares["fp32"] if {faster, "fp32"} <= set(shares) else None
    return Int8Choice(
        **_where(duel.place),
        chosen=faster if loses is False else None,
        rivals=duel.rivals,
        ratio=ratio,
        verified=duel.verdict != "invalid" and not ratio.lo - noise <= 1 <= ratio.hi + noise,
        slower_than_fp32=loses,
    )
