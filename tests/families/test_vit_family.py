"""What the ViT family declares: where every unit lies, what it leaves alone, and what it refuses, with the reason."""

from __future__ import annotations

import pytest
import timm
import torch
from builders import TINY, VIT
from timm.layers.mlp import SwiGLU
from torch import nn

from toolchain.errors import ModelError
from toolchain.families import family_of
from toolchain.families.blocks import INSTEAD
from toolchain.families.vit import VitFamily
from toolchain.plan import ModelRef
from toolchain.surgery.replay import create_dense

FAMILY = VitFamily()
WIDTH, HEADS, DEPTH, HIDDEN = 48, 3, 2, 192
HEAD_DIM = WIDTH // HEADS


def meta(name: str = "vit_tiny_patch16_224", **kwargs: object) -> nn.Module:
    """A timm model without weights."""
    with torch.device("meta"):
        return create_dense(ModelRef(name=name, kwargs=kwargs))


def tiny(**kwargs: object) -> nn.Module:
    merged = {**TINY, **kwargs}
    return meta(str(merged.pop("name", "vit_tiny_patch16_224")), **merged)


def declared(model: nn.Module) -> dict[tuple[str, str], object]:
    return {(group.module, group.unit): group for group in FAMILY.unit_groups(model)}


# Units


@pytest.mark.parametrize("variant", VIT)
def test_every_block_declares_the_five_kinds(variant):
    model = tiny(**VIT[variant])
    units = declared(model)
    kinds = {"attn": ["attn_in", "head_dim", "attn_out"], "mlp": ["mlp_in", "mlp_hidden"]}
    if variant == "q/k norm":
        kinds["attn"].remove("head_dim")
    order = [(f"blocks.{block}.{part}", unit) for block in range(DEPTH) for part in kinds for unit in kinds[part]]
    assert list(units) == order
    assert {unit for (_, unit), group in units.items() if group.sliceable} <= {"head_dim", "mlp_hidden"}


@pytest.mark.parametrize("variant", VIT)
def test_sliceable_units_cover_all_that_writes_and_reads_them(variant):
    model = tiny(**VIT[variant])
    units = declared(model)
    hidden = units["blocks.1.mlp", "mlp_hidden"]
    packed = variant == "packed SwiGLU"
    assert (hidden.total, hidden.partitions) == (model.blocks[1].mlp.fc2.in_features, 1)
    assert [(span.linear.rpartition(".")[2], span.axis, span.offset) for span in hidden.spans] == (
        [("fc1", 0, 0), ("fc1", 0, hidden.total), ("fc2", 1, 0)] if packed else [("fc1", 0, 0), ("fc2", 1, 0)]
    )
    if variant == "q/k norm":
        return
    head = units["blocks.1.attn", "head_dim"]
    assert (head.total, head.partitions) == (HEAD_DIM, HEADS)
    assert [(span.linear.rpartition(".")[2], span.axis, span.offset) for span in head.spans] == [
        ("qkv", 0, 0),
        ("qkv", 0, WIDTH),
        ("qkv", 0, 2 * WIDTH),
        ("proj", 1, 0),
    ]
    assert head.rescale_on_slice == head.spans[:1]  # queries alone
    assert {name: value(4) for name, value in head.attrs.items()} == {"head_dim": 4, "attn_dim": 12, "scale": 0.5}


@pytest.mark.parametrize("variant", VIT)
def test_gated_units_are_the_whole_input_of_what_reads_them(variant):
    """VTP's other three gates: one span, axis 1, as wide as the linear."""
    model = tiny(**VIT[variant])
    units = declared(model)
    for part, unit, reader in (("attn", "attn_in", "qkv"), ("attn", "attn_out", "proj"), ("mlp", "mlp_in", "fc1")):
        group = units[f"blocks.0.{part}", unit]
        (span,) = group.spans
        assert (span.linear, span.axis, span.offset) == (f"blocks.0.{part}.{reader}", 1, 0)
        assert (group.total, group.partitions) == (model.get_submodule(span.linear).in_features, 1)
        assert (dict(group.attrs), group.rescale_on_slice, group.sliceable) == ({}, (), False)


@pytest.mark.parametrize("variant", VIT)
def test_declared_attributes_are_those_of_the_module(variant):
    """At full width, what slicing would write is what timm has written."""
    model = tiny(**VIT[variant])
    for group in FAMILY.unit_groups(model):
        for name, value in group.attrs.items():
            assert getattr(model.get_submodule(group.module), name) == pytest.approx(value(group.total))


def test_unpacked_swiglu_writes_a_neuron_in_two_linears():
    model = tiny()
    with torch.device("meta"):
        model.blocks[0].mlp = SwiGLU(WIDTH, HIDDEN)
    assert FAMILY.refuses(model) is None
    group = declared(model)["blocks.0.mlp", "mlp_hidden"]
    places = [(span.linear.rpartition(".")[2], span.axis, span.offset, span.width) for span in group.spans]
    assert places == [("fc1_g", 0, 0, HIDDEN), ("fc1_x", 0, 0, HIDDEN), ("fc2", 1, 0, HIDDEN)]
    readers = declared(model)["blocks.0.mlp", "mlp_in"]
    assert [span.linear.rpartition(".")[2] for span in readers.spans] == ["fc1_g", "fc1_x"]


