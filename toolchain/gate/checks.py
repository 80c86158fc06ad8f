"""The checks that need no clock: size, parameters and nodes, exactly; accuracy by counts; parity on the same images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from toolchain.artifacts import Artifact, open_artifact
from toolchain.errors import RecipeError
from toolchain.export.accuracy import accuracy_of
from toolchain.export.agreement import parity_of
from toolchain.gate.accepts import Accepts
from toolchain.gate.config import Cell, DataSection
from toolchain.gate.limits import limit_of
from toolchain.gate.result import Check, Status, Unit

EXACT: dict[str, tuple[Unit, Callable[[Artifact], int]]] = {
    "size": ("bytes", lambda artifact: artifact.size_bytes),
    "params": ("parameters", lambda artifact: artifact.params),
    "nodes": ("nodes", lambda artifact: artifact.nodes),
}


class Deterministic:
    """Judges cells by everything but time; what was read or evaluated once is kept."""

    def __init__(self, data: DataSection, accepts: Accepts) -> None:
        self._data, self._accepts = data, accepts
        self._counted: dict[tuple[Path, tuple[int, ...] | None], tuple[int, int, tuple[str, ...]]] = {}

    def checks(self, cell: Cell, artifact: Path, baseline: Path | None) -> list[Check]:
        """The checks of one cell, in the order of its budget and relation.

        Raises:
            RecipeError: a check does not suit the artifact or the data.
            StorageError: the artifact cannot be read.
            ArtifactError: it is damaged, or accuracy or parity is asked of a file that slimvit did not export.
        """
        found = []
        ours, theirs = open_artifact(artifact), None if baseline is None else open_artifact(baseline)
        for metric, (unit, count) in EXACT.items():
            if (limit := getattr(cell.budget, metric)) is not None:
                found.append(self._bounded(cell, f"budget.{metric}", unit, count(ours), limit))
            if (share := getattr(cell.relation, metric)) is not None and theirs is not None:
                found.append(self._bounded(cell, f"relation.{metric}", unit, count(ours), share, count(theirs)))
        if cell.budget.accuracy is not None:
            wrong, total, notes = self._counts(cell, artifact)
            check = self._bounded(cell, "budget.accuracy", "wrong images", wrong, cell.budget.accuracy, None, total)
            found.append(_noted(check, notes))
        if cell.relation.accuracy is not None and baseline is not None:
            (wrong, total, notes), (before, images, others) = (
                self._counts(cell, each) for each in (artifact, baseline)
            )
            if total != images:
                raise RecipeError(f"cell {cell.name!r}: {total} images for the artifact, {images} for its baseline")
            asked = cell.relation.accuracy
            check = self._bounded(cell, "relation.accuracy", "wrong images", wrong, asked, before, total)
            found.append(_noted(check, tuple(dict.fromkeys((*notes, *others)))))
        if cell.relation.parity is not None and baseline is not None:
            found.append(self._parity(cell, artifact, baseline))
        return found

    def _counts(self, cell: Cell, path: Path) -> tuple[int, int, tuple[str, ...]]:
        """(wrong, total, what was assumed) of an artifact on the gate's images."""
        data, shape = self._data, cell.input_shape
        if (path, shape) not in self._counted:
            evaluation = accuracy_of(
                path, data.source, data.split, classes=data.classes, asked=data.preparation, input_shape=shape
            )
            self._counted[path, shape] = (evaluation.accuracy.wrong, evaluation.accuracy.total, evaluation.notes)
        return self._counted[path, shape]

    def _parity(self, cell: Cell, artifact: Path, baseline: Path) -> Check:
        assert cell.relation.parity is not None
        bounds = cell.relation.parity
        data, shape = self._data, cell.input_shape
        agreement = parity_of(
            baseline, artifact, data.source, bounds.tolerance, asked=data.preparation, input_shape=shape
        )
        rung = agreement.rung
        shown = "" if rung.max_abs is None else f"max |Δ| {rung.max_abs:.2g}, cosine ≥ {rung.cosine_min:.6f}"
        top1 = "" if rung.top1_agreement is None else f", top-1 agreement {rung.top1_agreement:.4f}"
        check = Check(
            name="relation.parity",
            status="pass" if rung.verdict == "pass" else "fail",
            unit="cosine",
            value=rung.cosine_min,
            limit=bounds.cosine_min,
            asked=bounds.cosine_min,
            reason="; ".join(filter(None, [rung.reason, f"{shown}{top1}"])),
        )
        return _noted(check, agreement.notes)

    def _bounded(
        self,
        cell: Cell,
        name: str,
        unit: Unit,
        value: int,
        asked: float,
        baseline: int | None = None,
        total: int | None = None,
    ) -> Check:
        """The check of a whole number that may be at most what is asked for, or what was accepted."""
        limit = limit_of(name, asked, baseline=baseline, total=total)
        accepted = self._accepts.limit(cell.name, name)
        held = value <= limit
        covered = not held and accepted is not None and value <= accepted
        if not held and accepted is not None:
            self._accepts.note(cell.name, name, "used" if covered else "exceeded")
        of = "" if total is None else f" of {total:,}"
        against = "" if baseline is None else f", {_change(value - baseline, baseline)} the baseline's {baseline:,}"
        said = f"{value:,} {unit}{of}{against}; at most {limit:,}"
        if accepted is not None and not held:
            said += f"; accepted up to {accepted:,}"
        status: Status = "pass" if held else "accepted" if covered else "fail"
        return Check(
            name=name,
            status=status,
            unit=unit,
            value=value,
            limit=limit,
            asked=asked,
            baseline=baseline,
            total=total,
            reason=said,
        )


def _noted(check: Check, notes: tuple[str, ...]) -> Check:
    """The check, its reason followed by what was assumed."""
    return check.model_copy(update={"reason": ". ".join(filter(None, [check.reason, " ".join(notes)]))})


def _change(change: int, before: int) -> str:
    if change == 0:
        return "equal to"
    share = f" ({100 * change / before:+.2f} %)" if before else ""
    return f"{change:+,}{share} on"
