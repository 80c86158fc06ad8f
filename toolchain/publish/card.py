"""README.md of a repository: a model card with the hub's YAML header; every number comes from the run's report."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from huggingface_hub import EvalResult, ModelCardData
from pydantic import JsonValue

from toolchain.outputs import FEATURES, WORDS
from toolchain.publish.layout import PIXELS, Named
from toolchain.publish.recipe_of import HOLE, UNKNOWN, known, whole
from toolchain.recipe import RECIPE_FILE, Recipe
from toolchain.report.markdown import inline, part_lines, table_lines
from toolchain.report.record import FileRow, Report
from toolchain.report.sections import SECTIONS
from toolchain.report.tables import Table, counted, size

ANY = "ORG/NAME"
"""Placeholder for the repository's name in snippets, if files are written to a folder instead of a hub."""


@dataclass(frozen=True)
class Shipped:
    """An ONNX file of a run, and where it lies in the repository.

    Attributes:
        row: its row in the report.
        place: its path and dtype there.
        output: what its first output is called there.
        beside: the paths of the files there that hold weights of it.
    """

    row: FileRow
    place: Named
    output: str
    beside: tuple[str, ...] = ()


@dataclass(frozen=True)
class About:
    """The facts on a card that are not in the report.

    Attributes:
        name: of the repository: "org/name"; of a folder, which is none, without a "/".
        revision: the branch that is written to; "" for the default branch.
        base: the repository that the weights came from; "" if none.
        license: as hubs spell it; "" if none was given.
        versions: package → version that wrote the run.
        provenance: of the model: where its weights came from.
        recipe: of the run; None if its folder does not have it.
    """

    name: str
    revision: str
    base: str
    license: str
    versions: Mapping[str, str]
    provenance: Mapping[str, JsonValue]
    recipe: Recipe | None

    @property
    def address(self) -> str:
        """The name of the repository in snippets."""
        return self.name if "/" in self.name else ANY


def card(report: Report, files: Sequence[Shipped], about: About) -> str:
    """The text of README.md."""
    return f"---\n{_metadata(report, files, about)}\n---\n\n" + "\n".join(_lines(report, files, about)) + "\n"


def _metadata(report: Report, files: Sequence[Shipped], about: About) -> str:
    """What hubs search and sort by, as YAML."""
    accuracy, synthetic = report.compressed.accuracy, report.synthetic
    results = None
    if accuracy is not None and not synthetic:
        kind = report.data.source.partition(":")[0]
        results = [
            EvalResult(
                task_type="image-classification",
                dataset_type=kind,
                dataset_name=report.data.source,
                metric_type="accuracy",
                metric_value=accuracy,
                metric_name=f"accuracy of {files[0].place.path}",
            )
        ]
    data = ModelCardData(
        base_model=about.base or None,
        license=about.license or None,
        library_name="transformers.js",
        pipeline_tag=_task(report),
        tags=["slimvit", "timm", "onnx", "onnxruntime", "vision-transformer", "compression"],
        model_name=about.name.rpartition("/")[2] if results else None,
        eval_results=results,
    )
    return data.to_yaml()


def _task(report: Report) -> str | None:
    """What hubs call the task of its outputs; they have no word for numbers."""
    if report.output in FEATURES:
        return "image-feature-extraction"
    return None if report.output == "regression" else "image-classification"


