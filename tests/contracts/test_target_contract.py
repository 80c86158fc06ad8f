"""What every target owes, whichever it is: parametrised over the table, so a new one is tested at once."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
from builders import dense_model

from toolchain.errors import ArtifactError, StorageError, TargetUnavailable
from toolchain.export.onnx_graph import export_onnx
from toolchain.export.stage import torch_call
from toolchain.surgery.replay import save_model
from toolchain.targets import MODES, TARGETS, BuildOptions, Profiled, get_target

EVERY_TARGET = pytest.mark.parametrize("name", list(TARGETS))
TOLERANCE = {"openvino-cpu-bf16": 5e-2, "trt": 2e-2, "trt-rtx": 2e-2}  # bf16; TF32 products


@cache
def model():
    return dense_model()


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
        runs = target.probe().details.get("run", "yes")
    except TargetUnavailable as error:
        pytest.skip(str(error))
    if runs != "yes":
        pytest.skip(f"{name} cannot run here ({runs})")
    return target


def probed(target):
    """What its probe tells, or the reason why it is unavailable."""
    try:
        return target.probe()
    except TargetUnavailable as error:
        return error


def artifact(name, artifacts):
    return artifacts[0] if name == "eager" else artifacts[1]


def images(batch, seed=0):
    return np.random.default_rng(seed).standard_normal((batch, 3, 32, 32)).astype(np.float32)


@EVERY_TARGET
def test_a_probe_tells_what_is_there_or_what_is_missing(name):
    target = TARGETS[name]
    assert target.name == name
    assert all(multiple >= 1 for multiple in target.profile.multiples.values())
    found = probed(target)
    if isinstance(found, TargetUnavailable):
        assert found.target == name
        assert len(found.reason) > 10
        assert found.install.startswith("pip ") or "GPU" in found.reason or "instructions" in found.reason
    else:
        assert (found.target, bool(found.runtime), bool(found.version), bool(found.device)) == (name, True, True, True)


@EVERY_TARGET
def test_what_cannot_run_is_refused_and_never_replaced(name, artifacts):
    target = TARGETS[name]
    found = probed(target)
    runs = not isinstance(found, TargetUnavailable) and found.details.get("run", "yes") == "yes"
    if runs:
        pytest.skip(f"{name} runs here")
    with pytest.raises(TargetUnavailable), target.open(artifact(name, artifacts), threads=1) as runner:
        runner.infer({"image": images(1)})


@EVERY_TARGET
def test_a_runner_computes_the_model_at_any_batch_and_times_it(name, artifacts):
    target = there(name)
    with target.open(artifact(name, artifacts), threads=1) as runner:
        for batch in (1, 3, 1):
            got = runner.infer({"image": images(batch)})
            assert list(got) == ["logits"]
            expected = torch_call(model().module)(images(batch))
            assert got["logits"].shape == expected.shape
            bound = TOLERANCE.get(name, 1e-4) * max(1.0, float(np.abs(expected).max()))
            assert np.abs(got["logits"] - expected).max() <= bound
        feeds = [{"image": images(2, seed)} for seed in range(3)]
        kept = runner.infer(feeds[0])["logits"].copy()
        times = runner.time_ns(feeds, 7)
        np.testing.assert_array_equal(runner.infer(feeds[0])["logits"], kept, "timing changes nothing")
    assert len(times) == 7
    assert all(isinstance(time, int) and time > 0 for time in times)


@EVERY_TARGET
def test_outputs_are_not_overwritten_by_the_next_call(name, artifacts):
    with there(name).open(artifact(name, artifacts), threads=1) as runner:
        first = runner.infer({"image": images(1, seed=1)})["logits"]
        before = first.copy()
        assert (runner.infer({"image": images(1, seed=2)})["logits"] != before).any()
        np.testing.assert_array_equal(first, before)


@EVERY_TARGET
@pytest.mark.parametrize("fault", ["truncated", "absent"])
def test_a_damaged_artifact_is_refused_as_such(name, fault, artifacts, tmp_path):
    target = there(name)
    path = tmp_path / "m.onnx"
    if name == "eager":
        path = tmp_path / "folder"
        if fault == "truncated":
            path.mkdir()
            (path / "model.json").write_text("{")
    elif fault == "truncated":
        path.write_bytes(artifacts[1].read_bytes()[:-50])
    with pytest.raises((ArtifactError, StorageError), match=path.name), target.open(path, threads=1) as runner:
        runner.infer({"image": images(1)})


@EVERY_TARGET
def test_a_file_is_proven_before_it_is_called_an_engine(name, artifacts, tmp_path):
    if name == "eager":
        pytest.skip("eager has no engines")
    target = there(name)
    built = target.build(artifacts[1], tmp_path, BuildOptions((1, 1, 2)))
    assert built.path.is_file()
    assert built.facts["target"] == name
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"no model")
    with pytest.raises(ArtifactError, match=r"bad\.onnx"):
        target.build(bad, tmp_path, BuildOptions())


@EVERY_TARGET
def test_nodes_are_profiled_where_the_target_says_so(name, artifacts):
    target = there(name)
    if not isinstance(target, Profiled):
        pytest.skip(f"{name} has no per-operator profile")
    found = target.node_times(artifacts[1], 1, [{"image": images(2)}], warm_up=2, calls=5)
    assert len({node.name for node in found}) == len(found) > 10
    assert all(node.ns >= 0 for node in found)
    products = [n for n in found if n.op in ("Gemm", "MatMul", "FusedMatMul", "FullyConnected")]
    assert len(products) >= 9, "qkv, proj, fc1 and fc2 of two blocks, and the head"
    assert sum(node.ns for node in products) > 0


@pytest.mark.parametrize("name", list(MODES))
def test_a_mode_is_a_target_with_a_name_of_its_own(name):
    target = MODES[name]
    base = name.partition("+")[0]
    assert target.name == name
    assert get_target(name) is (TARGETS[base] if name == base else target)
    assert target.profile == TARGETS[base].profile
