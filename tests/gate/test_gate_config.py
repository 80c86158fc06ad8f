"""gate.toml: what is refused, in words that name the fix; baselines by digest."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import numpy as np
import pytest
from builders import write_classifier

from toolchain.artifacts import open_artifact
from toolchain.devices.device import Devices
from toolchain.errors import BaselineError, RecipeError, StorageError
from toolchain.gate.baselines import require_baselines
from toolchain.gate.config import MEASURED, BudgetSection, GateConfig, ParityBounds, RelationSection
from toolchain.gate.metrics import METRICS
from toolchain.gate.starts import COSTS
from toolchain.parity import compare_outputs

CELL = {"name": "digits", "artifact": "new.onnx", "budget": {"size": "1 MB"}}


def load(tmp_path, **changes):
    return GateConfig.from_dict({"cell": [{**CELL, **changes}]}, tmp_path)


def test_units_are_read_and_paths_are_relative_to_the_file(tmp_path):
    (tmp_path / "ci").mkdir()
    gate = tmp_path / "ci" / "gate.toml"
    gate.write_text(
        '[data]\nsource = "imagefolder:images"\nclasses = "classes.json"\n[baseline.old]\npath = "old.onnx"\nsha256 = "'
        + "0" * 64
        + '"\n'
        '[[cell]]\nname = "a"\nartifact = "../new.onnx"\nbaseline = "old"\n'
        'budget = { size = "1.5 MB", latency = "800 us", accuracy = 0.9 }\nrelation = { parity = "fp32", latency = 0.1 }\n'
    )
    config = GateConfig.load(gate)
    (cell,) = config.cell
    assert cell.artifact == str(tmp_path / "new.onnx")
    assert config.baseline["old"].path == str(tmp_path / "ci" / "old.onnx")
    assert config.data.source == f"imagefolder:{tmp_path / 'ci' / 'images'}"
    assert config.data.classes == str(tmp_path / "ci" / "classes.json")
    assert (cell.budget.size, cell.budget.latency) == (1_500_000, pytest.approx(0.8))
    assert cell.relation.parity.max_abs == 1e-5
    assert cell.checks == ("budget.size", "budget.accuracy", "budget.latency", "relation.parity", "relation.latency")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budget": {"siz": 1}}, "did you mean 'cell.0.budget.size'"),
        ({"artefact": "x"}, "did you mean 'cell.0.artifact'"),
        ({"budget": {}}, "checks nothing"),
        ({"relation": {"size": 0.1}}, "names no baseline"),
        ({"baseline": "old"}, "unknown baseline 'old'"),
        ({"target": "ort-cpuu"}, "did you mean 'ort-cpu'"),
        ({"budget": {"size": "50%"}}, "is a share"),
        ({"budget": {"size": 0}}, "greater than or equal to 1"),
        ({"budget": {"latency": 8.0}}, "has no unit"),
        ({"budget": {"latency": "50%"}}, "is a share"),
        ({"budget": {"accuracy": 1.2}}, "write 0.012 or '1.2%'"),
        ({"budget": {"accuracy": 97}}, "write 0.97 or '97%'"),
        ({"budget": {"accuracy": "most"}}, "write one like 0.02 or '2%'"),
        ({"budget": {"size": "8 MiB"}}, "1 MiB is 1.048576 MB"),
        ({"budget": {"latency": "8 min"}}, "in us, ms or s"),
        ({"artifact": ""}, "is empty, perhaps because a variable"),
        ({"budget": {"accuracy": 0.9}}, "set data.source"),
        ({"relation": {"parity": "fp23"}}, "unknown parity tolerance 'fp23'"),
        ({"relation": {"latency": 0.0}}, "greater than 0"),
        ({"name": ""}, "is no name of a cell; begin with a letter, a digit or _, and"),
        ({"name": "-rf"}, "is no name of a cell; begin with a letter, a digit or _, and"),
        ({"required": 1}, "valid boolean"),
        ({"threads": 2, "affinity": [0]}, "2 threads, but affinity allows 1 core ([0])"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path, changes, words):
    with pytest.raises(RecipeError) as refused:
        load(tmp_path, **changes)
    assert words in str(refused.value)


def test_top1_on_noise_is_refused(tmp_path):
    cell = {**CELL, "baseline": "old", "relation": {"parity": {"top1_min": 0.9}}}
    raw = {"baseline": {"old": {"path": "old.onnx", "sha256": "0" * 64}}, "cell": [cell]}
    with pytest.raises(RecipeError, match="noise has no classes"):
        GateConfig.from_dict(raw, tmp_path)
    assert GateConfig.from_dict({**raw, "data": {"source": "digits"}}, tmp_path).data.source == "digits"


def test_a_parity_without_any_bound_is_refused(tmp_path):
    cell = {**CELL, "baseline": "old", "relation": {"parity": {"cosine_min": -1}}}
    raw = {"baseline": {"old": {"path": "old.onnx", "sha256": "0" * 64}}, "cell": [cell]}
    with pytest.raises(RecipeError, match="parity has no bound"):
        GateConfig.from_dict(raw, tmp_path)
    cell["relation"]["parity"]["max_abs"] = 1e-3
    assert GateConfig.from_dict(raw, tmp_path).cell[0].relation.parity.max_abs == 1e-3


def test_shares_may_be_written_in_per_cent(tmp_path):
    cell = {**CELL, "baseline": "old", "budget": {"accuracy": "97%"}, "relation": {"size": "1 %", "latency": "5%"}}
    baseline = {"old": {"path": "old.onnx", "sha256": "0" * 64}}
    (read,) = GateConfig.from_dict({"data": {"source": "digits"}, "baseline": baseline, "cell": [cell]}, tmp_path).cell
    assert (read.budget.accuracy, read.relation.size, read.relation.latency) == (0.97, 0.01, 0.05)


def test_a_target_is_not_another_one_of_its_name_than_that_beside_the_gate(tmp_path, monkeypatch):
    """Paths are relative to gate.toml; the user's own targets.toml may have the same name with other threads."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "user"))
    for folder, threads in (("user/slimvit", 1), ("ci", 2)):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "targets.toml").write_text(f'[board]\ntransport = "local"\nthreads = {threads}\n')
    raw = {"cell": [{**CELL, "target": "board"}]}
    read = GateConfig.from_dict(raw, tmp_path / "ci")
    assert read.settings(read.cell[0]).threads == 2, "that beside the gate"
    read = GateConfig.from_dict(raw, tmp_path)
    assert read.settings(read.cell[0]).threads == 1, "that of the user, as there is none beside it"
    read = GateConfig.from_dict(raw, tmp_path, tmp_path / "ci" / "targets.toml")
    assert read.settings(read.cell[0]).threads == 2, "the one that is named"


