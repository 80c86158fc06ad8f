"""What the Eva family declares: rotations stay as they are, and so do the head dims that they act on."""

from __future__ import annotations

import pytest
import timm
import torch
from builders import EVA, TINY, VARIANTS, dense_model, problem_of, variant
from sweeps import swept
from torch import nn

from toolchain.compress.stage import Compress
from toolchain.cost import trace
from toolchain.data import open_source
from toolchain.data.transforms import Wanted
from toolchain.errors import ModelError
from toolchain.families import family_of
from toolchain.families.blocks import INSTEAD
from toolchain.families.eva import EvaFamily
from toolchain.model import run_stage
from toolchain.plan import ModelRef
from toolchain.recipe import BudgetSection, CompressSection
from toolchain.surgery.load import load_checkpoint
from toolchain.surgery.replay import create_dense

FAMILY = EvaFamily()
CASES = [case for case in EVA if case in VARIANTS]
SEPARATE = ("EVA-02 base", "grouped queries")
ROTARY = "head dims are left alone because of rotary position embeddings" + INSTEAD


def meta(name: str, **kwargs: object) -> nn.Module:
    """A timm model without weights."""
    with torch.device("meta"):
        return create_dense(ModelRef(name=name, kwargs=kwargs))


@pytest.mark.parametrize("case", CASES)
def test_neurons_are_sliced_and_head_dims_stay(case):
    model = variant(case)
    units = {(group.module, group.unit): group for group in model.groups}
    kinds = {"attn": ["attn_in", "attn_out"], "mlp": ["mlp_in", "mlp_hidden"]}
    if case == "EVA-02 base":  # a norm over the hidden layer
        kinds["mlp"].remove("mlp_hidden")
    wanted = [(f"blocks.{block}.{part}", unit) for block in range(2) for part in kinds for unit in kinds[part]]
    assert list(units) == wanted
    assert {unit for (_, unit), group in units.items() if group.sliceable} <= {"mlp_hidden"}
    readers = [span.linear.rpartition(".")[2] for span in units["blocks.1.attn", "attn_in"].spans]
    assert readers == (["q_proj", "k_proj", "v_proj"] if case in SEPARATE else ["qkv"])


@pytest.mark.parametrize("case", CASES)
def test_every_linear_of_the_blocks_can_be_factorised(case):
    model = variant(case)
    linears = [name for name, child in model.module.blocks.named_modules() if isinstance(child, nn.Linear)]
    items = FAMILY.factorizable(model.module)
    assert sorted(item.linear for item in items) == sorted(f"blocks.{name}" for name in linears)
    assert {item.linear.rpartition(".")[2] for item in items if item.ends_branch} == {"proj", "fc2"}


@pytest.mark.parametrize("case", CASES)
def test_what_is_left_alone_is_said(case):
    restrictions = FAMILY.restrictions(variant(case).module)
    if case == "EVA":
        assert restrictions == ["head dims are left alone because of the fixed width of timm's EvaAttention" + INSTEAD]
    elif case == "EVA-02 base":
        assert restrictions == [ROTARY, "feed-forward neurons are left alone because of a norm over the hidden layer"]
    else:
        assert restrictions == [ROTARY]


@pytest.mark.parametrize(
    ("name", "kwargs", "reason"),
    [
        ("vit_small_patch16_rope_224", {"global_pool": ""}, "a row of logits per token"),
        ("vit_small_patch16_rope_224", {"depth": 0}, "the model has no blocks"),
    ],
)
def test_an_unsupported_model_is_refused_with_the_reason(name, kwargs, reason):
    with pytest.raises(ModelError, match=f"{name} is not supported: .*{reason}.*See `slimvit models`"):
        family_of(meta(name, **kwargs), name)


def test_other_attentions_are_refused():
    model = meta("vit_small_patch16_rope_224", **TINY)
    model.blocks[1].attn = nn.Identity()
    assert FAMILY.refuses(model) == ("blocks.1.attn is a Identity; only EvaAttention and AttentionRope are supported")
    assert "not a timm Eva" in str(FAMILY.refuses(nn.Linear(2, 2)))


