"""A stored gate: it reads back as it was, and a file in which anything was altered is refused."""

from __future__ import annotations

import copy
import datetime as dt
import json
import math
import re

import pytest
from builders import few_sessions, write_classifier
from measuring import GateScript
from sweeps import swept

from toolchain.artifacts import open_artifact
from toolchain.errors import ArtifactError, MeasurementError, TargetUnavailable
from toolchain.gate import Accept, GateConfig, GateFile, GateResult, run_gate
from toolchain.gate.timing import Clock
from toolchain.measure.stored import sealed
from toolchain.measure.verify import verify

DAY = dt.date(2030, 1, 15)
SHORT = {"design": few_sessions(blocks=4)}
SLOWER = {"b": math.log(1.2), **SHORT}
ALL = {
    "budget": {"size": "1 kB", "params": 10_000, "nodes": 5, "accuracy": 0.5, "latency": "50 ms"},
    "relation": {"size": 1.0 - 1e-6, "accuracy": 0.005, "parity": {"cosine_min": 0.9}, "latency": 0.05},
}


def accept(check, at_most, **changes):
    values = {"cell": "slow", "reason": "known", "accepted": DAY, "expires": DAY, **changes}
    return Accept(check=check, at_most=at_most, **values)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """Six cells that are timed, of which one is too slow and one too noisy, and two that are not; every kind of accept."""
    folder = tmp_path_factory.mktemp("gate")
    old = write_classifier(folder / "old.onnx")
    write_classifier(folder / "new.onnx", padding=100, noise=1e-3)
    cell = {"artifact": "new.onnx", "baseline": "old", "relation": {"latency": 0.05}}
    names = ("noisy", "c1", "c2", "c3", "c4")
    raw = {
        "data": {"source": "digits"},
        "baseline": {"old": {"path": "old.onnx", "sha256": open_artifact(old).sha256}},
        "cell": [
            {**cell, **ALL, "name": "slow"},
            *({**cell, "name": name} for name in names),
            {**cell, "name": "away", "target": "ort-cuda"},
            {**cell, "name": "gone", "required": True},
        ],
    }
    accepts = [
        accept("budget.size", 10**6),
        accept("relation.latency", 1.15),
        accept("budget.params", 10**6, accepted=dt.date(2029, 1, 1), expires=dt.date(2029, 2, 1)),
        accept("budget.nodes", 9, cell="nowhere"),
    ]
    missing = (TargetUnavailable("ort-cuda", "there is no GPU"), MeasurementError("the machine changed"))
    measure = GateScript(SLOWER, {"control": 0.03, **SHORT}, *[SHORT] * 4, *missing, {**SLOWER, "seed": 2})
    config = GateConfig.from_dict(raw, folder)
    return run_gate(config, accepts, tool="test", day=DAY, clock=Clock(measure), why=True)


@pytest.fixture(scope="module")
def record(result):
    return result.to_dict()


@pytest.fixture
def load(tmp_path):
    def call(record):
        (tmp_path / "gate.json").write_text(json.dumps(record))
        return GateResult.load(tmp_path / "gate.json")

    return call


def test_a_result_is_read_back_as_it_was(result, record, load, tmp_path):
    assert load(record) == result
    assert verify(tmp_path / "gate.json").to_dict() == record
    assert GateFile.model_json_schema()["properties"].keys() - {"schema_"} == record.keys() - {"schema"}
    with pytest.raises(ArtifactError, match=r"slimvit\.gate/2"):
        load({**record, "schema": "slimvit.gate/1"})


def test_the_record_holds_every_kind_of_outcome(result, record):
    """What the tests below alter is there."""
    statuses = {(cell.name, check.name): check.status for cell, check in result.checks}
    assert statuses["slow", "budget.size"] == "accepted"
    assert statuses["slow", "relation.latency"] == "fail"
    assert [statuses[name, "relation.latency"] for name in ("noisy", "c1", "away", "gone")] == [
        "invalid",
        "pass",
        "skipped",
        "invalid",
    ]
    assert [use["state"] for use in record["accept_uses"]] == ["used", "exceeded", "expired", "unknown"]
    assert (record["summary"]["cells"], record["holm"]["hypotheses"]) == (5, 7)
    assert record["cells"][0]["layers"]


