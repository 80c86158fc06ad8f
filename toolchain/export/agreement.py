"""How far two artifacts agree on the same images: one rung, by what their precisions allow."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from toolchain.artifacts import Artifact, open_artifact
from toolchain.artifacts.inputs import FLOATS, resolved, shown
from toolchain.artifacts.onnx_file import FP32
from toolchain.errors import RecipeError
from toolchain.export.calls import Array, stack_images
from toolchain.export.pixels import representable
from toolchain.export.precision import COMPARED, EITHER, for_output, opened_artifact, tolerance_of
from toolchain.export.preparation import Preparation, prepared, raw_pixels, resized_source
from toolchain.model import Preprocess
from toolchain.outputs import FEATURES, LOGITS
from toolchain.parity import BATCHES, CannotRun, Rung, Tolerance, compare_outputs, outputs_of, spread_error, worst
from toolchain.recipe import SYNTHETIC

BLOBS = 16
"""Images of coarse noise that a rounded file of another tool is compared on besides: fine noise looks the same to a ViT."""
SPREAD_ERRORS = {"pictures": 0.1, "noise": 0.75}
"""What such a file may have for `spread_error`. Weights that are all 0 have 1 or more, and 2 · (1 − 0.95) is what int8's cosine
comes to about the mean. An honest static file clips what is unlike the images that it was calibrated on: 0.52 was seen on noise."""


CLIPPED = (
    "on noise, scales that were fixed on pictures may cut off what no picture holds, so nothing is judged: name --data"
)


@dataclass(frozen=True)
class Agreement:
    """The rung of two artifacts, and one sentence for each thing that was assumed of them."""

    rung: Rung
    notes: tuple[str, ...]


def parity_of(
    a: Path,
    b: Path,
    data: str,
    tolerance: Tolerance | None = None,
    *,
    asked: Preparation = Preparation(),  # noqa: B008 - frozen
    input_shape: tuple[int, ...] | None = None,
) -> Agreement:
    """The rung of two artifacts on validation images of a data source or on noise, at batch 1 and 3; A is taken as right.

    All outputs with a common name are compared, except `choices`, and the worst decides. B must have all of A's, unless they are
    called otherwise altogether. The notes say which are not compared.
    A rounded file of another tool, whose weights were never checked, must also differ between images as A does.
    Where top-1 is judged, they are compared on `COMPARED` real images as well: three say little of it. Where a precision
    has no tolerance and none is given, the difference is reported and not judged. Where no output can be compared, the rung was
    not run.

    Args:
        a: what is right: a model folder or an ONNX file.
        b: what is compared with it.
        data: the source; "none" is seeded noise, which needs no preprocessing.
        tolerance: what is allowed; None is what the precisions of both ask for.
        asked: how images are prepared, in place of what A says or where neither says anything.
        input_shape: shape of one image in the files' own layout, where both leave it open.

    Raises:
        RecipeError: the artifacts take images of different sizes or layouts, the source does not fit them, or top-1 is to be
            judged of what names no class.
        ArtifactError: neither says how its input is preprocessed, and images were asked for.
    """
    artifacts = open_artifact(a), open_artifact(b)
    _require_one_layout(*artifacts)
    allowed = tolerance or tolerance_of(*(artifact.precision for artifact in artifacts))
    judged = allowed or Tolerance(None, -1.0, None)
    size = resolved({artifact.path: artifact.image for artifact in artifacts}, input_shape)
    pairs, chosen = _pairs(*artifacts)
    if not pairs:
        return Agreement(Rung(a.name, b.name, None, None, None, judged, "not_run", chosen), ())
    if lacking := _lacking(*artifacts):
        reason = f"{b.name} lacks {', '.join(lacking)} of {a.name}"
        return Agreement(Rung(a.name, b.name, None, None, None, judged, "fail", reason), ())
    classes = _names_classes(artifacts, pairs[0])
    unheld = tolerance is None and any(map(_is_unheld, artifacts))
    given = _compared_on(
        artifacts,
        data,
        asked,
        size,
        top1=classes and judged.top1_min is not None,
        spread=unheld and allowed is not None,
    )
    batches = sorted({*BATCHES, len(given.images)})
    outputs = []
    for artifact in artifacts:
        with opened_artifact(artifact, given.preprocess) as run:
            try:
                outputs.append(outputs_of(artifact.path.name, run, given.images, batches))
            except CannotRun as error:
                rung = Rung(a.name, b.name, None, None, None, judged, "fail", str(error))
                return Agreement(rung, (*given.notes, *_notes(artifacts)))
    rungs: list[Rung] = []
    left = []
    for pair in pairs:
        sides = [[each[name] for each in side] for name, side in zip(pair, outputs, strict=True)]
        if not all(_per_image(side, batches) for side in sides):
            left.append(pair)
            continue
        first = pair == pairs[0]
        bounds = judged if first and classes else replace(judged, top1_min=None, centred_min=None)
        if tolerance is None and allowed is not None:
            bounds = for_output(bounds, artifacts[0].output or artifacts[1].output)
        rung = _rung_of(artifacts, sides, bounds, real=given.real and first and classes)
        if unheld and allowed is not None and rung.verdict == "pass":
            rung = _held_by_spread(rung, sides, "pictures" if given.real else "noise")
        if not rungs or not all(map(np.array_equal, *sides)):  # equal ones agree, also where they are constant
            reason = f"output {pair[0]!r}: {rung.reason}" if rung.reason and len(pairs) > 1 else rung.reason
            rungs.append(replace(rung, reason=reason))
    if len(left) == len(pairs):
        reason = (
            f"{a.name} and {b.name} give {', '.join(repr(ours) for ours, _ in left)}, of which none has one row per image: give them "
            "an output whose first dimension is the batch"
        )
        return Agreement(Rung(a.name, b.name, None, None, None, judged, "not_run", reason), given.notes)
    rung = worst(rungs)
    if tolerance is not None:
        rung = replace(rung, tolerance=tolerance)
        if tolerance.top1_min is not None and rungs[0].max_abs is not None and rungs[0].top1_agreement is None:
            raise RecipeError(
                f"the outputs of {a} and {b} name no class, so that top1_min cannot be judged; bound cosine_min or spread_max instead"
            )
    if allowed is None and rung.verdict == "pass":
        rung = replace(rung, verdict="not_run", reason=_not_judged(*artifacts))
    if rung.verdict == "fail" and rung.cosine_min is not None and not given.real and any(map(_may_clip, artifacts)):
        rung = replace(rung, verdict="not_run", reason=f"{rung.reason}; {CLIPPED}")
    return Agreement(
        rung, (*given.notes, *_which(artifacts, [pair for pair in pairs if pair not in left]), *_notes(artifacts))
    )


def _per_image(side: Sequence[Array], batches: Sequence[int]) -> bool:
    """Whether an output has one row for each image, at every batch."""
    return all(each.ndim > 0 and len(each) == batch for each, batch in zip(side, batches, strict=True))


def _rung_of(
    artifacts: tuple[Artifact, Artifact], sides: Sequence[Sequence[Array]], tolerance: Tolerance, *, real: bool
) -> Rung:
    """The rung of one output of both, one array [B, …] for each batch: each image's output is one row of it."""
    a, b = (artifact.path.name for artifact in artifacts)
    shapes = [side[0].shape[1:] for side in sides]
    tokens = any(
        artifact.output in FEATURES for artifact in artifacts
    )  # of others' outputs, what a position is is not known
    expected, got = ([each if tokens else each.reshape(len(each), -1) for each in side] for side in sides)
    rung = compare_outputs(a, b, expected, got, tolerance=tolerance, real_images=real)
    if shapes[0] != shapes[1]:
        shown_shapes = " and ".join(f"{name} {list(shape)}" for name, shape in zip((a, b), shapes, strict=True))
        rung = replace(rung, verdict="fail", reason=f"outputs have other shapes per image: {shown_shapes}")
    return rung


