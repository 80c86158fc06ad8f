"""doctor: what a bug report needs."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

import typer

from toolchain.cli.options import JsonFlag
from toolchain.cli.screen import print_facts, print_json
from toolchain.errors import TargetUnavailable, with_install
from toolchain.version import tool

PACKAGES = (
    "torch",
    "timm",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxsim",
    "onnxscript",
    "accelerate",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "openvino",
    "ai-edge-litert",
    "coremltools",
    "ncnn",
    "pnnx",
    "executorch",
)


def register(app: typer.Typer) -> None:
    """Adds the verb of this file."""
    app.command()(doctor)


def doctor(json_: JsonFlag = False) -> None:
    """What a bug report needs: versions, machine, targets."""
    import psutil
    import torch

    from toolchain.targets import TARGETS

    facts: dict[str, object] = {"slimvit": tool(), "python": platform.python_version(), "system": platform.platform()}
    for name in PACKAGES:
        try:
            facts[name] = version(name)
        except PackageNotFoundError:
            facts[name] = "not installed"
    memory = psutil.virtual_memory()
    facts |= {"cores": psutil.cpu_count(logical=False), "threads": torch.get_num_threads()}
    facts |= {
        "memory": f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free",
        "cuda": torch.cuda.is_available(),
    }
    for name, target in TARGETS.items():
        try:
            info = target.probe()
            details = "; ".join(f"{key}: {value}" for key, value in info.details.items())
            facts[f"target {name}"] = with_install(details or "ready", info.install)
        except TargetUnavailable as error:
            facts[f"target {name}"] = f"unavailable: {with_install(error.reason, error.install)}"
    print_json(facts) if json_ else print_facts(facts)
