"""What carries out a suite: what is recorded is left as it is, what fails is told, processes share the work."""

from __future__ import annotations

import gzip
import json
import signal
import subprocess
import sys
from pathlib import Path

import ending
import pytest
import run
from benching import Short, carry_out
from engine import Bench, picked
from filelock import FileLock
from kinds import KINDS
from records import SCHEMA, Results
from suite import Suite

from toolchain.errors import RecipeError


@pytest.fixture
def folder(toy, tmp_path):
    """(writes a suite of toy cells, runs it)."""

    def write(cells: str, name: str = "toys"):
        (tmp_path / f"{name}.toml").write_text(f'title = "Toys"\nkind = "toy"\n\n{cells}')
        return tmp_path / f"{name}.toml"

    return write


def group(*names, after=(), setting=0):
    return f"[[cells]]\nnames = {json.dumps(names)}\nafter = {json.dumps(after)}\nsetting = {setting}\n"


def test_what_is_recorded_is_not_measured_again_and_a_changed_definition_is(folder, toy, capsys):
    path = folder(group("one", "two"))
    assert carry_out(path) == carry_out(path) == 0
    assert toy.measured == ["one", "two"]
    assert "2 of 2 cells are recorded; the rest is predicted to take 0.00 hours" in capsys.readouterr().out
    path = folder(group("one") + group("two", setting=1))
    assert carry_out(path, "--dry-run") == 0
    out = capsys.readouterr().out
    assert "1 of 2 cells are recorded; the rest is predicted to take 0.50 hours" in out
    assert [line.split()[-1] for line in out.splitlines() if "to do" in line] == ["two"]
    assert toy.measured == ["one", "two"], "a dry run measures nothing"
    assert carry_out(path) == 0
    assert toy.measured == ["one", "two", "two"]


def test_a_record_that_is_no_longer_current_is_measured_again(folder, toy):
    path = folder(group("one", "two"))
    assert carry_out(path) == 0
    toy.stale = {"one"}
    assert carry_out(path) == 0
    assert toy.measured == ["one", "two", "one"]


def test_a_failing_cell_is_told_and_the_others_go_on(folder, toy, capsys):
    path = folder(group("fails", "one") + group("late", after=("fails",)))
    assert carry_out(path) == 1
    said = capsys.readouterr()
    assert "FAILED fails" in said.err
    assert "planted" in said.err
    assert "FAILED late: what it waits for is not recorded" in said.err
    assert "2 cells failed: fails, late" in said.err
    assert "one:  50% half of it" in said.out
    assert "done one: value 1" in said.out
    results = Results(path.parent / "results")
    assert [results.read("toys", name) is None for name in ("fails", "late", "one")] == [True, True, False]


def test_cells_wait_for_those_that_they_rely_on(folder, toy):
    path = folder(group("late", after=("early",)) + group("early"))
    assert carry_out(path) == 0
    assert toy.measured == ["early", "late"]


def test_what_another_process_holds_is_left_to_it(folder, toy):
    path = folder(group("one"))
    assert carry_out(path) == 0
    file = Results(path.parent / "results").path("toys", "one")
    kept = file.read_bytes()
    file.unlink()
    lock = FileLock(path.parent / "work" / "locks" / "toys.one.lock")
    lock.acquire()

    def other_process_is_done(_seconds):
        file.write_bytes(kept)
        lock.release()

    assert carry_out(path, harness=Short(wait=other_process_is_done)) == 0
    assert toy.measured == ["one"]
    assert file.read_bytes() == kept


def test_only_picks_cells_and_those_that_they_wait_for(folder, toy, capsys):
    path = folder(group("a1", "b1") + group("a2", "c2", after=("b1",)))
    assert [cell.name for cell in picked(Suite.load(path), "a1")] == ["a1"]
    assert [cell.name for cell in picked(Suite.load(path), "c*")] == ["b1", "c2"]
    assert carry_out(path, "--only", "c2") == 0
    assert toy.measured == ["b1", "c2"]
    assert carry_out(path, "--only", "typo") == 2
    assert "has no cell 'typo'" in capsys.readouterr().err


