"""What compression reports of its outcome: budgets met, positions removed, and the Pareto front of other budgets."""

from __future__ import annotations

from toolchain.records import Record


class LatencyBudget(Record):
    """A latency budget on one target; all but `dense_ms` are times over the dense model's."""

    target: str
    batch: int
    threads: int
    dense_ms: float
    requested: float
    reachable: tuple[float, float]
    predicted: float
    measured: float | None
    met: bool | None
    correction: float


class SizeBudget(Record):
    """The size of the file of one precision, in bytes: asked for, predicted for the widths, and of the file itself.

    Attributes:
        requested: None of a precision that could have been chosen, and was not.
        reachable: by the narrowest widths, and by the dense model.
        rounding: what rounding does to the dense model's outputs, in nats an image; None where that was not measured.
        bytes: None where the file was refused.
    """

    precision: str
    requested: int | None
    predicted: int
    reachable: tuple[int, int]
    rounding: float | None
    bytes: int | None = None

    @property
    def met(self) -> bool | None:
        """Whether the file keeps it."""
        return None if self.bytes is None or self.requested is None else self.bytes <= self.requested


class FrontPoint(Record):
    """The least damage that widths do at some cost: shares of the dense model's, nats an image, each width measured alone."""

    ratio: dict[str, float]
    damage: float


class PrunedShare(Record):
    """How many positions of one kind a block lost; without `physical` they are only zeroed."""

    block: str
    kind: str
    total: int
    removed: int
    physical: bool
