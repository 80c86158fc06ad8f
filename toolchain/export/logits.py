"""Any artifact as a function from images to one of its outputs: its accuracy on images, and how far two of them agree."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from toolchain.artifact import ModelRecord, Preprocess
from toolchain.data import DataSource, open_source
from toolchain.errors import ArtifactError, DataError, RecipeError, SlimvitError
from toolchain.export.calls import Array, Call, declared_preprocess, opened, preprocess_in
from toolchain.export.inputs import FLOATS, ImageInput, folder_input, input_of, resolved, shown
from toolchain.export.onnx_graph import OUTPUT, first_line, read_onnx
from toolchain.export.parity import BATCHES, Rung, Tolerance, compare
from toolchain.export.pixels import representable
from toolchain.export.precision import COMPARED, Reading, in_steps, precision_of, reference_target, tolerance_of
from toolchain.export.probabilities import output_in
from toolchain.export.stage import stack_images, torch_call
from toolchain.outputs import Output, label_classes, output_of
from toolchain.surgery.replay import load_model
from toolchain.training.evaluate import Accuracy, accuracy

SYNTHETIC = "none"
"""The data source of seeded noise."""
SPREAD = 0.5, 0.25
"""(mean, std) that raw pixels are thought to be normalised by, where a file takes them and says no more of them."""
ASSUMED = "bicubic"


@dataclass(frozen=True)
class Preparation:
    """How images are to be prepared, in place of what an artifact says or where it says nothing; None leaves it.

    Attributes:
        mean, std: one value, or one per channel, for pixels in 0…1.
        crop_pct: share of the resized image that the centre crop keeps.
        interpolation: timm's name of the resize filter.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop_pct: float | None = None
    interpolation: str | None = None

    @property
    def asked(self) -> dict[str, object]:
        """What is to be replaced, by its name in `Preprocess`."""
        return {name: value for name, value in vars(self).items() if value is not None}


@dataclass(frozen=True)
class Form:
    """What an artifact takes and gives, read without opening it.

    Attributes:
        path: a model folder or an ONNX file.
        input: its one input.
        outputs: name → rank of its outputs, None where that is not known.
        precision: and where that is known from.
        preprocess: what it says about its input; None where it says nothing.
        output: what it says that its outputs are; None where it says nothing.
    """

    path: Path
    input: ImageInput
    outputs: Mapping[str, int | None]
    precision: Reading
    preprocess: Preprocess | None
    output: Output | None

    @property
    def notes(self) -> list[str]:
        """One sentence each on what was read from the graph or has to be known of it."""
        said = []
        if self.precision.reason:
            said.append(f"{self.path.name} is {self.precision}.")
        if self.input.batch is not None:
            said.append(f"{self.path.name} has a fixed batch and is run at it: {self.input.batch}.")
        if self.input.channels_last and self.preprocess is None:
            said.append(
                f"{self.path.name} takes {shown(self.input.sample)}, of which the last is taken for the channels."
            )
        if self.input.takes_pixels and self.preprocess is None:
            said.append(f"{self.path.name} takes uint8 and is fed pixels, 0…255.")
        return said


@dataclass(frozen=True)
class Evaluation:
    """The accuracy of an artifact, and one sentence for each thing that was assumed of it or replaced in what it says."""

    accuracy: Accuracy
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Agreement:
    """The rung of two artifacts, and one sentence for each thing that was assumed of them."""

    rung: Rung
    notes: tuple[str, ...]


def form_of(path: Path) -> Form:
    """What an artifact takes and gives.

    Raises:
        StorageError: it cannot be read.
        ArtifactError: it is damaged.
        RecipeError: it is no function of images.
    """
    if path.is_dir():
        record = ModelRecord.load(path / "model.json")
        size = folder_input(record.preprocess)
        return Form(path, size, {OUTPUT: 2}, precision_of(path), record.preprocess, record.model.output)
    model = read_onnx(path)
    kinds = {value.name: value.type.tensor_type for value in model.graph.output}
    outputs = {name: len(kind.shape.dim) if kind.HasField("shape") else None for name, kind in kinds.items()}
    preprocess = declared_preprocess(model, path)
    return Form(path, input_of(model, path), outputs, precision_of(path), preprocess, output_in(model))


@contextlib.contextmanager
def opened_form(form: Form, output: str = "", preprocess: Preprocess | None = None) -> Iterator[Call]:
    """Images [B, C, H, W] → one output [B, …] of an artifact, in a block.

    A folder runs in torch, a file in ONNX Runtime on the CPU, or in what can run its precision.

    Args:
        form: the artifact.
        output: which; "" is "logits", or the first where there is none of that name.
        preprocess: how the images were prepared, for a file that takes pixels and does not say.

    Raises:
        TargetUnavailable: nothing here runs the file's precision.
        StorageError, ArtifactError: it cannot be read.
    """
    if form.path.is_dir():
        yield torch_call(load_model(form.path).module)
        return
    target, threads = reference_target(form.precision), torch.get_num_threads()
    with opened(target, form.path, threads, output=output, preprocess=preprocess) as call:
        yield call


