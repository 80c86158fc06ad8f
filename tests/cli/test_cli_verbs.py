"""Every verb does what its help says, on a small model; `--json` is one document on stdout and nothing else."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
from contextlib import nullcontext
from dataclasses import replace
from importlib.metadata import version
from itertools import cycle
from pathlib import Path

import numpy as np
import onnx as onnxlib
import pytest
import torch
import typer
from builders import write_samples
from PIL import Image
from safetensors.torch import load_file, save_file

from toolchain.analysis import operators
from toolchain.analysis.operators import Profile
from toolchain.cli import bench, options
from toolchain.cli.pipeline import default_folder
from toolchain.cli.stages import _require_origin
from toolchain.errors import ParityError, StorageError, TargetUnavailable
from toolchain.export.precision import PRECISIONS
from toolchain.families.blocks import INSTEAD
from toolchain.pipeline.draft import Draft
from toolchain.plan import CompressionPlan
from toolchain.recipe import Recipe
from toolchain.report import files
from toolchain.surgery.load import digest_of_tensors
from toolchain.surgery.replay import load_model, save_model
from toolchain.targets import TARGETS, NodeTime, get_target

VERBS = [
    "run",
    "plan",
    "load",
    "compress",
    "finetune",
    "slice",
    "split",
    "export",
    "engine",
    "refit",
    "evaluate",
    "parity",
]
VERBS += [
    "bench",
    "gate",
    "inspect",
    "models",
    "targets",
    "doctor",
    "report",
    "manifest",
    "schema",
    "init",
    "shrink",
    "push",
]


@pytest.fixture
def parsed(command):
    """The JSON document that a call with --json prints."""

    def call(*arguments, code=0):
        outcome = command(*arguments, "--json")
        assert outcome.code == code, outcome.err
        return json.loads(outcome.out)

    return call


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the finished run that a test may change."""
    shutil.copytree(finished.folder, tmp_path / "copied")
    return tmp_path / "copied"


def bytes_of(path):
    return path.read_bytes()


# All of them


def test_every_verb_is_in_the_help(command):
    text = command("--help").out
    assert [verb for verb in VERBS if f"\n  {verb} " not in text] == []


@pytest.mark.parametrize(
    "verb",
    [
        *VERBS,
        "bench compare",
        "bench floor",
        "bench profile",
        "gate accept",
        "gate digest",
        "manifest verify",
        "manifest sbom",
    ],
)
def test_every_verb_has_help_and_json(command, verb):
    outcome = command(*verb.split(), "--help")
    assert (outcome.code, outcome.err) == (0, "")
    assert "--json" in outcome.out or verb in ("bench", "manifest")


def test_python_m_is_the_command():
    from toolchain import __main__, cli

    assert __main__.main is cli.main


# run, plan


def test_run_prints_what_a_hurried_reader_needs_first(command, finished, copied):
    outcome = command("report", copied)
    lines = outcome.out.splitlines()
    report = finished.report
    assert lines[0] == "Dense against compressed"
    top = "\n".join(lines[: lines.index("Stages")])
    for value in (
        f"{report['dense']['params']:,}",
        f"{report['compressed']['params']:,}",
        str(report["dense"]["wrong"]),
    ):
        assert value in top
    assert report["bench"][0]["summary"] in top
    assert str(copied / "report.html") in lines[lines.index("Report") + 1]
    following = [shlex.split(each, comments=True) for each in lines[lines.index("Next") + 1 :]]
    assert {tuple(words[:-1]) for words in following} == {
        ("slimvit", "inspect"),
        ("slimvit", "bench", "verify"),
        ("slimvit", "report"),
    }
    assert all(command(*words[1:]).code == 0 for words in following), "what is printed can be typed"
    assert lines.index("Stages") < lines.index("Parity")


@pytest.mark.parametrize("columns", [80, 100, 160])
def test_no_line_is_wider_than_the_terminal(command, copied, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TTY_COMPATIBLE", "1")  # rich takes stdout for a terminal
    out = command("report", copied).out
    report = json.loads((copied / "report.json").read_text())
    tables = [line for line in out.splitlines() if "\x1b" not in line and str(copied) not in line]
    assert max(map(len, tables)) <= columns
    assert "…" not in out
    words = " ".join(out.split())
    assert report["bench"][0]["summary"] in words, "the verdict reads in full, wrapped between words"
    for stage in report["stages"]:
        assert any(line.startswith(stage["name"]) and f"{stage['params']:,}" in line for line in tables)


def test_run_again_reuses_everything(command, finished, monkeypatch, tmp_path):
    monkeypatch.setenv("SLIMVIT_CACHE_DIR", str(finished.recipe.parent / "cache"))
    shutil.copytree(finished.folder, tmp_path / "again")
    outcome = command("run", finished.recipe, "--out", tmp_path / "again", "--json")
    assert outcome.code == 0, outcome.err
    assert [line for line in outcome.err.splitlines() if "kept from an earlier run" not in line] == []
    assert json.loads(outcome.out) == finished.report


@pytest.mark.slow
def test_run_json_is_the_report_and_progress_is_on_stderr(command, recipe, tmp_path):
    outcome = command("run", recipe, "--out", tmp_path / "out", "--require-speedup", "1.0", "--json")
    assert outcome.code == 4, outcome.err
    assert json.loads(outcome.out) == json.loads((tmp_path / "out" / "report.json").read_text())
    assert "onnx-compressed" in outcome.err
    assert "[bench]" in outcome.err.splitlines()[-1], "no speedup was measured"
    assert len(outcome.err.splitlines()) < 12, "without a terminal, progress does not spam"


def test_required_speedup(command, finished, copied, monkeypatch):
    monkeypatch.setenv("SLIMVIT_CACHE_DIR", str(finished.recipe.parent / "cache"))
    outcome = command("run", finished.recipe, "--out", copied, "--require-speedup", "1000", "--json")
    assert outcome.code == 4
    assert json.loads(outcome.out) == finished.report, "the report is there all the same"
    assert "1000" in outcome.err.splitlines()[-1]


@pytest.mark.parametrize("verb", ["evaluate", "parity", "export"])
def test_columns_are_named_where_there_is_no_recipe(command, finished, tmp_path, verb):
    datasets = pytest.importorskip("datasets")
    rows = {"image": [{"bytes": png(number), "path": None} for number in range(8)], "a": [0, 1] * 4, "b": [1, 0] * 4}
    classes = datasets.ClassLabel(names=["x", "y"])
    features = datasets.Features({"image": datasets.Image(), "a": classes, "b": classes})
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(tmp_path / "saved"))
    dense = finished.folder / "dense"
    more = {"parity": [dense], "export": ["--out", tmp_path / "x.onnx"]}.get(verb, [])
    line = verb, dense, *more, "--data", f"hf:{tmp_path / 'saved'}"
    for asked, words in (([], "to one of a, b"), (["--label-column", "c"], "no column 'c' of labels")):
        outcome = command(*line, *asked)
        assert (outcome.code, words in outcome.err) == (2, True), outcome.err


