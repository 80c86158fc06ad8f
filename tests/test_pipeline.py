"""What a run takes from before, and what it does again."""

from __future__ import annotations

import json

import pytest

from toolchain import pipeline
from toolchain.artifact import read_json
from toolchain.bench.compare import compare
from toolchain.cost import Widths
from toolchain.plan import CompressionPlan
from toolchain.recipe import Recipe

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
        return given

    def ensures(self, given, made):
        pass


def test_the_baseline_is_shared_unless_everything_is_to_be_done_anew(tmp_path, cache, monkeypatch):
    trainings, trained = [], pipeline.trained
    monkeypatch.setattr(pipeline, "trained", lambda *given: trainings.append(given[2]) or trained(*given))
    recipe = Recipe.from_dict(TRAINED)
    report = pipeline.run(recipe, tmp_path / "a")
    assert len(trainings) == 1
    assert [path.name for path in (cache / "dense").iterdir() if not path.name.startswith(".")] == trainings
    assert report["finetune"] == {"kept": "after"}
    plan = CompressionPlan.load(tmp_path / "a" / "plan.json")
    found = read_json(tmp_path / "a" / "allocation.json")
    assert Widths.of(plan).kept.items() <= {(r["module"], r["unit"]): r["kept"] for r in found["widths"]}.items()
    assert found["predicted"]["params"] == report["compressed"]["params"]
    assert found["predicted"]["macs"] == report["compressed"]["macs"]
    assert found["planned"]["widths"] != found["widths"]

    monkeypatch.setattr(pipeline, "Finetune", Kept)
    report = pipeline.run(recipe, tmp_path / "b")
    assert len(trainings) == 1, "another folder, the same baseline"
    assert report["finetune"] == {"kept": "before"}
    for file in ("model.safetensors", "model.json"):
        assert (tmp_path / "a" / "dense" / file).read_bytes() == (tmp_path / "b" / "dense" / file).read_bytes()

    (entry,) = (cache / "dense").glob("[!.]*")
    (entry / "model.json").write_text(json.dumps({"stale": True}))
    pipeline.run(recipe, tmp_path / "b", resume=False)
    assert len(trainings) == 2
    assert "stale" not in read_json(entry / "model.json"), "the entry is replaced"


def test_a_cell_is_measured_again_until_it_says_something(tmp_path, monkeypatch):
    recipe, calls, verdict, facts = Recipe.from_dict(TIMED), [], ["inconclusive"], pipeline.cell_facts
    found = []

    def measure(*pair, **options):
        calls.append(options["parity"])
        if not found:
            found.append(compare(*pair, **options, sessions=2, blocks=4, slot_ms=2.0, warmup_s=0.01))
        return found[0]

    monkeypatch.setattr(pipeline, "bench_compare", measure)
    monkeypatch.setattr(pipeline, "cell_facts", lambda comparison: {**facts(comparison), "verdict": verdict[0]})

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
    monkeypatch.setattr(pipeline, "conditions", lambda *_: ["another runtime or machine"])
    assert measured() == 1
    assert set(calls) == {"pass"}
    assert (tmp_path / "run" / "bench" / "ort-cpu.fp32.b1.t1.json").is_file()
