"""What a run takes from before, and what it does again."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import timm
from measuring import Updated
from onnx import numpy_helper
from PIL import Image
from safetensors.torch import save_file

from toolchain.artifacts.onnx_file import OnnxFile
from toolchain.cost import LatencyTable, Widths
from toolchain.errors import DeviceLost, ParityError, RecipeError, TargetUnavailable, WorkloadRefused
from toolchain.export.pixels import takes_pixels
from toolchain.export.precision import PRECISIONS
from toolchain.files import read_json, sha256
from toolchain.measure.compare import compare
from toolchain.measure.comparison import Comparison
from toolchain.measure.samples import Design
from toolchain.pipeline.preview import preview
from toolchain.pipeline.run import run
from toolchain.plan import CompressionPlan
from toolchain.progress import Nobody, Progress
from toolchain.recipe import Recipe
from toolchain.report.record import Report
from toolchain.report.sections import SECTIONS
from toolchain.targets import TARGETS, EngineBuild, Target, TargetInfo, TargetProfile
from toolchain.targets.ort import OrtCpu

MODEL = {
    "name": "vit_tiny_patch16_224",
    "kwargs": {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10}
    | {"embed_dim": 32, "depth": 2, "num_heads": 2},
    "pretrained": False,
}
TRAINED = {
    "model": MODEL,
    "data": {"source": "digits"},
    "train": {"epochs": 1},
    "compress": {"method": "hybrid", "neurons": "variance"},
    "budget": {"params": 0.5},
    "finetune": {"epochs": 1},
}
QUICK = {"method": "hybrid", "attention": "none", "neurons": "magnitude", "allocation": "uniform"}
"""Where the weights do not matter."""
TIMED = {
    "model": MODEL,
    "data": {"source": "none"},
    "compress": QUICK,
    "budget": {"params": 0.6},
    "bench": {"targets": ["ort-cpu"]},
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMVIT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Trainings(Nobody):
    """Who counts the stages that train."""

    def __init__(self):
        self.stages, self._now = [], ""

    def stage(self, name):
        self._now = name

    def at(self, share, text):
        if text.startswith("epoch") and self.stages[-1:] != [self._now]:
            self.stages.append(self._now)


@pytest.mark.slow
def test_the_baseline_is_shared_unless_everything_is_to_be_done_anew(tmp_path, cache):
    first, second, third = Trainings(), Trainings(), Trainings()
    report = run(Recipe.from_dict(TRAINED), tmp_path / "a", progress=Progress(first))
    assert first.stages == ["dense", "finetune"]
    (entry,) = (cache / "dense").glob("[!.]*")
    tuned = report.finetune
    assert (tuned.loss, tuned.judged_by, tuned.images, tuned.kept) == ("distillation", "errors", 180, "after")
    assert 0 <= tuned.after <= tuned.before <= 180
    told = f"Fine-tuning: {tuned.before} of 180 validation images wrong before, {tuned.after} after; the model after"
    assert told in (tmp_path / "a" / "report.md").read_text()
    plan = CompressionPlan.load(tmp_path / "a" / "plan.json")
    found = read_json(tmp_path / "a" / "allocation.json")
    assert Widths.of(plan).kept.items() <= {(r["module"], r["unit"]): r["kept"] for r in found["widths"]}.items()
    assert found["predicted"]["params"] == report.compressed.params
    assert found["predicted"]["macs"] == report.compressed.macs
    assert found["planned"]["widths"] != found["widths"]

    slower = Recipe.from_dict({**TRAINED, "finetune": {"epochs": 1, "lr": 1e-5}})
    run(slower, tmp_path / "b", progress=Progress(second))
    assert second.stages == ["finetune"], "another folder, the same baseline"
    for file in ("model.safetensors", "model.json"):
        assert (tmp_path / "a" / "dense" / file).read_bytes() == (tmp_path / "b" / "dense" / file).read_bytes()

    (entry / "model.json").write_text(json.dumps({"stale": True}))
    run(slower, tmp_path / "b", resume=False, progress=Progress(third))
    assert third.stages == ["dense", "finetune"]
    assert "stale" not in read_json(entry / "model.json"), "the entry is replaced"


@pytest.mark.slow
def test_pictures_that_are_others_than_before_are_told(tmp_path, caplog):
    rng, folder = np.random.default_rng(0), tmp_path / "pictures"
    folder.mkdir()
    for index in range(24):
        Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    kwargs = {**MODEL["kwargs"], "in_chans": 3}
    save_file(timm.create_model(MODEL["name"], **kwargs).state_dict(), weights := tmp_path / "dense.safetensors")
    raw = {
        "model": {**MODEL, "kwargs": kwargs, "checkpoint": str(weights)},
        "data": {"source": f"images:{folder}"},
    }
    recipe = Recipe.from_dict({**raw, "compress": QUICK, "budget": {"params": 0.6}})
    run(recipe, tmp_path / "run")
    run(Recipe.from_dict({**recipe.tables(), "data": {**raw["data"], "mean": [0.3]}}), tmp_path / "run")
    assert "The pictures are not those" not in caplog.text, "they are, and are prepared otherwise"
    Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(folder / "0.png")
    run(recipe, tmp_path / "run")
    assert f"The pictures are not those of the run in {tmp_path / 'run'}" in caplog.text


@pytest.mark.slow
def test_a_cell_is_measured_again_until_it_says_something(tmp_path, stopwatch):
    def measured(threads=1):
        before = len(stopwatch.asked)
        asked = {**TIMED, "bench": {"targets": ["ort-cpu"], "threads": [threads]}}
        run(Recipe.from_dict(asked), tmp_path / "run", compare=stopwatch)
        return len(stopwatch.asked) - before

    stopwatch.noise = 0.5
    assert measured() == 1
    assert measured() == 1
    stopwatch.noise = 0.002
    assert measured() == 1
    assert measured() == 0
    assert set(stopwatch.asked) == {(1, "pass")}
    assert (tmp_path / "run" / "bench" / "ort-cpu.fp32.b1.t1.json").is_file()


def test_another_runtime_is_another_measurement(tmp_path, stopwatch, register):
    recipe = Recipe.from_dict(TIMED)
    run(recipe, tmp_path / "run", compare=stopwatch)
    register(TARGETS, Updated())
    run(recipe, tmp_path / "run", compare=stopwatch)
    assert len(stopwatch.asked) == 2


def test_a_run_goes_on_without_a_device_that_drops_off(tmp_path, stopwatch):
    recipe = Recipe.from_dict({**TIMED, "bench": {"targets": ["ort-cpu"], "batch": [1, 2, 3]}})
    stopwatch.lost = 2
    with pytest.raises(DeviceLost, match="the connection failed"):
        run(recipe, tmp_path / "run", compare=stopwatch)
    assert [batch for batch, _ in stopwatch.asked] == [1, 2], "nothing more is asked of it"
    report = Report.load(tmp_path / "run")
    assert [row.batch for row in report.bench] == [1]
    (missing,) = report.not_measured
    assert (missing.target, missing.short) == ("ort-cpu", "the device was lost")
    assert missing.files == ("onnx/dense.fp32.onnx", "onnx/compressed.fp32.onnx"), "at the larger batches"
    assert str(missing) in (tmp_path / "run" / "report.md").read_text()
    stopwatch.lost = None
    report = run(recipe, tmp_path / "run", compare=stopwatch)
    assert [batch for batch, _ in stopwatch.asked] == [1, 2, 2, 3], "what was measured is kept"
    assert ([row.batch for row in report.bench], report.not_measured) == ([1, 2, 3], ())


def test_a_workload_that_a_device_refuses_costs_its_own_comparison_alone(tmp_path, stopwatch):
    """Kind: `threads = [8, 1]` on a board of four cores, of which one thread is measured all the same."""
    recipe = Recipe.from_dict({**TIMED, "bench": {"targets": ["ort-cpu"], "batch": [1, 2], "threads": [8, 1]}})
    stopwatch.refused = 8
    with pytest.raises(WorkloadRefused, match="'ort-cpu' cannot do this: 8 threads"):
        run(recipe, tmp_path / "run", compare=stopwatch)
    report = Report.load(tmp_path / "run")
    assert [(row.batch, row.threads) for row in report.bench] == [(1, 1), (2, 1)]
    (missing,) = report.not_measured
    assert (missing.target, missing.short) == ("ort-cpu", "the device cannot do it")
    assert "8 threads are more than there are cores" in missing.reason
    assert missing.files == ("onnx/dense.fp32.onnx", "onnx/compressed.fp32.onnx")


@pytest.mark.slow
def test_no_targets_mean_that_nothing_is_built_or_measured(tmp_path):
    report = run(Recipe.from_dict({**TIMED, "engine": {"targets": []}, "bench": {"targets": []}}), tmp_path / "run")
    assert (report.engines, report.bench, report.suggestion.fastest) == ((), (), ())


def test_the_fastest_file_on_a_device_is_the_one_that_was_timed_there(tmp_path, stopwatch, monkeypatch):
    """Kind: a device of targets.toml whose runtime takes model folders. Its name says nothing of what it runs."""
    (tmp_path / "targets.toml").write_text('[workstation]\ntransport = "local"\nruntime = "eager"\n')
    monkeypatch.chdir(tmp_path)
    recipe = Recipe.from_dict({**TIMED, "bench": {"targets": ["workstation", "ort-cpu"]}})
    report = run(recipe, tmp_path / "run", compare=stopwatch)
    assert [(row.target, row.path) for row in report.suggestion.fastest] == [
        ("workstation", "deploy"),
        ("ort-cpu", "onnx/compressed.fp32.onnx"),
    ]
    assert Comparison.load(tmp_path / "run" / "bench" / "workstation.fp32.b1.t1.json").artifacts["B"].name == "deploy"


briefly = partial(compare, design=Design(sessions=2, blocks=4, looks=1, slot_ms=2.0, warmup_s=0.01))


def test_threads_of_a_gpu_are_refused_before_any_work(tmp_path):
    recipe = Recipe.from_dict({**TIMED, "bench": {"targets": ["ort-cuda+graph"], "threads": [1, 2]}})
    with pytest.raises(RecipeError, match="threads mean nothing"):
        run(recipe, tmp_path / "run")


def test_a_recipe_may_name_targets_of_targets_toml(tmp_path, monkeypatch):
    (tmp_path / "targets.toml").write_text(
        '[pinned]\ntransport = "local"\naffinity = [0]\n[away]\ntransport = "bundle"\n'
    )
    monkeypatch.chdir(tmp_path)
    pinned = Recipe.from_dict({**TIMED, "bench": {"targets": ["pinned"]}})
    (row,) = run(pinned, tmp_path / "run", compare=briefly).bench
    assert (row.target, row.environment["affinity"]) == ("pinned", [0])
    found = Comparison.load(tmp_path / "run" / "bench" / "pinned.fp32.b1.t1.json")
    assert (found.scenario.target, found.scenario.affinity) == ("ort-cpu", (0,))
    with pytest.raises(TargetUnavailable, match="bench pack"):
        run(Recipe.from_dict({**TIMED, "bench": {"targets": ["away"]}}), tmp_path / "other")
    built = {**TIMED, "engine": {"targets": ["pinned"]}}
    with pytest.raises(TargetUnavailable, match=r"engine\.targets takes built-in targets"):
        run(Recipe.from_dict(built), tmp_path / "other")


PRECISE = {**TIMED, "export": {"precisions": ["fp32", "fp16", "int8", "int4"]}}


@pytest.mark.slow
def test_a_recipe_makes_and_times_files_of_several_precisions(tmp_path, stopwatch):
    report = run(Recipe.from_dict(PRECISE), tmp_path / "run", compare=stopwatch).to_dict()
    made = ["fp32", "fp16", "int8-dynamic", "int8-qdq", "int4"]
    rows = {row["precision"]: row for row in report["artifacts"] if row["model"] == "compressed"}
    assert list(rows) == made
    for row in rows.values():
        path = tmp_path / "run" / row["path"]
        assert row["bytes"] == path.stat().st_size > row["download_bytes"] > 0
    assert {row["from"] for row in report["parity"]} >= {"compressed.fp32.onnx", "fp32 weights", "observed ranges"}
    assert {row["verdict"] for row in report["parity"]} == {"pass"}
    assert [row["precision"] for row in report["bench"]] == made
    (choice,) = report["int8"]
    duel = Comparison.load(tmp_path / "run" / "bench" / "ort-cpu.int8.b1.t1.json")
    assert duel.artifacts["A"].sha256 == sha256(tmp_path / "run" / rows["int8-dynamic"]["path"])
    assert duel.artifacts["B"].sha256 == sha256(tmp_path / "run" / rows["int8-qdq"]["path"])
    assert choice["ratio"]["point"] == pytest.approx(math.exp(duel.ratio.point))
    assert choice["chosen"] in (None, "int8-dynamic", "int8-qdq")
    assert {Comparison.load(path).parity for path in (tmp_path / "run" / "bench").iterdir()} == {"pass"}
    small = min(rows.values(), key=lambda row: row["bytes"])
    assert report["suggestion"]["smallest"] == small["path"]
    text = (tmp_path / "run" / "report.md").read_text()
    assert "Of all compressed files, as accuracy is not known:" in text
    assert f"Smallest: {small['path']}." in text
    assert "Where the bytes are" in text

    # Another run does only what is new.
    fewer = {**PRECISE, "export": {"precisions": ["fp16"]}}
    again = run(Recipe.from_dict(fewer), tmp_path / "run", compare=stopwatch).to_dict()
    assert [row["precision"] for row in again["bench"]] == ["fp16"]
    assert sorted(path.name for path in (tmp_path / "run" / "onnx").iterdir()) == [
        "compressed.fp16.onnx",
        "compressed.fp32.onnx",
        "dense.fp32.onnx",
    ]


class Elsewhere(OrtCpu):
    """A runtime of its own, that runs ONNX files as they are and may err."""

    name = "elsewhere"

    def __init__(self, error=0.0):
        self.error = error

    def _open(self, path, threads):
        runner, error = super()._open(path, threads), self.error
        infer = runner.infer
        runner.infer = lambda feeds: {name: values + error for name, values in infer(feeds).items()}
        return runner


@pytest.mark.slow
def test_files_that_another_runtime_is_timed_on_are_held_against_themselves_there(tmp_path, stopwatch, register):
    register(TARGETS, Elsewhere())
    recipe = Recipe.from_dict({**TIMED, "bench": {"targets": ["ort-cpu", "elsewhere"]}})
    report = run(recipe, tmp_path / "run", compare=stopwatch)
    there = {rung.to: rung for rung in report.parity if rung.to.endswith(" on elsewhere")}
    assert list(there) == ["dense.fp32.onnx on elsewhere", "compressed.fp32.onnx on elsewhere"]
    assert {rung.verdict for rung in there.values()} == {"pass"}
    assert [verdict for _, verdict in stopwatch.asked] == ["pass", "pass"]
    (quickest,) = report.suggestion.quickest
    assert quickest.path == "onnx/compressed.fp32.onnx"
    register(TARGETS, Elsewhere(error=1e-3))
    with pytest.raises(ParityError, match=r"dense\.fp32\.onnx on elsewhere must be the same model"):
        run(recipe, tmp_path / "other", compare=stopwatch)


FACTS = {"loaded": "not_run", "loaded_reason": "no phone", "matmul_dtypes": {"FLOAT": 1}}


class Afar(Target):
    """A target whose engines are copies that run elsewhere."""

    name, takes, measures, profile, builds = "afar", ("file",), False, TargetProfile(), ("FLOAT",)

    def probe(self):
        return TargetInfo(self.name, "copy", "1", "none", {"run": "no: needs a phone: none is at hand"})

    def _build(self, onnx, folder, options):
        path = folder / "model.afar"
        path.write_bytes(onnx.read_bytes())
        return EngineBuild(path, FACTS)

    def _open(self, path, threads):
        raise NotImplementedError


def test_every_file_has_a_time_or_the_reason_why_not_on_every_runtime(tmp_path, stopwatch, register):
    elsewhere = Elsewhere()
    elsewhere.loads = ("FLOAT",)
    for target in (elsewhere, Afar()):
        register(TARGETS, target)
    asked = {"export": {"precisions": ["fp32", "fp16"]}, "engine": {"targets": ["afar"]}}
    recipe = Recipe.from_dict({**TIMED, **asked, "bench": {"targets": ["ort-cpu", "elsewhere"]}})
    report = run(recipe, tmp_path / "run", compare=stopwatch)
    assert [(row.target, row.short, row.reason, row.files) for row in report.not_measured] == [
        ("elsewhere", "takes no fp16", "it has no products of the type of fp16", ("onnx/compressed.fp16.onnx",)),
        ("afar", "needs a phone", "needs a phone: none is at hand", ("engines/afar/model.afar",)),
    ]
    table = SECTIONS["files"].draw(report).table
    column = table.header.index("ms, batch 1, 1 thread")
    cells = {row[0]: row[column] for row in table.rows}
    number = r"\d+\.\d{3}"
    for path, words in {
        "onnx/dense.fp32.onnx": rf"ort-cpu {number}, elsewhere {number}",
        "onnx/compressed.fp16.onnx": rf"ort-cpu {number}, elsewhere not run: takes no fp16",
        "engines/afar/model.afar": "afar not run: needs a phone",
    }.items():
        assert re.fullmatch(words, cells[path])
    for page in ("report.md", "report.html"):
        text = (tmp_path / "run" / page).read_text()
        assert "afar not run: needs a phone" in text
        assert "Not measured on afar: engines/afar/model.afar (needs a phone: none is at hand)." in text


def test_an_engine_is_not_built_anew_for_those_of_other_targets(tmp_path, register):
    made = []

    class Counted(Afar):
        def __init__(self, name):
            self.name = name

        def _build(self, onnx, folder, options):
            made.append(self.name)
            return super()._build(onnx, folder, options)

    for name in ("afar", "farther"):
        register(TARGETS, Counted(name))
    recipe = {name: part for name, part in TIMED.items() if name != "bench"}
    for targets in (["afar"], ["afar", "farther"]):
        run(Recipe.from_dict({**recipe, "engine": {"targets": targets}}), tmp_path / "run")
    assert made == ["afar", "farther"]


def test_openvinos_own_format_is_an_engine_that_is_run_and_compared(tmp_path):
    pytest.importorskip("openvino", reason="openvino is not installed: pip install 'slimvit[openvino]'")
    recipe = {name: part for name, part in TIMED.items() if name != "bench"}
    report = run(Recipe.from_dict({**recipe, "engine": {"targets": ["openvino-cpu"]}}), tmp_path / "run").to_dict()
    folder = tmp_path / "run" / "engines" / "openvino-cpu"
    facts = read_json(folder / "engine.json")
    assert sorted(path.name for path in folder.iterdir()) == [
        "compressed.fp32.bin",
        "compressed.fp32.xml",
        "engine.json",
    ]
    assert facts["weights"]["f16"] > 4 * facts["weights"].get("f32", 0), "OpenVINO leaves what fp16 cannot hold"
    assert facts["size_bytes"] == sum(path.stat().st_size for path in folder.glob("compressed.*"))
    assert (folder / "compressed.fp32.bin").stat().st_size < 0.6 * report["compressed"]["bytes"]
    (rung,) = [rung for rung in report["parity"] if rung["to"] == "compressed.fp32.xml"]
    assert rung["verdict"] == "pass"
    assert 0 < rung["max_abs"] < 0.1, "fp16 weights are not fp32 ones"
    (row,) = report["engines"]
    assert (row["bytes"], row["verdict"], row["model"]) == (facts["size_bytes"], "pass", "compressed")
    assert row["path"] == "engines/openvino-cpu/compressed.fp32.xml"
    assert row["path"] in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.slow
def test_files_and_engines_may_take_pixels(tmp_path):
    pytest.importorskip("openvino", reason="openvino is not installed: pip install 'slimvit[openvino]'")
    recipe = {name: part for name, part in TIMED.items() if name != "bench"}
    recipe |= {"export": {"preprocess": True, "precisions": ["fp32", "int8"]}, "engine": {"targets": ["openvino-cpu"]}}
    report = run(Recipe.from_dict(recipe), tmp_path / "run").to_dict()
    assert {rung["verdict"] for rung in report["parity"]} == {"pass"}
    assert len(report["artifacts"]) == 4
    for row in report["artifacts"]:
        assert takes_pixels(OnnxFile(tmp_path / "run" / row["path"]).model)


@pytest.mark.slow
def test_int8_that_is_another_model_is_left_out_and_an_error_if_asked_for_by_name(tmp_path, register):
    honest = PRECISIONS["int8-qdq"]

    def broken(model, images):
        made = honest.convert(model, images)
        scale = next(t for t in made.model.graph.initializer if t.name.endswith("_scale") and t.dims)
        scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * 2, scale.name))
        return made

    register(PRECISIONS, replace(honest, convert=broken))
    recipe = {name: part for name, part in PRECISE.items() if name != "bench"}
    report = run(Recipe.from_dict(recipe), tmp_path / "run").to_dict()
    (row,) = [row for row in report["artifacts"] if row["refused"]]
    assert (row["precision"], row["bytes"]) == ("int8-qdq", None)
    assert "weights" in row["refused"]
    assert not (tmp_path / "run" / row["path"]).exists()
    assert {rung["verdict"] for rung in report["parity"]} == {"pass"}, "of what ships"
    recipe["export"] = {"precisions": ["int8-qdq"]}
    with pytest.raises(ParityError, match="weights must be the same"):
        run(Recipe.from_dict(recipe), tmp_path / "run")


# A latency budget

LIMITED = {"model": MODEL, "data": {"source": "none"}, "budget": {"latency": {"ort-cpu": "70%"}}}


@pytest.fixture
def device(widths_timed):
    """Time in proportion to MACs, of which a whole model saves 10 % less; lists what was timed."""
    return widths_timed(lambda share, design: 1 - (0.9 if design.sessions > 1 else 1.0) * (1 - share))


@pytest.mark.slow
def test_a_latency_budget_is_measured_held_and_recorded(tmp_path, device):
    recipe = Recipe.from_dict(LIMITED)
    report = run(recipe, tmp_path / "a").to_dict()
    found = read_json(tmp_path / "a" / "allocation.json")
    (row,) = found["latency"]
    assert (row["target"], row["batch"], row["threads"], row["dense_ms"]) == ("ort-cpu", 1, 1, 2.0)
    assert row["requested"] == pytest.approx(0.7)
    assert row["measured"] == pytest.approx(0.7, rel=0.02)
    assert row["correction"] == pytest.approx(0.9, rel=0.01)
    assert report["ratio"]["macs"] == pytest.approx(1 - 0.3 / 0.9, abs=0.02)
    assert report["latency_budget"] == found["latency"]
    table = LatencyTable.from_json((tmp_path / "a" / "latency.ort-cpu.json").read_text())
    assert table.environment == {"cpu": "made up"}
    assert "latency.ort-cpu.json" in {entry["path"] for entry in report["files"]}

    before = len(device)
    again = run(recipe, tmp_path / "a").to_dict()
    assert (again, len(device)) == (report, before), "a finished run measures nothing again"
    run(recipe, tmp_path / "b")
    assert len(device) == before, "another folder, the same table and the same checks"
    assert (tmp_path / "a" / "plan.json").read_bytes() == (tmp_path / "b" / "plan.json").read_bytes()
    run(recipe, tmp_path / "b", resume=False)
    assert len(device) == 2 * before, "unless everything is to be done anew"


class Killer(Nobody):
    """Ends a run once it has decided."""

    def stage(self, name):
        if name == "deploy":
            raise ZeroDivisionError


def decided(recipe, out):
    """The allocation of a run that goes no further."""
    with pytest.raises(ZeroDivisionError):
        run(recipe, out, progress=Progress(Killer()))
    return read_json(out / "allocation.json")


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_plan(tmp_path, device):
    recipe = Recipe.from_dict(LIMITED)
    run(recipe, tmp_path / "whole")
    decided(recipe, tmp_path / "cut")
    (tmp_path / "cut" / ".slimvit" / "compress.json").unlink()
    assert (tmp_path / "cut" / "latency.ort-cpu.json").is_file()
    run(recipe, tmp_path / "cut")
    for name in ("plan.json", "allocation.json", "latency.ort-cpu.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
def test_plan_tells_what_a_run_decides(tmp_path, device):
    for changed in (
        {},
        {"compress": {"method": "hybrid"}},
        {"budget": {"latency": {"ort-cpu": "1.5 ms"}, "macs": 0.6}},
    ):
        recipe = Recipe.from_dict({**LIMITED, **changed})
        shown = preview(recipe)
        assert (shown.allocation.to_dict(), shown.note) == (decided(recipe, tmp_path / "run"), "")


@pytest.mark.slow
def test_plan_measures_damage_where_the_baseline_is_there(tmp_path, cache):
    recipe = Recipe.from_dict({**TRAINED, "compress": {"method": "joint"}, "finetune": {}})
    guess = preview(recipe)
    assert "`slimvit run` has not trained the baseline yet" in guess.note
    assert guess.allocation.to_dict()["damage"] is None
    assert not (cache / "dense").exists(), "nothing is trained for a plan"
    allocation = decided(recipe, tmp_path / "run")
    before = sorted(path for path in cache.rglob("*"))
    shown = preview(recipe)
    assert (shown.allocation.to_dict(), shown.note) == (allocation, "")
    assert shown.allocation.to_dict()["damage"] > 0
    assert sorted(path for path in cache.rglob("*")) == before, "and nothing is changed"
    quick = preview(recipe, measure=False)
    assert quick.allocation.widths == guess.allocation.widths
    assert "by measured damage" in quick.note
