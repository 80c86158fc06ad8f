"""A folder as `save_pretrained` of transformers writes it: config.json and weights → a timm model and its tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from toolchain.errors import ArtifactError, ModelError, StorageError, fault_words
from toolchain.files import sha256
from toolchain.surgery.anatomy import by
from toolchain.surgery.huggingface import LAYOUTS
from toolchain.surgery.huggingface.layout import Config, Design, Layout, plain
from toolchain.surgery.huggingface.names import Converted
from toolchain.surgery.huggingface.processor import PROCESSORS, Preparation, preparation
from toolchain.surgery.reading import read_tensors

CONFIG = "config.json"
WHOLE = ("model.safetensors", "pytorch_model.bin")
ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
"""Files of an adapter of peft."""
INDEX = ".index.json"
"""What stands behind the name of weights that are spread over several files."""


@dataclass(frozen=True)
class Folder:
    """A saved model.

    Attributes:
        path: the folder.
        layout: of its model_type.
        config: its config.json.
        design: the timm model that computes the same.
    """

    path: Path
    layout: Layout[Any]
    config: Config
    design: Design

    @staticmethod
    def open(path: Path) -> Folder:
        """What a folder describes; no weights are read.

        Raises:
            StorageError: there is no config.json.
            ModelError: it is of no known model_type, or no timm model computes the same.
        """
        raw = _table(path / CONFIG)
        kind = raw.get("model_type")
        if not isinstance(kind, str) or kind not in LAYOUTS:
            raise ModelError(
                f"{path} holds a Hugging Face model of model_type {kind!r}, which is not supported; known: {', '.join(LAYOUTS)}"
            )
        layout = LAYOUTS[kind]
        config = layout.parsed(raw)
        return Folder(path, layout, config, layout.design(config))

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the images that its positions are for."""
        return self.config.image_size

    @cached_property
    def pretrained_cfg(self) -> dict[str, Any]:
        """What timm knows of a model beside its architecture: preprocessing and sizes."""
        return {
            "architecture": self.design.architecture,
            "input_size": (self.config.num_channels, *self.size),
            "num_classes": self.design.kwargs["num_classes"],
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            **self.preprocessing,
        }

    @cached_property
    def preprocessing(self) -> dict[str, Any]:
        """Mean, std, filter and crop, in timm's words."""
        whole = {**dict(zip(("mean", "std"), self.layout.normalisation, strict=True)), **self.preparation.fields}
        if len(whole["mean"]) != (channels := self.config.num_channels):  # defaults of three for a model of one
            whole |= {key: (sum(whole[key]) / len(whole[key]),) * channels for key in ("mean", "std")}
        return whole

    @cached_property
    def preparation(self) -> Preparation:
        """What its processor says of pictures; raises ModelError if that cannot be read."""
        return preparation(self.path, self.layout.processor)

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes in the order of the outputs; () where they have only numbers, or there are none."""
        names = self.config.class_names
        return names if len(names) == self.design.kwargs["num_classes"] else ()

    @property
    def suggested_size(self) -> tuple[int, int] | None:
        """(height, width) that the processor makes images of and transformers runs this model at, if not its positions'."""
        crop = self.preparation.crop
        return crop if self.layout.any_size and crop != self.size else None

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences on what differs from the saved model before a weight is read."""
        return (*self.design.notes, *self._silence, *self._other_size)

    @property
    def _silence(self) -> Iterator[str]:
        """A sentence on what no processor's file says, and what is taken."""
        fields, silent = self.preprocessing, self.preparation.silent
        mean, std = (", ".join(f"{value:.3g}" for value in fields[key]) for key in ("mean", "std"))
        texts = {
            "mean and std": f"mean and std are {mean} and {std}",
            "the filter": f"the filter is {fields['interpolation']}",
            "the size": f"pictures are resized to {by(self.size)} whatever their shape, and nothing is cropped",
        }
        if silent:
            taken = "; ".join(texts[each] for each in silent)
            yield f"No preprocessor_config.json says {', '.join(silent)}: {taken}, as is usual for {self.layout.name}."

    @property
    def _other_size(self) -> Iterator[str]:
        """A sentence on a processor that makes images of another size than config.json has."""
        crop = self.preparation.crop
        if crop is not None and crop != self.size:
            wanted = plain(crop)
            yield (
                f"The folder's preprocessor makes images of {by(crop)} pixels, and config.json describes a model for "
                f"{by(self.size)}, which is taken unless model.kwargs.img_size = {wanted} takes the other."
            )

    def weights(self) -> Converted:
        """Its tensors under timm's names.

        Raises:
            StorageError: there are none, or a part of them is missing.
            ArtifactError: a file is damaged, holds code, or tensors that config.json does not account for, or an adapter lies
                beside the weights.
        """
        if adapters := [name for name in ADAPTERS if (self.path / name).is_file()]:
            raise ArtifactError(
                f"{self.path} holds {adapters[0]} beside its weights, an adapter that transformers adds to them when it loads the "
                "folder: merge it into them (peft: merge_and_unload) and save that with save_pretrained, or take it out of the folder"
            )
        tensors: dict[str, Tensor] = {}
        for file in self._files:
            content, _ = read_tensors(file)
            if not isinstance(content, Mapping):
                raise ArtifactError(f"{file} holds no tensors by name")
            tensors |= {str(name): tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
        try:
            return self.layout.converted(tensors, self.config)
        except ArtifactError as error:
            raise ArtifactError(f"the Hugging Face folder {self.path} cannot be converted: {error}") from error

    @property
    def _files(self) -> tuple[Path, ...]:
        for name in WHOLE:
            if (self.path / name).is_file():
                return (self.path / name,)
            if (self.path / (name + INDEX)).is_file():
                return self._shards(self.path / (name + INDEX))
        raise StorageError(f"{self.path} holds no weights; expected {WHOLE[0]} or {WHOLE[0]}{INDEX}")

    def _shards(self, index: Path) -> tuple[Path, ...]:
        places = _table(index).get("weight_map")
        names = sorted(set(places.values())) if isinstance(places, Mapping) else []
        if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
            raise ArtifactError(f"{index} names no files of this folder")
        if missing := [name for name in names if not (self.path / name).is_file()]:
            raise StorageError(f"{self.path} lacks {missing[0]}, which {index.name} names; fetch the folder again")
        return tuple(self.path / name for name in names)

    @property
    def has_weights(self) -> bool:
        """Whether all of its weights are there."""
        try:
            return bool(self._files)
        except StorageError:
            return False

    @property
    def digest(self) -> str:
        """sha256 over what config.json, a processor's file and the weights hold."""
        digest = hashlib.sha256()
        described = (self.path / name for name in (CONFIG, *(name for name, _ in PROCESSORS)))
        for file in (*filter(Path.is_file, described), *self._files):
            digest.update(sha256(file).encode())
        return digest.hexdigest()

    @property
    def bytes(self) -> int:
        """Of its weights."""
        return sum(file.stat().st_size for file in self._files)


def is_folder(path: Path) -> bool:
    """Whether a path is a folder whose config.json is one of transformers, and not of timm."""
    if not (path / CONFIG).is_file():
        return False
    try:
        raw = _table(path / CONFIG)
    except (ModelError, StorageError):
        return False  # which whoever needs it says in full
    return "model_type" in raw and "architecture" not in raw


def _table(path: Path) -> dict[str, Any]:
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StorageError(f"cannot read {path}: {fault_words(error)}") from error
    except ValueError as error:
        raise ModelError(f"{path} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ModelError(f"{path} is not a table")
    return raw