def png(seed):
    """The bytes of a small picture."""
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8), dtype=np.uint8)).save(stream, "png")
    return stream.getvalue()


def test_a_run_that_made_the_model_slower_ends_so(command, finished, copied, monkeypatch):
    """Kind: `slimvit run` in CI is green although the compressed model is slower than the dense one."""
    monkeypatch.setenv("SLIMVIT_CACHE_DIR", str(finished.recipe.parent / "cache"))
    record = next((copied / ".slimvit").glob("bench-*.json"))
    content = json.loads(record.read_text())
    content["facts"] |= {"verdict": "regressed", "ratio": {"point": 1.5, "lo": 1.4, "hi": 1.6}}
    record.write_text(json.dumps(content))
    outcome = command("run", finished.recipe, "--out", copied, "--json")
    assert outcome.code == 1
    assert json.loads(outcome.out)["bench"][0]["verdict"] == "regressed", "the report is there all the same"
    assert "the compressed model is slower than the dense one: ort-cpu, batch 1" in outcome.err.splitlines()[-1]


def test_dry_run_and_plan_are_one_thing_and_write_nothing(parsed, finished, tmp_path):
    planned = parsed("plan", finished.recipe)
    assert planned == parsed("run", finished.recipe, "--dry-run", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert planned == json.loads((finished.folder / "allocation.json").read_text())
    assert planned["predicted"]["params"] == finished.report["compressed"]["params"]


def test_plan_is_readable(command, finished):
    out = command("plan", finished.recipe).out
    assert f"{finished.report['compressed']['params']:,}" in out
    assert "blocks.1.attn.qkv" in out
    (row,) = [line.split() for line in out.splitlines() if line.startswith("params")]
    least = finished.report["compressed"]["params"] / finished.report["dense"]["params"]
    assert row[-2:] == ["…", "1"]
    assert 0 < float(row[-3]) < least <= 0.5, "the range that could be asked for"


def test_plan_tells_what_a_model_leaves_out(command, recipe):
    told = command("plan", recipe, "--shapes-only", "--set", "model.kwargs.qk_norm=true")
    assert told.code == 0, told.err
    said = " ".join(told.out.split())
    assert f"restriction: head dims are left alone because of a norm over the head dim of q and k{INSTEAD}" in said


@pytest.mark.slow
def test_a_plan_by_damage_says_when_it_comes(command, parsed, recipe):
    joint = ("--set", "compress.method=joint")
    first = command("plan", recipe, *joint)
    assert first.code == 0
    assert "`slimvit run` has not trained the baseline yet" in first.out.splitlines()[-1]
    assert "by measured damage" in command("plan", recipe, *joint, "--shapes-only").out.splitlines()[-1]
    assert "damage (nats per image)" not in first.out
    done = parsed("run", recipe, *joint, "--out", "out")
    assert 0.4 < done["ratio"]["params"] <= 0.5
    assert {rung["verdict"] for rung in done["parity"]} == {"pass"}
    assert {keep.unit for keep in CompressionPlan.load(Path("out/plan.json")).keeps} == {"mlp_hidden", "head_dim"}
    then = command("plan", recipe, *joint)
    assert (then.code, "note:" in then.out) == (0, False)
    assert "damage (nats per image)" in then.out
    found = json.loads(Path("out/allocation.json").read_text())
    assert parsed("plan", recipe, *joint) == found
    (total,) = [line for line in then.out.splitlines() if line.startswith("sum of these, each measured alone")]
    assert total.split()[-1] == f"{found['damage']:.3g}"
    report = json.loads(Path("out/report.json").read_text())
    chosen = report["closed_form"]
    tried = json.loads(Path("out/plan.json").read_text())["provenance"]["closed_form"]["kl"]
    assert chosen["kl"] == min(tried.values())
    shown = command("report", "out").out
    assert shown.index("Dense against compressed") < shown.index(f"Closed form: β = {chosen['beta']:g}")


def test_plan_shows_predicted_and_measured_latency(command, widths_timed, recipe):
    widths_timed()
    options = ("--set", "data.source=none", "--set", "budget.latency.ort-cpu=60%", "--set", "budget.params=1.0")
    lines = command("plan", recipe, *options).out.splitlines()
    (row,) = [line.split() for line in lines if line.startswith("ort-cpu, batch 1, 1 thread(s)")]
    assert row[5:7] == ["2.000", "ms"]
    assert 0.59 <= float(row[9]) <= 0.6
    assert any(line.strip().startswith("measured, these shapes") for line in lines)
    assert command("plan", recipe, *options, "--shapes-only").out.splitlines()[-1].startswith("note: latency budgets")


@pytest.mark.slow
def test_a_missed_latency_budget_is_told_everywhere(command, widths_timed, recipe):
    """An unsteady device: whole models are far too slow and far too fast by turns, whatever their widths."""
    answers = cycle([0.85, 0.74])
    widths_timed(lambda share, design: share if design.sessions == 1 else next(answers))
    options = ["--set", "data.source=none", "--set", "finetune.epochs=0"]
    options += ["--set", "budget.latency.ort-cpu=80%", "--set", "budget.params=1.0"]
    planned = command("plan", recipe, *options)
    assert "slimvit: warning: budget.latency.ort-cpu is missed" in planned.err
    assert "missed: 0.800 was asked for" in planned.out
    outcome = command("run", recipe, *options, "--out", "out")
    assert outcome.code == 0
    assert "slimvit: warning: budget.latency.ort-cpu is missed" in outcome.err
    lines = outcome.out.splitlines()
    told = [index for index, line in enumerate(lines) if "latency budget on ort-cpu is missed: 0.800" in line]
    assert told
    assert told[0] < lines.index("Dense against compressed")
    (row,) = json.loads(Path("out/allocation.json").read_text())["latency"]
    assert row["met"] is False
    assert json.loads(Path("out/report.json").read_text())["latency_budget"] == [row]


@pytest.mark.slow
def test_the_compress_verb_holds_a_latency_budget(parsed, widths_timed, recipe):
    widths_timed()
    options = ("--set", "data.source=none", "--set", "budget.latency.ort-cpu=60%", "--set", "finetune.epochs=0")
    parsed("run", recipe, *options, "--out", "run")
    parsed("compress", "run/dense", "--recipe", recipe, *options, "--out", "hand")
    for name in ("plan.json", "allocation.json"):
        assert Path("hand", name).read_bytes() == Path("run", name).read_bytes()


@pytest.mark.parametrize(
    ("path", "folder"),
    [("m/recipe.toml", "m"), ("m/recipe.vtp.toml", "m_vtp"), ("m/other.toml", "m_other")],
)
def test_recipes_of_one_folder_get_folders_of_their_own(tmp_path, path, folder):
    assert default_folder(tmp_path / path).as_posix() == f"runs/{folder}"


def test_a_run_takes_no_folder_of_another_project_unless_out_names_it(command, recipe, tmp_path, monkeypatch):
    def ends(*_):
        raise ParityError("that is far enough")

    monkeypatch.setattr("toolchain.pipeline.run._carry_out", ends)
    assert command("run", recipe).code == 3
    assert command("run", recipe, "--set", "budget.params=0.4").code == 3
    other = tmp_path / "other" / "tiny" / "recipe.toml"
    other.parent.mkdir(parents=True)
    shutil.copy(recipe, other)
    for dry in ([], ["--dry-run"]):
        outcome = command("run", other, *dry)
        assert (outcome.code, f"runs/tiny holds the run of another recipe, {recipe}" in outcome.err) == (74, True)
    assert command("run", other, "--out", "runs/tiny").code == 3
    assert command("run", other).code == 3
    assert command("run", recipe).code == 74


# The stages by hand


@pytest.mark.slow
def test_stages_by_hand_give_the_bytes_of_run(parsed, finished, tmp_path):
    where, run, option = tmp_path / "hand", finished.folder, ("--recipe", finished.recipe)
    parsed("load", finished.recipe, "--out", where / "dense")
    parsed("compress", where / "dense", *option, "--out", where / "masked")
    parsed("finetune", where / "masked", *option, "--teacher", where / "dense", "--out", where / "tuned")
    parsed("slice", where / "tuned", "--out", where / "sliced")
    facts = parsed("split", where / "sliced", "--out", where / "deploy")
    assert facts["params"] == finished.report["compressed"]["params"]
    assert facts["macs"] == finished.report["compressed"]["macs"]
    assert bytes_of(where / "masked" / "plan.json") == bytes_of(run / "plan.json")
    assert bytes_of(where / "masked" / "allocation.json") == bytes_of(run / "allocation.json")
    for ours, theirs in (("dense", "dense"), ("masked", "masked"), ("tuned", "finetuned"), ("deploy", "deploy")):
        for file in ("model.safetensors", "model.json"):
            assert bytes_of(where / ours / file) == bytes_of(run / theirs / file), (ours, file)
    for name, model in (("dense", "dense"), ("compressed", "deploy")):
        parsed("export", where / model, "--out", where / f"{name}.fp32.onnx")
        assert bytes_of(where / f"{name}.fp32.onnx") == bytes_of(run / "onnx" / f"{name}.fp32.onnx")


def test_export_in_another_precision(parsed, command, finished, tmp_path):
    deploy, fp32 = finished.folder / "deploy", finished.folder / "onnx" / "compressed.fp32.onnx"
    file = tmp_path / "small.onnx"
    facts = parsed("export", deploy, "--precision", "int8-qdq", "--data", "digits", "-o", file)
    assert (facts["precision"], facts["bytes"]) == ("int8-qdq", file.stat().st_size)
    assert len(facts["parity"]) == 5, "torch == ONNX, smoothed, weights, scales, logits"
    assert all(": pass" in rung for rung in facts["parity"])
    assert file.stat().st_size < 0.8 * fp32.stat().st_size, "most of so small a file is the graph"
    rung = parsed("parity", fp32, file, "--data", "digits")
    assert rung["verdict"] == "pass"
    assert rung["tolerance"]["cosine_min"] == 0.95, "what int8 may differ by"
    assert rung["top1_agreement"] >= 0.97
    assert command("parity", fp32, finished.folder / "onnx" / "dense.fp32.onnx", "--data", "digits").code == 3
    wrong = parsed("evaluate", file, "--data", "digits")["wrong"]
    assert abs(wrong - finished.report["compressed"]["wrong"]) < 20
    outcome = command("export", deploy, "--precision", "int3", "-o", tmp_path / "x.onnx")
    assert (outcome.code, "unknown precision 'int3'; did you mean" in outcome.err) == (2, True)
    outcome = command("export", deploy, "--precision", "int4, fp32", "-o", tmp_path / "x.onnx")
    assert outcome.code == 2
    assert "give --precision int4 and export again for each other" in outcome.err
    assert """--set 'export.precisions=["int4", "fp32"]'""" in outcome.err
    assert not (tmp_path / "x.onnx").exists()


@pytest.mark.parametrize(
    ("arguments", "takes"),
    [
        (("slice", "deploy"), "masked"),
        (("split", "masked"), "sliced"),
        (("export", "masked"), "dense or a deploy"),
        (("compress", "masked", "--recipe", "R"), "dense"),
        (("finetune", "dense", "--recipe", "R"), "masked"),
    ],
)
def test_a_stage_refuses_the_wrong_model(command, finished, tmp_path, arguments, takes):
    verb, folder, *rest = arguments
    rest = [finished.recipe if part == "R" else part for part in rest]
    out = tmp_path / ("x.onnx" if verb == "export" else "x")
    outcome = command(verb, finished.folder / folder, *rest, "--out", out)
    assert outcome.code == 3
    assert takes in outcome.err
    assert not out.exists()


@pytest.mark.parametrize("verb", ["compress", "finetune", "teacher"])
@pytest.mark.parametrize(
    ("override", "said"), [("model.kwargs.embed_dim=64", "embed_dim"), ("data.mean=[0.25]", "mean=(0.25,)")]
)
def test_a_stage_refuses_a_folder_of_another_recipe(command, finished, tmp_path, verb, override, said):
    run, other = finished.folder, tmp_path / "other"
    arguments = {
        "compress": ("compress", run / "dense", "--set", override),
        "finetune": ("finetune", run / "masked", "--teacher", run / "dense", "--set", override),
        "teacher": ("finetune", run / "masked", "--teacher", other),
    }
    if verb == "teacher":
        assert command("load", finished.recipe, "--out", other, "--set", override).code == 0
    outcome = command(*arguments[verb], "--recipe", finished.recipe, "--out", tmp_path / "x")
    assert outcome.code == 2, outcome.err
    assert "and the recipe differ in the" in outcome.err
    assert said in outcome.err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("verb", ["load", "compress", "finetune", "slice", "split"])
def test_a_stage_leaves_a_folder_of_the_users(command, finished, tmp_path, verb):
    run, mine = finished.folder, tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.tex").write_text("mine")
    recipe = ("--recipe", finished.recipe)
    given = {
        "load": (finished.recipe,),
        "compress": (run / "dense", *recipe),
        "finetune": (run / "finetuned", *recipe, "--teacher", run / "dense"),
        "slice": (run / "finetuned",),
        "split": (tmp_path / "sliced",),
    }
    assert command("slice", run / "finetuned", "--out", tmp_path / "sliced").code == 0
    outcome = command(verb, *given[verb], "--out", mine)
    assert outcome.code == 74
    assert "thesis.tex" in outcome.err
    assert [(path.name, path.read_text()) for path in mine.iterdir()] == [("thesis.tex", "mine")]


def test_engine_leaves_the_folder_of_its_onnx_file(command, copied):
    before = {path: bytes_of(path) for path in (copied / "onnx").iterdir()}
    outcome = command("engine", copied / "onnx" / "compressed.fp32.onnx", "--out", copied / "onnx")
    assert outcome.code == 74
    assert ".onnx" in outcome.err
    assert {path: bytes_of(path) for path in (copied / "onnx").iterdir()} == before


def test_finetune_wants_a_teacher_and_epochs(command, finished, tmp_path):
    arguments = ("finetune", finished.folder / "masked", "--recipe", finished.recipe, "--out", tmp_path / "x")
    outcome = command(*arguments)
    assert outcome.code == 2
    assert "--teacher" in outcome.err
    outcome = command(*arguments, "--set", "finetune.epochs=0")
    assert outcome.code == 2
    assert "finetune.epochs" in outcome.err


def test_finetune_refuses_a_teacher_that_was_not_compressed(command, finished, tmp_path):
    dense = load_model(finished.folder / "dense")
    with torch.no_grad():
        next(dense.module.parameters()).add_(1.0)
    other = save_model(dense, tmp_path / "other")
    masked = finished.folder / "masked"
    outcome = command("finetune", masked, "--recipe", finished.recipe, "--teacher", other, "--out", tmp_path / "x")
    assert outcome.code == 2, outcome.err
    assert "has other weights than the dense model that was compressed" in outcome.err
    assert not (tmp_path / "x").exists()


def test_the_same_weights_are_a_teacher_whoever_wrote_them(finished, tmp_path):
    dense, masked = load_model(finished.folder / "dense"), load_model(finished.folder / "masked")
    assert masked.plan.provenance["weights"]["dense_sha256"] == digest_of_tensors(dense.module)
    again = save_model(dense, tmp_path / "again")
    weights = load_file(again / "model.safetensors")
    save_file(weights, again / "model.safetensors", metadata={"format": "pt"})
    assert bytes_of(again / "model.safetensors") != bytes_of(finished.folder / "dense" / "model.safetensors")
    dense.module.load_state_dict(load_file(again / "model.safetensors"))
    _require_origin(masked, dense, again)


def test_engine_is_built_with_its_record(parsed, finished, tmp_path):
    try:
        get_target("trt-rtx").probe()
    except TargetUnavailable as error:
        pytest.skip(error.reason)
    onnx = finished.folder / "onnx" / "compressed.fp32.onnx"
    facts = parsed("engine", onnx, "--out", tmp_path / "e", "--compute-capability", "8.9", "--batch", "1", "2", "4")
    assert facts == json.loads((tmp_path / "e" / "engine.json").read_text())
    assert facts["compute_capabilities"] == ["8.9"]
    assert facts["profile"]["image"]["max"][0] == 4
    assert (tmp_path / "e" / facts["engine"]).stat().st_size == facts["size_bytes"] > 10_000
    assert parsed("inspect", tmp_path / "e" / "engine.json")["kind"] == "engine"
    foreign = onnxlib.load(onnx)
    foreign.ClearField("metadata_props")
    onnxlib.save_model(foreign, tmp_path / "foreign.onnx")
    again = parsed("engine", tmp_path / "foreign.onnx", "--out", tmp_path / "e", "--compute-capability", "8.9")
    assert [path.name for path in (tmp_path / "e").glob("*.engine")] == [again["engine"]]


@pytest.mark.skipif(torch.cuda.is_available(), reason="TensorRT may be there")
def test_engine_without_its_target(command, finished, tmp_path):
    onnx = finished.folder / "onnx" / "compressed.fp32.onnx"
    assert command("engine", onnx, "--out", tmp_path / "e", "--target", "trt").code == 5
    assert not (tmp_path / "e").exists()


# evaluate, parity, bench


@pytest.mark.parametrize(
    ("path", "part"),
    [("dense", "dense"), ("deploy", "compressed"), ("onnx/compressed.fp32.onnx", "compressed")],
)
def test_evaluate_counts_what_the_report_counts(parsed, finished, path, part):
    found = parsed("evaluate", finished.folder / path, "--data", "digits", "--out", "counts.json")
    assert json.loads(Path("counts.json").read_text()) == found
    assert {key: found[key] for key in ("accuracy", "wrong", "total")} == {
        key: finished.report[part][key] for key in ("accuracy", "wrong", "total")
    }


def test_evaluate_needs_labels_and_the_classes(command, finished):
    assert command("evaluate", finished.folder / "dense", "--data", "none").code == 2
    outcome = command("evaluate", finished.folder / "dense", "--data", "digits", "--split", "tests")
    assert outcome.code == 2
    assert "'tests'" in outcome.err


def test_parity_holds_and_breaks(parsed, finished):
    deploy, onnx = finished.folder / "deploy", finished.folder / "onnx" / "compressed.fp32.onnx"
    assert parsed("parity", deploy, onnx, "--data", "digits")["verdict"] == "pass"
    assert parsed("parity", finished.folder / "dense", onnx, code=3)["verdict"] == "fail"


def test_files_that_do_not_say_are_told_how_images_are_prepared(parsed, command, finished, tmp_path):
    """Kind: what slimvit did not write. Noise needs no preprocessing; images need two options, which the message names."""
    own = finished.folder / "onnx" / "compressed.fp32.onnx"
    model = onnxlib.load(own)
    del model.metadata_props[:]
    onnxlib.save(model, tmp_path / "theirs.onnx")
    theirs = tmp_path / "theirs.onnx"
    noise = parsed("parity", theirs, theirs)
    assert noise["verdict"] == "pass"
    assert any("theirs.onnx is fp32" in note for note in noise["notes"])
    refused = command("evaluate", theirs, "--data", "digits")
    assert refused.code == 3
    assert "--mean and --std" in refused.err
    options = ("--mean", "0.3053", "--std", "0.3760")
    assert command("evaluate", theirs, "--data", "digits", "--mean", "a,b").code == 2
    evaluated = parsed("evaluate", theirs, "--data", "digits", *options)
    assert evaluated["wrong"] == parsed("evaluate", own, "--data", "digits")["wrong"]
    assert "does not say how images are prepared" in evaluated["notes"][0]
    assert parsed("parity", theirs, own, "--data", "digits", "--cosine-min", "0.9")["tolerance"]["cosine_min"] == 0.9
    text = command("parity", theirs, theirs).out
    assert "theirs.onnx is fp32 (" in text


def test_bench_compare(parsed, command, finished, tmp_path):
    pair = [finished.folder / "onnx" / f"{name}.fp32.onnx" for name in ("dense", "compressed")]
    outcome = command("bench", "compare", *pair, "--out", tmp_path / "b.json", "--json")
    found = json.loads(outcome.out)
    assert outcome.code == {"regressed": 1, "invalid": 4, "inconclusive": 4}.get(found["verdict"], 0)
    keys = "verdict ratio verified_speedup_at_least control tau tau_min sessions blocks environment raw"
    assert set(keys.split()) <= set(found)
    assert set(found["ratio"]) == set(found["control"]) == {"point", "lo", "hi"}
    assert json.loads((tmp_path / "b.json").read_text()) == found
    told = command("bench", "compare", *pair, "--out", tmp_path / "c.json")
    written = json.loads((tmp_path / "c.json").read_text())
    assert set(written) == set(found)
    assert written["verdict"] in told.out
    assert not told.out.startswith("{")


@pytest.mark.parametrize(
    ("verdict", "code", "samples"),
    [
        ("regressed", 1, {"b": 0.3}),
        ("invalid", 4, {"control": 0.1}),
        ("improved", 0, {"b": -0.3}),
        ("pass", 0, {}),
        ("inconclusive", 4, {"session_shift": 0.1}),
    ],
)
def test_bench_compare_ends_with_the_code_of_its_verdict(capsys, verdict, code, samples):
    comparison = write_samples(**samples)
    with pytest.raises(typer.Exit) if code else nullcontext() as ended:
        bench.show_comparison(comparison, json_=True)
    assert json.loads(capsys.readouterr().out)["verdict"] == verdict
    assert (ended.value.exit_code if code else 0) == code


@pytest.mark.slow
def test_bench_run_calibrate_and_verify(parsed, command, finished, tmp_path):
    onnx = finished.folder / "onnx" / "compressed.fp32.onnx"
    found = parsed("bench", "run", onnx, "--blocks", 4, "--cold-starts", 1, "--out", tmp_path / "r.json")
    assert set(found["latency_ms"]) == {"point", "lo", "hi"}
    assert found["cold_start"]["processes"] == 1
    told = command("bench", "run", onnx, "--blocks", 4, "--cold-starts", 1).out
    assert "n/a (too few samples)" in told
    assert "samples/s at batch 1" in told
    (row,) = parsed("bench", "verify", tmp_path / "r.json", "--a", onnx, "--here")
    assert row["latency_ms"] == found["latency_ms"]
    assert (
        command("bench", "verify", tmp_path / "r.json", "--a", finished.folder / "onnx" / "dense.fp32.onnx").code == 3
    )
    pair = next((finished.folder / "bench").iterdir())
    assert finished.report["bench"][0]["summary"] in command("bench", "verify", pair).out
    (tmp_path / "r.json").write_text((tmp_path / "r.json").read_text().replace('"tau_min":', '"tau_max":'))
    refused = command("bench", "verify", pair, tmp_path / "r.json")
    assert (refused.code, refused.out) == (3, "")
    assert "altered" in refused.err
    told = command("bench", "calibrate", onnx)
    assert told.code == 0
    assert "Smallest τ" in told.out


@pytest.mark.slow
def test_json_writes_over_nothing(command, finished, tmp_path):
    onnx = tmp_path / "model.onnx"
    shutil.copy(finished.folder / "onnx" / "compressed.fp32.onnx", onnx)
    before = onnx.read_bytes()
    outcome = command("bench", "run", "--blocks", 4, "--cold-starts", 0, "--json", onnx)
    assert json.loads(outcome.out)["artifact"] == "model.onnx"
    assert onnx.read_bytes() == before
    results = [tmp_path / f"{name}.json" for name in "ab"]
    for path in results:
        command("bench", "run", onnx, "--blocks", 4, "--cold-starts", 0, "--out", path)
    texts = [path.read_text() for path in results]
    assert len(json.loads(command("bench", "verify", "--json", *results).out)) == 2
    assert [path.read_text() for path in results] == texts


def test_a_result_that_cannot_be_written_is_not_measured_again(command, finished, monkeypatch, tmp_path):
    def full(path, text):
        raise StorageError(f"cannot write {path}: no space is left")

    onnx, out = finished.folder / "onnx" / "compressed.fp32.onnx", tmp_path / "r.json"
    call, write = ("--verbose", "bench", "run", onnx, "--cold-starts", 0, "--out", out), options.write_text
    monkeypatch.setattr(options, "write_text", full)
    assert command(*call).code == 74
    monkeypatch.setattr(options, "write_text", write)
    again = command(*call)
    assert (again.code, again.err.count("was finished by an earlier run")) == (0, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("run", "x.onnx", "--affinity", "a"), "--affinity 'a' is not of the form 0,1"),
        (("run", "x.onnx", "--affinity", ""), "--affinity is empty, perhaps because a variable is not set"),
        (("run", "x.onnx"), "x.onnx"),
        (("compare", "a", "b", "--looks", "5"), "looks"),
        (("verify", "absent.json"), "absent.json"),
    ],
)
def test_bench_says_what_is_wrong(command, arguments, message):
    outcome = command("bench", *arguments)
    assert outcome.code in (2, 74)
    assert message in outcome.err


