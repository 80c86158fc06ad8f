"""What files of every precision are predicted to cost: bytes of a compressed model's file, from the dense model's own."""

from __future__ import annotations

import pytest
from builders import STRUCTURES, dense_model, images, random_plan, variant, with_random_factors

from toolchain.artifacts.onnx_file import FP32, OnnxFile
from toolchain.compress.choices import ROOM
from toolchain.cost import Widths, trace
from toolchain.export.convert import Convert
from toolchain.export.precision import PRECISIONS, file_cost
from toolchain.export.stage import Export
from toolchain.model import run_stage
from toolchain.recipe import ExportSection
from toolchain.surgery.slice import Slice
from toolchain.surgery.split import Split

LARGER = {"img_size": 8, "patch_size": 2, "in_chans": 1, "num_classes": 10, "embed_dim": 96, "depth": 2, "num_heads": 3}


KINDS = ("fp16", "int8-qdq", "int4")
"""One precision of each storage; int8-dynamic stores a part of what int8-qdq does."""


def sizes(model, folder, precisions):
    """Precision → (bytes of the model's file, the linears that keep a finer type)."""
    some, path = images(model, 9).numpy(), folder / "model.onnx"
    run_stage(Export(ExportSection(), path, some, real_images=False, tool="test"), model)
    found: dict[str, tuple[int, tuple[str, ...]]] = {FP32: (OnnxFile(path).size_bytes, ())}
    for name in precisions:
        made = folder / f"{name}.onnx"
        facts = run_stage(Convert(name, made, some, some, real_images=False), OnnxFile(path)).facts
        found[name] = facts.graph.size_bytes, facts.left
    return found


def check(model, folder, precisions):
    (folder / "dense").mkdir()
    dense, shape = (
        sizes(model, folder / "dense", precisions),
        trace(model.module, model.family, model.preprocess.input_size),
    )
    for low_rank in (False, True):
        plan = random_plan(model, 3, low_rank=low_rank)
        deploy = run_stage(Split(), run_stage(Slice(), with_random_factors(model, plan)).artifact).artifact
        small = shape.shrunk(Widths.of(plan), model.groups)
        (folder / f"{low_rank}").mkdir()
        for name, (size, _) in sizes(deploy, folder / f"{low_rank}", precisions).items():
            predicted = file_cost(name).measured(shape, *dense[name], damage=None).bytes_of(small)
            assert 0.95 * predicted <= size <= (1 + ROOM) * predicted, (name, low_rank, size, predicted)


@pytest.mark.slow
def test_a_compressed_file_has_no_more_bytes_than_were_predicted(tmp_path):
    check(dense_model(**LARGER), tmp_path, KINDS)


@pytest.mark.matrix
@pytest.mark.slow
@pytest.mark.parametrize("case", STRUCTURES)
def test_so_in_every_structure(case, tmp_path):
    check(variant(case), tmp_path, PRECISIONS)


def test_linears_that_a_graph_has_no_name_for_count_like_the_others():
    """Those without a bias: a file in int4 or int8 says "after blocks.0.norm1" of them."""
    model, cost = dense_model(**LARGER), file_cost("int4")
    shape = trace(model.module, model.family, model.preprocess.input_size)
    named, unnamed = ("blocks.0.attn.proj",), ("after blocks.0.norm1",)
    assert cost.storage.bytes_of(shape, unnamed) == cost.storage.bytes_of(shape)
    assert cost.storage.bytes_of(shape, named) > cost.storage.bytes_of(shape)
    assert cost.measured(shape, 200_000, unnamed, None).bytes_of(shape) > 200_000
