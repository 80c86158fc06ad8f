"""targets.toml: devices by name, each a runtime, a transport that leads to it, and settings."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, TypeAdapter, ValidationError

from toolchain.errors import RecipeError
from toolchain.files import expanded, home
from toolchain.on_device.runner import OPENERS
from toolchain.records import Record, place_and_fault
from toolchain.settings import Positive, read_toml, tuple_of
from toolchain.targets import TARGETS, is_target

FILE_NAME = "targets.toml"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
# What a host or a user may be made of: no white space, nothing that a shell or ssh itself reads as an option.
WORD = re.compile(r"[A-Za-z0-9_:][A-Za-z0-9_.:%-]*")


def _measured(runtime: str) -> str:
    if not is_target(runtime):
        measured = [name for name, target in TARGETS.items() if target.measures]
        raise ValueError(f"{runtime!r} is no runtime that is timed; there are {', '.join(measured)}")
    return runtime


def _on_devices(runtime: str) -> str:
    if runtime not in OPENERS:
        raise ValueError(
            f"the device runner has no runtime {runtime!r}; over ssh and in bundles there are {', '.join(OPENERS)}"
        )
    return runtime


def _word(text: str) -> str:
    if not WORD.fullmatch(text):
        raise ValueError(
            f"{text!r} is no name of a host or user: letters, digits and ._:%-, not starting with a dash; "
            "anything else belongs into the ssh configuration, under an alias"
        )
    return text


def _one_line(text: str) -> str:
    if not text or not text.isprintable() or text.startswith("-"):
        raise ValueError(f"{text!r} is no path: it must be one printable line that does not start with a dash")
    return text


ListedCores = Annotated[
    tuple[Annotated[int, Field(ge=0)], ...],
    Field(min_length=1),
    BeforeValidator(tuple_of),
    AfterValidator(lambda cores: tuple(sorted(set(cores)))),
]
"""Numbers of cores as a user lists them: at least one; ascending and each once afterwards."""
DeviceRuntime = Annotated[str, AfterValidator(_on_devices)]
Word = Annotated[str, AfterValidator(_word)]
DevicePath = Annotated[str, AfterValidator(_one_line)]


class _Settings(Record):
    """What every named target has: its runtime, and what a command takes if no option says otherwise."""

    threads: Positive = 1
    affinity: ListedCores | None = None


class LocalSettings(_Settings):
    """This machine, under a name and with settings of its own."""

    transport: Literal["local"]
    runtime: Annotated[str, AfterValidator(_measured)] = "ort-cpu"


class SshSettings(_Settings):
    """A device that the user's own OpenSSH reaches without being asked for a password.

    Attributes:
        host: a name, an address, or an alias of the user's ssh configuration.
        user: empty is what the ssh configuration says.
        port: None is what the ssh configuration says.
        ssh_config: a file instead of the user's own; relative to targets.toml.
        python: the interpreter on the device that has numpy and onnxruntime; `~/` is the home folder there.
        folder: where files are kept on the device; `~/` is the home folder there.
    """

    transport: Literal["ssh"]
    runtime: DeviceRuntime = "ort-cpu"
    host: Word
    user: Word | None = None
    port: Annotated[int, Field(ge=1, le=65535)] | None = None
    ssh_config: Path | None = Field(default=None, strict=False)
    python: DevicePath = "python3"
    folder: DevicePath = "~/.cache/slimvit"


class BundleSettings(_Settings):
    """A device that no network reaches: a tar goes there, a file of results comes back."""

    transport: Literal["bundle"]
    runtime: DeviceRuntime = "ort-cpu"


NamedTarget = LocalSettings | SshSettings | BundleSettings
_ONE: TypeAdapter[NamedTarget] = TypeAdapter(Annotated[NamedTarget, Field(discriminator="transport")])


def user_config() -> Path:
    """The folder of the user's own settings: slimvit below XDG_CONFIG_HOME, else below ~/.config."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or home() / ".config") / "slimvit"


def load_targets(file: Path | None = None, folder: Path = Path()) -> dict[str, NamedTarget]:
    """The named targets of a file, or of a folder's targets.toml and the user's, the nearer one first.

    Args:
        file: read instead of both; it must exist.
        folder: whose targets.toml is read; the current one if absent.

    Raises:
        StorageError: a file cannot be read.
        RecipeError: a file is no TOML, or says something that cannot be done.
    """
    if file is not None:
        return _read(file)
    found: dict[str, NamedTarget] = {}
    for path in (user_config() / FILE_NAME, folder / FILE_NAME):
        if path.is_file():
            found |= _read(path)
    return found


def named_target(name: str, file: Path | None = None, folder: Path = Path()) -> NamedTarget:
    """The settings of a name of targets.toml, or of a built-in target on this machine; arguments as `load_targets`.

    Raises:
        StorageError: targets.toml cannot be read.
        RecipeError: it is wrong, or there is no such target; the nearest name is offered.
    """
    named = load_targets(file, folder)
    if name in named:
        return named[name]
    if is_target(name):
        # Not validated: a built-in target that is not timed has its own refusal, with its reason.
        return LocalSettings.model_construct(transport="local", runtime=name)
    known = [*TARGETS, *named]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known targets: {', '.join(known)}"
    raise RecipeError(
        f"unknown target {name!r}; {hint}{'' if near else '.'} Devices are named in {file or folder / FILE_NAME}."
    )


def bundled_runtime(name: str, settings: NamedTarget) -> str:
    """The runtime of a target as bundles have it; raises RecipeError if they do not."""
    if settings.runtime not in OPENERS:
        raise RecipeError(f"target {name!r} runs on {settings.runtime}, which bundles do not have")
    return settings.runtime


def _read(path: Path) -> dict[str, NamedTarget]:
    return {name: _one(path, name, table) for name, table in read_toml(path, "targets file").items()}


def _one(path: Path, name: str, table: Any) -> NamedTarget:
    if not NAME.fullmatch(name):
        raise RecipeError(f"{path}: {name!r} is no name of a target: letters, digits and ._-, a letter or digit first")
    if is_target(name):
        raise RecipeError(f"{path}: {name!r} is a built-in target; choose another name")
    if not isinstance(table, Mapping):
        raise RecipeError(f"{path}: {name} is {table!r}; expected a table, [{name}]")
    try:
        settings = _ONE.validate_python(table)
    except ValidationError as error:
        raise RecipeError(f"{path}: {_explain(name, table, error)}") from None
    if isinstance(settings, SshSettings) and settings.ssh_config is not None and str(settings.ssh_config) != "none":
        return settings.model_copy(update={"ssh_config": path.parent / expanded(settings.ssh_config)})
    return settings


def _explain(name: str, table: Mapping[str, object], error: ValidationError) -> str:
    """One line for the first fault, with the nearest key where one is unknown."""
    first = error.errors()[0]
    transport = str(table.get("transport"))
    where = ".".join([name, *(str(part) for part in first["loc"] if part != transport)])
    if first["type"] == "extra_forbidden":
        kinds: dict[str, type[BaseModel]] = {"local": LocalSettings, "ssh": SshSettings, "bundle": BundleSettings}
        keys = list(kinds[transport].model_fields)
        near = difflib.get_close_matches(str(first["loc"][-1]), keys, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(keys)}"
        return f"{where} is unknown for transport {transport!r}; {hint}"
    if first["type"].startswith("union_tag"):
        return f"{name}.transport is {table.get('transport')!r}; expected 'local', 'ssh' or 'bundle'"
    return f"{where}: {place_and_fault(error)[1]}"