@pytest.mark.slow
def test_bench_floor(parsed, command, finished, tmp_path):
    files = [finished.folder / "onnx" / f"{name}.fp32.onnx" for name in ("dense", "compressed")]
    options = ("--sessions", "3", "--blocks", "4")
    text = command("bench", "floor", *files, *options, "--out", tmp_path / "f.json").out
    found = json.loads((tmp_path / "f.json").read_text())
    assert "of its limit" in command("bench", "verify", tmp_path / "f.json", "--a", files[0], "--b", files[1]).out
    macs = [found[letter]["macs"] for letter in "AB"]
    for file, name in zip(macs, ("dense", "compressed"), strict=True):  # one token passes the last of two blocks
        assert 0.5 < file / finished.report[name]["macs"] < 1
    assert found["realised"]["ideal"] == pytest.approx(macs[0] / macs[1])
    for words in ("of it realised", "Products of A, dense.fp32.onnx", "Products of B", "share of the limit"):
        assert words in text
    alone = parsed("bench", "floor", files[0], *options, "--out", tmp_path / "one.json")
    assert json.loads((tmp_path / "one.json").read_text()) == alone
    assert (alone["realised"], "B" in alone) == (None, False), "there is no second model"


def test_bench_profile(parsed, command, finished, monkeypatch):
    files = [finished.folder / "onnx" / f"{name}.fp32.onnx" for name in ("dense", "compressed")]
    found = parsed("bench", "profile", files[0], "--calls", "3")
    assert list(found) == ["A"]
    assert (found["A"]["name"], found["A"]["calls"]) == ("dense.fp32.onnx", 3)

    def made_up(path, *_, **__):
        nodes = [NodeTime(f"n{i}", op, 1e6 * (i + 1)) for i, op in enumerate(["Add", *["MatMul"] * 6])]
        return Profile(path.name, "ort-cpu", 1, 1, 30, tuple(nodes[: 7 if path == files[0] else 2]))

    monkeypatch.setattr(operators, "profile_operators", made_up)
    assert list(parsed("bench", "profile", *files)) == ["A", "B"]
    lines = [line.split() for line in command("bench", "profile", *files).out.splitlines()]
    assert lines[0][:6] == ["Costliest", "nodes", "of", "A,", "dense.fp32.onnx", "(ort-cpu,"]
    assert [line[0] for line in lines[3:8]] == ["n6", "n5", "n4", "n3", "n2"], "five, the costliest first"
    assert ["MatMul", "6", "27.000", "ms", "96.4", "%", "1", "2.000", "ms", "66.7", "%"] in lines