def test_a_gated_attention_has_its_gate_in_both_units():
    model = tiny()
    attention = model.blocks[0].attn
    with torch.device("meta"):
        attention.gate = nn.Linear(WIDTH, WIDTH)
    head, reads = (declared(model)["blocks.0.attn", unit] for unit in ("head_dim", "attn_in"))
    assert ("blocks.0.attn.gate", 0) in [(span.linear, span.axis) for span in head.spans]
    assert ("blocks.0.attn.gate", 1) in [(span.linear, span.axis) for span in reads.spans]


@pytest.mark.parametrize("variant", VIT)
def test_factorizable_linears_are_all_linears_of_the_blocks(variant):
    model = tiny(**VIT[variant])
    items = FAMILY.factorizable(model)
    linears = [name for name, child in model.blocks.named_modules() if isinstance(child, nn.Linear)]
    assert [item.linear for item in items] == [f"blocks.{name}" for name in linears]
    assert {item.linear for item in items if item.kind == "attention"} == {
        f"blocks.{block}.attn.{name}" for block in range(DEPTH) for name in ("qkv", "proj")
    }
    assert {item.kind for item in items} == {"attention", "mlp"}


@pytest.mark.parametrize("variant", VIT)
def test_attention_sites_and_input_size(variant):
    model = tiny(**VIT[variant], in_chans=1)
    sites = [(site.module, site.heads, site.head_dim) for site in FAMILY.attentions(model)]
    assert sites == [(f"blocks.{block}.attn", HEADS, HEAD_DIM) for block in range(DEPTH)]
    size = int(VIT[variant].get("img_size", 32))
    assert FAMILY.input_size(model) == (1, size, size)


def test_input_size_of_a_wide_image():
    assert FAMILY.input_size(tiny(img_size=(32, 64))) == (3, 32, 64)


# Restrictions


@pytest.mark.parametrize("variant", VIT)
def test_limits_are_said_exactly_where_a_unit_is_missing(variant):
    restrictions = FAMILY.restrictions(tiny(**VIT[variant]))
    assert restrictions == (
        ["head dims are left alone because of a norm over the head dim of q and k" + INSTEAD]
        if variant == "q/k norm"
        else []
    )


@pytest.mark.parametrize(
    ("kwargs", "unit", "words"),
    [
        ({"scale_attn_norm": True}, "head_dim", "head dims are left alone because of a norm over the attention output"),
        ({"scale_mlp_norm": True}, "mlp_hidden", "feed-forward neurons are left alone because of a norm over the hid"),
    ],
)
def test_a_norm_inside_makes_a_unit_unavailable_and_says_so(kwargs, unit, words):
    model = tiny(**kwargs)
    assert any(words in restriction for restriction in FAMILY.restrictions(model))
    assert unit not in {group.unit for group in FAMILY.unit_groups(model)}
    assert FAMILY.refuses(model) is None


# Refusals


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("resnet18", "ResNet belongs to no known family"),
    ],
)
def test_an_unsupported_model_is_refused_with_the_reason(name, reason):
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    with pytest.raises(ModelError, match=f"{name} is not supported: .*{reason}.*See `slimvit models`") as caught:
        family_of(meta(name), name)
    assert caught.value.exit_code == 2


def test_tokens_of_a_model_whose_head_was_taken_off_are_not_refused():
    model = tiny(global_pool="")
    model.head = nn.Identity()
    assert FAMILY.refuses(model) is None


def test_a_row_of_logits_per_token_is_refused():
    with pytest.raises(
        ModelError, match=r"tiny is not supported: .*a row of logits per token.*model\.kwargs\.num_classes to 0"
    ):
        family_of(tiny(global_pool=""), "tiny")
    assert FAMILY.refuses(tiny(global_pool="avg")) is None


@pytest.mark.parametrize(
    ("kwargs", "classifier", "read"),
    [
        ({}, "head", 1),
        ({"num_classes": 0}, None, 1),
        ({"num_classes": 0, "global_pool": "avg"}, None, None),
        ({"num_classes": 0, "global_pool": ""}, None, None),
        ({"num_classes": 0, "name": "deit_tiny_distilled_patch16_224"}, None, 2),
    ],
)
def test_a_model_without_a_classifier_ends_in_its_features_or_its_tokens(kwargs, classifier, read):
    model = tiny(**kwargs)
    assert FAMILY.refuses(model) is None
    assert (FAMILY.classifier(model), FAMILY.read_tokens(model)) == (classifier, read)
    stream = torch.zeros(2, model.num_prefix_tokens + 4, WIDTH, device="meta")
    tokens = kwargs.get("global_pool") == ""
    wanted = stream.shape if tokens else (2, WIDTH if classifier is None else 7)
    assert FAMILY.head(model, stream).shape == wanted


def test_other_mlps_and_depth_0_are_refused():
    model = tiny()
    model.blocks[1].mlp = nn.Identity()
    assert FAMILY.refuses(model) == ("blocks.1.mlp is a Identity; only Mlp, GluMlp and SwiGLU of linears are supported")
    assert FAMILY.refuses(tiny(depth=0)) == "the model has no blocks"
    assert "not a timm VisionTransformer" in str(FAMILY.refuses(nn.Linear(2, 2)))


def test_a_subclass_of_a_block_is_not_taken_for_the_block():
    """A subclass may compute something else with the same parts."""
    model = tiny()

    class Other(type(model.blocks[0])):  # type: ignore[misc]
        pass

    model.blocks[1].__class__ = Other
    assert FAMILY.refuses(model) == "blocks.1 is a Other; only timm's own blocks are supported"
