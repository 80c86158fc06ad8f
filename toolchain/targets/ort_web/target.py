"""ONNX Runtime Web, in Node: the wasm that browsers run on the CPU, and the ONNX file as it is."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from pathlib import Path

from toolchain.errors import ArtifactError, StorageError, TargetUnavailable
from toolchain.files import read_json, user_cache
from toolchain.on_device.runner import Runner, cpu_model
from toolchain.shell import word
from toolchain.targets.base import Target, TargetInfo, TargetProfile
from toolchain.targets.ort_web.child import Installed, NodeRunner

NAME, PACKAGE = "ort-web", "onnxruntime-web"
FOLDER = "SLIMVIT_ORT_WEB"
"""The environment variable that names the folder in which the package is installed."""
OLDEST_NODE = 18
PINNED = "package.json"
"""What npm installs from, with its lock file; both lie beside this file."""
WASM = "dist/ort-wasm-simd-threaded.wasm"
"""What a page downloads beside the model: the build that runs on the CPU alone, in Node and in browsers."""


def install_folder() -> Path:
    """Where onnxruntime-web is expected: SLIMVIT_ORT_WEB, else ort-web in slimvit's cache folder."""
    return Path(os.environ.get(FOLDER) or user_cache() / NAME)


def install_line() -> str:
    """What a user runs to have it there: exactly the versions of the lock file, and no script of theirs."""
    folder, here = word(install_folder()), word(Path(__file__).parent)
    return f"mkdir -p {folder} && cp {here}/package*.json {folder} && npm ci --ignore-scripts --prefix {folder}"


@functools.cache
def pinned_version() -> str:
    """The version of onnxruntime-web that is installed and tested."""
    return str(read_json(Path(__file__).with_name(PINNED))["dependencies"][PACKAGE])


@functools.cache
def node_version(node: str) -> str:
    """The version that a program called node reports; "" if it does not answer."""
    try:
        done = subprocess.run([node, "--version"], capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().removeprefix("v")


def installed() -> Installed:
    """Node and the package as they are here; raises TargetUnavailable where one is missing or is another version."""
    node = shutil.which("node")
    if node is None:
        raise TargetUnavailable(
            NAME, f"there is no program node; it needs Node.js {OLDEST_NODE} or newer", "apt-get install nodejs npm"
        )
    version = node_version(node)
    major = re.match(r"\d+", version)
    if major is None or int(major[0]) < OLDEST_NODE:
        raise TargetUnavailable(
            NAME,
            f"{node} is Node.js {version or 'of no known version'}; it needs {OLDEST_NODE} or newer",
            "apt-get install nodejs npm",
        )
    folder = install_folder()
    record = folder / "node_modules" / PACKAGE / "package.json"
    try:
        there = str(read_json(record)["version"])
    except (StorageError, ArtifactError, KeyError, TypeError):
        raise TargetUnavailable(NAME, f"{PACKAGE} is not installed in {folder}", install_line()) from None
    if there != pinned_version():
        reason = f"{folder} holds {PACKAGE} {there}; {pinned_version()} is what slimvit runs"
        raise TargetUnavailable(NAME, reason, install_line())
    if not record.with_name("dist").is_dir() or not (record.parent / WASM).is_file():
        raise TargetUnavailable(NAME, f"{PACKAGE} in {folder} lacks {WASM}", install_line())
    return Installed(node, folder, {PACKAGE: there, "node": version})


class OrtWeb(Target):
    """Target "ort-web". Multiples of 4 fill a vector of wasm's SIMD, which has 128 bits."""

    name = NAME
    profile = TargetProfile({"mlp_hidden": 4, "head_dim": 4, "rank": 4})
    takes = ("onnx",)
    measures = True
    exact_fp32 = True
    loads = ("FLOAT", "HALF", "INT8", "INT8-DYNAMIC", "INT4-DYNAMIC")

    def probe(self) -> TargetInfo:
        """The runtime, the CPU, and the wasm that a page downloads; raises TargetUnavailable with the line that installs it."""
        found = installed()
        details = {"node": found.versions["node"], "wasm": Path(WASM).name, "wasm_bytes": str(_wasm_bytes(found))}
        return TargetInfo(self.name, PACKAGE, found.versions[PACKAGE], cpu_model(), details)

    def runtime_download(self) -> tuple[str, int]:
        """The wasm; raises TargetUnavailable where it is not installed."""
        return Path(WASM).name, _wasm_bytes(installed())

    def _open(self, path: Path, threads: int) -> Runner:
        """A runner of the ONNX file; raises ArtifactError on entry if it cannot be loaded."""
        return NodeRunner(path, threads, installed(), target=self.name)


def _wasm_bytes(found: Installed) -> int:
    return (found.folder / "node_modules" / PACKAGE / WASM).stat().st_size


ORT_WEB = OrtWeb()
