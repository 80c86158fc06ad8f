"""Times a model's matrix products alone, on this machine and in the same run as the model.

The rate of the products is measured in the runtime itself, for the model's own shapes, with the model's own weights and
the same threads: another library's rate would bound what another runtime could do. Models and products take turns in
one process, block by block, so what slows the machine down slows both, and the share of one in the other is paired.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from toolchain.analysis.products import Graph, products, read_graph, write_products
from toolchain.analysis.realised import Counted, Floor, Letter, alone, product_variants, variants_of
from toolchain.artifacts import Signature
from toolchain.defaults import FLOOR_BLOCKS, FLOOR_SESSIONS
from toolchain.devices.device import Device, device_for
from toolchain.errors import MeasurementError, ParityError, RecipeError, TargetUnavailable
from toolchain.measure.experiment import TimedArtifact, artifact_facts, plan_experiment
from toolchain.measure.samples import CONTROL, A, B, Design, Workload
from toolchain.measure.session import sessions_of
from toolchain.progress import SILENT, Progress
from toolchain.records import checked
from toolchain.targets import get_target
from toolchain.targets.base import PRODUCTS
from toolchain.targets.products import OPENERS

DESIGN = Design(sessions=FLOOR_SESSIONS, blocks=FLOOR_BLOCKS)


def measure_floor(
    a: Path,
    b: Path | None = None,
    target: str | Device = "ort-cpu",
    workload: Workload = Workload(),
    design: Design = DESIGN,
    progress: Progress = SILENT,
) -> Floor:
    """The floor of one or two ONNX files on a target, and how close their latency comes.

    Args:
        a: an ONNX file, the dense one where there are two.
        b: the compressed one.
        target: one that runs products alone, such as "ort-cpu"; on this machine.
        workload: batch, threads and input shape of a call.
        design: how it is timed; only its first look is used.
        progress: gets progress reports.

    Raises:
        RecipeError: a number is out of range, or a file has products that are not counted.
        StorageError: a file cannot be read.
        ArtifactError: it is damaged, or cannot be run.
        ParityError: A and B differ in their inputs.
        TargetUnavailable: the target is not there, or has no floor.
        MeasurementError: a session failed, or the machine changed between sessions.
    """
    device = device_for(target)
    if PRODUCTS + device.runtime not in OPENERS:
        known = ", ".join(name.removeprefix(PRODUCTS) for name in OPENERS)
        raise TargetUnavailable(
            get_target(device.runtime).name, f"it has no floor; name one that has with --target: {known}"
        )
    paths: dict[Letter, Path] = {A: a} if b is None else {A: a, B: b}
    experiment = plan_experiment(
        device.runtime, workload, design.once, {**{str(x): p for x, p in paths.items()}, CONTROL: a}
    )
    inputs = [experiment.variants[letter].signature.inputs for letter in paths]
    if inputs[0] != inputs[-1]:
        raise ParityError(f"{a} and {b} cannot be measured side by side: their inputs differ")
    graphs = {letter: read_graph(path, workload.batch, workload.input_shape) for letter, path in paths.items()}
    models = {x: Counted(artifact=artifact_facts(path), products=products(graphs[x])) for x, path in paths.items()}
    for letter, path in paths.items():
        if not models[letter].products:
            raise RecipeError(f"{path} has no matrix product, and so no floor")
    with tempfile.TemporaryDirectory(prefix="slimvit-floor-") as folder:
        parts = {
            name: TimedArtifact(path, PRODUCTS + device.runtime, Signature((), ()))
            for name, path in _parts(Path(folder), graphs, models).items()
        }
        experiment = replace(experiment, variants={**experiment.variants, **parts})
        assert list(experiment.variants) == variants_of(models)
        sessions = tuple(sessions_of(experiment, device.measurer, progress))
    with checked(MeasurementError, f"the floor of {a}"):
        return Floor(scenario=experiment.scenario, design=experiment.design, models=models, sessions=sessions)


def _parts(folder: Path, graphs: Mapping[Letter, Graph], models: Mapping[Letter, Counted]) -> dict[str, Path]:
    """Variant → a file of matrix products only: for each model one file with all of them, then one per shape."""
    parts = {}
    for letter, graph in graphs.items():
        shapes = models[letter].products
        parts[alone(letter)] = write_products(graph, shapes, folder / f"{letter}.onnx")
        for index, name in enumerate(product_variants(letter, shapes)):
            parts[name] = write_products(graph, [shapes[index]], folder / f"{letter}{index}.onnx")
    return parts
