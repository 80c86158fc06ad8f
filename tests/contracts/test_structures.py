"""Every block structure of timm that a family claims is proven: masked, sliced, split and exported, it is one function.

The structures are found, not listed: a timm release that adds one is tested at once, or fails here.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnx
import onnxruntime as ort
import pytest
import timm
import torch
from builders import FLEXIBLE, STRUCTURES, close, dense_model, images, named, random_plan, with_random_factors
from structures import Structure, kinds_in, structures_of
from sweeps import swept
from torch import nn

from toolchain.errors import ModelError, SlimvitError
from toolchain.export.onnx_graph import export_onnx
from toolchain.families import FAMILIES
from toolchain.model import DeployModel, TimmModel, run_stage
from toolchain.plan import ModelRef
from toolchain.surgery.replay import create_dense
from toolchain.surgery.shapes import shapes_only
from toolchain.surgery.slice import Slice
from toolchain.surgery.split import Split
from toolchain.surgery.support import Support, judge

MODULES = tuple(dict.fromkeys(module for family in FAMILIES.values() for module in family.timm_modules))
PROMISED = (
    *("vision_transformer", "deit", "eva", "naflexvit", "vision_transformer_hybrid", "vision_transformer_relpos"),
    *("beit", "swin_transformer", "swin_transformer_v2"),
)
HEADS, HEAD_DIM = 3, 16
UNKNOWN_AT_EXPORT = {"Sin", "Cos", "Range", "If", "Loop"}
"""What positions, masks and sizes would be computed with, if they were no constants of the file."""


def shapes(name: str, **kwargs: object) -> nn.Module:
    with shapes_only():
        return create_dense(ModelRef(name=name, kwargs=kwargs))


@cache
def survey(module: str) -> Mapping[str, tuple[Support, frozenset[Structure]]]:
    """Name → how far it is supported, and the structures of its blocks, for every name of one module of timm."""
    rows = {}
    for name in timm.list_models(module=module):
        model = shapes(name)
        support = judge(model, name, module)
        rows[name] = support, frozenset() if support.support == "refused" else structures_of(model, name)
    return rows


@cache
def representatives(module: str) -> Mapping[str, frozenset[Structure]]:
    """Name → all structures of its blocks, for the first name of each structure."""
    seen: set[Structure] = set()
    first = {}
    for name, (_, structures) in survey(module).items():
        if structures - seen:
            first[name] = structures
            seen |= structures
    return first


def kinds_of(structures: frozenset[Structure]) -> Iterator[object]:
    """The classes of all modules in some structures that are made of others."""
    for _, block, shared in structures:
        yield from kinds_in(block)
        yield from kinds_in(("", *shared))


@cache
def listed_kinds() -> frozenset[object]:
    """Of the structures in `builders`."""
    found = (structures_of(shapes(name, **kwargs), name) for name, kwargs in map(named, STRUCTURES))
    return frozenset(kind for structures in found for kind in kinds_of(structures))


def of_new_kinds(module: str) -> set[str]:
    """Those representatives in which a class of module is for the first time, of modules that are made of others.

    Files of the structures that are listed in `builders` are proven in tests/interpreter.
    """
    seen = set(listed_kinds())
    names = set()
    for name, structures in representatives(module).items():
        kinds = set(kinds_of(structures))
        if kinds - seen:
            names.add(name)
            seen |= kinds
    return names


def smaller(name: str) -> Iterator[dict[str, object]]:
    """Keyword arguments that may make a small model of the same structures, without a classifier; the smallest first."""
    model = shapes(name)
    if hasattr(model, "layers"):
        stages = {"depths": (2, 2), "embed_dim": 2 * HEAD_DIM, "num_heads": (2, 4), "window_size": 4, "img_size": 32}
        more: tuple[dict[str, object], ...] = ({}, {"pretrained_window_sizes": (2, 2)})
        yield from ({"num_classes": 0, **stages, **each} for each in more)
        return
    if hasattr(model, "patch_embed"):
        size: dict[str, object] = {"img_size": 2 * model.patch_embed.img_size[0] // model.patch_embed.grid_size[0]}
    else:
        size = dict(FLEXIBLE)
    size["num_classes"] = 0
    kwargs = {**size, "embed_dim": HEADS * HEAD_DIM, "num_heads": HEADS}
    more = ({}, {"num_kv_heads": 1}, {"num_kv_heads": (HEADS, 1)}, {"attn_head_dim": HEAD_DIM // 2})
    yield from ({**kwargs, "depth": depth, **each} for depth in (1, 2) for each in more)
    yield {**size, "depth": 1}  # a stem may decide on the width


def small(name: str, structures: frozenset[Structure]) -> TimmModel:
    """A small model whose blocks have the structures of the one that timm has by that name."""
    for kwargs in smaller(name):
        try:
            model = shapes(name, **kwargs)
        except ModelError:  # it knows no such argument
            continue
        if structures_of(model, name) == structures:
            return dense_model(name, **kwargs)
    raise AssertionError(
        f"{name} is supported, but no small model of its structure can be built: `smaller` needs a case"
    )


def halved(model: TimmModel) -> DeployModel:
    """The deployed form of half of a model, after masked, sliced and split were seen to be one function."""
    plan = random_plan(model)
    masked = with_random_factors(model, plan)
    sliced = run_stage(Slice(), masked).artifact
    deploy = run_stage(Split(), sliced).artifact
    with torch.no_grad():
        dense, m, s, d = (form.module(images(model)) for form in (model, masked, sliced, deploy))
    spread = float(dense.std(0).max())
    assert spread > 1e-3, "all images look alike: vacuous"
    assert float((dense - m).abs().max()) > 0.1 * spread, "nothing was removed: vacuous"
    assert close(m, s), "masked and sliced differ"
    assert close(s, d), "sliced and split differ"
    return deploy


def exported(model: TimmModel, deploy: DeployModel, path: Path) -> None:
    """Asserts that the file of a deployed model is the model at any batch."""
    size = model.preprocess.input_size
    export_onnx(deploy.module, path, input_size=size, opset=20, metadata={}, simplify=False)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    x = images(model)
    with torch.no_grad():
        wanted = deploy.module(x)
    for batch in (1, 3):
        (got,) = session.run(None, {session.get_inputs()[0].name: x[:batch].numpy()})
        assert close(torch.from_numpy(got), wanted[:batch], 1e-4), f"the file differs at batch {batch}"
    assert not UNKNOWN_AT_EXPORT & {node.op_type for node in onnx.load(path).graph.node}


def shrinks_everywhere(model: TimmModel, deploy: DeployModel) -> bool:
    """Whether every block lost parameters of its attention and of its feed-forward part."""

    def size(form: TimmModel | DeployModel, path: str) -> int:
        return sum(parameter.numel() for parameter in form.module.get_submodule(path).parameters())

    branches = [branch for block in model.family.blocks(model.module) for branch in block.branches]
    return all(size(deploy, branch.module) < size(model, branch.module) for branch in branches)


def prove(module: str, names: Collection[str], files: Collection[str], folder: Path) -> None:
    """Asserts of some representatives that their structures can be reduced, and of some that they can be exported then."""
    faults = []
    for name in names:
        support, structures = survey(module)[name]
        try:
            model = small(name, structures)
            deploy = halved(model)
            if name in files:
                exported(model, deploy, folder / f"{name}.onnx")
        except (AssertionError, SlimvitError, RuntimeError) as error:
            faults.append(f"{name}: {error}")
        else:
            if shrinks_everywhere(model, deploy) != (support.support == "full"):
                faults.append(f"{name}: that is not what was seen: {support}")
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize("step", swept([1, 4], [4]))
@pytest.mark.parametrize("module", MODULES)
def test_every_claimed_structure_is_proven(module, step, tmp_path):
    """Masked, sliced and split of each structure, or of each fourth; the file of each class of block and attention."""
    names = [*representatives(module)][::step]
    prove(module, names, of_new_kinds(module), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("module", MODULES)
def test_the_file_of_every_claimed_structure_is_proven(module, tmp_path):
    names = set(representatives(module)) - of_new_kinds(module)
    prove(module, names, names, tmp_path)


def test_names_of_one_structure_have_one_answer():
    """What was proven of the first name of a structure is said of all that have it."""
    answers: dict[frozenset[Structure], set[str]] = {}
    for module in MODULES:
        for support, structures in survey(module).values():
            if support.support != "refused":
                answers.setdefault(structures, set()).add(support.support)
    assert all(len(kinds) == 1 for kinds in answers.values())


def test_nearly_every_name_of_these_modules_is_supported():
    """At least 95 % of them, full or partial; everything else in timm is refused by the name of its module."""
    names = {name: support.support for module in PROMISED for name, (support, _) in survey(module).items()}
    assert len(names) > 250
    assert sum(answer != "refused" for answer in names.values()) >= 0.95 * len(names)
    assert {"deit_small_patch16_224", "vit_base_patch14_reg4_dinov2", "swin_tiny_patch4_window7_224"} <= set(names)


def test_an_attention_with_a_gate_is_one_function_in_every_form():
    """No name of timm's has one on its plain attention."""
    model = dense_model()
    torch.manual_seed(0)
    for block in model.module.blocks:
        block.attn.gate = nn.Linear(HEADS * HEAD_DIM, HEADS * HEAD_DIM)
    gated = replace(model, groups=tuple(model.family.unit_groups(model.module)))
    assert any(span.linear.endswith("gate") for group in gated.groups for span in group.spans)
    halved(gated)
