"""Resolves model names with a source ("hf://org/name", "local-dir:PATH"), and checks whether a hub can be reached."""

from __future__ import annotations

import dataclasses
import json
import socket
import threading
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub
import torch
from huggingface_hub import constants
from pydantic import ValidationError
from timm.models import PretrainedCfg, get_pretrained_cfg

from toolchain.errors import ModelError, StorageError, fault_words
from toolchain.foreign import first_line
from toolchain.outputs import Output
from toolchain.places import HUB, HUB_URL, LOCAL, model_source
from toolchain.plan import ModelRef
from toolchain.records import place_and_fault
from toolchain.surgery.checkpoint import Checkpoint, checkpoint_facts, read_checkpoint
from toolchain.surgery.huggingface.folder import INDEX, WHOLE, Folder, is_folder
from toolchain.surgery.huggingface.processor import PROCESSORS
from toolchain.surgery.refusals import refusal

CONFIG = "config.json"
WEIGHTS = (
    *("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth"),
    *("open_clip_model.safetensors", "open_clip_pytorch_model.bin"),
)
"""Files of weights in a folder or repository, in the order in which timm prefers them."""
REACH_S = 5.0
"""How long a hub may take to accept a connection."""


@dataclass(frozen=True)
class Source:
    """A model as timm would build it, without a hub.

    Attributes:
        ref: the plain architecture, with every keyword argument that shapes it.
        config: timm's pretrained_cfg, that of the hub or folder; None for that of the name.
        origin: what stands for the place in files that must not say where it lies: "local-dir", or the hub's name.
        folder: where weights lie on this machine; None if they do not.
        output: what its outputs are, where the source says so.
        class_names: as `Folder.class_names`, or as timm's config.json has them.
        suggested_size: as `Folder.suggested_size`.
    """

    ref: ModelRef
    config: Mapping[str, Any] | None = None
    origin: str = ""
    folder: Path | None = None
    output: Output | None = None
    class_names: tuple[str, ...] = ()
    suggested_size: tuple[int, int] | None = None


def resolved(name: str, kwargs: Mapping[str, Any]) -> Source:
    """The model of a recipe's name and keyword arguments.

    Raises:
        ModelError: the source is unknown, cannot be reached, or does not describe a timm model.
        StorageError: the folder has no readable config.json.
    """
    kind, place = model_source(name)
    if not kind and Path(name).is_dir():
        raise ModelError(f"the model {name!r} is a folder: write model.name = '{LOCAL}:{name}'")
    if not kind:
        return Source(_ref(name, kwargs))
    if kind == LOCAL:
        folder = Path(place)
        if is_folder(folder):
            return described(Folder.open(folder), kwargs)
        config = read_config(folder / CONFIG, name)
        return _source(config, kwargs, {"file": str(folder), "source": LOCAL}, name, LOCAL, folder)
    if kind == HUB:
        if not place:
            raise ModelError(f"the model {name!r} is written {HUB_URL}ORG/NAME")
        path = _config_of_hub(place, name)
        if is_folder(path.parent):
            _fetch(place, [file for file, _ in PROCESSORS])
            return replace(described(Folder.open(path.parent), kwargs), origin=f"{HUB}:{place}")
        config = read_config(path, name)
        return _source(config, kwargs, {"hf_hub_id": place, "source": HUB}, name, f"{HUB}:{place}", None)
    raise ModelError(
        f"the model {name!r} has the unknown source {kind!r}; known: {HUB_URL}ORG/NAME, {HUB}:ORG/NAME, {LOCAL}:PATH"
    )


def described(folder: Folder, kwargs: Mapping[str, Any]) -> Source:
    """The model that computes what a Hugging Face folder's does, with keyword arguments in place of some of its own."""
    ref = _ref(folder.design.architecture, {**folder.design.kwargs, **kwargs})
    config = folder.pretrained_cfg | {"file": str(folder.path), "source": LOCAL}
    return Source(ref, config, LOCAL, folder.path, folder.config.output, folder.class_names, folder.suggested_size)


def prepared(name: str, folder: Folder) -> dict[str, Any]:
    """The pretrained_cfg of one of timm's names, with the preprocessing of a Hugging Face folder."""
    config = get_pretrained_cfg(name)
    known = {} if config is None else dataclasses.asdict(config)
    return {key: value for key, value in known.items() if value is not None} | folder.preprocessing


