"""Reads checkpoints of common forms without running any code, and finds the model's weights in them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from toolchain.errors import ArtifactError
from toolchain.files import sha256
from toolchain.surgery.anatomy import Anatomy, anatomy, others
from toolchain.surgery.huggingface.folder import Folder, is_folder
from toolchain.surgery.inert import Array, Value
from toolchain.surgery.reading import read_tensors
from toolchain.surgery.resampling import Resampling
from toolchain.surgery.trained import Trained

PREFERRED = ("state_dict_ema", "model_ema", "ema", "teacher")
"""Keys whose tensors come before others: averages are what training scripts evaluate. The first two are timm's choice."""
WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""What torch puts into the middle of names when it wraps a module; it never belongs to a model."""
ANCHOR = re.compile(r"(?P<prefix>.*\.|)(patch_embed|embeds)\.proj\.weight")
"""The tensor that every vision transformer of timm has: what stands before it is a wrapper's prefix."""
CHUNKED = re.compile(r"blocks\.\d+\.(\d+)\.")
"""Names of blocks that are grouped in chunks; the second number counts through all blocks."""
ADAPTER = re.compile(r"(^|\.)lora(_\w+)?(\.|$)|\.(base_layer|original_module)\.", re.IGNORECASE)
"""Names of an adapter's own tensors, and of those of a linear or a classifier that it wraps."""
LEFT_TO_TIMM = ("visual.", "vision_encoder.")
"""Prefixes with a meaning for timm's own conversions."""
DEPTH = 3
"""Depth of nested mappings that is always searched for tensors; deeper ones only if none were found."""


@dataclass(frozen=True)
class Weights:
    """Tensors that belong together: one mapping of a file, under one prefix.

    Attributes:
        key: where they lie in the file, such as "model_ema"; "" at its top.
        prefix: what stood before every name and was taken off.
        tensors: name → tensor.
        left_out: name → tensor of the mapping that does not have the prefix.
        joined: names without the prefix that were taken all the same.
    """

    key: str
    prefix: str
    tensors: Mapping[str, Tensor]
    left_out: Mapping[str, Tensor] = field(default_factory=dict)
    joined: tuple[str, ...] = ()

    @property
    def place(self) -> str:
        """Where they lie, for a message."""
        return " under ".join(f"{text!r}" for text in (self.prefix, self.key) if text) or "its top"

    @property
    def beside(self) -> str:
        """A clause on what was left out, for a refusal; "" if nothing was."""
        return f"beside {self.prefix!r} the file also holds {_first(self.left_out)}" if self.left_out else ""

    def completed(self, wanted: Collection[str]) -> Weights:
        """The same with those tensors beside the prefix that are parts of the model which it lacks, such as "head".

        A wrapper holds a model without a classifier, and one of its own beside it. A part is taken whole or not at all.

        Args:
            wanted: names of the model's tensors.
        """
        words = self.prefix.split(".")[:-2]  # "model.backbone." may have its classifier under "model." or at the top
        outer = [".".join([*words[:count], ""]) for count in range(len(words), 0, -1)]
        own = dict[str, str]()  # the model's name → that in the file
        for start in (*outer, ""):
            for name in self.left_out:
                if name.startswith(start):
                    own.setdefault(name.removeprefix(start), name)
        lacking = {name for name in wanted if name not in self.tensors}
        parts = {name.partition(".")[0] for name in wanted} - {
            name.partition(".")[0] for name in wanted if name not in own or name not in lacking
        }
        added = {name: old for name, old in own.items() if name in lacking and name.partition(".")[0] in parts}
        return replace(
            self,
            tensors={**self.tensors, **{name: self.left_out[old] for name, old in added.items()}},
            left_out={name: tensor for name, tensor in self.left_out.items() if name not in added.values()},
            joined=tuple(added.values()),
        )

    def equals(self, other: Weights) -> bool:
        """Whether both are the same weights."""
        return self.tensors.keys() == other.tensors.keys() and all(
            tensor.shape == other.tensors[name].shape and torch.equal(tensor, other.tensors[name])
            for name, tensor in self.tensors.items()
        )


