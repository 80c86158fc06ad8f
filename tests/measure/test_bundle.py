"""The device is a folder into which the tar is unpacked; `slow` runs it in virtual environments of its own."""

import io
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from builders import write_stack

from toolchain.errors import ArtifactError, MeasurementError, ParityError, RecipeError, StorageError
from toolchain.measure.bundle import Question, pack, unpack
from toolchain.measure.compare import compare
from toolchain.measure.comparison import Comparison
from toolchain.measure.samples import Design, Workload
from toolchain.on_device.bundle_run import body_sha256, lacks

pytestmark = pytest.mark.clock

QUESTION = Question(
    "ort-cpu",
    Workload(batch=4, input_shape=(96,)),
    Design(sessions=2, blocks=4, slot_ms=2.0, warmup_s=0.02, tau=0.6, looks=1),
)


def pythons():
    """This interpreter, and the oldest that devices may have if it is here and starts."""
    old = shutil.which("python3.8")
    starts = old is not None and subprocess.run([old, "-V"], capture_output=True).returncode == 0
    return [sys.executable, old] if starts else [sys.executable]


def measure_there(bundle, folder, python=sys.executable, code=0):
    """The folder into which the bundle was unpacked and run, by what stands in its README."""
    folder.mkdir(exist_ok=True)
    with tarfile.open(bundle) as tar:
        tar.extractall(folder, filter="data")
    ended = subprocess.run(
        ["sh", "run.sh"], cwd=folder, env={"PATH": "/usr/bin:/bin", "PYTHON": python}, capture_output=True, text=True
    )
    assert ended.returncode == code, ended.stderr
    return folder, ended.stderr


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """(a, b, the bundle, the folder of the device with its result)."""
    root = tmp_path_factory.mktemp("bundle")
    a, b = write_stack(root / "a.onnx"), write_stack(root / "b.onnx", layers=8)
    bundle = root / "bundle.tar"
    pack(a, b, bundle, QUESTION)
    folder, _ = measure_there(bundle, root / "device")
    return a, b, bundle, folder


@pytest.fixture
def result(packed, tmp_path):
    """A copy of the result that a test may spoil; written back by `spoil`."""
    return Path(shutil.copy(packed[3] / "result.json", tmp_path / "result.json"))


def spoil(path, change, *, signed=False):
    """Changes a result; `signed` also corrects its own sha256, as someone would who knows about it."""
    content = json.loads(path.read_text())
    change(content)
    if signed:
        content["sha256"] = body_sha256(content)
    path.write_text(json.dumps(content))
    return path


def rewrite(bundle, out, change):
    """A copy of a tar whose (name → bytes) went through `change`."""
    with tarfile.open(bundle) as tar:
        content = {entry.name: tar.extractfile(entry).read() for entry in tar}
    change(content)
    with tarfile.open(out, "w") as tar:
        for name, raw in content.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(raw)
            tar.addfile(entry, io.BytesIO(raw))
    return out


def test_what_comes_back_is_the_usual_comparison(packed, tmp_path):
    a, b, bundle, folder = packed
    found = unpack(folder / "result.json", bundle)
    local = compare(a, b, QUESTION.runtime, QUESTION.workload, QUESTION.design)
    assert (found.design, found.scenario, found.artifacts) == (local.design, local.scenario, local.artifacts)
    assert [[block.order for block in session.blocks] for session in found.sessions] == [
        [block.order for block in session.blocks] for session in local.sessions
    ]
    found.save(tmp_path / "comparison.json")
    assert Comparison.load(tmp_path / "comparison.json").verdict == found.verdict
    with tarfile.open(tmp_path / "result.tar.gz", "w:gz") as tar:
        tar.add(folder / "result.json", "device/result.json")
    assert unpack(tmp_path / "result.tar.gz", bundle).to_dict() == found.to_dict()


def test_a_bundle_is_the_same_bytes_every_time(packed, tmp_path):
    a, b, bundle, _ = packed
    (tmp_path / "elsewhere").mkdir()
    copies = [Path(shutil.copy(path, tmp_path / "elsewhere" / path.name)) for path in (a, b)]
    pack(*copies, tmp_path / "again.tar", QUESTION)
    assert (tmp_path / "again.tar").read_bytes() == bundle.read_bytes()
    with tarfile.open(bundle) as tar:
        entries = tar.getmembers()
    assert [entry.name for entry in entries] == sorted(entry.name for entry in entries)
    assert {(entry.mtime, entry.uid, entry.gid, entry.uname) for entry in entries} == {(0, 0, 0, "")}
    assert str(tmp_path) not in bundle.read_bytes().decode(errors="replace")


