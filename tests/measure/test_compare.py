"""Real measurements of tiny models: slots are short and tolerances wide, so that a busy machine can pass."""

import math

import onnx
import pytest
from builders import Refusing
from measuring import device_of, progress_to
from onnxruntime.transformers.float16 import convert_float_to_float16
from sweeps import swept

from toolchain.errors import ArtifactError, MeasurementError, ParityError, RecipeError, TargetUnavailable
from toolchain.measure.compare import compare
from toolchain.measure.comparison import Comparison
from toolchain.measure.samples import Design, Workload
from toolchain.targets import TARGETS

pytestmark = pytest.mark.clock

FOUR = Workload(batch=4)
SHORT = Design(slot_ms=2.0, warmup_s=0.02, tau=0.6)
LEAST = SHORT.model_copy(update={"sessions": 1, "blocks": 4, "looks": 1})


def test_a_model_against_itself_is_no_change(stack, tmp_path):
    path = stack(tmp_path / "a.onnx")
    seen = []
    progress = progress_to(lambda share, text: seen.append((text, share)))
    comparison = compare(path, path, "ort-cpu", FOUR, SHORT, progress=progress)
    assert comparison.verdict == "pass"
    assert abs(comparison.ratio.point) < 0.2
    assert comparison.parity == "not claimed"
    assert comparison.artifacts["A"] == comparison.artifacts["B"]
    assert comparison.environment["threads"] == 1
    assert seen[-1][0] == "session 6: block 12/12"
    assert seen[-1][1] == pytest.approx(0.25)  # two looks fewer than there could have been
    assert [share for _, share in seen] == sorted(share for _, share in seen)
    comparison.save(tmp_path / "bench.json")
    assert Comparison.load(tmp_path / "bench.json").verdict == "pass"


def test_a_planted_slowdown_is_regressed_and_its_mirror_image_improved(stack, tmp_path):
    """Eight times the layers. How wide an interval is depends on who else uses the machine, so the verdicts and the points
    are asked for, not the bounds."""
    fast, slow = stack(tmp_path / "fast.onnx", layers=8, width=128), stack(tmp_path / "slow.onnx", layers=64, width=128)
    worse = compare(fast, slow, "ort-cpu", FOUR, SHORT, parity="pass")
    assert (worse.verdict, worse.verified_speedup_at_least, worse.parity) == ("regressed", None, "pass")
    assert worse.ratio.point > math.log(2)
    better = compare(slow, fast, "ort-cpu", FOUR, SHORT)
    assert better.verdict == "improved"
    assert better.ratio.point < -math.log(2)
    assert 1 < better.verified_speedup_at_least == pytest.approx(math.exp(-better.ratio.hi))
    assert better.latency_ms("B") < better.latency_ms("A")


def test_a_file_that_takes_fp16_is_timed_against_one_that_takes_fp32(stack, tmp_path):
    """Kind: what fp16 converters make by default. Each is fed the same values in its own type."""
    a = stack(tmp_path / "a.onnx")
    onnx.save(convert_float_to_float16(onnx.load(a)), tmp_path / "half.onnx")
    comparison = compare(a, tmp_path / "half.onnx", "ort-cpu", FOUR, LEAST)
    assert {spec.dtype for spec in comparison.scenario.inputs} == {"float32"}
    assert len(comparison.sessions) == 1


def test_what_cannot_be_compared_is_refused_before_it_is_timed(stack, tmp_path):
    a = stack(tmp_path / "a.onnx")
    with pytest.raises(ParityError, match=r"\[4, 96\].*\[4, 64\]"):
        compare(a, stack(tmp_path / "narrow.onnx", width=64), "ort-cpu", FOUR, SHORT)
    with pytest.raises(RecipeError, match="fixed batch of 1"):
        compare(a, stack(tmp_path / "fixed.onnx", batch=1), "ort-cpu", FOUR, SHORT)
    with pytest.raises(RecipeError, match="did you mean 'ort-cpu'"):
        compare(a, a, "ort-cpuu", FOUR, SHORT)
    with pytest.raises(RecipeError, match="takes ONNX files"):
        compare(a, tmp_path, "ort-cpu", FOUR, SHORT)
    with pytest.raises(ValueError, match="blocks"):
        Design(blocks=0)
    with pytest.raises(RecipeError, match="threads"):
        compare(a, a, workload=Workload(batch=4, threads=0))
    (tmp_path / "bad.onnx").write_bytes(a.read_bytes()[:200])
    with pytest.raises(ArtifactError, match=r"bad\.onnx"):
        compare(a, tmp_path / "bad.onnx", "ort-cpu", FOUR, SHORT)