@dataclass(frozen=True)
class Checkpoint:
    """What a file of tensors holds.

    Attributes:
        form: "safetensors", "torch", or "Hugging Face" with the model_type of a folder.
        weights: what is taken.
        rivals: other weights that would fit as well and are not the same.
        beside: names of what else is at the top of the file.
        remarks: one sentence for each thing that was done to tensors to bring them under timm's names.
        made_for: (height, width) of the images that they were trained on, where that is known.
        resampling: how their own library brings positions to another grid, where that is known.
        trained: what the script that trained them recorded.
        nameless: key → how many tensors of the shapes of the weights lie there in a row, without names.
    """

    form: str
    weights: Weights
    rivals: tuple[Weights, ...] = ()
    beside: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    made_for: tuple[int, int] | None = None
    resampling: Resampling | None = None
    trained: Trained = field(default_factory=Trained)
    nameless: Mapping[str, int] = field(default_factory=dict)

    @property
    def anatomy(self) -> Anatomy:
        """What the names and shapes say; nothing where they are not timm's."""
        return anatomy(self.weights.tensors)

    @property
    def notes(self) -> list[str]:
        """One sentence for each choice that was made among the file's tensors."""
        notes = list(self.remarks)
        if self.rivals:
            places = ", ".join(rival.place for rival in self.rivals)
            notes.append(
                f"The checkpoint holds several weights that differ: those under {self.weights.place} were taken, "
                f"not those under {places}. To use others, save them alone."
            )
        notes += [
            f"The checkpoint also holds {count} tensors of the weights' shapes without names, under {key!r}, which were left out. If "
            "they are an average that was evaluated, copy it into the model (torch_ema: copy_to), and save its state_dict()."
            for key, count in self.nameless.items()
        ]
        prefix = self.weights.prefix
        if joined := self.weights.joined:
            verb = "was" if len(joined) == 1 else "were"
            notes.append(
                f"Of the checkpoint, {_first(joined)} beside the prefix {prefix!r} {verb} taken too: the model lacked "
                f"{'it' if len(joined) == 1 else 'them'}."
            )
        if left := self.weights.left_out:
            count = "1 tensor" if len(left) == 1 else f"{len(left)} tensors"
            verb = "was" if len(left) == 1 else "were"
            notes.append(f"Of the checkpoint, {count} without the prefix {prefix!r} {verb} left out: {_first(left)}.")
        return notes

    def completed(self, wanted: Collection[str]) -> Checkpoint:
        """The same with `Weights.completed`."""
        return replace(self, weights=self.weights.completed(wanted))

    def require_merged(self, path: Path) -> None:
        """Raises ArtifactError if an adapter lies beside the weights, without which they are not the model that was trained."""
        names = [name for name in (*self.weights.tensors, *self.weights.left_out) if ADAPTER.search(name)]
        if names:
            raise ArtifactError(
                f"the checkpoint {path.name} holds {_first(names)}, an adapter (LoRA) that is not part of the weights: merge it "
                "into them (peft: merge_and_unload), and save the state_dict() of the model that you get"
            )

    def to_dict(self) -> dict[str, object]:
        """The facts that `slimvit inspect` shows."""
        weights = self.weights
        types = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights.tensors.values()})
        structure = self.anatomy.to_dict()
        facts: dict[str, object] = {"format": self.form, "key": weights.key, "prefix": weights.prefix}
        facts |= {"tensors": len(weights.tensors), "params": sum(t.numel() for t in weights.tensors.values())}
        facts |= {"dtype": ", ".join(types), "names": "timm" if structure else (others(weights.tensors) or "unknown")}
        facts |= structure
        if self.trained.name:
            facts["trained_as"] = " ".join([self.trained.name, *(f"{k}={v}" for k, v in self.trained.kwargs.items())])
        if self.beside:
            facts["beside"] = list(self.beside)
        if self.notes:
            facts["notes"] = self.notes
        return facts


def _first(names: Collection[str]) -> str:
    """The first of some names."""
    return ", ".join(list(names)[:3]) + (", …" if len(names) > 3 else "")


