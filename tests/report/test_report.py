"""report.json has what it promises, and Markdown, page and terminal say what it says and nothing else."""

from __future__ import annotations

import copy
import json
import math
import re
from html.parser import HTMLParser
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_up_reports import SUMMARY, a_report, rung, timed, typed

from toolchain.families.blocks import INSTEAD
from toolchain.files import sha256
from toolchain.pipeline.assemble import relative_error_increase
from toolchain.pipeline.run import run
from toolchain.pipeline.stages.compress import closed_form
from toolchain.recipe import Recipe
from toolchain.report.figures import LEFT, PLOT, WIDTH
from toolchain.report.files import render
from toolchain.report.markdown import to_markdown
from toolchain.report.page import to_html
from toolchain.report.record import BlockDamage, ClosedForm, Counts, Interval
from toolchain.report.sections import SECTIONS, parts
from toolchain.report.sections.latency import calls_figure, ratios_figure
from toolchain.report.sections.shares import damage_figure, shares_figure
from toolchain.report.tables import number, operations, percent, size

KEYS = {
    "": "schema tool synthetic model recipe_digest stages dense compressed ratio relative_error_increase "
    "finetune pruned_shares parity bench files",
    "model": "name kwargs checkpoint_sha256",
    "stages": "name params macs bytes accuracy wrong total seconds",
    "dense": "params macs bytes accuracy wrong total",
    "compressed": "params macs bytes accuracy wrong total",
    "ratio": "params macs bytes",
    "pruned_shares": "block kind total removed physical",
    "parity": "from to max_abs cosine_min top1_agreement tolerance verdict reason",
    "bench": "target precision batch threads dense_ms compressed_ms ratio verified_speedup_at_least verdict environment",
    "files": "path bytes sha256",
}


def section(record, name):
    return SECTIONS[name].draw(typed(record))


def notes(report):
    return [line for name in ("notes", "suggestion") for line in SECTIONS[name].draw(report).lines]


def cautions(report):
    return [caution for part in parts(report) for caution in part.cautions]


def tables(report):
    return [part.table for part in parts(report) if part.table and part.table.rows]


@pytest.fixture
def report():
    """A report with one of everything, as the JSON object that it is written as."""
    return a_report().to_dict()


def without_labels(report):
    changed = copy.deepcopy(report)
    for row in (changed["dense"], changed["compressed"], *changed["stages"]):
        row.update(accuracy=None, wrong=None, total=None)
    changed.update(relative_error_increase=None, relative_error_increase_reason="the data has no labels")
    return changed


# report.json


