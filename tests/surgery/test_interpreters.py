"""The central promise: masking, slicing and splitting a plan give one and the same function."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from builders import STRUCTURES, TINY, TWINS, VARIANTS, dense_model, random_plan, variant
from hypothesis import given, settings
from hypothesis import strategies as st
from sweeps import swept
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from toolchain.cost import Widths, trace
from toolchain.errors import ArtifactError, PlanError, StorageError
from toolchain.families.constants import constants
from toolchain.model import DeployModel, MaskedModel, SlicedModel, TimmModel, run_stage
from toolchain.plan import CompressionPlan, Keep, LowRank
from toolchain.surgery.factorised import FactorisedLinear
from toolchain.surgery.mask import baked, mask_model
from toolchain.surgery.replay import factorise_structure, load_model, rebuild, save_model
from toolchain.surgery.scales import fold_scale
from toolchain.surgery.slice import Slice
from toolchain.surgery.split import Split


def images(model: TimmModel, batch: int = 3, seed: int = 1) -> Tensor:
    return torch.randn(batch, *model.preprocess.input_size, generator=torch.Generator().manual_seed(seed))


def masked_from(model: TimmModel, plan: CompressionPlan, seed: int = 0) -> MaskedModel:
    """The masked model with random factors of the original's scale in place of the factorised linears."""
    module = copy.deepcopy(model.module)
    factorise_structure(module, plan)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for child in module.modules():
            if isinstance(child, FactorisedLinear):
                for factor in (child.down, child.up):
                    factor.weight.normal_(0, factor.in_features**-0.5, generator=generator)
                if child.up.bias is not None:
                    child.up.bias.normal_(0, 0.1, generator=generator)
    return mask_model(model, module, plan)


def agree(a: Tensor, b: Tensor) -> bool:
    return bool((a - b).abs().max() <= 1e-5 * max(1.0, float(a.abs().max())))


def fused(module: nn.Module, flag: bool) -> nn.Module:
    for child in module.modules():
        if hasattr(child, "fused_attn"):
            child.fused_attn = flag
    return module


@pytest.mark.parametrize("case", swept(STRUCTURES))
@pytest.mark.parametrize("fused_attention", [True, False])
def test_mask_slice_and_split_agree(case: str, fused_attention: bool) -> None:
    model = variant(case)
    masked = masked_from(model, random_plan(model))
    sliced: SlicedModel = run_stage(Slice(), masked).artifact
    deploy: DeployModel = run_stage(Split(), sliced).artifact
    with torch.no_grad():
        x = images(model)
        dense, m, s, d = (fused(part.module, fused_attention)(x) for part in (model, masked, sliced, deploy))
    assert agree(m, s)
    assert agree(s, d)
    assert float((dense - m).abs().max()) >= 1e-2 * float(dense.std()), "the plan changes nothing: vacuous"


@settings(max_examples=20)
@given(data=st.data())
def test_any_plan_means_the_same_masked_and_sliced(data: st.DataObject) -> None:
    model = variant(data.draw(st.sampled_from(sorted(STRUCTURES))), seed=data.draw(st.integers(0, 3)))
    keeps, lows = [], []
    for group in model.groups:
        if data.draw(st.booleans()):
            size = data.draw(st.integers(1, group.total))
            parts = tuple(
                tuple(sorted(data.draw(st.permutations(range(group.total)))[:size])) for _ in range(group.partitions)
            )
            keeps.append(Keep(module=group.module, unit=group.unit, total=group.total, indices=parts))
    for item in model.family.factorizable(model.module):
        if data.draw(st.booleans()):
            out, into = model.module.get_submodule(item.linear).weight.shape
            rank = data.draw(st.integers(1, min(out, into)))
            lows.append(LowRank(module=item.linear, shape=(out, into), rank=rank))
    plan = CompressionPlan(model=model.ref, keeps=tuple(keeps), low_ranks=tuple(lows))
    masked = masked_from(model, plan)
    sliced = run_stage(Slice(), masked).artifact
    deploy = run_stage(Split(), sliced).artifact
    with torch.no_grad():
        x = images(model, batch=2)
        m, s, d = masked.module(x), sliced.module(x), deploy.module(x)
    assert torch.isfinite(m).all()
    assert agree(m, s)
    assert agree(s, d)
    check_cost(model, plan, deploy)


