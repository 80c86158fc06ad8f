"""The content of report.json: what a run found, typed, as every form of the report reads it."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, JsonValue, ValidationError

from toolchain.compress.outcome import FrontPoint, LatencyBudget, PrunedShare, SizeBudget
from toolchain.errors import ArtifactError
from toolchain.files import reading
from toolchain.measure.comparison import Verdict as LatencyVerdict
from toolchain.measure.environment import MachineFacts
from toolchain.outputs import Output
from toolchain.parity import Rung, Verdict
from toolchain.recipe import BudgetSection, CompressSection
from toolchain.records import Record
from toolchain.report.absent import REPORT, require_run
from toolchain.report.tables import call_words
from toolchain.settings import explain
from toolchain.training.outcome import Features, FinetuneFacts

SCHEMA: Literal["slimvit.report/2"] = "slimvit.report/2"


class Counts(Record):
    """How right outputs are on the test split: by labels, by their squared error relative to the dense model's, or as features."""

    accuracy: float | None = None
    wrong: int | None = None
    total: int | None = None
    error: float | None = None
    features: Features | None = None


class Figures(Counts):
    """What a form of the model costs, and how right it is."""

    params: int
    macs: int
    bytes: int


class StageRow(Figures):
    """A form of the model after a stage; seconds are None for one that has no stage of its own."""

    name: str
    seconds: float | None


class ModelName(Record):
    """Which timm model, and which weights."""

    name: str
    kwargs: dict[str, JsonValue]
    checkpoint_sha256: str | None


class Data(Record):
    """The kind of source and the digest of its content.

    Attributes:
        content, pictures: identify what was read, and which of it is in each split, whatever it is prepared as; absent where
            that is not known.
    """

    source: str
    digest: str
    content: str = ""
    pictures: dict[str, str] = Field(default_factory=dict)


class Shares(Record):
    """What is left, compressed over dense."""

    params: float
    macs: float
    bytes: float


class BlockDamage(Record):
    """What the width of one kind of unit in a block does to the output, measured alone, in nats an image."""

    block: str
    kind: str
    nats: float


class ClosedForm(Record):
    """What the closed form chose, and the divergence that it chose by; None where the output was not finite."""

    beta: float
    head_refitted: bool
    kl: float | None


class Graph(Record):
    """What is in an ONNX file."""

    size_bytes: int
    opset: int
    nodes_before: dict[str, int]
    nodes_after: dict[str, int]
    simplified: bool
    notes: tuple[str, ...] = ()


class Interval(Record):
    """A ratio of times with its confidence interval."""

    point: float
    lo: float
    hi: float


class Place(Record):
    """Where and how latency is measured."""

    target: str
    batch: int
    threads: int

    @property
    def place(self) -> tuple[str, int, int]:
        """What tells places apart."""
        return self.target, self.batch, self.threads

    @property
    def call(self) -> str:
        """What a call is there, in words."""
        return call_words(self.batch, self.threads)

    def __str__(self) -> str:
        return f"{self.target}, {self.call}"


class Calls(Record):
    """How long the single calls of a file took in a comparison, in ms: what 5, 25, 50, 75 and 95 % of them stay below."""

    p5: float
    p25: float
    p50: float
    p75: float
    p95: float


class BenchRow(Place):
    """A comparison: `path` is the file or folder of the run that was timed against `baseline`.

    That is a dense one, or in a duel a file of the first of `rivals`, held against one of the second. `calls` are those of the baseline
    and of the file.
    """

    precision: str
    baseline: str
    path: str
    dense_ms: float
    compressed_ms: float
    ratio: Interval
    control: Interval
    tau: float
    tau_min: float
    verified_speedup_at_least: float | None
    verdict: LatencyVerdict
    environment: MachineFacts
    summary: str
    rivals: tuple[str, str] | None = None
    calls: tuple[Calls, Calls] | None = None

    def __str__(self) -> str:
        return super().__str__() if self.precision == "fp32" else f"{self.precision}, {super().__str__()}"


class NotMeasured(Record):
    """A target or device that timed nothing, or not all that it might have.

    Attributes:
        target: its name.
        reason: why.
        short: the same in a few words, for a cell of a table.
        files: paths of those that it has no time of, in one place at least.
    """

    target: str
    reason: str
    short: str = ""
    files: tuple[str, ...] = ()

    def __str__(self) -> str:
        what = f": {', '.join(self.files)}" if self.files else ", or not all of it"
        return f"Not measured on {self.target}{what} ({self.reason})."


class Int8Choice(Place):
    """Which kind of int8 to take in a place.

    Attributes:
        chosen: the precision; None where fp32 is faster, or nothing is known.
        rivals: the two fastest kinds; None where only one is there, as `ratio`.
        ratio: time of the second of them over the first.
        verified: whether the interval excludes 1 by more than its control strays.
        slower_than_fp32: None where fp32 has no valid comparison.
    """

    chosen: str | None
    rivals: tuple[str, str] | None = None
    ratio: Interval | None
    verified: bool
    slower_than_fp32: bool | None


