import json
import math

import numpy as np
import pytest
from builders import few_sessions
from pydantic import ValidationError

from toolchain.errors import ArtifactError, StorageError
from toolchain.measure.comparison import Comparison, judge
from toolchain.measure.intervals import Interval
from toolchain.on_device.runner import SESSION_SCHEMA

TAU = 0.06  # control: |median| ≤ 0.02, half-width ≤ 0.03; sessions: ≤ 0.03 apart
QUIET = Interval(0.0, -0.005, 0.005)
LIMIT = math.log1p(TAU)
TOGETHER = [0.0, 0.0, 0.0]


def around(lo, hi):
    return Interval((lo + hi) / 2, lo, hi)


@pytest.mark.parametrize(
    ("ratio", "control", "medians", "verdict"),
    [
        # validity comes before everything, on both counts and on both sides of each limit
        (around(0.5, 0.6), Interval(0.021, 0.016, 0.026), TOGETHER, "invalid"),
        (around(0.5, 0.6), Interval(-0.021, -0.026, -0.016), TOGETHER, "invalid"),
        (around(0.5, 0.6), Interval(0.019, 0.014, 0.024), TOGETHER, "regressed"),
        (around(-0.6, -0.5), Interval(0.0, -0.031, 0.031), TOGETHER, "invalid"),
        (around(-0.6, -0.5), Interval(0.0, -0.029, 0.029), TOGETHER, "improved"),
        (around(0.5, 0.6), Interval(0.021, 0.016, 0.026), [0.0, 0.0, 9.0], "invalid"),
        # sessions that disagree, before any statement about B
        (around(0.5, 0.6), QUIET, [0.50, 0.531, 0.51], "inconclusive"),
        (around(0.5, 0.6), QUIET, [0.50, 0.529, 0.51], "regressed"),
        (around(-0.6, -0.5), QUIET, [-0.50, -0.531, -0.51], "inconclusive"),
        # of many sessions the disagreement is in the interval
        (around(0.5, 0.6), QUIET, [0.50, 0.531, 0.51, 0.52, 0.52], "regressed"),
        # regressed: the lower bound beyond ln(1 + tau)
        (around(LIMIT + 1e-6, 0.2), QUIET, TOGETHER, "regressed"),
        (around(LIMIT - 1e-6, 0.2), QUIET, TOGETHER, "inconclusive"),
        # improved: the upper bound beyond what the control shows by itself, its offset counted against B
        (around(-0.2, -0.0051), QUIET, TOGETHER, "improved"),
        (around(-0.2, -0.0049), QUIET, TOGETHER, "pass"),
        (around(-0.2, -0.0149), Interval(-0.01, -0.015, -0.005), TOGETHER, "pass"),
        (around(-0.2, -0.0151), Interval(0.01, 0.005, 0.015), TOGETHER, "improved"),
        # pass: the upper bound within ln(1 + tau)
        (around(-0.01, LIMIT - 1e-6), QUIET, TOGETHER, "pass"),
        (around(-0.01, LIMIT + 1e-6), QUIET, TOGETHER, "inconclusive"),
    ],
)
def test_the_verdict_table(ratio, control, medians, verdict):
    assert judge(ratio, control, medians, TAU) == verdict


def test_the_schema_is_the_device_runners(made_up):
    assert made_up().sessions[0].schema_ == SESSION_SCHEMA


def test_a_speedup_is_verified_by_its_lower_bound(made_up):
    faster = made_up(b=math.log(0.5))
    assert faster.verdict == "improved"
    assert faster.verified_speedup_at_least == pytest.approx(1 / faster.to_dict()["ratio"]["hi"])
    assert 1.95 < faster.verified_speedup_at_least < math.exp(-faster.ratio.point)
    assert faster.latency_ms("A") == pytest.approx(10, rel=0.01)
    assert faster.latency_ms("B") == pytest.approx(5, rel=0.01)


@pytest.mark.parametrize(
    ("truth", "verdict"),
    [
        ({"b": 0.0}, "pass"),
        ({"b": math.log(2)}, "regressed"),
        ({"b": -0.5, "control": 0.03}, "invalid"),
        ({"b": -0.5, "session_shift": 0.02}, "inconclusive"),
        ({"b": math.log1p(0.05), "noise": 0.01}, "inconclusive"),
    ],
)
def test_without_an_improvement_nothing_is_verified(made_up, truth, verdict):
    comparison = made_up(**truth)
    assert comparison.verdict == verdict
    assert comparison.verified_speedup_at_least is None


