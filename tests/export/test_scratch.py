"""What cannot be written is told by the name that was asked for, never by that of a temporary place."""

from __future__ import annotations

import errno
import tempfile

import numpy as np
import onnx
import pytest
from builders import write_classifier

from toolchain.artifacts.onnx_file import OnnxFile
from toolchain.errors import ArtifactError, StorageError, fault_words
from toolchain.export.engine import BuildEngine
from toolchain.export.precision import PRECISIONS
from toolchain.export.scratch import folder_beside, standing_for
from toolchain.files import write_text
from toolchain.model import run_stage
from toolchain.recipe import EngineSection

FULL = "No space left on device"
ADVISED = fault_words(OSError(errno.ENOSPC, FULL))


def no_room(*_, **__):
    raise OSError(errno.ENOSPC, FULL)


def test_a_file_within_a_folder_within_another_is_told_by_the_path_that_was_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("toolchain.files.os.fsync", no_room)
    path = tmp_path / "m.onnx"
    with pytest.raises(StorageError) as caught, folder_beside(path) as outer, folder_beside(outer / "x") as inner:
        write_text(inner / "graph", "")
    assert str(caught.value) == f"cannot write {path}: {ADVISED}"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "error",
    [
        StorageError("cannot read pictures/a.png: Input/output error"),
        ArtifactError("a.onnx is no model"),
        OSError(errno.EIO, "Input/output error", "pictures/a.png"),
    ],
)
def test_what_goes_wrong_elsewhere_is_told_as_it_is(tmp_path, error):
    with pytest.raises(type(error)) as caught, standing_for(tmp_path / "a", tmp_path / "b"):
        raise error
    assert caught.value is error


def test_an_openvino_model_that_cannot_be_written_is_told_by_its_folder(tmp_path, monkeypatch):
    ov = pytest.importorskip("openvino")
    write_classifier(tmp_path / "m.onnx")

    def fail(*_, **__):
        raise RuntimeError("basic_ios::clear: iostream error")

    monkeypatch.setattr(ov, "save_model", fail)
    stage = BuildEngine(EngineSection(targets=("openvino-cpu",)), "openvino-cpu", tmp_path / "engine")
    with pytest.raises(StorageError) as caught:
        run_stage(stage, OnnxFile(tmp_path / "m.onnx"))
    assert str(caught.value).startswith(
        f"cannot write {tmp_path / 'engine'}: OpenVINO says 'basic_ios::clear: iostream error'; see"
    )
    assert [each.name for each in tmp_path.iterdir()] == ["m.onnx"]


def test_no_room_for_what_a_quantiser_reads_names_the_place_and_the_variable(tmp_path, monkeypatch):
    write_classifier(tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx")
    monkeypatch.setattr(onnx, "save_model", no_room)
    with pytest.raises(
        StorageError, match=rf"^{tempfile.gettempdir()} has no room .*, or set TMPDIR to a folder that has more"
    ):
        PRECISIONS["int8-dynamic"].convert(model, np.zeros((1, 3, 8, 8), np.float32))
