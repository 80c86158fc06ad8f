from __future__ import annotations

import fcntl
import json
import shutil
from pathlib import Path

import cells
import pytest
import references
import run
import torch
from records import Results, best_try, unpack
from suite import Suite

from toolchain.data import open_source
from toolchain.errors import ArtifactError, RecipeError
from toolchain.surgery.replay import load_model, save_model
from toolchain.training.evaluate import accuracy


@pytest.fixture
def copy(measured, tmp_path) -> Path:
    """A copy of the measured folder that a test may change."""
    return Path(shutil.copytree(measured, tmp_path / "copy"))


def arguments(root: Path, *more: str) -> list[str]:
    return [str(root / "tiny.toml"), "--work", str(root / "work"), "--results", str(root / "results"), *more]


def record(root: Path, name: str) -> dict:
    return json.loads((root / "results" / "tiny" / f"{name}.json").read_text())


def refuse(*_args, **_kwargs):
    raise AssertionError("a cell was measured that need not be")


def test_every_cell_is_recorded_with_what_it_takes_to_recompute_it(measured):
    suite = Suite.load(measured / "tiny.toml")
    assert sorted(path.stem for path in (measured / "results" / "tiny").iterdir()) == sorted(
        c.name for c in suite.cells
    )
    dense, joint = record(measured, "dense.zero.tiny_s0"), record(measured, "joint.params0.5.zero.tiny_s0")
    assert dense["params"] == dense["dense"]["params"] == joint["dense"]["params"]
    assert 0.49 < joint["params"] / joint["dense"]["params"] <= 0.5
    assert dense["validation"]["kl"] == pytest.approx(0, abs=1e-9)
    assert joint["validation"]["kl"] > 0
    assert {share["kind"] for share in joint["pruned_shares"]} == {"head_dim", "mlp_hidden"}
    assert joint["epochs"] == {"gates": 0, "recovery": 0}
    assert not joint["labels"]
    assert set(joint["seconds"]) >= {"compress", "slice", "evaluate"}
    vtp = record(measured, "vtp.params0.7.zero.tiny_s0")
    assert vtp["epochs"] == {"gates": 1, "recovery": 0}
    assert vtp["labels"]
    assert str(measured) not in json.dumps([dense, joint, vtp])


def test_the_recorded_outcomes_are_those_of_the_dense_model_on_disk(measured):
    model = load_model(measured / "work" / "references" / "tiny_s0")
    source = open_source("digits", input_size=(1, 8, 8), data_config={}, calibration_images=64)
    found = accuracy(model.module, source.split("test"))
    wrong = ~unpack(record(measured, "dense.zero.tiny_s0")["test"])
    assert wrong.tolist() == (found.predictions != found.labels).tolist()
    assert 0 < wrong.sum() < len(wrong)


def test_bits_that_were_altered_are_noticed(measured):
    packed = record(measured, "dense.zero.tiny_s0")["test"]
    with pytest.raises(ValueError, match="the bits say"):
        unpack({**packed, "wrong": packed["wrong"] - 1})


def test_the_sweeps_best_try_is_taken_from_the_records(measured):
    tries = [record(measured, f"sweep-lr.lr{lr}.recovered.tiny_s0") for lr in ("1e-05", "0.001")]
    recovered = record(measured, "joint.params0.5.recovered.tiny_s0")
    best = min(tries, key=lambda each: each["validation"]["wrong"])
    assert tries[0]["validation"]["wrong"] != tries[1]["validation"]["wrong"]
    assert recovered["definition"]["recipe"]["finetune"]["lr"] == best["tried"]["finetune.lr"]
    assert recovered["same_as"] == f"tiny/{best['cell']}"  # and was not measured twice


def tried(lr, wrong, kl, test):
    return {"tried": {"lr": lr}, "validation": {"wrong": wrong, "total": 9, "kl": kl}, "test": {"wrong": test}}


def test_a_sweep_does_not_look_at_the_test_split():
    assert best_try([tried(1, 5, 0.2, 1), tried(2, 4, 0.3, 9), tried(3, 4, 0.1, 9)]).tried == {"lr": 3}


