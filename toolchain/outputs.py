"""Kinds of model output; the kind decides how two models are compared, and which labels can judge them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, get_args

Output = Literal["logits", "multi-label", "regression", "features", "tokens", "layers"]
"""One class of many, read by a softmax; a yes or no each, read by a sigmoid; numbers; or, of a model without a classifier,
one pooled vector, the tokens after the last norm, or the tokens after several blocks, each through that norm."""
OUTPUT = "slimvit.output"
"""The key of an ONNX file's metadata that says which of these it gives."""
CLASS_NAMES, CLASSES = "class_names", "slimvit.classes"
"""The keys of a model's provenance and of an ONNX file's metadata that say what each output stands for, in order, where that is known."""
LOGITS, LAYER = "logits", "layer_"
"""What the output of a model with a classifier is called, and what the outputs of layers begin with."""

WORDS: dict[Output, str] = {
    "logits": "classes (logits)",
    "multi-label": "a yes or no each (multi-label)",
    "regression": "numbers (regression)",
    "features": "pooled features",
    "tokens": "tokens",
    "layers": "tokens of several layers",
}
"""Kind of output → its words in a sentence that begins with "the outputs are"."""

FEATURES: frozenset[Output] = frozenset({"features", "tokens", "layers"})
"""Outputs of a model without a classifier: vectors that something else reads."""

_TOKENS: Mapping[str, object] = {"num_classes": 0, "global_pool": ""}
KWARGS: Mapping[Output, Mapping[str, object]] = {"features": {"num_classes": 0}, "tokens": _TOKENS, "layers": _TOKENS}
"""The keyword arguments by which timm builds a model of these outputs."""


def divergence_words(output: Output) -> str:
    """What the divergence of two models is, to be followed by "from the dense model" and a number of nats."""
    return "half the squared difference over the variance" if output in {"regression", *FEATURES} else "KL divergence"


def output_named(name: object) -> Output | None:
    """The outputs that a file's metadata names; None where it names none, as classes need not be declared."""
    return next((kind for kind in get_args(Output) if kind == name), None)


def output_of(declared: Output | None, width: int) -> Output:
    """The declared kind of output, or by default: logits for several outputs, a regression for one, features for 0 classes."""
    return declared or ("logits" if width > 1 else "regression" if width else "features")


def label_classes(output: Output, width: int) -> int | None:
    """How many classes the labels of images may have to judge `width` outputs; None if class labels cannot judge them."""
    if output == "logits":
        return width
    return 2 if output == "multi-label" and width == 1 else None


def output_names(output: Output, layers: Sequence[int] = ()) -> tuple[str, ...]:
    """What the outputs are called in every form of a model: one name, or one for each of some layers."""
    if output == "layers":
        return tuple(f"{LAYER}{index}" for index in layers)
    return (output if output in FEATURES else LOGITS,)
