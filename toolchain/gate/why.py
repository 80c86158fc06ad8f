"""Attributes a change of size to parts of the artifact; the changes sum to the difference exactly."""

from __future__ import annotations

from collections import Counter

from toolchain.artifacts import Artifact
from toolchain.artifacts.base import Part
from toolchain.gate.evidence import Change


def size_changes(after: Artifact, before: Artifact | None) -> tuple[Change, ...]:
    """The parts whose size changed, largest change first; their changes sum to the difference in bytes, exactly.

    Args:
        after: the artifact.
        before: its baseline; None lists all parts of the artifact, each as new.
    """
    new, old = after.parts, Counter[Part]() if before is None else before.parts
    changes = [
        Change(layer=layer, part=part, before=old[layer, part], after=new[layer, part])
        for layer, part in {**new, **old}
        if old[layer, part] != new[layer, part]
    ]
    return tuple(sorted(changes, key=lambda row: (-abs(row.change), row.layer, row.part)))


def by_layer(changes: tuple[Change, ...]) -> tuple[Change, ...]:
    """The same changes, one row for each layer, largest first."""
    before, after = Counter[str](), Counter[str]()
    for row in changes:
        before[row.layer] += row.before
        after[row.layer] += row.after
    rows = [Change(layer=layer, part="", before=before[layer], after=after[layer]) for layer in {**before, **after}]
    return tuple(sorted(rows, key=lambda row: (-abs(row.change), row.layer)))