# inspect, models, targets, doctor


def test_inspect_knows_everything_that_a_run_writes(parsed, finished):
    run, report = finished.folder, finished.report
    assert parsed("inspect", run)["ratio"] == report["ratio"]
    deploy = parsed("inspect", run / "deploy")
    assert (deploy["kind"], deploy["params"]) == ("deploy model", report["compressed"]["params"])
    assert deploy["structure"]
    onnx = parsed("inspect", run / "onnx" / "dense.fp32.onnx")
    assert onnx["inputs"] == {"image": ["batch", 1, 8, 8]}
    assert onnx["bytes"] == report["dense"]["bytes"]
    assert parsed("inspect", run / "plan.json")["sha256"] == CompressionPlan.load(run / "plan.json").digest
    bench = next((run / "bench").iterdir())
    assert parsed("inspect", bench)["verdict"] == report["bench"][0]["verdict"]


@pytest.mark.parametrize(
    ("name", "content", "code", "words"),
    [
        ("no", None, 74, "there is no file or folder"),
        ("a.json", "{}", 3, "names no schema of slimvit's; give a plan, a report"),
        ("b.json", '{"schema": 5}', 3, "names no schema of slimvit's"),
        ("a.json", "{", 3, "a.json"),
        ("a.x", "", 3, "not one byte"),
        ("recipe.toml", "[model]\n", 3, "is read by `slimvit plan`"),
    ],
)
def test_inspect_refuses_the_rest(command, tmp_path, name, content, code, words):
    if content is not None:
        (tmp_path / name).write_text(content)
    outcome = command("inspect", tmp_path / name)
    assert outcome.code == code
    assert words in outcome.err
    assert "internal error" not in outcome.err


