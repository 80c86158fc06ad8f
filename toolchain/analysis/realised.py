"""How close a latency comes to the time of its matrix products, and which share of the ideal speedup is realised.

Holds raw samples and derives every figure from them; `toolchain.analysis.floor` takes the samples.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import ClassVar, Literal

from pydantic import model_validator

from toolchain.analysis.products import Product
from toolchain.measure.intervals import Interval
from toolchain.measure.sampled import Sampled, require_sessions
from toolchain.measure.samples import CONTROL, A, ArtifactFacts, B
from toolchain.records import Record

SCHEMA = "slimvit.floor/2"
Letter = Literal["A", "B"]


def alone(letter: str) -> str:
    """Name of the variant with all products of a model, and nothing else."""
    return f"{letter} alone"


def product_variants(letter: str, products: Sequence[Product]) -> tuple[str, ...]:
    """For each shape of product of a model, the variant of a session that holds the products of that shape."""
    return tuple(f"{letter}{index}: {product}" for index, product in enumerate(products))


def variants_of(models: Mapping[Letter, Counted]) -> list[str]:
    """Every variant of a session, in the order of its plan: the models, A once more, and what each consists of."""
    parts = [part for x, model in models.items() for part in (alone(x), *product_variants(x, model.products))]
    return [*models, CONTROL, *parts]


class Counted(Record):
    """A model, and its products by shape, the costliest first."""

    artifact: ArtifactFacts
    products: tuple[Product, ...]

    @property
    def macs(self) -> int:
        """Multiply-accumulates of a call."""
        return sum(product.total_macs for product in self.products)


@dataclass(frozen=True)
class Rate:
    """All products of one shape, their time, and at which rate they ran."""

    product: str
    dtype: str
    count: int
    macs: int
    ms: float
    gmacs_per_s: float


@dataclass(frozen=True)
class Limit:
    """One model compared with its products; the properties are derived from the samples of a floor."""

    letter: Letter
    floor: Floor

    @property
    def counted(self) -> Counted:
        """The model."""
        return self.floor.models[self.letter]

    @property
    def name(self) -> str:
        """Name of the file."""
        return self.counted.artifact.name

    @property
    def macs(self) -> int:
        """Multiply-accumulates of a call."""
        return self.counted.macs

    @property
    def latency_ms(self) -> float:
        """The model's median time."""
        return self.floor.latency_ms(self.letter)

    @property
    def floor_ms(self) -> float:
        """The median time of all its products in one file, alone."""
        return self.floor.latency_ms(alone(self.letter))

    @cached_property
    def share(self) -> Interval:
        """ln(time of the products / latency) with its interval: how much of the limit is reached."""
        return self.floor.log_ratio(alone(self.letter), self.letter)

    @property
    def rates(self) -> list[Rate]:
        """For each shape, the median time of its products in a file of their own; to tell which shapes run badly.

        Each file pays for a call of the runtime, so their sum is above the floor where a call takes microseconds.
        """
        names = product_variants(self.letter, self.counted.products)
        timed = zip(self.counted.products, (self.floor.latency_ms(name) for name in names), strict=True)
        return [Rate(str(p), p.dtype, p.count, p.total_macs, ms, p.total_macs / ms / 1e6) for p, ms in timed]

    def to_dict(self) -> dict[str, object]:
        """The figures as JSON values, without the samples."""
        return {
            "name": self.name,
            "sha256": self.counted.artifact.sha256,
            "macs": self.macs,
            "latency_ms": self.latency_ms,
            "floor_ms": self.floor_ms,
            "gmacs_per_s": self.macs / self.floor_ms / 1e6,
            "share_of_floor": self.share.to_ratio(),
            "products": [asdict(rate) for rate in self.rates],
        }


