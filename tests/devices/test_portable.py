import onnx
import pytest
from builders import write_stack

from toolchain.devices.portable import FOLDER, Portable
from toolchain.errors import MeasurementError
from toolchain.files import sha256
from toolchain.measure.experiment import artifact_facts


def schedule(**paths):
    return {"seed": 1, "variants": [{"name": name, "path": str(path)} for name, path in paths.items()]}


def test_a_schedule_is_the_same_wherever_its_artifacts_lie(tmp_path):
    schedules = []
    for place in ("here", "there"):
        (tmp_path / place).mkdir()
        a = write_stack(tmp_path / place / "a.onnx")
        b = write_stack(tmp_path / place / "b.onnx", layers=5)
        schedules.append(Portable().of(schedule(A=a, B=b, C=a)).schedule)
    assert schedules[0] == schedules[1]
    assert str(tmp_path) not in str(schedules[0])
    first, second, third = (variant["path"] for variant in schedules[0]["variants"])
    assert first == third != second
    assert schedules[0]["files"] == {first: sha256(a), second: sha256(b)}, "a device can check what it runs"


def test_an_artifact_of_several_files_keeps_their_names_below_one_digest(tmp_path):
    graph = write_stack(tmp_path / "small.onnx")
    (tmp_path / "big").mkdir()
    big = tmp_path / "big" / "m.onnx"
    onnx.save(onnx.load(graph), big, save_as_external_data=True, location="m.onnx.data", size_threshold=0)
    (tmp_path / "big" / "unrelated.txt").touch()
    found = Portable().of(schedule(A=big))
    folder = f"{FOLDER}/{artifact_facts(big).sha256}"
    assert found.sources == {f"{folder}/m.onnx": big, f"{folder}/m.onnx.data": big.with_name("m.onnx.data")}
    assert found.schedule["files"] == {name: sha256(path) for name, path in found.sources.items()}


def test_an_artifact_that_changes_while_it_is_measured_is_refused(tmp_path):
    path = write_stack(tmp_path / "a.onnx")
    portable = Portable()
    portable.of(schedule(A=path))
    portable.of(schedule(A=path))
    write_stack(path, layers=5)
    with pytest.raises(MeasurementError, match=r"a\.onnx changed while it was measured"):
        portable.of(schedule(A=path))
    path.unlink()
    with pytest.raises(MeasurementError, match="changed"):
        portable.of(schedule(A=path))