def prepared(form: Form, asked: Preparation, input_shape: tuple[int, ...] | None) -> tuple[Preprocess, list[str]]:
    """(how images are prepared for an artifact, one sentence for each thing that was replaced or assumed).

    Args:
        form: the artifact.
        asked: what is put in place of what it says, or where it says nothing.
        input_shape: (C, H, W) for a file that leaves it open.

    Raises:
        ArtifactError: it says nothing and mean or std are not named.
        RecipeError: its input is no image, or it normalises by itself.
    """
    size, own = resolved({form.path: form.input}, input_shape), form.preprocess
    if len(size) != 3:
        raise RecipeError(f"{form.path} takes {shown(size)} per sample, which is no image [C, H, W]")
    channels, height, width = size
    if form.input.takes_pixels and (asked.mean is not None or asked.std is not None):
        raise RecipeError(
            f"{form.path} takes pixels and normalises them by itself; --mean and --std (mean and std of [data]) do not apply"
        )
    if own is None and form.input.takes_pixels:
        own, known = raw_pixels((channels, height, width)), False
    elif own is None:
        if asked.mean is None or asked.std is None:
            preprocess_in(read_onnx(form.path), form.path)  # raises: it names the options
        assert asked.mean is not None
        assert asked.std is not None
        own, known = Preprocess((channels, height, width), asked.mean, asked.std), False
    else:
        own, known = replace(own, input_size=(channels, height, width)), True
    return _replaced(form, own, asked, known=known)


def _replaced(form: Form, own: Preprocess, asked: Preparation, *, known: bool) -> tuple[Preprocess, list[str]]:
    """`prepared`, with what is known of the artifact or assumed of it."""
    channels, notes = own.input_size[0], []
    values = dict(asked.asked)
    for name in ("mean", "std"):
        if isinstance(each := values.get(name), tuple) and len(each) == 1:
            values[name] = each * channels
    if not known:
        left = {"crop_pct": "nothing is cropped", "interpolation": f"pictures are resized by {ASSUMED}"}
        own = replace(own, interpolation=ASSUMED)
        if said := [words for name, words in left.items() if name not in values]:
            notes.append(f"{form.path.name} does not say how images are prepared: {' and '.join(said)}.")
    for name, value in values.items() if known else ():
        if (before := getattr(own, name)) != value:
            notes.append(f"{name} is {_brief(value)}, as asked for; {form.path.name} says {_brief(before)}.")
    return replace(own, **values), notes  # type: ignore[arg-type]


def _brief(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)


def source_for(name: str, preprocess: Preprocess, classes: str = "", calibration_images: int = 512) -> DataSource:
    """The data source of that name, its images prepared as an artifact declares; raises DataError.

    Args:
        name: of the source.
        preprocess: of the artifact.
        classes: a class map, as in `open_source`.
        calibration_images: 0 where none is needed, so that too few are nobody's concern.
    """
    return open_source(
        name,
        input_size=preprocess.input_size,
        data_config={
            "mean": preprocess.mean,
            "std": preprocess.std,
            "interpolation": preprocess.interpolation,
            "crop_pct": preprocess.crop_pct,
            "crop_mode": preprocess.crop_mode or "center",
        },
        mean=preprocess.mean,
        std=preprocess.std,
        crop_pct=preprocess.crop_pct,
        exif_orientation=preprocess.exif_orientation,
        classes=classes,
        calibration_images=calibration_images,
    )


def _source(
    name: str, preprocess: Preprocess, asked: Preparation, classes: str = "", calibration_images: int = 0
) -> DataSource:
    """`source_for`, refused where it does not resize as it was asked to."""
    source = source_for(name, preprocess, classes, calibration_images)
    if asked.interpolation is not None and source.interpolation != asked.interpolation:
        raise RecipeError(
            f"images of {name!r} are resized by {source.interpolation}, always; remove interpolation = {asked.interpolation!r}"
        )
    return source


