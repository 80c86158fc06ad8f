"""Trials of the latency protocol: resumable, and their page follows from their slots."""

from __future__ import annotations

import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import bursts
import numpy as np
import pytest
from benching import Short, carry_out, changed
from kinds import trial
from kinds.trial import verdicts_of
from pages.validity import page, share
from records import Record, Results
from suite import HERE, Suite

SUITE = Suite.load(HERE / "suites" / "validity.toml")
RESULTS = Results(HERE / "results")
TINY = """\
title = "Trials"
page = "validity"

[[cells]]
kind = "trial"
name = "tiny"
depths = [1, 3]
count = 3
wanted = "nothing"
"""


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture
def suite(tmp_path):
    (tmp_path / "trials.toml").write_text(TINY)
    return Suite.load(tmp_path / "trials.toml")


class Seeds(Short):
    """Little to do; `seeds` are those of the comparisons."""

    def __init__(self):
        super().__init__()
        object.__setattr__(self, "seeds", [])

    def _compare(self, *pair, **given):
        self.seeds.append(given["design"].seed)
        return super()._compare(*pair, **given)


@pytest.mark.slow
def test_it_goes_on_where_it_stopped_and_the_page_follows(suite, work):
    harness, results = Seeds(), Results(suite.path.parent / "results")
    assert carry_out(suite.path, harness=harness, work=work) == 0
    assert harness.seeds == [0, 1, 2]
    for cell in suite.cells:
        record = results.read("trials", cell.name)
        assert record is not None
        medians = [sorted(each[name])[2] for each in record.result["slots_ns"] for name in ("A", "B")]
        assert medians[1] > medians[0], "three blocks take longer than one"
        assert record.result["artifacts"]["A"] != record.result["artifacts"]["B"]
        assert set(record.result) >= {"slots_ns", "looks", "verdict", "cores_of_others"}
        assert results.path("trials", cell.name).stat().st_size < 3000
    # A killed run leaves half a file at most: that comparison is measured again, the others are not.
    path = results.path("trials", "tiny.001")
    path.write_bytes(path.read_bytes()[:100])
    assert carry_out(suite.path, harness=harness, work=work) == 0
    assert harness.seeds == [0, 1, 2, 1]
    assert "| `tiny` | 1 : 3 | 3 of 3 |" in page(suite, results)["README.md"]


@pytest.fixture
def record():
    found = RESULTS.read("validity", "slower-8.000")
    assert found is not None
    return found


def test_an_edited_verdict_or_slot_is_refused(record, tmp_path):
    verdicts_of(record)
    edited = changed(record, verdict="pass" if record.result["verdict"] != "pass" else "regressed")
    with pytest.raises(ValueError, match="its slots give"):
        verdicts_of(edited)
    results = Results(tmp_path)
    results.save(edited)
    with pytest.raises(ValueError, match="its slots give"):
        page(SUITE, results)
    cell = next(cell for cell in SUITE.cells if cell.name == record.cell)
    assert not trial.KIND.is_current(cell, edited, None)
    assert trial.KIND.is_current(cell, record, None)


def test_the_first_look_alone_is_judged_at_its_own_confidence():
    """Twelve sessions of which only the first six are slower: at two looks all count, alone the first six do."""
    rng = np.random.default_rng(0)

    def session(slower):
        noise = rng.normal(1, 0.001, (3, 12))
        return {
            name: list(1e6 * each) for name, each in zip(("A", "B", "A'"), noise * [[1], [slower], [1]], strict=True)
        }

    sessions = [session(1.08) for _ in range(6)] + [session(1.0) for _ in range(6)]
    result = {"looks": 3, "slots_ns": sessions, "verdict": "inconclusive"}
    stored = Record("x", "x.000", "trial", "", {"index": 0}, result, {})
    assert verdicts_of(stored) == ("inconclusive", "regressed")
    short = changed(stored, slots_ns=sessions[:6], verdict="regressed")
    assert verdicts_of(short) == ("regressed", "regressed")
    with pytest.raises(ValueError, match="its slots give inconclusive"):
        verdicts_of(changed(stored, verdict="regressed"))


def test_the_load_ends_with_its_block():
    with bursts.load(0, wanted=True) as process:
        assert process.poll() is None
    assert process.poll() is not None
    with bursts.load(0, wanted=False) as process:
        assert process is None


def running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="this system has no /proc to look for a process in")
def test_the_load_ends_when_its_parent_is_killed():
    """Else it works beside every comparison that follows: what calls itself idle then is not."""
    code = "import time\nimport bursts\nwith bursts.load(0, wanted=True) as p:\n    print(p.pid, flush=True)\n"
    code += "    time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=HERE, stdout=subprocess.PIPE, text=True) as parent:
        pid = int(parent.stdout.readline())
        assert running(pid)
        parent.kill()
    deadline = time.monotonic() + 20
    while running(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not running(pid)


def test_a_dry_run_predicts_and_measures_nothing(suite, work, capsys):
    harness = Seeds()
    assert carry_out(suite.path, "--dry-run", harness=harness, work=work) == 0
    assert "0 of 3 cells are recorded; the rest is predicted to take 0.02 hours" in capsys.readouterr().out
    assert not harness.seeds


def test_the_experiment_that_is_least_far_goes_on(suite):
    suite.path.write_text(TINY + '\n[[cells]]\nkind = "trial"\nname = "other"\ndepths = [1, 1]\ncount = 6\n')
    names = [cell.name for cell in Suite.load(suite.path).cells]
    assert names == [
        "tiny.000",
        *("other.000", "other.001", "tiny.001"),
        *("other.002", "other.003", "tiny.002"),
        *("other.004", "other.005"),
    ]


def test_what_is_asked_for_is_measured():
    counts = Counter((cell.depths, cell.loaded) for cell in SUITE.cells)
    assert sum(count for (depths, _), count in counts.items() if depths[0] == depths[1]) >= 300
    assert {depths for depths, _ in counts} == {(20, 20), (25, 27), (20, 22)}
    assert any(loaded for _, loaded in counts)


def test_shares_have_intervals():
    assert share(0, 0) == "—"
    assert share(0, 300) == "0.0 % [0.0, 1.3]"
    assert share(85, 100) == "85.0 % [76.7, 90.7]"


def test_the_protocol_keeps_what_it_promises():
    """The verdicts that the page counts, against the thresholds that were set before they were measured."""
    said: dict[str, list[str]] = {}
    for cell in SUITE.cells:
        record = RESULTS.read("validity", cell.name)
        assert record is not None, f"{cell.name} is not recorded"
        said.setdefault(cell.row, []).append(record.result["verdict"])
    assert Counter(cell.row for cell in SUITE.cells) == {name: len(verdicts) for name, verdicts in said.items()}
    assert "regressed" not in said["same-idle"] + said["same-loaded"]
    assert said["same-idle"].count("pass") >= 0.8 * len(said["same-idle"])
    assert said["slower-8"].count("regressed") >= 0.85 * len(said["slower-8"])
    assert said["slower-10"].count("regressed") >= 0.95 * len(said["slower-10"])
