"""Data types of measurements: workload, design, scenario, and the raw samples of every session. Nothing is judged here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from toolchain.artifacts import InputSpec
from toolchain.defaults import BLOCKS, LOOKS, SESSIONS, WARMUP_S
from toolchain.measure.environment import Fingerprint
from toolchain.records import Record

A: Literal["A"] = "A"
B: Literal["B"] = "B"
CONTROL = "A'"
VARIANTS = (A, B, CONTROL)
"""The baseline, what is compared with it, and the baseline loaded a second time."""

Parity = Literal["pass", "not claimed"]
Count = Annotated[int, Field(ge=1, le=2**63 - 1)]
Nanoseconds = Annotated[int, Field(gt=0, le=2**63 - 1)]
Cores = Annotated[tuple[Annotated[int, Field(ge=0)], ...], AfterValidator(lambda cores: tuple(sorted(set(cores))))]
"""Numbers of cores, ascending and each once, as a system names those that a process may use."""


@dataclass(frozen=True)
class Workload:
    """What a call of an artifact is to be.

    Attributes:
        batch: first dimension of the inputs.
        threads: intra-op threads.
        affinity: the cores to run on; None for all that the process may use.
        input_shape: shape of one sample; only needed where the file leaves it open.
    """

    batch: int = 1
    threads: int = 1
    affinity: tuple[int, ...] | None = None
    input_shape: tuple[int, ...] | None = None


class Scenario(Record):
    """What is timed: where, with how many threads, on which cores (None: all that are allowed), on which inputs."""

    target: str
    threads: Count
    batch: Count
    inputs: tuple[InputSpec, ...]
    affinity: Cores | None = None


class Design(Record):
    """How it is timed and judged.

    Attributes:
        sessions: fresh processes that a look adds.
        blocks: of each session of the first two looks; from the third on each look doubles what there is.
        slot_ms: shortest slot.
        warmup_calls, warmup_s: shortest warm-up of a variant.
        tau: tolerance of the verdict.
        alpha: probability of missing the truth, over all looks.
        looks: how often the data may be judged while it grows; every look is judged at alpha/looks.
        seed: of inputs, orders and bootstrap.
    """

    sessions: Count = SESSIONS
    blocks: Annotated[int, Field(ge=4)] = BLOCKS
    slot_ms: Annotated[float, Field(gt=0)] = 50.0
    warmup_calls: Count = 10
    warmup_s: Annotated[float, Field(ge=0)] = WARMUP_S
    tau: Annotated[float, Field(gt=0, lt=1)] = 0.05
    alpha: Annotated[float, Field(gt=0, lt=1)] = 0.05
    looks: Annotated[int, Field(ge=1, le=4)] = LOOKS
    seed: Annotated[int, Field(ge=0)] = 0

    def blocks_of(self, session: int) -> int:
        """Blocks of one session, by its number over all looks."""
        return self.blocks << max(0, session // self.sessions - 1)

    @property
    def once(self) -> Design:
        """The same design with a single look, for measurements that are not judged while they grow."""
        return self.model_copy(update={"looks": 1})

    def share(self, sessions: int) -> float:
        """The share of all blocks that could be measured which this many sessions hold; for progress."""
        every = [self.blocks_of(index) for index in range(self.sessions * self.looks)]
        return sum(every[:sessions]) / sum(every)


class ArtifactFacts(Record):
    """Which bytes were timed; `sha256` is `Artifact.sha256`: for one file, what sha256sum prints."""

    name: str
    size_bytes: int
    sha256: str


class VariantFacts(Record):
    """How one variant was sampled in one session, and the shapes of its outputs."""

    outputs: tuple[tuple[int, ...], ...]
    warmup_calls: int
    warmup_seconds: float
    call_ns: float
    calls_per_slot: Count
    discarded: Annotated[int, Field(ge=0)]


class Fingerprints(Record):
    """The device before the first and after the last slot of a session."""

    before: Fingerprint
    after: Fingerprint


class Block(Record):
    """One slot of every variant, in the order in which they ran."""

    order: tuple[str, ...]
    samples_ns: dict[str, tuple[Nanoseconds, ...]]


class Session(Record):
    """Everything that one fresh process measured."""

    schema_: Annotated[Literal["slimvit.bench.session/1"], Field(alias="schema")]
    session: Annotated[int, Field(ge=0)]
    fingerprint: Fingerprints
    variants: dict[str, VariantFacts]
    blocks: tuple[Block, ...]

    def slots_ns(self, variant: str) -> list[tuple[int, ...]]:
        """The retained samples of a variant, one tuple per block."""
        return [block.samples_ns[variant] for block in self.blocks]


class ColdStart(Record):
    """What a fresh process needed for one artifact: to open it, for the first call, and the most memory it held.

    `rss_before` is what the process held before it loaded the runtime and opened the artifact, None where the system does not
    say. `device` is what opening and the first call took of a GPU's memory, the context of CUDA left out.
    """

    schema_: Annotated[Literal["slimvit.bench.cold/1"], Field(alias="schema")]
    open_ns: Nanoseconds
    first_ns: Nanoseconds
    rss_before_bytes: Count | None
    peak_rss_bytes: Count | None
    device_bytes: Count | None
    fingerprint: Fingerprint