def leaves(value, path=()):
    """The path of every value that holds no other."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, (*path, key))
    else:
        yield path


def altered(record, path):
    """A copy in which one value is another of the same type, as far as it has others."""
    changed = copy.deepcopy(record)
    *where, last = path
    inner = changed
    for key in where:
        inner = inner[key]
    old = inner[last]
    inner[last] = (
        not old
        if isinstance(old, bool)
        else old + 1
        if isinstance(old, int)
        else old * 1.001 + 1e-6
        if isinstance(old, float)
        else 7
        if old is None
        else f"{old}x"
    )
    return changed


def kinds(record):
    """One path for each kind of value: lists are entered at their last item, and at an item of other keys."""
    return {re.sub(r"\d+", "0", ".".join(map(str, path))): path for path in leaves(record)}


@pytest.mark.parametrize("step", swept([1, 4], [4]))
def test_whatever_is_altered_is_refused(record, load, step):
    paths = [*kinds(record).values()]
    assert len(paths) > 150
    for path in paths[::step]:
        try:
            load(altered(record, path))
        except ArtifactError:
            continue
        pytest.fail(f"{path} was altered and believed")


def first(raw):
    return raw["evidence"][0]


# What is edited, how, and the fault that is named; "gives" where the evidence is sound and bears out something else.
RESEALED = {
    "the size": ("two sizes", lambda raw: first(raw)["artifact"]["file"].update(size_bytes=1)),
    "parameters": ("gives", lambda raw: first(raw)["artifact"]["counts"].update(params=1)),
    "a metric": ("nodes was not counted", lambda raw: first(raw)["artifact"]["counts"].pop("nodes")),
    "wrong answers": ("gives", lambda raw: first(raw)["artifact"]["counts"].update(accuracy=0)),
    "more than all": ("more wrong images", lambda raw: first(raw)["artifact"]["counts"].update(accuracy=10**6)),
    "of the baseline": ("gives", lambda raw: first(raw)["baseline"]["counts"].update(accuracy=300)),
    "images": ("10000 images for the artifact", lambda raw: first(raw)["artifact"].update(images=10_000)),
    "a budget": ("gives", lambda raw: first(raw)["cell"]["budget"].update(size=10**9)),
    "milliseconds": ("gives", lambda raw: first(raw)["cell"]["budget"].update(latency="60 ms")),
    "a check": ("gives", lambda raw: first(raw)["cell"]["relation"].update(size=None)),
    "slower allowed": ("another tolerance", lambda raw: first(raw)["cell"]["relation"].update(latency=0.5)),
    "parity allowed": (
        "was not judged by",
        lambda raw: first(raw)["cell"]["relation"]["parity"].update(cosine_min=-0.5),
    ),
    "parity": ("another parity", lambda raw: first(raw)["agreement"]["rung"].update(verdict="fail")),
    "a cosine": ("another parity", lambda raw: first(raw)["agreement"]["rung"].update(cosine_min=0.5)),
    "an accept": ("measurements, and 1 are due", lambda raw: raw["accepts"][1].update(at_most=1.3)),
    "a longer accept": ("gives", lambda raw: raw["accepts"][2].update(expires="2031-01-01")),
    "the day": ("gives", lambda raw: raw.update(day="2029-01-15")),
    "a layer": ("parts do not sum to", lambda raw: first(raw)["changes"][0].update(after=0)),
    "an artifact": ("another artifact", lambda raw: raw["evidence"][1]["artifact"]["file"].update(sha256="0" * 64)),
    "a baseline": ("another baseline", lambda raw: raw["evidence"][1]["baseline"]["file"].update(sha256="0" * 64)),
    "no baseline": ("named or was read", lambda raw: raw["evidence"][1].update(baseline=None)),
    "batch": ("another batch", lambda raw: raw["evidence"][1]["cell"].update(batch=2)),
    "threads": ("another number of threads", lambda raw: raw["evidence"][1]["cell"].update(threads=2)),
    "cores": ("another set of cores", lambda raw: raw["evidence"][1]["cell"].update(affinity=[1])),
    "no second": ("has 1 measurements, and 2 are due", lambda raw: first(raw)["attempts"].pop()),
    "twice the first": ("another seed", lambda raw: first(raw)["attempts"].__setitem__(1, first(raw)["attempts"][0])),
    "no measurement": ("has 0 measurements, and 1 are due", lambda raw: raw["evidence"][2]["attempts"].clear()),
    "one too many": (
        "has 2 measurements, and 1 are due",
        lambda raw: raw["evidence"][2]["attempts"].append({"why": "failed", "reason": "x"}),
    ),
    "one after none": (
        "nothing was measured, and yet confirmed",
        lambda raw: raw["evidence"][7]["attempts"].append({"why": "failed", "reason": "x"}),
    ),
    "why there is none": ("gives", lambda raw: raw["evidence"][7]["attempts"][0].update(why="unavailable")),
    "a faster B": (
        "measurements, and 1 are due",
        lambda raw: [
            block["samples_ns"].update(B=[sample // 2 for sample in block["samples_ns"]["B"]])
            for session in first(raw)["attempts"][0]["sessions"]
            for block in session["blocks"]
        ],
    ),
    "a cell": ("gives", lambda raw: raw["evidence"].pop()),
    "a cell twice": ("two cells have the same name", lambda raw: raw["evidence"].append(raw["evidence"][2])),
}


@pytest.mark.parametrize("edit", RESEALED)
def test_evidence_that_does_not_bear_out_what_is_said_is_refused(record, load, edit):
    """Also where the digest of the evidence was made anew."""
    fault, change = RESEALED[edit]
    raw = copy.deepcopy(record["raw"])
    change(raw)
    assert raw != record["raw"]
    with pytest.raises(ArtifactError, match="its samples give" if fault == "gives" else fault):
        load({**record, **sealed(raw)})


def test_a_comparison_must_have_grown_until_its_checks_were_decided(record, load):
    """A look that was left out shows, since the design says how many there may be."""
    raw = copy.deepcopy(record["raw"])
    for attempt in (*raw["evidence"][0]["attempts"], raw["evidence"][1]["attempts"][0]):
        attempt["design"]["looks"] = 2
    with pytest.raises(ArtifactError, match=r"look 1 of 2 had not decided, and the next are missing"):
        load({**record, **sealed(raw)})
