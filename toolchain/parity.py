"""The parity ladder: each form of a model against the one before it, as rungs that pass, fail, or were not run.

A rung cannot pass by accident: outputs that hold a NaN, differ in shape, or say nothing about the image fail it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from toolchain.errors import ParityError, SlimvitError

Array = NDArray[Any]
Arrays = Array | tuple[Array, ...]
"""What a form of a model gives for a batch: [batch, *, D], or one such array for each of its outputs."""
T = TypeVar("T")
Verdict = Literal["pass", "fail", "not_run"]
BATCHES = (1, 3)
SIGNAL = 4
"""By how much outputs vary over images, in units of their largest error, where that is less than a tolerance: what is the same
for every image is off by half of the variation or more."""
ROUNDING = 2.0**-20
"""What float32 may blur, as a share of the largest number: less than that is no variation."""
RANK = 2
"""Of one row of numbers for each image; more of them are tokens."""
STILL = 0.1
"""The least variation that a position of tokens is held against, as a share of the mean over positions: what is rounded there is
more than a position varies that is almost the same in every image."""


@dataclass(frozen=True)
class Tolerance:
    """What two forms of a model may differ by; a bound that is None is reported and not judged.

    Attributes:
        max_abs: bound on max |Δ|, in units of max(1, max |y|) with y the expected output.
        cosine_min: bound on the cosine, per image, and of tokens per position too.
        top1_min: bound on the share of real images for which both name the same class.
        spread_max: bound on `spread_error`, over all numbers and, of tokens, at every position: of outputs that name no class, whose
            cosines say little where all have a large mean.
        centred_min: bound on `centred_cosine`, of outputs that name a class: `cosine_min` says little where all classes have much in
            common, even of classes that trade places.
    """

    max_abs: float | None
    cosine_min: float
    top1_min: float | None
    spread_max: float | None = None
    centred_min: float | None = None


TOLERANCES: Mapping[str, Tolerance] = {
    # For torch against torch and for torch against ONNX Runtime alike. Seen on five ViTs of depth 12, as exported and
    # simplified, batch 1 and 3: at most 7.3e-7, with both sides up to 6e-7 from float64. top-1 follows from max_abs.
    "fp32": Tolerance(max_abs=1e-5, cosine_min=0.99999, top1_min=None),
}


@dataclass(frozen=True)
class Rung:
    """One comparison; `reason` says why it failed or was not run, and is empty when it passed.

    Attributes:
        from_: name of the form that is taken as right.
        to: name of the form that is compared with it.
        max_abs: largest |Δ| of a number; None if there is none to tell.
        cosine_min: smallest cosine over the images, and of tokens over the positions, each taken over all images: one token that is
            wrong in every image is not lost among the others. Of a single number, that of all images about the expected mean.
        top1_agreement: share of the images on which both name the same class; None on synthetic images.
        tolerance: what was allowed.
    """

    from_: Annotated[str, Field(alias="from")]  # as it stands in report.json
    to: str
    max_abs: float | None
    cosine_min: float | None
    top1_agreement: float | None
    tolerance: Tolerance
    verdict: Verdict
    reason: str = ""

    def to_dict(self) -> dict[str, object]:
        """The rung as it stands in report.json."""
        record = asdict(self)
        return {"from": record.pop("from_"), **record}

    def __str__(self) -> str:
        shown = "" if self.max_abs is None else f" (max |Δ| {self.max_abs:.1e})"
        return f"{self.from_} == {self.to}: {self.verdict}{shown}" + (f", {self.reason}" if self.reason else "")


def compare_outputs(
    from_: str, to: str, expected: Sequence[Array], got: Sequence[Array], *, tolerance: Tolerance, real_images: bool
) -> Rung:
    """The rung for one output of two forms of a model on the same images.

    Args:
        from_: name of the form that is taken as right.
        to: name of the other form.
        expected: its output [batch, *, D], one array for each call.
        got: those of the other form, for the same calls.
        tolerance: what is allowed, from `TOLERANCES`.
        real_images: whether the images are real; top-1 on noise says nothing and is left out.
    """

    def failed(reason: str) -> Rung:
        return Rung(from_, to, None, None, None, tolerance, "fail", reason)

    shapes = [a.shape for a in expected], [a.shape for a in got]
    if shapes[0] != shapes[1] or any(a.ndim < RANK or a.size == 0 for a in expected) or not expected:
        return failed(f"shapes differ or are not [batch, …, numbers]: {from_} {shapes[0]}, {to} {shapes[1]}")
    y, z = (np.concatenate([np.asarray(a, dtype=np.float64) for a in side]) for side in (expected, got))
    for name, values in ((from_, y), (to, z)):
        if (bad := int(np.count_nonzero(~np.isfinite(values)))) > 0:
            return failed(f"{name} has {bad} non-finite numbers of {values.size}")
    scale = max(1.0, float(np.abs(y).max()))
    bound = None if tolerance.max_abs is None else tolerance.max_abs * scale
    max_abs = float(np.abs(y - z).max())
    noise = 0.0 if bound is None else min(bound, max(SIGNAL * max_abs, ROUNDING * scale))
    if (empty := _vacuous(expected, noise)) is not None:
        return failed(f"the comparison is vacuous: the output of {from_} {empty}")
    single = y.shape[1:] == (
        1,
    )  # every cosine is 1 then, and every image the same class: over images they are compared
    cosine = float(
        _cosines(*((each - y.mean()).T for each in (y, z)) if single else (_by_image(y), _by_image(z))).min()
    )
    if y.ndim > RANK:
        cosine = min(cosine, float(_cosines(_by_position(y), _by_position(z)).min()))
    named = real_images and not single and y.ndim == RANK
    top1 = float(np.mean(y.argmax(axis=1) == z.argmax(axis=1))) if named else None
    faults, blur = [], ROUNDING * scale
    if (empty := _vacuous(got, blur)) is not None and _vacuous(expected, SIGNAL * blur) is None:
        faults.append(f"the output of {to} {empty}, and that of {from_} is not")
    if bound is not None and max_abs > bound:
        faults.append(f"max |Δ| {max_abs:.3g} > {bound:.3g}")
    if cosine < tolerance.cosine_min:
        faults.append(f"cosine {cosine:.6f} < {tolerance.cosine_min}")
    if top1 is not None and tolerance.top1_min is not None and top1 < tolerance.top1_min:
        faults.append(f"top-1 agreement {top1:.4f} < {tolerance.top1_min}")
    if tolerance.centred_min is not None and y.ndim == RANK and not single:
        centred = centred_cosine(y, z, SIGNAL * blur)
        if centred < tolerance.centred_min:
            faults.append(f"cosine {centred:.6f} about the mean of the classes < {tolerance.centred_min}")
    if tolerance.spread_max is not None and (lost := _lost(y, z, tolerance.spread_max)) is not None:
        faults.append(lost)
    return Rung(from_, to, max_abs, cosine, top1, tolerance, "fail" if faults else "pass", "; ".join(faults))


def compare(
    from_: str,
    to: str,
    expected: Callable[[Array], Arrays],
    got: Callable[[Array], Arrays],
    images: Array,
    *,
    tolerance: Tolerance,
    real_images: bool,
    batches: Sequence[int] = BATCHES,
) -> Rung:
    """The rung for two callables image [B, C, H, W] → outputs, called with the first B images per batch size.

    Of several outputs the worst decides. A callable that raises fails the rung: a batch that was frozen on the way shows in this manner. An error of
    slimvit's own is raised on.
    """
    sides: list[list[tuple[Array, ...]]] = []
    for name, call in ((from_, expected), (to, got)):
        try:
            outputs = outputs_of(name, call, images, batches)
        except CannotRun as error:
            return Rung(from_, to, None, None, None, tolerance, "fail", str(error))
        sides.append([each if isinstance(each, tuple) else (each,) for each in outputs])
    counts = [{len(each) for each in side} for side in sides]
    if counts[0] != counts[1]:
        reason = f"{from_} has {max(counts[0])} outputs, {to} {max(counts[1])}"
        return Rung(from_, to, None, None, None, tolerance, "fail", reason)
    rungs = [
        compare_outputs(from_, to, *pair, tolerance=tolerance, real_images=real_images)
        for pair in zip(*([*zip(*side, strict=True)] for side in sides), strict=True)
    ]
    if len(rungs) > 1:
        rungs = [
            replace(each, reason=f"output {number} of {len(rungs)}: {each.reason}" if each.reason else "")
            for number, each in enumerate(rungs, 1)
        ]
    return worst(rungs)


def worst(rungs: Sequence[Rung]) -> Rung:
    """The rung of several outputs together: the largest errors of any, and the verdict and reason of the one that decides.

    That is one that failed, else that of the smallest cosine. An error that one of them lacks is not told.
    """
    decisive = min(rungs, key=lambda each: (each.verdict == "pass", each.cosine_min or -1.0))
    errors = [each.max_abs for each in rungs if each.max_abs is not None]
    cosines = [each.cosine_min for each in rungs if each.cosine_min is not None]
    shares = [each.top1_agreement for each in rungs if each.top1_agreement is not None]
    return replace(
        decisive,
        max_abs=max(errors) if len(errors) == len(rungs) else None,
        cosine_min=min(cosines) if len(cosines) == len(rungs) else None,
        top1_agreement=min(shares, default=None),
    )


class CannotRun(Exception):
    """A runtime's error at one batch size; raised and caught within a comparison."""


