"""What every kind of artifact can report: files, bytes, digest, inputs and outputs, precision, bytes by layer."""

from __future__ import annotations

import fnmatch
import hashlib
import zlib
from abc import ABC
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from toolchain.artifacts.inputs import ImageInput, Port, Signature, fit, image_input, shown, signature_of
from toolchain.errors import ArtifactError, RecipeError
from toolchain.files import files_below, sha256
from toolchain.model import Preprocess
from toolchain.outputs import LOGITS, Output

Part = tuple[str, str]
"""(layer, part of it)."""
Fact = str | int | float | bool | None | Sequence["Fact"] | Mapping[str, "Fact"]
"""A JSON value."""
INTEGERS = frozenset({"bool", *(f"{sign}int{bits}" for sign in ("", "u") for bits in (16, 32, 64))})
"""Element types that are no scores; those of 8 bits can be, of a quantised file."""
GZIP = 31
"""zlib's name for a gzip stream of the largest window."""


@dataclass(frozen=True)
class Reading:
    """The precision of an artifact, and what it was read from.

    Attributes:
        name: a precision of a recipe, or of others' files a type of `onnx_types.COARSEST_FIRST`; "" where it is not known.
        reason: the words that say what it was read from; "" where the artifact says so itself and its graph agrees.
    """

    name: str
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.name or 'of no known precision'} ({self.reason})" if self.reason else self.name


