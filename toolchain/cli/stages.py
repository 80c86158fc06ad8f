"""load, compress, finetune, slice, split, export, engine, refit: one stage each, folder in, folder out."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from toolchain.cli import completion, outputs
from toolchain.cli.options import (
    FolderArgument,
    ImageColumnOption,
    JsonFlag,
    LabelColumnOption,
    OutOption,
    RecipeArgument,
    RecipeOption,
    SetOption,
    ShapeOption,
    numbers,
)
from toolchain.cli.screen import Screen, print_facts, print_json
from toolchain.errors import ArtifactError, RecipeError
from toolchain.export.precisions import PRECISIONS
from toolchain.files import (
    check_replaceable,
    write_json,
    write_text,
)
from toolchain.progress import SILENT, Progress
from toolchain.report.tables import finetune_line
from toolchain.version import tool

if TYPE_CHECKING:
    from toolchain.artifacts import Artifact
    from toolchain.model import AnyModel, MaskedModel, TimmModel
    from toolchain.parity import Rung
    from toolchain.pipeline.job import Start
    from toolchain.pipeline.stages.base import M
    from toolchain.targets import EngineBuild


def register(app: typer.Typer) -> None:
    """Adds the verbs of this file."""
    for verb in (load, compress, finetune, export, engine, refit):
        app.command()(verb)
    app.command("slice")(slice_)
    app.command()(split)


def load(recipe: RecipeArgument, out: OutOption, set_: SetOption = None, json_: JsonFlag = False) -> None:
    """Write the dense model of a recipe; trained, if the recipe asks for it."""
    from toolchain.model import MODEL_FILES
    from toolchain.pipeline.job import begin
    from toolchain.pipeline.stages.dense import trained
    from toolchain.recipe import Recipe
    from toolchain.training.processes import require_one

    require_one("load")
    check_replaceable(out, MODEL_FILES)
    start = begin(Recipe.load(recipe, set_ or ()))
    with Screen() as screen:
        screen.stage("load")
        _save(trained(start, progress=Progress(screen)), out, json_=json_)


def compress(
    folder: FolderArgument, recipe: RecipeOption, out: OutOption, set_: SetOption = None, json_: JsonFlag = False
) -> None:
    """Dense model folder → masked model folder with plan.json and allocation.json."""
    from toolchain.devices.device import Devices
    from toolchain.model import MODEL_FILES, TimmModel
    from toolchain.pipeline.job import prepare
    from toolchain.pipeline.latency_budget import latency_of
    from toolchain.pipeline.stages.compress import compress as compress_model
    from toolchain.pipeline.stages.latency import clocks
    from toolchain.pipeline.stages.rounding import rounded
    from toolchain.recipe import Recipe
    from toolchain.surgery.replay import save_model
    from toolchain.training.processes import require_one

    require_one("compress")
    check_replaceable(out, MODEL_FILES)
    job = prepare(Recipe.load(recipe, set_ or ()), fetch=False)
    dense = _open_for(job, folder, TimmModel)
    with Screen() as screen, Devices() as devices:
        screen.stage("compress")
        progress = Progress(screen)
        latency = latency_of(clocks(job, dense, devices, progress))
        compressed = compress_model(job, dense, latency, rounded(job, dense), progress=progress)
    masked, allocation = compressed.artifact, compressed.facts
    save_model(masked, out)
    write_json(out / "allocation.json", allocation.to_dict())
    write_text(out / "plan.json", masked.plan.to_json())
    _tell(masked, out, json_=json_)


def finetune(
    folder: FolderArgument,
    recipe: RecipeOption,
    out: OutOption,
    teacher: Annotated[
        Path | None, typer.Option("--teacher", help="Dense model folder; needed where finetune.distill is true.")
    ] = None,
    set_: SetOption = None,
    json_: JsonFlag = False,
) -> None:
    """Masked model folder → masked model folder, trained; what was removed stays removed. Also runs below torchrun."""
    from toolchain.model import MODEL_FILES, MaskedModel, TimmModel, run_stage
    from toolchain.pipeline.job import begin
    from toolchain.recipe import Recipe
    from toolchain.surgery.replay import save_model
    from toolchain.training.processes import together
    from toolchain.training.stages import Finetune, require_teacher

    check_replaceable(out, MODEL_FILES)
    job = begin(Recipe.load(recipe, set_ or ()), fetch=False)
    masked = _open_for(job, folder, MaskedModel)
    section = job.recipe.finetune
    if not section.epochs:
        raise RecipeError("finetune.epochs is 0: there is nothing to do; --set finetune.epochs=5")
    if section.distill and teacher is None:
        raise RecipeError(
            "finetune.distill is true: name the dense model with --teacher, or --set finetune.distill=false"
        )
    require_teacher(section, job.source, job.dense)
    parent = _open_for(job, teacher, TimmModel) if section.distill and teacher else job.dense
    if section.distill and teacher is not None:
        _require_origin(masked, parent, teacher)
    with together() as writes, Screen() if writes else nullcontext() as screen:
        progress = SILENT
        if screen is not None:
            screen.stage("finetune")
            progress = Progress(screen)
        stage = Finetune(section, job.source, parent, job.recipe.compress.seed, progress=progress)
        tuned = run_stage(stage, masked)
        model = tuned.artifact
        if writes:
            save_model(model, out)
    if writes:
        facts = tuned.facts.model_dump(mode="json") if json_ else finetune_line(tuned.facts, model.output)
        _tell(model, out, json_=json_, more={"finetune": facts})


def slice_(folder: FolderArgument, out: OutOption, json_: JsonFlag = False) -> None:
    """Masked model folder → sliced model folder: removed positions are physically gone."""
    from toolchain.model import MaskedModel, run_stage
    from toolchain.pipeline.stages.base import open_as
    from toolchain.surgery.slice import Slice

    _save(run_stage(Slice(), open_as(folder, MaskedModel)).artifact, out, json_=json_)


def split(folder: FolderArgument, out: OutOption, json_: JsonFlag = False) -> None:
    """Sliced model folder → deploy model folder: stock modules only, two linears per low-rank pair that pays."""
    from toolchain.model import SlicedModel, run_stage
    from toolchain.pipeline.stages.base import open_as
    from toolchain.surgery.split import Split

    _save(run_stage(Split(), open_as(folder, SlicedModel)).artifact, out, json_=json_)


def export(
    folder: FolderArgument,
    out: Annotated[
        Path,
        outputs.option("The .onnx file to write.", outputs.ONNX, ".onnx"),
    ],
    opset: Annotated[int, typer.Option(min=18, max=23)] = 20,
    no_simplify: Annotated[bool, typer.Option("--no-simplify", help="Keep the graph as torch exported it.")] = False,
    preprocess: Annotated[bool, typer.Option("--preprocess", help="Take uint8 pixels, and normalise them.")] = False,
    softmax: Annotated[bool, typer.Option("--softmax", help="Give probabilities too, as a second output.")] = False,
    precision: Annotated[
        str, typer.Option(help=f"fp32, {', '.join(PRECISIONS)}.", autocompletion=completion.precisions)
    ] = "fp32",
    data: Annotated[
        str,
        typer.Option(
            metavar="SOURCE",
            help="Images to calibrate and to compare on; seeded noise if absent.",
            autocompletion=completion.sources,
        ),
    ] = "none",
    image_column: ImageColumnOption = None,
    label_column: LabelColumnOption = None,
    json_: JsonFlag = False,
) -> None:
    """Dense or deploy model folder → ONNX file, read back and compared with the model at several batch sizes."""
    if "," in precision:
        names = [*map(str.strip, precision.split(","))]
        recipe = f"export.precisions={names}".replace("'", '"')
        raise RecipeError(
            f"--precision takes one, and one file is written; give --precision {names[0]} and export again for each other, or "
            f"have a whole run write all of them: slimvit shrink … --set '{recipe}'"
        )
    from toolchain.artifacts.onnx_file import FP32
    from toolchain.export.preparation import Preparation, source_for
    from toolchain.export.scratch import folder_beside
    from toolchain.export.stage import Export
    from toolchain.model import DeployModel, TimmModel, run_stage
    from toolchain.pipeline.judge import Judge
    from toolchain.recipe import ExportSection
    from toolchain.surgery.replay import load_model

    model = load_model(folder)
    if not isinstance(model, TimmModel | DeployModel):
        raise ArtifactError(f"{folder} holds a {model.stage} model; export takes a dense or a deploy model")
    columns = Preparation(image_column=image_column, label_column=label_column)
    judge = Judge(source_for(data, model.preprocess, asked=columns), model.output)
    calibrated = precision != FP32 and PRECISIONS.require(precision).calibrated
    if judge.source.synthetic and calibrated:
        raise RecipeError(
            f"{precision} is made for the images that it sees: name pictures with --data; noise would give another file"
        )
    section = ExportSection(opset=opset, simplify=not no_simplify, preprocess=preprocess, softmax=softmax)
    with nullcontext() if precision == FP32 else folder_beside(out) as scratch:  # /tmp may be small
        whole = out if scratch is None else scratch / f"{folder.name}.{FP32}.onnx"
        exported = run_stage(Export(section, whole, judge.images(), judge.names_classes, tool()), model)
        graph, rungs = exported.facts, list(exported.rungs)
        del model  # converting a large one takes the memory
        if precision != FP32:
            converted = run_stage(judge.convert(precision, out), exported.artifact)
            graph, rungs = converted.facts.graph, [*rungs, *converted.rungs]
    notes = [*dict.fromkeys((*exported.facts.notes, *graph.notes))]
    facts = {"file": str(out), "precision": precision, "bytes": graph.size_bytes, "notes": notes}
    held = [str(rung) for rung in rungs]
    print_json({**facts, "parity": held}) if json_ else print_facts({**facts, "parity": "; ".join(held)})


def engine(
    onnx: Annotated[Path, typer.Argument(metavar="FILE", help="An ONNX file.")],
    out: OutOption,
    target: Annotated[
        str,
        typer.Option(
            help="What it is for, such as trt or openvino-cpu; a shell completes the others.",
            autocompletion=completion.builders,
        ),
    ] = "trt-rtx",
    compute_capability: Annotated[list[str] | None, typer.Option(help="Such as 8.9; may be repeated.")] = None,
    batch: Annotated[tuple[int, int, int], typer.Option(help="min opt max of the optimization profile.")] = (1, 1, 8),
    strip: Annotated[
        bool, typer.Option("--strip", help="Leave the weights out; `slimvit refit` puts them in.")
    ] = False,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Let later versions of the runtime load it (trt).")
    ] = False,
    hardware_compatible: Annotated[
        str,
        typer.Option(
            help="none, ampere_plus or same_compute_capability (trt).",
            autocompletion=completion.one_of("none", "ampere_plus", "same_compute_capability"),
        ),
    ] = "none",
    input_shape: ShapeOption = "",
    json_: JsonFlag = False,
) -> None:
    """ONNX file → engine and engine.json."""
    from toolchain.artifacts.onnx_file import OnnxFile
    from toolchain.export.engine import BuildEngine
    from toolchain.model import run_stage
    from toolchain.recipe import EngineSection, Recipe

    options: dict[str, object] = {
        "targets": [target],
        "batch": list(batch),
        "strip": strip,
        "version_compatible": version_compatible,
        "hardware_compatible": hardware_compatible,
    }
    if compute_capability:
        options["compute_capabilities"] = compute_capability
    section = Recipe.from_dict({"model": {"name": "-"}, "compress": {"method": "none"}, "engine": options}).engine
    assert isinstance(section, EngineSection)
    sample = numbers(input_shape, "--input-shape")
    source = OnnxFile(onnx)
    stage = BuildEngine(
        section, target, out, lambda built: _engine_rung(source, built, batch, sample), input_shape=sample
    )
    _tell_engine(run_stage(stage, source).artifact, json_=json_)


def _engine_rung(
    source: Artifact, built: EngineBuild, batch: tuple[int, int, int], input_shape: tuple[int, ...] | None = None
) -> Rung:
    """The engine against its file on seeded noise; not run where it cannot be, and for a file that takes no images."""
    from toolchain.artifacts.inputs import resolved
    from toolchain.export.agreement import noise
    from toolchain.export.engine_parity import engine_rung
    from toolchain.export.preparation import raw_pixels
    from toolchain.parity import TOLERANCES, not_run

    try:
        image = source.image
        size = resolved({source.path: image}, input_shape)
    except RecipeError as error:
        return not_run(source.path.name, built.path.name, tolerance=TOLERANCES["fp32"], reason=str(error))
    preprocess = raw_pixels((size[0], size[1], size[2])) if image.takes_pixels and len(size) == 3 else None
    return engine_rung(source, built, batch, lambda count: noise(size, count), None, preprocess)


def refit(
    engine_: Annotated[
        Path, typer.Argument(metavar="ENGINE", help="An engine without weights; engine.json beside it.")
    ],
    onnx: Annotated[Path, typer.Argument(metavar="FILE", help="The ONNX file that it was built from.")],
    out: OutOption,
    target: Annotated[
        str, typer.Option(help="The target that built it.", autocompletion=completion.refitters)
    ] = "trt-rtx",
    json_: JsonFlag = False,
) -> None:
    """Stripped engine and its ONNX file → the engine that runs and its engine.json, on the GPU that it is for."""
    from toolchain.artifacts.onnx_file import OnnxFile
    from toolchain.export.engine import BuildEngine
    from toolchain.model import run_stage
    from toolchain.recipe import EngineSection
    from toolchain.targets.tensorrt.options import BuiltEngine

    shapes = next(iter(BuiltEngine.beside(engine_).profile.values()), None)
    sizes = (shapes.min[0], shapes.opt[0], shapes.max[0]) if shapes else (1, 1, 1)
    sample = shapes.opt[1:] if shapes else None
    source = OnnxFile(onnx)
    stage = BuildEngine(
        EngineSection(targets=(target,)),
        target,
        out,
        lambda built: _engine_rung(source, built, sizes, sample),
        engine_,
    )
    _tell_engine(run_stage(stage, source).artifact, json_=json_)


def _tell_engine(built: EngineBuild, *, json_: bool) -> None:
    print_json(built.facts) if json_ else print_facts({"file": str(built.path), **built.facts})


def _open_for(job: Start, folder: Path, kind: type[M]) -> M:
    """The model in a folder; raises RecipeError if it is not that of the job's recipe."""
    from toolchain.pipeline.stages.base import open_as

    model = open_as(folder, kind)
    for what, ours, theirs in (
        ("model", model.ref, job.dense.ref),
        ("preprocessing", model.preprocess, job.dense.preprocess),
    ):
        if ours != theirs:
            raise RecipeError(f"{folder} and the recipe differ in the {what}: {ours!r} and {theirs!r}")
    return model


def _require_origin(masked: MaskedModel, parent: TimmModel, teacher: Path) -> None:
    """Raises RecipeError unless a teacher's weights are those that a masked model was made of, as far as it says them."""
    from toolchain.surgery.load import digest_of_tensors

    origin = masked.plan.provenance.get("weights")
    made_of = origin.get("dense_sha256") if isinstance(origin, Mapping) else None
    if made_of is not None and made_of != digest_of_tensors(parent.module):
        raise RecipeError(
            f"--teacher {teacher} has other weights than the dense model that was compressed (sha256 {str(made_of)[:12]}…): name the "
            "folder that `slimvit compress` took, or compress again from this one"
        )


def _save(model: AnyModel, out: Path, *, json_: bool) -> None:
    from toolchain.surgery.replay import save_model

    save_model(model, out)
    _tell(model, out, json_=json_)


def _tell(model: AnyModel, out: Path, *, json_: bool, more: Mapping[str, object] | None = None) -> None:
    from toolchain.cost import trace

    shape = trace(model.module, model.family, model.preprocess.input_size)
    facts = {"folder": str(out), "stage": model.stage, "params": shape.params, "macs": shape.macs, **(more or {})}
    print_json(facts) if json_ else print_facts(facts)