def test_what_this_machine_cannot_measure_is_left_out_and_said(folder, toy, capsys):
    toy.missing = "there is no such board"
    assert carry_out(folder(group("elsewhere1", "one", "elsewhere2"))) == 0
    assert toy.measured == ["one"]
    out = capsys.readouterr().out
    assert "2 cells are left out: there is no such board" in out
    assert "0 of 1 cells are recorded" in out


def test_what_two_suites_ask_for_is_measured_once(folder, toy):
    first, second = folder(group("one")), folder(group("one-again"), "others")
    assert carry_out(first) == carry_out(second) == 0
    assert toy.measured == ["one"]
    record = Results(first.parent / "results").read("others", "one-again")
    assert (record.same_as, record.cell, record.definition["taken"]) == ("toys/one", "one-again", "one-again")


def test_a_record_says_where_and_when_and_equal_records_are_equal_bytes(folder, toy):
    path = folder(group("two"))
    assert carry_out(path) == 0
    results = Results(path.parent / "results")
    (part,) = results.below("toys", "two")
    assert (part.cell, part.result) == ("two.part", {"value": 2})
    record, file = results.read("toys", "two"), results.path("toys", "two")
    stored = json.loads(gzip.decompress(file.read_bytes()))
    assert stored["schema"] == SCHEMA
    assert set(stored) == {"schema", *record.__dataclass_fields__}
    assert record.machine == {"cpu": "test"}
    assert record.date
    before = file.read_bytes()
    results.save(record)
    assert file.read_bytes() == before


def test_records_of_another_schema_or_half_a_file_are_not_read(folder, toy):
    path = folder(group("one"))
    assert carry_out(path) == 0
    results = Results(path.parent / "results")
    file = results.path("toys", "one")
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    assert results.read("toys", "one") is None
    file.write_bytes(gzip.compress(json.dumps({"schema": "other"}).encode()))
    assert results.read("toys", "one") is None
    assert carry_out(path) == 0
    assert toy.measured == ["one", "one"]


def test_a_suite_that_is_not_there_or_of_an_unknown_kind_is_refused(folder, tmp_path, capsys):
    assert run.main([str(tmp_path / "absent.toml")]) == 2
    assert "absent.toml" in capsys.readouterr().err
    path = folder('[[cells]]\nkind = "toi"\nnames = ["one"]\n')
    with pytest.raises(RecipeError, match="did you mean 'toy'"):
        Suite.load(path)


def test_every_kind_is_a_file_of_its_own():
    assert {KINDS[name].name for name in KINDS} >= {"compression", "peer", "cost", "pair", "floor", "files", "trial"}
    assert all(KINDS[name].name == name for name in KINDS)


def test_a_bench_knows_its_records(folder, toy, tmp_path):
    path = folder(group("one"))
    suite = Suite.load(path)
    bench = Bench(suite, Results(tmp_path / "results"), tmp_path / "work")
    assert bench.record(suite.cells[0]) is None
    assert carry_out(path) == 0
    assert bench.record(suite.cells[0]).result == {"value": 1}


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="this system has no /proc to look for a process in")
def test_a_process_that_a_benchmark_started_ends_with_it():
    """Else it computes beside every measurement that follows."""
    child = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
    code = f"import ending, subprocess, sys\nwith ending.with_children():\n    subprocess.run([sys.executable, '-c', {child!r}])\n"
    here = Path(ending.__file__).parent
    with subprocess.Popen([sys.executable, "-c", code], cwd=here, stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        assert Path(f"/proc/{pid}").exists()
        parent.terminate()
    assert parent.returncode == 128 + signal.SIGTERM
    assert not Path(f"/proc/{pid}").exists()


def test_a_suite_ends_with_what_it_started_and_what_called_it_is_as_before(monkeypatch, tmp_path):
    handlers, before = [], signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(run, "_main", lambda *_: handlers.append(signal.getsignal(signal.SIGTERM)) or 0)
    assert run.main([str(tmp_path / "toys.toml")], Short()) == 0
    with pytest.raises(SystemExit, match="143"):
        handlers[0](signal.SIGTERM, None)
    assert signal.getsignal(signal.SIGTERM) == before
