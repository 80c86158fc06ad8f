"""What every target owes, whichever it is: parametrised over the table, so a new one is tested at once."""

from __future__ import annotations

import copy
import importlib
import os
import platform
from functools import cache
from importlib.util import find_spec

import numpy as np
import played
import pytest
from builders import TINY, Refusing, dense_model, write_stack
from played.cpus import CPUS, VARIABLE, play
from sweeps import swept

from toolchain.artifacts import open_artifact
from toolchain.artifacts.model_folder import ModelFolder
from toolchain.artifacts.onnx_file import OnnxFile
from toolchain.devices.transport import LocalTransport
from toolchain.devices.worker import PRODUCTS
from toolchain.errors import ArtifactError, RecipeError, StorageError, TargetUnavailable
from toolchain.export.calls import torch_call
from toolchain.export.onnx_graph import export_onnx
from toolchain.on_device.runner import SCHEDULE_SCHEMA, emulation, fingerprint
from toolchain.progress import SILENT
from toolchain.surgery.replay import save_model
from toolchain.targets import TARGETS, BuildOptions, Interpreted, Profiled, Refittable, Target, get_target
from toolchain.targets.mode import Mode

EVERY_TARGET = pytest.mark.parametrize("name", list(TARGETS))
USUAL_TARGET = pytest.mark.parametrize("name", swept(TARGETS, {*TARGETS} - {"executorch-xnnpack"}))
"""Of those that open a file: the first program of ExecuTorch takes as long as all other targets together."""
TOLERANCE = {"openvino-cpu-bf16": 5e-2, "trt": 2e-2, "trt-rtx": 2e-2}  # bf16; TF32 products

ALL = sorted(name + mode.suffix for name, target in TARGETS.items() for mode in target.modes or (Mode(),))


@cache
def model():
    return dense_model(**{**TINY, "depth": 1})


@pytest.fixture(params=["real", *CPUS])
def cpu(request, monkeypatch):
    """The name of the processor that this process plays: the real one, or one of those that CI may meet."""
    if request.param in CPUS:
        if find_spec("openvino"):
            importlib.import_module("openvino")  # or it would stay limited after the test
        play(CPUS[request.param], monkeypatch)
    return request.param


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """(model folder, ONNX file) of one tiny model."""
    folder = tmp_path_factory.mktemp("target-contract")
    onnx = folder / "tiny.onnx"
    export_onnx(model().module, onnx, input_size=(3, 32, 32), opset=20, metadata={}, simplify=True)
    return save_model(model(), folder / "tiny"), onnx


def there(name):
    """The target; skips the test, with the target's own reason, where it cannot run."""
    target = get_target(name)
    try:
        target.require_run()
    except TargetUnavailable as error:
        pytest.skip(str(error))
    return target


def probed(target):
    """What its probe tells, or the reason why it is unavailable."""
    try:
        return target.probe()
    except TargetUnavailable as error:
        return error


def artifact(name, artifacts):
    """What a target opens of the tiny model; where that is what it built itself, with a signature for batches of 1 to 3."""
    folder, onnx = artifacts
    takes = get_target(name).takes
    if OnnxFile.name in takes:
        return onnx
    return folder if ModelFolder.name in takes else engine(name, onnx).path


def engine(name, onnx):
    """What a target builds for batches of 1 to 3."""
    return built(name, onnx, onnx.parent / name, batches(name, (1, 2, 3)))


def batches(name, wanted):
    """The batches of (smallest, usual, largest) that engines of a target take: those that are wanted, or the only ones it knows."""
    only = get_target(name).batches(BuildOptions(wanted))
    return wanted if only is None or only[-1] == wanted[-1] else (only[0], only[0], only[-1])


@cache
def built(name, onnx, folder, batch):
    """What a target builds; skips the test, with the target's own reason, where it only runs files here."""
    folder.mkdir()
    try:
        return get_target(name).build(onnx, folder, BuildOptions(batch))
    except TargetUnavailable as error:
        folder.rmdir()
        pytest.skip(str(error))


def images(batch, seed=0):
    return np.random.default_rng(seed).standard_normal((batch, 3, 32, 32)).astype(np.float32)


@EVERY_TARGET
def test_a_probe_tells_what_is_there_or_what_is_missing(name, cpu):
    target = TARGETS[name]
    assert target.name == name
    assert all(multiple >= 1 for multiple in target.profile.multiples.values())
    found = probed(target)
    if isinstance(found, TargetUnavailable):
        assert found.target == name
        assert len(found.reason) > 10
        installs = found.install.startswith(("pip ", "mkdir ", "apt-get "))
        assert installs or "GPU" in found.reason or "instructions" in found.reason
    else:
        assert (found.target, bool(found.runtime), bool(found.version), bool(found.device)) == (name, True, True, True)