@pytest.fixture(scope="module")
def synthetic_run(tmp_path_factory):
    """The report of a run without images, and its folder."""
    root = tmp_path_factory.mktemp("synthetic")
    kwargs = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7, "qk_norm": True}
    recipe = {
        "model": {"name": "vit_tiny_patch16_224", "kwargs": kwargs, "pretrained": False},
        "data": {"source": "none"},
        "compress": {"method": "hybrid"},
        "budget": {"params": 0.6},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLIMVIT_CACHE_DIR", str(root / "cache"))
        return run(Recipe.from_dict(recipe), root / "run").to_dict(), root / "run"


@pytest.mark.parametrize("part", KEYS)
def test_every_promised_key_is_there(synthetic_run, report, part):
    real, _ = synthetic_run
    for found in (real, report):
        value = found[part] if part else found
        rows = value if isinstance(value, list) else [value]
        assert rows or (part == "bench" and found is real)
        for row in rows:
            assert set(KEYS[part].split()) <= set(row)


def test_the_file_is_what_run_returns(synthetic_run):
    found, folder = synthetic_run
    assert json.loads((folder / "report.json").read_text()) == json.loads(json.dumps(found))
    assert (folder / "report.md").read_text() == to_markdown(typed(found))
    assert (folder / "report.html").read_text() == to_html(typed(found))


def test_synthetic_claims_no_accuracy(synthetic_run):
    found, _ = synthetic_run
    assert found["synthetic"] is True
    assert found["relative_error_increase"] is None
    assert found["relative_error_increase_reason"] == "the data has no labels"
    for row in (*found["stages"], found["dense"], found["compressed"]):
        assert row["accuracy"] is row["wrong"] is row["total"] is None
    assert "accuracy" not in {row[0] for row in section(found, "headline").table.rows}
    assert any("Synthetic" in caution for caution in cautions(typed(found)))
    assert all(rung["top1_agreement"] is None for rung in found["parity"])


def test_what_was_left_out_is_told(synthetic_run, report):
    found, _ = synthetic_run
    told = [note for note in notes(typed(found)) if "Restriction of this model" in note]
    assert found["restrictions"] == [
        "head dims are left alone because of a norm over the head dim of q and k" + INSTEAD
    ]
    assert len(told) == 1
    assert told[0] in to_markdown(typed(found))
    assert not any("Restriction of this model" in note for note in notes(typed(report)))


def test_notes_on_weights_and_images_stand_in_every_form_of_the_report(synthetic_run):
    found, _ = synthetic_run
    assert found["notes"] == []
    noted = {**found, "notes": ["The position embeddings were resampled from 2×2 to 4×4."]}
    assert notes(typed(noted))[0] == noted["notes"][0]
    for text in (to_markdown(typed(noted)), to_html(typed(noted))):
        assert noted["notes"][0] in text


def test_what_was_written_is_compared_with_what_is_read_back(synthetic_run):
    found, _ = synthetic_run
    ladder = [(rung["from"], rung["to"]) for rung in found["parity"]]
    assert {("dense", "reloaded"), ("masked", "reloaded"), ("split", "deploy")} <= set(ladder)
    assert len(set(ladder)) == len(ladder)
    assert {rung["verdict"] for rung in found["parity"]} == {"pass"}


def test_pages_are_written_only_if_they_say_something_else(report, tmp_path):
    pages = [tmp_path / "report.md", tmp_path / "report.html"]
    render(typed(report), tmp_path)
    before = [page.stat().st_ino for page in pages]
    render(typed(report), tmp_path)
    assert [page.stat().st_ino for page in pages] == before
    pages[0].write_bytes(b"\xff")
    render(typed(report), tmp_path)
    assert pages[0].read_text(encoding="utf-8") == to_markdown(typed(report))
    assert pages[1].stat().st_ino == before[1]


def test_files_are_listed_with_their_digests(synthetic_run):
    found, folder = synthetic_run
    assert {"plan.json", "deploy/model.safetensors", "onnx/compressed.fp32.onnx"} <= {f["path"] for f in found["files"]}
    for file in found["files"]:
        path = folder / file["path"]
        assert (path.stat().st_size, sha256(path)) == (file["bytes"], file["sha256"])


def test_ratios_follow_from_the_counts(synthetic_run):
    found, _ = synthetic_run
    for name, ratio in found["ratio"].items():
        assert ratio == found["compressed"][name] / found["dense"][name]
    assert found["ratio"]["params"] <= 0.6


# The relative error increase


def counts(wrong, total):
    return Counts(wrong=wrong, total=total, accuracy=None if total is None else 1 - wrong / total)


@given(st.integers(1, 500), st.integers(0, 500), st.integers(500, 10_000))
def test_relative_error_increase_is_that_of_the_accuracies(dense, small, total):
    found, reason = relative_error_increase(counts(dense, total), counts(small, total))
    assert reason is None
    expected = (1 - (1 - small / total)) / (1 - (1 - dense / total)) - 1
    assert found == pytest.approx(expected, rel=1e-6, abs=1e-6)
    assert (found > 0) == (small > dense)


@pytest.mark.parametrize(
    ("dense", "small", "words"),
    [
        (counts(None, None), counts(None, None), "no labels"),
        (counts(0, 359), counts(3, 359), "no error on 359"),
        (counts(0, 359), counts(0, 359), "no error on 359"),
    ],
)
def test_no_relative_error_increase_has_a_reason(dense, small, words):
    found, reason = relative_error_increase(dense, small)
    assert found is None
    assert words in reason


# Notes


LEARNED = {"data": {"source": "digits", "digest": "d"}, "loss": "distillation"}
COUNTED = {**LEARNED, "judged_by": "errors", "images": 5000, "before": 1203, "after": 998, "kept": "after"}
COUNTED_TOLD = "Fine-tuning: 1,203 of 5,000 validation images wrong before, 998 after; the model after it was kept."
DIVERGED = {**LEARNED, "judged_by": "divergence", "images": 162, "before": 0.01234, "after": 0.0567, "kept": "before"}
DIVERGED_TOLD = (
    "Fine-tuning: without labels, KL divergence from the dense model 0.0123 before, 0.0567 after "
    "(162 validation images); the model before it was kept."
)


@pytest.mark.parametrize(
    ("finetune", "told"),
    [
        (COUNTED, [COUNTED_TOLD]),
        (DIVERGED, [DIVERGED_TOLD]),
        ({**DIVERGED, "after": None}, [DIVERGED_TOLD.replace("0.0567", "not a number")]),
        (None, []),
    ],
)
def test_what_fine_tuning_did_is_told(report, finetune, told):
    changed = {**report, "finetune": finetune}
    assert [note for note in notes(typed(changed)) if "Fine-tuning" in note] == told
    assert to_markdown(typed(changed)).count("Fine-tuning") == to_html(typed(changed)).count("Fine-tuning") == len(told)
    assert all(line in to_markdown(typed(changed)) and line in to_html(typed(changed)) for line in told)


def test_the_closed_form_is_told(report):
    plan = {
        "beta": 0.5,
        "head_refitted": True,
        "kl": {"0.5": 0.25, "0.5 head": 0.01234, "0.0": 0.5, "0.0 head": 0.75},
        "dampings": {"blocks.0.mlp.fc2": 0.03},
    }
    facts = closed_form(plan)
    assert facts == ClosedForm(beta=0.5, head_refitted=True, kl=0.01234)
    assert closed_form({**plan, "head_refitted": False}).kl == 0.25
    told = (
        "Closed form: β = 0.5, the classifier re-fitted; KL divergence from the dense model, before any training, "
        "0.0123 nats per validation image."
    )
    found = {**report, "closed_form": facts.model_dump()}
    assert told in notes(typed(found))
    for page in (to_markdown(typed(found)), to_html(typed(found))):
        assert page.index("of the time") < page.index(told) < page.index("blocks.10"), "after the headline"
    (line,) = notes(typed({**report, "closed_form": {**facts.model_dump(), "head_refitted": False}}))
    assert "the classifier left as it was" in line


@pytest.mark.parametrize("broken", [None, math.inf, math.nan])
def test_a_closed_form_that_broke_the_model_is_told_in_valid_json(report, broken):
    facts = closed_form({"beta": 0.0, "head_refitted": False, "kl": {"0.0": broken}, "dampings": {}})
    assert facts.kl is None
    assert "not a number" in " ".join(notes(typed({**report, "closed_form": facts.model_dump()})))


def test_methods_without_a_closed_form_tell_of_none(report):
    assert closed_form({}) is None
    assert notes(typed({**report, "closed_form": None})) == notes(typed(report)) == []


def test_a_missed_latency_budget_comes_before_the_numbers(report):
    row = {"target": "ort-cpu", "batch": 1, "threads": 1, "dense_ms": 2.0, "requested": 0.5, "measured": 0.6}
    row |= {"reachable": [0.2, 1.0], "predicted": 0.5, "correction": 1.0}
    told = "The latency budget on ort-cpu is missed: 0.500 of the dense model's time was asked for, 0.600 was measured"
    missed = {**report, "latency_budget": [{**row, "met": False}]}
    assert cautions(typed(missed))[0].startswith(told)
    for page in (to_markdown(typed(missed)), to_html(typed(missed)).replace("&#39;", "'")):
        assert page.index(told) < page.index("Dense against compressed")
    for others in ({"met": True}, {"met": None}):
        assert cautions(typed({**report, "latency_budget": [{**row, **others}]})) == []


# Markdown


def cells(text):
    """Heading → the rows of its table, as lists of cells, header first."""
    found, heading = {}, ""
    for line in text.splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("|") and not line.startswith("|---"):
            found.setdefault(heading, []).append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
    return found


def test_markdown_numbers_are_those_of_the_report(report):
    found = cells(to_markdown(typed(report)))
    rows = {row[0]: row[1:] for row in found["Dense against compressed"]}
    assert rows["parameters"] == ["1,194,122", "596,738", "0.500 left"]
    assert rows["MACs per image"] == ["20,300,074", "10,144,546", "0.506 left"]
    assert rows["test accuracy"] == ["96.10 %", "94.99 %", ""]
    assert rows["wrong of 359"] == ["14", "18", "+28.6 % errors"]
    assert rows["ort-cpu, batch 1, 1 thread"] == ["0.610 ms", "0.401 ms", "0.661 of the time"]
    assert [row[0] for row in found["Stages"][1:]] == ["dense", "onnx"]
    for row, stage_ in zip(found["Stages"][1:], report["stages"], strict=True):
        assert int(row[1].replace(",", "")) == stage_["params"]
        assert float(row[4].removesuffix(" %")) == pytest.approx(100 * stage_["accuracy"], abs=0.005)
        assert int(row[5]) == stage_["wrong"]
    assert found["Latency"][1] == ["ort-cpu, batch 1, 1 thread", SUMMARY]
    assert found["Parity"][1:][2] == ["a.onnx == a.engine", "not_run", "–", "no GPU"]


def test_markdown_follows_the_report(report):
    """No number is written down anywhere but in report.json: change it, and the page changes."""
    for path, value, shown in [
        (("compressed", "params"), 777_777, "777,777"),
        (("compressed", "wrong"), 31, "| 31 |"),
        (("ratio", "params"), 0.123, "0.123"),
        (("relative_error_increase",), 2.5, "+250.0 %"),
        (("bench", 0, "dense_ms"), 9.876, "9.876 ms"),
        (("bench", 0, "summary"), "regressed: slow", "regressed: slow"),
        (("parity", 0, "max_abs"), 4.2e-3, "4.2e-03"),
        (("engines", 0, "bytes"), 1_230_000, "1.23 MB"),
    ]:
        changed = copy.deepcopy(report)
        node = changed
        for part in path[:-1]:
            node = node[part]
        node[path[-1]] = value
        assert shown not in to_markdown(typed(report)), path
        assert shown in to_markdown(typed(changed)), path
        assert to_html(typed(changed)) != to_html(typed(report)), path


def test_every_markdown_table_is_rectangular(report):
    report["parity"][2]["reason"] = "a | b"
    for rows in cells(to_markdown(typed(report))).values():
        assert len({len(row) for row in rows}) == 1


def test_shares_per_block(report):
    rows = {
        row[0]: row[1:]
        for row in next(rows for head, rows in cells(to_markdown(typed(report))).items() if "share" in head)
    }
    assert rows["block"] == ["mlp_hidden", "attn_in°"], "° marks what is only zeroed"
    assert list(rows) == ["block", "blocks.9", "blocks.10", "all"], "9 comes before 10"
    assert rows["blocks.9"] == ["3.1 %", "–"]
    assert rows["blocks.10"] == ["12.5 %", "12.5 %"]
    assert rows["all"] == ["7.8 %", "12.5 %"]


def test_modules_of_one_kind_in_a_block_share_a_cell_and_a_bar(report):
    """A block of timm's with several MLPs side by side has a row for each."""
    row = {"block": "blocks.9", "kind": "mlp_hidden", "total": 512, "removed": 112, "physical": True}
    report["pruned_shares"].append(row)
    changed = typed(report)
    rows = next(rows for head, rows in cells(to_markdown(changed)).items() if "share" in head)
    assert {row[0]: row[1] for row in rows[1:]} == {"blocks.9": "12.5 %", "blocks.10": "12.5 %", "all": "12.5 %"}
    (drawing,) = shares_figure(changed.pruned_shares)
    assert [(bar.label, bar.value) for bar in drawing.bars] == [
        ("blocks.9", "12.5 %"),
        ("blocks.10", "12.5 %"),
        ("", "12.5 %"),
    ]


def test_without_labels_there_is_a_reason_and_no_number(report):
    changed = without_labels(report)
    text = to_markdown(typed(changed))
    assert "the data has no labels" in text
    assert "errors" not in text
    assert "wrong of" not in text
    assert "96.10" not in text
    assert "no labels" in to_html(typed(changed))


def test_empty_parts_are_left_out(report):
    report.update(bench=[], files=[], pruned_shares=[], damage=[], parity=[], graphs={}, engines=[])
    assert [table.title for table in tables(typed(report))] == ["Dense against compressed", "Stages"]
    page = to_html(typed(report))
    assert "<svg" not in page
    assert "Measured" not in page


# Short forms


def test_parity_in_short_names_what_did_not_hold(report):
    assert list(section(report, "parity").brief) == [
        "2 of 3 rungs hold, max |Δ| 1.9e-06",
        "not run: a.onnx == a.engine (no GPU)",
    ]
    report["parity"][0] = rung("masked", "sliced", 0.5, "fail", "max |Δ| 0.5 > 1e-05").to_dict()
    short = list(section(report, "parity").brief)
    assert short[0] == "1 of 3 rungs hold, max |Δ| 0.0e+00"
    assert short[1] == "fail: masked == sliced (max |Δ| 0.5 > 1e-05)"


def test_engines_in_short(report):
    assert list(section(report, "engines").brief) == ["engines/trt-rtx/a.engine, 6.48 MB"]


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (number(1_234_567), "1,234,567"),
        (number(0), "0"),
        (number(None), "–"),
        (size(999_999), "1,000.0 kB"),
        (size(12_000_000), "12.00 MB"),
        (size(None), "–"),
        (operations(20_507_392), "20.51 M"),
        (operations(4_608_338_432), "4.61 G"),
        (operations(None), "–"),
        (percent(0.9), "90.00 %"),
        (percent(None), "–"),
    ],
)
def test_units(shown, expected):
    assert shown == expected


