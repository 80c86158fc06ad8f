"""An engine against the ONNX file that it was built from, whoever wrote the file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from toolchain.artifacts import Artifact, open_artifact
from toolchain.artifacts.onnx_file import FP32
from toolchain.export.calls import Array, Call, Outputs, opened_outputs
from toolchain.export.precision import COMPARED, PRECISIONS, for_output, reference_target, tolerance_of
from toolchain.export.unrounded import unrounded
from toolchain.model import Preprocess
from toolchain.outputs import LOGITS
from toolchain.parity import BATCHES, Rung, Tolerance, compare, not_run
from toolchain.targets import EngineBuild, Interpreted, get_target

# A GPU may multiply fp32 matrices in TF32, which keeps 10 bits of the mantissa: the logits keep their direction.
TF32 = Tolerance(max_abs=None, cosine_min=0.999, top1_min=None, centred_min=0.999)


def engine_rung(
    source: Artifact,
    built: EngineBuild,
    profile: tuple[int, int, int],
    images: Callable[[int], Array],
    available: int | None,
    preprocess: Preprocess | None = None,
) -> Rung:
    """The rung of an engine against the file that it was built from, run on the CPU.

    Args:
        source: the file.
        built: the engine, or the file itself on another runtime; the rung is not run where it can neither be loaded nor interpreted,
            and gives the reason. One that was interpreted says so in its name.
        profile: (min, opt, max) batch of the engine; batches outside it are not asked of it, and more images go in several calls.
        images: the number of images that are wanted → that many, [N, C, H, W].
        available: how many images there are for which the largest output names a class; None where it does not, as for noise.
        preprocess: how they were prepared, for a file that takes pixels and does not say.
    """
    reading, from_, to = source.precision, source.path.name, built.path.name
    if to == from_:
        to = f"{to} on {built.record.target}"
    target = get_target(built.record.target)
    coarse = reading.name in (FP32, "fp64") and not target.exact_fp32
    tolerance = TF32 if coarse else tolerance_of(reading)
    if reading.name == FP32 and "f16" in built.record.weights:  # OpenVINO's format: fp16 stored, fp32 computed
        tolerance = PRECISIONS["fp16"].tolerance
    if tolerance is None:
        reason = f"{from_} is {reading}, for which slimvit has no tolerance"
        return not_run(from_, to, tolerance=TF32, reason=reason)
    tolerance = for_output(tolerance, source.output)
    # An engine of single batches tells itself what it takes: fp32, say, where its file takes fp16.
    described, exact = open_artifact(built.path) if built.record.batches else source, None
    preprocess = source.preprocess or preprocess
    if isinstance(target, Interpreted) and target.probe().cannot_run:
        exact = target.max_abs.get(reading.name)
        to, described = f"{to}, {target.interpreter}", open_artifact(built.path)
    elif built.record.loaded != "pass":
        return not_run(from_, to, tolerance=tolerance, reason=built.record.loaded_reason)
    batches = [*built.record.batches] or [n for n in BATCHES if profile[0] <= n <= profile[2]] or [profile[0]]
    step = max(batches)
    wanted = max(*BATCHES, min(COMPARED, available or 0))  # one image says nothing of how outputs differ between images
    batches = sorted({*batches, -(-wanted // step) * step})
    given, real = images(max(batches)), available is not None

    names = compared_outputs(source)

    def chosen(run: Outputs) -> Call:
        """The outputs that are compared."""

        def call(images: Array) -> tuple[Array, ...]:
            outputs = run(images)
            return tuple(outputs[name] for name in names)

        return call

    if exact is not None:  # what rounding costs depends on the weights, and what the program computes does not
        allowed = replace(tolerance, max_abs=exact)
        with opened_outputs(
            target.name, built.path, described_by=described, preprocess=preprocess, step=step, rounded=False
        ) as got:
            expected = chosen(unrounded(source, preprocess))
            rung = compare(
                from_, to, expected, chosen(got), given, tolerance=allowed, real_images=real, batches=batches
            )
        if rung.verdict == "fail":
            return replace(rung, reason=f"{rung.reason}, with no activation rounded")
    with (
        opened_outputs(reference_target(source), source.path, preprocess=preprocess) as reference,
        opened_outputs(target.name, built.path, described_by=described, preprocess=preprocess, step=step) as got,
    ):
        return compare(
            from_, to, chosen(reference), chosen(got), given, tolerance=tolerance, real_images=real, batches=batches
        )


def compared_outputs(source: Artifact) -> list[str]:
    """The outputs of a file that its engines are held to, "logits" first: all with numbers for each image, else the main one."""
    names = [name for name, rank in source.ranks.items() if name not in source.choices and rank not in (0, 1)]
    return sorted(names, key=lambda name: name != LOGITS) or [source.main_output]