def test_a_sweep_over_seeds_counts_the_errors_of_all():
    records = [tried(1, 3, 0.2, 1), tried(2, 4, 0.2, 1), tried(1, 8, 0.4, 1), tried(2, 5, 0.4, 1)]
    found = best_try(records)
    assert (found.tried, found.wrong, found.total, found.seeds) == ({"lr": 2}, 9, 18, 2)
    assert found.kl == pytest.approx(0.3)


def test_finished_cells_are_not_measured_again(copy, monkeypatch, capsys):
    monkeypatch.setattr(cells, "measure", refuse)
    assert run.main(arguments(copy)) == 0
    assert "6 of 6 cells are recorded; the rest is predicted to take 0.00 hours" in capsys.readouterr().out


def test_records_hold_where_the_dense_model_lies_elsewhere(copy, monkeypatch, capsys):
    shutil.rmtree(copy / "work")
    (copy / "results" / "tiny" / "vtp.params0.7.zero.tiny_s0.json").unlink()
    monkeypatch.setattr(references, "get", refuse)
    assert run.main(arguments(copy, "--dry-run")) == 0
    out = capsys.readouterr().out
    assert "5 of 6 cells are recorded" in out
    assert "train" in out  # what is missing needs a dense model of its own


def test_records_of_another_dense_model_than_the_one_here_are_measured_again(copy, capsys):
    folder = copy / "work" / "references" / "tiny_s0"
    model = load_model(folder)
    with torch.no_grad():
        next(model.module.parameters()).add_(1e-3)
    shutil.rmtree(folder)
    save_model(model, folder.with_name("other"))
    assert run.main(arguments(copy, "--adopt", f"tiny_s0={folder.with_name('other')}")) == 0
    assert run.main(arguments(copy, "--dry-run")) == 0
    assert "0 of 6 cells are recorded" in capsys.readouterr().out


def test_a_changed_definition_is_measured_again_and_nothing_else(copy, capsys):
    text = (copy / "tiny.toml").read_text()
    (copy / "tiny.toml").write_text(
        text.replace('"compress.vtp.epochs" = 1', '"compress.vtp.epochs" = 1, "compress.vtp.l1" = 0.01')
    )
    before = record(copy, "vtp.params0.7.zero.tiny_s0")
    assert run.main(arguments(copy, "--dry-run")) == 0
    out = capsys.readouterr().out
    assert "5 of 6 cells are recorded" in out
    assert [line.split()[-1] for line in out.splitlines() if "to do" in line] == ["vtp.params0.7.zero.tiny_s0"]
    assert record(copy, "vtp.params0.7.zero.tiny_s0") == before
    assert run.main(arguments(copy)) == 0
    after = record(copy, "vtp.params0.7.zero.tiny_s0")
    assert after["key"] != before["key"]
    assert after["definition"]["recipe"]["compress"]["vtp"]["l1"] == 0.01


def test_a_changed_sweep_makes_what_relies_on_it_to_do(copy, capsys):
    (copy / "results" / "tiny" / "sweep-lr.lr0.001.recovered.tiny_s0.json").unlink()
    assert run.main(arguments(copy, "--dry-run")) == 0
    todo = [line.split()[-1] for line in capsys.readouterr().out.splitlines() if "to do" in line]
    joint = ["joint.params0.5.zero.tiny_s0", "joint.params0.5.recovered.tiny_s0"]
    assert todo == ["sweep-lr.lr0.001.recovered.tiny_s0", *joint]


def test_a_failing_cell_is_told_and_the_others_go_on(copy, monkeypatch, capsys):
    for name in ("dense.zero.tiny_s0", "vtp.params0.7.zero.tiny_s0"):
        (copy / "results" / "tiny" / f"{name}.json").unlink()
    measure = cells.measure

    def fail_dense(cell, *rest):
        if cell.row == "dense":
            raise RuntimeError("planted")
        return measure(cell, *rest)

    monkeypatch.setattr(cells, "measure", fail_dense)
    assert run.main(arguments(copy)) == 1
    said = capsys.readouterr()
    assert "FAILED dense.zero.tiny_s0" in said.err
    assert "planted" in said.err
    assert record(copy, "vtp.params0.7.zero.tiny_s0")["test"]["total"] == 359
    assert not (copy / "results" / "tiny" / "dense.zero.tiny_s0.json").exists()


