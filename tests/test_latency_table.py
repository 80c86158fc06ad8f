"""LatencyTable: what was measured, as data: a round trip, straight lines between points, and the scale of a correction."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from toolchain.cost import LatencyTable, SavedLatency, Widths
from toolchain.errors import ArtifactError

MLP = (("blocks.0.mlp", "mlp_hidden"), ("blocks.1.mlp", "mlp_hidden"))
RANKS = (("blocks.0.attn.qkv", "rank"),)


def table(**changes: object) -> LatencyTable:
    saved = (
        SavedLatency(members=MLP, points=((4, 0.3), (24, 0.1), (32, 0.0))),
        SavedLatency(members=RANKS, points=((2, 0.2), (12, 0.0))),
    )
    return LatencyTable(**{"target": "ort-cpu", "batch": 1, "threads": 2, "dense_ms": 8.0, "saved": saved, **changes})


def test_a_table_survives_json():
    before = table(correction=0.9, environment={"cpu": "x", "cores": [0, 1]})
    again = LatencyTable.from_json(before.to_json())
    assert again == before
    assert json.loads(before.to_json())["schema"] == "slimvit.latency/1"


@pytest.mark.parametrize(
    "change",
    [
        {"schema": "slimvit.latency/2"},
        {"dense_ms": 0.0},
        {"correction": -1.0},
        {"unknown": 1},
        {"saved": [{"members": [["a", "b"]], "points": [[4, 0.1], [2, 0.0]]}]},
        {"saved": [{"members": [["a", "b"]], "points": [[4, 0.1], [8, 0.2], [9, 0.0]]}]},
        {"saved": [{"members": [["a", "b"]], "points": [[4, 0.2], [8, 0.1]]}]},
    ],
)
def test_what_is_no_table_is_refused(change):
    with pytest.raises(ArtifactError, match=r"not a slimvit\.latency/1 table"):
        LatencyTable.from_json(json.dumps({**json.loads(table().to_json()), **change}))


def test_text_that_is_no_json_is_refused():
    with pytest.raises(ArtifactError):
        LatencyTable.from_json(table().to_json()[:-20])


def test_savings_of_units_and_ranks_add_up_along_straight_lines():
    found = table()
    assert found.ratio(Widths()) == 1.0
    assert found.ratio(Widths({MLP[0]: 24})) == pytest.approx(0.9)
    assert found.ratio(Widths({MLP[0]: 14, MLP[1]: 28})) == pytest.approx(1 - 0.2 - 0.05)
    assert found.ratio(Widths({MLP[0]: 24}, {"blocks.0.attn.qkv": 7})) == pytest.approx(1 - 0.1 - 0.1)
    assert found.ratio(Widths({("blocks.0.attn", "attn_in"): 1})) == 1.0, "what was not measured saves nothing"
    assert found.ratio(Widths({}, {"blocks.0.attn.qkv": 99})) == 1.0, "a rank that does not pay saves nothing"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(kept=st.lists(st.integers(1, 40), min_size=2, max_size=2).map(sorted), shares=st.lists(st.floats(0, 0.2)))
def test_a_narrower_unit_never_takes_longer(kept, shares):
    falling = [*sorted(shares, reverse=True), 0.0]
    points = tuple((4 * (index + 1), share) for index, share in enumerate(falling))
    curve = SavedLatency(members=MLP, points=points)
    assert curve.at(kept[0]) >= curve.at(kept[1])
    assert all(curve.at(count) == share for count, share in points)


def test_a_corrected_table_predicts_what_was_measured():
    widths = Widths({MLP[0]: 4, MLP[1]: 24})
    for measured in (0.5, 0.66, 0.9):
        assert table().corrected(widths, measured).ratio(widths) == pytest.approx(measured)
    twice = table().corrected(widths, 0.5).corrected(widths, 0.7)
    assert twice.ratio(widths) == pytest.approx(0.7), "a correction replaces the one before"
    assert table().corrected(Widths(), 0.7) == table(), "nothing saved, nothing learned"
    assert table().corrected(widths, 1.2).correction == 0.05, "a scale stays above 0"


def test_a_table_does_not_change():
    with pytest.raises(ValidationError):
        table().correction = 2.0
