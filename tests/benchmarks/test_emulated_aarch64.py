"""The checks with this machine's Python in place of the emulated one; `slow` really emulates."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import emulated_aarch64
import numpy as np
import pytest
from builders import write_stack
from emulated_aarch64 import QEMU, Emulated, check_model, check_runner

from toolchain.on_device import runner as device_runner
from toolchain.parity import TOLERANCES


class NotEmulated(Emulated):
    """This machine under another name; `spoil` changes the outputs that come back."""

    def __init__(self, work, spoil=lambda values: values):
        super().__init__(work)
        self.spoil = spoil

    def run(self, *arguments, folder):
        environment = {
            **os.environ,
            "PYTHONPATH": str(Path(device_runner.__file__).parent),
            "ORT_DISABLE_TELEMETRY": "1",
        }
        subprocess.run([sys.executable, *map(str, arguments)], check=True, cwd=folder, env=environment)
        if (outputs := self.work / "outputs.npz").exists():
            with np.load(outputs) as found:
                values = {name: self.spoil(found[name]) for name in found.files}
            np.savez(outputs, **values)


@pytest.mark.parametrize(
    ("spoil", "good"),
    [
        (lambda values: values, True),
        (lambda values: values + 1e-3, False),
        (lambda values: values[:, ::-1], False),
        (lambda values: values * np.nan, False),
    ],
)
def test_other_outputs_are_caught(tmp_path, capsys, spoil, good):
    model = write_stack(tmp_path / "m.onnx")
    assert check_model(NotEmulated(tmp_path, spoil), model, [1, 3], TOLERANCES["fp32"]) is good
    assert ("fail" in capsys.readouterr().out) is not good


def test_the_runner_has_to_be_on_another_processor(tmp_path, capsys):
    assert check_runner(NotEmulated(tmp_path)) is False
    assert "WRONG" in capsys.readouterr().out
    assert not (tmp_path / "session" / "out.json").exists(), "what an emulated device timed is thrown away"


def test_a_missing_emulator_is_said_with_the_fix(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    assert emulated_aarch64.main(["m.onnx", "--work", str(tmp_path)]) == 5
    assert "apt-get install qemu-user-static" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(shutil.which(QEMU) is None, reason=f"there is no {QEMU}")
def test_a_model_and_the_runner_are_right_on_emulated_aarch64(tmp_path, capsys):
    model = write_stack(tmp_path / "m.onnx")
    assert emulated_aarch64.main([str(model), "--work", str(tmp_path / "work")]) == 0
    told = capsys.readouterr().out
    assert "aarch64, Python 3" in told
    assert not any(unit in told for unit in (" ms", " ns", " seconds"))
