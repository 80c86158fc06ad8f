"""ONNX Runtime on the CPU: the ONNX file is the engine."""

from __future__ import annotations

import os
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Self

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when the library loads
import onnxruntime as ort
from pydantic import BaseModel, TypeAdapter

from toolchain.errors import ArtifactError
from toolchain.files import read_json
from toolchain.on_device.runner import OrtRunner, Runner, cpu_model, ort_options
from toolchain.targets.base import (
    Feeds,
    NodeTime,
    Profiled,
    TargetInfo,
    TargetProfile,
)

KERNEL = "_kernel_time"
"""Ends the name of a profile's event that is a node's work; others are its synchronisation."""

FOUR_BITS = ("INT4-DYNAMIC",) if tuple(map(int, ort.__version__.split(".")[:2])) >= (1, 23) else ()
"""What is stored in int4, if this version can cast it."""


class _CheckedOrtRunner(OrtRunner):
    """The device's own runner, with a file that cannot be loaded reported as the user's error."""

    def __enter__(self) -> Self:
        try:
            return super().__enter__()
        except Exception as error:  # onnxruntime's exceptions share no base of their own
            raise ArtifactError(f"ONNX Runtime {ort.__version__} cannot load {self.path}: {error}") from error


class OrtCpu(Profiled):
    """Target "ort-cpu". Multiples of 4 fill a 128-bit vector of fp32, the narrowest that its kernels use."""

    name = "ort-cpu"
    profile = TargetProfile({"mlp_hidden": 4, "head_dim": 4, "rank": 4})
    takes = ("onnx",)
    measures = True
    exact_fp32 = True
    loads = ("FLOAT", "HALF", "INT8", "INT8-DYNAMIC", *FOUR_BITS)  # it has no MatMul in bf16

    def probe(self) -> TargetInfo:
        """The runtime and the CPU; always there, since onnxruntime is a dependency."""
        return TargetInfo(self.name, "onnxruntime", ort.__version__, cpu_model())

    def _open(self, path: Path, threads: int) -> Runner:
        """A runner of the ONNX file; raises ArtifactError on entry if it cannot be loaded."""
        return _CheckedOrtRunner(str(path), threads)

    def _node_times(self, path: Path, threads: int, feeds: Sequence[Feeds], warm_up: int, calls: int) -> list[NodeTime]:
        """The time of every node in one of `calls` calls, after `warm_up` others, by ONNX Runtime's own profiler.

        The nodes are those that it runs after its graph optimisation; their times are whole microseconds.

        Raises:
            ArtifactError: ONNX Runtime cannot load the file.
        """
        options = ort_options(ort, threads)
        with tempfile.TemporaryDirectory(prefix="slimvit-profile-") as folder:
            options.enable_profiling, options.profile_file_prefix = True, str(Path(folder, "ort"))
            try:
                session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
            except Exception as error:
                raise ArtifactError(f"ONNX Runtime {ort.__version__} cannot load {path}: {error}") from error
            for index in range(warm_up + calls):
                session.run(None, feeds[index % len(feeds)])
            events = read_json(Path(session.end_profiling()))
        return node_times(events, warm_up)


class _Arguments(BaseModel):
    op_name: str = ""


class Event(BaseModel):
    """An event of ONNX Runtime's profile, whose duration is in microseconds."""

    cat: str
    name: str
    dur: int = 0
    args: _Arguments = _Arguments()


def node_times(events: object, warm_up: int) -> list[NodeTime]:
    """The time of every node in the events of a profile: a node runs once a call, and its first events are the warm-up's."""
    spent: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    for event in TypeAdapter(list[Event]).validate_python(events):
        if event.cat == "Node" and event.name.endswith(KERNEL):
            spent[event.name.removesuffix(KERNEL), event.args.op_name].append(event.dur)
    counted = {node: [1e3 * us for us in took[warm_up:]] for node, took in spent.items()}
    return [NodeTime.of_calls(*node, ns) for node, ns in counted.items() if ns]


ORT_CPU = OrtCpu()