def test_inspect_takes_the_folder_of_an_engine(parsed, tmp_path):
    (tmp_path / "engine.json").write_text('{"schema": "slimvit.engine/1", "target": "trt-rtx"}')
    assert parsed("inspect", tmp_path) == {"kind": "engine", "target": "trt-rtx"}


def test_models(parsed):
    rows = {row["name"]: row for row in parsed("models", "vit_tiny_patch16_224")}
    assert rows["vit_tiny_patch16_224"]["support"] == "full"
    assert rows["vit_tiny_patch16_224"]["params"] == 5_717_416
    (cnn,) = parsed("models", "resnet18")
    assert cnn == {
        "name": "resnet18",
        "module": "resnet",
        "support": "refused",
        "reason": "no family is responsible for timm's resnet",
        "params": None,
    }


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("vit_tiny", "try 'vit_tiny*'"),
        ("PATCH16_224.AUGREG", "try '*patch16_224*'"),
        ("vit_smal_patch16_224", "did you mean 'vit_small_patch16_224'?"),
        ("qqqq", "try 'deit*'"),
    ],
)
def test_a_name_that_no_model_has_leads_to_one_that_some_have(command, pattern, words):
    outcome = command("models", pattern)
    assert outcome.code == 2
    assert words in outcome.err


def test_models_takes_the_tag_of_pretrained_weights(parsed):
    (row,) = parsed("models", "vit_tiny_patch16_224.augreg_in21k")
    assert (row["name"], row["support"]) == ("vit_tiny_patch16_224.augreg_in21k", "full")


