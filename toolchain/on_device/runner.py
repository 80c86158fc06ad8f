"""The timing loop of slimvit and all else that runs on a device: one file that imports nothing of the project.

Usage: `python runner.py SCHEDULE OUT`. SCHEDULE is JSON (schema `slimvit.bench.schedule/1`) that describes one session: which
variants to open side by side, which inputs to generate, how many blocks to time and from which seed their order comes.
OUT receives the raw samples; no statistic is computed here. Python 3.8 and what `MODULES` has for the runtime suffice; other
runtimes are passed to `run_schedule` as openers. `- -` reads the schedule as one line from standard input, which must stay open: the
session ends when it closes; the samples are the last line of standard output, and one session runs at a time in a
folder. `--fingerprint` prints the device. Exit codes: 0 good, 2 the schedule cannot be
carried out here, 3 a variant cannot be opened or gives non-finite outputs,
4 a file is not the one that the schedule names, 5 this device cannot be timed, 6 another session is running here,
74 a file cannot be written.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import math
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import threading
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from importlib.metadata import version
from importlib.util import find_spec, module_from_spec
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, ClassVar, Dict, List, Protocol, TypedDict  # noqa: UP035 - Python 3.8

import numpy as np

if TYPE_CHECKING:
    from typing import Self  # novm: only for type checkers

    from numpy.typing import NDArray

    Array = NDArray[Any]
    Feeds = Mapping[str, Array]

SCHEDULE_SCHEMA = "slimvit.bench.schedule/1"
SESSION_SCHEMA = "slimvit.bench.session/1"
COLD_SCHEDULE_SCHEMA = "slimvit.bench.coldschedule/1"
COLD_SCHEMA = "slimvit.bench.cold/1"
# What decides which int8, bf16, fp16 and fp32 kernels a runtime picks.
FLAGS = frozenset(
    {"avx2", "avx_vnni", "avx_vnni_int8", "avx_ne_convert", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16"}
    | {"amx_int8", "amx_bf16", "amx_fp16", "asimddp", "asimdhp", "bf16", "i8mm", "sve", "sve2", "sme", "sme2"}
)
# What nvidia-smi is asked for, before and after a session.
GPU_MACHINE = ("name", "driver_version", "power.limit")
GPU_STATE = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw", "clocks_throttle_reasons.active")
# A Raspberry Pi's firmware, in hex digits: of these bits the lowest four hold now (low voltage, capped, throttled, hot).
PLATFORM, PI_THROTTLED, PI_NOW = "/sys/devices/platform", "soc*/soc*:firmware/get_throttled", 0xF
PI_HEX = "(0x)?[0-9a-fA-F]+"
CGROUPS, OWN_CGROUPS = "/sys/fs/cgroup", "/proc/self/cgroup"
X86 = ("x86_64", "i686", "AMD64")
ARM = ("aarch64", "arm64")
RUNTIMES = ("numpy", "onnxruntime", "ai_edge_litert", "openvino", "tensorrt", "tensorrt_rtx", "torch")


EXIT_SCHEDULE, EXIT_VARIANT, EXIT_FILES, EXIT_UNAVAILABLE, EXIT_BUSY, EXIT_WORKLOAD, EXIT_STORAGE = 2, 3, 4, 5, 6, 7, 74
STREAM = "-"
PTE_FORM = {"form": "slimvit.pte/1"}
PTE_NAMES = "slimvit"
"""The method of a .pte file that returns what the file says of itself, as JSON that begins with the form."""
LOCK_WAIT_S = 900.0


class Tensor(TypedDict):
    """An input of a session."""

    shape: Sequence[int]
    dtype: str


class Inputs(TypedDict):
    """The input sets that a device generates: how many, from which seed, of which tensors."""

    count: int
    seed: int
    tensors: Sequence[Tensor]


class WarmUp(TypedDict):
    """The fewest calls and seconds of a warm-up."""

    calls: int
    seconds: float


class VariantSchedule(TypedDict, total=False):
    """An artifact of a session; `inputs` are the names of its inputs in the tensors' order, `dtypes` absent where theirs are the tensors'."""

    name: str
    path: str
    runtime: str
    inputs: Sequence[str]
    dtypes: Sequence[str]


class Schedule(TypedDict, total=False):
    """The input of a session, or of a cold start, which has no `session`; see `run_schedule`.

    Attributes:
        affinity: the cores that it keeps to, or None.
        files: path → sha256 of what it reads, where that was sent.
    """

    schema: str
    seed: int
    session: int
    blocks: int
    slot_ms: float
    threads: int
    affinity: Sequence[int] | None
    warmup: WarmUp
    inputs: Inputs
    variants: Sequence[VariantSchedule]
    files: Mapping[str, str]


class VariantFacts(TypedDict, total=False):
    """What a session reports about a variant besides its samples."""

    outputs: list[list[int]]
    warmup_calls: int
    warmup_seconds: float
    call_ns: float
    calls_per_slot: int
    discarded: int


Samples = Dict[str, object]  # noqa: UP006 - evaluated, and Python 3.8 has no dict[…]
"""The output of a session, as JSON: the raw samples and the device's fingerprint."""