class Shippable(Counts):
    """A file that could ship, or a folder; `download_bytes` is what it weighs as gzip."""

    path: str
    model: Literal["dense", "compressed"]
    precision: str
    bytes: int | None = None
    download_bytes: int | None = None


class FileRow(Shippable):
    """An ONNX file; one that was refused, because it is another model, has the reason and no size."""

    judged_on: str | None = None
    refused: str | None = None

    @property
    def label(self) -> str:
        """What tells it from the others in a table's header: dense, compressed, or its precision."""
        return self.model if self.precision == "fp32" else self.precision


class EngineFacts(Shippable):
    """An engine: what it weighs, how right it is, and what it computes in, as far as its runtime says.

    Attributes:
        interpreted: whether all that is known of its outputs is from an interpreter, because it does not run here.
    """

    target: str
    interpreted: bool = False
    file: str
    bytes: int
    download_bytes: int
    compute_capabilities: tuple[str, ...] | None = None
    matmul_dtypes: dict[str, int] | None = None
    attention_layers: int | None = None
    fused_attention: int | None = None


class EngineRow(EngineFacts):
    """An engine, and whether it is the same model as the file that it was built from."""

    verdict: Verdict

    @property
    def ran(self) -> bool:
        """Whether it was run here and gives what its file does."""
        return self.verdict == "pass" and not self.interpreted


class LayerRow(Record):
    """A layer's bytes in each file."""

    layer: str
    bytes: dict[str, int]


class Fastest(Place):
    """The file that took the least time in a place, of those that are accurate enough."""

    path: str
    ratio: Interval


class Quickest(Place):
    """The file that took the least milliseconds on a machine, whatever runs it, of those that are accurate enough."""

    machine: str
    path: str
    ms: float


class Suggestion(Record):
    """Which compressed file to take, of those that lose at most `accuracy_loss` of the images.

    Attributes:
        smallest: the path of the one with the least bytes.
        fastest: in each place the one with the least of the dense file's time.
        quickest: on each machine on which several runtimes were timed, the one with the least time.
        left_out: those that lose more.
    """

    accuracy_loss: float
    smallest: str
    fastest: tuple[Fastest, ...]
    quickest: tuple[Quickest, ...] = ()
    left_out: tuple[str, ...]


class Listed(Record):
    """A file of the run."""

    path: str
    bytes: int
    sha256: str


class Report(Record):
    """Everything that a run found."""

    model_config = ConfigDict(populate_by_name=True)

    schema_: Annotated[Literal["slimvit.report/2"], Field(alias="schema")] = SCHEMA
    tool: str
    synthetic: bool
    model: ModelName
    output: Output
    data: Data
    method: CompressSection
    requested_method: str
    budget: BudgetSection
    latency_budget: tuple[LatencyBudget, ...]
    size_budget: tuple[SizeBudget, ...] = ()
    recipe_digest: str
    stages: tuple[StageRow, ...]
    dense: Figures
    compressed: Figures
    ratio: Shares
    relative_error_increase: float | None
    relative_error_increase_reason: str | None
    finetune: FinetuneFacts | None
    pruned_shares: tuple[PrunedShare, ...]
    damage: tuple[BlockDamage, ...] = ()
    front: tuple[FrontPoint, ...] = ()
    closed_form: ClosedForm | None
    restrictions: tuple[str, ...]
    notes: tuple[str, ...]
    parity: tuple[Rung, ...]
    graphs: dict[str, Graph]
    bench: tuple[BenchRow, ...]
    not_measured: tuple[NotMeasured, ...]
    int8: tuple[Int8Choice, ...]
    artifacts: tuple[FileRow, ...]
    engines: tuple[EngineRow, ...]
    layers: tuple[LayerRow, ...]
    suggestion: Suggestion
    files: tuple[Listed, ...]

    def to_dict(self) -> dict[str, object]:
        """The content of report.json."""
        return self.model_dump(mode="json", by_alias=True)

    def _repr_html_(self) -> str:
        """What a notebook shows: the page, in a frame, so that its style is no business of the notebook's."""
        from toolchain.report.page import to_html  # which reads reports

        return f'<iframe srcdoc="{html.escape(to_html(self))}" style="width:100%; height:60rem; border:0"></iframe>'

    @staticmethod
    def load(folder: Path) -> Report:
        """The report of the run in a folder; raises StorageError if there is none and ArtifactError if it is another version's."""
        require_run(folder)
        path = folder / REPORT
        with reading(path):
            stored = path.read_bytes()
        try:
            return Report.model_validate_json(stored)
        except ValidationError as error:
            raise ArtifactError(
                f"{path} is not a {SCHEMA} report ({explain(error, Report, 'report')}); run the recipe again"
            ) from None
