"""Processors that tests play: what the project learns about the CPU comes from here, and kernels are kept to its instructions.

A played CPU takes instructions away and adds none, so this machine can compute what is computed under it. ONNX Runtime asks
the real processor and cannot be told otherwise.
"""

from __future__ import annotations

import builtins
import io
import os
import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from typing import Any

VARIABLE = "SLIMVIT_TEST_CPU"
AVX2 = "fpu sse2 ssse3 fma sse4_1 sse4_2 avx f16c avx2 bmi2"
VNNI = f"{AVX2} avx512f avx512dq avx512cd avx512bw avx512vl avx512_vnni"
AMX = f"{VNNI} avx_vnni avx512_bf16 avx512_fp16 amx_tile amx_int8 amx_bf16"
ARM = "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp"
X86_FILES = {"/proc/sys/kernel/arch": "x86_64\n", "/sys/devices/system/cpu/modalias": "cpu:type:x86,ven0000fam0006\n"}
ARM_FILES = {"/proc/sys/kernel/arch": "aarch64\n", "/sys/devices/system/cpu/modalias": "cpu:type:aarch64:feature:\n"}
Set = Callable[[Any, str, Any], None]


def x86_cpuinfo(model: str, flags: str) -> str:
    """/proc/cpuinfo of one core of an Intel processor."""
    return (
        f"processor\t: 0\nvendor_id\t: GenuineIntel\nmodel name\t: {model}\ncpu MHz\t\t: 2000.0\nflags\t\t: {flags}\n\n"
    )


@dataclass(frozen=True)
class Cpu:
    """One that is played.

    Attributes:
        machine: what `platform.machine` says.
        files: path → what Python reads from it.
        bf16: whether OpenVINO says that it multiplies in bf16, if the real one does.
        emulates_bf16: whether OpenVINO computes bf16 with instructions for fp32 when it is asked to, instead of fp32.
        environment: variables that keep libraries to its instructions; for a real x86 processor.
    """

    machine: str
    files: Mapping[str, str]
    bf16: bool
    emulates_bf16: bool
    environment: Mapping[str, str]


def _x86(model: str, flags: str, *, bf16: bool, emulates_bf16: bool, **environment: str) -> Cpu:
    files = {**X86_FILES, "/proc/cpuinfo": x86_cpuinfo(model, flags)}
    return Cpu("x86_64", files, bf16, emulates_bf16, environment)


CPUS: Mapping[str, Cpu] = {
    "avx2": _x86(
        "Intel(R) Core(TM) i7-4770 CPU @ 3.40GHz",
        AVX2,
        bf16=False,
        emulates_bf16=False,
        ONEDNN_MAX_CPU_ISA="AVX2",
        MKL_ENABLE_INSTRUCTIONS="AVX2",
        ATEN_CPU_CAPABILITY="avx2",
        OPENBLAS_CORETYPE="Haswell",
    ),
    "avx512-vnni": _x86(
        "Intel(R) Xeon(R) Gold 6248 CPU @ 2.50GHz",
        VNNI,
        bf16=False,
        emulates_bf16=True,
        ONEDNN_MAX_CPU_ISA="AVX512_CORE_VNNI",
        MKL_ENABLE_INSTRUCTIONS="AVX512",
    ),
    "amx": _x86("Intel(R) Xeon(R) Platinum 8480+", AMX, bf16=True, emulates_bf16=True),
    "arm": Cpu(
        "aarch64",
        {
            **ARM_FILES,
            "/proc/cpuinfo": f"processor\t: 0\nFeatures\t: {ARM}\nCPU implementer\t: 0x41\nCPU part\t: 0xd0b\n\n",
            "/proc/device-tree/model": "Raspberry Pi 5 Model B Rev 1.0\0",
        },
        bf16=False,
        emulates_bf16=False,
        environment={"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "default", "OPENBLAS_CORETYPE": "Nehalem"},
    ),
}


def play(cpu: Cpu, patch: Any = None) -> None:
    """Lets this process take its CPU for another one; until it ends, or with pytest's `MonkeyPatch` until that is undone."""
    put = setattr if patch is None else patch.setattr
    real = builtins.open

    def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        text = cpu.files.get(os.fspath(file)) if isinstance(file, str | os.PathLike) else None
        if text is None:
            return real(file, mode, *args, **kwargs)
        return io.BytesIO(text.encode()) if "b" in mode else io.StringIO(text)

    put(builtins, "open", opened)
    put(io, "open", opened)
    put(platform, "machine", lambda: cpu.machine)
    if "openvino" in sys.modules:
        _limit(sys.modules["openvino"], cpu, put)
    else:
        put(sys, "meta_path", [_Import(cpu), *sys.meta_path])


class _Import(MetaPathFinder):
    """Lets OpenVINO know only the played CPU once it is imported, which it need never be."""

    def __init__(self, cpu: Cpu) -> None:
        self._cpu = cpu

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname == "openvino" else None
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            load(module)
            _limit(module, self._cpu, setattr)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _limit(openvino: Any, cpu: Cpu, put: Set) -> None:
    """What it says of the CPU, and what it makes of the hint bf16, as it was seen to do on such processors."""
    get_property, compile_model = openvino.Core.get_property, openvino.Core.compile_model

    def able(core: Any, *names: Any) -> Any:
        found = get_property(core, *names)
        return [name for name in found if cpu.bf16 or name != "BF16"] if "OPTIMIZATION_CAPABILITIES" in names else found

    def compiled(core: Any, model: Any, device: str, config: Mapping[str, Any]) -> Any:
        if config.get("INFERENCE_PRECISION_HINT") == "bf16" and not cpu.emulates_bf16:
            config = {**config, "INFERENCE_PRECISION_HINT": "f32"}
        return compile_model(core, model, device, config)

    put(openvino.Core, "get_property", able)
    put(openvino.Core, "compile_model", compiled)
