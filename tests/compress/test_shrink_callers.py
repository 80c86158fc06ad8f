"""What a caller's torch is set to, and what a caller did to a model, before it is shrunk."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import pytest
import timm
import torch
from builders import TINY, randomise
from torch import Tensor, nn

import toolchain
from toolchain.errors import ModelError
from toolchain.recipe import CompressSection

UNIFORM = CompressSection(allocation="uniform")


def vit(**kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    return randomise(timm.create_model("vit_tiny_patch16_224", **{**TINY, **kwargs})).eval()


def pictures() -> list[Tensor]:
    return list(torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(1)).split(8))


class Default(AbstractContextManager):
    """A block in which new tensors are of a type."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype, self.before = dtype, torch.get_default_dtype()

    def __enter__(self) -> None:
        torch.set_default_dtype(self.dtype)

    def __exit__(self, *_: object) -> None:
        torch.set_default_dtype(self.before)


SETTINGS = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no_grad": torch.no_grad,
    "float64": lambda: Default(torch.float64),
    "bfloat16": lambda: Default(torch.bfloat16),
    "device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_callers_torch_has_no_part_in_what_comes_out(setting: str):
    def outputs(context: AbstractContextManager) -> Tensor:
        model, images = vit(), pictures()
        with context:
            small, _ = toolchain.shrink(model, images, params=0.7, output="logits")
            dtype = torch.get_default_dtype()
        assert dtype == (context.dtype if isinstance(context, Default) else torch.float32)
        return small(images[0])

    torch.testing.assert_close(outputs(SETTINGS[setting]()), outputs(nullcontext()), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"])
def test_checkpointing_of_blocks_hides_nothing_and_stays_on(name: str):
    swin = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4)}
    model = randomise(timm.create_model(name, **(TINY if "vit" in name else swin))).train()
    model.set_grad_checkpointing(True)
    marks = [getattr(module, "grad_checkpointing", None) for module in model.modules()]
    small, _ = toolchain.shrink(model, pictures(), params=0.8, output="logits", compress=UNIFORM)
    assert [getattr(module, "grad_checkpointing", None) for module in small.modules()] == marks
    assert [getattr(module, "grad_checkpointing", None) for module in model.modules()] == marks


class Both(nn.Module):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"one": x, "two": -x}


def test_what_is_no_tensor_is_refused_and_the_advice_works():
    model = vit()
    model.head = Both()
    with pytest.raises(ModelError, match=r"returns a dict, .* pass forward = lambda images: model\.forward_features"):
        toolchain.shrink(model, pictures(), params=0.7)
    small, plan = toolchain.shrink(model, pictures(), 0.7, forward=lambda images: model.forward_features(images))  # noqa: PLW0108
    assert plan.model.layers
    assert set(small(pictures()[0])) == {"one", "two"}


def test_a_head_that_was_taken_off_leaves_features(caplog: pytest.LogCaptureFixture):
    model = vit()
    model.head = nn.Identity()
    assert toolchain.shrink(model, pictures(), params=0.7, compress=UNIFORM).plan.model.output == "features"
    assert "taken for class logits" not in caplog.text


def test_an_output_that_there_is_not_is_refused():
    with pytest.raises(ModelError, match=r"output is one of 'logits', .*, got 'logit'"):
        toolchain.shrink(vit(), pictures(), output="logit")  # type: ignore[arg-type]


def positions(model: nn.Module) -> None:
    old = model._pos_embed
    model._pos_embed = lambda x: 5 * old(x)


def attention(model: nn.Module) -> None:
    old = model.blocks[1].attn.forward
    model.blocks[1].attn.forward = lambda x, **kwargs: 2 * old(x, **kwargs)


def one_block_twice(model: nn.Module) -> None:
    model.blocks[1] = model.blocks[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (positions, "its _pos_embed was replaced on the instance"),
        (attention, r"its blocks\.1\.attn\.forward was replaced on the instance"),
        (one_block_twice, r"blocks\.1\.norm1\.weight is blocks\.0\.norm1\.weight as well"),
    ],
)
def test_a_method_or_a_block_that_a_copy_would_share_is_refused(change: Callable[[nn.Module], None], message: str):
    model = vit()
    change(model)
    with pytest.raises(ModelError, match=message):
        toolchain.shrink(model, pictures(), params=0.7)