def check_cost(model: TimmModel, plan: CompressionPlan, deploy: DeployModel) -> None:
    """Predicted params and MACs against `numel` and torch's own counter, on the real module."""
    size = model.preprocess.input_size
    predicted = trace(model.module, model.family, size).shrunk(Widths.of(plan), model.groups)
    assert predicted.params == sum(p.numel() for p in deploy.module.parameters())
    plain = fused(copy.deepcopy(deploy.module).requires_grad_(False), flag=False)
    counter, of_tables = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with counter, torch.no_grad():
        plain(torch.zeros(1, *size))
    with of_tables, torch.no_grad():  # what the file holds as a constant is computed by the module in every call
        for constant in constants(plain):
            constant.part(constant.given)
    assert predicted.macs * 2 == counter.get_total_flops() - of_tables.get_total_flops()
    again = trace(deploy.module, deploy.family, size)
    assert (again.params, again.macs) == (predicted.params, predicted.macs)


@pytest.mark.parametrize("case", swept(STRUCTURES))
def test_dense_cost_is_what_torch_counts(case: str) -> None:
    model = variant(case)
    nothing = CompressionPlan(model=model.ref)
    check_cost(model, nothing, run_stage(Split(), run_stage(Slice(), masked_from(model, nothing)).artifact).artifact)


@pytest.mark.parametrize("case", [*VARIANTS, *TWINS])
def test_keeping_everything_changes_nothing(case: str) -> None:
    model = variant(case)
    plan = random_plan(model, share=1.0, low_rank=False)
    plan = plan.model_copy(
        update={
            "keeps": tuple(
                k.model_copy(update={"indices": (tuple(range(k.total)),) * len(k.indices)}) for k in plan.keeps
            )
        }
    )
    sliced = run_stage(Slice(), masked_from(model, plan)).artifact
    with torch.no_grad():
        x = images(model)
        assert torch.equal(model.module(x), sliced.module(x))


@pytest.mark.parametrize("case", swept([*VARIANTS, *TWINS]))
@pytest.mark.parametrize("stage", ["dense", "masked", "sliced", "deploy"])
def test_replay_is_bit_equal(case: str, stage: str, tmp_path) -> None:
    model = variant(case)
    masked = masked_from(model, random_plan(model))
    sliced = run_stage(Slice(), masked).artifact
    forms = {"dense": model, "masked": masked, "sliced": sliced, "deploy": run_stage(Split(), sliced).artifact}
    again = load_model(save_model(forms[stage], tmp_path / stage))
    assert type(again) is type(forms[stage])
    with torch.no_grad():
        x = images(model)
        assert torch.equal(forms[stage].module(x), again.module(x))
    if stage != "dense":
        assert again.plan.digest == forms[stage].plan.digest


def test_masks_hold_while_weights_train(tiny: TimmModel) -> None:
    masked = masked_from(tiny, random_plan(tiny, low_rank=False))
    before = baked(masked.module)
    optimiser = torch.optim.AdamW(masked.module.parameters(), lr=1e-2, weight_decay=0.1)
    for step in range(3):
        optimiser.zero_grad()
        masked.module(images(tiny, seed=step)).square().sum().backward()
        optimiser.step()
    after = baked(masked.module)
    for (name, old), (_, new) in zip(before.named_parameters(), after.named_parameters(), strict=True):
        assert torch.equal(new[old == 0], old[old == 0]), name
    assert not torch.equal(before.blocks[0].mlp.fc1.weight, after.blocks[0].mlp.fc1.weight)


def test_forgetting_the_query_scale_is_caught(tiny: TimmModel) -> None:
    groups = tuple(g if g.unit != "head_dim" else type(g)(**{**vars(g), "rescale_on_slice": ()}) for g in tiny.groups)
    masked = masked_from(tiny, random_plan(tiny, low_rank=False))
    wrong = run_stage(Slice(), type(masked)(**{**vars(masked), "groups": groups})).artifact
    with torch.no_grad():
        x = images(tiny)
        assert not agree(masked.module(x), wrong.module(x))


