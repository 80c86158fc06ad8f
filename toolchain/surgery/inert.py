"""Harmless stand-ins for classes that trainers pickle beside weights, so that none of their code is run."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Self


class Value:
    """Stands for a value that is no tensor: made of anything, holds nothing."""

    def __new__(cls, *_: Any) -> Self:
        return super().__new__(cls)

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


class Arguments(Value):
    """Stands for the arguments of a script, whose values count: some of them say what model was trained."""

    values: dict[str, Any]

    def __new__(cls, *_: Any) -> Self:
        self = super().__new__(cls)
        self.values = {}
        return self

    def __setstate__(self, state: Any) -> None:
        self.values = state if isinstance(state, dict) else {}


class Array(Value):
    """Stands for an array of NumPy."""


class Table:
    """Stands for a mapping, whose items count and whose type does not: weights may lie in one."""

    def __new__(cls, *_: Any) -> OrderedDict[Any, Any]:  # type: ignore[misc]
        return OrderedDict()


class Row:
    """Stands for a sequence that is filled after it was made."""

    def __new__(cls, *_: Any) -> list[Any]:  # type: ignore[misc]
        return []


_PATHS = ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
VALUES = (
    *("numpy.ndarray", "numpy.dtype", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"),
    *(
        f"builtins.{name}" for name in ("int", "float", "str", "bool", "list", "dict", "tuple")
    ),  # defaultdict's factories
    *(f"builtins.{name}" for name in ("frozenset", "range", "slice")),
    *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
    *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in _PATHS),
    *("decimal.Decimal", "fractions.Fraction", "uuid.UUID"),
    "mmengine.logging.history_buffer.HistoryBuffer",
    *("omegaconf.dictconfig.DictConfig", "omegaconf.listconfig.ListConfig", "omegaconf.base.ContainerMetadata"),
    *("omegaconf.base.Metadata", "typing.Any"),
    *(f"omegaconf.nodes.{kind}Node" for kind in ("Any", "Integer", "Float", "String", "Boolean")),
)
ARGUMENTS = ("argparse.Namespace",)
ARRAYS = ("numpy.core.multiarray._reconstruct", "numpy._core.multiarray._reconstruct")
TABLES = (
    *("collections.defaultdict", "addict.addict.Dict", "easydict.EasyDict", "yacs.config.CfgNode"),
    *(f"{package}.utilities.parsing.AttributeDict" for package in ("pytorch_lightning", "lightning.pytorch")),
    *("lightning_fabric.utilities.data.AttributeDict", "lightning.fabric.utilities.data.AttributeDict"),
    *("mmengine.config.config.ConfigDict", "mmcv.utils.config.ConfigDict", "fvcore.common.config.CfgNode"),
)
ROWS = ("collections.deque",)

STAND_INS: list[Any] = [
    *((Value, name) for name in VALUES),
    *((Arguments, name) for name in ARGUMENTS),
    *((Array, name) for name in ARRAYS),
    *((Table, name) for name in TABLES),
    *((Row, name) for name in ROWS),
]
"""What torch's unpickler takes for each name, as `torch.serialization.safe_globals` wants it.

numpy's own constructors are not among them: sizes, types and bytes would come from a file that may be hostile.
"""