def test_lines_that_install_are_told_whole(command, monkeypatch):
    """Kind: a line that is to be copied and that a table breaks, or that a sentence runs into."""
    install = f"python -m pip install {'x' * 200}"

    def missing():
        raise TargetUnavailable("ort-cpu", "it is not there", install)

    monkeypatch.setattr(TARGETS["ort-cpu"], "probe", missing)
    assert f"  ort-cpu: {install}\n" in command("targets").out
    assert f"unavailable: it is not there. Try: {install}\n" in command("doctor").out


def test_targets_and_doctor_agree(parsed):
    rows = {row["target"]: row["available"] for row in parsed("targets")}
    assert set(rows) == set(TARGETS)
    assert rows["ort-cpu"]
    facts = parsed("doctor")
    assert facts["torch"] == version("torch")
    for name, available in rows.items():
        assert facts[f"target {name}"].startswith("unavailable") is not available


# report, manifest, schema, init


def test_report_rewrites_the_same_pages(command, finished, copied):
    for name in ("report.md", "report.html"):
        (copied / name).unlink()
    assert command("report", copied).code == 0
    for name in ("report.md", "report.html"):
        assert bytes_of(copied / name) == bytes_of(finished.folder / name)


@pytest.mark.parametrize("several", [False, True])
def test_report_says_that_files_are_no_longer_those_that_it_speaks_of(command, finished, copied, several):
    folders = (finished.folder, copied) if several else (copied,)
    assert "not as in this report" not in command("report", *folders).err
    (copied / "damage.json").unlink(missing_ok=True)
    assert "not as in this report" not in command("report", *folders).err, "what is gone misleads nobody"
    (copied / "plan.json").write_text("{}")
    outcome = command("report", *folders)
    assert outcome.code == 0
    assert "To renew the report, repeat the run." in " ".join(outcome.err.split())
    assert f"{copied}: 1 file is not as in this report (plan.json)" in " ".join(outcome.err.split())


