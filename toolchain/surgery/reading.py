"""Reads a file that safetensors or torch wrote, without running any code."""

from __future__ import annotations

import re
import warnings
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from toolchain.errors import ArtifactError, StorageError, fault_words
from toolchain.surgery.inert import STAND_INS

CHECKPOINTS = (".safetensors", ".pth", ".pth.tar", ".pt", ".bin", ".ckpt")
"""Endings of files that hold weights."""
AGAIN = "fetch or copy it again, or name a file that torch.save or safetensors wrote"


def read_tensors(path: Path) -> tuple[Any, str]:
    """(content, "safetensors" or "torch") of a file; only tensors and plain values are read, and no code is run.

    Raises:
        StorageError: the file cannot be read, or is a folder.
        ArtifactError: it is truncated, of another kind, or holds code.
    """
    if path.is_dir():
        raise StorageError(_folder(path))
    try:
        with path.open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise StorageError(f"cannot read the checkpoint {path}: {fault_words(error)}") from error
    if (kind := _foreign(path, start)) is not None:
        raise ArtifactError(f"the checkpoint {path} is {kind}")
    if path.suffix == ".safetensors" or start[8:9] == b"{":
        try:
            return load_file(path), "safetensors"
        except (SafetensorError, OSError) as error:
            raise ArtifactError(
                f"the checkpoint {path} is truncated or not a checkpoint ({_line(error)}); {AGAIN}"
            ) from error
    try:
        return _torch_load(path), "torch"
    except Exception as error:  # a damaged file makes the unpickler fail in any way there is
        if _is_refused_code(error, start):
            raise ArtifactError(_refused_code(path, error)) from error
        raise ArtifactError(
            f"the checkpoint {path} is truncated or not a checkpoint ({_line(error)}); {AGAIN}"
        ) from error


def _torch_load(path: Path) -> Any:
    """The content of a file that torch wrote: tensors and plain values, and stand-ins for others that are harmless."""
    with torch.serialization.safe_globals(STAND_INS), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(path, map_location="cpu", weights_only=True)


def _folder(path: Path) -> str:
    files = sorted(f.name for f in path.iterdir() if f.name.endswith(CHECKPOINTS))
    if (path / "config.json").is_file():
        do = f"set model.name = 'local-dir:{path}' and leave model.checkpoint out"
    elif (path / ".metadata").is_file():
        do = "torch saved it in parts: join them with python -m torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER FILE"
    elif files:
        do = f"name a file in it: {', '.join(files[:3])}"
    else:
        do = "there is no checkpoint in it"
    return f"the checkpoint {path} is a folder; {do}"


def _foreign(path: Path, start: bytes) -> str | None:
    """What a file is that can be told from its first bytes or its name, and what to do; None for a checkpoint."""
    name = path.name.lower()
    if start.startswith(b"version https://"):
        return "a pointer of Git LFS, not the file itself; fetch it with `git lfs pull`"
    if start.startswith(b"\x89HDF") or name.endswith((".h5", ".keras")):
        return "a file of Keras; its weights have to be converted to timm's names and saved as .safetensors"
    if start.startswith(b"GGUF"):
        return "a GGUF file, of quantised weights under other names; name the .safetensors or .pth file that it was made from"
    if start.startswith(b"\x93NUMPY") or name.endswith((".npz", ".npy")):
        return (
            "a NumPy archive; open it with timm.create_model(NAME, checkpoint_path=…), "
            "and save the state_dict() as .safetensors"
        )
    if name.endswith((".onnx", ".engine", ".tflite")):
        return "a graph and not a checkpoint; name the .pth or .safetensors file that it was exported from"
    if name.endswith(".toml"):
        return "TOML and not a checkpoint; a recipe is carried out by `slimvit run`, a gate judged by `slimvit gate --config`"
    if name.endswith(".json"):
        return "JSON and not a checkpoint; name the .safetensors or .pth file beside it"
    if start.startswith(b"PK"):
        try:
            with zipfile.ZipFile(path) as archive:
                members = archive.namelist()
        except (zipfile.BadZipFile, OSError):
            return None
        if members and all(member.endswith(".npy") for member in members):
            return _foreign(path.with_suffix(".npz"), b"")
        if any(member.endswith("/constants.pkl") for member in members):
            return (
                "a TorchScript program, which holds code; open it with torch.jit.load, and save its state_dict() "
                "as .safetensors"
            )
    return None


def _is_refused_code(error: BaseException, start: bytes) -> bool:
    """Whether torch refused to run something, in a file of these first bytes."""
    if isinstance(error, UnpicklingError):
        is_pickle = start[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
        return is_pickle or "Unsupported operand" not in str(error)  # which is what it says of a page of HTML
    return False


def _refused_code(path: Path, error: BaseException) -> str:
    """The refusal of a file whose pickle names something that would be run, with those names where torch lists them."""
    try:
        with torch.serialization.safe_globals(STAND_INS):
            names = sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except Exception:  # noqa: BLE001 - of an older form, or one that cannot be walked
        names = re.findall(r"GLOBAL ([\w.]+)", str(error))[:1]
    modules = [name for name in names if re.match(r"(timm\.models|torch\.nn\.modules|torchvision\.models)\.", name)]
    if modules:
        return (
            f"the checkpoint {path} holds a whole pickled module ({modules[0]}), and with it pickled code, which slimvit "
            "never executes; save its state_dict() as .safetensors instead"
        )
    shown = f" ({', '.join(names[:2])})" if names else ""
    return (
        f"the checkpoint {path} holds pickled code{shown}, which slimvit never executes; "
        "save its tensors as .safetensors instead"
    )


def _line(error: Exception) -> str:
    """The kind of an error and the first sentence of what it says."""
    return f"{type(error).__name__} {re.split(r'[.] |' + chr(10), str(error))[0][:120]}".strip()