def test_a_target_that_is_named_nowhere_is_told_with_the_file_to_name_it_in(tmp_path, monkeypatch):
    """Kind: gate.toml in ci/, run from the root of the repository, where another targets.toml lies."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "user"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "targets.toml").write_text('[board]\ntransport = "local"\n')
    with pytest.raises(RecipeError, match=r"unknown target 'board'.* named in ci/targets\.toml"):
        GateConfig.from_dict({"cell": [{**CELL, "target": "board"}]}, Path("ci"))


@pytest.mark.parametrize("named", [False, True])
def test_a_gate_is_judged_on_the_target_beside_it(tmp_path, monkeypatch, named):
    """Kind: an ssh configuration beside targets.toml, which is relative where gate.toml is."""
    monkeypatch.chdir(tmp_path)
    text = '[board]\ntransport = "ssh"\nhost = "h"\nssh_config = "ssh.conf"\n'
    (tmp_path / "targets.toml").write_text(text)
    raw = {"cell": [{**CELL, "target": "board"}]}
    read = GateConfig.from_dict(raw, tmp_path, tmp_path / "targets.toml" if named else None)
    with Devices() as devices:
        assert devices.get("board", read.settings(read.cell[0])).measurer is not None
    assert read.settings(read.cell[0]).ssh_config == tmp_path / "ssh.conf"


def test_latency_on_what_only_bundles_reach_is_refused(tmp_path):
    (tmp_path / "targets.toml").write_text('[board]\ntransport = "bundle"\n')
    raw = {"cell": [{**CELL, "target": "board"}]}
    assert GateConfig.from_dict(raw, tmp_path, tmp_path / "targets.toml").cell[0].target == "board", (
        "size needs no board"
    )
    raw["cell"][0]["budget"] = {"latency": "1 ms"}
    with pytest.raises(RecipeError, match="reached by bundles alone"):
        GateConfig.from_dict(raw, tmp_path, tmp_path / "targets.toml")


def test_an_empty_gate_is_refused(tmp_path):
    for raw in ({}, {"cell": []}):
        with pytest.raises(RecipeError, match="always be green"):
            GateConfig.from_dict(raw, tmp_path)
    with pytest.raises(RecipeError, match="two cells have the name 'digits'"):
        GateConfig.from_dict({"cell": [CELL, CELL]}, tmp_path)
    with pytest.raises(RecipeError, match=r"did you mean 'cell'"):
        GateConfig.from_dict({"cells": [CELL]}, tmp_path)
    with pytest.raises(StorageError, match=r"no\.toml"):
        GateConfig.load(tmp_path / "no.toml")
    (tmp_path / "bad.toml").write_text("[[cell")
    with pytest.raises(RecipeError, match="not valid TOML"):
        GateConfig.load(tmp_path / "bad.toml")


def with_baseline(tmp_path, path, sha256):
    raw = {"baseline": {"old": {"path": str(path), "sha256": sha256}}, "cell": [{**CELL, "baseline": "old"}]}
    return GateConfig.from_dict(raw, tmp_path)


def test_a_baseline_is_the_named_artifact_or_nothing_is_judged(tmp_path):
    old = write_classifier(tmp_path / "old.onnx")
    digest = hashlib.sha256(old.read_bytes()).hexdigest()
    require_baselines(with_baseline(tmp_path, old, digest))
    with pytest.raises(BaselineError, match=f"has sha256 {digest}, the gate names {'0' * 64}") as wrong:
        require_baselines(with_baseline(tmp_path, old, "0" * 64))
    assert wrong.value.exit_code == 6
    with pytest.raises(BaselineError, match="fetch it before"):
        require_baselines(with_baseline(tmp_path, tmp_path / "gone.onnx", digest))
    with pytest.raises(RecipeError, match="gate digest"):
        with_baseline(tmp_path, old, digest[:12])


def test_the_digest_covers_every_file_that_ships(tmp_path):
    path = write_classifier(tmp_path / "a" / "m.onnx", external=True)
    data = path.with_name("m.onnx.data")
    whole = open_artifact(path).sha256
    assert whole == open_artifact(path.parent).sha256, (
        "an ONNX file with its data is the folder that holds nothing else"
    )
    config = with_baseline(tmp_path, path, whole)
    require_baselines(config)
    data.write_bytes(data.read_bytes()[:-1] + b"\x01")
    with pytest.raises(BaselineError):
        require_baselines(config)
    data.unlink()
    with pytest.raises(BaselineError, match="cannot be read"):
        require_baselines(config)


def test_the_digest_of_a_folder_is_that_of_sha256sum(tmp_path):
    folder = tmp_path / "model"
    for name in ("b", "a/z", "a.b", ".hidden"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    command = r"find . -type f -printf '%P\n' | LC_ALL=C sort | xargs sha256sum | sha256sum | cut -d' ' -f1"
    found = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, check=True)
    assert open_artifact(folder).sha256 == found.stdout.strip()


def test_one_cell_and_one_check_can_be_taken_out(tmp_path):
    raw = {"cell": [CELL, {**CELL, "name": "other", "budget": {"size": 5, "nodes": 3}}]}
    config = GateConfig.from_dict(raw, tmp_path)
    assert config.only("other", "budget.nodes").cell[0].checks == ("budget.nodes",)
    with pytest.raises(RecipeError, match="did you mean 'other'"):
        config.only("othr")
    with pytest.raises(RecipeError, match=r"has no check 'budget\.params'"):
        config.only("other", "budget.params")


def test_every_key_of_a_budget_or_relation_is_a_check():
    """Kind: a key that is read and judged by nothing."""
    keys = {*BudgetSection.model_fields, *RelationSection.model_fields}
    assert keys == {*METRICS, *COSTS, "parity", "features", "latency"}
    assert {*COSTS, "latency"} == {*MEASURED}


@pytest.mark.parametrize("bounds", [{"error": 1.0}, {"error": 0.0}, {"cosine": 0.0}, {"cosine": -0.5}, {}])
def test_a_bound_on_features_that_cannot_fail_is_refused(bounds, tmp_path):
    cell = {**CELL, "baseline": "dense", "relation": {"features": bounds}}
    baseline = {"dense": {"path": "a.onnx", "sha256": "0" * 64}}
    raw = {"data": {"source": "images:p"}, "baseline": baseline, "cell": [cell]}
    with pytest.raises(RecipeError, match=r"features\.?(error|cosine)?"):
        GateConfig.from_dict(raw, tmp_path)
    cell["relation"] = {"features": {"error": 0.3, "cosine": 0.9}}
    assert GateConfig.from_dict(raw, tmp_path).cell[0].relation.features.error == 0.3


def test_a_bound_on_the_cosine_sees_classes_that_trade_places_under_what_all_have_in_common():
    tolerance = ParityBounds(cosine_min=0.99).tolerance
    logits = np.random.default_rng(0).standard_normal((16, 10)) + 1000
    others = logits[:, [1, 0, *range(2, 10)]]
    same, traded = (
        compare_outputs("a", "b", [logits], [z], tolerance=tolerance, real_images=False) for z in (logits, others)
    )
    assert (same.verdict, traded.verdict) == ("pass", "fail")
    assert traded.cosine_min > 0.9999
