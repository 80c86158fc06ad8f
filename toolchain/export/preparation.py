"""Preprocessing for an artifact: as declared by the file, overridden by the user, or assumed."""

from __future__ import annotations

from dataclasses import dataclass, replace

from toolchain.artifacts import Artifact
from toolchain.artifacts.inputs import shown
from toolchain.data import DataSource, open_source
from toolchain.data.transforms import Wanted
from toolchain.errors import RecipeError
from toolchain.export.calls import no_preprocess
from toolchain.model import Preprocess

SPREAD = 0.5, 0.25
"""(mean, std) that raw pixels are thought to be normalised by, where a file takes them and says no more of them."""
ASSUMED = "bicubic"
COLUMNS = ("image_column", "label_column")


@dataclass(frozen=True)
class Preparation:
    """How images are to be prepared, in place of what an artifact says or where it says nothing; None leaves it.

    Attributes:
        mean, std: one value, or one per channel, for pixels in 0…1.
        crop_pct: share of the resized image that the centre crop keeps.
        interpolation: timm's name of the resize filter.
        image_column, label_column: of a table that has several, as in `Wanted`; no artifact says them.
        crop_mode: timm's crop mode.
        exif_orientation: whether a picture is turned first as its EXIF orientation says.
    """

    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    crop_pct: float | None = None
    interpolation: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    crop_mode: str | None = None
    exif_orientation: bool | None = None

    @property
    def asked(self) -> dict[str, object]:
        """The overridden values, by their names in `Preprocess`."""
        return {name: value for name, value in vars(self).items() if value is not None and name not in COLUMNS}


def prepared(artifact: Artifact, asked: Preparation, size: tuple[int, ...]) -> tuple[Preprocess, list[str]]:
    """(how images are prepared for an artifact, one sentence for each thing that was replaced or assumed).

    Args:
        artifact: the artifact.
        asked: values that override the artifact's declaration or complete it.
        size: of an image, (C, H, W), as `resolved` gives it.

    Raises:
        ArtifactError: it says nothing and mean or std are not named.
        RecipeError: its input is no image, or it normalises by itself.
    """
    own = artifact.preprocess
    if len(size) != 3:
        raise RecipeError(f"{artifact.path} takes {shown(size)} per sample, which is no image [C, H, W]")
    channels, height, width = size
    if artifact.image.takes_pixels and (asked.mean is not None or asked.std is not None):
        raise RecipeError(
            f"{artifact.path} takes pixels and normalises them by itself; --mean and --std (mean and std of [data]) do not apply"
        )
    if own is None and artifact.image.takes_pixels:
        own, known = raw_pixels((channels, height, width)), False
    elif own is None:
        if asked.mean is None or asked.std is None:
            raise no_preprocess(artifact.path)
        own, known = Preprocess((channels, height, width), asked.mean, asked.std), False
    else:
        own, known = replace(own, input_size=(channels, height, width)), True
    return _replaced(artifact, own, asked, known=known)


def _replaced(artifact: Artifact, own: Preprocess, asked: Preparation, *, known: bool) -> tuple[Preprocess, list[str]]:
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
            notes.append(f"{artifact.path.name} does not say how images are prepared: {' and '.join(said)}.")
    for name, value in values.items() if known else ():
        if (before := getattr(own, name)) != value:
            notes.append(f"{name} is {_brief(value)}, as asked for; {artifact.path.name} says {_brief(before)}.")
    return replace(own, **values), notes  # type: ignore[arg-type]


def _brief(value: object) -> str:
    return str(list(value)) if isinstance(value, tuple) else str(value)


def source_for(
    name: str,
    preprocess: Preprocess,
    classes: str = "",
    calibration_images: int = 512,
    asked: Preparation = Preparation(),
) -> DataSource:
    """The data source of that name, its images prepared as an artifact declares; raises DataError.

    Args:
        name: of the source.
        preprocess: of the artifact.
        classes: a class map, as in `open_source`.
        calibration_images: 0 if none are needed; then nobody is warned of too few.
        asked: names the columns of a table that has several; how images are prepared is said by `preprocess`.
    """
    return open_source(
        name,
        Wanted(
            preprocess.input_size,
            {
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
            calibration_images=calibration_images,
            image_column=asked.image_column,
            label_column=asked.label_column,
            crop_mode=asked.crop_mode,
        ),
        classes=classes,
    )


def raw_pixels(size: tuple[int, int, int]) -> Preprocess:
    """How images are normalised that stand for pixels and nothing else: so that noise covers 0…255."""
    return Preprocess(size, (SPREAD[0],) * size[0], (SPREAD[1],) * size[0])


def resized_source(
    name: str, preprocess: Preprocess, asked: Preparation, classes: str = "", calibration_images: int = 0
) -> DataSource:
    """As `source_for`; raises if the source does not resize with the requested filter and crop."""
    source = source_for(name, preprocess, classes, calibration_images, asked)
    if asked.interpolation is not None and source.preprocessing.interpolation != asked.interpolation:
        raise RecipeError(
            f"images of {name!r} are resized by {source.preprocessing.interpolation}, always; remove interpolation = {asked.interpolation!r}"
        )
    return source