def _lines(report: Report, files: Sequence[Shipped], about: About) -> Iterator[str]:
    left = report.ratio.params
    yield f"# {inline(about.name.rpartition('/')[2])}"
    yield ""
    yield (
        f"timm's `{report.model.name}` with {100 * left:.1f} % of its parameters, as ONNX files. Its outputs are "
        f"{WORDS[report.output]}. {report.tool} compressed it (method `{report.method.method}`), checked every file against "
        "the model that it came from, and wrote this card from the report of that run."
    )
    headline, latency, notes = (SECTIONS[name].draw(report) for name in ("headline", "latency", "notes"))
    for caution in (*headline.cautions, *notes.cautions):
        yield f"\n> {inline(caution)}"
    yield from part_lines(headline)
    yield from ("", "## Files", "", *table_lines(_files(report, files)), "")
    yield (
        f"The input is `{PIXELS}`, float32 [batch, C, H, W] as `preprocessor_config.json` prepares it; the output is "
        f"`{files[0].output}`. These names are the only difference to the files of the run. `config.json` describes the dense "
        "model, as transformers has no words for widths that differ from block to block; `plan.json` has them."
    )
    yield from ("", "## Use", "")
    if about.address == ANY:
        yield from (f"Put the repository to which these files are pushed in place of {ANY}.", "")
    yield from (*_javascript(report, files, about), "", *_python(files, about))
    yield from part_lines(latency)
    yield from ("", "## Checks", "", *_checks(report))
    if notes.lines:
        yield from ("", "## Notes", "", *(f"- {inline(line)}" for line in notes.lines))
    versions = ", ".join(f"{name} {version}" for name, version in about.versions.items())
    yield from _recipe(report, about)
    yield f"The run's own recipe has the digest `{report.recipe_digest[:12]}`, its images `{report.data.digest[:12]}`."
    if versions:
        yield f"Written with {versions}."


def _recipe(report: Report, about: About) -> Iterator[str]:
    """What was carried out, or as much of it as is known."""
    if about.recipe is not None:
        yield from ("", "## How to make it again", "", "```toml", whole(about.recipe).strip(), "```", "")
        yield f"`slimvit run {RECIPE_FILE} --out runs/again` carries this recipe out; put your paths in place of {HOLE}."
    else:
        yield from ("", "## What is known of the recipe", "", "```toml")
        yield from (known(report, about.provenance).strip(), "```", "", UNKNOWN)


def _files(report: Report, files: Sequence[Shipped]) -> Table:
    judged, figures = counted([each.row for each in files])
    header = ("file", "dtype", "precision", "size", "of dense", *judged, "milliseconds")
    rows = tuple(
        (
            f"`{each.place.path}`",
            each.place.dtype or "–",
            each.row.precision,
            size(each.row.bytes),
            "–" if each.row.bytes is None else f"{100 * each.row.bytes / report.dense.bytes:.1f} %",
            *counts,
            ", ".join(f"{row.compressed_ms:.3f} ({row})" for row in report.bench if row.path == each.row.path) or "–",
        )
        for each, counts in zip(files, figures, strict=True)
    )
    return Table("Files", header, rows, text=(0, 1, 2, len(header) - 1)).without_blanks()


def _javascript(report: Report, files: Sequence[Shipped], about: About) -> Iterator[str]:
    dtype = next((each.place.dtype for each in files if each.place.dtype), "")
    if not dtype or report.output not in ("logits", "features", "tokens"):
        return
    pool = ", { pool: true }" if report.output == "features" else ""
    revision = f", revision: {json.dumps(about.revision)}" if about.revision else ""
    yield from (
        "```js",
        'import { pipeline } from "@huggingface/transformers";',
        f'const model = await pipeline("{_task(report)}", "{about.address}", {{ dtype: "{dtype}"{revision} }});',
        f'console.log(await model("picture.jpg"{pool}));',
        "```",
    )


def _python(files: Sequence[Shipped], about: About) -> Iterator[str]:
    revision = f", revision={json.dumps(about.revision)}" if about.revision else ""
    yield from (
        "```python",
        "import onnxruntime",
        "from huggingface_hub import hf_hub_download",
        "from PIL import Image",
        "from transformers import AutoImageProcessor",
        "",
        f'processor = AutoImageProcessor.from_pretrained("{about.address}"{revision})',
        *(
            f'hf_hub_download("{about.address}", "{path}"{revision})  # its weights, which lie beside it'
            for path in files[0].beside
        ),
        f'path = hf_hub_download("{about.address}", "{files[0].place.path}"{revision})',
        "session = onnxruntime.InferenceSession(path)",
        'pixels = processor(Image.open("picture.jpg"), return_tensors="np")["pixel_values"]',
        f'(outputs,) = session.run(["{files[0].output}"], {{"{PIXELS}": pixels}})',
        "```",
    )


def _checks(report: Report) -> Iterator[str]:
    run = [rung for rung in report.parity if rung.verdict != "not_run"]
    passed = sum(rung.verdict == "pass" for rung in run)
    yield (
        f"Each form of the model was compared with the form before it: {passed} of {len(run)} comparisons passed, from the masked "
        "model to the files."
    )