# The page


class Page(HTMLParser):
    """Tags must close in order; what the page refers to is kept."""

    EMPTY = frozenset({"meta", "line", "rect", "br"})

    def __init__(self, text):
        super().__init__()
        self.open, self.text, self.tags, self.attributes = [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.EMPTY or tag == "rect":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data.strip())


def test_page_is_well_formed_and_complete(report):
    page = Page(to_html(typed(report)))
    for table in tables(typed(report)):
        assert table.title in page.text
        for row in table.rows:
            for cell in row:
                assert cell in page.text
    assert page.tags.count("svg") == 4
    assert SUMMARY in " ".join(page.text)


def test_page_requests_nothing_and_runs_nothing(report):
    text = to_html(typed(report))
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not {"src", "href", "onload", "style"} & {name for name, _ in page.attributes}
    assert not re.search(r"https?:|//|url\(|@import", text)
    assert "prefers-color-scheme: dark" in text


def test_page_escapes_what_it_did_not_write(report):
    evil = "<script>alert(1)</script>&"
    report["model"]["name"] = report["data"]["source"] = report["parity"][2]["reason"] = evil
    report["pruned_shares"][0]["block"] = 'blocks.10"><b>'
    text = to_html(typed(report))
    assert "<script" not in text
    assert "<b>" not in text
    assert evil in Page(text).text