def accuracy_of(
    path: Path,
    data: str,
    split: str,
    *,
    classes: str = "",
    asked: Preparation = Preparation(),
    input_shape: tuple[int, ...] | None = None,
) -> Evaluation:
    """Top-1 predictions of an artifact beside the labels of one split of a data source.

    Args:
        path: a model folder or an ONNX file.
        data: the source.
        split: its split.
        classes: a class map, as in `open_source`.
        asked: how images are prepared, in place of what the artifact says or where it says nothing.
        input_shape: (C, H, W) for a file that leaves it open.

    Raises:
        DataError: the source is unknown, has no labels, or does not fit.
        ModelError: the artifact has other classes than the source.
        ArtifactError: it does not say how its input is preprocessed, and that was not asked for either.
    """
    form = form_of(path)
    preprocess, notes = prepared(form, asked, input_shape)
    with opened_form(form, preprocess=preprocess) as run:
        call = _explained(run, path)
        source = _source(data, preprocess, asked, classes, 512 if split == "calibration" else 0)
        if not source.labelled:
            raise DataError(f"the data source {data!r} has no labels; accuracy needs them")
        images = source.split(split)
        first = call(stack_images([images[0][0]]))
        if first.ndim != 2:
            raise RecipeError(f"{path} gives an output of shape {list(first.shape)}, which is no [batch, classes]")
        source.check_classes(label_classes(output_of(form.output, first.shape[1]), first.shape[1]))
        result = accuracy(lambda batch: torch.from_numpy(call(batch.numpy())), images)
    return Evaluation(result, (*notes, *form.notes))


def _explained(call: Call, path: Path) -> Call:
    """The same function; what a runtime raises becomes an ArtifactError."""

    def run(images: Array) -> Array:
        try:
            return call(images)
        except SlimvitError:
            raise
        except Exception as error:  # every runtime raises its own
            raise ArtifactError(
                f"{path} cannot run on images {list(images.shape)}: {type(error).__name__}: {first_line(error)}"
            ) from error

    return run


def parity_of(
    a: Path,
    b: Path,
    data: str,
    tolerance: Tolerance | None = None,
    *,
    asked: Preparation = Preparation(),
    input_shape: tuple[int, ...] | None = None,
) -> Agreement:
    """The rung of two artifacts on validation images of a data source or on noise, at batch 1 and 3; A is taken as right.

    Where top-1 is judged, they are compared on `COMPARED` real images as well: three say little of it. Where a precision
    has no tolerance and none is given, what they differ by is told and not judged.

    Args:
        a: what is right: a model folder or an ONNX file.
        b: what is compared with it.
        data: the source; "none" is seeded noise, which needs no preprocessing.
        tolerance: what is allowed; None is what the precisions of both ask for.
        asked: how images are prepared, in place of what A says or where neither says anything.
        input_shape: (C, H, W) where both leave it open.

    Raises:
        RecipeError: the artifacts take images of different sizes or layouts, or the source does not fit them.
        ArtifactError: neither says how its input is preprocessed, and images were asked for.
    """
    forms = form_of(a), form_of(b)
    _require_one_layout(*forms)
    outputs = _outputs(*forms)
    allowed = tolerance or tolerance_of(*(form.precision for form in forms))
    judged = allowed or Tolerance(None, -1.0, None)
    size = resolved({form.path: form.input for form in forms}, input_shape)
    ranks = [form.outputs[name] for form, name in zip(forms, outputs, strict=True)]
    classes = all(rank in (2, None) for rank in ranks) and all(form.output in ("logits", None) for form in forms)
    if not classes:
        judged = replace(judged, top1_min=None)
    given = _compared_on(forms, data, asked, size, top1=judged.top1_min is not None)
    shapes: dict[Path, set[tuple[int, ...]]] = {a: set(), b: set()}

    def rows(path: Path, call: Call) -> Call:
        """The same function, each image's output as one row."""

        def run(images: Array) -> Array:
            output = call(images)
            shapes[path].add(output.shape[1:])
            return output.reshape(len(output), -1)

        return run

    with (
        opened_form(forms[0], outputs[0], given.preprocess) as expected,
        opened_form(forms[1], outputs[1], given.preprocess) as got,
    ):
        rung = compare(
            a.name,
            b.name,
            in_steps(rows(a, expected)),
            in_steps(rows(b, got)),
            given.images,
            tolerance=judged,
            real_images=given.real and classes,
            batches=sorted({*BATCHES, len(given.images)}),
        )
    if all(shapes.values()) and shapes[a] != shapes[b]:
        shown_shapes = " and ".join(f"{path.name} {list(next(iter(each)))}" for path, each in shapes.items())
        rung = replace(rung, verdict="fail", reason=f"outputs have other shapes per image: {shown_shapes}")
    if allowed is None and rung.verdict == "pass":
        rung = replace(rung, verdict="not_run", reason=_not_judged(*forms))
    several = any(len(form.outputs) > 1 for form in forms) and set(outputs) != {OUTPUT}
    which = [f"Compared is one output of several: {' with '.join(dict.fromkeys(outputs))}."] if several else []
    return Agreement(rung, (*given.notes, *which, *(note for form in forms for note in form.notes)))


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
    forms: tuple[Form, Form], data: str, asked: Preparation, size: tuple[int, ...], *, top1: bool
) -> _Compared:
    """The images of `parity_of`; many if top-1 is judged."""
    if data == SYNTHETIC:
        if asked.asked:
            raise RecipeError("images are prepared where they come from --data; seeded noise is fed as it is")
        known = next((form.preprocess for form in forms if form.preprocess), None)
        chosen = _Compared(noise(size, max(BATCHES)), False, known or _of_noise(*forms, size=size))
    else:
        describing = _describing(forms, asked)
        preprocess, notes = prepared(describing, asked, size)
        notes += [
            f"Images are prepared as {describing.path.name} says; {form.path.name} says otherwise."
            for form in forms
            if form.preprocess and describing.preprocess and form.preprocess != describing.preprocess
        ]
        source = _source(data, preprocess, asked)
        images = source.split("validation")
        few = source.synthetic or not top1
        count = max(BATCHES) if few else max(*BATCHES, min(COMPARED, len(images)))
        batch = stack_images(source.to_compare(count))
        chosen = _Compared(batch, not source.synthetic, preprocess, tuple(notes))
    images_, rounded = chosen.images, []
    for form in forms:
        if form.input.takes_pixels and (how := form.preprocess or chosen.preprocess) is not None:
            images_ = representable(images_, how)
            rounded.append(f"Both are given images that pixels can say, since {form.path.name} takes pixels.")
        elif form.input.type == "float16":
            images_ = images_.astype(np.float16).astype(np.float32)
            rounded.append(f"Both are given images rounded to fp16, which is what {form.path.name} takes.")
    return replace(chosen, images=images_, notes=(*chosen.notes, *rounded))


