"""What the two demo runs left on disk: read as a user would, with every claim recomputed from the files.

CI runs the demos and then points SLIMVIT_DEMO_RUNS at the folder that holds digits_vit and digits_vit_vtp.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

RUNS = os.environ.get("SLIMVIT_DEMO_RUNS", "")
VERDICTS = {"invalid", "regressed", "improved", "pass", "inconclusive"}
SHIPPED = {"plan.json", "deploy/model.safetensors", "onnx/dense.fp32.onnx", "onnx/compressed.fp32.onnx"}

pytestmark = pytest.mark.skipif(not RUNS, reason="SLIMVIT_DEMO_RUNS is not set: no demo run to look at")


@dataclass(frozen=True)
class Run:
    folder: Path
    params_limit: float
    report: dict[str, Any]


@cache
def load(name: str, params_limit: float) -> Run:
    folder = Path(RUNS) / name
    return Run(folder, params_limit, json.loads((folder / "report.json").read_text(encoding="utf-8")))


@pytest.fixture(params=[("digits_vit", 0.51), ("digits_vit_vtp", 0.57)], ids=lambda param: param[0])
def run(request: pytest.FixtureRequest) -> Run:
    return load(*request.param)


def stored_params(weights: Path) -> int:
    with safe_open(weights, framework="numpy") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 - not a mapping


def test_budget_is_met_by_the_weights_on_disk(run):
    dense = stored_params(run.folder / "dense/model.safetensors")
    compressed = stored_params(run.folder / "deploy/model.safetensors")
    assert (run.report["dense"]["params"], run.report["compressed"]["params"]) == (dense, compressed)
    assert run.report["ratio"]["params"] == pytest.approx(compressed / dense, abs=1e-3)
    assert compressed / dense <= run.params_limit


def test_allocation_is_what_was_decided(run):
    found = json.loads((run.folder / "allocation.json").read_text(encoding="utf-8"))
    for name in ("params", "macs"):
        assert found["predicted"][name] == run.report["compressed"][name]


def test_accuracy_is_counted(run):
    assert run.report["synthetic"] is False
    counted = [stage for stage in run.report["stages"] if stage["accuracy"] is not None]
    assert len(counted) >= 3, "expected counts for the dense, the compressed and the fine-tuned model at least"
    for part in (*counted, run.report["dense"], run.report["compressed"]):
        assert 0 <= part["wrong"] <= part["total"]
        assert part["total"] > 100
        assert part["accuracy"] == pytest.approx(1 - part["wrong"] / part["total"], abs=1e-6)


def test_models_have_learned_their_task(run):
    assert run.report["dense"]["accuracy"] > 0.9
    assert run.report["compressed"]["accuracy"] > 0.85


def test_relative_error_increase_follows_from_the_counts(run):
    dense, compressed = (run.report[key]["wrong"] / run.report[key]["total"] for key in ("dense", "compressed"))
    if dense == 0:
        assert run.report["relative_error_increase"] is None
    else:
        assert run.report["relative_error_increase"] == pytest.approx(compressed / dense - 1, abs=1e-3)


def test_no_parity_rung_failed(run):
    verdicts = [rung["verdict"] for rung in run.report["parity"]]
    assert verdicts.count("pass") >= 3, "mask, slice, split and ONNX are compared in pairs"
    assert set(verdicts) <= {"pass", "not_run"}
    assert all(rung["reason"] for rung in run.report["parity"] if rung["verdict"] == "not_run")


def test_latency_is_a_well_formed_measurement(run):
    rows = [row for row in run.report["bench"] if row["target"] == "ort-cpu"]
    assert rows
    for row in rows:
        ratio = row["ratio"]
        numbers = [ratio["lo"], ratio["point"], ratio["hi"], row["dense_ms"], row["compressed_ms"]]
        assert all(math.isfinite(number) and number > 0 for number in numbers)
        assert ratio["lo"] <= ratio["point"] <= ratio["hi"]
        assert row["verdict"] in VERDICTS
        assert row["environment"]
        verified = row["verified_speedup_at_least"]
        assert verified is None or (row["verdict"] == "improved" and 1 < verified <= 1 / ratio["point"])
        raw = run.folder / "bench" / f"ort-cpu.{row['precision']}.b{row['batch']}.t{row['threads']}.json"
        assert raw.stat().st_size > 1000, "raw samples are kept"


def test_engine_for_sm_8_9_is_there(run):
    facts = [json.loads(path.read_text(encoding="utf-8")) for path in run.folder.glob("engines/trt-rtx/**/*.json")]
    ada = [engine for engine in facts if "8.9" in engine.get("compute_capabilities", ())]
    assert ada
    digests = {
        hashlib.sha256(path.read_bytes()).hexdigest()
        for path in run.folder.glob("engines/trt-rtx/**/*")
        if path.is_file() and path.suffix != ".json" and path.stat().st_size > 10_000
    }
    assert digests
    text = json.dumps(ada)
    assert any(digest in text for digest in digests), "engine.json names no engine file that is there"


def test_file_digests_hold(run):
    listed = {entry["path"]: entry for entry in run.report["files"]}
    assert set(listed) >= SHIPPED
    assert any(path.startswith("engines/trt-rtx/") for path in listed)
    for path, entry in listed.items():
        content = (run.folder / path).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (entry["bytes"], entry["sha256"]), path


def test_vtp_run_shows_where_it_prunes():
    run = load("digits_vit_vtp", 0.57)
    rows = run.report["pruned_shares"]
    assert {row["kind"] for row in rows} >= {"mlp_hidden", "attn_in", "attn_out", "mlp_in"}
    assert all(row["physical"] == (row["kind"] == "mlp_hidden") for row in rows if row["removed"])
    keeps = json.loads((run.folder / "plan.json").read_text(encoding="utf-8"))["keeps"]
    gone = sum(keep["total"] - len(part) for keep in keeps if keep["unit"] == "mlp_hidden" for part in keep["indices"])
    assert gone == sum(row["removed"] for row in rows if row["kind"] == "mlp_hidden") > 0


def test_both_runs_start_from_one_dense_model():
    digests = {
        hashlib.sha256((Path(RUNS) / name / "dense/model.safetensors").read_bytes()).hexdigest()
        for name in ("digits_vit", "digits_vit_vtp")
    }
    assert len(digests) == 1


def test_the_size_gate_holds_and_can_fail(tmp_path):
    """The demo keeps its own gate; with a hundredth less room than it needs, the same gate is red."""
    import datetime as dt
    import tomllib

    from toolchain.gate import GateConfig, run_gate

    home = Path(__file__).resolve().parents[2] / "models/digits_vit"
    raw = tomllib.loads((home / "gate.toml").read_text(encoding="utf-8"))
    for cell in raw["cell"]:
        artifact = str(cell["artifact"])
        assert artifact.startswith("../../runs/"), "what `make demo` writes"
        cell["artifact"] = str(Path(RUNS).resolve() / artifact.removeprefix("../../runs/"))
    day = dt.date(2030, 1, 1)
    result = run_gate(GateConfig.from_dict(raw, home), tool="test", day=day)
    assert result.verdict == "pass", result.headline
    for cell, found in zip(raw["cell"], result.cells, strict=True):
        cell["budget"] = {"size": int(found.artifact.size_bytes * 0.99)}
    tight = run_gate(GateConfig.from_dict(raw, tmp_path), tool="test", day=day, why=True)
    assert tight.exit_code == 1
    assert {check.status for _, check in tight.checks} == {"fail"}
    assert all(sum(row.change for row in cell.layers) == cell.artifact.size_bytes for cell in tight.cells)