def read_checkpoint(path: Path, wanted: Anatomy | None = None) -> Checkpoint:
    """What a .safetensors file, one that torch wrote, or a Hugging Face folder holds; only tensors are read, no code is run.

    Args:
        path: the file or folder.
        wanted: of the model that weights are looked for; those that are nearest to it are taken.

    Raises:
        StorageError: the file cannot be read, or is another folder.
        ArtifactError: it is truncated, of another kind, holds code, or no tensors.
        ModelError: no timm model computes what the folder describes.
    """
    if is_folder(path):
        return _converted(Folder.open(path))
    raw, form = read_tensors(path)
    candidates = [part for key, tensors in _mappings(raw) for part in _unwrapped(key, tensors)]
    if not candidates:
        raise ArtifactError(f"the checkpoint {path} holds no tensors by name: {_instead(raw)}")
    best = max(_score(part, wanted) for part in candidates)
    fitting = sorted((part for part in candidates if _score(part, wanted) == best), key=_rank)
    weights = fitting[0]
    for name, tensor in weights.tensors.items():
        if (kind := _unusual(tensor)) is not None:
            raise ArtifactError(
                f"the checkpoint {path} holds {name} as {kind} tensor; save plain tensors, such as those of state_dict()"
            )
    rivals = tuple(part for part in fitting[1:] if _is_anchored(weights) and not part.equals(weights))
    tops = {part.key.partition(".")[0] for part in (weights, *rivals)}
    beside = tuple(str(key) for key in raw if str(key) not in tops) if weights.key else ()
    nameless = dict(_nameless("", raw, Counter(tensor.shape for tensor in weights.tensors.values())))
    return Checkpoint(form, weights, rivals, beside, trained=Trained.of(raw), nameless=nameless)


def _converted(folder: Folder) -> Checkpoint:
    """What a Hugging Face folder holds, under timm's names."""
    converted = folder.weights()
    left = [
        f"Of the Hugging Face folder, {_first(names)} {'was' if len(names) == 1 else 'were'} left out: {why}."
        for why, names in converted.left_out.items()
    ]
    form = f"Hugging Face {folder.layout.name}"
    return Checkpoint(
        form,
        Weights("", "", converted.state),
        remarks=(*folder.notes, *left),
        made_for=folder.size,
        resampling=folder.layout.resampling,
    )


def _unusual(tensor: Tensor) -> str | None:
    """What kind of tensor this is, with its article, if it is not one of numbers in memory; else None."""
    if tensor.is_meta:
        return "a meta"
    if tensor.is_nested:
        return "a nested"
    return None if tensor.layout is torch.strided else "a sparse"


def _instead(raw: Any) -> str:
    """What a file without tensors holds, and what to do."""
    do = "save model.state_dict() with torch.save"
    if not isinstance(raw, Mapping):
        return f"it is a {'value of another library' if isinstance(raw, Value) else type(raw).__name__}; {do}"
    inner = next((value for value in raw.values() if isinstance(value, Mapping) and value), raw)
    if any(isinstance(value, Array) for value in inner.values()):
        do = "its arrays are NumPy's: give each to torch.from_numpy, and save them with torch.save"
    keys = ", ".join(sorted(map(str, raw))[:5])
    return f"only {keys}; {do}" if keys else f"it is an empty {type(raw).__name__}; {do}"


def _mappings(raw: Any) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """(key, tensors by name) of each mapping that holds any, from the top down; below `DEPTH` only if none does."""
    level, depth, holds_any = [("", raw)], 0, False
    seen = set[int]()  # a file may nest a mapping in itself, and one in another a thousand times
    while level and not (holds_any and depth >= DEPTH):
        below = []
        for key, mapping in level:
            is_new = id(mapping) not in seen
            if not isinstance(mapping, Mapping) or not (
                is_new or depth == 1
            ):  # one mapping may have two names at the top
                continue
            seen.add(id(mapping))
            names = {name: value for name, value in mapping.items() if isinstance(name, str)}
            if tensors := {name: value for name, value in names.items() if isinstance(value, Tensor)}:
                holds_any = True
                yield key, tensors
            below += [
                (f"{key}.{name}" if key else name, value)
                for name, value in names.items()
                if is_new and isinstance(value, Mapping) and not name.startswith("optim")
            ]
        level, depth = below, depth + 1


