"""Compression runs: what is recorded of them, what they depend on, and the dense models that they start from."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import references
import torch
from benching import Short, carry_out
from engine import picked
from kinds import KINDS
from kinds.compression import CompressionCell, best_try, unpack
from kinds.pair import PairCell
from pages.accuracy import page
from records import Record, Results
from suite import SUITES, Suite

from toolchain.data import open_source
from toolchain.data.transforms import Wanted
from toolchain.errors import ArtifactError, RecipeError
from toolchain.surgery.replay import load_model, save_model
from toolchain.training.evaluate import accuracy


def path_of(root: Path, name: str) -> Path:
    return Results(root / "results").path("tiny", name)


def record(root: Path, name: str) -> Record:
    found = Results(root / "results").read("tiny", name)
    assert found is not None
    return found


@pytest.mark.slow
def test_every_cell_is_recorded_with_what_it_takes_to_recompute_it(measured):
    suite = Suite.load(measured / "tiny.toml")
    assert sorted(each.cell for each in Results(measured / "results").all()) == sorted(c.name for c in suite.cells)
    dense, joint = record(measured, "dense.zero.tiny_s0"), record(measured, "joint.params0.5.zero.tiny_s0")
    assert dense.result["params"] == dense.result["dense"]["params"] == joint.result["dense"]["params"]
    assert 0.49 < joint.result["params"] / joint.result["dense"]["params"] <= 0.5
    assert dense.result["validation"]["kl"] == pytest.approx(0, abs=1e-9)
    assert joint.result["validation"]["kl"] > 0
    assert {share["kind"] for share in joint.result["pruned_shares"]} == {"head_dim", "mlp_hidden"}
    assert joint.result["epochs"] == {"gates": 0, "recovery": 0}
    assert not joint.result["labels"]
    assert set(joint.seconds) >= {"compress", "slice", "evaluate"}
    vtp = record(measured, "vtp.params0.7.zero.tiny_s0")
    assert vtp.result["epochs"] == {"gates": 1, "recovery": 0}
    assert vtp.result["labels"]
    assert str(measured) not in repr([dense, joint, vtp])


def test_the_recorded_outcomes_are_those_of_the_dense_model_on_disk(measured):
    model = load_model(measured / "work" / "references" / "tiny_s0")
    source = open_source("digits", Wanted((1, 8, 8), {}, calibration_images=64))
    found = accuracy(model.module, source.split("test"))
    wrong = ~unpack(record(measured, "dense.zero.tiny_s0").result["test"])
    assert wrong.tolist() == (found.predictions != found.labels).tolist()
    assert 0 < wrong.sum() < len(wrong)


def test_bits_that_were_altered_are_noticed(measured):
    packed = record(measured, "dense.zero.tiny_s0").result["test"]
    with pytest.raises(ValueError, match="the bits say"):
        unpack({**packed, "wrong": packed["wrong"] - 1})


def test_the_sweeps_best_try_is_taken_from_the_records(measured):
    tries = [record(measured, f"sweep-lr.lr{lr}.recovered.tiny_s0") for lr in ("1e-05", "0.001")]
    recovered = record(measured, "joint.params0.5.recovered.tiny_s0")
    best = min(tries, key=lambda each: each.result["validation"]["wrong"])
    assert tries[0].result["validation"]["wrong"] != tries[1].result["validation"]["wrong"]
    assert recovered.definition["recipe"]["finetune"]["lr"] == best.definition["tried"]["finetune.lr"]
    assert recovered.same_as == f"tiny/{best.cell}"  # and was not measured twice


def tried(lr, wrong, kl, test):
    result = {"validation": {"wrong": wrong, "total": 9, "kl": kl}, "test": {"wrong": test}}
    return Record("tiny", f"lr{lr}", "compression", "", {"tried": {"lr": lr}}, result, {})


def test_a_sweep_does_not_look_at_the_test_split():
    assert best_try([tried(1, 5, 0.2, 1), tried(2, 4, 0.3, 9), tried(3, 4, 0.1, 9)]).tried == {"lr": 3}


def test_a_sweep_over_seeds_counts_the_errors_of_all():
    records = [tried(1, 3, 0.2, 1), tried(2, 4, 0.2, 1), tried(1, 8, 0.4, 1), tried(2, 5, 0.4, 1)]
    found = best_try(records)
    assert (found.tried, found.wrong, found.total, found.seeds) == ({"lr": 2}, 9, 18, 2)
    assert found.kl == pytest.approx(0.3)


def test_records_hold_where_the_dense_model_lies_elsewhere(copied, capsys):
    shutil.rmtree(copied / "work")
    path_of(copied, "vtp.params0.7.zero.tiny_s0").unlink()
    assert carry_out(copied / "tiny.toml", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "5 of 6 cells are recorded" in out
    assert "train" in out  # what is missing needs a dense model of its own
    assert not (copied / "work").exists(), "and it is not trained to find that out"


def test_records_of_another_dense_model_than_the_one_here_are_measured_again(copied, capsys):
    folder = copied / "work" / "references" / "tiny_s0"
    model = load_model(folder)
    with torch.no_grad():
        next(model.module.parameters()).add_(1e-3)
    shutil.rmtree(folder)
    save_model(model, folder.with_name("other"))
    assert carry_out(copied / "tiny.toml", "--adopt", f"tiny_s0={folder.with_name('other')}") == 0
    assert carry_out(copied / "tiny.toml", "--dry-run") == 0
    assert "0 of 6 cells are recorded" in capsys.readouterr().out


def test_a_changed_definition_is_measured_again_and_nothing_else(copied, capsys):
    text = (copied / "tiny.toml").read_text()
    (copied / "tiny.toml").write_text(
        text.replace('"compress.vtp.epochs" = 1', '"compress.vtp.epochs" = 1, "compress.vtp.l1" = 0.01')
    )
    before = record(copied, "vtp.params0.7.zero.tiny_s0")
    assert carry_out(copied / "tiny.toml", "--dry-run") == 0
    out = capsys.readouterr().out
    assert "5 of 6 cells are recorded" in out
    assert [line.split()[-1] for line in out.splitlines() if "to do" in line] == ["vtp.params0.7.zero.tiny_s0"]
    assert record(copied, "vtp.params0.7.zero.tiny_s0") == before
    assert carry_out(copied / "tiny.toml") == 0
    after = record(copied, "vtp.params0.7.zero.tiny_s0")
    assert after.key != before.key
    assert after.definition["recipe"]["compress"]["vtp"]["l1"] == 0.01


def test_a_changed_sweep_makes_what_relies_on_it_to_do(copied, capsys):
    path_of(copied, "sweep-lr.lr0.001.recovered.tiny_s0").unlink()
    assert carry_out(copied / "tiny.toml", "--dry-run") == 0
    todo = [line.split()[-1] for line in capsys.readouterr().out.splitlines() if "to do" in line]
    joint = ["joint.params0.5.zero.tiny_s0", "joint.params0.5.recovered.tiny_s0"]
    assert todo == ["sweep-lr.lr0.001.recovered.tiny_s0", *joint]


def test_only_picks_cells_and_the_sweeps_that_they_rely_on(suite_file):
    suite = Suite.load(suite_file)
    assert [cell.name for cell in picked(suite, "dense*")] == ["dense.zero.tiny_s0"]
    names = [cell.name for cell in picked(suite, "joint*recovered*")]
    assert names == [
        "sweep-lr.lr1e-05.recovered.tiny_s0",
        "sweep-lr.lr0.001.recovered.tiny_s0",
        "joint.params0.5.recovered.tiny_s0",
    ]


def test_a_model_is_adopted_if_it_is_the_one(measured, tmp_path, capsys):
    folder, work = measured / "work" / "references" / "tiny_s0", tmp_path / "work"
    options, beside = ("--adopt", f"tiny_s0={folder}"), {"work": work, "results": tmp_path / "results"}
    assert carry_out(measured / "tiny.toml", *options, **beside) == 0
    suite = Suite.load(measured / "tiny.toml")
    ready = references.find(suite, "tiny", 0, work)
    mine = references.find(suite, "tiny", 0, measured / "work")
    assert ready.weights_sha256 == mine.weights_sha256
    assert ready.facts["test"] == mine.facts["test"]
    assert (ready.facts["trained"], mine.facts["trained"]) == ("adopted", "here")
    assert carry_out(measured / "tiny.toml", *options, **beside) == 2
    assert "holds a reference already" in capsys.readouterr().err


def test_another_model_is_not_adopted(measured, tmp_path):
    suite = Suite.load(measured / "tiny.toml")
    model = load_model(measured / "work" / "references" / "tiny_s0")
    object.__setattr__(model, "provenance", {**model.provenance, "trained_on": {"source": "none"}})
    save_model(model, tmp_path / "untrained")
    with pytest.raises(ArtifactError, match="training data"):
        references.adopt(suite, "tiny_s0", tmp_path / "untrained", tmp_path / "work")
    masked = next(path for path in (measured / "work" / "compressed").iterdir() if (path / "model.json").is_file())
    with pytest.raises(ArtifactError, match="stage is masked"):
        references.adopt(suite, "tiny_s0", masked, tmp_path / "work")
    with pytest.raises(RecipeError, match="no reference 'tiny_s1'"):
        references.adopt(suite, "tiny_s1", masked, tmp_path / "work")


def test_a_reference_that_was_altered_or_of_another_recipe_is_refused(copied):
    suite, folder = Suite.load(copied / "tiny.toml"), copied / "work" / "references" / "tiny_s0"
    facts = json.loads((folder / "reference.json").read_text())
    (folder / "reference.json").write_text(json.dumps({**facts, "recipe_sha256": "0"}))
    with pytest.raises(ArtifactError, match="another recipe"):
        references.find(suite, "tiny", 0, copied / "work")
    (folder / "reference.json").write_text(json.dumps(facts))
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ArtifactError, match="its record says"):
        references.find(suite, "tiny", 0, copied / "work")


@pytest.mark.parametrize("folder", sorted(references.SHIPPED.iterdir()), ids=lambda path: path.name)
def test_a_shipped_reference_is_the_one_that_the_records_name(folder, tmp_path):
    reference, _, seed = folder.name.rpartition("_s")
    suites = [Suite.load(path) for path in sorted(SUITES.glob("*.toml"))]
    suites = [each for each in suites if int(seed) in getattr(each.file.references.get(reference), "seeds", ())]
    results, recorded = Results(references.SHIPPED.parent / "results"), []
    for suite in suites:
        ready = references.find(suite, reference, int(seed), tmp_path)
        cells = [cell for cell in suite.cells if isinstance(cell, CompressionCell)]
        own = [cell for cell in cells if (cell.reference, cell.seed) == (reference, int(seed))]
        recorded += [record for cell in own if (record := results.read(suite.name, cell.name)) is not None]
        assert {each.result["weights_sha256"] for each in recorded} <= {ready.weights_sha256}
    assert recorded
    assert ready.weights.stat().st_size < 8e6


@pytest.mark.slow
class TestPairsOfRows:
    """Pairs of a suite's own rows: exported from the compression runs that they wait for."""

    @pytest.fixture
    def root(self, copied):
        with (copied / "tiny.toml").open("a") as file:
            file.write('\n[[cells]]\nkind = "pair"\npairs = [["dense", "joint.params0.5"]]\n')
        return copied

    def test_rows_are_exported_timed_and_stand_in_the_page(self, root):
        harness = Short()
        assert carry_out(root / "tiny.toml", harness=harness) == 0
        assert harness.timed == [["dense.onnx", "joint.params0.5.onnx"]]
        assert record(root, "dense--joint.params0.5").kind == "pair"
        text = page(Suite.load(root / "tiny.toml"), Results(root / "results"))["README.md"]
        assert re.search(r"\| `dense` → `joint.params0.5` \| ort-cpu \| \w+ \|", text)
        assert "Timed on: " in text

    def test_a_pair_waits_for_its_rows(self, root):
        suite = Suite.load(root / "tiny.toml")
        pair = suite.cells[-1]
        assert isinstance(pair, PairCell)
        waited = KINDS["pair"].waits_for(pair, suite)
        assert [cell.name for cell in waited] == ["dense.zero.tiny_s0", "joint.params0.5.zero.tiny_s0"]