def outputs_of(name: str, call: Callable[[Array], T], images: Array, batches: Sequence[int]) -> list[T]:
    """What a function gives for the first B images, for each batch B; raises CannotRun, and slimvit's own errors as they are."""
    if len(images) < max(batches):
        raise ValueError(f"parity at batch {max(batches)} needs as many images, got {len(images)}")
    outputs = []
    for batch in batches:
        try:
            outputs.append(call(images[:batch]))
        except SlimvitError:
            raise
        except Exception as error:  # every runtime raises its own
            first = (str(error).splitlines() or [""])[0]
            raise CannotRun(f"{name} cannot run at batch {batch}: {type(error).__name__}: {first}") from error
    return outputs


def not_run(from_: str, to: str, *, tolerance: Tolerance, reason: str) -> Rung:
    """A rung that was not compared, and why."""
    return Rung(from_, to, None, None, None, tolerance, "not_run", reason)


REPORT = "Report it with what you ran and with what `slimvit doctor` prints"
"""What to do about forms that slimvit alone made of each other."""


def require(rungs: Sequence[Rung], advice: str = REPORT) -> None:
    """Nothing, if no rung failed and at least one was run.

    Args:
        rungs: in the order in which the forms were made.
        advice: what to do if one failed, as a sentence without its full stop.

    Raises:
        ParityError: names the first rung that broke, or says that nothing was compared.
    """
    broken = next((rung for rung in rungs if rung.verdict == "fail"), None)
    if broken is not None:
        raise ParityError(
            f"{broken.from_} and {broken.to} must be the same model and are not: {broken.reason}. "
            f"The step from {broken.from_} to {broken.to} is the first that broke. {advice}."
        )
    if all(rung.verdict == "not_run" for rung in rungs):
        reasons = "; ".join(f"{rung.from_} == {rung.to}: {rung.reason}" for rung in rungs)
        raise ParityError(
            f"no form of the model was compared with another, so nothing is known: {reasons or 'no rung'}. {advice}."
        )