def test_tau_min_is_where_validity_begins(made_up):
    noisy = made_up(control=0.02, noise=0.01)
    tau_min = noisy.tau_min
    for tau, valid in ((tau_min * 1.001, True), (tau_min * 0.999, False)):
        judged = made_up(control=0.02, noise=0.01, design=few_sessions(tau=tau))
        assert (judged.verdict != "invalid") == valid


def test_the_file_shows_the_promised_keys_and_comes_back_equal(made_up, tmp_path):
    comparison = made_up(b=-0.2)
    comparison.save(tmp_path / "bench.json")
    stored = json.loads((tmp_path / "bench.json").read_text())
    assert set(stored) >= {
        "verdict",
        "ratio",
        "verified_speedup_at_least",
        "control",
        "tau",
        "tau_min",
        "sessions",
        "blocks",
        "environment",
        "raw",
    }
    assert set(stored["ratio"]) == set(stored["control"]) == {"point", "lo", "hi"}
    assert (stored["sessions"], stored["blocks"], stored["looks"]) == (3, 60, 1)
    assert stored["confidence"] == 0.95
    assert stored["samples_per_second"]["A"] == pytest.approx(100, rel=0.01)
    again = Comparison.load(tmp_path / "bench.json")
    assert again.to_dict() == comparison.to_dict()


def first_block(stored):
    return stored["raw"]["sessions"][0]["blocks"][0]


EDITS = {
    "verdict": lambda s: s.update(verdict="pass"),
    "verified": lambda s: s.update(verified_speedup_at_least=s["verified_speedup_at_least"] * 1.001),
    "verified removed": lambda s: s.pop("verified_speedup_at_least"),
    "ratio": lambda s: s["ratio"].update(hi=0.5),
    "control": lambda s: s["control"].update(lo=1.0),
    "latency": lambda s: s["latency_ms"].update(B=1.0),
    "tau": lambda s: s["raw"]["design"].update(tau=0.5),
    "seed": lambda s: s["raw"]["design"].update(seed=1),
    "environment": lambda s: s["environment"].update(cpu="another"),
    "extra": lambda s: s.update(comment="trust me"),
    "schema": lambda s: s.update(schema="slimvit.bench/0"),
    "raw removed": lambda s: s.pop("raw"),
    "a faster sample in every block": lambda s: [
        block["samples_ns"]["B"].__setitem__(slice(0, 4), [5_000_000] * 4)
        for session in s["raw"]["sessions"]
        for block in session["blocks"]
    ],
    "a sample that no statistic feels": lambda s: first_block(s)["samples_ns"]["B"].__setitem__(
        0, first_block(s)["samples_ns"]["B"][0] + 1
    ),
    "the digest": lambda s: s.update(raw_sha256="0" * 64),
    "a dropped sample": lambda s: first_block(s)["samples_ns"]["B"].pop(),
    "a sample of no time": lambda s: first_block(s)["samples_ns"]["B"].__setitem__(0, 0),
    "a dropped block": lambda s: s["raw"]["sessions"][0]["blocks"].pop(),
    "a dropped session": lambda s: s["raw"]["sessions"].pop(),
    "a repeated session": lambda s: s["raw"]["sessions"].__setitem__(1, s["raw"]["sessions"][0]),
    "another order": lambda s: first_block(s)["order"].reverse(),
    "another variant": lambda s: s["raw"]["sessions"][0]["variants"].pop("A'"),
    "another machine": lambda s: s["raw"]["sessions"][2]["fingerprint"]["after"]["machine"].update(cpu="another"),
    "threads": lambda s: s["raw"]["scenario"].update(threads=2),
    "unknown key": lambda s: s["raw"].update(note="x"),
    "a whole result within another": lambda s: s.update(result=json.loads(json.dumps(s)), verdict="regressed"),
}


def test_a_file_from_before_there_was_a_digest_is_read(made_up, tmp_path):
    path = tmp_path / "bench.json"
    made_up(b=-0.2).save(path)
    written = json.loads(path.read_text())
    assert len(written.pop("raw_sha256")) == 64
    path.write_text(json.dumps(written))
    assert Comparison.load(path).to_dict() == made_up(b=-0.2).to_dict()


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_edited_file_is_refused(made_up, tmp_path, edit):
    path = tmp_path / "bench.json"
    made_up(b=-0.2).save(path)
    Comparison.load(path)
    stored = json.loads(path.read_text())
    edit(stored)
    path.write_text(json.dumps(stored))
    with pytest.raises(ArtifactError, match=r"bench\.json"):
        Comparison.load(path)


