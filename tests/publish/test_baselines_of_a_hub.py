"""A gate whose baseline lies on a hub: fetched by its address, held to its digest, and told where it cannot be had."""

from __future__ import annotations

import datetime as dt

import onnx
import pytest
from builders import write_classifier, write_stack
from hub_server import Repository

from toolchain.artifacts import open_artifact
from toolchain.errors import BaselineError
from toolchain.gate import GateConfig, run_gate
from toolchain.gate.baselines import fetched_file

DAY = dt.date(2030, 1, 15)


@pytest.fixture
def gate(hub, tmp_path):
    """Judges the size of a file against a baseline on a hub, whose branch v1 is larger."""
    old = write_classifier(tmp_path / "model.onnx")
    hub.repositories["org/name"] = Repository()
    main = hub.repositories["org/name"].branches["main"]
    main["onnx/model.onnx"] = old.read_bytes()
    larger = write_classifier(tmp_path / "larger.onnx", padding=200)
    hub.repositories["org/name"].branches["v1"] = {**main, "onnx/model.onnx": larger.read_bytes()}
    digests = {"main": open_artifact(old).sha256, "v1": open_artifact(larger).sha256}

    def call(place, branch="main"):
        cell = {"name": "a", "artifact": "model.onnx", "baseline": "hub", "relation": {"size": 0.0}}
        raw = {"baseline": {"hub": {"path": place, "sha256": digests[branch]}}, "cell": [cell]}
        return run_gate(GateConfig.from_dict(raw, tmp_path), tool="test", day=DAY)

    return call


def test_a_baseline_is_fetched_by_its_address(gate):
    (check,) = gate("hf://org/name/onnx/model.onnx").cells[0].checks
    assert (check.status, check.value) == ("pass", check.baseline)


def test_a_revision_is_that_branch(gate):
    (check,) = gate("hf://org/name@v1/onnx/model.onnx", "v1").cells[0].checks
    assert check.value < check.baseline


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("hf://org/name@v1/onnx/model.onnx", "has sha256"),
        ("hf://org/name/onnx/other.onnx", "has no file onnx/other.onnx"),
        ("hf://org/none/model.onnx", "no repository org/none"),
        ("hf://org/name@v9/onnx/model.onnx", "no revision 'v9'"),
        ("hf://org/name", "is written hf://ORG/NAME/FILE"),
    ],
)
def test_what_is_not_the_baseline_ends_the_gate(gate, place, words):
    with pytest.raises(BaselineError, match=words):
        gate(place)


@pytest.mark.parametrize("beside", ["model.onnx.data", "model.onnx_data", "weights/all.bin"])
def test_a_baseline_with_weights_beside_it_is_whole(hub, tmp_path, beside):
    """Kind: files that lie behind links, as in the cache of a hub's client. The file itself names where its weights lie."""
    whole = onnx.load(write_stack(tmp_path / "plain.onnx", layers=2))
    (tmp_path / beside).parent.mkdir(exist_ok=True)
    onnx.save(whole, tmp_path / "model.onnx", save_as_external_data=True, location=beside, size_threshold=0)
    hub.repositories["org/name"] = Repository()
    files = hub.repositories["org/name"].branches["main"]
    files |= {name: (tmp_path / name).read_bytes() for name in ("model.onnx", beside)}
    cell = {"name": "a", "artifact": "model.onnx", "baseline": "hub", "relation": {"size": 0.0}}
    digest = open_artifact(tmp_path / "model.onnx").sha256
    raw = {"baseline": {"hub": {"path": "hf://org/name/model.onnx", "sha256": digest}}, "cell": [cell]}
    (check,) = run_gate(GateConfig.from_dict(raw, tmp_path), tool="test", day=DAY).cells[0].checks
    assert (check.status, check.value) == ("pass", check.baseline)
    assert open_artifact(fetched_file("hf://org/name/model.onnx")).sha256 == digest