def _ref(name: str, kwargs: Mapping[str, Any]) -> ModelRef:
    try:
        return ModelRef(name=name, kwargs=dict(kwargs))
    except ValidationError as error:
        raise ModelError(place_and_fault(error)[1]) from None


def _source(
    raw: Mapping[str, Any],
    kwargs: Mapping[str, Any],
    where: Mapping[str, str],
    name: str,
    origin: str,
    folder: Path | None,
) -> Source:
    """The architecture and keyword arguments that timm would derive from a config.json."""
    nested = raw.get("pretrained_cfg")
    config = dict(nested if isinstance(nested, Mapping) else raw)
    if "num_classes" in raw:
        config["num_classes"] = raw["num_classes"]
    architecture = raw.get("architecture")
    if not isinstance(architecture, str):
        other = " (it is one of transformers)" if "model_type" in raw or "architectures" in raw else ""
        raise ModelError(f"the model {name}: its {CONFIG} names no timm architecture{other}")
    arguments = dict(raw.get("model_args") or {})
    size = config.get("input_size") or (3, 224, 224)
    if arguments.get("in_chans") is not None:
        size = (arguments["in_chans"], *size[1:])
    if arguments.get("img_size") is not None:
        side = arguments["img_size"]
        size = (size[0], *((side, side) if isinstance(side, int) else side))
    config["input_size"] = tuple(size)
    implied = {"num_classes": config.get("num_classes"), "global_pool": config.get("global_pool"), "in_chans": size[0]}
    if config.get("fixed_input_size"):
        implied["img_size"] = list(size[1:])
    whole = {**{key: value for key, value in implied.items() if value is not None}, **arguments, **kwargs}
    fields = {field.name for field in dataclasses.fields(PretrainedCfg)}
    config = {key: value for key, value in config.items() if key in fields} | dict(where)
    config["architecture"] = architecture
    names = _class_names(raw)
    return Source(_ref(architecture, json.loads(json.dumps(whole))), config, origin, folder, class_names=names)


def _class_names(raw: Mapping[str, Any]) -> tuple[str, ...]:
    """What classes are called in timm's config.json, in words where it has some for its labels; () where it does not say."""
    nested = raw.get("pretrained_cfg")
    said = {**(nested if isinstance(nested, Mapping) else {}), **raw}
    labels, words = said.get("label_names"), said.get("label_descriptions")
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        return ()
    return tuple(str(words.get(label, label)) if isinstance(words, Mapping) else label for label in labels)


def read_config(path: Path, name: str) -> Mapping[str, Any]:
    """The content of a config.json; raises StorageError or, with the model's name, ModelError."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StorageError(f"cannot read {path}, which describes the model: {fault_words(error)}") from error
    except ValueError as error:
        raise ModelError(f"the model {name}: its {CONFIG} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ModelError(f"the model {name}: its {CONFIG} is not a table")
    return raw


def _config_of_hub(place: str, name: str) -> Path:
    repository, _, revision = place.partition("@")
    cached = _cached(place, CONFIG)
    if not reachable(constants.ENDPOINT):
        if cached is None:
            raise ModelError(unreachable(constants.ENDPOINT, f"the model {name}"))
        return cached
    try:
        return Path(huggingface_hub.hf_hub_download(repository, CONFIG, revision=revision or None))
    except Exception as error:  # whatever a library makes of a network
        if cached is not None:
            return cached
        raise ModelError(f"the model {name} cannot be fetched: {refusal(error, place)}") from error


def _cached(place: str, file: str) -> Path | None:
    """A file of a repository in the user's cache."""
    repository, _, revision = place.partition("@")
    try:
        found = huggingface_hub.try_to_load_from_cache(repository, file, revision=revision or None)
    except Exception as error:  # of a name that can be none
        raise ModelError(f"{place!r} is no repository of a hub: {first_line(error)}") from error
    return Path(found) if isinstance(found, str) else None


def _fetch(place: str, patterns: Sequence[str]) -> str:
    """Brings files of a repository into the user's cache, those that are there; returns why that failed, or ""."""
    if not reachable(constants.ENDPOINT):
        return unreachable(constants.ENDPOINT, f"the pretrained weights of {place}")
    repository, _, revision = place.partition("@")
    try:
        huggingface_hub.snapshot_download(repository, revision=revision or None, allow_patterns=list(patterns))
    except Exception as error:  # noqa: BLE001 - whatever a library makes of a network
        return f"the weights of {place} cannot be fetched: {refusal(error, place)}"
    return ""


