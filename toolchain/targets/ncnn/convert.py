"""An ONNX file → ncnn's .param and .bin, by pnnx in a process of its own; what pnnx leaves out is an error."""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from toolchain.artifacts.ncnn_format import Layer, left_over, read_layers, shape_params, write_layers
from toolchain.errors import ArtifactError, StorageError, fault_words

CONVERT_S = 1800.0
"""A model of 300 million parameters takes a minute; pnnx was not seen to hang."""
DROPPED = re.compile(r"^ignore (\S+) (\S+)", re.MULTILINE)
"""How pnnx says that a parameter of an operator has no place in ncnn: it leaves the operator as it is, and ncnn has none such."""
MISREAD = re.compile(r"^.*(?:unsupported|not supported).*$", re.MULTILINE)
"""How it says that it writes a layer which computes something else."""
SHOWN = 6
ELSEWHERE = "Ship the ONNX file, or take another target."


@dataclass(frozen=True)
class Names:
    """What a model calls its inputs and outputs, in order, and the shapes of the inputs, without the batch."""

    inputs: Mapping[str, tuple[int, ...]]
    outputs: Sequence[str]


def converter() -> tuple[Path, str] | None:
    """The program and version of pnnx; None where it is not installed. Its Python module would import torch, and is not needed."""
    spec = find_spec("pnnx")
    for folder in spec.submodule_search_locations or () if spec is not None else ():
        for name in ("pnnx", "pnnx.exe"):
            if (program := Path(folder, name)).is_file():
                try:
                    return program, version("pnnx")
                except PackageNotFoundError:
                    return None
    return None


def convert(program: Path, source: Path, target: Path, names: Names, *, fp16: bool) -> dict[str, str]:
    """Writes `target`, a .param, and its .bin; gives pnnx's name of each input and output → that of the model, which the file has.

    Args:
        program: pnnx.
        source: the ONNX file.
        target: the .param.
        names: of its inputs and outputs.
        fp16: whether weights are stored in fp16.

    Raises:
        ArtifactError: pnnx cannot convert the file whole; the operators that it left out are named.
        StorageError: a file cannot be read or written.
    """
    import onnx  # not in a process that only runs files

    from toolchain.targets.ncnn.graph import for_pnnx

    with tempfile.TemporaryDirectory(prefix="slimvit-ncnn-") as folder:  # pnnx writes beside what it reads
        copy = Path(folder, "model.onnx")
        try:
            onnx.save(for_pnnx(source), copy)
        except ValueError as error:  # protobuf's limit of 2 GB
            raise ArtifactError(f"{source} cannot be given to pnnx: {error}") from error
        _run(program, copy, source, names, fp16=fp16)
        param, weights = Path(folder, "model.ncnn.param"), Path(folder, "model.ncnn.bin")
        if not param.is_file() or not weights.is_file():
            raise ArtifactError(f"pnnx wrote no ncnn model of {source}")
        layers, renamed = _renamed(read_layers(param), names, source)
        try:
            target.write_text(write_layers(layers), encoding="utf-8")
            target.with_suffix(".bin").write_bytes(weights.read_bytes())
        except OSError as error:
            raise StorageError(f"cannot write {target}: {fault_words(error)}") from error
    return renamed


def _run(program: Path, copy: Path, source: Path, names: Names, *, fp16: bool) -> None:
    shapes = ",".join(str([1, *sample]).replace(" ", "") for sample in names.inputs.values())
    command = [str(program), str(copy), f"inputshape={shapes}", f"fp16={int(fp16)}"]
    environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "1"}  # it holds an ONNX Runtime
    try:
        done = subprocess.run(
            command, cwd=copy.parent, env=environment, capture_output=True, timeout=CONVERT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise ArtifactError(f"pnnx did not convert {source} within {CONVERT_S:.0f} s") from error
    except OSError as error:
        raise StorageError(f"cannot start {program}: {fault_words(error)}") from error
    require_whole((done.stdout + done.stderr).decode(errors="replace"), source)
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise ArtifactError(f"pnnx cannot convert {source} (exit code {done.returncode}): {''.join(last)}")


def require_whole(log: str, source: Path) -> None:
    """Raises ArtifactError where pnnx's log says that it left operators out, or wrote them as something else."""
    if dropped := Counter(kind for kind, _ in sorted(set(DROPPED.findall(log)))):
        kinds = ", ".join(f"{kind} ×{count}" if count > 1 else kind for kind, count in dropped.items())
        raise ArtifactError(f"ncnn does not have all operators of {source}: pnnx left out {kinds}. {ELSEWHERE}")
    if misread := sorted({line.strip() for line in MISREAD.findall(log)}):
        raise ArtifactError(
            f"pnnx cannot express {source} in ncnn, whose tensors have four dimensions beside the batch: "
            f"{'; '.join(misread[:SHOWN])}. {ELSEWHERE}"
        )


def _renamed(layers: Sequence[Layer], names: Names, source: Path) -> tuple[tuple[Layer, ...], dict[str, str]]:
    """The layers with the model's own names of inputs and outputs, and with the shapes of inputs; and the names by pnnx's."""
    read = [layer.outputs[0] for layer in layers if layer.kind == "Input"]
    given = sorted(left_over(layers), key=lambda blob: (len(blob), blob))  # out0, out1, …
    wanted = [f"in{i}" for i in range(len(names.inputs))], [f"out{i}" for i in range(len(names.outputs))]
    if (sorted(read, key=lambda blob: (len(blob), blob)), given) != wanted:
        raise ArtifactError(
            f"pnnx converted {source} to inputs {', '.join(read) or 'none'} and outputs {', '.join(given) or 'none'}; expected "
            f"one each of {', '.join((*names.inputs, *names.outputs))}"
        )
    renamed = dict(zip((*wanted[0], *wanted[1]), (*names.inputs, *names.outputs), strict=True))
    for name in renamed.values():
        if not name or any(character.isspace() for character in name):
            raise ArtifactError(f"ncnn takes no blanks in names: {source} calls an input or output {name!r}")
    inner = {name: f"{name}_inner" for name in renamed.values()}  # numbers are what pnnx calls others
    words = {**inner, **renamed}
    samples = {renamed[blob]: names.inputs[renamed[blob]] for blob in read}
    result = []
    for layer in layers:
        inputs, outputs = (tuple(words.get(blob, blob) for blob in side) for side in (layer.inputs, layer.outputs))
        params = shape_params(samples[outputs[0]]) if layer.kind == "Input" else layer.params
        result.append(replace(layer, inputs=inputs, outputs=outputs, params=params))
    return tuple(result), renamed