def test_a_device_that_was_cut_off_goes_on(packed, tmp_path):
    _, _, bundle, finished = packed
    folder, told = measure_there(bundle, tmp_path / "device")
    assert "session 1/2" in told
    first, second = json.loads((folder / "result.json").read_text())["sessions"]
    assert not (folder / "sessions").exists()
    (folder / "result.json").unlink()
    (folder / "sessions").mkdir()
    (folder / "sessions" / f"{first['schedule_sha256']}.json").write_text(json.dumps(first))
    _, told = measure_there(bundle, folder)
    assert "session 1/2" not in told
    assert "session 2/2" in told
    kept, anew = json.loads((folder / "result.json").read_text())["sessions"]
    assert kept == first
    assert anew["blocks"] != second["blocks"]
    assert unpack(folder / "result.json", bundle).design == unpack(finished / "result.json", bundle).design


def test_another_run_on_the_device_measures_anew(packed, tmp_path):
    _, _, bundle, _ = packed
    folder, _ = measure_there(bundle, tmp_path / "device")
    before = json.loads((folder / "result.json").read_text())
    _, told = measure_there(bundle, folder)
    assert "session 1/2" in told
    assert json.loads((folder / "result.old.json").read_text()) == before
    after = json.loads((folder / "result.json").read_text())
    assert all(one["blocks"] != two["blocks"] for one, two in zip(before["sessions"], after["sessions"], strict=True))


def test_the_device_refuses_a_bundle_that_is_not_whole(packed, tmp_path):
    def alter(content):
        name = next(name for name in content if name.endswith("b.onnx"))
        content[name] = content[name][:-1] + b"\0"

    altered = rewrite(packed[2], tmp_path / "altered.tar", alter)
    folder, told = measure_there(altered, tmp_path / "device", code=4)
    assert "missing or altered: artifacts/" in told
    assert not (folder / "result.json").exists()


@pytest.mark.parametrize(
    ("change", "signed", "error", "words"),
    [
        (lambda r: r["sessions"][0]["blocks"][0]["samples_ns"]["B"].__setitem__(0, 1), False, ArtifactError, "altered"),
        (lambda r: r.update(bundle="0" * 64), True, ArtifactError, "another bundle"),
        (lambda r: r.update(schema="other"), True, ArtifactError, "schema 'other'"),
        (lambda r: r["sessions"].pop(), True, MeasurementError, "no samples for session 2"),
        (
            lambda r: r["sessions"][1].update(schedule_sha256="0" * 64),
            True,
            MeasurementError,
            "no samples for session 2",
        ),
        (lambda r: r["sessions"][1].pop("schedule_sha256"), True, ArtifactError, "digest of their schedule"),
        (lambda r: r["sessions"][0]["blocks"].pop(), True, MeasurementError, "blocks"),
        (lambda r: r["sessions"][0]["blocks"][0]["order"].reverse(), True, MeasurementError, "order"),
        (lambda r: r["sessions"][0].update(session=1), True, MeasurementError, "session"),
        (lambda r: r["sessions"][0]["variants"]["B"].update(outputs=[[4, 10]]), True, ParityError, "outputs"),
        (
            lambda r: r["sessions"][0]["fingerprint"]["before"]["machine"].update(governor="other"),
            True,
            MeasurementError,
            "the machine changed",
        ),
    ],
)
def test_a_spoiled_result_is_refused_with_the_reason(packed, result, change, signed, error, words):
    with pytest.raises(error, match=words):
        unpack(spoil(result, change, signed=signed), packed[2])


