"""Whether an exported model and the device runner are right on aarch64, on an x86 machine: emulated, so never timed.

    apt-get install qemu-user-static
    python benchmarks/emulated_aarch64.py runs/digits_vit/onnx/compressed.fp32.onnx --work build/aarch64

Debian's arm64 packages and aarch64 wheels are unpacked below the work folder; nothing is installed on this machine. The
model runs there through the device runner's own ONNX Runtime session, and its outputs are compared with this machine's.
Then the runner carries out one whole session of a small model; its samples are thrown away.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from toolchain.artifacts import open_artifact
from toolchain.errors import SlimvitError, TargetUnavailable
from toolchain.files import sha256
from toolchain.measure.samples import VARIANTS, Session
from toolchain.on_device.runner import SCHEDULE_SCHEMA, block_orders, make_inputs, schedule_digest
from toolchain.on_device.runner import __file__ as runner
from toolchain.parity import TOLERANCES, Tolerance, compare_outputs
from toolchain.targets import get_target

QEMU = "qemu-aarch64-static"
# Not "max", the default: its int8 kernels give wrong results without a word.
CPU = "neoverse-n1"
DEBS = ("python3-minimal", "libpython3-stdlib", "libstdc++6")
WHEELS = ("numpy", "onnxruntime")
PLATFORMS = ("manylinux_2_28_aarch64", "manylinux_2_27_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64")
# ONNX Runtime reads these when it loads and dies on those of an x86 machine. A Neoverse N1, as emulated.
CPUINFO = """processor\t: 0
BogoMIPS\t: 50.00
Features\t: fp asimd aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x3
CPU part\t: 0xd0c
CPU revision\t: 1
"""
FAKED = {"proc/cpuinfo": CPUINFO} | {
    f"sys/devices/system/cpu/{name}": "0\n" for name in ("possible", "present", "online")
}
# The runner refuses to time where it sees the x86 kernel; what it gives is looked at here, its samples are not.
FAKED |= {"proc/sys/kernel/arch": "aarch64\n", "sys/devices/system/cpu/modalias": "cpu:type:aarch64:feature:\n"}
QUANTISED = Tolerance(max_abs=None, cosine_min=0.99, top1_min=None)
"""For int8: kernels of different processors round differently, so max |Δ| is told and not judged."""
INFER = """import sys
import numpy as np
from runner import OrtRunner
model, inputs, outputs = sys.argv[1:]
with np.load(inputs) as feeds, OrtRunner(model, 1) as session:
    np.savez(outputs, **session.infer({name: feeds[name] for name in feeds.files}))
"""
Array = NDArray[Any]


class Emulated:
    """An aarch64 Python with numpy and onnxruntime below `work`; set up on first use."""

    def __init__(self, work: Path) -> None:
        self.work = work.absolute()
        self.root, self.site = self.work / "root", self.work / "site"
        self.python = Path()

    def set_up(self, say: Callable[[str], None]) -> None:
        """Raises TargetUnavailable if a program is missing, CalledProcessError if a download fails."""
        for program, install in ((QEMU, "qemu-user-static"), ("apt-get", "apt"), ("dpkg-deb", "dpkg")):
            if shutil.which(program) is None:
                raise TargetUnavailable("aarch64", f"there is no {program}", f"apt-get install {install}")
        if not self.root.exists():
            say("fetching Debian's arm64 packages")
            self._debian()
        (self.python,) = [path for path in self.root.glob("usr/bin/python3.*") if path.name[8:].isdigit()]
        if not self.site.exists():
            say("fetching aarch64 wheels")
            self._wheels(self.python.name.removeprefix("python"))

    def _debian(self) -> None:
        apt, partial = self.work / "apt", self.work / "root.partial"
        for folder in ("state/lists/partial", "cache/archives/partial"):
            (apt / folder).mkdir(parents=True, exist_ok=True)
        settings = {
            "APT::Architecture": "arm64",
            "APT::Architectures": "arm64",
            "Dir::State": apt / "state",
            "Dir::State::status": "/dev/null",  # as if nothing were installed: all dependencies are fetched
            "Dir::Cache": apt / "cache",
            "Debug::NoLocking": "1",
        }
        if os.geteuid() == 0:
            settings["APT::Sandbox::User"] = "root"  # apt's own user may not reach the work folder
        options = [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]
        subprocess.run(["apt-get", *options, "-qq", "update"], check=True)
        fetch = ["-qq", "--yes", "--no-install-recommends", "--download-only", "install", *DEBS]
        subprocess.run(["apt-get", *options, *fetch], check=True)
        for deb in sorted((apt / "cache/archives").glob("*.deb")):
            subprocess.run(["dpkg-deb", "--extract", str(deb), str(partial)], check=True)
        for name, text in FAKED.items():
            (partial / name).parent.mkdir(parents=True, exist_ok=True)
            (partial / name).write_text(text, encoding="utf-8")
        partial.rename(self.root)

    def _wheels(self, version: str) -> None:
        partial = self.work / "site.partial"
        shutil.rmtree(partial, ignore_errors=True)
        platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet", "install"]
        only = ["--only-binary=:all:", "--implementation", "cp", "--python-version", version, "--target", str(partial)]
        subprocess.run([*pip, *only, *platforms, *WHEELS], check=True)
        partial.rename(self.site)

    def run(self, *arguments: object, folder: Path) -> None:
        """Runs its Python; raises CalledProcessError if that fails."""
        environment = {
            "PYTHONPATH": os.pathsep.join(map(str, (self.site, Path(runner).parent))),
            "PYTHONDONTWRITEBYTECODE": "1",
            "ORT_DISABLE_TELEMETRY": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "HOME": str(folder),
        }
        command = [QEMU, "-cpu", CPU, "-L", str(self.root), str(self.python), *map(str, arguments)]
        subprocess.run(command, check=True, cwd=folder, env=environment)


def check_model(emulated: Emulated, model: Path, batches: Sequence[int], tolerance: Tolerance) -> bool:
    """Whether the model's first output there is that of this machine, printed for each batch."""
    good = True
    for batch in batches:
        signature = open_artifact(model).signature(batch)
        tensors = [spec.model_dump(mode="json") for spec in signature.inputs]
        (arrays,) = make_inputs({"count": 1, "seed": batch, "tensors": tensors})
        feeds = dict(zip(signature.names, arrays, strict=True))
        with get_target("ort-cpu").open(model, threads=1) as session:
            here = session.infer(feeds)
        there = _infer(emulated, model, feeds)
        for name in here:
            sides = [np.asarray(side[name]).reshape(batch, -1) for side in (here, there)]
            rung = compare_outputs(
                f"{model.name} here", "aarch64", sides[:1], sides[1:], tolerance=tolerance, real_images=False
            )
            cosine = "" if rung.cosine_min is None else f", cosine {rung.cosine_min:.7f}"
            print(f"batch {batch}, {name}: {rung}{cosine}")
            good &= rung.verdict == "pass"
    return good