def _weights_of(folder: Folder, origin: str) -> Checkpoint:
    """What a Hugging Face folder holds; one in the user's cache is completed from the hub.

    Raises:
        ModelError: the hub gives no weights.
        StorageError, ArtifactError: as `read_checkpoint`.
    """
    for name in () if origin == LOCAL else WHOLE:
        if folder.has_weights:
            break
        stem, _, suffix = name.rpartition(".")
        why = _fetch(origin.removeprefix(f"{HUB}:"), (name, name + INDEX, f"{stem}-*-of-*.{suffix}"))
        if why:
            raise ModelError(why)
    return read_checkpoint(folder.path)


def local_weights(source: Source, config: Mapping[str, Any]) -> Checkpoint | None:
    """Pretrained weights that lie on this machine, or None where timm is to fetch them.

    Raises:
        ModelError: the hub cannot be reached, and the weights are not in the cache.
        StorageError: a folder holds no weights, or several.
        ArtifactError: as `read_checkpoint`.
    """
    if source.folder is not None:
        if is_folder(source.folder):
            return _weights_of(Folder.open(source.folder), source.origin)
        return read_checkpoint(_weights_in(source.folder))
    place = config.get("hf_hub_id")
    if not place:
        url = config.get("url")
        if url and not _downloaded(str(url)) and not reachable(str(url)):
            raise ModelError(unreachable(str(url), "the pretrained weights"))
        return None
    if reachable(constants.ENDPOINT):
        return None
    names = (config["hf_hub_filename"],) if config.get("hf_hub_filename") else WEIGHTS
    for name in names:
        if (path := _cached(str(place), str(name))) is not None and path.suffix != ".npz":
            return read_checkpoint(path)
    raise ModelError(unreachable(constants.ENDPOINT, f"the pretrained weights of {place}"))


def _weights_in(folder: Path) -> Path:
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    for suffix in (".safetensors", ".pth", ".bin"):
        found = sorted(folder.glob(f"*{suffix}"))
        if len(found) > 1:
            names = ", ".join(path.name for path in found[:3])
            raise StorageError(f"{folder} holds several weights ({names}); name one as model.checkpoint")
        if found:
            return found[0]
    raise StorageError(f"{folder} holds no weights; expected {WEIGHTS[0]}")


def described_facts(folder: Path) -> dict[str, object]:
    """What `slimvit inspect` shows of a folder that transformers or timm saved; {} of one that neither did.

    Raises:
        ModelError, StorageError, ArtifactError: as `resolved` and `read_checkpoint`.
    """
    if is_folder(folder):
        return checkpoint_facts(folder)
    if "architecture" not in read_config(folder / CONFIG, str(folder)):
        return {}
    ref = resolved(f"{LOCAL}:{folder}", {}).ref
    return checkpoint_facts(_weights_in(folder)) | {"name": ref.name, "kwargs": ref.kwargs}


def _downloaded(url: str) -> bool:
    return Path(torch.hub.get_dir(), "checkpoints", Path(urlsplit(url).path).name).is_file()


def unreachable(url: str, what: str) -> str:
    """The message for a hub that cannot be reached."""
    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{urlsplit(url).hostname} cannot be reached"
    return (
        f"{what} cannot be fetched: {why}, and the user's cache has no copy. "
        "Without a network set model.checkpoint to a local file, or model.pretrained = false"
    )


def reachable(url: str) -> bool:
    """Whether the host of a URL, or the proxy that leads to it, accepts a connection within seconds.

    A hub's own client tries for most of a minute before it says that there is no network. How long a download may then
    take is its own affair.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or (80 if parts.scheme == "http" else 443)
    proxies = urllib.request.getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if proxy and not urllib.request.proxy_bypass(host):
        through = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
        host, port = through.hostname or "", through.port or 80
    answered = threading.Event()

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=REACH_S).close()
        except OSError:
            return
        answered.set()

    attempt = threading.Thread(target=connect, daemon=True)  # the name service takes as long as it wants
    attempt.start()
    attempt.join(REACH_S)
    return answered.is_set()