def test_cells_whose_sweep_failed_fail_too(copy, monkeypatch, capsys):
    shutil.rmtree(copy / "results")
    monkeypatch.setattr(cells, "measure", refuse)
    assert run.main(arguments(copy, "--only", "joint*recovered*")) == 1
    assert "a sweep that it waits for is not complete" in capsys.readouterr().err


def test_a_cell_that_another_process_holds_is_left_to_it(copy, monkeypatch):
    name = "vtp.params0.7.zero.tiny_s0"
    path = copy / "results" / "tiny" / f"{name}.json"
    kept = path.read_text()
    path.unlink()
    monkeypatch.setattr(cells, "measure", refuse)
    lock = (copy / "work" / "locks" / f"tiny.{name}.lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)

    def other_process_is_done(_seconds):
        path.write_text(kept)
        lock.close()

    monkeypatch.setattr(run.time, "sleep", other_process_is_done)
    assert run.main(arguments(copy)) == 0
    assert path.read_text() == kept


def test_only_picks_cells_and_the_sweeps_that_they_rely_on(suite_file):
    suite = Suite.load(suite_file)
    assert [cell.name for cell in run.picked(suite, "dense*")] == ["dense.zero.tiny_s0"]
    names = [cell.name for cell in run.picked(suite, "joint*recovered*")]
    assert names == [
        "sweep-lr.lr1e-05.recovered.tiny_s0",
        "sweep-lr.lr0.001.recovered.tiny_s0",
        "joint.params0.5.recovered.tiny_s0",
    ]


def test_a_model_is_adopted_if_it_is_the_one(measured, tmp_path, capsys):
    folder, work = measured / "work" / "references" / "tiny_s0", tmp_path / "work"
    command = [str(measured / "tiny.toml"), "--work", str(work), "--results", str(tmp_path / "results")]
    assert run.main([*command, "--adopt", f"tiny_s0={folder}"]) == 0
    suite = Suite.load(measured / "tiny.toml")
    ready = references.find(suite, "tiny", 0, work)
    mine = references.find(suite, "tiny", 0, measured / "work")
    assert ready.weights_sha256 == mine.weights_sha256
    assert ready.facts["test"] == mine.facts["test"]
    assert (ready.facts["trained"], mine.facts["trained"]) == ("adopted", "here")
    assert run.main([*command, "--adopt", f"tiny_s0={folder}"]) == 2
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


def test_a_reference_that_was_altered_or_of_another_recipe_is_refused(copy):
    suite, folder = Suite.load(copy / "tiny.toml"), copy / "work" / "references" / "tiny_s0"
    facts = json.loads((folder / "reference.json").read_text())
    (folder / "reference.json").write_text(json.dumps({**facts, "recipe_sha256": "0"}))
    with pytest.raises(ArtifactError, match="another recipe"):
        references.find(suite, "tiny", 0, copy / "work")
    (folder / "reference.json").write_text(json.dumps(facts))
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b"x")
    with pytest.raises(ArtifactError, match="its record says"):
        references.find(suite, "tiny", 0, copy / "work")


@pytest.mark.parametrize("folder", sorted(references.SHIPPED.iterdir()), ids=lambda path: path.name)
def test_a_shipped_reference_is_the_one_that_the_records_name(folder, tmp_path):
    reference, _, seed = folder.name.rpartition("_s")
    suites = [Suite.load(path) for path in sorted((references.SHIPPED.parent / "suites").glob("*.toml"))]
    suites = [each for each in suites if int(seed) in getattr(each.references.get(reference), "seeds", ())]
    recorded = []
    for suite in suites:
        ready = references.find(suite, reference, int(seed), tmp_path)
        records = Results(references.SHIPPED.parent / "results").of(suite)
        recorded += [each for each in records if (each["reference"], each["seed"]) == (reference, int(seed))]
        assert {each["weights_sha256"] for each in recorded} <= {ready.weights_sha256}
    assert recorded
    assert ready.weights.stat().st_size < 8e6


def test_records_of_another_schema_are_not_read(copy):
    path = copy / "results" / "tiny" / "dense.zero.tiny_s0.json"
    path.write_text(json.dumps({"schema": "other"}))
    assert Results(copy / "results").read("tiny", "dense.zero.tiny_s0") is None