@EVERY_TARGET
def test_what_cannot_run_is_refused_and_never_replaced(name, artifacts, cpu):
    """Kind: a target that is timed under its name as something else. On a CPU with AVX-512 and no bf16, OpenVINO takes the
    hint bf16, says that it runs it, and computes it with instructions for fp32."""
    target = TARGETS[name]
    found = probed(target)
    if not isinstance(found, TargetUnavailable) and not found.cannot_run:
        pytest.skip(f"{name} runs here")
    with pytest.raises(TargetUnavailable):
        target.open(artifacts[0] if name == "eager" else artifacts[1], threads=1)


@pytest.mark.parametrize("name", ALL)
def test_whatever_a_probe_refuses_is_refused_before_a_file_is_looked_at(name, tmp_path):
    """Kind: a target that remembers to ask its probe in one place and forgets it in another."""
    target, absent = copy.copy(get_target(name)), tmp_path / "absent"

    def refuse():
        raise TargetUnavailable(name, "planted")

    target.probe = refuse
    calls = [lambda: target.open(absent, 1), lambda: target.build(absent, tmp_path, BuildOptions())]
    assert isinstance(target, Profiled) or not hasattr(target, "node_times")
    assert isinstance(target, Refittable) or not hasattr(target, "refit")
    assert isinstance(target, Interpreted) or not hasattr(target, "interpret")
    if isinstance(target, Profiled):
        calls.append(lambda: target.node_times(absent, 1, [], 0, 1))
    if isinstance(target, Refittable):
        calls.append(lambda: target.refit(absent, absent, tmp_path))
    if isinstance(target, Interpreted):
        calls.append(lambda: target.interpret(absent))
    for call in calls:
        with pytest.raises(TargetUnavailable, match="planted"):
            call()


@pytest.mark.parametrize("name", ALL)
def test_no_target_replaces_what_asks_the_probe(name):
    """What `@final` says to mypy, and a target in a file of someone's own could ignore."""
    kind = type(get_target(name))
    final = {
        Target: ("open", "opened", "build", "require_run", "require_outputs"),
        Profiled: ("node_times",),
        Refittable: ("refit",),
        Interpreted: ("interpret",),
    }
    for base, methods in final.items():
        if base is Target or issubclass(kind, base):
            assert [getattr(kind, method) for method in methods] == [getattr(base, method) for method in methods]


def test_a_future_target_need_not_remember_to_ask_its_probe(tmp_path):
    absent = tmp_path / "absent"
    calls = {
        "build": lambda target: target.build(absent, tmp_path, BuildOptions()),
        "open": lambda target: target.open(absent, 1),
        "refit": lambda target: target.refit(absent, absent, tmp_path),
        "node_times": lambda target: target.node_times(absent, 1, [], 0, 1),
    }
    for runs, refused in (("", calls), ("no: no GPU", [*calls][1:])):
        target = Refusing("future", runs)
        for name in refused:
            with pytest.raises(TargetUnavailable, match="no GPU" if runs else "it is not there"):
                calls[name](target)
        assert target.reached == []
    willing = Refusing("future", "yes")
    absent.write_bytes(b"there now")
    for call in calls.values():
        call(willing)
    assert willing.reached == list(calls)


@pytest.mark.parametrize("cpu", ["avx512-vnni"], indirect=True)
def test_no_session_times_bf16_where_the_cpu_has_none(cpu, monkeypatch, tmp_path):
    """In the session's own process, which is where a file is opened to be timed."""
    pytest.importorskip("openvino", reason="openvino is not installed: pip install 'slimvit[openvino]'")
    monkeypatch.setenv(VARIABLE, cpu)
    monkeypatch.setenv("PYTHONPATH", played.__path__[0])
    path = write_stack(tmp_path / "m.onnx")
    for runtime in ("openvino-cpu-bf16", f"{PRODUCTS}openvino-cpu-bf16"):
        schedule = {
            "schema": SCHEDULE_SCHEMA,
            "session": 0,
            "threads": 1,
            "inputs": {"count": 1, "seed": 0, "tensors": [{"shape": [1, 96], "dtype": "float32"}]},
            "variants": [{"name": "A", "path": str(path), "runtime": runtime, "inputs": ["image"]}],
        }
        with pytest.raises(TargetUnavailable, match="no bf16 instructions"):
            LocalTransport().run(schedule, SILENT)


