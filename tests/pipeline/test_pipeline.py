"""What a run takes from before, and what it does again."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from onnx import numpy_helper

from toolchain.artifacts.onnx_file import read_onnx
from toolchain.cost import LatencyTable, Widths, trace
from toolchain.errors import DeviceLost, ParityError, RecipeError, TargetUnavailable
from toolchain.export.pixels import takes_pixels
from toolchain.export.precision import PRECISIONS
from toolchain.files import read_json, sha256
from toolchain.measure.compare import compare
from toolchain.measure.comparison import Comparison
from toolchain.measure.samples import Design
from toolchain.model import Made
from toolchain.pipeline import latency_budget as latency
from toolchain.pipeline import run as pipeline
from toolchain.pipeline import shipping
from toolchain.pipeline.job import preview
from toolchain.pipeline.latency_budget import Timing
from toolchain.plan import CompressionPlan
from toolchain.recipe import Recipe
from toolchain.training.stages import FinetuneFacts

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
TIMED = {"model": MODEL, "data": {"source": "none"}, "budget": {"params": 0.6}, "bench": {"targets": ["ort-cpu"]}}

THROWN_AWAY = {
    "data": {"source": "digits", "digest": "d"},
    "loss": "distillation",
    "judged_by": "errors",
    "images": 180,
    "before": 20,
    "after": 21,
    "kept": "before",
}

SHORT = Design(sessions=2, blocks=4, looks=1, slot_ms=2.0, warmup_s=0.01)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SLIMVIT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


class Kept:
    """A fine-tuning that finds the model before it better."""

    name = "finetune"

    def __init__(self, *_):
        pass

    def requires(self, given):
        pass

    def __call__(self, given):
        return Made(given, FinetuneFacts(**THROWN_AWAY))

    def ensures(self, given, made):
        pass


def test_the_baseline_is_shared_unless_everything_is_to_be_done_anew(tmp_path, cache, monkeypatch):
    trainings, trained = [], pipeline.trained
    monkeypatch.setattr(pipeline, "trained", lambda *given: trainings.append(given[2]) or trained(*given))
    recipe = Recipe.from_dict(TRAINED)
    report = pipeline.run(recipe, tmp_path / "a")
    assert len(trainings) == 1
    assert [path.name for path in (cache / "dense").iterdir() if not path.name.startswith(".")] == trainings
    found = report["finetune"]
    assert (found["loss"], found["judged_by"], found["images"], found["kept"]) == (
        "distillation",
        "errors",
        180,
        "after",
    )
    assert 0 <= found["after"] <= found["before"] <= 180
    told = (
        f"Fine-tuning: {found['before']} of 180 validation images wrong before, {found['after']} after; the model after"
    )
    assert told in (tmp_path / "a" / "report.md").read_text()
    plan = CompressionPlan.load(tmp_path / "a" / "plan.json")
    found = read_json(tmp_path / "a" / "allocation.json")
    assert Widths.of(plan).kept.items() <= {(r["module"], r["unit"]): r["kept"] for r in found["widths"]}.items()
    assert found["predicted"]["params"] == report["compressed"]["params"]
    assert found["predicted"]["macs"] == report["compressed"]["macs"]
    assert found["planned"]["widths"] != found["widths"]

    monkeypatch.setattr(pipeline, "Finetune", Kept)
    report = pipeline.run(recipe, tmp_path / "b")
    assert len(trainings) == 1, "another folder, the same baseline"
    assert report["finetune"] == THROWN_AWAY
    for file in ("model.safetensors", "model.json"):
        assert (tmp_path / "a" / "dense" / file).read_bytes() == (tmp_path / "b" / "dense" / file).read_bytes()

    (entry,) = (cache / "dense").glob("[!.]*")
    (entry / "model.json").write_text(json.dumps({"stale": True}))
    pipeline.run(recipe, tmp_path / "b", resume=False)
    assert len(trainings) == 2
    assert "stale" not in read_json(entry / "model.json"), "the entry is replaced"


def test_a_cell_is_measured_again_until_it_says_something(tmp_path, monkeypatch):
    recipe, calls, verdict, facts = Recipe.from_dict(TIMED), [], ["inconclusive"], shipping.cell_facts
    found = []

    def measure(*pair, **options):
        calls.append(options["parity"])
        if not found:
            found.append(compare(*pair[:4], SHORT, **options))
        return found[0]

    monkeypatch.setattr(shipping, "bench_compare", measure)
    monkeypatch.setattr(shipping, "cell_facts", lambda *given: {**facts(*given), "verdict": verdict[0]})

    def measured():
        before = len(calls)
        pipeline.run(recipe, tmp_path / "run")
        return len(calls) - before

    assert measured() == 1
    verdict[0] = "invalid"
    assert measured() == 1
    verdict[0] = "pass"
    assert measured() == 1
    assert measured() == 0
    monkeypatch.setattr(shipping, "conditions_of", lambda *_: ["another runtime or machine"])
    assert measured() == 1
    assert set(calls) == {"pass"}
    assert (tmp_path / "run" / "bench" / "ort-cpu.fp32.b1.t1.json").is_file()


def test_a_run_goes_on_without_a_device_that_drops_off(tmp_path, monkeypatch):
    recipe = Recipe.from_dict({**TIMED, "bench": {"targets": ["ort-cpu"], "batch": [1, 2, 3]}})
    asked, gone = [], True

    def measure(*pair, **options):
        asked.append(pair[3].batch)
        if gone and pair[3].batch == 2:
            raise DeviceLost("ort-cpu", "the connection failed.")
        return compare(*pair[:4], SHORT, **options)

    monkeypatch.setattr(shipping, "bench_compare", measure)
    monkeypatch.setattr(shipping, "conclusive", lambda facts: True)
    with pytest.raises(DeviceLost, match="the connection failed"):
        pipeline.run(recipe, tmp_path / "run")
    assert asked == [1, 2], "nothing more is asked of it"
    report = read_json(tmp_path / "run" / "report.json")
    assert [row["batch"] for row in report["bench"]] == [1]
    assert [row["target"] for row in report["not_measured"]] == ["ort-cpu"]
    assert "Not measured, or not all of it" in (tmp_path / "run" / "report.md").read_text()
    gone = False
    report = pipeline.run(recipe, tmp_path / "run")
    assert asked == [1, 2, 2, 3], "what was measured is kept"
    assert ([row["batch"] for row in report["bench"]], report["not_measured"]) == ([1, 2, 3], [])


def test_threads_of_a_gpu_are_refused_before_any_work(tmp_path):
    recipe = Recipe.from_dict({**TIMED, "bench": {"targets": ["ort-cuda+graph"], "threads": [1, 2]}})
    with pytest.raises(RecipeError, match="threads mean nothing"):
        pipeline.run(recipe, tmp_path / "run")


def test_a_recipe_may_name_targets_of_targets_toml(tmp_path, monkeypatch):
    (tmp_path / "targets.toml").write_text(
        '[pinned]\ntransport = "local"\naffinity = [0]\n[away]\ntransport = "bundle"\n'
    )
    monkeypatch.chdir(tmp_path)
    report = pipeline.run(Recipe.from_dict({**TIMED, "bench": {"targets": ["pinned"]}}), tmp_path / "run", design=SHORT)
    (row,) = report["bench"]
    assert (row["target"], row["environment"]["affinity"]) == ("pinned", [0])
    found = Comparison.load(tmp_path / "run" / "bench" / "pinned.fp32.b1.t1.json")
    assert (found.scenario.target, found.scenario.affinity) == ("ort-cpu", (0,))
    with pytest.raises(TargetUnavailable, match="bench pack"):
        pipeline.run(Recipe.from_dict({**TIMED, "bench": {"targets": ["away"]}}), tmp_path / "other")
    built = {**TIMED, "engine": {"targets": ["pinned"]}}
    with pytest.raises(TargetUnavailable, match=r"engine\.targets takes built-in targets"):
        pipeline.run(Recipe.from_dict(built), tmp_path / "other")


PRECISE = {**TIMED, "export": {"precisions": ["fp32", "fp16", "int8"]}}


def test_a_recipe_makes_and_times_files_of_several_precisions(tmp_path, monkeypatch):
    monkeypatch.setattr(shipping, "conclusive", lambda facts: True)
    report = pipeline.run(Recipe.from_dict(PRECISE), tmp_path / "run", design=SHORT)
    made = ["fp32", "fp16", "int8-dynamic", "int8-qdq"]
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
    assert f"Smallest file (accuracy is not known): {small['path']}." in text
    assert "Where the bytes are" in text

    # Another run does only what is new.
    fewer = {**PRECISE, "export": {"precisions": ["fp16"]}}
    again = pipeline.run(Recipe.from_dict(fewer), tmp_path / "run", design=SHORT)
    assert [row["precision"] for row in again["bench"]] == ["fp16"]
    assert sorted(path.name for path in (tmp_path / "run" / "onnx").iterdir()) == [
        "compressed.fp16.onnx",
        "compressed.fp32.onnx",
        "dense.fp32.onnx",
    ]


def test_openvinos_own_format_is_an_engine_that_is_run_and_compared(tmp_path):
    pytest.importorskip("openvino", reason="openvino is not installed: pip install 'slimvit[openvino]'")
    recipe = {name: part for name, part in TIMED.items() if name != "bench"}
    report = pipeline.run(
        Recipe.from_dict({**recipe, "engine": {"targets": ["openvino-cpu"]}}), tmp_path / "run", design=SHORT
    )
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
    assert (row["bytes"], row["verdict"]) == (facts["size_bytes"], "pass")
    assert row["path"] == "engines/openvino-cpu/compressed.fp32.xml"
    assert row["path"] in (tmp_path / "run" / "report.md").read_text()


def test_files_and_engines_may_take_pixels(tmp_path):
    pytest.importorskip("openvino", reason="openvino is not installed: pip install 'slimvit[openvino]'")
    recipe = {name: part for name, part in TIMED.items() if name != "bench"}
    recipe |= {"export": {"preprocess": True, "precisions": ["fp32", "int8"]}, "engine": {"targets": ["openvino-cpu"]}}
    report = pipeline.run(Recipe.from_dict(recipe), tmp_path / "run")
    assert {rung["verdict"] for rung in report["parity"]} == {"pass"}
    assert len(report["artifacts"]) == 4
    for row in report["artifacts"]:
        assert takes_pixels(read_onnx(tmp_path / "run" / row["path"]))


def test_int8_that_is_another_model_is_left_out_and_an_error_if_asked_for_by_name(tmp_path, monkeypatch):
    honest = PRECISIONS["int8-qdq"]

    def broken(model, images):
        made = honest.convert(model, images)
        scale = next(t for t in made.model.graph.initializer if t.name.endswith("_scale") and t.dims)
        scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * 2, scale.name))
        return made

    monkeypatch.setitem(PRECISIONS, "int8-qdq", replace(honest, convert=broken))
    recipe = {name: part for name, part in PRECISE.items() if name != "bench"}
    report = pipeline.run(Recipe.from_dict(recipe), tmp_path / "run")
    (row,) = [row for row in report["artifacts"] if row["refused"]]
    assert (row["precision"], row["bytes"]) == ("int8-qdq", None)
    assert "weights" in row["refused"]
    assert not (tmp_path / "run" / row["path"]).exists()
    assert {rung["verdict"] for rung in report["parity"]} == {"pass"}, "of what ships"
    recipe["export"] = {"precisions": ["int8-qdq"]}
    with pytest.raises(ParityError, match="weights must be the same"):
        pipeline.run(Recipe.from_dict(recipe), tmp_path / "run")


# A latency budget

LIMITED = {"model": MODEL, "data": {"source": "none"}, "budget": {"latency": {"ort-cpu": "70%"}}}


@pytest.fixture
def device(monkeypatch):
    """Time in proportion to MACs, of which a whole model saves 10 % less; lists what was timed."""
    timed = []

    def measure(dense, variants, setting, design, progress):
        timed.append(len(variants))
        shape = trace(dense.module, dense.family, dense.preprocess.input_size)
        shares = [shape.shrunk(widths, dense.groups).macs / shape.macs for widths in variants]
        scale = 0.9 if design.sessions > 1 else 1.0
        return Timing(2.0, tuple(1 - scale * (1 - share) for share in shares), {"cpu": "made up"})

    monkeypatch.setattr(latency, "time_widths", measure)
    return timed


def test_a_latency_budget_is_measured_held_and_recorded(tmp_path, device):
    recipe = Recipe.from_dict(LIMITED)
    report = pipeline.run(recipe, tmp_path / "a")
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
    again = pipeline.run(recipe, tmp_path / "a")
    assert (again, len(device)) == (report, before), "a finished run measures nothing again"
    pipeline.run(recipe, tmp_path / "b")
    assert len(device) == before, "another folder, the same table and the same checks"
    assert (tmp_path / "a" / "plan.json").read_bytes() == (tmp_path / "b" / "plan.json").read_bytes()
    pipeline.run(recipe, tmp_path / "b", resume=False)
    assert len(device) == 2 * before, "unless everything is to be done anew"


def test_a_killed_run_goes_on_to_the_same_plan(tmp_path, device, monkeypatch):
    recipe = Recipe.from_dict(LIMITED)
    pipeline.run(recipe, tmp_path / "whole")
    compressed = pipeline.compressed
    monkeypatch.setattr(pipeline, "compressed", lambda *given, **more: (compressed(*given, **more), 1 / 0))
    with pytest.raises(ZeroDivisionError):
        pipeline.run(recipe, tmp_path / "cut")
    assert (tmp_path / "cut" / "latency.ort-cpu.json").is_file()
    monkeypatch.setattr(pipeline, "compressed", compressed)
    pipeline.run(recipe, tmp_path / "cut")
    for name in ("plan.json", "allocation.json", "latency.ort-cpu.json"):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_plan_tells_what_a_run_decides(tmp_path, device):
    for changed in (
        {},
        {"compress": {"method": "hybrid"}},
        {"budget": {"latency": {"ort-cpu": "1.5 ms"}, "macs": 0.6}},
    ):
        recipe = Recipe.from_dict({**LIMITED, **changed})
        _, allocation, note = preview(recipe)
        pipeline.run(recipe, tmp_path / "run")
        assert (allocation.to_dict(), note) == (read_json(tmp_path / "run" / "allocation.json"), "")


def test_plan_measures_damage_where_the_baseline_is_there(tmp_path, cache):
    recipe = Recipe.from_dict({**TRAINED, "compress": {"method": "joint"}, "finetune": {}})
    _, guess, note = preview(recipe)
    assert "`slimvit run` has not trained the baseline yet" in note
    assert guess.to_dict()["damage"] is None
    assert not (cache / "dense").exists(), "nothing is trained for a plan"
    pipeline.run(recipe, tmp_path / "run")
    before = sorted(path for path in cache.rglob("*"))
    _, found, note = preview(recipe)
    assert (found.to_dict(), note) == (read_json(tmp_path / "run" / "allocation.json"), "")
    assert found.to_dict()["damage"] > 0
    assert sorted(path for path in cache.rglob("*")) == before, "and nothing is changed"
    _, quick, note = preview(recipe, measure=False)
    assert quick.widths == guess.widths
    assert "by measured damage" in note
