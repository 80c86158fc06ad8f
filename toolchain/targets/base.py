"""The interface of a target: a probe, a build, and a runner that times its own calls.

Building, opening and profiling go through the final methods here, which call the probe first. So a file can never run under
the name of a target that is missing, or in another precision or on another device, whatever a subclass forgets.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean
from types import MappingProxyType
from typing import Any, Protocol, Self, final, runtime_checkable

from numpy.typing import NDArray
from pydantic import BaseModel, Field, JsonValue

from toolchain.errors import RecipeError, TargetUnavailable
from toolchain.on_device.runner import Runner
from toolchain.targets.mode import Mode

Array = NDArray[Any]
Feeds = Mapping[str, Array]
Arrays = dict[str, Array]
"""Output name → array."""


PRODUCTS = "products/"
"""Before a target's name in a schedule: the variant is a file of products, see `products`."""


@dataclass(frozen=True)
class TargetProfile:
    """How a target wants its shapes: unit name ("mlp_hidden", "head_dim", "rank") → preferred multiple."""

    multiples: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class TargetInfo:
    """What a probe found: the runtime, its version, the device it would use, and the line that brings what it still lacks."""

    target: str
    runtime: str
    version: str
    device: str
    details: Mapping[str, str] = field(default_factory=dict)
    install: str = ""

    @property
    def cannot_run(self) -> str:
        """Why nothing runs here though engines can be built, from `details`; "" where files run."""
        run = self.details.get("run", "yes")
        return "" if run == "yes" else run.removeprefix("no: ")


@dataclass(frozen=True)
class BuildOptions:
    """How an engine is built.

    Attributes:
        batch: (min, opt, max) of its optimization profile.
        compute_capabilities: the GPUs that it is for, where it is built ahead of time.
        strip: leave the weights out; they are put in on the device, from the ONNX file.
        version_compatible: let later versions of the runtime load it.
        hardware_compatible: "none", "ampere_plus" or "same_compute_capability": which other GPUs may load it.
        input_shape: shape of one sample that it is built for, where the file leaves it open.
    """

    batch: tuple[int, int, int] = (1, 1, 8)
    compute_capabilities: tuple[str, ...] = ()
    strip: bool = False
    version_compatible: bool = False
    hardware_compatible: str = "none"
    input_shape: tuple[int, ...] | None = None


class EngineRecord(BaseModel):
    """The fields of an engine's facts that are read again; a field that a target does not report is unknown.

    Attributes:
        target: that built it.
        weights: type, in its runtime's words → number of its stored weights.
        matmul_dtypes: type → number of its matrix products, as it was built.
        inspected_products: type → number of layers that read it, as the engine inspector says.
        inspector: what that says; None where there is none.
        loaded, loaded_reason: "pass", or "not_run" and why.
        compute_capabilities: of the GPUs that it is for.
        attention_layers, fused_attention: how many attentions it has, and how many of its layers are fused attention.
        batches: the only ones that it takes, where it was built for single ones.
        constant_linears: linears of the file that it lacks, because what they give is a constant.
    """

    target: str = ""
    weights: dict[str, int] = Field(default_factory=dict)
    matmul_dtypes: dict[str, int] | None = None
    inspected_products: dict[str, int] = Field(default_factory=dict)
    inspector: JsonValue = None
    loaded: str = "pass"
    loaded_reason: str = ""
    compute_capabilities: tuple[str, ...] | None = None
    attention_layers: int | None = None
    fused_attention: int | None = None
    batches: tuple[int, ...] = ()
    constant_linears: int = 0


@dataclass(frozen=True)
class EngineBuild:
    """A built engine and what is known of it at build time; `facts` becomes engine.json beside the file."""

    path: Path
    facts: Mapping[str, object]

    @cached_property
    def record(self) -> EngineRecord:
        """Those of the facts that are read again."""
        return EngineRecord.model_validate(self.facts)


@dataclass(frozen=True)
class NodeTime:
    """What one node of a running graph costs: its name, its operator, and nanoseconds per call."""

    name: str
    op: str
    ns: float

    @classmethod
    def of_calls(cls, name: str, op: str, ns: Sequence[float]) -> Self:
        """A node by its time in each of several calls: the mean of their middle half, which no interrupted call distorts."""
        quarter = len(ns) // 4
        return cls(name, op, fmean(sorted(ns)[quarter : len(ns) - quarter]))


class Computation(Protocol):
    """Computes the outputs of a file: a runner, or an interpreter that replaces one."""

    def infer(self, feeds: Feeds) -> Arrays:
        """Output name → array for one call; input and output names are the artifact's own."""
        ...


