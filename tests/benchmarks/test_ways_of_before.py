"""What the tool did before, tried again: the constants reach every re-fit, and ways are held against each other image by image."""

from __future__ import annotations

import copy

import numpy as np
import pytest
from experiments import product
from experiments.beside import features, further, table
from experiments.damping import BRANCHES, CHOSEN, CLASSIFIER, CONSTANT, as_it_is, constant, held_alike
from experiments.patch_embedding import FROZEN, TRAINED, outcome
from experiments.starts import figures, within
from records import Record, Results

from toolchain.cost import Widths
from toolchain.recipe import FinetuneSection
from toolchain.training.stages import Finetune

pytestmark = pytest.mark.slow

SHARE = 0.4


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Where the tool's model is kept."""
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def ways(begun, work):
    """What is left by chosen dampings, and by constants."""
    made = product.compressed(begun, SHARE, work)
    return as_it_is(begun, made), held_alike(begun, made)


def test_the_constants_reach_every_re_fit_and_nothing_else_differs(begun, ways):
    mine, theirs = ways
    known = constant(begun.job.dense)
    assert set(known.values()) == {BRANCHES, CLASSIFIER}
    assert theirs["dampings"] == known
    assert mine["dampings"].keys() == known.keys()
    assert mine["dampings"] != known
    assert mine["params"] == theirs["params"] <= SHARE * begun.job.problem.shape.params
    assert figures(mine["judged"]) != figures(theirs["judged"])


@pytest.mark.usefixtures("ways")
def test_the_tools_model_is_made_once(begun, work, monkeypatch):
    monkeypatch.setattr(product, "Compress", None)
    made = product.compressed(begun, SHARE, work)
    assert Widths.of(made.plan).kept == dict(within(begun.job.problem, SHARE).uniform.kept)
    with pytest.raises(TypeError):
        product.compressed(begun, SHARE / 2, work)


def test_recovery_differs_by_the_patch_embedding_alone(begun, work, monkeypatch):
    monkeypatch.setattr(Finetune, "_judge", lambda *_: 0.0)  # so that what was trained stays
    given, weights = product.compressed(begun, SHARE, work), {}
    seen = copy.copy(begun)
    object.__setattr__(seen, "by_image", lambda module: {"state": copy.deepcopy(module.state_dict())})
    section = FinetuneSection(epochs=1, lr=1e-3, batch_size=64, labels=False)
    for way in (FROZEN, TRAINED):
        made = outcome(seen, given, section, way)
        assert made["facts"]["kept"] == "after"
        assert made["facts"]["loss"] == "imitation"
        weights[way] = made["judged"]["state"]
    name, before = "patch_embed.proj.weight", given.module.state_dict()
    assert weights[FROZEN][name].equal(before[name])
    assert not weights[TRAINED][name].equal(before[name])


def errors_of(seed: int) -> dict[str, list[float]]:
    generator = np.random.default_rng(seed)
    return {"wrong": generator.random(12).tolist(), "spread": np.linspace(1, 2, 12).tolist()}


def test_how_much_further_is_the_difference_of_relative_errors():
    own, other, chosen = errors_of(0), errors_of(1), [1, 2, 5, 7, 8, 11]
    found = further(own, other, chosen)
    spread = sum(own["spread"][at] for at in chosen)
    by_hand = sum(own["wrong"][at] - other["wrong"][at] for at in chosen) / spread
    assert found.point == pytest.approx(by_hand)
    assert found.lo < found.point < found.hi
    assert further(own, own, chosen).hi == 0
    back = further(other, own, chosen)
    assert (back.lo, back.hi) == pytest.approx((-found.hi, -found.lo))


def test_rows_of_classifiers_name_errors_and_their_interval(begun, ways, tmp_path):
    outcomes = [{"budget": SHARE, "way": way, **each} for way, each in zip((CHOSEN, CONSTANT), ways, strict=True)]
    result = {"judged": begun.by_image(begun.job.dense.module), "outcomes": outcomes}
    record = Results(tmp_path).save(Record("experiments", "damping.tiny", "damping", "", {}, result, {}))
    again = Results(tmp_path).read("experiments", "damping.tiny")
    head, _, dense, *rows = table(again, "damping", CHOSEN).splitlines()
    assert "errors more than by scenes" in head
    counts = [each["judged"]["test"]["wrong"] for each in outcomes]
    share = (counts[1] - counts[0]) / record.result["judged"]["test"]["wrong"]
    assert f"| {record.result['judged']['test']['wrong']} |" in dense
    assert rows[0].endswith(f"| {counts[0]} |  |")
    assert f"| {counts[1]} | {100 * share:+.2f} % [" in rows[1]


def test_rows_of_features_tell_kinds_of_pictures_apart_and_what_was_not_kept():
    names = [f"objects_{at}/a" for at in range(6)] + [f"stamps_{at}/a" for at in range(6)]
    judged = {
        each: {"names": names, "class": errors_of(seed), "patches": errors_of(seed + 1)}
        for seed, each in enumerate(("judge", "drawings", "tuning"))
    }
    one = {"budget": 0.5, "way": "frozen", "judged": judged}
    other = {**one, "way": "trained", "facts": {"kept": "before"}}
    rows = features("patch embedding", "frozen", [(one, {}), (other, judged)]).splitlines()[2:]
    assert len(rows) == 8
    pictures = [row.split(" | ")[2] for row in rows]
    assert pictures == 2 * ["objects", "cut-outs", "drawings", "tuning"]
    assert len({row.split(" | ")[3] for row in rows[:2]}) == 2
    assert all("trained, not kept" in row and "+0.000 [+0.000, +0.000]" in row for row in rows[4:])
    assert [row.count("[") for row in rows] == [0] * 4 + [2] * 4
