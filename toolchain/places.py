"""What a recipe, or a command, names by path: models, data sources and class maps, and what of their names is a path."""

from __future__ import annotations

from pathlib import Path

from toolchain.files import expanded

PATH_SOURCES = ("imagefolder", "images", "fashion-mnist")
"""The kinds of data source whose argument is a path."""
SAVED = "hf"
"""The kind whose argument is a path where it begins as paths do, with "/", "." or "~"; else it is the name of a data set."""
LOCAL, HUB = "local-dir", "hf-hub"
"""What stands before a model's name that is the path of a folder, or a repository of a hub."""
HUB_URL = "hf://"
"""What may stand before a repository's name in place of "hf-hub:"."""
CLASS_LISTS = (
    "imagenet-1k",
    "imagenet-12k",
    "imagenet-21k-goog",
    "imagenet-21k-miil",
    "imagenet-22k",
    "imagenet-22k-ms",
)
"""The class lists that timm ships: which output each synset is of a model that was trained on them."""


def absolute_path(path: str, base: Path) -> str:
    """A path that a file names, from that file's folder; `~` is the user's.

    A link at its end keeps its name: it tells the format, and what belongs to the file lies beside it.
    """
    whole = base / expanded(path)
    return str(whole.parent.resolve() / whole.name if whole.is_symlink() else whole.resolve())


def model_source(name: str) -> tuple[str, str]:
    """("local-dir" or "hf-hub", what follows it) of a model's name; ("", name) for one of timm's own."""
    if name.lower().startswith(HUB_URL):
        return HUB, name[len(HUB_URL) :]
    kind, colon, place = name.partition(":")
    return (kind.lower().replace("_", "-"), place) if colon else ("", name)


def path_of_source(source: str) -> str:
    """The path in the name of a data source; "" where there is none."""
    kind, _, rest = source.partition(":")
    return rest if kind in PATH_SOURCES or (kind == SAVED and rest.startswith(("/", ".", "~"))) else ""


def absolute_source(source: str, base: Path) -> str:
    """The name of a data source with the path in it, if there is one, made absolute from `base`."""
    path = path_of_source(source)
    return f"{source.removesuffix(path)}{absolute_path(path, base)}" if path else source


def absolute_classes(classes: str, base: Path) -> str:
    """The name of a class map, or its path made absolute from `base`; "" if there is none."""
    return classes if not classes or classes in CLASS_LISTS else absolute_path(classes, base)


def absolute_model(name: str, base: Path) -> str:
    """The name of a model with the path in it, if there is one, made absolute from `base`."""
    kind, place = model_source(name)
    return f"{LOCAL}:{absolute_path(place, base)}" if kind == LOCAL else name


def absolute_checkpoint(checkpoint: str, base: Path) -> str:
    """The path of a checkpoint made absolute from `base`; "" if there is none."""
    return absolute_path(checkpoint, base) if checkpoint else ""