def _is_unheld(artifact: Artifact) -> bool:
    """Whether it is a rounded file of another tool: slimvit has held the weights of its own against the fp32 file."""
    return artifact.precision.name not in (FP32, "fp64") and (
        artifact.precision.reason != "" or artifact.precision.name == EITHER
    )


def _may_clip(artifact: Artifact) -> bool:
    """Whether it is a file of another tool with fixed scales, those of pictures that are not known here."""
    return _is_unheld(artifact) and artifact.fixed_scales


def _held_by_spread(rung: Rung, sides: Sequence[Sequence[Array]], images: str) -> Rung:
    """The rung, failed where the outputs do not follow the image: a cosine says nothing of that where all have a large mean."""
    error = spread_error(*(side[-1].reshape(len(side[-1]), -1) for side in sides))
    if error <= SPREAD_ERRORS[images]:
        return rung
    reason = (
        f"Σ‖y−z‖² is {error:.3g} of Σ‖y−ȳ‖², at most {SPREAD_ERRORS[images]} on {images}: how the outputs of {rung.from_} "
        f"differ between images is lost in {rung.to}"
    )
    return replace(rung, verdict="fail", reason=reason)


def _names_classes(artifacts: tuple[Artifact, Artifact], pair: tuple[str, str]) -> bool:
    """Whether the largest number of an output names a class."""
    ranks = [artifact.ranks[name] for artifact, name in zip(artifacts, pair, strict=True)]
    return all(rank in (2, None) for rank in ranks) and all(
        artifact.output in ("logits", None) for artifact in artifacts
    )