def test_markdown_holds_no_tag_link_or_line_that_it_did_not_write(report):
    evil = "a\n\n# <img src=x> ![b](https://c)"
    report["model"]["name"] = report["data"]["source"] = report["requested_method"] = evil
    report["notes"] = report["restrictions"] = [evil]
    report["parity"][2]["reason"] = evil
    text = to_markdown(typed(report))
    assert text.count("a # &lt;img src=x> ![b]\\(https://c)") == 6
    assert not re.search(r"<|\]\(|^# &lt;", text, re.MULTILINE)


def drawings(text):
    return [ET.fromstring(found) for found in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


def test_bars_are_as_long_as_the_shares(report):
    *_, drawing, _ = drawings(to_html(typed(report)))
    widths = [float(rect.get("width")) for rect in drawing.iter("rect")]
    assert widths == pytest.approx([16 / 512 * PLOT, 64 / 512 * PLOT, 64 / 512 * PLOT], abs=0.01)
    labels = [text.text for text in drawing.iter("text") if text.get("text-anchor") == "end" and text.text]
    assert labels == ["blocks.9", "blocks.10"]
    assert len({rect.get("class") for rect in drawing.iter("rect")}) == 2, "kinds are told apart"


def test_interval_is_drawn_where_it_lies(report):
    drawing, *_ = drawings(to_html(typed(report)))
    (rect,) = drawing.iter("rect")
    ticks = {text.text: float(text.get("x")) for text in drawing.iter("text") if text.get("text-anchor") == "middle"}
    (mark,) = [float(line.get("x1")) for line in drawing.iter("line") if line.get("class") == "mark"]
    low, high = float(rect.get("x")), float(rect.get("x")) + float(rect.get("width"))
    scale = (ticks["1"] - ticks["0.6"]) / 0.4
    for x, ratio in ((low, 0.652), (mark, 0.661), (high, 0.668)):
        assert x == pytest.approx(ticks["0.6"] + scale * (ratio - 0.6), abs=0.05)


@given(st.lists(st.tuples(st.floats(0.05, 5), st.floats(0, 0.5), st.floats(0, 0.5)), min_size=1, max_size=4))
def test_every_interval_stays_in_the_drawing(cells_):
    rows = [timed("fp32", p, ratio=Interval(point=p, lo=p * (1 - a), hi=p * (1 + b))) for p, a, b in cells_]
    (drawing,) = ratios_figure(rows)
    for bar in drawing.bars:
        assert -1e-6 <= bar.start <= bar.mark + 1e-6 <= bar.end + 2e-6 <= PLOT + 3e-6
    assert all(LEFT + x <= WIDTH for x, _ in drawing.ticks)
    assert drawing.height > max(bar.y for bar in drawing.bars)


def test_nothing_to_draw():
    assert shares_figure([]) == ()
    assert ratios_figure([]) == ()


def test_nodes_are_counted_before_and_after(report):
    (found,) = (table for table in tables(typed(report)) if table.title == "Nodes")
    assert found.header == ("operator", "dense, exported", "dense", "int8-qdq")
    assert found.rows == (
        ("MatMul", "8", "8", "8"),
        ("QuantizeLinear", "0", "0", "9"),
        ("Reshape", "5", "0", "0"),
        ("all", "13", "8", "17"),
    )


def test_single_calls_are_drawn_in_medians_of_their_baseline():
    rows = [timed("fp32", 0.5), timed("int8-dynamic", 0.25), timed("fp16", 0.9, calls=None)]
    (drawing,) = calls_figure(rows)
    dense, half, _, quarter = drawing.bars
    assert (half.mark / dense.mark, quarter.mark / dense.mark) == pytest.approx((0.5, 0.25))
    assert all(bar.start < bar.core[0] < bar.mark < bar.core[1] < bar.end <= PLOT for bar in drawing.bars)
    assert [bar.value for bar in drawing.bars[:2]] == ["0.61 ms", "0.305 ms"]
    assert calls_figure([timed("fp32", 0.5, calls=None)]) == ()


def test_what_a_width_does_is_drawn_beside_its_block():
    (drawing,) = damage_figure(a_report().damage)
    assert [(bar.label, bar.value) for bar in drawing.bars] == [
        ("blocks.9", "0.002"),
        ("blocks.10", "0.004"),
        ("", "0.004"),
    ]
    assert [bar.end for bar in drawing.bars] == pytest.approx([PLOT / 2, PLOT, PLOT])
    assert damage_figure([]) == ()
    assert damage_figure([BlockDamage(block="blocks.0", kind="mlp_hidden", nats=0.0)]) == ()
