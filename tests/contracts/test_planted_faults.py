"""A fault planted into one stage of a whole run: the rung right after that stage breaks, and is named.

Faults of a conversion to another precision are in tests/export/test_precision.py.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from toolchain.errors import ParityError, SlimvitError
from toolchain.export import onnx_graph
from toolchain.pipeline.run import run
from toolchain.pipeline.stages import base, deploy
from toolchain.recipe import Recipe
from toolchain.surgery import mask, replay, split
from toolchain.surgery import slice as slicing
from toolchain.targets.openvino_cpu import OpenVinoCpu

HEADS, DIM = 2, 32
MODEL = {
    "name": "vit_tiny_patch16_224",
    "kwargs": {
        "img_size": 8,
        "patch_size": 2,
        "in_chans": 1,
        "num_classes": 10,
        "embed_dim": DIM,
        "depth": 2,
        "num_heads": HEADS,
    },
    "pretrained": False,
}
JOINT, HYBRID = "joint", "hybrid"  # smaller heads; low-rank pairs
Plant = Callable[[pytest.MonkeyPatch], None]


def carried_out(out, method, **more):
    raw = {
        "model": MODEL,
        "data": {"source": "none"},
        "compress": {"method": method, "allocation": "uniform"},
        "budget": {"params": 0.6},
    }
    return run(Recipe.from_dict({**raw, **more}), out)


def plant(patch, owner, name, faulty):
    """Puts a fault in place of `owner.name` until the test ends."""
    patch.setattr(owner, name, faulty)


def then(patch, owner, name, fault):
    """After `owner.name(first, ...)`, `fault` gets what it returned, or `first` if it returned nothing."""
    honest = getattr(owner, name)

    def faulty(first, *args, **kwargs):
        made = honest(first, *args, **kwargs)
        fault(first if made is None else made)
        return made

    plant(patch, owner, name, faulty)


def before(patch, owner, name, fault):
    """`owner.name` gets what `fault` makes of a copy of its first argument."""
    honest = getattr(owner, name)

    def faulty(first, *args, **kwargs):
        changed = copy.deepcopy(first)
        fault(changed)
        return honest(changed, *args, **kwargs)

    plant(patch, owner, name, faulty)


@torch.no_grad()
def without_bias(module):
    bias = module.get_submodule("blocks.1.mlp.fc1").bias
    assert bias.abs().max() > 1e-2
    bias.zero_()


@torch.no_grad()
def heads_swapped(module):
    """What the output of attention reads of two heads, exchanged."""
    proj = module.get_submodule("blocks.0.attn.proj")
    assert module.get_submodule("blocks.0.attn").num_heads == HEADS > 1
    proj.weight.copy_(proj.weight.roll(proj.in_features // HEADS, dims=1))


def bias_lost(patch):
    then(patch, split, "split_module", without_bias)


def mask_not_applied(patch):
    for owner in (mask, replay):
        plant(patch, owner, "add_masks", lambda *_: None)


def mask_not_written(patch):
    plant(patch, mask, "add_masks", lambda *_: None)


def others_sliced(patch):
    honest = slicing.kept_positions

    def turned(module, keeps):
        return {where: flags.flip(0) for where, flags in honest(module, keeps).items()}

    plant(patch, slicing, "kept_positions", turned)


def scale_forgotten_by_slice(patch):
    plant(patch, slicing, "math", SimpleNamespace(sqrt=lambda _: 1.0))


def heads_swapped_by_slice(patch):
    then(patch, slicing, "slice_module", heads_swapped)


def pair_folded_back(patch):
    plant(patch, split, "pair_pays", lambda *_: False)


def others_written(owner):
    def written(patch):
        before(patch, owner, "save_model", lambda model: without_bias(model.module))

    written.__name__ = f"others_written_by_{owner.__name__.rpartition('.')[2]}"
    return written


def scale_forgotten_by_export(patch):
    honest = onnx_graph.lean

    @torch.no_grad()
    def forgotten(module):
        scales = {part: part.scale for part in module.modules() if hasattr(part, "q_norm")}
        made = honest(module)
        for part, scale in scales.items():
            assert (part.scale, scale) == (1.0, pytest.approx(part.head_dim**-0.5, rel=0.5))
            last = [each for each in part.qkv.modules() if isinstance(each, nn.Linear)][-1]
            for values in (last.weight, last.bias):
                values[: part.num_heads * part.head_dim] /= scale
        return made

    plant(patch, onnx_graph, "lean", forgotten)


def pair_folded_back_by_export(patch):
    def folded(module):
        for block in module.blocks:
            if isinstance(block.attn.proj, nn.Sequential):
                down, up = block.attn.proj
                whole = nn.Linear(down.in_features, up.out_features)
                whole.weight, whole.bias = nn.Parameter(up.weight @ down.weight), up.bias
                block.attn.proj = whole
        return module

    plant(patch, onnx_graph, "lean", folded)


def batch_frozen(patch):
    honest = torch.onnx.export
    plant(patch, torch.onnx, "export", lambda *args, **kwargs: honest(*args, **{**kwargs, "dynamic_shapes": None}))


def changed_weight(name, change):
    def fault(model):
        tensor = next(each for each in model.graph.initializer if each.name.endswith(name))
        values = change(numpy_helper.to_array(tensor))
        assert not np.array_equal(values, numpy_helper.to_array(tensor))
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    return fault


def bias_lost_by_export(patch):
    before(patch, onnx_graph, "write_onnx", changed_weight("blocks.1.mlp.fc1.bias", np.zeros_like))


def pixels_misread(patch):
    before(patch, onnx_graph, "write_onnx", changed_weight("patch_embed.proj.weight", lambda w: w[..., ::-1].copy()))


def other_engine(patch, name, change):
    """The engine of a model with another bias."""
    honest = OpenVinoCpu.build

    def faulty(target, path, folder, options):
        model = onnx.load(path)
        changed_weight(name, change)(model)
        other = folder.parent / path.name
        onnx.save(model, other)
        return honest(target, other, folder, options)

    plant(patch, OpenVinoCpu, "build", faulty)


FAULTS: list[tuple[Plant, str, str]] = [
    (others_written(base), JOINT, "from dense to reloaded is the first"),
    (mask_not_written, HYBRID, "from masked to reloaded is the first"),
    (mask_not_applied, HYBRID, "from masked to sliced is the first"),
    (others_sliced, JOINT, "from masked to sliced is the first"),
    (scale_forgotten_by_slice, JOINT, "from masked to sliced is the first"),
    (heads_swapped_by_slice, JOINT, "from masked to sliced is the first"),
    (bias_lost, JOINT, "from sliced to split is the first"),
    (pair_folded_back, HYBRID, "the split model has .* parameters, more than"),
    (others_written(deploy), JOINT, "from split to deploy is the first"),
    (scale_forgotten_by_export, JOINT, r"from dense to dense\.fp32\.onnx is the first"),
    (bias_lost_by_export, JOINT, r"from dense to dense\.fp32\.onnx is the first"),
    (pixels_misread, JOINT, r"from dense to dense\.fp32\.onnx is the first"),
    (pair_folded_back_by_export, HYBRID, "lost linears of shape .* merged or folded on the way"),
    (batch_frozen, JOINT, r"an input of shape \(2, 1, 8, 8\), expected"),
]


@pytest.mark.parametrize("method", [JOINT, HYBRID])
def test_without_a_fault_every_rung_passes(tmp_path, method):
    report = carried_out(tmp_path, method)
    assert {rung.verdict for rung in report.parity} == {"pass"}
    ladder = " ".join(f"{rung.from_}=={rung.to}" for rung in report.parity)
    assert ladder == (
        "dense==reloaded dense==dense.fp32.onnx masked==reloaded masked==sliced sliced==split split==deploy "
        "deploy==compressed.fp32.onnx"
    )


@pytest.mark.parametrize(("fault", "method", "words"), FAULTS, ids=[fault.__name__ for fault, *_ in FAULTS])
def test_a_fault_is_caught_by_the_rung_after_it(tmp_path, monkeypatch, fault, method, words):
    fault(monkeypatch)
    with pytest.raises(SlimvitError, match=words) as caught:
        carried_out(tmp_path, method)
    assert caught.value.exit_code == 3


# Half of that bias lies on the bound itself: cosines of 0.99990 and 0.99989 on two processors, and 0.9999 is allowed.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "change"),
    [("head.bias", lambda bias: bias[::-1].copy()), ("blocks.1.mlp.fc1.bias", lambda bias: 0 * bias)],
)
def test_an_engine_of_another_model_is_caught(tmp_path, monkeypatch, name, change):
    pytest.importorskip("openvino")
    other_engine(monkeypatch, name, change)
    with pytest.raises(ParityError, match=r"from compressed\.fp32\.onnx to compressed\.fp32\.xml is the first"):
        carried_out(tmp_path, JOINT, engine={"targets": ["openvino-cpu"]})
