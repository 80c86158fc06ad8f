"""A report with one of everything; the numbers are invented, and all different."""

from __future__ import annotations

import json

from toolchain.compress.outcome import PrunedShare
from toolchain.parity import Rung, Tolerance
from toolchain.recipe import BudgetSection, CompressSection
from toolchain.report.record import (
    BenchRow,
    BlockDamage,
    Calls,
    Data,
    EngineRow,
    Figures,
    FileRow,
    Graph,
    Interval,
    Listed,
    ModelName,
    Report,
    Shares,
    StageRow,
    Suggestion,
)

SUMMARY = "improved: 1.51× (verified ≥ 1.50×), ratio 0.66 [0.65, 0.67], control ±0.98 %, τ 5 %, 3 × 20 blocks"
ENVIRONMENT = {"cpu": "Some CPU", "affinity": [0, 1], "threads": 1, "runtimes": {"onnxruntime": "1.2"}}


def figures(params, wrong):
    counts = {"accuracy": 1 - wrong / 359, "wrong": wrong, "total": 359}
    return Figures(params=params, macs=17 * params, bytes=4 * params, **counts)


def stage(name, params, wrong, seconds):
    return StageRow(name=name, seconds=seconds, **dict(figures(params, wrong)))


def rung(from_, to, max_abs, verdict="pass", reason=""):
    return Rung(from_, to, max_abs, 1.0, None, Tolerance(1e-5, 0.99999, None), verdict, reason)


def share(block, kind, removed, *, physical=True):
    return PrunedShare(block=block, kind=kind, total=512, removed=removed, physical=physical)


def calls(middle):
    return Calls(p5=0.95 * middle, p25=0.98 * middle, p50=middle, p75=1.03 * middle, p95=1.2 * middle)


def timed(precision, point, verdict="improved", target="ort-cpu", **changes):
    """A comparison; that of a precision timed its ONNX file."""
    row = {
        "target": target,
        "batch": 1,
        "threads": 1,
        "precision": precision,
        "baseline": "onnx/dense.fp32.onnx",
        "path": f"onnx/compressed.{precision}.onnx",
        "dense_ms": 0.6104,
        "compressed_ms": 0.6104 * point,
        "ratio": Interval(point=point, lo=point, hi=point),
        "control": Interval(point=1.0, lo=0.995, hi=1.005),
        "tau": 0.05,
        "tau_min": 0.02,
        "verified_speedup_at_least": None,
        "verdict": verdict,
        "environment": ENVIRONMENT,
        "summary": SUMMARY,
        "calls": (calls(0.6104), calls(0.6104 * point)),
    }
    return BenchRow(**{**row, **changes})


def a_report():
    cell = {
        "compressed_ms": 0.4013,
        "ratio": Interval(point=0.661, lo=0.652, hi=0.668),
        "verified_speedup_at_least": 1.502,
    }
    census = {"size_bytes": 1, "opset": 20, "simplified": True}
    return Report(
        tool="slimvit 0.1.0",
        synthetic=False,
        model=ModelName(name="vit_tiny_patch16_224", kwargs={}, checkpoint_sha256=None),
        output="logits",
        data=Data(source="digits", digest="d" * 64),
        method=CompressSection(method="hybrid"),
        requested_method="hybrid",
        budget=BudgetSection(params=0.5),
        latency_budget=(),
        recipe_digest="abcdef012345" * 5,
        stages=(stage("dense", 1194122, 14, 106.45), stage("onnx", 596738, 18, None)),
        dense=figures(1194122, 14),
        compressed=figures(596738, 18),
        ratio=Shares(params=0.49973, macs=0.50596, bytes=0.50291),
        relative_error_increase=18 / 14 - 1,
        relative_error_increase_reason=None,
        finetune=None,
        pruned_shares=(
            *(share("blocks.10", kind, 64, physical=kind == "mlp_hidden") for kind in ("mlp_hidden", "attn_in")),
            share("blocks.9", "mlp_hidden", 16),
        ),
        damage=(
            BlockDamage(block="blocks.9", kind="mlp_hidden", nats=0.002),
            *(BlockDamage(block="blocks.10", kind=kind, nats=0.004) for kind in ("mlp_hidden", "rank.qkv")),
        ),
        closed_form=None,
        restrictions=(),
        notes=(),
        parity=(
            rung("masked", "sliced", 1.9e-6),
            rung("sliced", "split", 0.0),
            rung("a.onnx", "a.engine", None, "not_run", "no GPU"),
        ),
        graphs={
            "dense": Graph(nodes_before={"MatMul": 8, "Reshape": 5}, nodes_after={"MatMul": 8}, **census),
            "int8-qdq": Graph(nodes_before={"MatMul": 8}, nodes_after={"MatMul": 8, "QuantizeLinear": 9}, **census),
        },
        bench=(timed("fp32", 0.661, **cell),),
        not_measured=(),
        int8=(),
        artifacts=(
            FileRow(path="onnx/dense.fp32.onnx", model="dense", precision="fp32", bytes=4),
            FileRow(path="onnx/compressed.fp32.onnx", model="compressed", precision="fp32", bytes=2),
        ),
        engines=(
            EngineRow(
                path="engines/trt-rtx/a.engine",
                target="trt-rtx",
                model="compressed",
                precision="fp32",
                file="a.engine",
                bytes=6480000,
                download_bytes=2400000,
                verdict="not_run",
                compute_capabilities=("8.9",),
                matmul_dtypes={"FLOAT": 37},
                attention_layers=6,
            ),
        ),
        layers=(),
        suggestion=Suggestion(accuracy_loss=0.005, smallest="onnx/compressed.fp32.onnx", fastest=(), left_out=()),
        files=(Listed(path="engines/trt-rtx/a.engine", bytes=6480000, sha256="e" * 64),),
    )


def typed(record):
    """The report that a JSON object is."""
    return Report.model_validate_json(json.dumps(record))
