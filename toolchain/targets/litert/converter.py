"""The separate Python interpreter that converts to .tflite; its packages conflict with slimvit's."""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from toolchain.errors import ArtifactError, TargetUnavailable
from toolchain.files import expanded
from toolchain.foreign import last_line

PYTHON = "SLIMVIT_LITERT_PYTHON"
"""The environment variable that names it."""
PROGRAM = Path(__file__).with_name("convert_program.py")
PACKAGES = ("torch", "litert-torch", "litert-converter", "ai-edge-quantizer")
LOOK = f"import importlib.metadata as m, json; print(json.dumps({{p: m.version(p) for p in {PACKAGES!r}}}))"


def install() -> str:
    """The lines that make such an interpreter, and name it."""
    version = ".".join(re.findall(r"\d+", torch.__version__)[:2])
    return (
        "python -m venv ~/slimvit-litert && "
        f"~/slimvit-litert/bin/pip install 'torch=={version}.*' 'litert-torch>=0.10' && "
        f"export {PYTHON}=~/slimvit-litert/bin/python"
    )


@dataclass(frozen=True)
class Converter:
    """An interpreter that has what conversion needs.

    Attributes:
        python: its path.
        versions: package → version.
    """

    python: str
    versions: Mapping[str, str]

    @staticmethod
    def found(target: str) -> Converter:
        """The one that the environment variable names.

        Args:
            target: that wants it, for the message.

        Raises:
            TargetUnavailable: none is named, or it lacks a package, or has another torch; with the lines that make one.
        """
        named = os.environ.get(PYTHON, "")
        if not named:
            reason = (
                f".tflite files are converted in an interpreter of its own, which {PYTHON} names, and it is not set."
            )
            raise TargetUnavailable(target, reason, install())
        python = str(expanded(named))
        try:
            done = subprocess.run([python, "-I", "-c", LOOK], capture_output=True, text=True, timeout=120, check=False)
        except (OSError, subprocess.SubprocessError) as error:
            raise TargetUnavailable(
                target, f"{PYTHON} names {named}, which cannot be run: {error}.", install()
            ) from error
        if done.returncode:
            raise TargetUnavailable(
                target,
                f"{named}, which {PYTHON} names, lacks what conversion needs: {_reason(done.stderr)}.",
                install(),
            )
        versions = json.loads(done.stdout)
        ours, theirs = (re.findall(r"\d+", each)[:2] for each in (torch.__version__, versions["torch"]))
        if ours != theirs:
            reason = f"{named}, which {PYTHON} names, has torch {versions['torch']}, and programs come from {torch.__version__}."
            raise TargetUnavailable(target, reason, install())
        return Converter(python, versions)

    def convert(self, folder: Path, what: Path) -> None:
        """Writes model.tflite into a folder that holds a request.

        Args:
            folder: as `convert_program.py` wants it.
            what: is converted, for the message.

        Raises:
            ArtifactError: it cannot be converted.
        """
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        done = subprocess.run(
            [self.python, "-I", str(PROGRAM), str(folder)],
            capture_output=True,
            text=True,
            errors="replace",
            env=environment,
            check=False,
        )
        if done.returncode:
            reason = _reason(done.stderr or done.stdout)
            raise ArtifactError(f"litert-torch {self.versions['litert-torch']} cannot convert {what}: {reason}")


def _reason(text: str) -> str:
    return last_line(text).rstrip(".") or "it said nothing"