def _pairs(a: Artifact, b: Artifact) -> tuple[list[tuple[str, str]], str]:
    """The outputs that are compared, and why there is none where all of them are `choices`.

    They are all that have one name, "logits" first; else the "logits", or the first, of each.
    """
    common = sorted((name for name in a.ranks if name in b.ranks), key=lambda name: name != LOGITS)
    pairs = [(name, name) for name in common] or [(a.main_output, b.main_output)]
    chosen = {pair: why for pair in pairs if (why := a.choices.get(pair[0]) or b.choices.get(pair[1]))}
    if len(chosen) == len(pairs):
        (ours, theirs), why = next(iter(chosen.items()))
        return [], (
            f"{a.path.name} and {b.path.name} give {why}, in {ours!r} and {theirs!r}, which files can share that are not the same "
            "model: compare files that give the scores of all classes"
        )
    return [pair for pair in pairs if pair not in chosen], ""


def _lacking(a: Artifact, b: Artifact) -> list[str]:
    """The outputs that A gives and B does not, where both call others alike; of several layers in any case."""
    alike = any(name in b.ranks for name in a.ranks) or (a.output == "layers" and len(a.ranks) > 1)
    return [name for name in a.ranks if name not in b.ranks] if alike else []


def _which(artifacts: tuple[Artifact, Artifact], pairs: Sequence[tuple[str, str]]) -> list[str]:
    """What was compared where that is a choice, and what was not."""
    notes = [
        f"Compared are {ours} of {artifacts[0].path.name} and {theirs} of {artifacts[1].path.name}."
        for ours, theirs in pairs
        if ours != theirs
    ]
    for artifact, names in zip(artifacts, zip(*pairs, strict=True), strict=True):
        if rest := [name for name in artifact.ranks if name not in names]:
            notes.append(f"Not compared: {', '.join(rest)} of {artifact.path.name}.")
    return list(dict.fromkeys(notes))


def _notes(artifacts: tuple[Artifact, Artifact]) -> list[str]:
    return list(dict.fromkeys(note for artifact in artifacts for note in artifact.notes))


@dataclass(frozen=True)
class _Compared:
    """The images that two artifacts are compared on.

    Attributes:
        images: [N, C, H, W], float32, such that both can be given them without rounding.
        real: whether they are pictures.
        preprocess: how they were prepared; None for noise.
        notes: one sentence for each thing that was assumed.
    """

    images: Array
    real: bool
    preprocess: Preprocess | None
    notes: tuple[str, ...] = ()


