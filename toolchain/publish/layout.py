"""File names, inputs and outputs of ONNX models as transformers.js and optimum expect them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from toolchain.artifacts.onnx_file import FP32
from toolchain.model import IMAGE
from toolchain.outputs import LOGITS

ONNX = "onnx"
"""The folder of a repository in which its ONNX files lie."""
PIXELS = "pixel_values"
"""Name of an image model's input."""
NAMES: Mapping[str, str] = {
    IMAGE: PIXELS,
    LOGITS: LOGITS,
    "features": "pooler_output",
    "tokens": "last_hidden_state",
}
"""What an input or output of slimvit's files is → what transformers calls it; outputs of layers keep their names."""
SUFFIXES: Mapping[str, tuple[str, str]] = {
    FP32: ("", "fp32"),
    "fp16": ("_fp16", "fp16"),
    "int8-dynamic": ("_quantized", "q8"),
    "int8-qdq": ("_int8", "int8"),
    "int4": ("_q4f16", "q4f16"),
}
"""Precision → (what stands behind "model" in the file's name, what transformers.js calls it as a dtype)."""
QUANTISED = ("int8-dynamic", "int8-qdq")
"""`model_quantized.onnx` is the first of these that exists; browsers take that file by default."""


@dataclass(frozen=True)
class Named:
    """The place of an ONNX file in a repository.

    Attributes:
        path: of the file.
        dtype: by which transformers.js asks for it; "" where it has no word for the precision.
    """

    path: str
    dtype: str


def places(precisions: Sequence[str]) -> dict[str, Named]:
    """Precision → where its file lies, for all files of a model."""
    quantised = next((each for each in QUANTISED if each in precisions), "")
    found: dict[str, Named] = {}
    for precision in precisions:
        known = "int8-dynamic" if precision == quantised else precision
        suffix, dtype = SUFFIXES.get(known, (f"_{precision.replace('-', '_')}", ""))
        found[precision] = Named(f"{ONNX}/model{suffix}.onnx", dtype)
    return found