@dataclass(frozen=True)
class Artifact(ABC):
    """A file or folder that ships. Properties are read once and cached: open it again after the file changed.

    A subclass sets `name`, `word` and `patterns`, and overrides the properties that its format can answer; this class only
    knows files and bytes. Every property raises StorageError if a file cannot be read, and ArtifactError if it is damaged.

    Attributes:
        path: the file that names it, or the folder.
        name: of the kind, in `Target.takes` and in `inspect`.
        word: its name in messages; an appended s makes the plural.
        patterns: wildcards over its files' names, that of `path` first.
    """

    path: Path
    name: ClassVar[str]
    word: ClassVar[str]
    patterns: ClassVar[tuple[str, ...]]

    @classmethod
    def recognises(cls, path: Path) -> bool:
        """Whether the file or folder at a path is of this kind."""
        return path.is_file() and fnmatch.fnmatchcase(path.name, cls.patterns[0])

    @classmethod
    def named_beside(cls, path: Path) -> Path | None:
        """The main file of the artifact that the file at a path belongs to, by their endings; None if there is none."""
        ending, *others = (pattern.removeprefix("*") for pattern in cls.patterns)
        if not cls.patterns[0].startswith("*"):
            return None
        beside = (path.with_name(path.name.removesuffix(each) + ending) for each in others if path.name.endswith(each))
        return next((each for each in beside if cls.recognises(each)), None)

    @property
    def needs(self) -> tuple[str, ...]:
        """The files that belong to that at `path`, relative to its folder; they need not be there."""
        ending, *others = (pattern.removeprefix("*") for pattern in self.patterns)
        return tuple(f"{self.path.name.removesuffix(ending)}{each}" for each in others)

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """Every file that has to be shipped, sorted."""
        return tuple(files_below(self.path))

    @property
    def folder(self) -> Path:
        """The folder of its files."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def size_bytes(self) -> int:
        """The sum of the sizes of its files."""
        return sum(file.stat().st_size for file in self.files)

    @property
    def download_bytes(self) -> int:
        """Its bytes as gzip sends them, file by file, at its default level."""
        total = 0
        for file in self.files:
            packer = zlib.compressobj(wbits=GZIP)
            with file.open("rb") as stream:
                while chunk := stream.read(1 << 20):
                    total += len(packer.compress(chunk))
            total += len(packer.flush())
        return total

    @cached_property
    def file_sha256s(self) -> dict[str, str]:
        """File → its sha256, for every file, named from its folder."""
        return {file.relative_to(self.folder).as_posix(): sha256(file) for file in self.files}

    @property
    def sha256(self) -> str:
        r"""Its digest: the sha256 of its one file, or of the listing "digest  name" of its files.

        The listing is that of `sha256sum` in its folder, sorted by name, so that no tool of ours is needed:
        `sha256sum FILE`, or in a folder `find . -type f -printf "%P\0" | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum`.

        Raises:
            ArtifactError: there is no file in its folder.
        """
        digests = self.file_sha256s
        if not digests:
            raise ArtifactError(f"{self.path} is a folder without any file: it holds not one byte; name another one")
        if not self.path.is_dir() and len(digests) == 1:
            return next(iter(digests.values()))
        listing = "".join(f"{digests[name]}  {name}\n" for name in sorted(digests))
        return hashlib.sha256(listing.encode()).hexdigest()

    @property
    def params(self) -> int:
        """Count of the numbers in its tensors, without scalars and indices; raises RecipeError if its format does not tell."""
        raise RecipeError(f"parameters cannot be read from {self.path}; judge an ONNX file or a model folder by params")

    @property
    def nodes(self) -> int:
        """Count of the nodes of its graph, with those in subgraphs and functions; raises RecipeError if its format does not tell."""
        raise RecipeError(f"{self.path} has no ONNX nodes; judge an ONNX file by nodes")

    @property
    def inputs(self) -> tuple[Port, ...]:
        """Its inputs; raises RecipeError if its format does not tell."""
        raise RecipeError(f"cannot tell the inputs of {self.path}; expected an .onnx file or a model folder")

    @property
    def outputs(self) -> tuple[Port, ...]:
        """Its outputs; raises RecipeError if its format does not tell."""
        raise RecipeError(f"cannot tell the outputs of {self.path}; expected an .onnx file or a model folder")

    @property
    def preprocess(self) -> Preprocess | None:
        """The preprocessing that the file declares; None if it declares none."""
        return None

    @property
    def output(self) -> Output | None:
        """The kind of output that the file declares; None if it declares none."""
        return None

    @property
    def class_names(self) -> tuple[str, ...]:
        """The class names that it declares, in the order of the outputs; () if it declares none."""
        return ()

    @property
    def precision(self) -> Reading:
        """Its precision, and what it was read from."""
        return Reading("", f"{self.word}s do not tell their precision")

    @property
    def own_precision(self) -> str:
        """The precision that a file made by slimvit declares, else ""."""
        return "" if self.precision.reason else self.precision.name

    @property
    def fixed_scales(self) -> bool:
        """Whether it quantises activations with stored scales, those of its calibration images."""
        return False

    @property
    def parts(self) -> Counter[Part]:
        """(layer, part of it) → bytes; the sum is `size_bytes`."""
        return Counter(
            {(f"(file {file.relative_to(self.folder).as_posix()})", ""): file.stat().st_size for file in self.files}
        )

    def require_whole(self) -> None:
        """Raises ArtifactError where something of it is missing that it, or what lies beside it, tells of."""
        _ = self.parts  # which a reader of a format that names its bytes cannot give of a file that was cut off

    @property
    def layers(self) -> dict[str, int]:
        """Layer → bytes."""
        layers: Counter[str] = Counter()
        for (layer, _), count in self.parts.items():
            layers[layer] += count
        return dict(layers)

    def signature(self, batch: int, sample: tuple[int, ...] | None = None) -> Signature:
        """The shapes and types to feed.

        Args:
            batch: what the first dimension of every input is to be.
            sample: shape of one sample, without the batch; needed where it is left open.

        Raises:
            RecipeError: another batch or shape is fixed than asked for, or a shape is open and was not given.
        """
        return signature_of(self.path, self.inputs, batch, sample)

    @property
    def own_pixels(self) -> bool:
        """Whether the file declares that it takes uint8 pixels [H, W, C], as slimvit's own files can."""
        return False

    @cached_property
    def image(self) -> ImageInput:
        """Its one input, if that takes images; raises RecipeError if it does not."""
        return image_input(self.path, self.inputs, self.preprocess, own_pixels=self.own_pixels)

    @cached_property
    def ranks(self) -> dict[str, int | None]:
        """Output of the model → its rank, None where that is not known; probabilities that slimvit added are left out."""
        return {port.name: None if port.shape is None else len(port.shape) for port in self.outputs}

    @cached_property
    def choices(self) -> dict[str, str]:
        """Output → why its numbers say which classes were chosen and no longer how much speaks for each; of others nothing."""
        whole = {port.name: port.type for port in self.outputs if port.type in INTEGERS and port.name in self.ranks}
        return {name: f"whole numbers ({kind}), such as those of classes" for name, kind in whole.items()}

    @property
    def main_output(self) -> str:
        """The output that is judged: "logits", or "logits" with a number appended; else the first that is none of `choices`, if there is one."""
        called = [name for name in self.ranks if name.startswith(LOGITS)]
        others = [name for name in self.ranks if name not in self.choices]
        return LOGITS if LOGITS in called else next(iter([*called, *others, *self.ranks]))

    @property
    def notes(self) -> list[str]:
        """One sentence for each assumption about how it runs on images, and for each fact that was read from its graph."""
        said, name, image, how = [], self.path.name, self.image, self.preprocess
        if self.precision.reason:
            said.append(f"{name} is {self.precision}.")
        if image.batch is not None and len(image.sample) != 3:
            said.append(
                f"{name} takes {shown((image.batch, *image.sample))}, of which the first is taken for a fixed batch."
            )
        elif image.batch is not None:
            said.append(f"{name} has a fixed batch and is run at it: {image.batch}.")
        if image.channels_last and how is None:
            said.append(f"{name} takes {shown(image.sample)}, of which the last is taken for the channels.")
        if how is not None and not fit(how.input_size, image.size):
            said.append(
                f"{name} says that images are {list(how.input_size)} and takes {shown(image.size)}, channels first; they are "
                "given as it takes them."
            )
        if image.takes_pixels and how is None:
            said.append(f"{name} takes uint8 and is fed pixels, 0…255.")
        return said

    def graph_facts(self, operators: Counter[str]) -> dict[str, Fact]:
        """For `facts`: its inputs and outputs, and the count of its nodes of each operator."""
        nodes = dict(operators.most_common())
        return {"inputs": _shapes(self.inputs), "outputs": _shapes(self.outputs), "nodes": nodes}

    def facts(self) -> dict[str, Fact]:
        """The facts that `inspect` prints."""
        return {"kind": self.name, "bytes": self.size_bytes, "sha256": self.sha256}