def _nameless(key: str, raw: Any, shapes: Counter[torch.Size], depth: int = 0) -> Iterator[tuple[str, int]]:
    """(key, count) of each row of tensors whose shapes are those of weights: some libraries keep an average so."""
    for name, value in raw.items() if isinstance(raw, Mapping) and depth < DEPTH else ():
        if not isinstance(name, str) or name.startswith("optim"):
            continue
        place = f"{key}.{name}" if key else name
        if isinstance(value, list | tuple) and len(value) > 1 and all(isinstance(each, Tensor) for each in value):
            if Counter(each.shape for each in value) <= shapes:
                yield place, len(value)
        else:
            yield from _nameless(place, value, shapes, depth + 1)


def _unwrapped(key: str, tensors: Mapping[str, Tensor]) -> list[Weights]:
    """The same tensors without what wrappers put into their names; several where several models lie side by side."""
    plain: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        for wrapper in WRAPPERS:
            name = name.replace(wrapper, "")  # noqa: PLW2901 - one wrapper after the other
        plain[name] = tensor
    parallel = "module." if all(name.startswith("module.") for name in plain) else ""
    plain = {name.removeprefix(parallel): tensor for name, tensor in plain.items()}
    anchors = [found for name in plain if (found := ANCHOR.fullmatch(name)) and not name.startswith(LEFT_TO_TIMM)]
    prefixes = [found["prefix"] for found in anchors] or [""]

    def home(name: str) -> str | None:
        return max((prefix for prefix in prefixes if name.startswith(prefix)), key=len, default=None)

    homes = {name: home(name) for name in plain}
    homeless = {parallel + name: plain[name] for name, prefix in homes.items() if prefix is None}
    return [
        Weights(
            key,
            parallel + prefix,
            _unchunked({name.removeprefix(prefix): x for name, x in plain.items() if homes[name] == prefix}),
            homeless,
        )
        for prefix in prefixes
    ]


def _unchunked(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same where blocks are numbered within chunks, as DINOv2 trains them: "blocks.1.7" is block 7."""
    blocks = [name for name in tensors if name.startswith("blocks.")]
    if not all(CHUNKED.match(name) for name in blocks):
        return tensors
    return {CHUNKED.sub(r"blocks.\1.", name): tensor for name, tensor in tensors.items()}


def _is_anchored(weights: Weights) -> bool:
    """Whether they are a vision transformer's, under no prefix."""
    return any((found := ANCHOR.fullmatch(name)) and not found["prefix"] for name in weights.tensors)


def _score(weights: Weights, wanted: Anatomy | None) -> tuple[bool, int, int]:
    """How much speaks for weights: that they are a vision transformer's, that of the model, how many tensors there are."""
    if not _is_anchored(weights):
        return False, 0, len(weights.tensors)
    if wanted is None:
        return True, 0, 0
    there = anatomy(weights.tensors)
    return True, sum(getattr(there, name) == getattr(wanted, name) for name in ("embed_dim", "depth", "hidden")), 0


def _rank(weights: Weights) -> int:
    """The place of weights among equals: averages first, in the order of `PREFERRED`, a student last."""
    words = f"{weights.key}.{weights.prefix}".split(".")
    places = [place for place, word in enumerate(PREFERRED) if word in words]
    return min(places, default=len(PREFERRED) + (1 if "student" in words else 0))


def checkpoint_facts(path: Path) -> dict[str, object]:
    """What `slimvit inspect` shows of a checkpoint; raises as `read_checkpoint`."""
    facts: dict[str, object] = {"kind": "checkpoint", "sha256": digest_of(path)}
    if is_folder(path):
        folder = Folder.open(path)
        facts |= {"bytes": folder.bytes, "name": folder.design.architecture, "kwargs": dict(folder.design.kwargs)}
    else:
        facts["bytes"] = path.stat().st_size
    return facts | read_checkpoint(path).to_dict()


def digest_of(path: Path) -> str:
    """sha256 of a checkpoint's file, or over the files of a Hugging Face folder."""
    return Folder.open(path).digest if is_folder(path) else sha256(path)