def test_report_reads_no_large_file_that_is_older_and_goes_on_past_one_that_cannot_be_read(
    command, copied, monkeypatch
):
    monkeypatch.setattr(files, "SMALL", 0)
    read = []

    def refused(path):
        read.append(path.name)
        raise StorageError(f"cannot read {path}: permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(files, "sha256", refused)
        os.utime(copied / "report.json", ns=(2 * 10**18, 2 * 10**18))
        assert command("report", copied).code == 0
        assert "plan.json" not in read
        os.utime(copied / "plan.json", ns=(2 * 10**18, 2 * 10**18))
        outcome = command("report", copied)
    assert outcome.code == 0
    assert "plan.json" in read
    assert "make it readable" in " ".join(outcome.err.split())


@pytest.mark.parametrize("content", ["{}", "[]", '{"schema": "slimvit.report/99"}'])
def test_report_of_another_schema(command, tmp_path, content):
    (tmp_path / "report.json").write_text(content)
    for verb in ("report", "inspect"):
        outcome = command(verb, tmp_path)
        assert outcome.code == 3
        assert "slimvit.report/2" in outcome.err


def test_manifest_holds_until_a_file_changes(parsed, command, copied):
    found = parsed("manifest", "verify", copied)
    assert found["wrong"] == []
    listed = {entry["path"] for entry in json.loads((copied / "manifest.json").read_text())["files"]}
    there = {path.relative_to(copied).as_posix() for path in copied.rglob("*") if path.is_file()}
    assert listed == {path for path in there if not path.startswith(".slimvit/")} - {"manifest.json"}
    content = bytearray(bytes_of(copied / "deploy" / "model.safetensors"))
    content[-1] ^= 1
    (copied / "deploy" / "model.safetensors").write_bytes(content)
    (copied / "plan.json").unlink()
    assert sorted(parsed("manifest", "verify", copied, code=3)["wrong"]) == ["deploy/model.safetensors", "plan.json"]
    assert "2 of" in command("manifest", "verify", copied).err


def test_a_bill_of_materials_is_printed_or_written(parsed, command, finished, tmp_path):
    bill = parsed("manifest", "sbom", finished.folder)
    assert bill["bomFormat"] == "CycloneDX"
    outcome = command("manifest", "sbom", finished.folder, "--out", tmp_path / "bom.json")
    assert (outcome.code, outcome.out) == (0, f"wrote {tmp_path / 'bom.json'}\n")
    assert json.loads((tmp_path / "bom.json").read_text()) == bill


def test_manifest_that_is_none(command, tmp_path):
    (tmp_path / "manifest.json").write_text("{}")
    outcome = command("manifest", "verify", tmp_path)
    assert outcome.code == 3
    assert "internal" not in outcome.err


@pytest.mark.parametrize("name", ["recipe", "plan"])
def test_schema(parsed, name):
    schema = parsed("schema", name)
    assert schema["additionalProperties"] is False
    assert "model" in schema["properties"]


def test_the_schema_of_a_recipe_names_what_is_registered(parsed, register):
    register(PRECISIONS, replace(PRECISIONS["fp16"], name="ours"))
    sections = parsed("schema", "recipe")["$defs"]
    assert {"fp32", "int8", *PRECISIONS} == set(sections["ExportSection"]["properties"]["precisions"]["items"]["enum"])
    assert "solver" in sections["CompressSection"]["properties"]["allocation"]["enum"]
    assert "trt-rtx" in sections["EngineSection"]["properties"]["targets"]["items"]["enum"]


def test_init_writes_a_recipe_that_fits_once(parsed, command, finished, tmp_path):
    path = tmp_path / "mine.toml"
    options = "--data", "digits", "--out", path
    assert parsed("init", finished.folder / "dense", *options) == {"path": str(path)}
    assert Recipe.load(path).compress.method == "joint"
    assert json.loads((tmp_path / "recipe.schema.json").read_text()) == parsed("schema", "recipe")
    assert parsed("plan", path, "--shapes-only")["ratio"]["params"] <= 0.5
    path.write_text("mine")
    assert command("init", finished.folder / "dense", *options).code == 74
    assert path.read_text() == "mine"


@pytest.mark.slow
def test_shrink_does_what_its_recipe_does(parsed, command, finished, tmp_path):
    once, again = tmp_path / "once", tmp_path / "again"
    line = "shrink", finished.folder / "dense", "--data", "digits", "--params", "0.6", "--set", "bench.targets=[]"
    outcome = command(*line, "--out", once)
    assert outcome.code == 0, outcome.err
    assert "recipe.toml" in outcome.out
    assert parsed("run", once / "recipe.toml", "--out", again)["ratio"]["params"] <= 0.6
    assert bytes_of(once / "plan.json") == bytes_of(again / "plan.json")
    (once / "recipe.toml").touch()
    assert parsed(*line, "--out", once)["ratio"]["params"] <= 0.6, "the same line takes up the same run"
    required = command(*line, "--out", once, "--require-speedup", "1.0")
    assert (required.code, "[bench]" in required.err) == (4, True)
    fresh = command(*line, "--out", once, "--no-resume")
    assert (fresh.code, "kept from an earlier run" in fresh.err) == (0, False)
    other = command(*line, "--macs", "0.5", "--out", once)
    assert other.code == 74
    assert "says something else" in other.err


def test_shrink_tells_what_it_would_do_and_does_nothing(parsed, finished, tmp_path):
    line = "shrink", finished.folder / "dense", "--data", "digits", "--params", "0.6", "--dry-run"
    assert parsed(*line, "--out", tmp_path / "out")["predicted"]["params"] > 0
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_shrink_limits_the_file_of_a_precision(command, parsed, finished, tmp_path):
    line = "shrink", finished.folder / "dense", "--data", "digits", "--set", "bench.targets=[]", "--out"
    (row,) = parsed(*line, tmp_path / "run", "--size", "fp16=40%")["size_budget"]
    assert (row["precision"], row["bytes"] <= row["requested"]) == ("fp16", True)
    assert "unknown precision 'int5'" in command(*line, tmp_path / "none", "--size", "int5=40%").err


@pytest.mark.parametrize(
    ("model", "code", "message"),
    [
        ("no/such/folder/here", 74, "there is no file or folder"),
        ("weights.pth", 74, "there is no file or folder weights.pth"),
        ("resnet_fifty", 2, "did you mean"),
        ("resnet50", 2, "is not supported"),
    ],
)
def test_shrink_of_what_is_no_model(command, model, code, message):
    outcome = command("shrink", model, "--data", "digits")
    assert outcome.code == code
    assert message in outcome.err
    assert not (Path.cwd() / "runs").exists()


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("./no.pth", "--data", "digits"), 74, "there is no file or folder ./no.pth"),
        (("deit_tiny_patch16_224", "--data", "no/pictures"), 2, "there is no folder no/pictures; give a folder"),
        (("deit_tiny_patch16_224", "--data", "a.jpg"), 2, "a.jpg is a file; give a folder of pictures"),
        (("deit_tiny_patch16_224", "--data", "digits", "--out", "a.jpg/run"), 74, "a.jpg is a file, so"),
        (("deit_tiny_patch16_224", "--data", "digits", "--params", "50"), 2, "--params is the share that is left, "),
        (("deit_tiny_patch16_224", "--data", "digits", "--macs", "0"), 2, "--macs is the share that is left, "),
        (("deit_tiny_patch16_224", "--data", "digits", "--size", "small"), 2, "'small' is neither a share"),
        (("deit_tiny_patch16_224", "--data", "digits", "--set", "bench.treads=2"), 2, "did you mean 'bench.threads'?"),
    ],
)
def test_shrink_refuses_what_it_can_before_it_opens_the_model(command, monkeypatch, words, code, message):
    monkeypatch.setattr(Draft, "of", lambda *given, **named: pytest.fail("the model was opened"))
    Path("a.jpg").touch()
    outcome = command("shrink", *words)
    assert (outcome.code, Path("runs").exists()) == (code, False)
    assert message in outcome.err


