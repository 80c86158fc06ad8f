"""What the numbers are that a model gives for an image: it decides how two models are compared, and which labels can judge them."""

from __future__ import annotations

from typing import Literal

Output = Literal["logits", "multi-label", "regression"]
"""One class of many, read by a softmax; a yes or no each, read by a sigmoid; or numbers."""
OUTPUT = "slimvit.output"
"""The key of an ONNX file's metadata that says which of these it gives."""


WORDS: dict[Output, str] = {
    "logits": "classes (logits)",
    "multi-label": "a yes or no each (multi-label)",
    "regression": "numbers (regression)",
}
"""What they are called in a sentence that begins with "the outputs are"."""


def divergence_words(output: Output) -> str:
    """What the divergence of two models is, to be followed by "from the dense model" and a number of nats."""
    return "half the squared difference over the variance" if output == "regression" else "KL divergence"


def output_of(declared: Output | None, width: int) -> Output:
    """What `width` outputs are, where nobody declared it: one class of many, or, of a single output, a number."""
    return declared or ("logits" if width > 1 else "regression")


def label_classes(output: Output, width: int) -> int | None:
    """How many classes the labels of images may have to judge `width` outputs; None if class labels cannot judge them."""
    if output == "logits":
        return width
    return 2 if output == "multi-label" and width == 1 else None