def test_the_rotation_of_a_wide_image_is_the_models_own():
    model = dense_model("vit_small_patch16_rope_224", **{**TINY, "img_size": (32, 64)}, head_init_scale=7.0)
    assert model.preprocess.input_size == (3, 32, 64)
    rope = FAMILY.rotation(model.module, 0)["rope"]
    assert rope.shape == (8, 2 * 16)  # 2·4 patches; sine and cosine of every head dim


def test_each_block_of_a_mixed_rotation_has_its_own():
    model = variant("RoPE-ViT mixed")
    with torch.no_grad():
        model.module.rope.freqs.mul_(1 + torch.rand(model.module.rope.freqs.shape))
        whole = model.module.rope.get_embed()
        ropes = [FAMILY.rotation(model.module, index)["rope"] for index in range(2)]
    assert len(ropes) == 2
    assert all(rope.equal(part) for rope, part in zip(ropes, whole, strict=True))
    assert not ropes[0].equal(ropes[1])


def test_the_macs_of_a_fused_biased_qkv_are_counted():
    model = variant("DINOv3 with biases")
    shape = trace(model.module, model.family, model.preprocess.input_size)
    assert shape.linears["blocks.0.attn.qkv"].macs == 3 * 48 * 48 * (4 + 5)  # 4 patches, a class and 4 register tokens


def test_a_dinov3_checkpoint_of_its_makers_loads(tmp_path):
    """The names of the published files: LayerScales, register tokens, one bias for q, k and v, buffers of the rotation."""
    model = variant("DINOv3 with biases")
    theirs = {"gamma_": "ls", "reg_token": "storage_tokens", "fc1_g": "w1", "fc1_x": "w2", "fc2": "w3"}
    state = {}
    for name, value in model.module.state_dict().items():
        published = f"{name}.gamma" if "gamma_" in name else name
        for ours, their in theirs.items():
            published = published.replace(ours, their)
        if not name.endswith(("q_bias", "v_bias")):
            state[published] = value.clone()
    for index, block in enumerate(model.module.blocks):
        attention = block.attn
        bias = torch.cat((attention.q_bias, torch.zeros_like(attention.q_bias), attention.v_bias))
        state[f"blocks.{index}.attn.qkv.bias"] = bias.detach()
        state[f"blocks.{index}.attn.qkv.bias_mask"] = torch.ones_like(bias)
    state["rope_embed.periods"] = torch.ones(4)
    state["mask_token"] = torch.zeros(1, 48)
    torch.save(state, tmp_path / "dinov3.pth")
    fresh = variant("DINOv3 with biases", seed=1)
    x = torch.randn(2, *model.preprocess.input_size)
    with torch.no_grad():
        wanted, before = model.module(x), fresh.module(x)
        load_checkpoint(fresh.module, FAMILY, tmp_path / "dinov3.pth")
        assert not torch.allclose(wanted, before, atol=1e-2)
        torch.testing.assert_close(fresh.module(x), wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("case", swept(CASES, [*CASES][::3]))
def test_the_default_method_halves_it_within_the_budget(case):
    model = variant(case)
    source = open_source("digits", Wanted(model.preprocess.input_size, {}, calibration_images=32))
    share = 0.85 if case == "EVA-02 base" else 0.5  # attention is all that can shrink
    problem = problem_of(model, CompressSection(allocation="uniform"), BudgetSection(params=share))
    masked = run_stage(Compress(source), problem).artifact
    shrunk = {low.module.rpartition(".")[2] for low in masked.plan.low_ranks}
    assert "proj" in shrunk
    assert shrunk & {"qkv", "q_proj"}
    neurons = {keep.unit for keep in masked.plan.keeps}
    assert neurons == (set() if case == "EVA-02 base" else {"mlp_hidden"})


def test_timm_still_has_what_is_set_and_read():
    """Names that timm does not promise."""
    model = timm.create_model("vit_small_patch16_rope_mixed_224", **TINY)
    assert model.rope_mixed
    assert not model.dynamic_img_size
    assert (
        not timm.create_model("eva02_small_patch14_224", **{**TINY, "img_size": 28, "patch_size": 14})
        .blocks[0]
        .attn.qkv_bias_separate
    )
