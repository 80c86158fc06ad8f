"""inspect: what a file or folder is, and what is in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from toolchain.cli.options import JsonFlag
from toolchain.cli.screen import print_facts, print_json
from toolchain.errors import ArtifactError, StorageError, fault_words
from toolchain.files import read_json


def register(app: typer.Typer) -> None:
    """Adds the verb of this file."""
    app.command()(inspect)


def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            help="A model folder, plan.json, engine.json, an ONNX file, a checkpoint, a Hugging Face folder or a run's folder."
        ),
    ],
    json_: JsonFlag = False,
) -> None:
    """What a file or folder is, and what is in it."""
    facts = _inspect(path)
    print_json(facts) if json_ else print_facts(facts)


def _inspect(path: Path) -> Mapping[str, object]:
    from toolchain.artifacts import PlainFile, open_artifact
    from toolchain.artifacts.model_folder import ModelFolder
    from toolchain.plan import CompressionPlan
    from toolchain.report.absent import PRIVATE, require_run, runs_below

    if (path / "report.json").is_file():
        from toolchain.report.record import Report

        keys = ("tool", "synthetic", "model", "output", "dense", "compressed", "ratio", "relative_error_increase")
        return {"kind": "run", **Report.load(path).model_dump(mode="json", include=set(keys))}
    if (path / "config.json").is_file():
        from toolchain.surgery.hub import described_facts

        if facts := described_facts(path):
            return facts
    if not (path / "model.json").is_file() and (runs_below(path) or (path / PRIVATE).is_dir()):
        require_run(path)
    artifact = open_artifact(path)
    if isinstance(artifact, ModelFolder) and path.is_file():
        return _checkpoint_facts(path)
    if not isinstance(artifact, PlainFile):
        return artifact.facts()
    if path.is_dir():
        from toolchain.artifacts.engine import RECORD

        path = path / RECORD if (path / RECORD).is_file() else path
    if not path.is_file():
        raise StorageError(f"{path} is neither a file, nor a folder of a model, an engine or a run; give one of them")
    if path.suffix != ".json":
        _require_no_text(path)
        return _checkpoint_facts(path)
    found = read_json(path)
    kind = str(found.get("schema", "")) if isinstance(found, dict) else ""
    if kind.startswith("slimvit.plan/"):
        plan = CompressionPlan.load(path)
        return {"kind": "plan", "sha256": plan.digest, "summary": plan.summary(), **plan.provenance}
    if not kind.startswith("slimvit."):
        raise ArtifactError(
            f"{path} is JSON that names no schema of slimvit's; give a plan, a report, or what `bench` or `gate` wrote"
        )
    return {
        "kind": kind.split(".")[1].split("/")[0],
        **{k: v for k, v in found.items() if k not in ("raw", "raw_sha256", "schema")},
    }


def _require_no_text(path: Path) -> None:
    """Raises ArtifactError for a file that no weights can be in: an empty one, or one that is read as text."""
    try:
        with path.open("rb") as file:
            start = file.read(4096)
        start[: max(1, len(start) - 3)].decode("utf-8")  # a character may be cut in two at the end
    except OSError as error:
        raise StorageError(f"cannot read {path}: {fault_words(error)}") from error
    except UnicodeDecodeError:
        return
    if not start:
        raise ArtifactError(f"{path} holds not one byte; give a file that was written to its end")
    if b"\0" not in start:
        raise ArtifactError(
            f"{path} is text, and holds no model; a recipe is read by `slimvit plan`, a gate by `slimvit gate --config`"
        )


def _checkpoint_facts(path: Path) -> Mapping[str, object]:
    """Those of weights; torch, which reads them, is loaded for nothing else."""
    from toolchain.surgery.checkpoint import checkpoint_facts

    return checkpoint_facts(path)
