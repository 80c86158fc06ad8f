"""Swin Transformer: windows and shifts as the attention sees them, what is left alone, and the way to a file."""

from __future__ import annotations

import copy

import pytest
import torch
from builders import (
    SWIN,
    TINY_SWIN,
    V1,
    V2,
    close,
    dense_model,
    images,
    problem_of,
    random_plan,
    variant,
)
from sweeps import swept
from torch import nn

from toolchain.compress.branches import captured
from toolchain.compress.sensitivity import Sensitivity
from toolchain.compress.stage import Compress, pruned_shares
from toolchain.cost import Widths, trace
from toolchain.data import open_source
from toolchain.data.transforms import Wanted
from toolchain.errors import ModelError
from toolchain.export.attention import lean
from toolchain.families import family_of
from toolchain.families.swin import SWIN as FAMILY
from toolchain.families.swin import SWIN_V2 as FAMILY_V2
from toolchain.model import run_stage
from toolchain.plan import ModelRef
from toolchain.recipe import BudgetSection
from toolchain.surgery.mask import mask_model
from toolchain.surgery.replay import create_dense, load_model, save_model
from toolchain.surgery.shapes import shapes_only
from toolchain.surgery.slice import Slice
from toolchain.surgery.split import Split


def meta(name, **kwargs):
    with shapes_only():
        return create_dense(ModelRef(name=name, kwargs=kwargs))


@pytest.mark.parametrize("case", SWIN)
def test_arranged_is_what_the_attention_is_given(case):
    """Weights of tokens have to follow their tokens through shift, padding and cutting."""
    model = variant(case)
    for block in model.family.blocks(model.module):
        branch, part = block.branches[0], model.module.get_submodule(block.path)
        entering = {}
        handle = part.register_forward_pre_hook(lambda _m, args, entering=entering: entering.update(x=args[0]))
        with torch.no_grad(), captured(model.module, {branch.module: "in"}) as seen:
            model.module(images(model))
        handle.remove()
        x = entering["x"] if branch.norm is not None else part.norm1(entering["x"])
        assert torch.equal(branch.arranged(model.module, x), seen[branch.module])


def test_what_fills_a_window_up_weighs_nothing():
    model = variant("Swin, padded windows")
    tokens = 1 + torch.arange(100).double()
    care = Sensitivity(torch.eye(32).double(), torch.eye(32).double(), tokens)
    plain, shifted = (block.branches[0] for block in model.family.blocks(model.module)[:2])
    for branch in (plain, shifted):
        weights = care.weights(model.module, branch, torch.zeros(2, 10, 10, 32))
        assert weights.shape == (2 * 9, 16)
        assert sorted(weights[:9].flatten().tolist()) == sorted([*tokens.tolist(), *[0.0] * 44])
    assert care.weights(model.module, shifted, torch.zeros(1, 10, 10, 32))[0, 0] == 1 + 2 * 10 + 2, "rolled by 2 and 2"


def test_every_window_is_counted():
    """10×10 tokens are 9 windows of 16, 5×5 are 4; queries, keys and values are of all tokens, padding too."""
    model = variant("Swin, padded windows")
    shape = trace(model.module, model.family, model.preprocess.input_size)
    assert shape.attentions["layers.0.blocks.1.attn"].macs == 9 * 2 * 2 * 16**2 * 16
    assert shape.attentions["layers.1.blocks.0.attn"].macs == 4 * 2 * 4 * 16**2 * 16
    assert shape.linears["layers.0.blocks.0.attn.qkv"].rows == 9 * 16
    assert shape.linears["layers.0.blocks.0.mlp.fc1"].rows == 100


@pytest.mark.parametrize("case", ["Swin V2", "relative position MLP"])
def test_what_is_made_of_coordinates_alone_is_no_work_for_an_image(case):
    """Files hold its outcome: what is counted are the linears of the model that is exported."""
    model = variant(case)
    shape = trace(model.module, model.family, model.preprocess.input_size)
    shipped = lean(copy.deepcopy(model.module))
    assert set(shape.linears) == {name for name, part in shipped.named_modules() if isinstance(part, nn.Linear)}
    assert shape.linears.keys() < {name for name, part in model.module.named_modules() if isinstance(part, nn.Linear)}
    assert shape.params == sum(parameter.numel() for parameter in model.module.parameters())