@dataclass(frozen=True)
class PlainFile(Artifact):
    """Any other file or folder: it has a size and a digest."""

    name: ClassVar[str] = "file"
    word: ClassVar[str] = "other file"
    patterns: ClassVar[tuple[str, ...]] = ("*",)


def layer_and_part(name: str) -> Part:
    """blocks.0.attn.qkv.weight → (blocks.0.attn.qkv, weight)."""
    layer, dot, part = name.rpartition(".")
    return (layer, part) if dot else (name, "")


def coarsest_of(held: Collection[str], precisions: Mapping[str, str]) -> Reading:
    """The precision of the coarsest type that weights are stored in.

    Args:
        held: types of weights, as a format calls them.
        precisions: type → the precision that it makes, the coarsest first.
    """
    name = next((precision for kind, precision in precisions.items() if kind in held), "")
    return Reading(name, f"its weights are stored as {', '.join(held) or 'nothing that is known'}")


def require_bytes(path: Path, end: int, told: str) -> None:
    """Raises ArtifactError if a file ends before byte `end`, with `told` as the words for what names that byte."""
    if (there := path.stat().st_size) < end:
        raise ArtifactError(f"{path} has {there:,} bytes, and {told}: it is truncated")


def _shapes(ports: Sequence[Port]) -> dict[str, Fact]:
    """Name → shape of inputs or outputs, with the names of open dimensions."""
    return {port.name: None if port.shape is None else list(port.shape) for port in ports}