class Runner(Protocol):
    """An opened artifact. A context manager; the device is touched only inside `with`."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *raised: object) -> None: ...

    def infer(self, feeds: Feeds) -> dict[str, Array]:
        """Output name → array for one call; input and output names are the artifact's own."""
        ...

    def time_ns(self, feeds: Sequence[Feeds], samples: int) -> list[int]:
        """Wall time of each of `samples` calls in nanoseconds, rotating through `feeds`, device synchronised."""
        ...


class Unavailable(Exception):
    """A runtime cannot be used on this device."""

    exit_code = EXIT_UNAVAILABLE


class WorkloadRefused(Unavailable):
    """A runtime is there, and cannot do what the schedule wants of it."""

    exit_code = EXIT_WORKLOAD


class VariantError(Exception):
    """A variant cannot be opened, or its outputs are not finite."""


def time_calls_ns(call: Callable[[Feeds], object], feeds: Sequence[Feeds], samples: int) -> list[int]:
    """Wall time of each of `samples` synchronous calls in nanoseconds, rotating through `feeds`."""
    clock = time.perf_counter_ns
    times = []
    for index in range(samples):
        feed = feeds[index % len(feeds)]
        start = clock()
        call(feed)
        times.append(clock() - start)
    return times


def ort_options(ort: Any, threads: int) -> Any:
    """The SessionOptions with which every session of the module `ort` is opened here.

    Threads stop spinning when a call ends. By default they go on for tens of milliseconds, and of several models that are timed
    in turns each would take cores away from the next one.
    """
    options = ort.SessionOptions()
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4  # what fails is raised, and need not be logged as well
    return options


class OrtRunner:
    """ONNX Runtime on the CPU: all graph optimisations, sequential execution, `threads` intra-op threads."""

    def __init__(self, path: str, threads: int) -> None:
        self.path, self.threads = path, threads
        self._session: Any = None

    def __enter__(self) -> Self:
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # read when the library loads
        import onnxruntime as ort

        options = ort_options(ort, self.threads)
        self._session = ort.InferenceSession(self.path, options, providers=["CPUExecutionProvider"])
        return self

    def __exit__(self, *_: object) -> None:
        self._session = None

    def infer(self, feeds: Feeds) -> dict[str, Array]:
        """Output name → array for one call."""
        names = [output.name for output in self._session.get_outputs()]
        return dict(zip(names, self._session.run(None, feeds)))  # noqa: B905  (strict= is Python 3.10)

    def time_ns(self, feeds: Sequence[Feeds], samples: int) -> list[int]:
        """Wall time of each of `samples` calls in nanoseconds."""
        return time_calls_ns(functools.partial(self._session.run, None), feeds, samples)


class FixedBatches(ABC):
    """A file that takes some batches alone: `calls` has what runs each, `shapes` the inputs of each by name; a subclass fills both."""

    def __init__(self, path: str, threads: int) -> None:
        self.path, self.threads = path, threads
        self.calls: dict[int, Callable[[Feeds], dict[str, Array]]] = {}
        self.shapes: dict[int, dict[str, list[int]]] = {}

    def __enter__(self) -> Self:
        self._load()
        return self

    def __exit__(self, *_: object) -> None:
        self.calls, self.shapes = {}, {}

    @abstractmethod
    def _load(self) -> None:
        """Opens the file."""

    def infer(self, feeds: Feeds) -> dict[str, Array]:
        """Output name → array for one call; a batch that the file does not take goes through smaller ones."""
        batch, start, parts = len(next(iter(feeds.values()))), 0, []
        while start < batch:
            size = max((each for each in self.calls if each <= batch - start), default=batch - start)
            part = {name: array[start : start + size] for name, array in feeds.items()}
            parts.append(self._call(part)(part))
            start += size
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def time_ns(self, feeds: Sequence[Feeds], samples: int) -> list[int]:
        """Wall time of each of `samples` calls in nanoseconds, for a batch that the file takes."""
        calls = [self._call(feed) for feed in feeds]
        return time_calls_ns(calls[0], feeds, samples)

    def _call(self, feeds: Feeds) -> Callable[[Feeds], dict[str, Array]]:
        """What takes feeds of these shapes: a runtime itself may resize inputs, and fail later."""
        shapes = {name: list(array.shape) for name, array in feeds.items()}
        batch = next(iter(shapes.values()))[0]
        if self.shapes.get(batch) != shapes:
            raise ValueError(f"it takes {' or '.join(map(str, self.shapes.values()))}, got {shapes}")
        return self.calls[batch]