def _compared_on(
    artifacts: tuple[Artifact, Artifact],
    data: str,
    asked: Preparation,
    size: tuple[int, ...],
    *,
    top1: bool,
    spread: bool,
) -> _Compared:
    """The images of `parity_of`; many if top-1 is judged, and at least `BLOBS` if the spread over images is."""
    if data == SYNTHETIC:
        if asked != Preparation():
            raise RecipeError("images are prepared where they come from --data; seeded noise is fed as it is")
        known = next((artifact.preprocess for artifact in artifacts if artifact.preprocess), None)
        fed = noise(size, max(BATCHES))
        fed = np.concatenate([fed, blobs(size, BLOBS)]) if spread else fed
        chosen = _Compared(fed, False, known or _of_noise(*artifacts, size=size))
    else:
        describing = _describing(artifacts, asked)
        preprocess, notes = prepared(describing, asked, size)
        notes += [
            f"Images are prepared as {describing.path.name} says; {artifact.path.name} says otherwise."
            for artifact in artifacts
            if artifact.preprocess and describing.preprocess and artifact.preprocess != describing.preprocess
        ]
        source = resized_source(data, preprocess, asked)
        images = source.split("validation")
        few = source.synthetic or not top1
        count = max(*BATCHES, min(COMPARED if not few else BLOBS if spread else 0, len(images)))
        batch = stack_images(source.to_compare(count))
        chosen = _Compared(batch, not source.synthetic, preprocess, tuple(notes))
    images_, rounded = chosen.images, []
    for artifact in artifacts:
        if artifact.image.takes_pixels and (how := artifact.preprocess or chosen.preprocess) is not None:
            images_ = representable(images_, how)
            rounded.append(f"Both are given images that pixels can say, since {artifact.path.name} takes pixels.")
        elif artifact.image.type == "float16":
            images_ = images_.astype(np.float16).astype(np.float32)
            rounded.append(f"Both are given images rounded to fp16, which is what {artifact.path.name} takes.")
    return replace(chosen, images=images_, notes=(*chosen.notes, *rounded))


def _describing(artifacts: tuple[Artifact, Artifact], asked: Preparation) -> Artifact:
    """The one of two artifacts that says how images are prepared: A if it does, else B; else what takes no pixels."""
    saying = [artifact for artifact in artifacts if artifact.preprocess]
    floats = [artifact for artifact in artifacts if not artifact.image.takes_pixels]
    if asked.mean is not None or asked.std is not None:
        saying = [artifact for artifact in saying if artifact in floats]
    return [*saying, *floats, *artifacts][0]


def noise(size: tuple[int, ...], count: int) -> Array:
    """Seeded normal images [count, C, H, W], float32."""
    return np.random.default_rng(0).standard_normal((count, *size)).astype(np.float32)


def blobs(size: tuple[int, ...], count: int) -> Array:
    """Seeded normal images [count, C, H, W], float32, of 1, 2, 4 or 8 squares a side; samples of another rank are plain noise."""
    if len(size) != 3:
        return noise(size, count)
    rng, (channels, height, width) = np.random.default_rng(1), size
    images = []
    for index in range(count):
        side = 2 ** (index % 4)
        coarse = rng.standard_normal((channels, side, side))
        images.append(coarse[:, np.arange(height) * side // height][:, :, np.arange(width) * side // width])
    return np.array(images, np.float32)


def _not_judged(*artifacts: Artifact) -> str:
    unknown = [artifact for artifact in artifacts if tolerance_of(artifact.precision) is None]
    said = [f"{artifact.path.name} is {artifact.precision.name or 'of no known precision'}" for artifact in unknown]
    return f"{' and '.join(dict.fromkeys(said))}, for which slimvit has no tolerance: not judged; name a bound with --cosine-min"


def _require_one_layout(a: Artifact, b: Artifact) -> None:
    """Raises RecipeError where one takes float images with the channels first and the other with the channels last."""
    floats = [artifact for artifact in (a, b) if artifact.image.type in FLOATS]
    if len({artifact.image.channels_last for artifact in floats}) > 1:
        said = " and ".join(f"{artifact.path} takes {shown(artifact.image.sample)} per image" for artifact in floats)
        raise RecipeError(f"{said}; one has its channels first, the other last. Bring them into one layout.")


def _of_noise(a: Artifact, b: Artifact, *, size: tuple[int, ...]) -> Preprocess | None:
    """How noise is thought to be normalised where both files take pixels and say no more; None where none does.

    Raises:
        RecipeError: one takes pixels and the other what is behind an unknown preprocessing.
    """
    pixels = [artifact for artifact in (a, b) if artifact.image.takes_pixels]
    if not pixels:
        return None
    if len(pixels) < 2 or len(size) != 3:
        raise RecipeError(
            f"{pixels[0].path} takes uint8 pixels and the other preprocessed images; how they are prepared is not known. "
            "Compare them on pictures: --data, --mean and --std."
        )
    return raw_pixels((size[0], size[1], size[2]))
