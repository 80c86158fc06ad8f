"""inspect, models, doctor, report, manifest, schema, init: they read, and change nothing but what is named."""

from __future__ import annotations

import fnmatch
import logging
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

import psutil
import timm
import torch
import typer
from pydantic import BaseModel

from toolchain.artifacts.onnx_file import read_onnx
from toolchain.artifacts.size import artifact_sha256, artifact_size_bytes
from toolchain.cli.options import JsonFlag
from toolchain.cli.screen import line, print_facts, print_json, print_report, print_tables
from toolchain.cost import trace
from toolchain.errors import ArtifactError, RecipeError, SlimvitError, StorageError, TargetUnavailable
from toolchain.export.precision import precision_of
from toolchain.families import FAMILIES, family_of
from toolchain.files import read_json, sha256, write_text
from toolchain.gate import GateConfig, GateFile
from toolchain.pipeline.job import tool
from toolchain.plan import CompressionPlan, ModelRef
from toolchain.recipe import Recipe
from toolchain.report.assemble import SCHEMA as REPORT_SCHEMA
from toolchain.report.files import render
from toolchain.report.tables import Table, number
from toolchain.surgery.checkpoint import checkpoint_facts
from toolchain.surgery.replay import create_dense, load_model
from toolchain.targets import TARGETS