def test_what_is_no_comparison_is_refused(tmp_path):
    for name, text in {"list": "[]", "half": '{"schema": "slimvit.be', "deep": "[" * 100_000}.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(ArtifactError):
            Comparison.load(tmp_path / name)
    with pytest.raises(StorageError):
        Comparison.load(tmp_path / "absent")


def test_a_design_that_cannot_be_judged_is_refused():
    for bad in ({"sessions": 0}, {"blocks": 1}, {"tau": 0.0}, {"slot_ms": 0.0}):
        with pytest.raises(ValidationError):
            few_sessions(**bad)


def test_more_sessions_and_blocks_need_no_other_code(made_up):
    wide = made_up(b=-0.2, design=few_sessions(sessions=5, blocks=40))
    assert wide.verdict == "improved"
    assert len(wide.session_medians) == 5
    assert np.isfinite(wide.tau_min)


def test_many_sessions_that_disagree_widen_the_interval_and_do_not_veto(made_up):
    few = made_up(b=-0.6, session_shift=0.02)
    many = made_up(b=-0.6, session_shift=0.02, design=few_sessions(sessions=6))
    assert few.verdict == "inconclusive"
    assert many.verdict == "improved"
    assert many.ratio.half_width > 5 * made_up(b=-0.6, design=few_sessions(sessions=6)).ratio.half_width
    low, high = many.session_medians[0], many.session_medians[-1]
    assert low < many.ratio.lo < many.ratio.hi < high


@pytest.mark.parametrize("b", [-0.6, 0.0, 0.6])
def test_one_session_says_nothing_whatever_its_blocks_say(made_up, b):
    alone = made_up(b=b, design=few_sessions(sessions=1, blocks=80))
    assert alone.ratio.half_width < 0.01
    assert alone.verdict == "inconclusive"
    assert made_up(b=b, design=few_sessions(sessions=2, blocks=40)).verdict in ("improved", "pass", "regressed")


def test_looks_are_paid_for_and_grow_the_blocks(made_up):
    design = few_sessions(looks=4)
    assert [design.blocks_of(session) for session in range(12)] == [20] * 6 + [40] * 3 + [80] * 3
    assert [round(design.share(n), 4) for n in (0, 3, 6, 9, 12)] == [0.0, 0.125, 0.25, 0.5, 1.0]
    assert made_up(b=-0.2, design=design).ratio.half_width > made_up(b=-0.2).ratio.half_width
    assert made_up(b=-0.2, design=design).to_dict()["confidence"] == 0.9875


def test_what_the_looks_forbid_is_refused(made_up):
    undecided = {"b": math.log1p(0.05), "noise": 0.01}
    with pytest.raises(ValueError, match="had not decided, and the next are missing"):
        made_up(**undecided, design=few_sessions(looks=3)).require_looks()
    with pytest.raises(ValueError, match="had decided already"):
        made_up(b=-0.2, design=few_sessions(looks=3), looks=2).require_looks()
    with pytest.raises(ValidationError, match="at most 1 looks"):
        made_up(**undecided, looks=2)
    grown = made_up(**undecided, design=few_sessions(looks=2), looks=2)
    grown.require_looks()
    assert grown.at_look(1).sessions == grown.sessions[:3]
    assert grown.at_look(1).ratio != grown.ratio
    with pytest.raises(ValueError, match="had decided already"):
        grown.require_looks(lambda found: found.looks > 1)
    assert (grown.looks, grown.blocks, len(grown.sessions)) == (2, 120, 6)


def test_tails_need_samples(made_up):
    assert made_up().tail_ms("B", 0.9) is None  # 3 × 20 × 4 calls
    enough = made_up(design=few_sessions(blocks=50))
    assert enough.tail_ms("B", 0.9) == pytest.approx(10, rel=0.01)
    assert enough.tail_ms("B", 0.9) > enough.latency_ms("B")
    assert enough.tail_ms("B", 0.99) is None


def test_the_cores_are_those_of_the_scenario(made_up):
    found = made_up()
    raw = json.loads(json.dumps(found.to_dict()["raw"]))
    for affinity, fits in (([0], True), (None, True), ([1], False), ([0, 1], False)):
        raw["scenario"]["affinity"] = affinity
        if fits:
            Comparison.model_validate_json(json.dumps(raw))
        else:
            with pytest.raises(ValidationError, match="affinity"):
                Comparison.model_validate_json(json.dumps(raw))