def test_a_command_that_is_suggested_can_be_copied_into_a_shell(command, finished):
    path = Path("a folder") / "mine ä.toml"
    told = command("init", finished.folder / "dense", "--data", "digits", "--out", path).out
    assert shlex.split(told.partition("next: ")[2]) == ["slimvit", "run", str(path)]


def test_a_file_that_was_not_named_is_offered(command):
    assert "write one as docs/ci.md shows, or name yours with --config" in command("gate").err
    folder = Path("run")
    folder.mkdir()
    (folder / "gate.toml").touch()
    assert "run is a folder, and no recipe lies in it; name a file" in command("plan", folder).err
    (folder / "mine.toml").touch()
    assert "run is a folder; did you mean run/mine.toml?" in command("plan", folder).err
    (folder / "recipe.toml").touch()
    outcome = command("plan", folder)
    assert outcome.code == 74
    assert "run is a folder; did you mean run/recipe.toml?" in outcome.err


def test_a_folder_that_is_no_source_says_how_it_is_one(command, finished):
    Path("pictures").mkdir()
    outcome = command("evaluate", finished.folder / "dense", "--data", "pictures")
    assert outcome.code == 2
    assert "write imagefolder:pictures if the folders in it are classes, or images:pictures" in outcome.err


# What an altered folder costs


@pytest.mark.parametrize(
    ("altered", "again"),
    [
        ("onnx/compressed.fp32.onnx", {"onnx-compressed"}),
        ("deploy/model.safetensors", {"deploy"}),
        ("masked/model.json", {"compress"}),
        ("report.json", set()),
    ],
)
def test_an_altered_file_makes_its_own_stage_run_again(command, finished, copied, monkeypatch, altered, again):
    """The stages after it find what they found before, for the repaired file has the bytes that it had."""
    monkeypatch.setenv("SLIMVIT_CACHE_DIR", str(finished.recipe.parent / "cache"))
    before = bytes_of(copied / altered)
    (copied / altered).write_bytes(before[:-1] + b"?")
    outcome = command("run", finished.recipe, "--out", copied)
    assert outcome.code == 0, outcome.err
    done = {line.split()[0] for line in outcome.err.splitlines() if line.endswith(" s")}
    assert done == again
    assert load_model(copied / "deploy").plan == load_model(finished.folder / "deploy").plan
    if altered != "report.json":
        assert bytes_of(copied / altered) == before


def test_touching_a_file_costs_nothing(command, finished, copied, monkeypatch):
    monkeypatch.setenv("SLIMVIT_CACHE_DIR", str(finished.recipe.parent / "cache"))
    (copied / "plan.json").touch()
    outcome = command("run", finished.recipe, "--out", copied)
    assert [line for line in outcome.err.splitlines() if line.endswith(" s")] == []


@pytest.mark.slow
def test_another_setting_runs_its_stage_and_the_following_ones(command, finished, copied, monkeypatch):
    monkeypatch.setenv("SLIMVIT_CACHE_DIR", str(finished.recipe.parent / "cache"))
    text = finished.recipe.read_text().partition("[bench]")[0]
    recipe = finished.recipe.with_name("changed.toml")
    recipe.write_text(text.replace("params = 0.5", "params = 0.7"))
    outcome = command("run", recipe, "--out", copied, "--set", "finetune.epochs=0")
    assert outcome.code == 0, outcome.err
    done = {line.split()[0] for line in outcome.err.splitlines() if line.endswith(" s")}
    assert done == {"compress", "deploy", "onnx-compressed"}
    assert not (copied / "finetuned").exists(), "what the earlier recipe wrote and this one does not is gone"
    report = json.loads((copied / "report.json").read_text())
    assert 0.5 < report["ratio"]["params"] <= 0.7
    assert not [entry for entry in report["files"] if "finetuned" in entry["path"]]
