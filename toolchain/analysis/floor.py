"""The time of the matrix products alone, on this machine and in the same run as the models that consist of them.

The rate of the products is measured in the runtime itself, for the model's own shapes, with the model's own weights and
the same threads: another library's rate would bound what another runtime could do. Models and products take turns in
one process, block by block, so what slows the machine down slows both, and the share of one in the other is paired.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from toolchain.analysis.products import Graph, products, read_graph, write_products
from toolchain.analysis.products_runner import OPENERS
from toolchain.analysis.realised import (
    Counted,
    Floor,
    Letter,
    alone,
    product_variants,
    variants_of,
)
from toolchain.artifacts import Signature, open_artifact
from toolchain.devices.transport import LocalTransport, Transport
from toolchain.devices.worker import PRODUCTS
from toolchain.errors import MeasurementError, ParityError, RecipeError
from toolchain.measure.samples import CONTROL, A, B, Session, explain
from toolchain.measure.schedule import artifact_facts, run_session, session_plan, set_up
from toolchain.targets import get_target


def measure_floor(
    a: Path,
    b: Path | None = None,
    *,
    target: str = "ort-cpu",
    threads: int = 1,
    batch: int = 1,
    input_shape: tuple[int, ...] | None = None,
    affinity: tuple[int, ...] | None = None,
    sessions: int = 3,
    blocks: int = 10,
    slot_ms: float = 50.0,
    warmup_s: float = 0.5,
    seed: int = 0,
    transport: Transport | None = None,
    on_progress: Callable[[str, float], None] | None = None,
) -> Floor:
    """The floor of one or two ONNX files on a target, and how close their latency comes.

    Args:
        a: an ONNX file, the dense one where there are two.
        b: the compressed one.
        target: "ort-cpu", "openvino-cpu" or "openvino-cpu-bf16".
        threads: intra-op threads.
        batch: first dimension of the inputs.
        input_shape: shape of one sample; only needed where a file leaves it open.
        affinity: the cores to run on; None is all that the process may use.
        sessions: fresh processes.
        blocks: per session; each holds one slot of every model, of A once more, and of every shape of product.
        slot_ms: shortest slot.
        warmup_s: shortest warm-up of each.
        seed: of the order within blocks and the bootstrap.
        transport: where the sessions run, on this machine; None is a plain one.
        on_progress: receives (what was done, share done).

    Raises:
        RecipeError: an option is out of range, or a file has products that are not counted.
        StorageError: a file cannot be read.
        ArtifactError: it is damaged, or cannot be run.
        ParityError: A and B differ in their inputs.
        TargetUnavailable: the target is not there.
        MeasurementError: a session failed, or the machine changed between sessions.
    """
    if PRODUCTS + target not in OPENERS:
        known = ", ".join(name.removeprefix(PRODUCTS) for name in OPENERS)
        raise RecipeError(f"target {get_target(target).name!r} has no floor; {known} have one")
    get_target(target).require_run()
    scenario, design, _ = set_up(
        a,
        target=target,
        threads=threads,
        batch=batch,
        input_shape=input_shape,
        affinity=affinity,
        design={"sessions": sessions, "blocks": blocks, "slot_ms": slot_ms, "warmup_s": warmup_s, "seed": seed},
    )
    paths: dict[Letter, Path] = {A: a} if b is None else {A: a, B: b}
    signatures = {letter: open_artifact(path).signature(batch, input_shape) for letter, path in paths.items()}
    if b is not None and signatures[A].inputs != signatures[B].inputs:
        raise ParityError(f"{a} and {b} cannot be measured side by side: their inputs differ")
    graphs = {letter: read_graph(path, batch, input_shape) for letter, path in paths.items()}
    models = {x: Counted(artifact=artifact_facts(path), products=products(graphs[x])) for x, path in paths.items()}
    for letter, path in paths.items():
        if not models[letter].products:
            raise RecipeError(f"{path} has no matrix product, and so no floor")
    with tempfile.TemporaryDirectory(prefix="slimvit-floor-") as folder:
        parts = _parts(Path(folder), graphs, models)
        timed: dict[str, tuple[Path, Signature]] = {x: (path, signatures[x]) for x, path in paths.items()}
        timed[CONTROL] = timed[A]
        done: list[Session] = []
        for index in range(sessions):

            def report(share: float, text: str, index: int = index) -> None:
                if on_progress is not None:
                    on_progress(f"session {index + 1}/{sessions}, {text}", (index + share) / sessions)

            plan = session_plan(design, scenario, timed, index)
            plan["variants"] = [*plan["variants"], *(_part(name, path, target) for name, path in parts.items())]
            assert [variant["name"] for variant in plan["variants"]] == variants_of(models)
            done.append(run_session(transport or LocalTransport(), plan, report))
    try:
        return Floor(scenario=scenario, design=design, models=models, sessions=tuple(done))
    except ValidationError as error:
        raise MeasurementError(f"the floor of {a}: {explain(error)}") from None


def _parts(folder: Path, graphs: Mapping[Letter, Graph], models: Mapping[Letter, Counted]) -> dict[str, Path]:
    """Variant → a file with nothing but products: of each model all together, then those of each shape."""
    parts = {}
    for letter, graph in graphs.items():
        found = models[letter].products
        parts[alone(letter)] = write_products(graph, found, folder / f"{letter}.onnx")
        for index, name in enumerate(product_variants(letter, found)):
            parts[name] = write_products(graph, [found[index]], folder / f"{letter}{index}.onnx")
    return parts


def _part(name: str, path: Path, target: str) -> dict[str, Any]:
    return {"name": name, "path": str(path), "runtime": PRODUCTS + target, "inputs": []}
