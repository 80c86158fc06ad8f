"""report.json from the facts that the stages recorded."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from toolchain.data import DataSource
from toolchain.files import sha256
from toolchain.outputs import WORDS, Output
from toolchain.plan import CompressionPlan
from toolchain.recipe import Recipe
from toolchain.report.artifacts import artifact_rows, engine_rows, int8_choices, layer_rows, suggestion

SCHEMA = "slimvit.report/1"
FIGURES = ("params", "macs", "bytes")
COUNTS = ("accuracy", "wrong", "total", "error")


def assemble(
    recipe: Recipe,
    tool: str,
    facts: Mapping[str, Mapping[str, Any]],
    plan: CompressionPlan,
    files: Sequence[Path],
    root: Path,
    source: DataSource,
    output: Output,
    lost: Mapping[str, str] = MappingProxyType({}),
) -> dict[str, Any]:
    """The report of a run.

    Args:
        recipe: what was asked for.
        tool: name and version of the program.
        facts: stage → what it recorded, in the order in which the stages ran.
        plan: what was decided, of which model, and how.
        files: everything that the stages wrote.
        root: the run's folder.
        source: the data that accuracy was counted on.
        output: what the model's outputs are.
        lost: target → why the rest of its cells was not measured.
    """
    stages, provenance = _stages(facts), plan.provenance
    dense, compressed = _shipped(facts, "dense"), _shipped(facts, "compressed")
    increase, reason = relative_error_increase(dense, compressed, output)
    artifacts = artifact_rows(facts)
    bench, duels = (
        [_bench_row(stage) for name, stage in facts.items() if name.startswith(kind)] for kind in ("bench-", "duel-")
    )
    int8 = int8_choices(duels, bench)
    return {
        "schema": SCHEMA,
        "tool": tool,
        "synthetic": source.synthetic,
        "model": {
            "name": plan.model.name,
            "kwargs": plan.model.kwargs,
            "checkpoint_sha256": provenance["weights"].get("checkpoint_sha256"),
        },
        "output": output,
        "data": source.identity,
        "method": provenance["method"],
        "requested_method": provenance["requested"],
        "budget": provenance["budget"],
        "latency_budget": facts["compress"].get("latency", []),
        "recipe_digest": recipe.digest,
        "stages": stages,
        "dense": dense,
        "compressed": compressed,
        "ratio": {name: compressed[name] / dense[name] for name in FIGURES},
        "relative_error_increase": increase,
        "relative_error_increase_reason": reason,
        "finetune": _finetune(facts),
        "pruned_shares": facts["compress"]["pruned_shares"],
        "closed_form": closed_form(provenance.get("closed_form", {})),
        "limits": list(facts["compress"].get("limits", ())),
        "notes": [*provenance["weights"].get("notes", ()), *source.notes],
        "parity": [rung for stage in facts.values() for rung in stage.get("parity", ())],
        "graphs": {name.removeprefix("onnx-"): stage["graph"] for name, stage in facts.items() if "graph" in stage},
        "bench": bench,
        "not_measured": [{"target": name, "reason": reason} for name, reason in lost.items()],
        "int8": int8,
        "artifacts": artifacts,
        "engines": engine_rows(facts),
        "layers": layer_rows(facts),
        "suggestion": suggestion(artifacts, bench, recipe.export.accuracy_loss, int8),
        "files": listing(files, root),
    }


def relative_error_increase(
    dense: Mapping[str, Any], compressed: Mapping[str, Any], output: Output = "logits"
) -> tuple[float | None, str | None]:
    """((1 − acc_c)/(1 − acc_dense) − 1, None), or (None, why there is no such number)."""
    if dense["total"] is None or compressed["total"] is None:
        return (
            None,
            "the data has no labels"
            if output == "logits"
            else f"the outputs are {WORDS[output]}, and labels are not read",
        )
    if dense["wrong"] == 0:
        return None, f"the dense model makes no error on {dense['total']} images"
    error_dense, error = dense["wrong"] / dense["total"], compressed["wrong"] / compressed["total"]
    return error / error_dense - 1, None


def _stages(facts: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row per form of the model, in order; the ONNX file has no count of parameters of its own."""
    rows = []

    def row(name: str, found: Mapping[str, Any], seconds: float | None) -> None:
        keys = (*FIGURES, *COUNTS)
        rows.append({"name": name, **{key: found.get(key) for key in keys}, "seconds": seconds})

    for stage, name in (("dense", "dense"), ("compress", "compressed"), ("finetune", "finetuned")):
        if stage in facts:
            row(name, facts[stage], facts[stage]["seconds"])
    deploy = facts["deploy"]
    row("sliced", deploy["sliced"], None)
    row("split", deploy, deploy["seconds"])
    onnx = facts["onnx-compressed"]
    row("onnx", {**{key: deploy[key] for key in ("params", "macs")}, **onnx}, onnx["seconds"])
    return rows


def closed_form(found: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the closed form chose, and the divergence that it chose it by; None if there was none.

    The divergence is None where the model's output was not finite.
    """
    if not found:
        return None
    best = found["kl"][f"{found['beta']}{' head' if found['head_refitted'] else ''}"]
    finite = best is not None and math.isfinite(best)
    return {"beta": found["beta"], "head_refitted": found["head_refitted"], "kl": best if finite else None}


def _finetune(facts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any] | None:
    """What fine-tuning learned from, how validation judged it, and which model it kept; None if there was none."""
    return dict(facts["finetune"]["found"]) if "finetune" in facts else None


def _shipped(facts: Mapping[str, Mapping[str, Any]], which: str) -> dict[str, Any]:
    """Params and MACs of a model, bytes and accuracy of the ONNX file that ships it."""
    model = facts["dense" if which == "dense" else "deploy"]
    onnx = facts[f"onnx-{which}"]
    return {
        "params": model["params"],
        "macs": model["macs"],
        "bytes": onnx["bytes"],
        **{key: onnx.get(key) for key in COUNTS},
    }


def _bench_row(stage: Mapping[str, Any]) -> dict[str, Any]:
    keys = ("target", "batch", "threads", "dense_ms", "compressed_ms", "ratio", "control", "tau", "tau_min")
    more = ("verified_speedup_at_least", "verdict", "environment", "summary")
    return {"precision": stage.get("precision", "fp32"), **{key: stage[key] for key in (*keys, *more)}}


def listing(files: Iterable[Path], root: Path) -> list[dict[str, Any]]:
    """Path below the root, size and digest of each file, sorted by path."""
    return [
        {"path": file.relative_to(root).as_posix(), "bytes": file.stat().st_size, "sha256": sha256(file)}
        for file in sorted(files)
    ]
