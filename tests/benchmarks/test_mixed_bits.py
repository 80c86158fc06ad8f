"""An int4 file in which some linears keep eight bits lies between the int4 and the int8 file, and is each of them at its ends."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from experiments import mixed_bits
from experiments.mixed_bits import EIGHT, FOUR, FP32, SHARES, Trial, losses, mixed, mixture, opened, sizes_of, taken

from toolchain.export.int4 import int4
from toolchain.export.loss import Yardstick
from toolchain.export.onnx_graph import inner_linears
from toolchain.export.quantise import dynamic

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def recorded(begun, tmp_path_factory):
    """What a trial records, and the files that it judged by their ways."""
    graphs, images = {}, mixed_bits.calibration(begun)

    class Kept(Trial):
        def add(self, way, model, **facts):
            graphs[way] = model
            super().add(way, model, **facts)

        def save(self):
            """Nothing is written."""

    trial = Kept(begun, tmp_path_factory.mktemp("work"), 0.5, None)
    trial.files(images)
    trial.wider(images, 0.5)
    return {each["way"]: each for each in trial.result["outcomes"]}, graphs, images


def test_bytes_grow_with_the_share_of_eight_bits(recorded):
    outcomes, _, _ = recorded
    sizes = [outcomes[way]["bytes"] for way in (FOUR, *map(mixture, SHARES), EIGHT, FP32)]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) >= len(sizes) - 1
    (wider,) = (each for way, each in outcomes.items() if "wider" in way)
    assert wider["params"] > 0.5
    assert wider["bytes"] == pytest.approx(outcomes[mixture(0.5)]["bytes"], rel=0.1)


def test_the_ends_are_the_int4_file_and_the_codes_of_the_int8_file(recorded):
    _, graphs, images = recorded
    model, eight, four = graphs[FP32], dynamic(graphs[FP32]), int4(graphs[FP32], images, mixed_bits.NONE).model
    inner = frozenset(inner_linears(model))
    assert mixed(four, model, eight, frozenset()).SerializeToString() == four.SerializeToString()
    whole = mixed(four, model, eight, inner)
    assert onnx.TensorProto.INT4 not in {tensor.data_type for tensor in whole.graph.initializer}
    yardstick = Yardstick.of(model, images)
    assert yardstick.lost(whole) == pytest.approx(yardstick.lost(eight), rel=0.3)
    ours, theirs = ({each.name: each for each in graph.graph.initializer} for graph in (whole, eight))
    for weight, _ in mixed_bits.parts(model, inner):
        for name in (f"{weight}_quantized", f"{weight}_scale"):
            assert ours[name].SerializeToString() == theirs[name].SerializeToString()


def test_linears_that_lose_most_for_their_bytes_keep_eight_bits(recorded):
    _, graphs, images = recorded
    model, eight, four = graphs[FP32], dynamic(graphs[FP32]), int4(graphs[FP32], images, mixed_bits.NONE).model
    lost, sizes = losses(four, model, eight, images), sizes_of(model)
    assert lost.keys() == sizes.keys() == set(inner_linears(model))
    kept = taken(lost, sizes, 0.5)
    assert 0 < sum(sizes[name] for name in kept) <= 0.5 * sum(sizes.values())
    worst = max(sizes, key=lambda name: lost[name] / sizes[name])
    assert (worst in kept) == (sizes[worst] <= 0.5 * sum(sizes.values()))
    yardstick = Yardstick.of(model, images)
    assert yardstick.lost(mixed(four, model, eight, kept)) < yardstick.lost(four)


def test_a_file_is_judged_as_the_module_that_it_was_exported_from(begun, recorded):
    _, graphs, images = recorded
    with opened(graphs[FP32]) as module:
        outputs = module(torch.from_numpy(images[:3]))
    assert outputs.shape == (3, 10)
    assert np.isfinite(outputs.numpy()).all()
