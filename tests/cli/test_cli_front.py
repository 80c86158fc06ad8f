"""What `slimvit` answers before any verb: its version, and what could come next."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import version

import pytest

from toolchain.cli import main


def test_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"slimvit {version('slimvit')}\n"


def test_a_shell_is_told_the_verbs_and_the_options():
    def told(words):
        asked = {"_SLIMVIT_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        command = [sys.executable, "-m", "toolchain"]
        return subprocess.run(
            command, env={**os.environ, **asked}, capture_output=True, text=True, check=True
        ).stdout.split()

    assert told("slimvit sw") == ["sweep"]
    assert {"--set", "--out"} <= {*told("slimvit run --")}
