"""CompressionPlan as data: one canonical text, its inverse, and a clear refusal of everything else."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from builders import TINY, dense_model, random_plan
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from toolchain.errors import ArtifactError, PlanError, StorageError
from toolchain.plan import CompressionPlan, Keep, LowRank, ModelRef

PLAN = CompressionPlan(
    model=ModelRef(name="vit", kwargs={"img_size": 32, "depth": 2}),
    keeps=(
        Keep(module="blocks.0.mlp", unit="mlp_hidden", total=4, indices=((0, 2),)),
        Keep(module="blocks.0.attn", unit="head_dim", total=3, indices=((0, 1), (1, 2))),
    ),
    low_ranks=(LowRank(module="blocks.0.attn.qkv", shape=(12, 4), rank=2),),
    provenance={"seed": 0, "budget": {"params": 0.5}},
)
TEXT = """\
{
  "schema": "slimvit.plan/1",
  "model": {"kwargs": {"depth": 2, "img_size": 32}, "name": "vit"},
  "provenance": {"budget": {"params": 0.5}, "seed": 0},
  "low_ranks": [
    {"module": "blocks.0.attn.qkv", "rank": 2, "shape": [12, 4]}
  ],
  "keeps": [
    {"indices": [[0, 2]], "module": "blocks.0.mlp", "total": 4, "unit": "mlp_hidden"},
    {"indices": [[0, 1], [1, 2]], "module": "blocks.0.attn", "total": 3, "unit": "head_dim"}
  ]
}
"""


def changed(**update: Any) -> str:
    return json.dumps({**json.loads(TEXT), **update})


def with_keep(**update: Any) -> str:
    return changed(keeps=[{**json.loads(TEXT)["keeps"][0], **update}])


def with_low(**update: Any) -> str:
    return changed(low_ranks=[{**json.loads(TEXT)["low_ranks"][0], **update}])


def test_canonical_text_is_fixed():
    """Users keep plan.json under version control: its bytes may change only with its schema."""
    assert PLAN.to_json() == TEXT
    assert PLAN.digest == hashlib.sha256(TEXT.encode()).hexdigest()


def test_text_and_plan_are_inverse(tmp_path):
    assert CompressionPlan.from_json(TEXT) == PLAN
    path = tmp_path / "plan.json"
    path.write_text(TEXT, encoding="utf-8")
    assert CompressionPlan.load(path) == PLAN
    assert CompressionPlan.from_json(CompressionPlan(model=ModelRef(name="x")).to_json()).keeps == ()


def test_layout_and_key_order_of_a_file_do_not_matter():
    shuffled = json.dumps(dict(reversed(json.loads(TEXT).items())), indent=1)
    assert shuffled != TEXT
    assert CompressionPlan.from_json(shuffled).to_json() == TEXT


def test_digest_follows_every_decision():
    variants = [
        with_keep(indices=[[0, 3]]),
        with_keep(unit="mlp_in"),
        with_low(rank=1),
        changed(provenance={}),
        changed(model={"name": "vit", "kwargs": {}}),
        changed(keeps=list(reversed(json.loads(TEXT)["keeps"]))),
    ]
    digests = {CompressionPlan.from_json(text).digest for text in variants}
    assert len(digests | {PLAN.digest}) == len(variants) + 1


def test_a_real_plan_round_trips():
    plan = random_plan(dense_model("vit_tiny_patch16_224", **TINY))
    assert CompressionPlan.from_json(plan.to_json()) == plan
    assert plan.summary().startswith("vit_tiny_patch16_224: low rank [blocks.0.attn.qkv r")


def test_lookup_and_counts():
    attention = PLAN.keep("blocks.0.attn", "head_dim")
    assert attention is not None
    assert (attention.kept, attention.removed) == (2, 2)
    assert PLAN.keep("blocks.1.attn", "head_dim") is None
    assert PLAN.summary() == "vit: low rank [blocks.0.attn.qkv r2]; removed [head_dim −2/6, mlp_hidden −2/4]"


def test_plans_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        PLAN.low_ranks = ()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not JSON"),
        (TEXT[:-10], "not JSON"),
        ("[]", "has schema None"),
        ("3", "has schema None"),
        (changed(schema="slimvit.plan/9"), "has schema 'slimvit.plan/9'; this version reads 'slimvit.plan/1'"),
        (changed(extra=1), "invalid at extra"),
        (changed(model={"kwargs": {}}), "model.name: Field required"),
        (
            changed(model={"name": "vit", "kwargs": {"checkpoint_path": "a.pth"}}),
            r"checkpoint_path.*use model\.checkpoint",
        ),
        (changed(keeps={}), "keeps"),
        (changed(keeps=[3]), "keeps.0"),
        (changed(low_ranks=None), "low_ranks"),
        (with_keep(indices=[]), r"blocks\.0\.mlp\.mlp_hidden has no partition"),
        (with_keep(indices=[[]]), r"blocks\.0\.mlp\.mlp_hidden keeps 0 of 4; a unit needs at least 1"),
        (with_keep(indices=[[0], []]), "keeps 0 of 4"),
        (with_keep(indices=[[2, 1]]), "strictly increasing"),
        (with_keep(indices=[[1, 1]]), "strictly increasing"),
        (with_keep(indices=[[0, 4]]), r"must lie in 0\.\.3, got 0\.\.4"),
        (with_keep(indices=[[-1, 2]]), r"must lie in 0\.\.3, got -1\.\.2"),
        (with_keep(indices=[0, 2]), r"keeps\.0\.indices\.0: .*tuple"),
        (with_keep(indices=["02"]), r"keeps\.0\.indices"),
        (with_keep(indices=[[0.0]]), r"keeps\.0\.indices\.0\.0: .*integer"),
        (with_keep(indices=[[True]]), r"keeps\.0\.indices\.0\.0: .*integer"),
        (with_keep(indices=None), r"keeps\.0\.indices"),
        (with_keep(total=0), r"keeps\.0\.total: .*greater than or equal to 1"),
        (with_keep(why="x"), r"keeps\.0\.why"),
        (with_low(rank=0), r"low_ranks\.0\.rank: .*greater than or equal to 1"),
        (with_low(rank=5), r"rank 5 exceeds min\(12, 4\) = 4"),
        (with_low(shape=[12]), r"low_ranks\.0\.shape"),
        (with_low(shape=[-3, 4]), "exceeds"),
        (changed(keeps=2 * json.loads(TEXT)["keeps"][:1]), r"more than one keep decision for blocks\.0\.mlp\.mlp_hid"),
        (changed(low_ranks=2 * json.loads(TEXT)["low_ranks"]), r"more than one low rank decision for blocks\.0\.attn"),
    ],
)
def test_an_invalid_plan_says_where_and_why(text, words):
    with pytest.raises(PlanError, match=words) as caught:
        CompressionPlan.from_json(text)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_an_unreadable_file(tmp_path):
    with pytest.raises(StorageError, match=r"cannot read the plan .*plan\.json: No such file"):
        CompressionPlan.load(tmp_path / "plan.json")
    (tmp_path / "plan.json").write_bytes(b"\xff\x00")
    with pytest.raises(ArtifactError, match="not a text file"):
        CompressionPlan.load(tmp_path / "plan.json")


name = st.text(max_size=12)
json_value = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | name,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(name, inner, max_size=3),
    max_leaves=8,
)


@st.composite
def keeps(draw: st.DrawFn) -> Keep:
    total = draw(st.integers(1, 20))
    part = st.sets(st.integers(0, total - 1), min_size=1).map(lambda chosen: tuple(sorted(chosen)))
    indices = tuple(draw(st.lists(part, min_size=1, max_size=3)))
    return Keep(module=draw(name), unit=draw(name), total=total, indices=indices)


@st.composite
def low_ranks(draw: st.DrawFn) -> LowRank:
    shape = (draw(st.integers(1, 99)), draw(st.integers(1, 99)))
    return LowRank(module=draw(name), shape=shape, rank=draw(st.integers(1, min(shape))))


plans = st.builds(
    CompressionPlan,
    model=st.builds(ModelRef, name=name, kwargs=st.dictionaries(name, json_value, max_size=3)),
    keeps=st.lists(keeps(), max_size=4, unique_by=lambda k: f"{k.module}.{k.unit}").map(tuple),
    low_ranks=st.lists(low_ranks(), max_size=4, unique_by=lambda low: low.module).map(tuple),
    provenance=st.dictionaries(name, json_value, max_size=3),
)


@settings(max_examples=150)
@given(plan=plans)
def test_any_plan_round_trips_to_the_same_bytes(plan):
    text = plan.to_json()
    again = CompressionPlan.from_json(text)
    assert again == plan
    assert again.to_json() == text
    assert again.digest == plan.digest