class LiteRtRunner(FixedBatches):
    """LiteRT on the CPU: XNNPACK with `threads` threads; a file has a signature for each batch. Arrays are copied in and out."""

    def _load(self) -> None:
        from ai_edge_litert.interpreter import Interpreter

        before = os_threads()
        interpreter = Interpreter(model_path=self.path, num_threads=self.threads)
        interpreter.allocate_tensors()
        started, wanted = os_threads() - before, self.threads - 1
        if started < wanted and before:  # it cannot be asked how many it has
            raise WorkloadRefused(f"LiteRT was asked for {self.threads} threads and started {started}, not {wanted}")
        for key in interpreter.get_signature_list():
            call = interpreter.get_signature_runner(key)
            shapes = {name: each["shape"].tolist() for name, each in call.get_input_details().items()}
            batch = next(iter(shapes.values()))[0]
            if batch not in self.calls:  # a file of others may have several, of which the first is what it is known by
                self.calls[batch], self.shapes[batch] = functools.partial(_by_name, call), shapes


def _by_name(call: Callable[..., dict[str, Array]], feeds: Feeds) -> dict[str, Array]:
    return call(**feeds)


class ExecuTorchRunner(FixedBatches):
    """ExecuTorch on the CPU: a .pte file has a method for each batch, and one that names inputs and outputs. Arrays go in uncopied.

    Threads are set for the whole process before a file is opened, and read back. While one is open, none with another count is.
    """

    _threads_in_use: ClassVar[List[int]] = []  # noqa: UP006 - evaluated, and Python 3.8 has no list[…]

    def _load(self) -> None:
        library, runtime = executorch_runtime()
        self._set_threads(library)
        program = runtime.get().load_program(self.path)
        methods = {name: program.load_method(name) for name in program.method_names}
        if PTE_NAMES not in methods:
            raise ValueError("it does not say how its inputs and outputs are called: slimvit did not write it")
        told = json.loads(methods.pop(PTE_NAMES).execute(())[0])
        inputs = [each["name"] for each in told["inputs"]]
        for method in methods.values():
            sizes = [method.metadata.input_tensor_meta(at).sizes() for at in range(len(inputs))]
            self.shapes[sizes[0][0]] = dict(zip(inputs, map(list, sizes)))  # noqa: B905
            self.calls[sizes[0][0]] = functools.partial(_by_place, method, inputs, told["outputs"])
        self._threads_in_use.append(self.threads)
        self.versions = {"executorch": version("executorch")}

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._threads_in_use.remove(self.threads)

    def _set_threads(self, library: Any) -> None:
        if not set(self._threads_in_use) - {self.threads} and library._threadpool_get_thread_count() != self.threads:  # noqa: SLF001
            library._unsafe_reset_threadpool(self.threads)  # noqa: SLF001
        count = library._threadpool_get_thread_count()  # noqa: SLF001
        if count != self.threads:
            raise WorkloadRefused(
                f"ExecuTorch has one number of threads for a process: {self.threads} were asked for, and it runs with {count}"
            )


def executorch_runtime() -> tuple[Any, Any]:
    """(the bindings of ExecuTorch, its runtime), without its compiler: of that they read two decorators, and it takes seconds."""
    compiler = "executorch.exir"
    found = None if compiler in sys.modules else find_spec(compiler)
    if found is not None:
        sys.modules[compiler] = module_from_spec(found)  # a package that is not run, whose modules can be imported
    try:
        with warnings.catch_warnings():  # it says of itself that it is experimental
            warnings.simplefilter("ignore")
            from executorch.extension.pybindings import portable_lib
            from executorch.runtime import Runtime
    finally:
        if found is not None:
            del sys.modules[compiler]
    return portable_lib, Runtime


def _by_place(method: Any, inputs: Sequence[str], outputs: Sequence[str], feeds: Feeds) -> dict[str, Array]:
    import torch

    given = [torch.from_numpy(np.require(feeds[name], requirements=("C", "W"))) for name in inputs]
    return dict(zip(outputs, (each.numpy() for each in method.execute(given))))  # noqa: B905


def os_threads() -> int:
    """How many threads this process has as the system counts them; 0 where it does not tell."""
    tasks = Path("/proc/self/task")
    return sum(1 for _ in tasks.iterdir()) if tasks.is_dir() else 0


OPENERS: Mapping[str, Callable[[str, int], Runner]] = {
    "ort-cpu": OrtRunner,
    "litert-cpu": LiteRtRunner,
    "executorch-xnnpack": ExecuTorchRunner,
}
MODULES: Mapping[str, Sequence[str]] = {
    "ort-cpu": ("numpy", "onnxruntime"),
    "litert-cpu": ("numpy", "ai_edge_litert"),
    "executorch-xnnpack": ("numpy", "torch", "executorch"),
}
"""Runtime → what has to be importable on the device, the runtime itself last; pip knows it by these names too."""


