"""VTP's gates: they start as nothing, fold into the weights exactly, and only L1 pulls them down."""

from __future__ import annotations

import copy

import pytest
import torch
from builders import STRUCTURES, TINY, dense_model
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from toolchain.compress import gates as gates_module
from toolchain.compress.criteria import Evidence, Lessons
from toolchain.compress.factorisations import factorise, truncated_svd
from toolchain.compress.gates import add_gates, learn_gates
from toolchain.families import UnitGroup
from toolchain.likelihood import CATEGORICAL
from toolchain.model import TimmModel
from toolchain.recipe import CompressSection, VtpSection
from toolchain.surgery.mask import baked

LAYOUTS = {
    "Mlp": {},
    "packed SwiGLU": {"name": "vit_giant_patch14_dinov2", "img_size": 28, "patch_size": 14},
    "parallel scaling": STRUCTURES["parallel scaling"],
}


def build(layout: str = "Mlp") -> TimmModel:
    kwargs = {**TINY, **LAYOUTS[layout]}
    return dense_model(str(kwargs.pop("name", "vit_tiny_patch16_224")), **kwargs)


def gated_groups(model: TimmModel) -> list[UnitGroup]:
    return [group for group in model.groups if group.partitions == 1]


def data(model: TimmModel, count: int = 16) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    shape = model.preprocess.input_size
    return TensorDataset(
        torch.randn(count, *shape, generator=generator), torch.randint(0, 7, (count,), generator=generator)
    )


def opened(gates: dict[tuple[str, str], nn.Parameter]) -> None:
    """Random values for all gates, some of them 0 and some negative."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for gate in gates.values():
            gate.copy_(torch.randn(gate.shape, generator=generator))
            gate[::5] = 0


def gating_activations(model: TimmModel, gates: dict[tuple[str, str], nn.Parameter]) -> nn.Module:
    """The dense model with a ∘ x before every linear that reads a gated unit: the definition of a gate."""
    module = copy.deepcopy(model.module)
    for group in model.groups:
        gate = gates.get((group.module, group.unit))
        if gate is None:
            continue
        values = gate.detach().clone()
        for name, offset in dict.fromkeys((span.linear, span.offset) for span in group.spans if span.axis == 1):
            part = torch.arange(offset, offset + group.total)
            module.get_submodule(name).register_forward_pre_hook(
                lambda _m, args, a=values, part=part: (args[0].index_copy(-1, part, args[0][..., part] * a),)
            )
    return module


@pytest.mark.parametrize("layout", LAYOUTS)
def test_open_gates_change_nothing(layout):
    model = build(layout)
    module = copy.deepcopy(model.module)
    gates = add_gates(module, gated_groups(model))
    assert list(gates) == [(g.module, g.unit) for g in gated_groups(model)]
    alone = set() if layout == "parallel scaling" else {"mlp_in"}  # else it reads what attention reads
    assert {unit for _, unit in gates} == {"attn_in", "attn_out", "mlp_hidden", *alone}
    x = data(model).tensors[0]
    with torch.no_grad():
        assert torch.equal(module(x), model.module(x))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("low_rank", [False, True])
def test_gated_weights_are_gated_activations_and_fold_exactly(layout, low_rank):
    model = build(layout)
    if low_rank:
        linears = [item.linear for item in model.family.factorizable(model.module) if item.kind == "attention"]
        factorise(model.module, {linears[0]: 20, linears[1]: 12}, truncated_svd)
    module = copy.deepcopy(model.module)
    gates = add_gates(module, gated_groups(model))
    opened(gates)
    folded = baked(module)
    x = data(model).tensors[0]
    with torch.no_grad():
        dense, gated = model.module(x), module(x)
        assert torch.equal(folded(x), gated)
        expected = gating_activations(model, gates)(x)
    assert (gated - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
    assert (gated - dense).abs().max() > 1e-2 * dense.std(), "the gates changed nothing: vacuous"
    assert [name for name, _ in folded.named_parameters()] == [name for name, _ in model.module.named_parameters()]


def test_a_closed_gate_leaves_a_column_of_zeros():
    model = build()
    module = copy.deepcopy(model.module)
    gates = add_gates(module, gated_groups(model))
    opened(gates)
    column = baked(module).blocks[0].mlp.fc2.weight[:, ::5]
    assert not column.any()


def test_gradients_reach_gates_and_weights():
    model = build()
    gates = add_gates(model.module, gated_groups(model))
    model.module(data(model).tensors[0]).square().sum().backward()
    for gate in gates.values():
        assert gate.grad is not None
        assert (gate.grad != 0).all()
    assert model.module.blocks[0].mlp.fc2.parametrizations.weight.original.grad is not None


# Training


def train(model: TimmModel, **config: object):
    """(module, scores) after a short training of the gates."""
    module = copy.deepcopy(model.module)
    section = CompressSection(vtp=VtpSection(**{"epochs": 2, "batch_size": 8, **config}))
    known = Evidence(module, gated_groups(model), data(model), section, Lessons(data(model), CATEGORICAL))
    scores, result = learn_gates(known)
    assert len(result.losses) == section.vtp.epochs
    return module, scores


def test_scores_are_the_absolute_gates():
    model = build()
    module, scores = train(model, gate_lr=0.5, l1=0.5)
    gate = module.blocks[0].mlp.fc2.parametrizations.weight[0].values
    found = scores["blocks.0.mlp", "mlp_hidden"]
    assert torch.equal(found, gate.detach().abs().double())
    assert (gate < 0).any(), "no gate is negative: the test does not see the absolute value"
    assert {key: value.shape for key, value in scores.items()} == {
        (g.module, g.unit): (g.total,) for g in gated_groups(model)
    }


def test_weight_decay_is_on_weights_and_not_on_gates(watched):
    model = build()
    calls = watched(gates_module, "fit")
    module, _ = train(model, gate_lr=0.03)
    (call,) = calls
    groups = call.options["param_groups"](module, call.options["config"])
    gates = {id(p) for name, p in module.named_parameters() if name.endswith(".values")}
    assert len(gates) == len(gated_groups(model))
    decayed = {id(p) for g in groups if g["weight_decay"] for p in g["params"]}
    rates = {g.get("lr") for g in groups if {id(p) for p in g["params"]} & gates}
    assert not decayed & gates
    assert rates == {0.03}
    assert id(module.blocks[0].mlp.fc2.parametrizations.weight.original) in decayed
    everything = [id(p) for g in groups for p in g["params"]]
    assert sorted(everything) == sorted(id(p) for p in module.parameters()), "a parameter is missing or there twice"


def test_l1_shrinks_the_gates_and_nothing_else_does():
    model = build()
    means = []
    for l1 in (0.0, 1e-2, 1.0):
        _, scores = train(model, l1=l1, gate_lr=0.02, epochs=3)
        means.append(float(torch.cat(list(scores.values())).mean()))
    assert means[0] == pytest.approx(1.0, abs=0.02)
    assert means[0] > means[1] > means[2]
    assert means[2] < 0.95


def test_training_is_the_same_twice_and_leaves_the_global_state_alone():
    model = build()
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        module, scores = train(model)
        assert torch.equal(torch.random.get_rng_state(), before)
        results.append((scores, baked(module).state_dict()))
    (one, weights), (two, again) = results
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert all(torch.equal(weights[name], again[name]) for name in weights)


def test_the_weights_train_with_the_gates():
    model = build()
    module, _ = train(model, lr=1e-3)
    trained: Tensor = module.blocks[1].mlp.fc1.weight
    assert not torch.equal(trained, model.module.blocks[1].mlp.fc1.weight)