log = logging.getLogger(__name__)
PACKAGES = (
    "torch",
    "timm",
    "onnx",
    "onnxruntime",
    "onnxsim",
    "onnxscript",
    "accelerate",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "openvino",
)
ENGINES = (".engine", ".xml")
CLASSES = 1000
"""Of a model that has no classifier of its own, to see what else it is."""
SCHEMAS: dict[str, type[BaseModel]] = {
    "recipe": Recipe,
    "plan": CompressionPlan,
    "gate": GateConfig,
    "gate-result": GateFile,
}
TEMPLATE = """[model]
name = "deit_small_patch16_224"

[data]
source = "imagefolder:path/to/images"   # digits | fashion-mnist | imagefolder:PATH | images:PATH | hf:NAME | none

[compress]
method = "joint"                        # joint (no labels, no training) | hybrid | vtp | none

[budget]
params = 0.5                            # the share that is LEFT

[bench]
targets = ["ort-cpu"]
"""
manifest = typer.Typer(help="Check the files of a run against its manifest.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Adds the verbs of this file."""
    for verb in (inspect, models, doctor, report, schema, init):
        app.command()(verb)
    manifest.command("verify")(manifest_verify)
    manifest.callback()(lambda: None)
    app.add_typer(manifest, name="manifest")


def inspect(
    path: Annotated[
        Path,
        typer.Argument(help="A model folder, plan.json, engine.json, an ONNX file, a checkpoint or a run's folder."),
    ],
    json_: JsonFlag = False,
) -> None:
    """What a file or folder is, and what is in it."""
    facts = _inspect(path)
    print_json(facts) if json_ else print_facts(facts)


def _inspect(path: Path) -> dict[str, Any]:
    if (path / "model.json").is_file():
        return _inspect_model(path)
    if (path / "report.json").is_file():
        found = _read_report(path)
        keys = ("tool", "synthetic", "model", "dense", "compressed", "ratio", "relative_error_increase")
        return {"kind": "run", **{key: found[key] for key in keys}}
    if path.suffix == ".onnx":
        return _inspect_onnx(path)
    if not path.is_file():
        raise StorageError(f"{path} is neither a file, nor a model folder, nor a run's folder")
    if path.suffix in ENGINES:
        raise ArtifactError(f"{path} is described by the engine.json beside it")
    if path.suffix != ".json":
        return checkpoint_facts(path)
    found = read_json(path)
    kind = found.get("schema", "") if isinstance(found, dict) else ""
    if kind.startswith("slimvit.plan/"):
        plan = CompressionPlan.load(path)
        return {"kind": "plan", "sha256": plan.digest, "summary": plan.summary(), **plan.provenance}
    if not kind.startswith("slimvit."):
        raise ArtifactError(f"{path} was not written by slimvit: schema {kind!r}")
    return {
        "kind": kind.split(".")[1].split("/")[0],
        **{k: v for k, v in found.items() if k not in ("raw", "raw_sha256", "schema")},
    }


def _inspect_model(path: Path) -> dict[str, Any]:
    model = load_model(path)
    shape = trace(model.module, model.family, model.preprocess.input_size)
    record = read_json(path / "model.json")
    facts: dict[str, Any] = {"kind": f"{model.stage} model", "model": model.ref.name, "kwargs": model.ref.kwargs}
    facts |= {"params": shape.params, "macs": shape.macs, "input_size": list(model.preprocess.input_size)}
    facts["provenance"] = dict(model.provenance)
    facts["limits"] = model.family.limits(create_dense(model.ref))
    facts["structure"] = record["structure"]
    if record["plan"] is not None:
        facts["plan"] = CompressionPlan.from_dict(record["plan"]).summary()
    return facts


def _inspect_onnx(path: Path) -> dict[str, Any]:
    model = read_onnx(path)
    census: dict[str, int] = {}
    for node in model.graph.node:
        census[node.op_type] = census.get(node.op_type, 0) + 1

    def signature(values: Any) -> dict[str, list[Any]]:
        return {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}

    return {
        "kind": "onnx",
        "bytes": artifact_size_bytes(path),
        "sha256": artifact_sha256(path),
        "precision": str(precision_of(path)),
        "opset": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "inputs": signature(model.graph.input),
        "outputs": signature(model.graph.output),
        "nodes": dict(sorted(census.items(), key=lambda item: -item[1])),
        "metadata": {entry.key: entry.value for entry in model.metadata_props},
    }


def models(
    pattern: Annotated[str, typer.Argument(help="Wildcard over timm's names, e.g. 'deit*'.")] = "*",
    json_: JsonFlag = False,
) -> None:
    """Which timm models are supported: full, partial (with the limit), or refused (with the reason)."""
    names = [name for name in timm.list_models() if fnmatch.fnmatchcase(name, pattern)]
    if not names:
        raise RecipeError(f"no timm model matches {pattern!r}; try 'deit*' or '*vit*'")
    rows = [_support(name) for name in names]
    if json_:
        print_json(rows)
        return
    rows = [row for row in rows if row["params"] is not None] or rows
    cells = tuple((r["name"], r["support"], number(r["params"]), r["reason"]) for r in rows)
    print_tables([Table("timm models", ("name", "support", "parameters", "reason"), cells, text=(0, 1, 3))])
    if len(rows) < len(names):
        line(f"{len(names) - len(rows)} more belong to no supported family; --json lists them.")


def _support(name: str) -> dict[str, Any]:
    home = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
    row: dict[str, Any] = {"name": name, "module": home, "support": "refused", "reason": "", "params": None}
    if not any(home in family.timm_modules for family in FAMILIES):
        return {**row, "reason": f"timm's {home} is no supported family"}
    try:
        with torch.device("meta"):
            module = create_dense(ModelRef(name=name))
            if headless := not module.num_classes:
                module = create_dense(ModelRef(name=name, kwargs={"num_classes": CLASSES}))
        row["params"] = sum(p.numel() for p in module.parameters())
        limits = family_of(module, name).limits(module)
    except SlimvitError as error:
        return {**row, "reason": str(error).partition(": ")[2].removesuffix(" See `slimvit models` for what is.")}
    reasons = [
        *limits,
        *(
            ["its pretrained weights have no classifier: it needs a model.checkpoint with one, or [train]"]
            if headless
            else []
        ),
    ]
    return {**row, "support": "partial" if limits else "full", "reason": "; ".join(reasons)}


def doctor(json_: JsonFlag = False) -> None:
    """What a bug report needs: versions, machine, targets."""
    facts: dict[str, Any] = {"slimvit": tool(), "python": platform.python_version(), "system": platform.platform()}
    for name in PACKAGES:
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = "not installed"
    memory = psutil.virtual_memory()
    facts |= {"cores": psutil.cpu_count(logical=False), "threads": torch.get_num_threads()}
    facts |= {
        "memory": f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free",
        "cuda": torch.cuda.is_available(),
    }
    for name, target in TARGETS.items():
        try:
            details = "; ".join(f"{key}: {value}" for key, value in target.probe().details.items())
            facts[f"target {name}"] = details or "ready"
        except TargetUnavailable as error:
            facts[f"target {name}"] = f"unavailable: {error.reason}"
    print_json(facts) if json_ else print_facts(facts)


def report(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run's folder.")], json_: JsonFlag = False
) -> None:
    """Print a run's report again, and rewrite report.md and report.html from report.json."""
    found = _read_report(folder)
    try:
        render(found, folder)
    except StorageError as error:  # an archive may be read-only; what was asked for is to see it
        log.warning("%s", error)
    print_json(found) if json_ else print_report(found, folder)


def _read_report(folder: Path) -> dict[str, Any]:
    found = read_json(folder / "report.json")
    if not isinstance(found, dict) or found.get("schema") != REPORT_SCHEMA:
        raise ArtifactError(f"{folder / 'report.json'} is not a {REPORT_SCHEMA} report")
    return found


def manifest_verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A run's folder.")], json_: JsonFlag = False
) -> None:
    """Whether every file of a run is the one that its manifest lists; exit 3 if not."""
    record = read_json(folder / "manifest.json")
    if not isinstance(record, dict) or not str(record.get("schema", "")).startswith("slimvit.manifest/"):
        raise ArtifactError(f"{folder / 'manifest.json'} is not a manifest that slimvit wrote")
    listed = record["files"]
    wrong = [
        entry["path"]
        for entry in listed
        if not (folder / entry["path"]).is_file() or sha256(folder / entry["path"]) != entry["sha256"]
    ]
    if json_:
        print_json({"files": len(listed), "wrong": wrong})
    if wrong:
        raise ArtifactError(f"{len(wrong)} of {len(listed)} files are missing or altered: {', '.join(wrong[:5])}")
    if not json_:
        line(f"{len(listed)} files, all as listed")


def schema(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(SCHEMAS)}.")],
    json_: JsonFlag = False,  # noqa: ARG001 - every verb takes it; here there is nothing else to print
) -> None:
    """Print a JSON schema."""
    if name not in SCHEMAS:
        raise RecipeError(f"unknown schema {name!r}; known: {', '.join(SCHEMAS)}")
    print_json(SCHEMAS[name].model_json_schema())


def init(
    path: Annotated[Path, typer.Argument(help="The recipe to write.")] = Path("recipe.toml"), json_: JsonFlag = False
) -> None:
    """Write a recipe to start from; an existing file is left alone."""
    if path.exists():
        raise StorageError(f"{path} exists; choose another name")
    write_text(path, TEMPLATE)
    print_json({"path": str(path)}) if json_ else line(f"wrote {path}")