@pytest.mark.parametrize("kwargs", [{}, {"proj_bias": False}])
@pytest.mark.parametrize("factorised", [False, True])
def test_a_folded_scale_leaves_the_function_and_ones(kwargs: dict[str, bool], factorised: bool) -> None:
    model = dense_model("vit_tiny_patch16_224", **TINY, init_values=0.1, **kwargs)
    plan = random_plan(model, low_rank=True)
    module = baked(masked_from(model, plan).module) if factorised else copy.deepcopy(model.module)
    x = images(model)
    with torch.no_grad():
        before = module(x)
        branches = model.family.branches(module)
        assert not factorised or any(
            isinstance(module.get_submodule(branch.reader), FactorisedLinear) for branch in branches
        )
        assert all(fold_scale(module, branch) for branch in branches)
        assert all(module.get_parameter(branch.scale).eq(1).all() for branch in branches)
        assert agree(before, module(x))
        without = dense_model()
        none = without.family.branches(without.module)
        assert not any(fold_scale(without.module, branch) for branch in none)


def test_a_plan_for_another_model_is_refused(tiny: TimmModel) -> None:
    plan = random_plan(tiny)
    other = dense_model("vit_tiny_patch16_224", **{**TINY, "embed_dim": 96})
    with pytest.raises(PlanError, match="made for another model"):
        mask_model(other, copy.deepcopy(other.module), plan)
    keep = Keep(module="blocks.9.mlp", unit="mlp_hidden", total=192, indices=((0,),))
    stray = CompressionPlan(model=tiny.ref, keeps=(keep,))
    with pytest.raises(PlanError, match=r"blocks\.9\.mlp"):
        mask_model(tiny, copy.deepcopy(tiny.module), stray)


def test_altered_or_misfitting_weights_are_refused(tiny: TimmModel, tmp_path) -> None:
    folder = save_model(tiny, tmp_path / "dense")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ArtifactError, match="sha256"):
        load_model(folder)
    state = {**tiny.module.state_dict(), "extra": torch.zeros(1)}
    with pytest.raises(ArtifactError, match="do not fit"):
        rebuild(tiny.ref, "dense", None, state, tiny.preprocess, {})


@pytest.mark.parametrize(
    "key", ["schema", "stage", "model", "preprocess", "provenance", "weights_sha256", "structure", "plan"]
)
def test_a_record_that_lacks_a_key_is_refused(tiny: TimmModel, tmp_path, key: str) -> None:
    record = save_model(tiny, tmp_path / "dense") / "model.json"
    content = json.loads(record.read_text())
    del content[key]
    record.write_text(json.dumps(content))
    with pytest.raises(ArtifactError, match=r"slimvit\.model/1 record" if key == "schema" else f"at {key}: Field"):
        load_model(tmp_path / "dense")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"stage": "baked"}, "invalid at stage"),
        ({"weights_sha256": 3}, "invalid at weights_sha256"),
        ({"preprocess": {"input_size": [3, 32]}}, r"invalid at preprocess\.input_size"),
        ({"model": {"name": "vit_tiny_patch16_224", "kwargs": {"checkpoint_path": "x.pth"}}}, r"use model\.checkpoint"),
        ({"model": {"name": "vit_tiny_patch16_224", "kwargs": {"pretrained": True}}}, r"use model\.checkpoint"),
    ],
)
def test_a_record_that_says_something_else_is_refused(tiny: TimmModel, tmp_path, change, said: str) -> None:
    record = save_model(tiny, tmp_path / "dense") / "model.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), **change}))
    with pytest.raises(ArtifactError, match=said):
        load_model(tmp_path / "dense")


def test_a_folder_of_the_users_is_not_replaced(tiny: TimmModel, tmp_path) -> None:
    folder = save_model(load_model(save_model(tiny, tmp_path / "dense")), tmp_path / "dense")
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(StorageError, match=r"notes\.txt"):
        save_model(tiny, folder)
    assert (folder / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("other", [0.25, 0.75])
def test_a_sliced_model_of_another_width_is_refused(tiny: TimmModel, other: float) -> None:
    masked = masked_from(tiny, random_plan(tiny, low_rank=False))
    wrong = Slice()(masked_from(tiny, random_plan(tiny, low_rank=False, share=other))).artifact
    with pytest.raises(PlanError, match="the plan asks for"):
        Slice().ensures(masked, wrong)
    Slice().ensures(masked, Slice()(masked).artifact)
