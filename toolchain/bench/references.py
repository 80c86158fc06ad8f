"""What one could have taken instead: off-the-shelf smaller timm models beside a dense and a compressed one.

Their weights are random: only size and latency are looked at, and those do not depend on the weights. Whether one of
them is as accurate is for their own papers to say.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from toolchain.bench.compare import compare
from toolchain.bench.products import products, read_graph
from toolchain.bench.protocol import Comparison
from toolchain.bench.reference_table import Row
from toolchain.bench.signature import read_signature
from toolchain.bench.size import artifact_size_bytes, stored_params
from toolchain.bench.transport import Transport
from toolchain.errors import ArtifactError, ModelError, RecipeError
from toolchain.export.onnx_graph import export_onnx, read_onnx
from toolchain.plan import ModelRef
from toolchain.surgery.load import randomise_untrained
from toolchain.surgery.replay import create_dense

OPSET = 20
Told = Callable[[str, float], None]


def reference_rows(
    dense: Path,
    compressed: Path | None,
    names: Sequence[str],
    *,
    target: str = "ort-cpu",
    threads: int = 1,
    batch: int = 1,
    affinity: tuple[int, ...] | None = None,
    transport: Transport | None = None,
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    on_progress: Told | None = None,
) -> list[Row]:
    """The dense model, the compressed one and timm models of the given names, each compared with the dense one.

    The timm models take the dense file's image and give its number of classes.

    Args:
        dense: an ONNX file with one image input [batch, C, H, W] and one output [batch, classes].
        compressed: what was made of it.
        names: timm's names, such as "deit_tiny_patch16_224".
        target: name of the target.
        threads: intra-op threads.
        batch: first dimension of the inputs.
        affinity: the cores to run on; None is all that the process may use.
        transport: where the sessions run; None is this machine.
        settings: further arguments of `compare`, the same for all.
        seed: of the random weights and of the comparisons.
        on_progress: receives (what was done, share done).

    Raises:
        RecipeError: no names, or the dense file is no image classifier.
        ModelError: timm does not know a name, or the model does not take such images.
        and all that `compare` raises.
    """
    if not names:
        raise RecipeError("there is no reference model; name some, such as deit_tiny_patch16_224")
    size, classes = classifier_shape(dense)
    rows = [_row(dense, dense.name, "dense", batch, None)]
    with tempfile.TemporaryDirectory(prefix="slimvit-references-") as folder:
        others = [] if compressed is None else [(compressed, compressed.name, "compressed")]
        for index, name in enumerate(names):
            path = Path(folder, f"{name.replace('/', '_')}.onnx")
            if on_progress is not None:
                on_progress(f"exporting {name}", 0.1 * index / len(names))
            export_reference(name, path, input_size=size, classes=classes, seed=seed)
            others.append((path, name, "timm, untrained"))
        for index, (path, name, kind) in enumerate(others):

            def told(text: str, share: float, index: int = index, name: str = name) -> None:
                if on_progress is not None:
                    on_progress(f"{name}: {text}", 0.1 + 0.9 * (index + share) / len(others))

            found = compare(
                dense,
                path,
                target=target,
                threads=threads,
                batch=batch,
                affinity=affinity,
                seed=seed,
                transport=transport,
                on_progress=told,
                **(settings or {}),
            )
            rows.append(_row(path, name, kind, batch, found))
    first = rows[1].comparison
    assert first is not None
    rows[0] = Row(**{**vars(rows[0]), "latency_ms": first.latency_ms("A")})
    return rows


def classifier_shape(path: Path) -> tuple[tuple[int, int, int], int]:
    """((C, H, W), classes) of an image classifier in an ONNX file.

    Raises:
        RecipeError: it has other inputs or outputs than one image and one vector of classes.
    """
    image = read_signature(path, 1).inputs[0]
    if image.dtype == "uint8":
        raise RecipeError(f"{path} takes pixels; references are made for files that take images [batch, C, H, W]")
    shape = image.shape
    outputs = read_onnx(path).graph.output
    dims = [dim.dim_value for dim in outputs[0].type.tensor_type.shape.dim]
    if len(shape) != 4 or len(outputs) != 1 or len(dims) != 2 or dims[1] < 1:
        raise RecipeError(
            f"{path} takes {list(shape)} and gives {len(outputs)} output(s), the first {dims}; references need one image "
            "[batch, C, H, W] in and one vector of classes out"
        )
    return (shape[1], shape[2], shape[3]), dims[1]


def export_reference(name: str, path: Path, *, input_size: tuple[int, int, int], classes: int, seed: int = 0) -> Path:
    """The ONNX file of an untrained timm model whose biases and norms are random, so that nothing folds away.

    Args:
        name: timm's.
        path: the file to write.
        input_size: (C, H, W) of its images.
        classes: of its head.
        seed: of its weights.

    Raises:
        ModelError: timm does not know the name, or the model takes no such images.
        ArtifactError: it cannot be exported.
    """
    import torch

    channels, *image = input_size
    kwargs: dict[str, Any] = {"num_classes": classes, "in_chans": channels}
    try:
        ref = ModelRef(name=name, kwargs=kwargs)
    except ValidationError as error:
        raise ModelError(f"{name}: {error.errors()[0]['msg']}") from None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = create_dense(ref)
        fixed = getattr(getattr(module, "patch_embed", None), "img_size", None)
        if fixed is not None and tuple(fixed) != tuple(image):  # a transformer's positions are made for one size
            module = create_dense(ModelRef(name=name, kwargs={**kwargs, "img_size": tuple(image)}))
    randomise_untrained(module, seed)
    try:
        export_onnx(module, path, input_size=input_size, opset=OPSET, metadata={}, simplify=True)
    except ArtifactError as error:
        raise ArtifactError(f"the reference {name} at {list(input_size)}: {error}") from error
    return path


def _row(path: Path, name: str, kind: str, batch: int, found: Comparison | None) -> Row:
    try:
        macs = sum(product.total_macs for product in products(read_graph(path, batch)))
    except (RecipeError, ArtifactError):
        macs = None
    latency = None if found is None else found.latency_ms("B")
    return Row(name, kind, stored_params(path), macs, artifact_size_bytes(path), latency, found)