def test_a_played_cpu_is_what_the_project_sees(cpu):
    if cpu == "real":
        pytest.skip("nothing is played")
    if os.environ.get(VARIABLE, cpu) != cpu:
        pytest.skip("another CPU is played already, and two at once are none")
    machine = fingerprint(1)["machine"]
    assert emulation() == ""
    assert platform.machine() in machine["system"]
    flags, expected = set(machine["flags"]), {"avx2": "avx2", "avx512-vnni": "avx512_vnni", "amx": "amx_bf16"}
    if cpu == "arm":
        assert (machine["cpu"], flags) == ("Raspberry Pi 5 Model B Rev 1.0, cpu 0x41 0xd0b", {"asimddp", "asimdhp"})
        return
    assert machine["cpu"].startswith("Intel")
    assert [name for name, flag in expected.items() if flag in flags][-1] == cpu
    assert ("amx_bf16" in flags) == ("avx512_bf16" in flags) == CPUS[cpu].bf16


@USUAL_TARGET
def test_a_runner_computes_the_model_at_any_batch_and_times_it(name, artifacts, cpu):
    if cpu != "real" and not name.startswith("openvino"):
        pytest.skip(f"in this process {name} sees the real CPU")
    target = there(name)
    with target.open(artifact(name, artifacts), threads=1) as runner:
        largest = batches(name, (1, 2, 3))[-1]
        for batch in (1, largest, 1):
            got = runner.infer({"image": images(batch)})
            assert list(got) == ["logits"]
            expected = torch_call(model().module)(images(batch))
            assert got["logits"].shape == expected.shape
            bound = TOLERANCE.get(name, 1e-4) * max(1.0, float(np.abs(expected).max()))
            assert np.abs(got["logits"] - expected).max() <= bound
        if largest == 1:
            with pytest.raises(RecipeError, match="batch"):
                runner.infer({"image": images(2)})
        feeds = [{"image": images(min(2, largest), seed)} for seed in range(3)]
        kept = runner.infer(feeds[0])["logits"].copy()
        times = runner.time_ns(feeds, 7)
        np.testing.assert_array_equal(runner.infer(feeds[0])["logits"], kept, "timing changes nothing")
    assert len(times) == 7
    assert all(isinstance(time, int) and time > 0 for time in times)


@USUAL_TARGET
def test_outputs_are_not_overwritten_by_the_next_call(name, artifacts):
    with there(name).open(artifact(name, artifacts), threads=1) as runner:
        first = runner.infer({"image": images(1, seed=1)})["logits"]
        before = first.copy()
        assert (runner.infer({"image": images(1, seed=2)})["logits"] != before).any()
        np.testing.assert_array_equal(first, before)


@USUAL_TARGET
@pytest.mark.parametrize("fault", ["truncated", "absent"])
def test_a_damaged_artifact_is_refused_as_such(name, fault, artifacts, tmp_path):
    target, whole = there(name), artifact(name, artifacts)
    path = tmp_path / f"m{whole.suffix}"
    if whole.is_dir():
        if fault == "truncated":
            path.mkdir()
            (path / "model.json").write_text("{")
    elif fault == "truncated":
        for file in open_artifact(whole).files:
            path.with_suffix(file.suffix).write_bytes(file.read_bytes())
        path.write_bytes(whole.read_bytes()[: -whole.stat().st_size // 3])
    with pytest.raises((ArtifactError, StorageError), match=path.name), target.open(path, threads=1) as runner:
        runner.infer({"image": images(1)})


@USUAL_TARGET
def test_a_file_is_proven_before_it_is_called_an_engine(name, artifacts, tmp_path):
    target = there(name)
    if not target.builds:
        pytest.skip(f"{name} has no engines")
    made = engine(name, artifacts[1])
    assert made.path.is_file()
    assert made.facts["target"] == name
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"no model")
    with pytest.raises(ArtifactError, match=r"bad\.onnx"):
        target.build(bad, tmp_path, BuildOptions(batches(name, (1, 1, 8))))


@USUAL_TARGET
def test_nodes_are_profiled_where_the_target_says_so(name, artifacts):
    target = there(name)
    if not isinstance(target, Profiled):
        pytest.skip(f"{name} has no per-operator profile")
    found = target.node_times(artifacts[1], 1, [{"image": images(2)}], warm_up=2, calls=5)
    assert len({node.name for node in found}) == len(found) > 10
    assert all(node.ns >= 0 for node in found)
    products = [n for n in found if n.op in ("Gemm", "MatMul", "FusedMatMul", "FullyConnected")]
    assert len(products) >= 5, "qkv, proj, fc1 and fc2 of the block, and the head"
    assert sum(node.ns for node in products) > 0


@pytest.mark.parametrize("name", sorted(set(ALL) - set(TARGETS)))
def test_a_mode_is_a_target_with_a_name_of_its_own(name):
    target, base = get_target(name), name.partition("+")[0]
    assert target.name == name
    assert target.profile == TARGETS[base].profile