def schedule_digest(schedule: Mapping[str, object]) -> str:
    """sha256 of the schedule's canonical JSON; ties samples to the schedule that they were taken for."""
    return hashlib.sha256(json.dumps(schedule, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def block_orders(names: Sequence[str], blocks: int, seed: int, session: int) -> list[list[str]]:
    """A random permutation of the variants for each block, the same on every Python for the same seed and session."""
    draw = random.Random(f"{seed}/{session}").random  # noqa: S311  (unlike shuffle(), random() is promised never to change)
    return [sorted(names, key=lambda _: draw()) for _ in range(blocks)]


def opening_order(variants: Sequence[VariantSchedule], session: int) -> list[VariantSchedule]:
    """The variants, turned by the session's number, and the first of these once more; one alone is opened once.

    Of identical models in one process the one that was opened last is 1 to 2 % faster (ONNX Runtime 1.32; it stops being so
    when a further one is opened). So a copy that is never timed is opened last; what else the order does turns with it.
    """
    turn = session % len(variants)
    turned = [*variants[turn:], *variants[:turn]]
    return [*turned, *turned[: len(turned) > 1]]


def calls_per_slot(call_ns: float, slot_ms: float) -> tuple[int, int]:
    """(calls, how many of the first are discarded) of one slot, for a model of `call_ns` a call.

    The first call of a slot pays for caches that the variant before it left behind; calls above 1 s do not feel it.
    """
    fill = math.ceil(slot_ms * 1e6 / max(call_ns, 1.0))
    if call_ns < 20e6:
        return max(5, fill), 1
    if call_ns <= 100e6:
        return max(3, fill), 1
    return (2, 1) if call_ns <= 1e9 else (1, 0)


def make_inputs(spec: Inputs) -> list[list[Array]]:
    """`count` input sets, each one array per tensor: standard normal floats, integers in 0…127, random booleans."""
    rng = np.random.default_rng(spec["seed"])

    def array(shape: Sequence[int], dtype: np.dtype[Any]) -> Array:
        if dtype.kind == "f":
            return rng.standard_normal(shape).astype(dtype)
        return rng.integers(0, 2 if dtype.kind == "b" else 128, shape).astype(dtype)

    tensors = [(tensor["shape"], np.dtype(tensor["dtype"])) for tensor in spec["tensors"]]
    return [[array(shape, dtype) for shape, dtype in tensors] for _ in range(spec["count"])]


def feeds_of(variant: VariantSchedule, arrays: Sequence[Array]) -> dict[str, Array]:
    """One input set under a variant's own names, and in its own types where they are others than the schedule's."""
    kinds = variant.get("dtypes", [str(array.dtype) for array in arrays])
    return {name: array.astype(kind, copy=False) for name, array, kind in zip(variant["inputs"], arrays, kinds)}  # noqa: B905


def fingerprint(threads: int, runners: Iterable[object] = ()) -> dict[str, dict[str, object]]:
    """`machine`: what must not change between measurements that are compared; `state`: what may drift.

    Args:
        threads: that a session was asked for.
        runners: that are open; one whose runtime is a process of its own has `versions`, name → version, and its `pid`.
    """
    runners = list(runners)
    cpuinfo = _read("/proc/cpuinfo") or ""
    found = set((_cpu_field(cpuinfo, "flags") or _cpu_field(cpuinfo, "Features") or "").split())
    governors = sorted(set(_read_cpus("cpufreq/scaling_governor")))
    clocks_khz = [float(text) for text in _read_cpus("cpufreq/scaling_cur_freq")]
    clocks_mhz = [khz / 1e3 for khz in clocks_khz] or [float(t) for t in re.findall(r"cpu MHz\s*:\s*([\d.]+)", cpuinfo)]
    throttled = [int(text) for text in _read_cpus("thermal_throttle/core_throttle_count")]
    firmware = next(filter(None, map(_read, Path(PLATFORM).glob(PI_THROTTLED))), None)
    loaded = {name: getattr(sys.modules.get(name), "__version__", None) for name in RUNTIMES}
    for runner in runners:
        loaded.update(getattr(runner, "versions", {}))
    gpus = _nvidia_smi(GPU_MACHINE), _nvidia_smi(GPU_STATE)
    quota = cpu_quota()
    return {
        "machine": {
            "cpu": cpu_model(),
            "flags": sorted(FLAGS & found),
            "cores": os.cpu_count(),
            "affinity": _usable() or None,
            **({"cpu_quota": quota[0]} if quota else {}),
            "governor": ",".join(governors) or None,
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            "python": platform.python_version(),
            "runtimes": {name: version for name, version in loaded.items() if version is not None},
            "threads": threads,
            **({"gpus": gpus[0], "visible_gpus": os.environ.get("CUDA_VISIBLE_DEVICES")} if gpus[0] else {}),
        },
        "state": {
            # Of the fastest core that may be used: on a machine with many of them most are at rest, whatever one thread does.
            "frequency_mhz": round(max(clocks_mhz)) if clocks_mhz else None,
            "load_average": _load_average(),
            "throttle_count": sum(throttled) if throttled else None,
            **({"quota_stops": quota[1]} if quota else {}),
            "cpu_seconds": cpu_seconds(runners),
            **({"throttled_now": int(firmware, 16) & PI_NOW} if firmware and re.fullmatch(PI_HEX, firmware) else {}),
            **({"gpus": gpus[1]} if gpus[1] else {}),
        },
    }


def cpu_seconds(runners: Iterable[object] = ()) -> dict[str, float] | None:
    """Seconds that all processes, and this one with those of its runners, have been on a processor, and the clock.

    None but on Linux.
    """
    first = (_read("/proc/stat") or "").partition("\n")[0].split()
    if not first or first[0] != "cpu":
        return None
    user, nice, system, _idle, _iowait, irq, softirq = (int(text) for text in first[1:8])
    everyone = (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
    own = sum(os.times()[:4]) + sum(map(_process_seconds, _processes(runners)))
    return {"everyone": everyone, "own": own, "clock": time.monotonic()}


def cpu_quota() -> tuple[float, int] | None:
    """(cores, stops) of the least time on processors that a container may take; None where there is no limit.

    A container's own group lies at the root of what it sees; elsewhere every group above this process counts. Each of them may
    stop it: the stops are those of all.
    """
    limits, stops = [], 0
    for line in (_read(OWN_CGROUPS) or "").splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # The kernel names the controllers of a group in another order than the folder does, and links "cpu" to that.
        linked = PurePosixPath(CGROUPS, "cpu")
        root = linked if controllers and Path(linked).is_dir() else PurePosixPath(CGROUPS, controllers)
        below = PurePosixPath(name.lstrip("/"))
        for group in (root / below, *(root / each for each in below.parents)):
            if controllers:
                limit = [_read(f"{group}/cpu.cfs_{kind}_us") or "" for kind in ("quota", "period")]
            else:
                limit = (_read(f"{group}/cpu.max") or "").split()
            if len(limit) == 2 and all(map(str.isdigit, limit)) and int(limit[1]):
                stopped = re.search(r"^nr_throttled (\d+)$", _read(f"{group}/cpu.stat") or "", re.MULTILINE)
                limits.append(int(limit[0]) / int(limit[1]))
                stops += int(stopped.group(1)) if stopped else 0
    return (min(limits), stops) if limits else None


def usable_cores() -> int:
    """How many threads can run at once: one on each core that this process may use, while its container has time for them."""
    cores = len(_usable()) or os.cpu_count() or 1
    quota = cpu_quota()
    # Rounded up on purpose: two threads are right for the time of 1.5 cores, though they are stopped at times.
    return cores if quota is None else min(cores, math.ceil(quota[0]))


def usable_words(usable: int) -> str:
    """What `usable_cores` stands for, in a message."""
    words, quota = f"the {usable} core(s) that a measurement may use here", cpu_quota()
    if quota is None or math.ceil(quota[0]) > usable:
        return words
    return f"{words}, as the container may take the time of {quota[0]:g} core(s)"


def cpu_model() -> str:
    """The processor's name as the system knows it, with the board's where there is a device tree; of the cores that may be used."""
    cpuinfo = _read("/proc/cpuinfo") or ""
    kinds: list[str] = []
    for core in cpuinfo.split("\n\n"):  # Arm's, which may be of several kinds
        part = [_cpu_field(core, field) for field in ("CPU implementer", "CPU part")]
        if any(part) and _cpu_field(core, "processor") in (None, *map(str, _usable())):
            kinds.append(" ".join(filter(None, part)))
    name = _cpu_field(cpuinfo, "model name") or " and ".join(["cpu " + each for each in dict.fromkeys(kinds)])
    if not name and platform.system() == "Darwin":  # where Python calls all of Apple's "arm"
        name = _output(["sysctl", "-n", "machdep.cpu.brand_string"]).strip()
    board = (_read("/proc/device-tree/model") or "").strip("\0")
    return ", ".join(filter(None, [board, name or platform.processor() or platform.machine()]))


def _usable() -> list[int]:
    """The cores that this process may use; none where the system does not tell."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []


def _load_average() -> list[float] | None:
    """The load of the last 1, 5 and 15 minutes; None where the system does not tell, as Windows and Android."""
    try:
        return list(os.getloadavg())
    except (AttributeError, OSError):
        return None


def _output(command: Sequence[str]) -> str:
    """What a program prints; "" where it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


def _nvidia_smi(fields: Sequence[str]) -> list[dict[str, str]]:
    """Those fields of every NVIDIA GPU, as nvidia-smi prints them; none where it is not there or has no answer."""
    printed = _output(["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"])
    rows = [[word.strip() for word in line.split(",")] for line in printed.splitlines() if line.strip()]
    return [dict(zip(fields, row)) for row in rows if len(row) == len(fields)]  # noqa: B905  (strict= is Python 3.10)


def _cpu_field(cpuinfo: str, field: str) -> str | None:
    match = re.search(rf"^{re.escape(field)}\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    return match.group(1).strip() if match else None


def _read(path: str | Path) -> str | None:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def _read_cpus(name: str) -> list[str]:
    """What the system says of each core that this process may use; the others may be of another kind, and do nothing."""
    folder = "/sys/devices/system/cpu"
    return [text for core in _usable() if (text := _read(f"{folder}/cpu{core}/{name}"))]


def run_schedule(
    schedule: Schedule,
    openers: Mapping[str, Callable[[str, int], Runner]] = OPENERS,
    progress: Callable[[float, str], None] = lambda *_: None,
) -> Samples:
    """The raw samples of one session: every variant in this process, blocks of slots in random order.

    Args:
        schedule: of the session.
        openers: runtime → what opens a path for so many threads.
        progress: receives (share done, what was done), never while a slot is timed.

    Raises:
        ValueError: the schedule has another schema, names a runtime that has no opener, or cores that are not there.
        WorkloadRefused: it asks for more threads than there are cores, or for what a runtime cannot do.
        Unavailable: a runtime cannot be used.
        VariantError: a variant cannot be opened or run, or gives outputs that are not finite.
    """
    if schedule.get("schema") != SCHEDULE_SCHEMA:
        raise ValueError(f"this runner reads schedules of schema {SCHEDULE_SCHEMA!r}, got {schedule.get('schema')!r}")
    pin(schedule.get("affinity"), schedule["threads"])
    names = [variant["name"] for variant in schedule["variants"]]
    inputs = make_inputs(schedule["inputs"])
    runners: dict[str, Runner] = {}
    feeds: dict[str, list[Feeds]] = {}
    facts: dict[str, VariantFacts] = {}
    with ExitStack() as stack:
        for variant in opening_order(schedule["variants"], schedule["session"]):
            name, runtime = variant["name"], variant["runtime"]
            if runtime not in openers:
                raise ValueError(f"no opener for runtime {runtime!r}; there are {sorted(openers)}")
            feed: list[Feeds] = [feeds_of(variant, arrays) for arrays in inputs]
            progress(0.0, f"opening {name}")
            try:
                runner = stack.enter_context(openers[runtime](variant["path"], schedule["threads"]))
                outputs = runner.infer(feed[0])
            except Exception as error:
                raise _failed(f"{name} ({variant['path']})", runtime, error) from error
            for output, array in outputs.items():
                if (
                    np.asarray(array).dtype.kind not in "OSU" and not np.isfinite(array).all()
                ):  # names of classes are finite
                    raise VariantError(f"{name} ({variant['path']}): output {output!r} has values that are not finite")
            if name not in runners:  # else it is the last, which is there to be the last
                runners[name], feeds[name] = runner, feed
                facts[name] = {"outputs": [list(np.shape(array)) for array in outputs.values()]}
        before = fingerprint(schedule["threads"], runners.values())
        slots: dict[tuple[str, str], tuple[int, int]] = {}
        for variant in schedule["variants"]:
            name = variant["name"]
            progress(0.0, f"warming up {name}")
            calls, seconds, call_ns = _warm_up(runners[name], feeds[name], schedule["warmup"])
            # One file gets one k: A and its control A' must be sampled alike.
            slot = slots.setdefault((variant["runtime"], variant["path"]), calls_per_slot(call_ns, schedule["slot_ms"]))
            facts[name]["warmup_calls"], facts[name]["warmup_seconds"], facts[name]["call_ns"] = calls, seconds, call_ns
            facts[name]["calls_per_slot"], facts[name]["discarded"] = slot
        blocks = []
        gc.collect()
        gc.disable()  # a collection inside a slot would be charged to whichever variant it hits
        stack.callback(gc.enable)
        for index, order in enumerate(block_orders(names, schedule["blocks"], schedule["seed"], schedule["session"])):
            blocks.append({"order": order, "samples_ns": _block(order, index, runners, feeds, facts)})
            progress((index + 1) / schedule["blocks"], f"block {index + 1}/{schedule['blocks']}")
        after = fingerprint(schedule["threads"], runners.values())
    return {
        "schema": SESSION_SCHEMA,
        "schedule_sha256": schedule_digest(schedule),
        "session": schedule["session"],
        "fingerprint": {"before": before, "after": after},
        "variants": {name: facts[name] for name in names},
        "blocks": blocks,
    }


def run_cold(schedule: Schedule, openers: Mapping[str, Callable[[str, int], Runner]] = OPENERS) -> Samples:
    """What one artifact costs a process that just began: to open it, for the first call, and memory.

    Opening includes loading the runtime. The file was read shortly before, so it comes from the system's cache.

    Args:
        schedule: of the start, with one variant.
        openers: as in `run_schedule`.

    Raises:
        ValueError, Unavailable, VariantError: as `run_schedule`.
    """
    pin(schedule.get("affinity"), schedule["threads"])
    (variant,) = schedule["variants"]
    feeds = feeds_of(variant, make_inputs(schedule["inputs"])[0])
    resident, start = _memory_bytes("VmRSS"), time.perf_counter_ns()
    try:
        with openers[variant["runtime"]](variant["path"], schedule["threads"]) as runner:
            opened = time.perf_counter_ns()
            runner.infer(feeds)
            done = time.perf_counter_ns()
            held = getattr(runner, "device_bytes", None)
            device = None if held is None else held()
            peak = _peak_bytes(runner)
            seen = fingerprint(schedule["threads"], [runner])
    except Exception as error:
        raise _failed(variant["path"], variant["runtime"], error) from error
    return {
        "schema": COLD_SCHEMA,
        "schedule_sha256": schedule_digest(schedule),
        "open_ns": opened - start,
        "first_ns": done - opened,
        "rss_before_bytes": resident,
        "peak_rss_bytes": peak,
        "device_bytes": device,
        "fingerprint": seen,
    }


def _failed(what: str, runtime: str, error: Exception) -> Exception:
    """What to raise for an error of a runner: one passed in may say that the runtime, not the file, is at fault."""
    if isinstance(error, Unavailable):
        return error
    if getattr(error, "exit_code", None) == EXIT_UNAVAILABLE:
        # slimvit has an error of the same name, which this file, alone on a device, cannot import.
        refused = type(error).__name__ == WorkloadRefused.__name__
        return WorkloadRefused(str(error)) if refused else Unavailable(str(error))
    if isinstance(error, ImportError):
        missing = (error.name or "").partition(".")[0]
        modules = " ".join(MODULES.get(runtime, ("numpy", missing)))
        return Unavailable(f"{error}; install what {runtime} needs: {sys.executable} -m pip install {modules}")
    return VariantError(f"{what} does not run on {runtime}: {error}")


def _memory_bytes(field: str, process: str = "self") -> int | None:
    """VmRSS or VmHWM of a process. Not from getrusage: its maximum may be that of the process that started this one."""
    found = re.search(rf"^{field}:\s*(\d+) kB", _read(f"/proc/{process}/status") or "", re.MULTILINE)
    return int(found.group(1)) * 1024 if found else None


def _peak_bytes(runner: object) -> int | None:
    """VmHWM of this process and of a runner's own."""
    own = _memory_bytes("VmHWM")
    return None if own is None else own + sum(_memory_bytes("VmHWM", pid) or 0 for pid in _processes([runner]))


def _processes(runners: Iterable[object]) -> list[str]:
    """The processes that runners have of their own."""
    return [str(pid) for pid in (getattr(runner, "pid", None) for runner in runners) if pid is not None]


def _process_seconds(pid: str) -> float:
    """Seconds that another process has been on a processor; 0 if it is gone."""
    # What stands behind the name, which may hold anything, in brackets: state, parent, …
    fields = (_read(f"/proc/{pid}/stat") or "").rpartition(")")[2].split()
    return sum(map(int, fields[11:13])) / os.sysconf("SC_CLK_TCK")


def pin(cores: Sequence[int] | None, threads: int) -> None:
    """Keeps this process, and the threads that it will start, on some cores; raises WorkloadRefused if these are too few."""
    can_choose = hasattr(os, "sched_setaffinity")
    if cores is not None:
        if not can_choose:
            raise ValueError("this system does not let a process choose its cores; leave affinity out")
        if missing := sorted(set(cores) - os.sched_getaffinity(0)):
            raise ValueError(f"cores {missing} are not there; this process may use {sorted(os.sched_getaffinity(0))}")
        os.sched_setaffinity(0, cores)
    if threads > (usable := usable_cores()):
        raise WorkloadRefused(f"{threads} threads are more than {usable_words(usable)}")


def _warm_up(runner: Runner, feeds: Sequence[Feeds], rule: WarmUp) -> tuple[int, float, float]:
    """(calls, seconds, median ns of the later half of the calls) of a warm-up that meets both minima."""
    times: list[int] = []
    total_ns = 0
    while len(times) < rule["calls"] or total_ns < rule["seconds"] * 1e9:
        times += (chunk := runner.time_ns(feeds, int(rule["calls"])))
        total_ns += sum(chunk)
    return len(times), total_ns / 1e9, float(statistics.median(times[len(times) // 2 :]))


def _block(
    order: Sequence[str],
    index: int,
    runners: Mapping[str, Runner],
    feeds: Mapping[str, Sequence[Feeds]],
    facts: Mapping[str, VariantFacts],
) -> dict[str, list[int]]:
    """Variant → its retained samples in ns. Each block starts at another input, the same for all variants."""
    samples = {}
    for name in order:
        first = index % len(feeds[name])
        times = runners[name].time_ns([*feeds[name][first:], *feeds[name][:first]], facts[name]["calls_per_slot"])
        samples[name] = times[facts[name]["discarded"] :]
    return samples


def altered_files(schedule: Schedule) -> list[str]:
    """Those of the schedule's `files` (path → sha256, relative to the current folder) that are missing or altered."""
    wrong = []
    for name, expected in schedule.get("files", {}).items():
        digest = hashlib.sha256()
        try:
            with Path(name).open("rb") as file:
                for chunk in iter(functools.partial(file.read, 1 << 20), b""):
                    digest.update(chunk)
        except OSError:
            wrong.append(name)
            continue
        if digest.hexdigest() != expected:
            wrong.append(name)
    return wrong


def emulation(machine: str = "", read: Callable[[str], str | None] | None = None) -> str:
    """Why this is no real device, "" if nothing says so: the processor of another machine shows through.

    Args:
        machine: what programs here are for; "" for what Python says.
        read: a file's text or None, of this machine where nothing else is given.
    """
    machine, read = machine or platform.machine(), read or _read
    cpuinfo, arch = read("/proc/cpuinfo") or "", read("/proc/sys/kernel/arch")
    modalias = read("/sys/devices/system/cpu/modalias") or ""
    vendor, name = _cpu_field(cpuinfo, "vendor_id"), _cpu_field(cpuinfo, "model name") or ""
    # Newer emulators write a cpuinfo of their own, but not what the kernel says elsewhere.
    if machine in X86:
        signs = {
            " on an Arm processor": vendor == "VirtualApple" or arch in ARM or modalias.startswith("cpu:type:aarch64"),
            "": "QEMU TCG" in name,
        }
    else:
        x86 = vendor in {"GenuineIntel", "AuthenticAMD"} or arch in X86 or modalias.startswith("cpu:type:x86")
        signs = {" on an x86 processor": x86}
    for where, seen in signs.items():
        if seen:
            return f"programs for {machine} are emulated{where}; latency is never measured there"
    return ""


def _alone(progress: Callable[[float, str], None], wait_s: float = LOCK_WAIT_S) -> Any:
    """An open lock of the current folder, held until this process ends; None if others keep it for longer than `wait_s`."""
    import fcntl

    lock = Path("lock").open("w")  # noqa: SIM115  (it is to stay open)
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                lock.close()
                return None
            progress(0.0, "waiting for another measurement on this device")
            time.sleep(1.0)
        else:
            return lock


def _end_with_stdin() -> None:
    """Ends this process when standard input closes: whoever waits for the samples is gone."""

    def watch() -> None:
        while os.read(0, 4096):
            pass
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(argv: Sequence[str], openers: Mapping[str, Callable[[str, int], Runner]] = OPENERS) -> int:
    """The exit code of a run; progress goes to stderr as `progress SHARE TEXT`, OUT is written atomically."""
    if list(argv) == ["--fingerprint"]:
        sys.stdout.write("\n" + json.dumps(fingerprint(1)) + "\n")
        return 0
    schedule_path, out_path = argv
    streamed = schedule_path == STREAM
    schedule: Schedule = json.loads(
        sys.stdin.readline() if streamed else Path(schedule_path).read_text(encoding="utf-8")
    )

    def progress(fraction: float, text: str) -> None:
        # Also the end of an orphan: with the parent gone this write fails, and nothing disturbs the next measurement.
        sys.stderr.write(f"progress {fraction:.3f} {text}\n")
        sys.stderr.flush()

    if streamed:
        _end_with_stdin()
        try:
            lock = _alone(progress)
        except OSError as error:
            return _refuse(f"cannot write {Path.cwd()}: {error.strerror or error}", EXIT_STORAGE)
        if lock is None:
            return _refuse(f"another measurement has run on this device for {LOCK_WAIT_S / 60:.0f} minutes", EXIT_BUSY)
    if why := emulation():
        return _refuse(why, EXIT_UNAVAILABLE)
    if wrong := altered_files(schedule):
        return _refuse(f"missing, or not the file that the schedule names: {', '.join(wrong)}", EXIT_FILES)
    try:
        cold = schedule.get("schema") == COLD_SCHEDULE_SCHEMA
        result = run_cold(schedule, openers) if cold else run_schedule(schedule, openers, progress)
    except VariantError as error:
        return _refuse(str(error), EXIT_VARIANT)
    except Unavailable as error:
        return _refuse(str(error), error.exit_code)
    except ValueError as error:
        return _refuse(str(error), EXIT_SCHEDULE)
    if streamed:
        sys.stdout.write("\n" + json.dumps(result, separators=(",", ":")) + "\n")
        sys.stdout.flush()
        lock.close()
        return 0
    try:
        _write(Path(out_path), result)
    except OSError as error:
        return _refuse(f"cannot write {out_path}: {error.strerror or error}", EXIT_STORAGE)
    return 0


def _refuse(message: str, code: int) -> int:
    sys.stderr.write(f"{message}\n")
    return code


def _write(path: Path, result: Samples) -> None:
    partial = Path(f"{path}.partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(result, file, separators=(",", ":"))
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
