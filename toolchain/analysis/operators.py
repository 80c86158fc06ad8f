"""Time of each node of a file, from the runtime's own profiler, in a fresh process.

Profiling slows a model down: use these times to compare nodes of one file, never as its latency.

Usage of the process: `python -m toolchain.analysis.operators REQUEST OUT`; exit codes are the device runner's.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from toolchain.artifacts import open_artifact
from toolchain.devices.device import Device, device_for
from toolchain.devices.transport import alone
from toolchain.errors import ArtifactError, MeasurementError, RecipeError, SlimvitError, TargetUnavailable
from toolchain.files import read_json, write_json
from toolchain.measure.experiment import inputs_of
from toolchain.measure.samples import Workload
from toolchain.on_device.runner import (
    EXIT_SCHEDULE,
    EXIT_UNAVAILABLE,
    EXIT_VARIANT,
    Unavailable,
    emulation,
    make_inputs,
    pin,
)
from toolchain.progress import SILENT, Progress
from toolchain.targets import NodeTime, Profiled, get_target, named

COSTLIEST = 5
WARM_UP = 10
"""Calls before those that count."""


@dataclass(frozen=True)
class OperatorTime:
    """All nodes of one operator: how many, their time in a call, and its share of all nodes' time."""

    op: str
    count: int
    ms: float
    share: float


@dataclass(frozen=True)
class Profile:
    """What the nodes of one file cost on a target, in a typical one of the calls that were profiled."""

    name: str
    target: str
    threads: int
    batch: int
    calls: int
    nodes: tuple[NodeTime, ...]

    @property
    def total_ms(self) -> float:
        """The time of all nodes in a call."""
        return sum(node.ns for node in self.nodes) / 1e6

    def costliest(self, count: int = COSTLIEST) -> list[NodeTime]:
        """The nodes that cost most, the costliest first."""
        return sorted(self.nodes, key=lambda node: (-node.ns, node.name))[:count]

    def by_operator(self) -> list[OperatorTime]:
        """All operators, the costliest first."""
        found: dict[str, list[float]] = {}
        for node in self.nodes:
            found.setdefault(node.op, []).append(node.ns)
        total = sum(node.ns for node in self.nodes) or 1.0
        rows = [OperatorTime(op, len(times), sum(times) / 1e6, sum(times) / total) for op, times in found.items()]
        return sorted(rows, key=lambda row: (-row.ms, row.op))

    def to_dict(self) -> dict[str, object]:
        """The JSON object of one file in `bench profile --json`."""
        total = sum(node.ns for node in self.nodes) or 1.0
        return {
            "name": self.name,
            "target": self.target,
            "threads": self.threads,
            "batch": self.batch,
            "calls": self.calls,
            "total_ms": self.total_ms,
            "operators": [asdict(row) for row in self.by_operator()],
            "nodes": [
                {"name": node.name, "op": node.op, "ms": node.ns / 1e6, "share": node.ns / total}
                for node in self.costliest(len(self.nodes))
            ],
        }


def profile_operators(
    path: Path,
    target: str | Device = "ort-cpu",
    workload: Workload = Workload(),
    *,
    calls: int = 30,
    progress: Progress = SILENT,
) -> Profile:
    """What each node of an ONNX file costs.

    Args:
        path: the file.
        target: one that can profile, such as "ort-cpu" or "openvino-cpu"; on this machine.
        workload: batch, threads and input shape of a call.
        calls: that count; a node's time is the mean of the middle half of its times.
        progress: gets progress reports.

    Raises:
        RecipeError: an option is out of range or does not fit the file.
        StorageError: the file cannot be read.
        ArtifactError: it is damaged, or cannot be run.
        TargetUnavailable: the target is not there, or cannot profile.
        MeasurementError: the process failed in another way.
    """
    runtime = device_for(target).runtime
    where = get_target(runtime)
    if not isinstance(where, Profiled):
        able = named(lambda target: isinstance(target, Profiled))
        raise TargetUnavailable(
            runtime, f"its nodes cannot be profiled; those of {able} can: name one of these with --target"
        )
    where.require_run()
    if calls < 1:
        raise RecipeError(f"cannot profile {calls} calls; at least 1 is needed")
    artifact = open_artifact(path)
    if artifact.name not in where.takes:
        raise RecipeError(f"{runtime} cannot profile {path}: it is no ONNX file; name one")
    signature = artifact.signature(workload.batch, workload.input_shape)
    request = {
        "path": str(path.absolute()),
        "target": runtime,
        "threads": workload.threads,
        "affinity": workload.affinity,
        "warm_up": WARM_UP,
        "calls": calls,
        "names": list(signature.names),
        "inputs": inputs_of(signature.inputs, seed=0),
    }
    nodes = _in_a_process(runtime, request, progress)
    if not nodes:
        raise MeasurementError(f"{runtime} told no node's time for {path}")
    return Profile(path.name, runtime, workload.threads, workload.batch, calls, tuple(nodes))


def _in_a_process(runtime: str, request: dict[str, object], progress: Progress) -> list[NodeTime]:
    root = str(Path(__file__).parents[2])
    search = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "ORT_DISABLE_TELEMETRY": "1", "PYTHONPATH": search}
    with tempfile.TemporaryDirectory(prefix="slimvit-profile-") as folder:
        request_path, nodes_path = Path(folder, "request.json"), Path(folder, "nodes.json")
        write_json(request_path, request)
        command = [sys.executable, "-P", "-m", __name__, str(request_path), str(nodes_path)]
        with alone(progress):
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, errors="replace", check=False
            )
        last = "\n".join(done.stderr.strip().splitlines()[-5:])
        if done.returncode == EXIT_VARIANT:
            raise ArtifactError(last)
        if done.returncode == EXIT_UNAVAILABLE:
            raise TargetUnavailable(runtime, last)
        if done.returncode == EXIT_SCHEDULE:
            raise RecipeError(f"this cannot be profiled here: {last}")
        if done.returncode != 0:
            raise MeasurementError(f"a profiling process ended with exit code {done.returncode}: {last}")
        return [NodeTime(*row) for row in read_json(nodes_path)]


def main(argv: list[str]) -> int:
    """The exit code of one profiling process."""
    request = read_json(Path(argv[0]))
    target = get_target(request["target"])
    assert isinstance(target, Profiled)
    if why := emulation():
        return _refuse(why, EXIT_UNAVAILABLE)
    feeds = [dict(zip(request["names"], arrays, strict=True)) for arrays in make_inputs(request["inputs"])]
    try:
        pin(request["affinity"], request["threads"])
        nodes = target.node_times(
            Path(request["path"]), request["threads"], feeds, request["warm_up"], request["calls"]
        )
    except TargetUnavailable as error:
        return _refuse(error.reason, EXIT_UNAVAILABLE)
    except SlimvitError as error:
        return _refuse(str(error), EXIT_VARIANT)
    except (Unavailable, ValueError) as error:  # of `pin`
        return _refuse(str(error), EXIT_SCHEDULE)
    write_json(Path(argv[1]), [[node.name, node.op, node.ns] for node in nodes])
    return 0


def _refuse(message: str, code: int) -> int:
    sys.stderr.write(f"{message}\n")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
