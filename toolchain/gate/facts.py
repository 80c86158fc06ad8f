"""The static facts of a gate: sizes and counts, wrong answers, and agreement of outputs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np

from toolchain.artifacts import Artifact, open_artifact
from toolchain.errors import ArtifactError, OutputsUnfit, RecipeError, StorageError, TargetUnavailable
from toolchain.export.accuracy import Evaluation, accuracy_of, features_of
from toolchain.export.agreement import parity_of
from toolchain.export.preparation import Preparation
from toolchain.files import files_below, read_json, sha256
from toolchain.gate.config import Cell, GateConfig
from toolchain.gate.evidence import Evidence, Facts
from toolchain.gate.metrics import METRICS
from toolchain.gate.why import size_changes
from toolchain.measure.experiment import artifact_facts

LFS = b"version https://git-lfs."
"""First bytes of the pointer that stands for a file until Git LFS has fetched it."""
Accuracy = Callable[[Path, tuple[int, ...] | None], Evaluation]
"""(artifact, shape of a sample) → its accuracy."""


def look(config: GateConfig, *, why: bool) -> list[Evidence]:
    """The evidence of every cell that needs no timing; what several cells ask of one artifact is evaluated once.

    Args:
        config: the gate, its paths absolute.
        why: also attribute the size of every artifact, or its change, to layers.

    Raises:
        RecipeError: a check does not suit the data, or an artifact takes no images; what its outputs do not suit is `unjudged`.
        StorageError: an artifact cannot be read.
        ArtifactError: it is empty or damaged, or accuracy or parity is asked of a file that does not say how images are prepared.
    """
    data = config.data

    @cache
    def accuracy(path: Path, shape: tuple[int, ...] | None) -> Evaluation:
        return accuracy_of(
            path, data.source, data.split, classes=data.classes, asked=data.preparation, input_shape=shape
        )

    return [_look(config, cell, accuracy, why=why) for cell in config.cell]


def _look(config: GateConfig, cell: Cell, accuracy: Accuracy, *, why: bool) -> Evidence:
    artifact, baseline = config.paths(cell)
    split = config.data.split
    facts, unfit = _facts(cell, artifact, accuracy, ("budget", "relation"), split)
    reference, unfit_reference = (
        (None, "") if baseline is None else _facts(cell, baseline, accuracy, ("relation",), split)
    )
    reasons = {"budget.accuracy": unfit, "relation.accuracy": unfit or unfit_reference}
    unjudged = {name: reason for name, reason in reasons.items() if reason and name in cell.checks}
    counted = cell.relation.accuracy is not None and "relation.accuracy" not in unjudged
    if counted and reference is not None and facts.images != reference.images:
        raise RecipeError(
            f"cell {cell.name!r}: {facts.images} images for the artifact, {reference.images} for its baseline"
        )
    built = bool(cell.baseline) and config.baseline[cell.baseline].built
    agreement, bounds = None, cell.relation.parity
    otherwise: tuple[str, ...] = ()
    if bounds is not None and baseline is not None:
        data = config.data
        agreement = parity_of(
            baseline, artifact, data.source, bounds.tolerance, asked=data.preparation, input_shape=cell.input_shape
        )
        otherwise, untold = prepared_otherwise(open_artifact(artifact), open_artifact(baseline), data.preparation)
        agreement = replace(agreement, notes=(*agreement.notes, *untold))
    features, data = None, config.data
    if cell.relation.features is not None and baseline is not None:
        asked, shape = data.preparation, cell.input_shape
        try:
            features = features_of(
                artifact, data.source, data.split, reference=baseline, asked=asked, input_shape=shape, neighbours=False
            )
        except OutputsUnfit as error:
            unjudged["relation.features"] = str(error)
    settings = config.settings(cell)
    resolved = {"threads": cell.threads or settings.threads, "affinity": cell.affinity or settings.affinity}
    return Evidence(
        cell=cell.model_copy(update={"artifact": artifact.name, **resolved}),
        artifact=facts,
        baseline=reference,
        built=built,
        agreement=agreement,
        prepared_otherwise=otherwise,
        features=features,
        unjudged=unjudged,
        changes=size_changes(open_artifact(artifact), None if baseline is None else open_artifact(baseline))
        if why
        else None,
    )


def _facts(cell: Cell, path: Path, accuracy: Accuracy, kinds: tuple[str, ...], split: str) -> tuple[Facts, str]:
    """(what the budgets, or the relations alone, of a cell need of an artifact, why its outputs have no accuracy)."""
    wanted = {name.partition(".")[2] for name in cell.checks if name.startswith(kinds)}
    opened = open_artifact(path)
    _require_whole(opened)
    file = artifact_facts(path)
    counts = {name: each.count(opened) for name, each in METRICS.items() if name in wanted and each.count is not None}
    if "accuracy" not in wanted:
        return Facts(file=file, counts=counts), ""
    try:
        judged = accuracy(path, cell.input_shape)
    except OutputsUnfit as error:
        return Facts(file=file, counts=counts), str(error)
    whole = Facts(
        file=file,
        counts={**counts, "accuracy": judged.accuracy.wrong},
        images=judged.accuracy.total,
        pictures=judged.pictures or None,
        pictures_of_run=pictures_of_run(path, judged.content, split),
        notes=judged.notes,
    )
    return whole, ""


def _require_whole(artifact: Artifact) -> None:
    """Raises ArtifactError for what is small because something of it is missing; it would be within every budget."""
    if not artifact.size_bytes:
        raise ArtifactError(
            f"{artifact.path} holds not one byte, so that its build wrote nothing; see why before the gate judges it"
        )
    for file in artifact.files:
        with file.open("rb") as stream:
            if stream.read(len(LFS)) == LFS:
                raise ArtifactError(
                    f"{file} is a pointer of Git LFS, not the file itself; fetch it with `git lfs pull`"
                )
    with suppress(TargetUnavailable):  # what reads a format may not be installed
        artifact.require_whole()


PREPARATION = ("mean", "std", "interpolation", "crop_pct", "crop_mode", "exif_orientation")
"""Keys of `Preprocess` that change what a picture becomes; [data] has them all."""
SAME = 1e-4
"""Numbers of two files that differ by less were rounded differently."""


def prepared_otherwise(
    artifact: Artifact, baseline: Artifact, asked: Preparation
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(keys in which two files declare another preparation of images, one sentence where only one of them declares some).

    Keys of [data] are left out: there it replaces what files declare. A file that declares none at all is prepared as the other.
    """
    ours, theirs = artifact.preprocess, baseline.preprocess
    if ours is None or theirs is None:
        return (), ()
    differing, untold = list[str](), list[str]()
    for name in PREPARATION:
        # Pictures that are not turned by their EXIF orientation leave no word in a file.
        sides = [getattr(each, name) or None for each in (ours, theirs)]
        if name not in asked.asked and sides[0] != sides[1]:
            if None in sides:
                untold.append(name)
            elif not _close(*sides):
                differing.append(name)
    notes = (
        [f"Only one of the files declares {', '.join(untold)}, which may change pictures; [data] can say it for both."]
        if untold
        else []
    )
    return tuple(differing), tuple(notes)


def _close(ours: object, theirs: object) -> bool:
    """Whether two values are numbers, one or one per channel, that differ by rounding alone."""
    try:
        return bool(np.allclose(ours, theirs, rtol=0, atol=SAME))  # type: ignore[arg-type]
    except (TypeError, ValueError):  # words, or other channels
        return False


def pictures_of_run(path: Path, content: str, split: str) -> str | None:
    """Which pictures are in a split by the report of the run that an artifact lies in and belongs to.

    Args:
        path: the artifact.
        content: what the split is one of; a run that read something else is not asked.
        split: its name.

    Returns:
        None where there is no such report, or it does not say.
    """
    for folder in (path.parent, path.parent.parent):
        try:
            report = read_json(folder / "report.json")
            listed = {entry["path"]: entry["sha256"] for entry in report["files"]}
            own = all(listed.get(file.relative_to(folder).as_posix()) == sha256(file) for file in files_below(path))
            data = report["data"]
            if own and content and data["content"] == content:
                return str(data["pictures"][split])
        except (StorageError, ArtifactError, KeyError, TypeError):
            continue
    return None