class Floor(Sampled):
    """The limits of one or two models, measured side by side, with A loaded a second time as control.

    Raises:
        ValidationError: the samples are not those that the design asks for, or come from different machines.
    """

    name: ClassVar[str] = SCHEMA

    models: dict[Letter, Counted]

    @model_validator(mode="after")
    def _samples_fit_the_design(self) -> Floor:
        if list(self.models) not in ([A], [A, B]):
            raise ValueError(f"expected the models A, or A and B; got {list(self.models)}")
        if [session.session for session in self.sessions] != list(range(self.design.sessions)):
            raise ValueError(f"expected sessions 0…{self.design.sessions - 1}")
        require_sessions(self.sessions, self.design, self.scenario, variants_of(self.models))
        return self

    def limit(self, letter: Letter) -> Limit:
        """One of the models beside its products."""
        return Limit(letter, self)

    @property
    def limits(self) -> tuple[Limit, ...]:
        """The limits of A, and of B if there is one."""
        return tuple(self.limit(letter) for letter in self.models)

    @cached_property
    def control(self) -> Interval:
        return self.log_ratio(CONTROL, A)

    @property
    def is_valid(self) -> bool:
        """Whether the control stays within the design's tolerance, so that shares may be stated."""
        return self.tau_min <= self.design.tau

    @cached_property
    def ratio(self) -> Interval | None:
        """ln(time of B / time of A), or None without a B."""
        return self.log_ratio(B, A) if B in self.models else None

    @property
    def realised(self) -> Realised | None:
        """How much of the ideal speedup of B is real, or None without a B."""
        return None if self.ratio is None else realised_share(self.ratio, self.models[A].macs, self.models[B].macs)

    @property
    def artifacts(self) -> dict[Letter, ArtifactFacts]:
        return {letter: counted.artifact for letter, counted in self.models.items()}

    @property
    def headline(self) -> str:
        shares = [f"{limit.name} at {math.exp(limit.share.point):.2f} of its limit" for limit in self.limits]
        return ", ".join(shares) + ("" if self.is_valid else ", not verified")

    def to_dict(self) -> dict[str, object]:
        """The JSON object of `bench floor --json`: what follows from the samples and, under `raw`, they themselves."""
        realised = self.realised
        return {
            "schema": SCHEMA,
            "target": self.scenario.target,
            "threads": self.scenario.threads,
            "batch": self.scenario.batch,
            **{letter: self.limit(letter).to_dict() for letter in self.models},
            "realised": None if realised is None else realised.to_dict(),
            "control": self.control.to_ratio(),
            "tau_min": self.tau_min,
            "valid": self.is_valid,
            "sessions": len(self.sessions),
            "blocks": self.blocks,
            **self.sealed(),
        }


@dataclass(frozen=True)
class Realised:
    """Speedup beside the ideal one, which is what the saved multiply-accumulates would give at an unchanged rate.

    Attributes:
        ideal: MACs of the dense model over those of the compressed one.
        speedup: measured, as logarithm.
    """

    ideal: float
    speedup: Interval

    @property
    def share(self) -> Interval:
        """ln(speedup / ideal), with the interval of the speedup."""
        gone = math.log(self.ideal)
        return Interval(self.speedup.point - gone, self.speedup.lo - gone, self.speedup.hi - gone)

    def to_dict(self) -> dict[str, object]:
        """`ideal`, `speedup` and `share` as plain ratios."""
        return {"ideal": self.ideal, "speedup": self.speedup.to_ratio(), "share": self.share.to_ratio()}


def realised_share(ratio: Interval, macs_a: int, macs_b: int) -> Realised:
    """How much of the ideal speedup was realised: speedup / (MACs of A / MACs of B).

    Args:
        ratio: ln(time of B / time of A), for instance of a `Comparison`; its interval is carried over.
        macs_a: multiply-accumulates of the dense model.
        macs_b: of the compressed one.
    """
    return Realised(macs_a / macs_b, Interval(-ratio.point, -ratio.hi, -ratio.lo))