def _infer(emulated: Emulated, model: Path, feeds: Mapping[str, Array]) -> dict[str, Array]:
    inputs, outputs = emulated.work / "inputs.npz", emulated.work / "outputs.npz"
    outputs.unlink(missing_ok=True)
    np.savez(inputs, allow_pickle=False, **feeds)
    emulated.run("-c", INFER, model.absolute(), inputs, outputs, folder=emulated.work)
    with np.load(outputs) as stored:
        return {name: stored[name] for name in stored.files}


def check_runner(emulated: Emulated) -> bool:
    """Whether the device runner gives a session that is one; what it timed is not looked at."""
    folder = emulated.work / "session"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    model = _small_model(folder / "small.onnx")
    variants = [{"name": n, "path": model.name, "runtime": "ort-cpu", "inputs": ["x"]} for n in VARIANTS]
    schedule = {
        "schema": SCHEDULE_SCHEMA,
        "seed": 0,
        "session": 0,
        "blocks": 4,
        "slot_ms": 0.001,
        "threads": 1,
        "warmup": {"calls": 1, "seconds": 0.0},
        "inputs": {"count": 2, "seed": 0, "tensors": [{"shape": [1, 16], "dtype": "float32"}]},
        "variants": variants,
        "files": {model.name: sha256(model)},
    }
    (folder / "schedule.json").write_text(json.dumps(schedule), encoding="utf-8")
    emulated.run(runner, "schedule.json", "out.json", folder=folder)
    result = json.loads((folder / "out.json").read_text(encoding="utf-8"))
    (folder / "out.json").unlink()
    same_schedule = result.pop("schedule_sha256") == schedule_digest(schedule)
    session = Session.model_validate_json(json.dumps(result))
    same_orders = [list(block.order) for block in session.blocks] == block_orders(VARIANTS, 4, seed=0, session=0)
    machine = session.fingerprint.before.machine
    good = same_schedule and same_orders and machine["system"].endswith("aarch64")
    print(f"device runner on {machine['system']}, Python {machine['python']}, {machine['runtimes']}: ", end="")
    print("a whole session, its schedule and its orders" if good else f"WRONG: {same_schedule=} {same_orders=}")
    return bool(good)


def _small_model(path: Path) -> Path:
    weight = np.random.default_rng(0).standard_normal((16, 16)).astype(np.float32)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 16]) for name in "xy"]
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    graph = helper.make_graph([node], "small", values[:1], values[1:], [numpy_helper.from_array(weight, "w")])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9), path)
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """0 if all is right there, 3 if not, 5 if there is no emulator."""
    parser = argparse.ArgumentParser(description="Check exported models on emulated aarch64; nothing is timed.")
    parser.add_argument("models", nargs="+", type=Path, metavar="MODEL.onnx")
    parser.add_argument("--work", type=Path, default=Path("build/aarch64"), help="what is fetched stays here")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 3])
    parser.add_argument("--quantised", action="store_true", help="judge by cosine ≥ 0.99 alone, for int8")
    options = parser.parse_args(arguments)
    tolerance = QUANTISED if options.quantised else TOLERANCES["fp32"]
    emulated = Emulated(options.work)
    emulated.work.mkdir(parents=True, exist_ok=True)
    try:
        emulated.set_up(lambda text: print(text, file=sys.stderr))
        good = [check_model(emulated, model, options.batch, tolerance) for model in options.models]
        return 0 if check_runner(emulated) and all(good) else 3
    except SlimvitError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