@pytest.mark.parametrize("head", [nn.Identity(), nn.Sequential(nn.Linear(64, 4))])
def test_a_head_that_is_not_timms_is_no_classifier(head):
    model = meta("swin_tiny_patch4_window7_224", **TINY_SWIN)
    model.head = head
    assert FAMILY.classifier(model) is None


def test_what_is_left_alone_is_said():
    assert FAMILY.restrictions(variant("Swin").module) == []
    (reason,) = FAMILY_V2.restrictions(variant("Swin V2").module)
    assert reason == "head dims are left alone because of cosine attention; attention can shrink by low rank"
    assert "head_dim" not in {group.unit for group in variant("Swin V2").groups}


@pytest.mark.parametrize(
    ("name", "kwargs", "reason"),
    [
        (V1, {"global_pool": ""}, "a row of logits per token"),
        ("swinv2_cr_tiny_224", {}, "SwinTransformerV2Cr belongs to no known family"),
    ],
)
def test_an_unsupported_model_is_refused_with_the_reason(name, kwargs, reason):
    with pytest.raises(ModelError, match=f"{name} is not supported: .*{reason}.*See `slimvit models`"):
        family_of(meta(name, **kwargs), name)


@pytest.mark.parametrize(("family", "name"), [(FAMILY, V1), (FAMILY_V2, V2)])
def test_other_parts_are_refused_by_path(family, name):
    class Other(nn.Module):
        attn: nn.Module

    for path, reason in (
        ("layers.1.blocks.0.attn", r"layers.1.blocks.0.attn is a Other; only timm's WindowAttention is supported"),
        ("layers.1.blocks.0.mlp", "layers.1.blocks.0.mlp is a Other; only Mlp"),
    ):
        model = meta(name, **TINY_SWIN)
        assert family.refuses(model) is None
        model.set_submodule(path, Other())
        assert str(family.refuses(model)).startswith(reason)
    model = meta(name, **TINY_SWIN)
    block = model.layers[0].blocks[1]
    model.layers[0].blocks[1] = type("Other", (type(block),), {})(32, (8, 8), 2)
    assert "layers.0.blocks.1 is a Other" in str(family.refuses(model))


@pytest.mark.parametrize("name", [V1, V2])
@pytest.mark.parametrize("pool", ["avg", ""])
def test_features_and_tokens(name, pool):
    """Without a classifier the head gives the pooled vector, or the tokens on their grid."""
    model = dense_model(name, **{**TINY_SWIN, "num_classes": 0, "global_pool": pool})
    assert model.family.classifier(model.module) is None
    plan = random_plan(model, low_rank=False)
    deploy = run_stage(Split(), run_stage(Slice(), mask_model(model, copy.deepcopy(model.module), plan)).artifact)
    with torch.no_grad():
        outputs = deploy.artifact.module(images(model))
    assert outputs.shape == ((3, 64) if pool else (3, 4, 4, 64))


@pytest.mark.parametrize("case", swept(["Swin, padded windows", "Swin V2"], []))
def test_the_closed_form_end_to_end(case, tmp_path):
    """Masked, sliced, split and rebuilt are one function; the budget is met as predicted; most of the function is left."""
    model = variant(case)
    size = model.preprocess.input_size
    source = open_source("digits", Wanted(size, {}, calibration_images=48))
    problem = problem_of(model, budget=BudgetSection(params=0.8))
    masked = run_stage(Compress(source), problem).artifact
    deploy = run_stage(Split(), run_stage(Slice(), masked).artifact).artifact
    x = torch.stack([source.split("test")[index][0] for index in range(16)])
    with torch.no_grad():
        dense, m, d = (each.module(x) for each in (model, masked, deploy))
        assert close(m, d)
        assert torch.equal(load_model(save_model(deploy, tmp_path / "deploy")).module(x), d)
    apart, spread = (dense - m).square().mean(), (dense - dense.mean(0)).square().mean()
    assert 0 < apart < 0.1 * spread
    predicted = problem.costs.shape(Widths.of(masked.plan))
    counted = trace(deploy.module, deploy.family, size)
    left = sum(parameter.numel() for parameter in deploy.module.parameters())
    assert left == predicted.params == counted.params <= 0.8 * problem.shape.params
    assert predicted.macs == counted.macs < problem.shape.macs
    assert {row.block for row in pruned_shares(masked)} <= {block.path for block in model.family.blocks(model.module)}