def _vacuous(outputs: Sequence[Array], noise: float) -> str | None:
    """Why outputs could agree without the models agreeing, as the end of a sentence, or None."""
    values = np.concatenate(outputs).astype(np.float64)
    if not values.any():
        return "is all zero"
    if float(np.ptp(values)) <= noise:
        return "is constant"
    if len(values) > 1 and float(np.ptp(values, axis=0).max()) <= noise:
        return "is the same for every image"
    return None


def centred_cosine(y: Array, z: Array, blur: float = 0.0) -> float:
    """The cosine of the logits of all images together, of each image about its mean: what all classes have in common names none.

    Args:
        y: what is expected, [batch, classes].
        z: what is there instead.
        blur: where the logits of images differ less than that, 1 is returned, for nothing can be said.
    """
    y, z = (each - each.mean(axis=1, keepdims=True) for each in (y, z))
    if float(np.abs(y).max()) <= blur:
        return 1.0
    return float(_cosines(y.reshape(1, -1), z.reshape(1, -1))[0])


def spread_error(y: Array, z: Array) -> float:
    """Σ‖y−z‖² / Σ‖y−ȳ‖², with ȳ the mean of y over images: 0 for equal outputs, at least 1 for z that are the same for every image.

    Args:
        y: what is expected, one row per image.
        z: what is there instead.
    """
    y, z = (np.asarray(each, np.float64) for each in (y, z))
    spread = float(((y - y.mean(axis=0)) ** 2).sum())
    return float(((y - z) ** 2).sum()) / spread if spread > 0 else float("inf")


def _lost(y: Array, z: Array, most: float) -> str | None:
    """Where more than a share of how y [batch, *, D] differs between images is lost in z, as a clause, or None."""
    if (error := spread_error(y, z)) > most:
        return f"Σ‖y−z‖² {error:.3g} of Σ‖y−ȳ‖² > {most}: how outputs differ between images is lost"
    if y.ndim == RANK:
        return None
    axes = (0, -1)
    wrong = ((y - z) ** 2).sum(axis=axes).ravel()
    spread = ((y - y.mean(axis=0)) ** 2).sum(axis=axes).ravel()
    errors = wrong / np.maximum(spread, STILL * spread.mean())
    if (error := float(errors.max())) > most:
        return f"Σ‖y−z‖² {error:.3g} of Σ‖y−ȳ‖² at position {int(errors.argmax())} > {most}: it is lost there"
    return None


def _by_image(y: Array) -> Array:
    """[batch, *, D] → [batch, all numbers]."""
    return y.reshape(len(y), -1)


def _by_position(y: Array) -> Array:
    """[batch, *, D] → [positions, batch·D]."""
    return y.reshape(len(y), -1, y.shape[-1]).swapaxes(0, 1).reshape(-1, len(y) * y.shape[-1])


def _cosines(y: Array, z: Array) -> Array:
    """Cosine of each row of y with that of z; 0 where one of them is a zero vector."""
    norms = np.linalg.norm(y, axis=1) * np.linalg.norm(z, axis=1)
    products: Array = (y * z).sum(axis=1)
    cosines: Array = np.divide(products, norms, out=np.zeros_like(products), where=norms > 0)
    return cosines