class Target(ABC):
    """A runtime on which artifacts are built and timed; a subclass implements `probe` and `_open`, and `_build` if there are engines."""

    name: str
    profile: TargetProfile
    takes: tuple[str, ...]
    """Kinds of artifacts that it opens: names of `ARTIFACTS`. The first is what a run times on it."""
    measures: bool
    """Whether latency can be measured on it through `open`; False for build-only targets."""
    uses_threads: bool = True
    """Whether threads of the CPU do the work."""
    modes: tuple[Mode, ...] = ()
    """In which calls are timed, the first under the target's own name; none where there is one way alone."""
    never_run: str = ""
    """What of it has never been carried out by those who wrote it, for want of a device; "" where all has."""
    loads: tuple[str, ...] = ("FLOAT",)
    """Types of matrix products that it runs, as `Precision.product` names them: files of other precisions are not timed on it."""
    builds: tuple[str, ...] = ()
    """Those of the ONNX files that it builds engines from; none where files run as they are."""
    exact_fp32: bool = False
    """Whether products of fp32 are computed in fp32, and not in fewer bits as a GPU may."""
    engine_products: Mapping[str, str] = MappingProxyType({})
    """Of these, type in the file → type in the engine, where that is another."""

    @abstractmethod
    def probe(self) -> TargetInfo:
        """What is there; raises TargetUnavailable(reason, install line) when it cannot run here."""

    def batches(self, options: BuildOptions) -> tuple[int, ...] | None:  # noqa: ARG002
        """The only batches that an engine built so takes, rising; None where it takes all between the smallest and the largest."""
        return None

    def runtime_download(self) -> tuple[str, int] | None:
        """(name, bytes) of the runtime where users fetch it with the model, as a web page's do; None where it is there before."""
        return None

    def in_mode(self, mode: Mode) -> Target:
        """The same runtime, timed in another of its modes, which its name tells."""
        raise NotImplementedError(f"{self.name} has no {mode}")

    @final
    def require_run(self) -> None:
        """Raises TargetUnavailable, with the probe's reason, where nothing runs on the target."""
        if missing := self.probe().cannot_run:
            raise TargetUnavailable(self.name, f"engines can be built but not run here ({missing})")

    @final
    def require_outputs(self) -> None:
        """Raises TargetUnavailable where nothing here gives the outputs of its files: they neither run nor are interpreted."""
        self.probe() if isinstance(self, Interpreted) else self.require_run()

    @final
    @contextmanager
    def opened(self, path: Path, threads: int, *, rounded: bool = True) -> Iterator[Computation]:
        """What gives the outputs of a file in a block, never timed: the interpreter where files do not run; raises as `open`.

        Whether it rounds activations is for an interpreter alone; a runtime does as it does.
        """
        if isinstance(self, Interpreted) and self.probe().cannot_run:
            yield self.interpret(path, rounded=rounded)
            return
        with self.open(path, threads) as runner:
            yield runner

    @final
    def build(self, onnx: Path, folder: Path, options: BuildOptions) -> EngineBuild:
        """Builds an engine from an ONNX file into `folder`.

        Raises:
            TargetUnavailable: it cannot be built here.
            RecipeError: the target has no engines, or none with these options.
        """
        info = self.probe()
        if not self.builds:
            raise RecipeError(f"{self.name} runs files as they are and has no engines; remove it from engine.targets")
        if isinstance(self, Selective):
            self.require(options, {})
        from toolchain.targets.engine_facts import described, source_digests  # not in a process that only runs files

        source = source_digests(onnx)
        return described(self._build(onnx, folder, options), info, source)

    @final
    def open(self, path: Path, threads: int) -> Runner:
        """A runner for an artifact of this target; raises TargetUnavailable as `require_run`, before the file is looked at."""
        self.require_run()
        return self._open(path, threads)

    def _build(self, onnx: Path, folder: Path, options: BuildOptions) -> EngineBuild:
        """What `build` does once the probe has said that the target is there; its facts are those that `engine_facts` has not."""
        raise NotImplementedError(f"{self.name} builds nothing")

    @abstractmethod
    def _open(self, path: Path, threads: int) -> Runner:
        """What `open` does once the probe has said that files run here."""


@runtime_checkable
class Selective(Protocol):
    """A target that cannot build every engine that a recipe could ask for, and knows before any work is done."""

    def require(self, options: BuildOptions, precisions: Mapping[str, str]) -> None:
        """Nothing, if engines of these precisions can be built here; else RecipeError or TargetUnavailable.

        Args:
            options: of the build.
            precisions: their names, as a recipe has them → the type of their matrix products, as `builds` has it.
        """
        ...


class Interpreted(Target):
    """A target whose files can be computed where they do not run: by an interpreter, and not in the arithmetic of the device.

    Attributes:
        interpreter: what computes them and what it is not, in words that every comparison by it carries.
        max_abs: precision of an ONNX file → what outputs of its engines may differ by where no activation is rounded, in the units of
            `Tolerance`; the tolerance of the precision alone judges others.
    """

    interpreter: str
    max_abs: Mapping[str, float] = MappingProxyType({})

    @final
    def interpret(self, path: Path, *, rounded: bool = True) -> Computation:
        """The interpreter of a file, which knows no time; raises TargetUnavailable if what reads it is not there.

        Args:
            path: the file.
            rounded: whether activations are rounded to the types that the file declares.
        """
        self.probe()
        return self._interpret(path, rounded=rounded)

    @abstractmethod
    def _interpret(self, path: Path, *, rounded: bool) -> Computation:
        """What `interpret` does once the probe has said that files can be read."""


class Refittable(Target):
    """A target whose engines may have been built without their weights."""

    @final
    def refit(self, stripped: Path, onnx: Path, folder: Path) -> EngineBuild:
        """The engine in `folder` with the weights of the ONNX file that it was built from; raises as `open` where none runs."""
        self.require_run()
        return self._refit(stripped, onnx, folder)

    @abstractmethod
    def _refit(self, stripped: Path, onnx: Path, folder: Path) -> EngineBuild:
        """What `refit` does once the probe has said that engines run here."""


class Profiled(Target):
    """A target that can say what each node of a file costs."""

    @final
    def node_times(self, path: Path, threads: int, feeds: Sequence[Feeds], warm_up: int, calls: int) -> list[NodeTime]:
        """The mean time of every node over `calls` calls, after `warm_up` others that are not counted; raises as `open`."""
        self.require_run()
        return self._node_times(path, threads, feeds, warm_up, calls)

    @abstractmethod
    def _node_times(self, path: Path, threads: int, feeds: Sequence[Feeds], warm_up: int, calls: int) -> list[NodeTime]:
        """What `node_times` does once the probe has said that files run here."""