def _describing(forms: tuple[Form, Form], asked: Preparation) -> Form:
    """The one of two artifacts that says how images are prepared: A if it does, else B; else what takes no pixels."""
    saying = [form for form in forms if form.preprocess]
    floats = [form for form in forms if not form.input.takes_pixels]
    if asked.mean is not None or asked.std is not None:
        saying = [form for form in saying if form in floats]
    return [*saying, *floats, *forms][0]


def noise(size: tuple[int, ...], count: int) -> Array:
    """Seeded normal images [count, C, H, W], float32."""
    return np.random.default_rng(0).standard_normal((count, *size)).astype(np.float32)


def _not_judged(*forms: Form) -> str:
    unknown = [form for form in forms if tolerance_of(form.precision) is None]
    names = " and ".join(f"{form.path.name} is {form.precision.name or 'of no known precision'}" for form in unknown)
    return f"{names}, for which slimvit has no tolerance: not judged; name a bound with --cosine-min"


def _outputs(a: Form, b: Form) -> tuple[str, str]:
    """The outputs that are compared: those called logits, else the first that both have, else the first of each."""
    common = [name for name in a.outputs if name in b.outputs]
    if common:
        name = OUTPUT if OUTPUT in common else common[0]
        return name, name
    return next(iter(a.outputs)), next(iter(b.outputs))


def _require_one_layout(a: Form, b: Form) -> None:
    """Raises RecipeError where one takes float images with the channels first and the other with the channels last."""
    floats = [form for form in (a, b) if form.input.type in FLOATS]
    if len({form.input.channels_last for form in floats}) > 1:
        said = " and ".join(f"{form.path} takes {shown(form.input.sample)} per image" for form in floats)
        raise RecipeError(f"{said}; one has its channels first, the other last. Bring them into one layout.")


def _of_noise(a: Form, b: Form, *, size: tuple[int, ...]) -> Preprocess | None:
    """How noise is thought to be normalised where both files take pixels and say no more; None where none does.

    Raises:
        RecipeError: one takes pixels and the other what is behind an unknown preprocessing.
    """
    pixels = [form for form in (a, b) if form.input.takes_pixels]
    if not pixels:
        return None
    if len(pixels) < 2 or len(size) != 3:
        raise RecipeError(
            f"{pixels[0].path} takes uint8 pixels and the other preprocessed images; how they are prepared is not known. "
            "Compare them on pictures: --data, --mean and --std."
        )
    return raw_pixels((size[0], size[1], size[2]))


def raw_pixels(size: tuple[int, int, int]) -> Preprocess:
    """How images are normalised that stand for pixels and nothing else: so that noise covers 0…255."""
    return Preprocess(size, (SPREAD[0],) * size[0], (SPREAD[1],) * size[0])