def test_outputs_that_are_not_finite_give_no_latency(stack, tmp_path):
    a, overflowing = stack(tmp_path / "a.onnx"), stack(tmp_path / "b.onnx", scale=1e30)
    with pytest.raises(ArtifactError, match=r"B \(.*b\.onnx\).*not finite"):
        compare(a, overflowing, "ort-cpu", FOUR, SHORT)


def test_a_target_that_does_not_measure_says_so(stack, tmp_path, register):
    class BuildOnly:
        name, measures, never_run = "build-only", False, "no device"

    register(TARGETS, BuildOnly())
    a = stack(tmp_path / "a.onnx")
    with pytest.raises(TargetUnavailable, match="cannot be measured on it: no device"):
        compare(a, a, "build-only", FOUR, SHORT)


def test_a_target_that_builds_but_cannot_run_here_is_never_timed_elsewhere(stack, tmp_path, register):
    register(TARGETS, Refusing("no-gpu", runs="no: there is no GPU"))
    a = stack(tmp_path / "a.onnx")
    with pytest.raises(TargetUnavailable, match="there is no GPU"):
        compare(a, a, "no-gpu", FOUR, SHORT)


def test_model_folders_are_timed_in_eager_torch(tmp_path):
    from toolchain.families import family_of
    from toolchain.model import Preprocess, TimmModel
    from toolchain.plan import ModelRef
    from toolchain.surgery.replay import create_dense, save_model

    def folder(depth):
        size = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "num_heads": 2, "depth": depth, "num_classes": 5}
        ref = ModelRef(name="vit_tiny_patch16_224", kwargs=size)
        module = create_dense(ref)
        family = family_of(module, ref.name)
        preprocess = Preprocess((3, 16, 16), (0.5,) * 3, (0.5,) * 3)
        model = TimmModel(ref, module, family, tuple(family.unit_groups(module)), preprocess, {})
        return save_model(model, tmp_path / f"depth{depth}")

    deep, shallow = folder(6), folder(1)
    comparison = compare(deep, shallow, "eager", FOUR, LEAST.model_copy(update={"blocks": 8}))
    assert comparison.ratio.point < math.log(0.7)  # the verdict is not asserted: one short session may well be invalid
    assert comparison.scenario.inputs[0].shape == (4, 3, 16, 16)
    assert "torch" in comparison.environment["runtimes"]
    with pytest.raises(RecipeError, match="model folders"):
        compare(deep, deep / "model.json", "eager", FOUR, SHORT)


@pytest.mark.parametrize("target", swept(["openvino-cpu", "openvino-cpu-bf16"], ["openvino-cpu"]))
def test_openvino_is_timed_like_any_target(stack, tmp_path, target):
    pytest.importorskip("openvino", reason="openvino is not installed: pip install 'slimvit[openvino]'")

    try:
        TARGETS[target].probe()
    except TargetUnavailable as error:
        pytest.skip(str(error))
    deep = stack(tmp_path / "deep.onnx", layers=48, width=256)
    shallow = stack(tmp_path / "shallow.onnx", layers=4, width=256)
    comparison = compare(deep, shallow, target, FOUR, SHORT.model_copy(update={"sessions": 1, "blocks": 8}))
    assert comparison.ratio.point < math.log(0.7)  # the verdict is not asserted: one short session may well be invalid
    assert set(comparison.environment["runtimes"]) >= {"openvino"}
    comparison.save(tmp_path / "bench.json")
    assert Comparison.load(tmp_path / "bench.json").scenario.target == target


class Tampering:
    """A measurer whose sessions come back changed."""

    def __init__(self, change):
        from toolchain.devices.transport import LocalTransport

        self.local, self.change = LocalTransport(), change

    def run(self, schedule, progress):
        result = self.local.run(schedule, progress)
        self.change(result, schedule["session"])
        return result


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda r, s: r["fingerprint"]["before"]["machine"].update(governor=f"g{s}"), MeasurementError, "governor"),
        (lambda r, s: r["blocks"].pop(), MeasurementError, "blocks"),
        (lambda r, s: r["variants"]["B"].update(outputs=[[4, 10]]), ParityError, "outputs"),
    ],
)
def test_sessions_that_do_not_belong_together_give_no_verdict(stack, tmp_path, change, error, words):
    path = stack(tmp_path / "a.onnx")
    with pytest.raises(error, match=words):
        compare(path, path, device_of(Tampering(change)), FOUR, SHORT.model_copy(update={"blocks": 4}))