def test_truncated_files_are_refused(packed, result, tmp_path):
    whole = result.read_bytes()
    result.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtifactError, match="truncated or no JSON"):
        unpack(result, packed[2])
    with pytest.raises(StorageError, match="gone"):
        unpack(tmp_path / "gone.json", packed[2])
    result.write_bytes(whole)
    half = tmp_path / "half.tar"
    half.write_bytes(packed[2].read_bytes()[: packed[2].stat().st_size // 2])
    with pytest.raises(ArtifactError, match="no bundle, or is truncated"):
        unpack(result, half)


def test_another_or_altered_bundle_is_refused(packed, result, tmp_path):
    a, b, bundle, _ = packed
    pack(b, a, tmp_path / "other.tar", QUESTION)
    with pytest.raises(ArtifactError, match="answers another bundle"):
        unpack(result, tmp_path / "other.tar")

    def swap_artifact(content):
        name = next(name for name in content if name.endswith("b.onnx"))
        content[name] = write_stack(tmp_path / "x.onnx").read_bytes()

    with pytest.raises(ArtifactError, match=r"was altered: artifacts/.*b\.onnx"):
        unpack(result, rewrite(bundle, tmp_path / "swapped.tar", swap_artifact))

    def looser(content):  # a wider tolerance, asked for after the fact
        content["bundle.json"] = content["bundle.json"].replace(b'"tau": 0.6', b'"tau": 0.9')

    with pytest.raises(ArtifactError, match="answers another bundle"):
        unpack(result, rewrite(bundle, tmp_path / "looser.tar", looser))


@pytest.mark.parametrize("name", ["../escaped", "/escaped", "artifacts/../../escaped", "", "."])
def test_a_bundle_never_writes_outside_of_its_folder(packed, result, tmp_path, name):
    def plant(content):
        facts = json.loads(content["bundle.json"])
        facts["files"][name] = facts["files"].pop("README.txt")
        content["bundle.json"] = json.dumps(facts).encode()
        content[name] = content.pop("README.txt")

    with pytest.raises(ArtifactError, match="lies outside of it"):
        unpack(result, rewrite(packed[2], tmp_path / "planted.tar", plant))
    assert not list(tmp_path.rglob("escaped"))


def test_a_link_in_a_bundle_is_refused(packed, result, tmp_path):
    with tarfile.open(packed[2]) as tar, tarfile.open(tmp_path / "link.tar", "w") as planted:
        for entry in tar:
            if entry.name.endswith("b.onnx"):
                entry.type, entry.linkname, entry.size = tarfile.SYMTYPE, "/etc/passwd", 0
            planted.addfile(entry, tar.extractfile(entry.name) if entry.isreg() else None)
    with pytest.raises(ArtifactError, match="no ordinary file"):
        unpack(result, tmp_path / "link.tar")


def test_a_python_that_lacks_a_library_says_what_brings_it(packed, tmp_path):
    bare = tmp_path / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(bare)], check=True)
    python = str(bare / "bin" / "python")
    folder, told = measure_there(packed[2], tmp_path / "device", python, code=5)
    assert f"numpy and onnxruntime cannot be imported; {python} -m pip install numpy onnxruntime" in told
    assert not (folder / "sessions").exists()


def test_a_python_that_is_too_old_to_read_the_program_is_told_so(packed, tmp_path):
    """Kind: Ubuntu 18.04 on a Jetson, whose Python 3.6 saw nothing but a syntax error."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\n[ "$1" = -c ] || exec {sys.executable} "$@"\n'
        f"exec {sys.executable} -c \"import sys; sys.version_info, sys.version = (3, 6, 9), '3.6.9 (default)'\n$2\"\n"
    )
    python.chmod(0o755)
    folder, told = measure_there(packed[2], tmp_path / "device", str(python), code=5)
    assert "Python 3.6.9 is too old, 3.8 or newer is needed" in told
    assert not (folder / "sessions").exists()
    _, told = measure_there(packed[2], tmp_path / "device", "no-such-python", code=5)
    assert "no-such-python" in told


def test_what_the_device_lacks_is_what_the_bundle_needs():
    assert lacks(["numpy"]) == ""
    assert "no_such_runtime cannot be imported" in lacks(["numpy", "no_such_runtime"])
    assert lacks(["numpy", "no_such_runtime"]).endswith("-m pip install numpy no_such_runtime")


def test_what_does_not_fit_is_refused_before_anything_is_written(packed, tmp_path):
    a = packed[0]
    narrow = write_stack(tmp_path / "narrow.onnx", width=64)
    with pytest.raises((ParityError, RecipeError)):
        pack(a, narrow, tmp_path / "no.tar", QUESTION)
    assert not (tmp_path / "no.tar").exists()


@pytest.mark.slow
@pytest.mark.parametrize("python", pythons(), ids=lambda path: Path(path).name)
def test_the_runner_needs_numpy_and_onnxruntime_and_nothing_else(packed, tmp_path, python):
    """Needs a package index: a virtual environment with these two alone, and Python 3.8 where there is one."""
    venv = tmp_path / "venv"
    subprocess.run([python, "-m", "venv", str(venv)], check=True)
    pip = [str(venv / "bin/python"), "-m", "pip", "--disable-pip-version-check", "--quiet"]
    subprocess.run([*pip, "install", "numpy", "onnxruntime"], check=True)
    _, _, bundle, _ = packed
    folder, _ = measure_there(bundle, tmp_path / "device", str(venv / "bin/python"))
    found = unpack(folder / "result.json", bundle)
    version = subprocess.run([str(venv / "bin/python"), "-V"], capture_output=True, text=True).stdout.split()[1]
    assert found.environment["python"] == version
    assert set(found.environment["runtimes"]) == {"numpy", "onnxruntime"}
