"""What a gate counts in an artifact without timing; a new check is one entry here and one key of gate.toml."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from toolchain.artifacts import Artifact


@dataclass(frozen=True)
class Metric:
    """A whole number that is better lower.

    Attributes:
        unit: what is counted, in words.
        count: the number of an artifact; None if it takes images.
        advice: what to do first where it is too large.
    """

    unit: str
    count: Callable[[Artifact], int] | None
    advice: str


METRICS: Mapping[str, Metric] = {
    "size": Metric(
        "bytes", lambda artifact: artifact.size_bytes, "See with --why which layer they are in and make it smaller"
    ),
    "download": Metric(
        "bytes of download", lambda artifact: artifact.download_bytes, "Make it smaller, or its numbers more alike"
    ),
    "params": Metric("parameters", lambda artifact: artifact.params, "Compress further"),
    "nodes": Metric("nodes", lambda artifact: artifact.nodes, "Simplify the graph"),
    "accuracy": Metric("wrong images", None, "Compress less or train longer"),
}
